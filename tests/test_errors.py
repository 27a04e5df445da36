"""The error table: the type, and a message that names the argument, what came and what was expected."""

from __future__ import annotations

import re

import numpy as np
import pytest
from inputs import DTYPES, qkv

import fastattn

F2, F4 = np.float16, np.float32


def base():
    return dict(zip("qkv", qkv(F4, B=2, Sq=3, Sk=5, Hq=4, Hkv=2, D=8, Dv=6), strict=True))


def ones(*shape, dtype=F4):
    return np.ones(shape, dtype)


def ints(*values):
    return np.array(values)


def virtual(*shape, dtype=F4):
    """An array of any logical size on one element."""
    return np.broadcast_to(np.ones((), dtype), shape)


# (id, argument that the message must name, what is given, further pieces of the message)
TYPE_ERRORS = [
    ("q-list", "q", {"q": [[1.0]]}, ["list"]),
    ("k-none", "k", {"k": None}, ["None"]),
    ("v-str", "v", {"v": "text"}, ["str"]),
    ("q-int", "q", {"q": ones(2, 3, 4, 8, dtype=np.int32)}, ["int32"]),
    ("q-bool", "q", {"q": ones(2, 3, 4, 8, dtype=bool)}, ["bool"]),
    ("q-complex", "q", {"q": ones(2, 3, 4, 8, dtype=np.complex64)}, ["complex64"]),
    ("q-object", "q", {"q": ones(2, 3, 4, 8, dtype=object)}, ["object"]),
    ("k-differs", "k", {"k": ones(2, 5, 2, 8, dtype=np.float64)}, ["float64", "float32"]),
    ("v-differs", "v", {"v": ones(2, 5, 2, 6, dtype=np.float16)}, ["float16", "float32"]),
    ("v-bf16", "v", {"v": ones(2, 5, 2, 6, dtype=DTYPES["bfloat16"])}, ["bfloat16", "float32"]),
    ("q-order", "q", {"q": ones(2, 3, 4, 8).astype(np.dtype(F4).newbyteorder())}, ["byte order"]),
    ("v-order", "v", {"v": ones(2, 5, 2, 6).astype(np.dtype(F4).newbyteorder())}, ["byte order"]),
    ("bias-order", "bias", {"bias": ones(5).astype(np.dtype(F4).newbyteorder())}, ["byte order"]),
    ("mask-int", "mask", {"mask": ones(3, 5, dtype=np.uint8)}, ["uint8", "bool"]),
    ("mask-float", "mask", {"mask": ones(3, 5)}, ["float32", "bool"]),
    ("bias-dtype", "bias", {"bias": ones(5, dtype=np.float16)}, ["float16", "float32"]),
    ("bias-int", "bias", {"bias": ones(5, dtype=np.int64)}, ["int64"]),
    ("alibi-int", "alibi_slopes", {"alibi_slopes": ones(4, dtype=np.int32)}, ["int32"]),
    ("alibi-number", "alibi_slopes", {"alibi_slopes": object()}, []),
    ("sinks-int", "sinks", {"sinks": ones(4, dtype=np.int32)}, ["int32"]),
    ("q_lens-float", "q_lens", {"q_lens": np.array([1.0, 2.0])}, ["float64"]),
    ("kv_lens-bool", "kv_lens", {"kv_lens": np.array([True, False])}, ["bool"]),
    ("q_offset-float", "q_offset", {"q_offset": 1.5}, ["float"]),
    ("q_offset-array", "q_offset", {"q_offset": np.array([1.0, 2.0])}, ["float64"]),
    ("q_offset-str", "q_offset", {"q_offset": "1"}, ["str"]),
    ("scale-str", "scale", {"scale": "1"}, ["str"]),
    ("softcap-str", "softcap", {"softcap": "1"}, ["str"]),
    ("dropout-str", "dropout", {"dropout": "1"}, ["str"]),
    ("seed-float", "seed", {"seed": 1.5}, ["float"]),
    ("window-int", "window", {"window": 3}, ["int"]),
    ("window-float", "window", {"window": (1.5, 0)}, ["float"]),
    ("layout-int", "layout", {"layout": 3}, ["int"]),
    ("kernel-int", "kernel", {"kernel": 3}, ["int"]),
    ("device-int", "device", {"device": 3}, ["int"]),
    ("out-list", "out", {"out": [1.0]}, ["list"]),
    ("out-dtype", "out", {"out": ones(2, 3, 4, 6, dtype=np.float64)}, ["float64", "float32"]),
    ("out-order", "out", {"out": ones(2, 3, 4, 6).astype(np.dtype(F4).newbyteorder())}, ["byte order"]),
    ("unknown", "nothing", {"nothing": 1}, []),
]

