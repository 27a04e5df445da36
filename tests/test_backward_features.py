"""Gradients with each argument of mha alone, in pairs, all together; dlse; what each gradient sums over."""

from __future__ import annotations

import numpy as np
import pytest
from gate_backward import check_backward
from inputs import DTYPES, normal, qkv, stats_dtype
from test_masks import BROADCASTS, shape_id

import fastattn
from fastattn import reference

B, H, SQ, SK = 2, 4, 35, 70  # those of BROADCASTS


def problem(dtype, **sizes):
    return qkv(dtype, **({"B": B, "Hq": H, "Hkv": 2, "Sq": SQ, "Sk": SK, "D": 16, "Dv": 12} | sizes))


def gradients(kernel, arrays, dout, dlse=None, *, need_dbias=True, **kw):
    out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **kw)
    return fastattn.mha_backward(
        dout, *arrays, out, lse, dlse=dlse, need_dbias=need_dbias, kernel=kernel, **kw
    )


# ---- one argument -----------------------------------------------------------------------------------
def test_scale(kernel, dtype):
    for scale in (1.0, 0.0, -0.5, np.float32(0.25), 2):
        check_backward(kernel, *problem(dtype), scale=scale)


def test_softcap(kernel, dtype):
    bias = normal((SQ, SK), dtype, 5)
    for softcap in (0.3, 2.0, 1e6):
        check_backward(kernel, *problem(dtype, spread=2.0), softcap=softcap)
        check_backward(kernel, *problem(dtype), softcap=softcap, bias=bias, alibi_slopes=np.full(H, 0.1))


@pytest.mark.parametrize("window", [None, (0, 0), (5, 4), (None, 2), (20, None), (2**62, 2**63 - 1)], ids=str)
def test_windows(kernel, dtype, window):
    for Sq, Sk, offset in ((33, 70, None), (70, 33, 7), (50, 50, -9), (20, 60, [-5, 21])):
        arrays = qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=2, Hkv=1, D=8, Dv=11)
        for causal in (False, True):
            check_backward(kernel, *arrays, causal=causal, window=window, q_offset=offset)


@pytest.mark.parametrize("which", ["q", "kv", "both"])
def test_lengths(kernel, dtype, which):
    pairs = [(0, 131), (1, 64), (35, 0), (70, 1), (70, 131), (33, 65)]
    arrays = qkv(dtype, B=len(pairs), Sq=70, Sk=131, D=8, Hq=2)
    kw = {"q_lens": [a for a, _ in pairs], "kv_lens": [b for _, b in pairs]}
    kw.pop({"q": "kv_lens", "kv": "q_lens"}.get(which, ""), None)
    grads = check_backward(kernel, *arrays, **kw)
    check_backward(kernel, *arrays, causal=True, sinks=np.ones(2, np.float32), window=(40, None), **kw)
    for b, n in enumerate(kw.get("q_lens", ())):
        assert (grads.dq[b, n:] == 0).all()
    for b, n in enumerate(kw.get("kv_lens", ())):
        assert (grads.dk[b, n:] == 0).all()
        assert (grads.dv[b, n:] == 0).all()


@pytest.mark.parametrize("shape", BROADCASTS, ids=shape_id)
def test_mask_and_bias_broadcasts(kernel, dtype, shape):
    """dbias is summed over the axes that bias has not; in turn in q's dtype and in lse's."""
    n = BROADCASTS.index(shape)
    rng = np.random.default_rng(n)
    bias = np.array(rng.normal(size=shape)).astype((dtype, stats_dtype(dtype))[n % 2])
    check_backward(kernel, *problem(dtype), bias=bias)
    mask = np.array(rng.random(shape) < 0.6)
    bias[~mask] = -np.inf
    grads = check_backward(kernel, *problem(dtype, seed=1), bias=bias, causal=True)
    assert (grads.dbias[~mask] == 0).all()
    check_backward(kernel, *problem(dtype, seed=1), mask=mask)


