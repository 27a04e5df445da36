"""Gradients near NaN and Inf: masked ones are never seen, attended ones propagate; rows that see nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from gate_backward import check_backward
from inputs import normal, qkv, stats_dtype
from test_nan_rules import POISON, SK, SQ, attended, restrictions

import fastattn


def gradients(kernel, arrays, dout, dlse, **kw):
    out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **kw)
    return fastattn.mha_backward(dout, *arrays, out, lse, dlse=dlse, kernel=kernel, **kw)


def same(a, b):
    return all((x is None and y is None) or np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", list(restrictions()))
def test_masked_poison_never_leaks(kernel, dtype, name):
    kw = dict(restrictions()[name])
    seen = attended(kw)
    rows = int(kw.get("q_lens", [SQ])[0])
    if "bias" in kw:
        kw["bias"] = kw["bias"].astype(dtype)
    every = {"dropout": 0.4, "softcap": 3.0, "alibi_slopes": np.ones(4) / 9, "sinks": np.zeros(4)} | kw
    for poison in POISON:
        q, k, v = qkv(dtype, Sq=SQ, Sk=SK, Hq=4, Hkv=2, D=20, Dv=12)
        dout, dlse = normal((1, SQ, 4, 12), dtype, 1), normal((1, 4, SQ), stats_dtype(dtype), 2)
        clean = [gradients(kernel, (q, k, v), dout, dlse, **x) for x in (kw, every)]
        k[:, ~seen], v[:, ~seen] = poison, poison
        q[:, rows:], dout[:, rows:], dlse[..., rows:] = poison, poison, poison
        poisoned = [gradients(kernel, (q, k, v), dout, dlse, **x) for x in (kw, every)]
        assert same(poisoned[0], clean[0])
        assert same(poisoned[1], clean[1])
        assert all((x[:, ~seen] == 0).all() for x in (clean[0].dk, clean[0].dv))
        assert (clean[0].dq[:, rows:] == 0).all()
    check_backward(kernel, q, k, v, dout=dout, dlse=dlse, **kw)
    check_backward(kernel, q, k, v, dout=dout, dlse=dlse, **every)


def test_poison_of_rows_that_see_nothing(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=33, Sk=70, Hq=2, D=16)
    dout = normal(q.shape, dtype, 1)
    mask = np.random.default_rng(0).random((2, 1, 33, 70)) < 0.5
    mask[:, :, 20] = mask[1, :, 3] = False
    sinks = np.array([0.5, -1])
    kw = {"mask": mask, "q_lens": np.array([10, 33]), "causal": True}
    clean = gradients(kernel, (q, k, v), dout, None, **kw)
    for poison in POISON:
        q[:, 20], dout[:, 20], q[0, 10:], dout[0, 10:], q[1, 3], dout[1, 3] = [poison] * 6
        assert same(gradients(kernel, (q, k, v), dout, None, **kw), clean)
        grads = check_backward(kernel, q, k, v, dout=dout, sinks=sinks, bias=np.zeros((33, 1), dtype), **kw)
        assert np.isfinite(grads.dsinks).all()
        assert (grads.dq[:, 20] == 0).all()
        assert (grads.dbias[20] == 0).all()


def test_lse_of_rows_that_see_nothing(kernel, dtype):
    """Their lse is the sink or -inf; its gradient reaches the sink alone."""
    q, k, v = qkv(dtype, B=2, Sq=9, Sk=20, Hq=2, D=8)
    dlse = normal((2, 2, 9), stats_dtype(dtype), 1)
    mask = np.zeros(20, bool)
    for x in gradients(kernel, (q, k, v), q, dlse, mask=mask, bias=np.ones(20, dtype))[:4]:
        assert (x == 0).all()
    grads = check_backward(kernel, q, k, v, dlse=dlse, mask=mask, sinks=np.array([0.5, -1]), q_lens=[9, 4])
    expected = dlse[0].astype(float).sum(axis=-1) + dlse[1, :, :4].astype(float).sum(axis=-1)
    np.testing.assert_allclose(grads.dsinks, expected, rtol=1e-6)
    grads = check_backward(kernel, q, k, v, dlse=dlse, mask=mask, sinks=np.full(2, -np.inf))
    assert (grads.dsinks == 0).all()


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_attended_nan_propagates(kernel, dtype, name):
    """From one element along the formulas: to the rows that attend it, and to the keys that those attend."""
    q, k, v = qkv(dtype, Sq=100, Sk=100, Hq=2, D=16)
    given = {"q": q, "k": k, "v": v, "dout": normal(q.shape, dtype, 1)}
    given[name][0, 70, 1, 5] = np.nan
    grads = check_backward(kernel, **given, causal=True)
    of_a_row = name in ("q", "dout")
    i = np.arange(100)
    rows, keys = (i == 70, i <= 70) if of_a_row else (i >= 70, i >= 0)
    features = {"q": slice(None), "k": slice(None), "v": slice(0), "dout": slice(5, 6)}[name]  # of dv
    for grad, where, which in zip(
        grads, (rows, keys, keys), (slice(None), slice(None), features), strict=False
    ):
        want = np.zeros((1, 100, 2, 16), bool)
        want[:, where, 1, which] = True
        assert (np.isnan(grad.astype(float)) == want).all()


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_poison_beside_a_random_mask(kernel, dtype, poison):
    """What is not finite in the reference is not finite here, and the rest is right."""
    rng = np.random.default_rng(0)
    q, k, v = qkv(dtype, B=2, Sq=33, Sk=150, Hq=2, D=16)
    mask = rng.random((2, 1, 33, 150)) < 0.5
    mask[0, :, :, 3] = np.arange(33) > 15
    mask[1, :, :, 77] = False
    v[0, 3], k[1, 77, 0, 5], k[0, 149, 1], v[1, 149, 0, 2] = poison, poison, 0, poison
    mask[1, :, 20:, 149] = False
    if np.isnan(poison):
        check_backward(kernel, q, k, v, mask=mask)
    dout = normal(q.shape, dtype, 1)
    grads = gradients(kernel, (q, k, v), dout, None, mask=mask)
    bad_rows = ~np.isfinite(grads.dq.astype(float)).all(axis=-1)
    sees = np.zeros((2, 33, 2), bool)
    sees[0, :, :] = mask[0, 0, :, 3, None]
    sees[1, :, 0] = mask[1, 0, :, 149]
    assert (bad_rows == sees).all()
    assert np.isfinite(grads.dv.astype(float)).all()
    assert (grads.dk[1, 77] == 0).all()


def test_bias_that_is_not_finite(kernel, dtype):
    q, k, v = qkv(dtype, Sq=33, Sk=150, D=8)
    bias = np.zeros((33, 150), dtype)
    bias[7, 100] = np.nan
    grads = check_backward(kernel, q, k, v, bias=bias)
    assert np.isnan(grads.dbias[7].astype(float)).all()
    assert np.isfinite(np.delete(grads.dbias, 7, axis=0).astype(float)).all()
    check_backward(kernel, q, k, v, bias=bias, mask=np.arange(150) != 100)
    grads = check_backward(kernel, q, k, v, bias=bias, causal=True, q_offset=0)
    assert np.isfinite(grads.dbias.astype(float)).all()


@pytest.mark.parametrize("lowest", ["-1e9", "min of float32", "min of the dtype", "-1e4"])
def test_rows_masked_by_a_finite_bias(kernel, dtype, lowest):
    """Every key of such a row has the same weight; lse is then the bias and cannot say how many they are."""
    S, D = 70, 16
    of = stats_dtype(dtype) if lowest in ("-1e9", "min of float32") else dtype
    lowest_of = {"min of float32": np.float32, "min of the dtype": dtype}
    value = float(ml_dtypes.finfo(lowest_of[lowest]).min if lowest in lowest_of else lowest)
    q, k, v = qkv(dtype, Sq=S, Sk=S, Hq=2, D=D)
    dout = normal(q.shape, dtype, 1)
    bias = np.zeros((S, S), of)
    bias[:, 50:] = value
    bias[[3, 64]] = value
    if lowest.startswith("min"):
        check_backward(kernel, q, k, v, bias=bias, dout=dout)
        check_backward(kernel, q, k, v, bias=bias, dout=dout, causal=True)
    rows = np.isin(np.arange(S), [3, 64])
    dout[:, ~rows] = 0
    grads = gradients(kernel, (q, k, v), dout, None, bias=bias)
    tolerance = 2e-2 if dtype.itemsize == 2 else 2e-3
    # The weights of a row add up to 1, so dv adds up to dout and dS to 0.
    np.testing.assert_allclose(
        grads.dv.astype(float).sum(axis=1), dout.astype(float).sum(axis=1), atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(grads.dbias.astype(float).sum(axis=1), 0, atol=2 * tolerance)
    assert (grads.dbias[~rows] == 0).all()
    mean = np.broadcast_to(dout.astype(float).sum(axis=1, keepdims=True) / S, v.shape)
    if abs(value) > 1e30:
        np.testing.assert_allclose(grads.dv.astype(float), mean, atol=1e-6 if dtype.itemsize > 2 else 1e-3)


@pytest.mark.parametrize("sink", [1e10, 1e15, 1e30])
def test_sinks_that_take_all_weight(kernel, dtype, sink):
    if dtype.itemsize == 2:
        sink = min(sink, 1e10)  # of lse, which is float32
    q, k, v = qkv(dtype, Sq=5, Sk=7, Hq=1, D=16)
    sinks = np.full(1, sink, np.float64)
    grads = gradients(
        kernel, (q, k, v), normal(q.shape, dtype, 1), normal((1, 1, 5), stats_dtype(dtype), 2), sinks=sinks
    )
    for name, x in zip(("dq", "dk", "dv"), grads[:3], strict=True):
        assert (x == 0).all(), name
    assert np.isfinite(grads.dsinks).all()


def test_scale_beyond_the_dtype(kernel, dtype):
    q, k, v = qkv(dtype, Sq=5, Sk=7, Hq=1, D=16)
    q[:] = 0
    grads = gradients(
        kernel, (q, k, v), normal(q.shape, dtype, 1), normal((1, 1, 5), stats_dtype(dtype), 2), scale=1e300
    )
    assert (grads.dk == 0).all()
    assert np.isfinite(grads.dv.astype(float)).all()


@pytest.mark.cpu_only  # cuda-cublas takes a score of -inf for a masked one
def test_score_of_minus_infinity_is_attended(kernel, dtype):
    q, k, v = qkv(dtype, Sq=1, Sk=4, Hq=1, D=8)
    q[0, 0, 0, 0] = np.inf
    k[0, :, 0, 0] = [1, -1, -2, 1]
    grads = gradients(kernel, (q, k, v), normal(q.shape, dtype, 1), normal((1, 1, 1), stats_dtype(dtype), 2))
    assert np.isnan(grads.dv.astype(float)).all()  # lse is NaN or inf: exp(-inf - NaN)
