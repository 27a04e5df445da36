"""NumPy arrays at the border: dtypes, addresses, subclasses, memory."""

from __future__ import annotations

import mmap

import ml_dtypes
import numpy as np
import pytest
from inputs import DTYPES, qkv, stats_dtype

import fastattn


def same(a, b):
    return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def misalign(x, offset=1):
    """The same values at an address that is not a multiple of the item size."""
    raw = np.zeros(x.nbytes + 16, np.uint8)
    view = raw[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def field(x):
    """The same values as a field of a packed struct: strides that are no multiple of the item size."""
    packed = np.zeros(x.shape, np.dtype([("pad", "u1"), ("value", x.dtype)], align=False))
    packed["value"] = x
    view = packed["value"]
    assert view.strides[-1] % x.itemsize != 0
    return view


def test_result_has_the_dtype_of_q(dtype):
    q, k, v = qkv(dtype, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)
    out, lse, weights = fastattn.mha(q, k, v, return_lse=True, return_weights=True)
    assert type(out) is type(lse) is type(weights) is np.ndarray
    assert out.dtype == dtype
    assert out.shape == (2, 5, 4, 3)
    assert lse.dtype == weights.dtype == stats_dtype(dtype)
    assert lse.shape == (2, 4, 5)
    assert weights.shape == (2, 4, 5, 7)
    for array in (out, lse, weights):
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.flags.owndata


@pytest.mark.parametrize("make", [misalign, field])
def test_misaligned_inputs(dtype, make):
    q, k, v = qkv(dtype, B=2, Sq=5, Sk=7, Hq=2, Dv=3)
    bias = np.linspace(-1, 1, 35).astype(dtype).reshape(5, 7)
    expected = fastattn.mha(q, k, v, bias=bias)
    assert same(fastattn.mha(make(q), make(k), make(v), bias=make(bias)), expected)
    for one in range(3):
        given = [q, k, v]
        given[one] = make(given[one])
        assert same(fastattn.mha(*given, bias=bias), expected)


def test_misaligned_side_arguments():
    q, k, v = qkv(np.float32, B=3, Sq=5, Sk=7, Hq=2)
    sides = {
        "alibi_slopes": np.array([0.5, 0.25]),
        "sinks": np.array([0.1, -0.3], np.float32),
        "q_lens": np.array([5, 0, 3], np.int64),
        "kv_lens": np.array([7, 4, 0], np.uint16),
        "q_offset": np.array([0, 1, -2], np.int32),
    }
    expected = fastattn.mha(q, k, v, causal=True, **sides)
    assert same(
        fastattn.mha(q, k, v, causal=True, **{name: misalign(x) for name, x in sides.items()}), expected
    )


def test_misaligned_input_is_not_materialised_along_broadcast_axes():
    k = np.broadcast_to(misalign(np.ones((1, 1, 1, 8), np.float32)), (1, 2**45, 1, 8))
    q = k[:, :1]
    # Where k was copied as it looks, this would need 2**50 bytes.
    assert np.array_equal(fastattn.mha(q, k, k, kv_lens=np.array([3]), kernel="cpu-reference"), q)


@pytest.mark.parametrize("make", [misalign, field])
def test_misaligned_out(dtype, make):
    q, k, v = qkv(dtype, B=2, Sq=5, Sk=7, Hq=2, Dv=3)
    expected = fastattn.mha(q, k, v)
    out = make(np.zeros_like(expected))
    assert fastattn.mha(q, k, v, out=out) is out
    assert same(np.ascontiguousarray(out), expected)


def test_misaligned_out_backwards_and_transposed():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7, Hq=2, Dv=3)
    expected = fastattn.mha(q, k, v)
    out = field(np.zeros((3, 2, 5, 2), np.float32)).transpose(3, 2, 1, 0)[::-1, :, ::-1]
    assert out.shape == expected.shape
    assert fastattn.mha(q, k, v, out=out) is out
    assert same(np.ascontiguousarray(out), expected)


def test_misaligned_out_leaves_its_neighbours_alone():
    q, k, v = qkv(np.float32, Sq=5, Hq=2)
    packed = np.zeros(q.shape, np.dtype([("pad", "u1"), ("value", "f4")], align=False))
    packed["pad"] = 123
    fastattn.mha(q, k, v, out=packed["value"])
    assert (packed["pad"] == 123).all()
    assert same(np.ascontiguousarray(packed["value"]), fastattn.mha(q, k, v))


