"""What is added to the scores and the weights: scale, softcap, alibi, sinks, dropout; lse and weights."""

from __future__ import annotations

import numpy as np
import pytest
from gate import check
from inputs import DTYPES, normal, qkv, stats_dtype

import fastattn
from fastattn import reference

SIZES = {"B": 2, "Sq": 37, "Sk": 150, "Hq": 4, "Hkv": 2, "D": 24}


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.5, 3.0, 1e-30, np.float32(0.25), 2])
def test_scale(kernel, dtype, scale):
    q, k, v = qkv(dtype, **SIZES)
    check(kernel, q, k, v, scale=scale, weights=True)
    check(kernel, q[:, :1], k, v, scale=scale)


@pytest.mark.parametrize("softcap", [0.1, 1.0, 30.0, 1e6])
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_softcap(kernel, dtype, softcap, spread):
    q, k, v = qkv(dtype, **SIZES, spread=spread)
    check(kernel, q, k, v, softcap=softcap, causal=True, weights=True)
    check(kernel, q[:, :1], k, v, softcap=softcap, bias=normal((4, 1, 150), dtype, 5))


def test_softcap_of_small_scores(kernel, dtype):
    """tanh must be accurate near 0, not only in absolute terms."""
    q, k, v = qkv(dtype, Sq=9, Sk=64, D=16)
    _, lse, _ = check(kernel, q, k, v, scale=1e-3, softcap=50.0, weights=True)
    _, plain, _ = check(kernel, q, k, v, scale=1e-3, weights=True)
    assert np.abs(lse - plain).max() < 1e-4