VALUE_ERRORS = [
    ("q-rank1", "q", {"q": ones(8), "k": ones(8), "v": ones(8)}, ["(8,)"]),
    ("q-rank0", "q", {"q": ones(), "k": ones(), "v": ones()}, ["()"]),
    ("q-rank5", "q", {"q": ones(1, 2, 3, 4, 8)}, ["(1, 2, 3, 4, 8)"]),
    ("k-rank", "k", {"k": ones(5, 2, 8)}, ["(5, 2, 8)", "(2, 3, 4, 8)"]),
    ("v-rank", "v", {"v": ones(1, 2, 5, 2, 6)}, ["(1, 2, 5, 2, 6)"]),
    ("k-dim", "k", {"k": ones(2, 5, 2, 7)}, ["(2, 5, 2, 7)", "(2, 3, 4, 8)"]),
    ("k-batch", "k", {"k": ones(3, 5, 2, 8)}, ["(3, 5, 2, 8)", "(2, 3, 4, 8)"]),
    ("v-batch", "v", {"v": ones(1, 5, 2, 6)}, ["(1, 5, 2, 6)"]),
    ("v-seq", "v", {"v": ones(2, 6, 2, 6)}, ["(2, 6, 2, 6)", "(2, 5, 2, 8)"]),
    ("v-heads", "v", {"v": ones(2, 5, 4, 6)}, ["(2, 5, 4, 6)", "(2, 5, 2, 8)"]),
    ("heads", "k", {"k": ones(2, 5, 3, 8), "v": ones(2, 5, 3, 6)}, ["3", "4"]),
    ("heads-more", "k", {"k": ones(2, 5, 8, 8), "v": ones(2, 5, 8, 6)}, ["8", "4"]),
    ("heads-none", "k", {"k": ones(2, 5, 0, 8), "v": ones(2, 5, 0, 6)}, ["(2, 5, 0, 8)"]),
    ("dim-0", "q", {"q": ones(2, 3, 4, 0), "k": ones(2, 5, 2, 0)}, ["(2, 3, 4, 0)"]),
    ("value-dim-0", "v", {"v": ones(2, 5, 2, 0)}, ["(2, 5, 2, 0)"]),
    ("layout", "layout", {"layout": "sbhd"}, ["sbhd", "bshd", "bhsd"]),
    ("layout-swapped", "k", {"layout": "bhsd"}, ["(2, 5, 2, 8)"]),
    ("scale-nan", "scale", {"scale": float("nan")}, ["nan", "finite"]),
    ("scale-inf", "scale", {"scale": float("-inf")}, ["inf", "finite"]),
    ("window-negative", "window", {"window": (-1, 0)}, ["-1"]),
    ("window-right", "window", {"window": (None, -7)}, ["-7"]),
    ("window-length", "window", {"window": (1, 2, 3)}, ["3"]),
    ("window-short", "window", {"window": (1,)}, ["1"]),
    ("mask-shape", "mask", {"mask": ones(4, 5, dtype=bool)}, ["(4, 5)", "(2, 4, 3, 5)"]),
    ("mask-last", "mask", {"mask": ones(3, 4, dtype=bool)}, ["(3, 4)", "(2, 4, 3, 5)"]),
    ("mask-batch", "mask", {"mask": ones(3, 1, 3, 5, dtype=bool)}, ["(3, 1, 3, 5)", "(2, 4, 3, 5)"]),
    ("mask-kv-heads", "mask", {"mask": ones(2, 2, 3, 5, dtype=bool)}, ["(2, 2, 3, 5)", "(2, 4, 3, 5)"]),
    ("mask-rank", "mask", {"mask": ones(1, 1, 1, 3, 5, dtype=bool)}, ["(1, 1, 1, 3, 5)"]),
    ("mask-empty", "mask", {"mask": ones(3, 0, dtype=bool)}, ["(3, 0)"]),
    ("bias-shape", "bias", {"bias": ones(4, 4)}, ["(4, 4)", "(2, 4, 3, 5)"]),
    ("alibi-shape", "alibi_slopes", {"alibi_slopes": ones(2)}, ["(2,)", "4"]),
    ("alibi-scalar", "alibi_slopes", {"alibi_slopes": ones()}, ["()", "4"]),
    ("alibi-batch", "alibi_slopes", {"alibi_slopes": ones(3, 4)}, ["(3, 4)", "(2, 4)"]),
    ("alibi-rank", "alibi_slopes", {"alibi_slopes": ones(1, 2, 4)}, ["(1, 2, 4)"]),
    ("sinks-shape", "sinks", {"sinks": ones(2)}, ["(2,)", "(4,)"]),
    ("sinks-rank", "sinks", {"sinks": ones(2, 4)}, ["(2, 4)", "(4,)"]),
    ("softcap-0", "softcap", {"softcap": 0.0}, ["0"]),
    ("softcap-negative", "softcap", {"softcap": -1.0}, ["-1"]),
    ("softcap-nan", "softcap", {"softcap": float("nan")}, ["nan"]),
    ("softcap-inf", "softcap", {"softcap": float("inf")}, ["inf"]),
    ("q_lens-shape", "q_lens", {"q_lens": ints(1, 2, 3)}, ["(3,)", "(2,)"]),
    ("q_lens-rank", "q_lens", {"q_lens": ints(1, 2)[:, None]}, ["(2, 1)", "(2,)"]),
    ("q_lens-negative", "q_lens", {"q_lens": ints(1, -2)}, ["-2", "3"]),
    ("q_lens-over", "q_lens", {"q_lens": ints(4, 1)}, ["4", "3"]),
    ("kv_lens-over", "kv_lens", {"kv_lens": ints(5, 6)}, ["6", "5"]),
    ("kv_lens-huge", "kv_lens", {"kv_lens": np.array([5, 2**64 - 1], np.uint64)}, ["5"]),
    ("q_offset-shape", "q_offset", {"q_offset": ints(1, 2, 3)}, ["(3,)", "(2,)"]),
    ("q_offset-huge", "q_offset", {"q_offset": 2**63}, []),
    ("dropout-negative", "dropout", {"dropout": -0.1}, ["-0.1"]),
    ("dropout-1", "dropout", {"dropout": 1.0}, ["1"]),
    ("dropout-nan", "dropout", {"dropout": float("nan")}, ["nan"]),
    ("seed-negative", "seed", {"seed": -1}, ["-1"]),
    ("seed-huge", "seed", {"seed": 2**64}, []),
    ("out-shape", "out", {"out": ones(2, 3, 4, 8)}, ["(2, 3, 4, 8)", "(2, 3, 4, 6)"]),
    ("out-rank", "out", {"out": ones(3, 4, 6)}, ["(3, 4, 6)", "(2, 3, 4, 6)"]),
    ("kernel-unknown", "kernel", {"kernel": "cpu-nonsense"}, ["cpu-nonsense", "cpu-reference"]),
    ("device-unknown", "device", {"device": "tpu"}, ["tpu"]),
]  # fmt: skip