def test_misaligned_arrays_that_overlap_out():
    q, k, v = qkv(np.float32, Sq=5, Hq=2)
    shared = misalign(q)
    with pytest.raises(ValueError, match=r"^out: .* q$"):
        fastattn.mha(shared, k, v, out=shared)
    aligned = shared.base[4 : 4 + q.nbytes].view(np.float32).reshape(q.shape)
    assert aligned.flags.aligned
    with pytest.raises(ValueError, match=r"^out: .* k$"):
        fastattn.mha(q, shared, v, out=aligned)
    with pytest.raises(ValueError, match=r"^out: .* v$"):
        fastattn.mha(q, k, aligned, out=shared)
    raw = np.zeros(2 * q.nbytes + 2, np.uint8)
    left, right = raw[1 : 1 + q.nbytes], raw[1 + q.nbytes : 1 + 2 * q.nbytes]
    left, right = (x.view(np.float32).reshape(q.shape) for x in (left, right))
    left[...] = q
    assert same(np.ascontiguousarray(fastattn.mha(left, k, v, out=right)), fastattn.mha(q, k, v))


def test_misaligned_out_that_overlaps_itself():
    q, k, v = qkv(np.float32, Sq=5, Hq=2, D=8)
    raw = np.zeros(4096, np.uint8)[1:]
    item = raw[:4].view(np.float32)
    for strides in ((64, 32, 4), (0, 32, 4), (64, 32, 0), (2, 32, 4)):
        out = np.lib.stride_tricks.as_strided(item, (1, 5, 2, 8), (0, *strides))
        if strides == (64, 32, 4):
            assert fastattn.mha(q, k, v, out=out) is out
        else:
            with pytest.raises(ValueError, match=r"^out: .*overlap"):
                fastattn.mha(q, k, v, out=out)


def test_strides_of_axes_of_one_do_not_matter():
    q, k, v = qkv(np.float32, Sq=5)
    odd = np.lib.stride_tricks.as_strided(q, q.shape, (3, q.strides[1], 7, q.strides[3]))
    assert same(fastattn.mha(odd, k, v), fastattn.mha(q, k, v))


def test_aligned_views_are_not_copied():
    size = 2**36  # address space, of which hardly a page is touched
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size} bytes of address space: {error}")
    big = np.frombuffer(memory, np.float32).reshape(2, -1, 4, 64)
    big[:, :8] = np.random.default_rng(0).standard_normal((2, 8, 4, 64))
    lens = np.array([5, 8])
    views = {
        "transposed": big.transpose(0, 2, 1, 3)[:, ::-1].transpose(0, 2, 1, 3),
        "halved": big[::-1, :, :, ::2],
        "backwards": big[:, 7::-1, :, ::-1],
    }
    for name, k in views.items():
        short = np.ascontiguousarray(k[:, :8])
        # Another Sk may be split another way, so the last bits may differ.
        got = fastattn.mha(short, k, k, q_offset=0, kv_lens=lens)
        want = fastattn.mha(short, short, short, q_offset=0, kv_lens=lens)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_read_only_and_aliased_inputs(dtype):
    x = qkv(dtype, Sq=6, Hq=2)[0]
    expected = fastattn.mha(x.copy(), x.copy(), x.copy())
    x.flags.writeable = False
    assert same(fastattn.mha(x, x, x), expected)


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
def test_matrix_and_memmap_and_other_subclasses(tmp_path, names):
    class Mine(np.ndarray):
        pass

    x = qkv(np.float32, Sq=6, rank=2)[0]
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    mapped[...] = x
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(x)
    for special in (matrix, mapped, x.view(Mine), x.view(np.recarray)):
        given = {name: special if name in names else x for name in "qkv"}
        out = fastattn.mha(given["q"], given["k"], given["v"])
        assert type(out) is np.ndarray
        assert same(out, fastattn.mha(x, x, x))