def test_whole_blocks_masked(kernel, dtype):
    """Tiles that a kernel may skip, at every alignment, in rows and in keys."""
    S = 150
    arrays = qkv(dtype, Sq=S, Sk=S, D=16)
    i, j = np.arange(S)[:, None] // 32, np.arange(S) // 32
    for mask in (i == j, (i + j) % 2 == 0, (i != j) & (j > 0), (i > 1) & (j == S // 32)):
        check_backward(kernel, *arrays, mask=mask)


def test_alibi(kernel, dtype):
    for shape in ((H,), (B, H)):
        for n, slopes_dtype in enumerate(DTYPES.values()):
            slopes = np.abs(normal(shape, slopes_dtype, n, 0.2))
            check_backward(kernel, *problem(dtype), alibi_slopes=slopes)
        check_backward(kernel, *problem(dtype), alibi_slopes=-slopes, causal=True, q_offset=40)
        check_backward(kernel, *problem(dtype), alibi_slopes=slopes, q_lens=[20, 35], kv_lens=[70, 41])


def test_sinks(kernel, dtype):
    for sinks_dtype in DTYPES.values():
        sinks = np.array([0.0, -3.0, 5.0, -np.inf]).astype(sinks_dtype)
        grads = check_backward(kernel, *problem(dtype), sinks=sinks)
        assert grads.dsinks[3] == 0
    check_backward(kernel, *problem(dtype), sinks=sinks, q_lens=[0, 30], kv_lens=[9, 0], causal=True)


def test_dlse(kernel, dtype):
    """lse alone: dout is 0. And beside a dout, where the sink has a gradient without any key."""
    arrays = problem(dtype)
    dlse = normal((B, H, SQ), stats_dtype(dtype), 3)
    kw = {"dlse": dlse, "causal": True, "sinks": np.zeros(H), "q_offset": -3}
    grads = check_backward(kernel, *arrays, dout=np.zeros((B, SQ, H, 12), dtype), **kw)
    assert (grads.dv == 0).all()
    assert (grads.dq[:, 3:] != 0).any()
    check_backward(kernel, *arrays, **kw)
    check_backward(kernel, *arrays, dlse=dlse, softcap=2.0, dropout=0.3)


def test_zero_gradients(kernel, dtype):
    arrays = problem(dtype)
    sides = {"bias": np.ones(SK, dtype), "alibi_slopes": np.ones(H), "sinks": np.ones(H)}
    for x in check_backward(kernel, *arrays, dout=np.zeros((B, SQ, H, 12), dtype), **sides):
        assert (x == 0).all()


# ---- dropout --------------------------------------------------------------------------------------
def test_dropout_mask_is_that_of_the_forward(kernel, dtype):
    """Scores 0 and dout = identity: dv shows which weights were kept."""
    Sq, Sk, p, seed = 21, 70, 0.4, 2**40 + 17
    q, k, v = np.zeros((2, Sq, 3, 8), dtype), np.zeros((2, Sk, 3, 8), dtype), np.ones((2, Sk, 3, Sq), dtype)
    dout = np.broadcast_to(np.eye(Sq, dtype=dtype)[None, :, None], (2, Sq, 3, Sq))
    dv = gradients(kernel, (q, k, v), dout, dropout=p, seed=seed).dv.astype(float)
    for b in range(2):
        for h in range(3):
            assert ((dv[b, :, h].T != 0) == reference.dropout_keep(Sq, Sk, p, seed, b, h)).all()
    np.testing.assert_allclose(dv[dv != 0], 1 / Sk / (1 - p), rtol=5e-3)


def test_dropout(kernel, dtype):
    for p in (0.1, 0.5, 0.95):
        kw = {"dropout": p, "seed": 2**64 - 1}
        check_backward(kernel, *problem(dtype), bias=normal((H, 1, SK), dtype, 4), **kw)
        check_backward(kernel, *problem(dtype, Sk=73), causal=True, window=(33, 0), q_offset=[3, 40], **kw)
        check_backward(kernel, *problem(dtype), q_lens=[30, 2], kv_lens=[69, 30], sinks=np.ones(H), **kw)


# ---- what is asked for -------------------------------------------------------------------------------
def test_gradients_that_are_not_asked_for(kernel, dtype):
    arrays = problem(dtype)
    dout = normal((B, SQ, H, 12), dtype, 1)
    sides = {"bias": normal((SQ, SK), dtype, 2), "alibi_slopes": np.full(H, 0.1), "sinks": np.zeros(H)}
    every = gradients(kernel, arrays, dout, **sides)
    less = gradients(kernel, arrays, dout, need_dbias=False, **sides)
    assert less.dbias is None
    for name in ("dq", "dk", "dv", "dalibi_slopes", "dsinks"):
        assert np.array_equal(getattr(every, name), getattr(less, name))
    assert gradients(kernel, arrays, dout)[3:] == (None, None, None)
    for name, gradient in (("bias", "dbias"), ("alibi_slopes", "dalibi_slopes"), ("sinks", "dsinks")):
        grads = gradients(kernel, arrays, dout, **{name: sides[name]})
        assert {n for n, x in zip(grads._fields, grads, strict=True) if x is None} == {
            "dbias", "dalibi_slopes", "dsinks",
        } - {gradient}  # fmt: skip


def test_arguments_are_not_written(kernel, dtype):
    arrays = problem(dtype)
    dout, dlse = normal((B, SQ, H, 12), dtype, 1), normal((B, H, SQ), stats_dtype(dtype), 3)
    kw = {"bias": normal((SQ, SK), dtype, 2), "sinks": np.zeros(H), "alibi_slopes": np.ones(H)}
    out, lse = fastattn.mha(*arrays, kernel=kernel, return_lse=True, **kw)
    given = (dout, *arrays, out, lse, dlse, *kw.values())
    before = [x.copy() for x in given]
    for x in given:
        x.flags.writeable = False
    fastattn.mha_backward(dout, *arrays, out, lse, dlse=dlse, kernel=kernel, **kw)
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))


