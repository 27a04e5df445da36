"""Scores and scalars at the edges of their dtype; no slack for size, since equal scores weigh the same."""

import numpy as np
import pytest
from inputs import normal, qkv

import fastattn

SIZES = [(1, 1), (16, 1), (16, 65), (1, 300), (16, 300), (9, 1100)]


def bias_dtype(dtype):
    return np.float64 if dtype == np.float64 else np.float32


def tolerance(dtype):
    return {8: 1e-13, 4: 2e-6, 2: 1e-2}[np.dtype(dtype).itemsize]


def expect(kernel, dtype, q, k, v, want, **kw):
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
    np.testing.assert_allclose(out.astype(float), np.broadcast_to(want, out.shape), atol=tolerance(dtype))
    return lse


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [-1e5, -1e9, 1e9, 3e30, "lowest", "highest"])
def test_constant_bias_changes_nothing(kernel, dtype, size, value):
    Sq, Sk = size
    limits = np.finfo(bias_dtype(dtype))
    value = {"lowest": limits.min, "highest": limits.max}.get(value, value)
    q, k, v = qkv(dtype, Sq=Sq, Sk=Sk, D=16)
    bias = np.full((Sq, Sk), value, bias_dtype(dtype))
    mean = v.astype(float).mean(axis=1, keepdims=True)
    lse = expect(kernel, dtype, np.zeros_like(q), k, v, mean, bias=bias)
    np.testing.assert_allclose(lse, float(value) + np.log(Sk) * (abs(value) < 1e30), rtol=1e-5)


@pytest.mark.parametrize("Sq", [1, 16])
@pytest.mark.parametrize("key", [3, 100, 290])
def test_lowest_bias_masks(kernel, dtype, Sq, key):
    q, k, v = qkv(dtype, Sq=Sq, Sk=300, D=16)
    bias = np.full(300, np.finfo(bias_dtype(dtype)).min, bias_dtype(dtype))
    bias[key] = 0
    expect(kernel, dtype, q, k, v, v[:, key : key + 1].astype(float), bias=bias)


@pytest.mark.parametrize("Sq", [1, 16])
@pytest.mark.parametrize("size", [1e4, 1e9, 5e18])
def test_maximum_that_rises_from_block_to_block(kernel, dtype, Sq, size):
    if dtype == np.float16:
        size = 100.0  # squared below, it is a score of 1e4
    q, k = np.full((1, Sq, 1, 1), 1, dtype), np.zeros((1, 400, 1, 1), dtype)
    k[0, 0], k[0, 100], k[0, 350] = 5 * size, 8 * size, 9 * size
    v = normal((1, 400, 1, 16), dtype, 3)
    expect(kernel, dtype, q, k, v, v[:, 350:351].astype(float), scale=size if size < 1e10 else 1.0)


@pytest.mark.parametrize("Sq", [1, 16])
def test_softcap_and_scale_beyond_float32(kernel, dtype, Sq):
    q, k, v = qkv(dtype, Sq=Sq, Sk=70, D=16)
    plain = fastattn.mha(q, k, v, kernel=kernel).astype(float)
    expect(kernel, dtype, q, k, v, plain, softcap=1e39)
    mean = v.astype(float).mean(axis=1, keepdims=True)
    expect(kernel, dtype, q, k, v, mean, softcap=1e-40)
    expect(kernel, dtype, q, k, v, mean, softcap=1e-50)
    expect(kernel, dtype, np.zeros_like(q), k, v, mean, scale=1e39)
    slopes = np.array([1e39])
    own_key = {"alibi_slopes": slopes, "q_offset": 5}
    want = np.stack([v[:, min(5 + i, 69)] for i in range(Sq)], axis=1).astype(float)
    expect(kernel, dtype, np.zeros_like(q), k, v, want, **own_key)


@pytest.mark.parametrize("sinks", [None, 0.5])
def test_weights_of_rows_without_a_denominator(kernel, dtype, sinks):
    """All attended scores are -inf: by the formula 0/0; with a sink 0. Masked keys keep weight 0."""
    q, v = np.ones((1, 9, 1, 4), dtype), normal((1, 20, 1, 4), dtype, 1)
    k = np.full((1, 20, 1, 4), -np.inf, dtype)
    mask = np.arange(20) < 13
    kw = {} if sinks is None else {"sinks": np.array([sinks])}
    out, weights = fastattn.mha(q, k, v, mask=mask, kernel=kernel, return_weights=True, **kw)
    expected = np.nan if sinks is None else 0.0
    np.testing.assert_array_equal(weights[..., :13], expected)
    np.testing.assert_array_equal(weights[..., 13:], 0.0)
    np.testing.assert_array_equal(out.astype(float), expected)


def test_gradients_where_lse_is_coarse(kernel, dtype):
    """lse of a few millions is a quarter or so off: the rows' weights must still add up to 1."""
    q, k, v = qkv(dtype, Sq=128, Sk=300, D=256)
    q, k = (np.clip(1000 * x.astype(float), -6e4, 6e4).astype(dtype) for x in (q, k))
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True)
    gradients = fastattn.mha_backward(np.ones_like(out), q, k, v, out, lse, kernel=kernel)
    total = gradients.dv.astype(float).sum(axis=1)
    heads = q.shape[2] // k.shape[2]
    rtol = max(50 * tolerance(dtype), 1e-8)  # lse in float64 is good to 1e-9 here
    np.testing.assert_allclose(total, np.full_like(total, 128 * heads), rtol=rtol)
