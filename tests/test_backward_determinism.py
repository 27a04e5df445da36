"""The same gradients to the bit: whatever the threads, the batch around an entry, its place in the batch."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
from inputs import normal, qkv, stats_dtype

import fastattn

pytestmark = pytest.mark.cpu_only

# Few and many rows and keys, grouped heads, all that is summed over rows, heads and the batch.
CASES = {
    "plain": ({"B": 2, "Sq": 130, "Sk": 333, "Hq": 3, "D": 24}, {"causal": True}),
    "gqa": ({"B": 2, "Sq": 100, "Sk": 150, "Hq": 4, "Hkv": 1, "D": 40}, {}),
    "few-rows": ({"B": 2, "Sq": 3, "Sk": 700, "Hq": 4, "Hkv": 2, "D": 32}, {"causal": True}),
    "few-keys": ({"B": 2, "Sq": 500, "Sk": 5, "Hq": 2, "D": 16}, {}),
    "dropout": ({"B": 2, "Sq": 70, "Sk": 200, "Hq": 2, "D": 16}, {"dropout": 0.3, "seed": 5, "softcap": 5.0}),
    "lens": ({"B": 2, "Sq": 100, "Sk": 300, "Hq": 2, "D": 16}, {"q_lens": [100, 7], "kv_lens": [233, 280]}),
    "sums": ({"B": 3, "Sq": 70, "Sk": 90, "Hq": 4, "Hkv": 2, "D": 16}, {"window": (40, 9)}),
}


def sides(dtype, B, Hq, Sk, per_entry):
    """Arguments with gradients; per_entry: every one of them has a batch axis of its own."""
    bias = normal((B if per_entry else 1, Hq, 1, Sk), dtype, 3)
    slopes = np.full((B, Hq) if per_entry else (Hq,), 0.03, np.float32)
    return {"bias": bias, "alibi_slopes": slopes} | ({} if per_entry else {"sinks": np.zeros(Hq)})


def call(kernel, arrays, dout, kw):
    kw = {name: np.array(x) if isinstance(x, list) else x for name, x in kw.items()}
    out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **kw)
    grads = fastattn.mha_backward(dout, *arrays, out, lse, dlse=np.ones_like(lse), kernel=kernel, **kw)
    return [np.ascontiguousarray(x) for x in grads if x is not None]


def same(a, b):
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", list(CASES))
def test_number_of_threads_does_not_matter(kernel, dtype, case, threads):
    sizes, kw = CASES[case]
    arrays = qkv(dtype, **sizes)
    dout = normal(arrays[0].shape, dtype, 1)
    if case == "sums":
        kw = kw | sides(dtype, sizes["B"], sizes["Hq"], sizes["Sk"], per_entry=False)
    results = []
    for n in (1, 2, 3, 5, 1):
        fastattn.set_num_threads(n)
        results.append(call(kernel, arrays, dout, kw))
    assert len(results[0]) == (6 if case == "sums" else 3)
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("case", ["plain", "gqa", "few-rows", "few-keys", "dropout"])
def test_batch_around_an_entry_does_not_matter(kernel, dtype, case, threads):
    sizes, kw = CASES[case]
    fastattn.set_num_threads(2)
    alone = qkv(dtype, **(sizes | {"B": 1}))
    dout = normal(alone[0].shape, dtype, 1)
    side = sides(dtype, 1, sizes["Hq"], sizes["Sk"], per_entry=True)
    want = call(kernel, alone, dout, kw | side)
    for B, at in ((2, 0), (5, 3)):
        if "dropout" in kw and at:
            continue  # its mask depends on the place in the batch
        whole = (*qkv(dtype, **(sizes | {"B": B}), seed=B), normal((B, *dout.shape[1:]), dtype, B))
        for big, entry in zip(whole, (*alone, dout), strict=True):
            big[at] = entry[0]
        around = sides(dtype, B, sizes["Hq"], sizes["Sk"], per_entry=True)
        for name, entry in side.items():
            around[name][at] = entry[0]
        got = call(kernel, whole[:3], whole[3], kw | around)
        assert same([x[at : at + 1] for x in got], want)


def test_other_kv_heads_do_not_matter(kernel, dtype):
    q, k, v = qkv(dtype, Sq=60, Sk=200, Hq=8, Hkv=4, D=24)
    dout = normal(q.shape, dtype, 1)
    whole = call(kernel, (q, k, v), dout, {})
    for g in range(4):
        few, one = (
            (slice(None), slice(None), slice(2 * g, 2 * g + 2)),
            (slice(None), slice(None), slice(g, g + 1)),
        )
        part = call(kernel, (q[few], k[one], v[one]), dout[few], {})
        assert same([np.ascontiguousarray(x[n]) for x, n in zip(whole, (few, one, one), strict=True)], part)


def test_concurrent_calls(kernel, dtype):
    sizes, kw = CASES["sums"]
    kw = kw | sides(dtype, sizes["B"], sizes["Hq"], sizes["Sk"], per_entry=False)
    arrays = qkv(dtype, **sizes)
    dout = normal(arrays[0].shape, dtype, 1)
    alone = call(kernel, arrays, dout, kw)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: call(kernel, arrays, dout, kw), range(8)):
            assert same(alone, result)


def test_need_dbias_does_not_change_the_others(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=70, Sk=90, Hq=2, D=16)
    kw = {"bias": normal((70, 90), dtype, 2), "causal": True}
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    dlse = normal(lse.shape, stats_dtype(dtype), 4)
    grads = [
        fastattn.mha_backward(out, q, k, v, out, lse, dlse=dlse, need_dbias=need, kernel=kernel, **kw)
        for need in (True, False)
    ]
    assert same(grads[0][:3], grads[1][:3])