# ---- several arguments ---------------------------------------------------------------------------------
def features(dtype):
    rng = np.random.default_rng(5)
    return {
        "causal": {"causal": True},
        "window": {"window": (9, 4)},
        "q_offset": {"q_offset": np.array([12, -3])},
        "mask": {"mask": rng.random((B, 1, 21, 33)) < 0.7},
        "bias": {"bias": normal((H, 21, 33), dtype, 6)},
        "bias-sum": {"bias": normal((B, 1, 1, 33), stats_dtype(dtype), 7)},
        "alibi": {"alibi_slopes": np.full(H, 0.05, np.float32)},
        "softcap": {"softcap": 1.5},
        "sinks": {"sinks": rng.normal(size=H)},
        "q_lens": {"q_lens": np.array([20, 5])},
        "kv_lens": {"kv_lens": np.array([33, 18])},
        "dropout": {"dropout": 0.25, "seed": 9},
        "dlse": {"dlse": normal((B, H, 21), stats_dtype(dtype), 8)},
    }


NAMES = tuple(features(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_features(kernel, dtype, name):
    arrays = problem(dtype, Sq=21, Sk=33)
    every = features(dtype)
    for other in NAMES[NAMES.index(name) + 1 :] or ("causal",):
        check_backward(kernel, *arrays, **(every[name] | every[other]))


@pytest.mark.parametrize("seed", range(4))
def test_everything_at_once(kernel, dtype, seed):
    Sq = (1, 37, 80, 21)[seed]
    q, k, v = problem(dtype, Sq=Sq, Sk=150, layout="bhsd", seed=seed)
    rng = np.random.default_rng(seed)
    check_backward(
        kernel, q, k, v, layout="bhsd", scale=0.3, causal=True, window=(80, None), q_offset=[100, 20],
        mask=rng.random((2, 1, 1, 150)) < 0.7, bias=normal((H, (Sq, 1)[seed % 2], 150), dtype, seed),
        alibi_slopes=np.full(H, 0.02), softcap=4.0, sinks=np.array([0.0, 1, 2, -1]),
        q_lens=[1, Sq], kv_lens=[150, 111], dropout=0.2, seed=seed,
        dlse=normal((B, H, Sq), stats_dtype(dtype), seed),
    )  # fmt: skip
