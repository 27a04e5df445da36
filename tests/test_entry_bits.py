"""An entry has the bits that it has alone: in a padded batch, beside other heads, from any strides, on any
number of threads.

Gradients that are summed over entries (dbias without a batch axis, dalibi_slopes, dsinks) are not meant, and
dropout is keyed by the place in the batch.
"""

from __future__ import annotations

import numpy as np
import pytest
from inputs import normal

import fastattn

pytestmark = pytest.mark.cpu_only

HQ, HKV = 4, 2
# (q_len, kv_len): prefill and decode, with and without splits and sections, empty ones.
LENGTHS = {
    "short": [(1, 1), (5, 37), (33, 130), (0, 64), (70, 257), (9, 0), (3, 300)],
    "long": [(1, 1300), (4, 600), (130, 700), (5, 4700), (70, 2300), (1, 15)],
}
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (90, 3), "softcap": 4.0},
    "offset": {"causal": True, "q_offset": 20},
    "bias": {"bias": True, "mask": True},
    "sinks": {"sinks": True, "alibi_slopes": True, "causal": True},
}


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def side_inputs(options, dtype, Sq, Sk):
    """The options with their arrays for a batch of one; the mask leaves every row something."""
    kw = dict(options)
    if kw.pop("bias", False):
        kw["bias"] = normal((1, HQ, Sq, Sk), dtype, seed=5)
    if kw.pop("mask", False):
        kw["mask"] = np.random.default_rng(6).random((1, 1, Sq, Sk)) < 0.6
    if kw.pop("sinks", False):
        kw["sinks"] = normal((HQ,), np.float32, seed=7)
    if kw.pop("alibi_slopes", False):
        kw["alibi_slopes"] = np.linspace(0.01, 0.2, HQ, dtype=np.float32)
    return kw


def cut(kw, q_len, kv_len):
    return {name: x[:, :, :q_len, :kv_len] if name in ("bias", "mask") else x for name, x in kw.items()}


def attend(kernel, arrays, kw):
    """out and lse; with dout also dq, dk, dv."""
    q, k, v, dout = arrays
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, kernel=kernel, **kw)
    return {"out": out, "lse": lse, "dq": grads.dq, "dk": grads.dk, "dv": grads.dv}


def padded_batch(dtype, lengths, D, Dv):
    """Arrays of the longest lengths; what lies beyond an entry's own is NaN."""
    B, Sq, Sk = len(lengths), max(q for q, _ in lengths) + 3, max(k for _, k in lengths) + 7
    q, dout = normal((B, Sq, HQ, D), dtype, seed=1), normal((B, Sq, HQ, Dv), dtype, seed=2)
    k, v = normal((B, Sk, HKV, D), dtype, seed=3), normal((B, Sk, HKV, Dv), dtype, seed=4)
    for b, (q_len, kv_len) in enumerate(lengths):
        q[b, q_len:] = dout[b, q_len:] = k[b, kv_len:] = v[b, kv_len:] = np.nan
    return q, k, v, dout


def entry_of(arrays, b, q_len, kv_len):
    q, k, v, dout = arrays
    return q[b : b + 1, :q_len], k[b : b + 1, :kv_len], v[b : b + 1, :kv_len], dout[b : b + 1, :q_len]


def assert_entry(found, b, q_len, kv_len, alone):
    """Entry b of the batch's results is `alone`; beyond it there are zeros, and an lse of -inf."""
    rows = {"out": q_len, "dq": q_len, "dk": kv_len, "dv": kv_len}
    for name, n in rows.items():
        assert np.array_equal(bits(found[name][b, :n]), bits(alone[name][0])), (name, b)
        assert not np.any(found[name][b, n:]), (name, b)
    assert np.array_equal(bits(found["lse"][b, :, :q_len]), bits(alone["lse"][0])), b
    assert np.all(found["lse"][b, :, q_len:] == -np.inf), b


@pytest.mark.parametrize("case", list(OPTIONS))
@pytest.mark.parametrize("lengths", list(LENGTHS))
def test_padded_entry_has_the_bits_that_it_has_alone(kernel, dtype, lengths, case, threads):
    pairs = LENGTHS[lengths]
    D, Dv = (40, 24) if lengths == "short" else (16, 32)
    arrays = padded_batch(dtype, pairs, D, Dv)
    kw = side_inputs(OPTIONS[case], dtype, arrays[0].shape[1], arrays[1].shape[1])
    q_lens, kv_lens = (np.array(x) for x in zip(*pairs, strict=True))
    fastattn.set_num_threads(1)
    alone = [attend(kernel, entry_of(arrays, b, *pair), cut(kw, *pair)) for b, pair in enumerate(pairs)]
    for n in (2,) if kernel == "cpu-reference" else (1, 2, 3):
        fastattn.set_num_threads(n)
        found = attend(kernel, arrays, kw | {"q_lens": q_lens, "kv_lens": kv_lens})
        for b, pair in enumerate(pairs):
            assert_entry(found, b, *pair, alone[b])


@pytest.mark.parametrize("order", [[6, 2, 0, 5, 1, 4, 3], [4, 4, 4], [1]])
def test_order_and_neighbours_do_not_matter(kernel, dtype, order, threads):
    pairs = LENGTHS["short"]
    arrays = padded_batch(dtype, pairs, 32, 32)
    picked = [x[order] for x in arrays]
    chosen = [pairs[b] for b in order]
    q_lens, kv_lens = (np.array(x) for x in zip(*chosen, strict=True))
    fastattn.set_num_threads(2)
    found = attend(kernel, picked, {"q_lens": q_lens, "kv_lens": kv_lens})
    for at, b in enumerate(order):
        assert_entry(found, at, *pairs[b], attend(kernel, entry_of(arrays, b, *pairs[b]), {}))


def spread(x, axis):
    """The same numbers, with `axis` the one that is contiguous, and room between the rows."""
    wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)[..., 1:-2]
    if axis != x.ndim - 1:
        wide = np.moveaxis(
            np.zeros([n for i, n in enumerate(x.shape) if i != axis] + [x.shape[axis]], x.dtype), -1, axis
        )
    wide[...] = x
    return wide


@pytest.mark.parametrize("sizes", [(1, 700), (4, 1300), (12, 900), (40, 70), (130, 300)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_strides_do_not_matter(kernel, dtype, sizes, axis, threads):
    fastattn.set_num_threads(2)
    arrays = padded_batch(dtype, [sizes], 33, 48)
    arrays = entry_of(arrays, 0, *sizes)
    plain = attend(kernel, arrays, {"causal": True})
    other = attend(kernel, [spread(x, axis) for x in arrays], {"causal": True})
    for name, x in plain.items():
        assert np.array_equal(bits(x), bits(other[name])), name


@pytest.mark.parametrize("sizes", [(1, 700), (4, 1300), (12, 900), (40, 70), (130, 300)])
def test_other_heads_do_not_matter(kernel, dtype, sizes, threads):
    fastattn.set_num_threads(2)
    q, k, v, dout = entry_of(padded_batch(dtype, [sizes], 33, 48), 0, *sizes)
    whole = attend(kernel, (q, k, v, dout), {})
    G = HQ // HKV
    for h in range(HKV):
        rows = slice(h * G, (h + 1) * G)
        part = attend(kernel, (q[:, :, rows], k[:, :, h : h + 1], v[:, :, h : h + 1], dout[:, :, rows]), {})
        for name, x in part.items():
            heads = (
                whole[name][:, rows]
                if name == "lse"
                else whole[name][:, :, rows if name in ("out", "dq") else slice(h, h + 1)]
            )
            assert np.array_equal(bits(x), bits(heads)), name
