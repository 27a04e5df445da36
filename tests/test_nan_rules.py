"""NaN and Inf: masked ones never touch a result, attended ones propagate as in the formulas."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import qkv

import fastattn

POISON = [np.nan, np.inf, -np.inf]
SQ, SK = 40, 300


def restrictions():
    """Each leaves the keys below 50 and from 280 on, and some in between, unattended for all rows."""
    middle = np.zeros(SK, bool)
    middle[60:270:3] = True
    bias = np.where(middle, 0.5, -np.inf)
    return {
        "mask": {"mask": middle},
        "mask-rows": {"mask": np.broadcast_to(middle, (SQ, SK)).copy()},
        "bias": {"bias": bias},
        "causal": {"causal": True, "q_offset": 200, "mask": np.arange(SK) >= 50},
        "window": {"window": (20, 7), "q_offset": 100},
        "lens": {"kv_lens": np.array([270]), "mask": np.arange(SK) >= 50},
        "q_lens": {"q_lens": np.array([17]), "window": (20, 0), "kv_lens": np.array([200])},
    }


def attended(kw):
    """Which keys any row attends, from the weights."""
    q, k, v = qkv(np.float32, Sq=SQ, Sk=SK, D=8)
    kw = {n: x.astype(np.float32) if n == "bias" else x for n, x in kw.items()}
    return fastattn.mha(q, k, v, return_weights=True, **kw)[1].any(axis=(0, 1, 2))


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("name", list(restrictions()))
def test_masked_poison_never_leaks(kernel, dtype, name, poison):
    kw = dict(restrictions()[name])
    seen = attended(kw)
    assert seen.any()
    assert not seen.all()
    if "bias" in kw:
        kw["bias"] = kw["bias"].astype(dtype)
    for Sq in (SQ, 1):
        q, k, v = qkv(dtype, B=1, Sq=Sq, Sk=SK, Hq=4, Hkv=2, D=20, Dv=12)
        if Sq == 1:
            kw = {
                n: (x[:1] if n == "mask" and x.ndim == 2 else np.array([1]) if n == "q_lens" else x)
                for n, x in kw.items()
            }
        clean = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, return_weights=True, **kw)
        k[:, ~seen], v[:, ~seen] = poison, poison
        got = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, return_weights=True, **kw)
        for a, b in zip(got, clean, strict=True):
            assert np.array_equal(a, b)
        if Sq == SQ:
            check(kernel, q, k, v, **kw)
            check(
                kernel,
                q,
                k,
                v,
                dropout=0.4,
                softcap=3.0,
                alibi_slopes=np.ones(4) / 9,
                sinks=np.zeros(4),
                **kw,
            )


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_poison_masked_for_some_rows_only(kernel, dtype, poison):
    """A key that one row sees and its neighbour in the same tile does not."""
    S = 130
    q, k, v = qkv(dtype, Sq=S, Sk=S, Hq=2, D=16)
    v[:, 70] = poison
    out, _ = check(kernel, q, k, v, causal=True)
    assert np.isfinite(out[:, :70].astype(float)).all()
    assert not np.isfinite(out[:, 70:].astype(float)).any()
    v[:, 70] = 0
    clean = fastattn.mha(q, k, v, kernel=kernel, causal=True)
    k[:, 70] = poison
    out, lse = fastattn.mha(q, k, v, kernel=kernel, causal=True, return_lse=True)
    assert np.array_equal(out[:, :70], clean[:, :70])
    if np.isnan(poison):
        assert np.isnan(out[:, 70:].astype(float)).all()
        assert not np.isfinite(lse[:, :, 70:]).any()


@pytest.mark.parametrize("poison", POISON, ids=str)
def test_poison_beside_a_random_mask(kernel, dtype, poison):
    rng = np.random.default_rng(0)
    q, k, v = qkv(dtype, B=2, Sq=33, Sk=150, Hq=2, D=16)
    mask = rng.random((2, 1, 33, 150)) < 0.9
    v[0, 3], v[1, 77, 0, 5], v[0, 149, 1] = poison, poison, poison
    check(kernel, q, k, v, mask=mask)


@pytest.mark.parametrize("dim", [0, 7, 15])
def test_attended_nan_in_v_stays_in_its_column(kernel, dtype, dim):
    q, k, v = qkv(dtype, Sq=33, Sk=70, D=16)
    v[0, 41, 0, dim] = np.nan
    out, lse = check(kernel, q, k, v)
    assert np.isnan(out[..., dim].astype(float)).all()
    assert np.isfinite(lse).all()
    assert np.isfinite(np.delete(out, dim, axis=-1).astype(float)).all()


def test_nan_in_q_stays_in_its_row(kernel, dtype):
    q, k, v = qkv(dtype, Sq=70, Sk=70, Hq=2, D=16)
    q[0, 33, 1, 2] = np.nan
    out, lse = check(kernel, q, k, v)
    bad = np.isnan(out.astype(float)).any(axis=-1)
    assert bad.sum() == 1
    assert bad[0, 33, 1]
    assert not np.isfinite(lse[0, 1, 33])


def test_nan_of_rows_that_do_not_exist_or_see_nothing(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=33, Sk=70, Hq=2, D=16)
    q[0, 10:], q[1, 20] = np.nan, np.inf
    mask = np.ones((2, 1, 33, 70), bool)
    mask[1, :, 20] = False
    sinks = np.array([0.5, -1])
    for kw in ({}, {"sinks": sinks}):
        out, _ = check(kernel, q, k, v, q_lens=[10, 33], mask=mask, **kw)
        assert (out[0, 10:] == 0).all()
        assert (out[1, 20] == 0).all()


def test_attended_infinite_scores(kernel, dtype):
    q, k, v = np.ones((1, 9, 1, 4), dtype), *qkv(dtype, Sq=9, Sk=70, D=4)[1:]
    k[0, 5] = np.inf  # score +inf: inf / inf
    out, lse = check(kernel, q, k, v)
    assert np.isnan(out.astype(float)).all()
    k[0, 5] = -np.inf  # score -inf: weight 0
    out, lse, weights = check(kernel, q, k, v, weights=True)
    assert (weights[..., 5] == 0).all()
    k[...] = -np.inf  # every score -inf: 0 / 0
    out, lse = check(kernel, q, k, v)
    assert np.isnan(out.astype(float)).all()
    assert (lse == -np.inf).all()
    out, lse = check(kernel, q, k, v, sinks=np.array([0.25]))
    assert (out == 0).all()
    assert (lse == 0.25).all()


def test_infinite_scores_that_are_capped(kernel, dtype):
    q, k, v = np.ones((1, 3, 1, 4), dtype), *qkv(dtype, Sq=3, Sk=20, D=4)[1:]
    k[0, 5], k[0, 6] = np.inf, -np.inf
    out, _ = check(kernel, q, k, v, softcap=5.0)
    assert np.isfinite(out.astype(float)).all()


@pytest.mark.parametrize("sink", [np.inf, np.nan])
def test_sinks_that_are_not_finite(kernel, dtype, sink):
    q, k, v = qkv(dtype, Sq=9, Sk=70, Hq=2, D=4)
    out, lse = check(kernel, q, k, v, sinks=np.array([sink, 0.0]))
    assert np.isfinite(lse[:, 1]).all()
    if sink == np.inf:
        assert (out[:, :, 0] == 0).all()
        assert (lse[:, 0] == np.inf).all()
    else:
        assert np.isnan(out[:, :, 0].astype(float)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_bias_that_is_not_finite(kernel, dtype, poison):
    q, k, v = qkv(dtype, Sq=33, Sk=150, D=8)
    bias = np.zeros((33, 150), dtype)
    bias[7, 100] = poison
    out, _lse = check(kernel, q, k, v, bias=bias)
    assert np.isnan(out[0, 7].astype(float)).all()
    assert np.isfinite(np.delete(out, 7, axis=1).astype(float)).all()
    check(kernel, q, k, v, bias=bias, mask=np.arange(150) != 100)
    out, _ = check(kernel, q, k, v, bias=bias, causal=True, q_offset=0)
    assert np.isfinite(out.astype(float)).all()


def test_inf_in_v_propagates_with_its_sign(kernel, dtype):
    q, k, v = qkv(dtype, Sq=9, Sk=70, D=4)
    v[0, 3, 0, 0], v[0, 60, 0, 1] = np.inf, -np.inf
    v[0, 3, 0, 2], v[0, 60, 0, 2] = np.inf, -np.inf
    out, _ = check(kernel, q, k, v)
    assert (out[..., 0] == np.inf).all()
    assert (out[..., 1] == -np.inf).all()
    assert np.isnan(out[..., 2].astype(float)).all()
