"""Which keys a row may attend: mask, bias, window, causal, lengths, offsets, and all of them together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gate import check
from inputs import qkv, stats_dtype

B, H, SQ, SK = 2, 4, 35, 70
BROADCASTS = (
    (),
    (1,),
    (SK,),
    (SQ, 1),
    (SQ, SK),
    (H, 1, 1),
    (H, SQ, SK),
    (1, SQ, SK),
    (1, 1, 1, SK),
    (B, 1, 1, SK),
    (B, 1, SQ, SK),
    (1, H, 1, SK),
    (B, H, SQ, 1),
    (B, H, 1, 1),
    (B, H, SQ, SK),
)


def shape_id(shape):
    return "x".join(map(str, shape)) or "scalar"


def problem(dtype, **sizes):
    return qkv(dtype, **({"B": B, "Hq": H, "Hkv": 2, "Sq": SQ, "Sk": SK, "D": 16} | sizes))


@pytest.mark.parametrize("shape", BROADCASTS, ids=shape_id)
def test_mask_broadcasts(kernel, dtype, shape):
    mask = np.random.default_rng(len(shape)).random(shape) < 0.6
    q, k, v = problem(dtype)
    check(kernel, q, k, v, mask=np.asarray(mask), weights=True)
    check(kernel, q, k, v, mask=np.broadcast_to(mask, (B, H, SQ, SK)), causal=True)


@pytest.mark.parametrize("shape", BROADCASTS, ids=shape_id)
@pytest.mark.parametrize("which", ["own", "stats"])
def test_bias_broadcasts(kernel, dtype, shape, which):
    bias_dtype = dtype if which == "own" else stats_dtype(dtype)
    bias = np.array(np.random.default_rng(len(shape)).normal(size=shape)).astype(bias_dtype)
    q, k, v = problem(dtype)
    check(kernel, q, k, v, bias=bias, weights=True)
    bias[np.random.default_rng(9).random(shape) < 0.4] = -np.inf
    check(kernel, q, k, v, bias=np.broadcast_to(bias, (B, H, SQ, SK)), causal=True)


def views(x):
    """The same values of x (B,H,Sq,Sk) with other strides."""
    doubled = np.repeat(np.repeat(x, 2, axis=3), 2, axis=2)
    return {
        "every-other": doubled[:, :, ::2, ::2],
        "negative": x[:, ::-1, ::-1, ::-1].copy()[:, ::-1, ::-1, ::-1],
        "transposed": np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3),
        "fortran": np.asfortranarray(x),
        "head-last": np.ascontiguousarray(np.moveaxis(x, 1, 3)).transpose(0, 3, 1, 2),
        "zero-batch": np.broadcast_to(x[:1], x.shape),
        "zero-query": np.broadcast_to(x[:, :, :1], x.shape),
        "zero-key": np.broadcast_to(x[..., :1], x.shape),
    }


@pytest.mark.parametrize("how", list(views(np.zeros((1, 1, 1, 1)))))
def test_strided_mask_and_bias(kernel, dtype, how):
    rng = np.random.default_rng(3)
    q, k, v = problem(dtype)
    mask = views(rng.random((B, H, SQ, SK)) < 0.5)[how]
    check(kernel, q, k, v, mask=mask)
    bias = views(rng.normal(size=(B, H, SQ, SK)).astype(dtype))[how]
    check(kernel, q, k, v, bias=bias, mask=mask, causal=True)


def test_mask_of_low_rank_inputs(kernel, dtype):
    rng = np.random.default_rng(0)
    for rank, shapes in (
        (3, [(7,), (4, 1, 7), (4, 5, 7), (1, 1, 5, 7)]),
        (2, [(7,), (5, 7), (5, 1), (1, 1, 5, 7)]),
    ):
        q, k, v = qkv(dtype, Sq=5, Sk=7, Hq=4 if rank == 3 else 1, rank=rank)
        for shape in shapes:
            mask, bias = rng.random(shape) < 0.6, rng.normal(size=shape).astype(dtype)
            check(kernel, q, k, v, mask=mask, bias=bias, weights=True)


@pytest.mark.parametrize("nothing", [False, True])
def test_constant_masks(kernel, dtype, nothing):
    q, k, v = problem(dtype)
    out, lse, weights = check(kernel, q, k, v, mask=np.full((SQ, SK), not nothing), weights=True)
    assert (out == 0).all() == nothing
    assert (lse == -np.inf).all() == nothing
    assert (weights == 0).all() == nothing


def test_rows_that_see_nothing(kernel, dtype):
    q, k, v = problem(dtype, Sq=140, Sk=300)
    mask = np.random.default_rng(1).random((B, 1, 140, 300)) < 0.5
    mask[:, :, 3::4] = False
    sinks = np.arange(H, dtype=np.float32)
    out, lse, _ = check(kernel, q, k, v, mask=mask, weights=True)
    assert (out[:, 3::4] == 0).all()
    assert (lse[:, :, 3::4] == -np.inf).all()
    out, lse = check(kernel, q, k, v, mask=mask, sinks=sinks)
    assert (out[:, 3::4] == 0).all()
    np.testing.assert_allclose(lse[:, :, 3::4], np.broadcast_to(sinks[:, None], (B, H, 35)), rtol=1e-15)
    check(kernel, q, k, v, bias=np.where(mask, 0, -np.inf).astype(dtype))


@pytest.mark.parametrize("block", [32, 64, 100, 256])
def test_whole_blocks_masked(kernel, dtype, block):
    """Blocks that a kernel may skip, at every alignment, first and last ones too."""
    S = 513
    q, k, v = qkv(dtype, Sq=S, Sk=S, D=16, seed=block)
    i, j = np.arange(S)[:, None] // block, np.arange(S) // block
    for mask in (i == j, (i + j) % 2 == 0, (i != j) & (j > 0), j == S // block):
        check(kernel, q, k, v, mask=mask)
        check(kernel, q, k, v, mask=mask, causal=True)


def test_single_keys(kernel, dtype):
    """Rows that see exactly one key copy its value."""
    S = 300
    q, k, v = qkv(dtype, Sq=S, Sk=S, D=16)
    target = np.random.default_rng(2).permutation(S)
    mask = target[:, None] == np.arange(S)
    out, _ = check(kernel, q, k, v, mask=mask)
    np.testing.assert_allclose(
        out[0, :, 0].astype(float), v[0, target, 0].astype(float), rtol=1e-6, atol=1e-6
    )


# ---- window, causal, lengths, offsets -------------------------------------------------------------
WINDOWS = (None, (0, 0), (3, None), (None, 2), (5, 4), (64, 0), (0, 64), (1000, 1000), (2**62, 2**63 - 1))
OFFSETS = (None, 0, 7, -9, 40, "array")


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("Sq", "Sk"), [(33, 70), (70, 33), (150, 150), (1, 90)])
def test_windows(kernel, dtype, window, causal, Sq, Sk):
    q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=2, Hkv=1, D=8)
    for offset in OFFSETS:
        q_offset = np.array([-5, 21]) if offset == "array" else offset
        check(kernel, q, k, v, window=window, causal=causal, q_offset=q_offset, weights=offset == 7)


# Over several blocks of keys and of rows; every tile begins at a key of its own.
@pytest.mark.parametrize("window", [(0, 0), (40, 9), (17, 300)], ids=str)
def test_windows_over_blocks(kernel, dtype, window):
    q, k, v = qkv(dtype, B=1, Sq=300, Sk=560, D=32)
    check(kernel, q, k, v, window=window, q_offset=250)
    check(kernel, q, k, v, window=window, causal=True, q_offset=3, dropout=0.2, seed=4)
    check(kernel, q[:, 200:], k, v, window=window, kv_lens=[501], q_offset=400, weights=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lens", ["q", "kv", "both"])
@pytest.mark.parametrize("window", [None, (4, 3)], ids=str)
def test_lengths(kernel, dtype, causal, lens, window):
    Sq, Sk = 70, 131
    pairs = list(itertools.product((0, 1, 35, 70), (0, 1, 64, 131)))
    q, k, v = qkv(dtype, B=len(pairs), Sq=Sq, Sk=Sk, D=8, Hq=2)
    kw = {}
    if lens != "kv":
        kw["q_lens"] = np.array([a for a, _ in pairs])
    if lens != "q":
        kw["kv_lens"] = np.array([b for _, b in pairs])
    out, lse, _ = check(kernel, q, k, v, causal=causal, window=window, weights=True, **kw)
    sinks = np.ones(2, np.float32)
    check(kernel, q, k, v, causal=causal, window=window, sinks=sinks, **kw)
    check(kernel, q, k, v, causal=causal, window=window, q_offset=3, **kw)
    if "q_lens" in kw:
        for b, n in enumerate(kw["q_lens"]):
            assert (out[b, n:] == 0).all()
            assert (lse[b, :, n:] == -np.inf).all()


@pytest.mark.one_dtype
@pytest.mark.parametrize("integer", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_integer_dtypes_of_lengths(kernel, dtype, integer):
    q, k, v = qkv(dtype, B=3, Sq=9, Sk=20, D=8)
    q_lens, kv_lens, q_offset = (np.array(x, integer) for x in ([0, 5, 9], [20, 1, 7], [3, 0, 2]))
    check(kernel, q, k, v, q_lens=q_lens, kv_lens=kv_lens, causal=True)
    check(kernel, q, k, v, q_lens=q_lens[::-1], kv_lens=kv_lens[::-1], q_offset=q_offset[::-1], causal=True)


@pytest.mark.one_dtype
def test_huge_offsets_and_windows(kernel, dtype):
    q, k, v = qkv(dtype, Sq=5, Sk=9, D=8)
    big = 2**63 - 1
    for q_offset in (big, -big - 1, 2**40, -(2**40)):
        check(kernel, q, k, v, causal=True, q_offset=q_offset)
        check(kernel, q, k, v, window=(big, big), q_offset=q_offset)
        check(kernel, q, k, v, window=(2**40, 0), q_offset=q_offset)
        check(kernel, q, k, v, window=(None, 2**40 + 3), q_offset=q_offset, causal=True)


@pytest.mark.parametrize("seed", range(12))
def test_everything_intersects(kernel, dtype, seed):
    rng = np.random.default_rng(seed)
    Sq, Sk = int(rng.integers(1, 200)), int(rng.integers(1, 300))
    q, k, v = qkv(dtype, B=2, Sq=Sq, Sk=Sk, Hq=2, Hkv=1, D=12, seed=seed)
    bias = np.where(rng.random((1, 2, Sq, Sk)) < 0.2, -np.inf, rng.normal(size=(1, 2, Sq, Sk)))
    check(
        kernel, q, k, v,
        causal=bool(seed % 2),
        window=(int(rng.integers(100)), int(rng.integers(100))),
        q_offset=rng.integers(-20, 150, 2) if seed % 3 else None,
        mask=rng.random((2, 1, Sq, Sk)) < 0.8,
        bias=bias.astype(dtype),
        q_lens=rng.integers(0, Sq + 1, 2),
        kv_lens=rng.integers(0, Sk + 1, 2),
        sinks=rng.normal(size=2) if seed % 4 == 0 else None,
        weights=True,
    )  # fmt: skip
