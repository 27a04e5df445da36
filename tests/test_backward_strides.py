"""Gradients do not depend on strides, of inputs, dout, out, lse and side arrays; inputs may be one array."""

from __future__ import annotations

import numpy as np
import pytest
from gate_backward import check_backward
from inputs import STRIDES, normal, qkv, restride, stats_dtype

import fastattn

SIZES = {"B": 2, "Sq": 19, "Sk": 70, "Hq": 4, "Hkv": 2, "D": 24, "Dv": 17}


def same(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def arguments(kernel, dtype, **kw):
    """Positional arguments of mha_backward, and dlse."""
    q, k, v = qkv(dtype, **SIZES)
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    return [normal(out.shape, dtype, 1), q, k, v, out, lse, normal(lse.shape, stats_dtype(dtype), 2)]


def backward(kernel, arrays, **kw):
    return fastattn.mha_backward(*arrays[:6], dlse=arrays[6], kernel=kernel, **kw)


@pytest.mark.parametrize("how", STRIDES)
def test_strided_arrays(kernel, dtype, how):
    arrays = arguments(kernel, dtype, causal=True)
    plain = backward(kernel, arrays, causal=True)
    before = [x.copy() for x in arrays]
    for which in (*range(7), None):
        views = [restride(x, how) if which in (n, None) else x for n, x in enumerate(arrays)]
        assert same(backward(kernel, views, causal=True), plain), which
        assert same(views, before)


@pytest.mark.parametrize("how", ["negative-last", "strided-last", "misaligned", "odd-strides", "negative"])
def test_strided_side_arrays(kernel, dtype, how):
    rng = np.random.default_rng(0)
    slopes, sinks = rng.random((1, 2, 4)).astype(np.float32), rng.random((1, 1, 4))
    lens = np.array([[[40, 70]]], np.int32)
    bias, mask = rng.normal(size=(2, 4, 19, 70)).astype(dtype), rng.random((2, 4, 19, 70)) < 0.5
    plain = {
        "alibi_slopes": slopes[0],
        "sinks": sinks[0, 0],
        "kv_lens": lens[0, 0],
        "bias": bias,
        "mask": mask,
    }
    strided = {
        "alibi_slopes": restride(slopes, how)[0], "sinks": restride(sinks, how)[0, 0],
        "kv_lens": restride(lens, how)[0, 0], "bias": restride(bias, how), "mask": restride(mask, how),
    }  # fmt: skip
    arrays = arguments(kernel, dtype, **plain)
    assert same(backward(kernel, arrays, **strided), backward(kernel, arrays, **plain))


def test_zero_strides(kernel, dtype):
    """An axis of stride 0 is no axis that is summed over: the gradient has the argument's shape."""
    bias = np.broadcast_to(normal((19, 1), dtype, 3), (2, 4, 19, 70))
    slopes, sinks = np.broadcast_to(np.float64(0.1), (2, 4)), np.broadcast_to(np.float32(0.5), (4,))
    for axis in range(4):
        one = tuple(slice(0, 1) if n == axis else slice(None) for n in range(4))
        q, k, v = (np.broadcast_to(x[one], x.shape) for x in qkv(dtype, **SIZES))
        dout = np.broadcast_to(normal((2, 19, 4, 17), dtype, 1)[one], (2, 19, 4, 17))
        check_backward(kernel, q, k, v, dout=dout, bias=bias, alibi_slopes=slopes, sinks=sinks)


def test_aliased_arrays(kernel, dtype):
    """One array as q, k, v and dout; q, k, v as slices of one projection; lse as dlse."""
    x = qkv(dtype, B=2, Sq=33, Hq=2, D=16)[0]
    check_backward(kernel, x, x, x, dout=x, causal=True)
    packed = np.concatenate([x, x[:, ::-1], x], axis=-1)
    q, k, v = packed[..., :16], packed[..., 16:32], packed[..., 32:]
    check_backward(kernel, q, k, v, dout=q, causal=True)
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True)
    grads = fastattn.mha_backward(out, q, k, v, out, lse, dlse=lse, kernel=kernel)
    assert same(grads, fastattn.mha_backward(out.copy(), q, k, v, out, lse, dlse=lse.copy(), kernel=kernel))


def test_layout_does_not_matter(kernel, dtype):
    kw = {"bias": normal((4, 19, 1), dtype, 3), "causal": True, "dropout": 0.2}
    arrays = arguments(kernel, dtype, **kw)
    swapped = [x.swapaxes(1, 2) for x in arrays[:5]] + arrays[5:]
    plain, other = backward(kernel, arrays, **kw), backward(kernel, swapped, layout="bhsd", **kw)
    assert same([*(x.swapaxes(1, 2) for x in other[:3]), *other[3:]], plain)
