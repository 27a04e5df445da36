"""The same call gives the same bits: whatever the threads, the batch around it, the place in the batch."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest
from inputs import normal, qkv

import fastattn

# Prefill, decode (which splits the keys), grouped heads, masks, ragged lengths.
CASES = {
    "prefill": ({"B": 2, "Sq": 200, "Sk": 333, "Hq": 3, "D": 40}, {"causal": True}),
    "prefill-gqa": ({"B": 2, "Sq": 130, "Sk": 300, "Hq": 4, "Hkv": 1, "D": 64}, {}),
    "decode": ({"B": 3, "Sq": 1, "Sk": 2100, "Hq": 8, "Hkv": 2, "D": 64}, {}),
    "decode-one": ({"B": 1, "Sq": 1, "Sk": 4097, "Hq": 8, "D": 33}, {}),
    "decode-rows": ({"B": 2, "Sq": 2, "Sk": 2100, "Hq": 16, "Hkv": 2, "D": 64}, {"causal": True}),
    "split": ({"B": 2, "Sq": 100, "Sk": 2100, "Hq": 2, "D": 32}, {"causal": True}),
    "few-rows": ({"B": 2, "Sq": 5, "Sk": 1500, "Hq": 2, "D": 32}, {"causal": True}),
    "dropout": ({"B": 2, "Sq": 70, "Sk": 300, "Hq": 2, "D": 16}, {"dropout": 0.3, "seed": 5}),
    "window": ({"B": 2, "Sq": 300, "Sk": 300, "Hq": 2, "D": 16}, {"window": (40, 9), "softcap": 5.0}),
    "lens": ({"B": 2, "Sq": 100, "Sk": 500, "Hq": 2, "D": 16}, {"q_lens": [100, 7], "kv_lens": [333, 480]}),
}


def same(a, b):
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a, b, strict=True))


def call(kernel, arrays, kw):
    kw = {name: np.array(x) if isinstance(x, list) else x for name, x in kw.items()}
    results = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **kw)
    return [np.ascontiguousarray(x) for x in results]


@pytest.mark.parametrize("case", list(CASES))
def test_number_of_threads_does_not_matter(kernel, dtype, case, threads):
    sizes, kw = CASES[case]
    arrays = qkv(dtype, **sizes)
    results = []
    for n in (1, 2, 3, 4, 1):
        fastattn.set_num_threads(n)
        results.append(call(kernel, arrays, kw))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "case", ["prefill", "decode", "decode-rows", "split", "few-rows", "prefill-gqa", "window"]
)
def test_batch_around_an_entry_does_not_matter(kernel, dtype, case, threads):
    sizes, kw = CASES[case]
    fastattn.set_num_threads(2)
    q, k, v = qkv(dtype, **(sizes | {"B": 1}))
    alone = call(kernel, (q, k, v), kw)
    for B, at in ((2, 0), (2, 1), (5, 3), (9, 8)):
        batch = qkv(dtype, **(sizes | {"B": B}), seed=B)
        for whole, entry in zip(batch, (q, k, v), strict=True):
            whole[at] = entry[0]
        assert same([x[at : at + 1] for x in call(kernel, batch, kw)], alone)


@pytest.mark.parametrize("Sq", [1, 3, 140])
def test_other_kv_heads_do_not_matter(kernel, dtype, Sq):
    q, k, v = qkv(dtype, Sq=Sq, Sk=700, Hq=8, Hkv=4, D=24)
    out, lse = call(kernel, (q, k, v), {})
    for g in range(4):
        part = call(kernel, (q[:, :, 2 * g : 2 * g + 2], k[:, :, g : g + 1], v[:, :, g : g + 1]), {})
        assert same([out[:, :, 2 * g : 2 * g + 2], lse[:, 2 * g : 2 * g + 2]], part)


def test_other_lengths_in_the_batch_do_not_matter(kernel, dtype):
    q, k, v = qkv(dtype, B=3, Sq=3, Sk=900, Hq=2, D=24)
    kw = {"q_lens": [3, 2, 1], "kv_lens": [900, 5, 400], "causal": True}
    out, lse = call(kernel, (q, k, v), kw)
    for b in range(3):
        one = {"q_lens": kw["q_lens"][b : b + 1], "kv_lens": kw["kv_lens"][b : b + 1], "causal": True}
        part = call(kernel, (q[b : b + 1], k[b : b + 1], v[b : b + 1]), one)
        assert same([out[b : b + 1], lse[b : b + 1]], part)


def test_repeated_calls(kernel, dtype):
    for sizes, kw in CASES.values():
        arrays = qkv(dtype, **sizes)
        first = call(kernel, arrays, kw)
        for _ in range(3):
            assert same(first, call(kernel, arrays, kw))


def test_concurrent_load_does_not_matter(kernel, dtype):
    sizes, kw = CASES["decode"]
    arrays = qkv(dtype, **sizes)
    alone = call(kernel, arrays, kw)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for result in pool.map(lambda _: call(kernel, arrays, kw), range(12)):
            assert same(alone, result)


def test_layout_does_not_matter(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=70, Sk=130, Hq=4, Hkv=2, D=24)
    mask = normal((2, 1, 70, 130), np.float32, 3) > -1
    a = fastattn.mha(q, k, v, kernel=kernel, mask=mask)
    b = fastattn.mha(*(x.swapaxes(1, 2) for x in (q, k, v)), layout="bhsd", kernel=kernel, mask=mask)
    assert np.array_equal(a, b.swapaxes(1, 2))
