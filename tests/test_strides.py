"""Strides of all kinds in inputs and out; aliased inputs; logical sizes past 2**31 and 2**32."""

from __future__ import annotations

import contextlib
import mmap
import sys

import numpy as np
import pytest
from gate import check
from inputs import STRIDES, qkv, restride

import fastattn

SIZES = {"B": 2, "Sq": 19, "Sk": 70, "Hq": 4, "Hkv": 2, "D": 24, "Dv": 17}


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strided_inputs(kernel, dtype, how, layout):
    arrays = qkv(dtype, layout=layout, **SIZES)
    plain = fastattn.mha(*arrays, layout=layout, kernel=kernel, causal=True)
    for which in ((0,), (1,), (2,), (0, 1, 2)):
        views = [restride(x, how) if n in which else x for n, x in enumerate(arrays)]
        out, _ = check(kernel, *views, layout=layout, causal=True)
        assert np.array_equal(out, plain), "the bits depend on the strides"
    decode = [views[0][:, :1] if layout == "bshd" else views[0][:, :, :1], *views[1:]]
    check(kernel, *decode, layout=layout)


@pytest.mark.parametrize("how", STRIDES)
def test_strided_out(kernel, dtype, how):
    q, k, v = qkv(dtype, **SIZES)
    want, lse = fastattn.mha(q, k, v, kernel=kernel, causal=True, return_lse=True)
    out = restride(np.zeros_like(want), how)
    got = fastattn.mha(q, k, v, kernel=kernel, causal=True, out=out)
    assert got is out
    assert np.array_equal(out, want)
    got, got_lse = fastattn.mha(q, k, v, kernel=kernel, causal=True, out=out, return_lse=True)
    assert got is out
    assert np.array_equal(got_lse, lse)


def test_out_writes_nothing_beside_it(kernel, dtype):
    q, k, v = qkv(dtype, B=2, Sq=19, Sk=30, Hq=3, D=8, Dv=5)
    frame = np.full((2, 21, 5, 9), 77, dtype)
    out = frame[:, 1:-1, 1:-1, 2:-2]
    fastattn.mha(q, k, v, kernel=kernel, out=out, q_lens=np.array([19, 4]))
    assert np.array_equal(out, fastattn.mha(q, k, v, kernel=kernel, q_lens=np.array([19, 4])))
    out[...] = 77
    assert (frame == 77).all()


def test_every_element_of_out_is_written(kernel, dtype):
    """Rows that see nothing and rows past q_len too, over old NaN."""
    q, k, v = qkv(dtype, B=3, Sq=70, Sk=40, Hq=2, D=8)
    kw = {"q_lens": np.array([70, 0, 33]), "kv_lens": np.array([40, 9, 0]), "causal": True, "kernel": kernel}
    out = np.full(q.shape, np.nan, dtype)
    fastattn.mha(q, k, v, out=out, **kw)
    assert not np.isnan(out.astype(float)).any()
    empty = np.full((3, 70, 2, 8), np.nan, dtype)
    fastattn.mha(q, k[:, :0], v[:, :0], out=empty, kernel=kernel)
    assert (empty == 0).all()


def test_zero_strides(kernel, dtype):
    q, k, v = qkv(dtype, **SIZES)
    for axis in range(4):
        one = tuple(slice(0, 1) if n == axis else slice(None) for n in range(4))
        views = [np.broadcast_to(x[one], x.shape) for x in (q, k, v)]
        out, _ = check(kernel, *views, causal=True)
        assert np.array_equal(out, fastattn.mha(*map(np.copy, views), kernel=kernel, causal=True))


def test_read_only_and_aliased_inputs(kernel, dtype):
    x = qkv(dtype, B=2, Sq=33, Hq=2, D=16)[0]
    before = x.copy()
    x.flags.writeable = False
    check(kernel, x, x, x, causal=True)
    mask = np.tril(np.ones((33, 33), bool))
    bias = np.zeros((33, 33), dtype)
    for side in (mask, bias):
        side.flags.writeable = False
    check(kernel, x, x[:, ::-1], x, mask=mask, bias=bias)
    packed = np.concatenate([x, x, x], axis=-1)  # q, k and v as slices of one projection
    check(kernel, packed[..., :16], packed[..., 16:32], packed[..., 32:])
    assert np.array_equal(x, before)


@pytest.mark.parametrize("how", ["negative-last", "strided-last", "misaligned", "odd-strides", "negative"])
def test_strided_side_arrays(kernel, dtype, how):
    q, k, v = qkv(dtype, **SIZES)
    rng = np.random.default_rng(0)
    slopes, sinks = rng.random((1, 2, 4)).astype(np.float32), rng.random((1, 1, 4))
    lens = np.array([[[40, 70]]], np.int32)
    check(
        kernel, q, k, v,
        alibi_slopes=restride(slopes, how)[0], sinks=restride(sinks, how)[0, 0],
        kv_lens=restride(lens, how)[0, 0], q_offset=restride(lens.astype(np.int64), how)[0, 0],
        mask=restride(rng.random((2, 4, 19, 70)) < 0.5, how), causal=True,
        bias=restride(rng.normal(size=(2, 4, 19, 70)).astype(dtype), how),
    )  # fmt: skip