# Only of results that are to be made, so nothing for explain to refuse.
OVERFLOWS = [
    (
        "overflow-out", "out",
        {"q": virtual(1, 2**40, 1, 1), "k": ones(1, 1, 1, 1), "v": virtual(1, 1, 1, 2**40)}, [],
    ),
    (
        "overflow-lse", "lse",
        {"q": virtual(2**20, 2**20, 2**21, 1, dtype=F2), "k": virtual(2**20, 1, 1, 1, dtype=F2),
         "v": virtual(2**20, 1, 1, 1, dtype=F2), "return_lse": True}, [],
    ),
    (
        "overflow-weights", "weights",
        {"q": virtual(1, 2**36, 1, 1), "k": virtual(1, 2**36, 1, 1), "v": virtual(1, 2**36, 1, 1),
         "return_weights": True}, [],
    ),
]  # fmt: skip


def parametrize(rows):
    return pytest.mark.parametrize(
        ("name", "given", "pieces"), [r[1:] for r in rows], ids=[r[0] for r in rows]
    )


def expect(exception, name, given, pieces, function=fastattn.mha):
    with pytest.raises(exception) as error:
        function(**(base() | given))
    message = str(error.value)
    assert re.search(rf"\b{name}\b", message), f"does not name {name}: {message}"
    for piece in pieces:
        assert piece in message, f"does not say {piece!r}: {message}"
    return error.value


def call(function):
    def with_positions(q, k, v, **kwargs):
        return function(q, k, v, **kwargs)

    return with_positions


@parametrize(TYPE_ERRORS)
@pytest.mark.parametrize("function", ["mha", "explain"])
def test_type_errors(name, given, pieces, function):
    expect(TypeError, name, given, pieces, call(getattr(fastattn, function)))