def test_out_may_be_a_subclass():
    class Mine(np.ndarray):
        pass

    q, k, v = qkv(np.float32, Sq=6)
    out = np.zeros_like(q).view(Mine)
    assert fastattn.mha(q, k, v, out=out) is out
    assert same(out.view(np.ndarray), fastattn.mha(q, k, v))


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks", "out"])
def test_masked_arrays_are_refused(name):
    given = dict(zip("qkv", qkv(np.float32, Sq=6), strict=True))
    given |= {"bias": np.zeros((6, 6), np.float32), "sinks": np.zeros(1), "out": np.zeros_like(given["q"])}
    given[name] = np.ma.masked_array(given[name], mask=False)
    with pytest.raises(TypeError, match=rf"^{name}: a MaskedArray has a mask of its own"):
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "q_offset", "q_lens", "out"])
def test_foreign_byte_order_is_refused(name):
    given = dict(zip("qkv", qkv(np.float32, Sq=6), strict=True))
    given |= {
        "bias": np.zeros((6, 6), np.float32),
        "q_offset": np.zeros(1, np.int32),
        "q_lens": np.full(1, 6, np.int64),
        "out": np.zeros_like(given["q"]),
    }
    given[name] = given[name].astype(given[name].dtype.newbyteorder("S"))
    with pytest.raises(TypeError, match=rf"^{name}: expected native byte order"):
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_explicit_native_byte_order_is_accepted():
    q, k, v = qkv(np.float32, Sq=6)
    explicit = np.dtype(np.float32).newbyteorder("<" if np.little_endian else ">")
    assert same(fastattn.mha(q.astype(explicit), k, v), fastattn.mha(q, k, v))


@pytest.mark.parametrize(
    "strange",
    [
        "complex64",
        "longdouble",
        "object",
        "S4",
        "U4",
        "M8[s]",
        "V2",
        "f4,i4",
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.int4,
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["q", "v", "bias", "kv_lens"])
def test_dtypes_that_do_not_exist_here(name, strange):
    given = dict(zip("qkv", qkv(np.float32, Sq=6), strict=True))
    shape = {"bias": (6, 6), "kv_lens": (1,)}.get(name, given["q"].shape)
    given[name] = np.zeros(shape, strange)
    with pytest.raises(TypeError, match=rf"^{name}: dtype .* is not supported"):
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_a_void_of_two_bytes_is_not_bfloat16():
    x = qkv(DTYPES["bfloat16"], Sq=6)[0]
    with pytest.raises(TypeError, match=r"^q: dtype \|V2 "):
        fastattn.mha(x.view("V2"), x, x)


def test_every_integer_dtype_of_lengths():
    q, k, v = qkv(np.float32, B=2, Sq=4, Sk=6)
    expected = fastattn.mha(q, k, v, kv_lens=np.array([6, 2]), q_offset=np.array([1, 2]), causal=True)
    for code in "bBhHiIlLqQ":
        lens, offset = np.array([6, 2], code), np.array([1, 2], code)
        assert same(fastattn.mha(q, k, v, kv_lens=lens, q_offset=offset, causal=True), expected)


@pytest.mark.parametrize(
    "offset", [2, np.int8(2), np.uint64(2), np.array(2), np.array(2, np.int16)], ids=repr
)
def test_scalars_for_q_offset(offset):
    q, k, v = qkv(np.float32, Sq=4, Sk=6)
    assert same(
        fastattn.mha(q, k, v, q_offset=offset, causal=True),
        fastattn.mha(q, k, v, q_offset=np.array([2]), causal=True),
    )


class Half(float):
    """A subclass of float, as libraries of units make them."""


@pytest.mark.parametrize(
    "half",
    [Half(0.5), np.float32(0.5), np.float16(0.5), np.longdouble(0.5), np.array(0.5), ml_dtypes.bfloat16(0.5)],
    ids=repr,
)
def test_kinds_of_numbers(half):
    q, k, v = qkv(np.float32, Sq=4)
    expected = fastattn.mha(q, k, v, scale=0.5, softcap=0.5, dropout=0.5, seed=7)
    assert same(fastattn.mha(q, k, v, scale=half, softcap=half, dropout=half, seed=np.uint64(7)), expected)
    assert not same(fastattn.mha(q, k, v), expected)


def test_kinds_of_bools_and_windows():
    q, k, v = qkv(np.float32, Sq=4)
    expected = fastattn.mha(q, k, v, causal=True, window=(1, None))
    assert same(fastattn.mha(q, k, v, causal=np.True_, window=[np.int32(1), None]), expected)
    assert same(fastattn.mha(q, k, v, causal=True, window=(1, 10**40)), expected)
    assert same(fastattn.mha(q, k, v, causal=np.False_), fastattn.mha(q, k, v))
    assert isinstance(fastattn.mha(q, k, v, return_lse=np.True_), tuple)


def test_empty_arrays_at_any_address():
    x = misalign(np.zeros(8, np.float32))
    empty = x[:0].reshape(0, 3, 2, 4)
    assert fastattn.mha(empty, empty, empty).shape == (0, 3, 2, 4)