# ---- past 2**31 and 2**32 elements ----------------------------------------------------------------
@pytest.mark.parametrize("Sk", [2**31 + 9, 2**32 + 9, 2**33])
def test_large_logical_key_axis(kernel, dtype, Sk):
    """All keys are one key by stride 0; window, lengths and offset leave a few of them."""
    D = 8
    q, k, v = qkv(dtype, Sq=5, Sk=1, Hq=2, Hkv=1, D=D)
    k, v = (np.broadcast_to(x, (1, Sk, 1, D)) for x in (k, v))
    mask = np.broadcast_to(np.True_, (1, 1, 1, Sk))
    want = np.broadcast_to(v[:, :1], (1, 5, 2, D)).astype(float)
    for kw in (
        {"kv_lens": np.array([7]), "q_offset": 0, "causal": True},
        {"causal": True, "window": (3, None)},  # bottom right: the last keys
        {"causal": True, "window": (3, 0), "mask": mask},
        {"window": (2, 2), "q_offset": 2**31 - 3, "mask": mask},
    ):
        out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **kw)
        np.testing.assert_allclose(out.astype(float), want, rtol=1e-2 if dtype.itemsize == 2 else 1e-6)
        assert np.isfinite(lse).all()
    slopes = np.array([1.0, 0.5], np.float32)
    alibi = {"q_offset": Sk - 5, "window": (3, 0), "alibi_slopes": slopes, "kernel": kernel}
    near = {"q_offset": 95, "window": (3, 0), "alibi_slopes": slopes, "kernel": kernel}
    a = fastattn.mha(q, k, v, return_lse=True, **alibi)
    b = fastattn.mha(q, k[:, :100], v[:, :100], return_lse=True, **near)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-6, atol=1e-6)


@contextlib.contextmanager
def far_apart(values, axis, step):
    """A copy of values whose neighbours along one axis lie step elements apart, in memory never touched."""
    strides = list(np.empty(values.shape, values.dtype).strides)
    strides[axis] = step * values.itemsize
    room = strides[axis] * (values.shape[axis] - 1) + values.nbytes
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if sys.platform == "linux":
        flags |= getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, room, flags=flags)
    except OSError as error:
        pytest.skip(f"{room >> 30} GiB of address space: {error}")
    far = np.ndarray(values.shape, values.dtype, memory, 0, strides)
    far[...] = values
    yield far


@pytest.mark.skipif(sys.platform == "win32", reason="MAP_NORESERVE")
@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["batch", "seq", "head", "dim"])
def test_strides_past_32_bits(kernel, dtype, axis):
    shape = [(2, 4, 1, 8), (1, 2, 1, 8), (1, 4, 2, 8), (1, 4, 1, 2)][axis]
    q, k, v = qkv(dtype, B=shape[0], Sq=shape[1], Hq=shape[2], D=shape[3])
    step = 2**32 + 5
    with far_apart(k, axis, step) as far:
        check(kernel, q, far, v)
        check(kernel, q, k, far)
        want, _ = check(kernel, far, far, far)
        far[...] = 0
        fastattn.mha(k, k, k, kernel=kernel, out=far)
        np.testing.assert_allclose(far.astype(float), want.astype(float), rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(sys.platform == "win32", reason="MAP_NORESERVE")
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_mask_and_bias_strides_past_32_bits(kernel, dtype, axis):
    shape = tuple(2 if n == axis else size for n, size in enumerate((2, 2, 3, 5)))
    q, k, v = qkv(dtype, B=shape[0], Sq=shape[2], Sk=shape[3], Hq=shape[1], D=8)
    rng = np.random.default_rng(axis)
    with far_apart(rng.random(shape) < 0.5, axis, 2**32 + 7) as mask:
        check(kernel, q, k, v, mask=mask)
    with far_apart(rng.normal(size=shape).astype(dtype), axis, 2**32 + 7) as bias:
        check(kernel, q, k, v, bias=bias)


@pytest.mark.one_dtype
def test_many_batches_by_zero_stride(kernel, dtype):
    """More than 2**31 logical elements of K while every (batch, head) problem stays tiny."""
    B, D = 2**16, 1
    k = np.broadcast_to(np.ones((1, 1, 1, 1), dtype), (B, 2**16, 1, D))
    q = np.ones((B, 1, 1, D), dtype)
    out = fastattn.mha(q, k, k, kv_lens=np.full(B, 2, np.uint8), kernel=kernel)
    assert (out == 1).all()