@parametrize(VALUE_ERRORS)
@pytest.mark.parametrize("function", ["mha", "explain"])
def test_value_errors(name, given, pieces, function):
    expect(ValueError, name, given, pieces, call(getattr(fastattn, function)))


@parametrize(OVERFLOWS)
def test_byte_counts_that_overflow(name, given, pieces):
    expect(ValueError, name, given, pieces, call(fastattn.mha))


MANY_AXES = {
    "q": F4, "k": F4, "v": F4, "mask": bool, "bias": F4, "alibi_slopes": F4, "sinks": F4, "q_lens": np.int64,
    "kv_lens": np.int64, "q_offset": np.int64, "out": F4,
}  # fmt: skip


@pytest.mark.parametrize("rank", [5, 6, 32])
@pytest.mark.parametrize("name", MANY_AXES)
def test_messages_have_the_whole_shape(name, rank):
    """Of an array with more axes than anything here may have, from NumPy and through DLPack."""
    torch = pytest.importorskip("torch")
    shape = (*(1,) * (rank - 5), 3, 1, 2, 1, 7)
    x = np.zeros(shape, MANY_AXES[name])
    for function in (fastattn.mha, fastattn.explain):
        expect(ValueError, name, {name: x}, [str(shape)], call(function))
        expect(ValueError, name, {name: torch.from_numpy(x)}, [str(shape)], call(function))


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_messages_of_the_backward_have_the_whole_shape(name):
    q, k, v = base().values()
    out, lse = fastattn.mha(q, k, v, return_lse=True)
    given = {"dout": out, "out": out, "lse": lse, "dlse": lse, name: ones(1, 3, 1, 2, 1, 7)}
    with pytest.raises(ValueError, match=rf"^{name}: .*{re.escape('(1, 3, 1, 2, 1, 7)')}"):
        fastattn.mha_backward(given.pop("dout"), q, k, v, given.pop("out"), given.pop("lse"), **given)


# ---- masks of tokenizers --------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.float32])
def test_masks_of_other_dtypes_say_how_they_become_bool(kind):
    torch = pytest.importorskip("torch")
    mask = ones(3, 5, dtype=kind)
    for function in (fastattn.mha, fastattn.explain):
        expect(TypeError, "mask", {"mask": mask}, ["use mask.astype(bool)", "(3, 5)"], call(function))
        given = {"mask": torch.from_numpy(mask)}
        expect(TypeError, "mask", given, ["use mask.bool()", "(3, 5)"], call(function))


@pytest.mark.parametrize(
    ("shape", "place"),
    [((2, 5), "[:, None, None, :]"), ((2, 1, 5), "[:, None]"), ((2, 3, 5), "[:, None]")],
)
def test_masks_of_a_batch_are_told_their_axes(shape, place):
    q, k, v = base().values()
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 2, shape)
    expect(TypeError, "mask", {"mask": tokens}, ["int64", f", pass mask{place}"], call(fastattn.mha))
    given = {"mask": tokens.astype(bool), "bias": tokens.astype(F4)}
    for name, x in given.items():
        expect(ValueError, name, {name: x}, [str(shape), f", pass {name}{place}"], call(fastattn.mha))
        # And what it says is right: each entry has its own.
        placed = x[:, None, None, :] if x.ndim == 2 else x[:, None]
        out = fastattn.mha(q, k, v, **{name: placed})
        for b in range(2):
            alone = fastattn.mha(q[b], k[b], v[b], **{name: x[b][None] if x.ndim == 3 else x[b]})
            np.testing.assert_allclose(out[b], alone, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (5, 2), (3, 3, 5), (5,), (2,)])
def test_other_masks_get_no_hint(shape):
    mask = np.ones(shape, np.int64)
    assert "pass" not in str(expect(TypeError, "mask", {"mask": mask}, [], call(fastattn.mha)))
    if shape != (5,):
        error = expect(ValueError, "mask", {"mask": mask.astype(bool)}, [], call(fastattn.mha))
        assert "pass" not in str(error)


def test_wrong_number_of_positions():
    q, k, v = base().values()
    for arguments in ((), (q,), (q, k), (q, k, v, "bshd")):
        with pytest.raises(TypeError, match="mha"):
            fastattn.mha(*arguments)
    with pytest.raises(TypeError, match=r"\bq\b"):
        fastattn.mha(q, k, v, q=q)


def test_read_only_out():
    out = ones(2, 3, 4, 6)
    out.flags.writeable = False
    expect(ValueError, "out", {"out": out}, [], call(fastattn.mha))