@pytest.mark.parametrize("slopes_dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_alibi(kernel, dtype, slopes_dtype, shape):
    slopes = np.abs(normal(shape, DTYPES[slopes_dtype], 8, 0.2))
    q, k, v = qkv(dtype, **SIZES)
    check(kernel, q, k, v, alibi_slopes=slopes, weights=True)
    check(kernel, q, k, v, alibi_slopes=slopes, causal=True, q_offset=60)
    check(kernel, q, k, v, alibi_slopes=slopes, q_lens=[20, 37], kv_lens=[150, 70])


def test_alibi_details(kernel, dtype):
    q, k, v = qkv(dtype, Sq=33, Sk=90, Hq=4, D=16)
    check(kernel, q, k, v, alibi_slopes=np.array([0.0, -0.1, 1.0, 8.0], np.float32))  # negative slopes too
    check(kernel, q, k, v, alibi_slopes=np.array([[0.5, 9, 0.25, 9, 1.0, 9, 2.0, 9]], np.float32)[:, ::2])
    check(kernel, q, k, v, alibi_slopes=np.broadcast_to(np.float64(0.1), (4,)), q_offset=-40)
    q, k, v = qkv(dtype, Sq=3, Sk=9, rank=2)
    check(kernel, q, k, v, alibi_slopes=np.array([0.5], np.float32))


@pytest.mark.parametrize("sinks_dtype", list(DTYPES))
def test_sinks(kernel, dtype, sinks_dtype):
    sinks = np.array([0.0, -3.0, 5.0, -np.inf]).astype(DTYPES[sinks_dtype])
    q, k, v = qkv(dtype, **SIZES)
    _, lse, _ = check(kernel, q, k, v, sinks=sinks, weights=True)
    _, plain, _ = check(kernel, q, k, v, weights=True)
    assert (lse[:, :3] > plain[:, :3] - 1e-6).all()
    check(kernel, q[:, :1], k, v, sinks=sinks, causal=True, window=(5, 0))
    check(kernel, q, k, v, sinks=np.repeat(sinks, 2)[::2], q_lens=[0, 30], kv_lens=[9, 0])


@pytest.mark.parametrize("sink", [-1e4, 80.0, 1e4])
def test_large_sinks(kernel, dtype, sink):
    q, k, v = qkv(dtype, Sq=9, Sk=300, D=16)
    out, lse, _ = check(kernel, q, k, v, sinks=np.array([sink]), weights=True)
    if sink == 1e4:
        assert (out == 0).all()
        assert (lse == np.float32(1e4)).all()


@pytest.mark.parametrize("magnitude", [1e2, 1e4])
def test_large_scores(kernel, dtype, magnitude):
    """No overflow and no NaN with scores past +-1e4, in rising and falling order along the keys."""
    D = 16
    q, k, v = qkv(dtype, Sq=33, Sk=300, D=D)
    spread = np.sqrt(magnitude)
    q, k = (x.astype(np.float64) * spread for x in (q, k))
    order = np.argsort(np.einsum("d,kd->k", q[0, 0, 0], k[0, :, 0]))
    for keys in (slice(None), order, order[::-1]):
        got = check(
            kernel, q.astype(dtype), k[:, keys].astype(dtype), v, weights=True, score_size=6 * magnitude
        )
        assert all(np.isfinite(x.astype(float)).all() for x in got)
    bias = np.array([-1e4, 1e4])[np.random.default_rng(0).integers(0, 2, (33, 300))]
    arrays = qkv(dtype, Sq=33, Sk=300, D=D)
    check(kernel, *arrays, bias=bias.astype(dtype), score_size=1e4)
    check(kernel, *arrays, bias=np.full((33, 1), -3e4).astype(dtype), score_size=3e4)


# ---- dropout --------------------------------------------------------------------------------------
def test_dropout_mask_is_the_one_of_philox(kernel, dtype):
    """Scores 0 and v = identity: out shows which weights were kept."""
    B, H, Sq, Sk, p, seed = 2, 3, 21, 70, 0.4, 2**40 + 17
    q, k = np.zeros((B, Sq, H, 8), dtype), np.zeros((B, Sk, H, 8), dtype)
    v = np.broadcast_to(np.eye(Sk, dtype=dtype)[None, :, None], (B, Sk, H, Sk))
    out = fastattn.mha(q, k, v, dropout=p, seed=seed, kernel=kernel).astype(float)
    for b in range(B):
        for h in range(H):
            assert ((out[b, :, h] != 0) == reference.dropout_keep(Sq, Sk, p, seed, b, h)).all()
    np.testing.assert_allclose(out[out != 0], 1 / Sk / (1 - p), rtol=5e-3)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_dropout(kernel, dtype, p, seed):
    q, k, v = qkv(dtype, **SIZES)
    out, lse, weights = check(kernel, q, k, v, dropout=p, seed=seed, weights=True)
    plain = check(kernel, q, k, v, weights=True)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5 if dtype.itemsize == 4 else 1e-3
    np.testing.assert_allclose(lse, plain[1], rtol=tolerance)  # the denominator is that before dropout
    np.testing.assert_allclose(weights, plain[2], rtol=tolerance)
    assert np.array_equal(out, plain[0]) == (p == 0.0)
    check(kernel, q[:, :1], k, v, dropout=p, seed=seed, sinks=np.ones(4), alibi_slopes=np.ones(4) / 50)


def test_dropout_with_restrictions(kernel, dtype):
    """The random number belongs to (b, h, i, j), whatever else is masked or skipped."""
    q, k, v = qkv(dtype, **(SIZES | {"Sk": 301}))
    kw = {"dropout": 0.3, "seed": 11}
    mask = np.random.default_rng(0).random((1, 4, 37, 301)) < 0.5
    check(kernel, q, k, v, mask=mask, **kw)
    check(kernel, q, k, v, causal=True, window=(33, 0), **kw)
    check(kernel, q, k, v, q_lens=[30, 2], kv_lens=[299, 130], **kw)
    check(kernel, q, k, v, causal=True, q_offset=[3, 200], window=(1, 70), **kw)
    a = fastattn.mha(q, k, v, kernel=kernel, dropout=0.3, seed=11)
    assert not np.array_equal(a, fastattn.mha(q, k, v, kernel=kernel, dropout=0.3, seed=12))


# ---- lse and weights ------------------------------------------------------------------------------
def test_weights_are_not_rounded_to_a_half_dtype(kernel, dtype):
    q, k, v = qkv(dtype, **SIZES)
    _, lse, weights = check(kernel, q, k, v, weights=True)
    want = reference.mha(q, k, v, return_weights=True)[1]
    relative = np.abs(weights - want) / want
    assert relative.max() < {"float64": 1e-12, "float32": 2e-5}.get(dtype.name, 1e-3)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-12 if dtype == np.float64 else 1e-3)
    if dtype.itemsize == 2:
        assert (weights.astype(dtype).astype(np.float32) != weights).mean() > 0.5
    assert lse.flags.writeable
    assert weights.flags.writeable


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_results_of_every_combination_agree(kernel, dtype, layout):
    q, k, v = qkv(dtype, layout=layout, **SIZES)

    def call(**which):
        return fastattn.mha(q, k, v, kernel=kernel, layout=layout, causal=True, **which)

    out = call()
    assert isinstance(out, np.ndarray)
    assert out.dtype == dtype
    assert out.flags.c_contiguous
    both = call(return_lse=True)
    weighted = call(return_weights=True)
    everything = call(return_lse=True, return_weights=True)
    assert tuple(map(len, (both, weighted, everything))) == (2, 2, 3)
    assert both[1].shape == (2, 4, 37)
    assert weighted[1].shape == (2, 4, 37, 150)
    assert both[1].dtype == weighted[1].dtype == stats_dtype(dtype)
    for other in (both[0], weighted[0], everything[0]):
        assert np.array_equal(out, other)
    assert np.array_equal(both[1], everything[1])
    assert np.array_equal(weighted[1], everything[2])


def test_weights_of_masked_keys_are_zero(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=20, Sk=100, D=8)
    mask = np.random.default_rng(0).random((2, 1, 20, 100)) < 0.5
    kw = {"mask": mask, "causal": True, "kv_lens": [90, 30]}
    _, _, weights = check(kernel, q, k, v, weights=True, **kw)
    p = np.arange(20)[:, None] + np.reshape(kw["kv_lens"], (2, 1, 1, 1)) - 20
    allowed = mask & (np.arange(100) <= p) & (np.arange(100) < np.reshape(kw["kv_lens"], (2, 1, 1, 1)))
    assert (weights[~allowed] == 0).all()
    assert (weights[allowed] > 0).all()


def test_everything_at_once(kernel, dtype):
    for seed in range(6):
        q, k, v = qkv(dtype, **(SIZES | {"Sq": (1, 37)[seed % 2]}), layout="bhsd", seed=seed)
        rng = np.random.default_rng(seed)
        check(
            kernel, q, k, v, layout="bhsd", scale=0.3, causal=True, window=(80, None), q_offset=[100, 20],
            mask=rng.random((2, 1, 1, 150)) < 0.7, bias=normal((4, q.shape[2], 150), dtype, seed),
            alibi_slopes=np.full(4, 0.02), softcap=4.0, sinks=np.array([0.0, 1, 2, -1]),
            q_lens=[1, q.shape[2]], kv_lens=[150, 111], dropout=0.2, seed=seed, weights=True,
        )  # fmt: skip