def overlaps():
    """Calls whose out shares elements with an input."""
    x = ones(2, 6, 4, 8)
    square = {"q": x[:, :3], "k": x[:, 3:], "v": x[:, 3:]}
    yield "q", square | {"out": x[:, :3]}
    yield "v", square | {"k": ones(2, 3, 4, 8), "out": x[:, 3:]}
    yield "k", square | {"q": ones(2, 3, 4, 8), "v": ones(2, 3, 4, 8), "out": x[:, 2:5]}
    flat = np.zeros(2 * 3 * 4 * 8 + 100, F4)
    shifted = flat[50 : 50 + 192].reshape(2, 3, 4, 8)
    yield "q", square | {"q": flat[:192].reshape(2, 3, 4, 8), "out": shifted}
    yield "bias", square | {"bias": shifted[0, 0, :, :3][:3], "out": shifted}
    yield "alibi_slopes", square | {"alibi_slopes": shifted[0, 0, 0, :4], "out": shifted}
    yield "sinks", square | {"sinks": shifted[1, 2, 3, :4], "out": shifted}
    yield "mask", square | {"mask": shifted.view(bool)[0, 0, 0, :3], "out": shifted}
    yield "kv_lens", square | {"kv_lens": shifted.view(np.int32)[0, 0, 0, :2], "out": shifted}


@pytest.mark.parametrize("n", range(9))
def test_out_may_not_overlap_an_input(n):
    name, given = list(overlaps())[n]
    before = given["out"].copy()
    with pytest.raises(ValueError, match=r"\bout\b") as error:
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert re.search(rf"\b{name}\b", str(error.value)), str(error.value)
    assert "overlap" in str(error.value)
    assert (given["out"] == before).all()


def test_out_may_not_overlap_itself():
    q, k, v = base().values()
    with pytest.raises(ValueError, match=r"\bout\b"):
        fastattn.mha(q, k, v, out=np.lib.stride_tricks.as_strided(ones(6), (2, 3, 4, 6), (0, 0, 0, 4)))


def test_out_between_the_inputs_is_no_overlap():
    """q, k, v and out as interleaved slices of one buffer share no element."""
    packed = np.concatenate([*qkv(F4, B=2, Sq=9, Hq=2, D=8), ones(2, 9, 2, 8)], axis=-1)
    q, k, v, out = (packed[..., n : n + 8] for n in (0, 8, 16, 24))
    want = fastattn.mha(q, k, v)
    assert fastattn.mha(q, k, v, out=out) is out
    assert np.array_equal(out, want)


def test_failed_calls_leave_out_alone():
    q, k, v = base().values()
    out = np.full((2, 3, 4, 6), 7, F4)
    for bad in (
        {"scale": float("nan")},
        {"kv_lens": ints(5, 6)},
        {"kernel": "none"},
        {"mask": ones(9, dtype=bool)},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fastattn.mha(q, k, v, out=out, **bad)
    assert (out == 7).all()


# ---- UnsupportedError -----------------------------------------------------------------------------
def test_unsupported_error_is_a_value_error():
    assert issubclass(fastattn.UnsupportedError, ValueError)


def test_kernels_that_are_unusable_say_why():
    for info in fastattn.kernels():
        if not info.usable:
            error = expect(
                fastattn.UnsupportedError, info.name, {"kernel": info.name}, [info.reason], call(fastattn.mha)
            )
            assert "kernel" in str(error)
            expect(
                fastattn.UnsupportedError,
                info.name,
                {"kernel": info.name},
                [info.reason],
                call(fastattn.explain),
            )


def test_kernels_refuse_dtypes_that_they_do_not_have(kernel):
    names = {str(n) for n in next(info.dtypes for info in fastattn.kernels() if info.name == kernel)}
    for name, dtype in DTYPES.items():
        arrays = qkv(dtype, Sq=3)
        if name in names:
            fastattn.mha(*arrays, kernel=kernel)
        else:
            with pytest.raises(fastattn.UnsupportedError, match=name):
                fastattn.mha(*arrays, kernel=kernel)


def test_cuda_that_is_not_there():
    if any(info.usable and info.device == "cuda" for info in fastattn.kernels()):
        pytest.skip("CUDA is usable here")
    for device in ("cuda", "cuda:0", "cuda:3"):
        expect(fastattn.UnsupportedError, "device", {"device": device}, ["cuda"], call(fastattn.mha))
    fastattn.mha(*base().values(), device="cpu")
