"""The handlers of fastattn.jax, called as XLA calls them but without JAX: by call frames, right and wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from inputs import normal, qkv

import fastattn
from fastattn import _core

MAJOR, METADATA, EXECUTE, BUFFER, SCALAR, STRING = 0, 1, 3, 1, 3, 4
DTYPES = {"bool": 1, "int64": 5, "uint32": 8, "float32": 11, "float64": 12}
Pointer, Size, Int, Long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64


def structure(**fields: Any) -> Any:
    return type("Structure", (ctypes.Structure,), {"_fields_": list(fields.items())})


HEAD = {"bytes": Size, "extensions": Pointer}
Version = structure(**HEAD, major=Int, minor=Int)
Text = structure(data=ctypes.c_char_p, size=Size)
Scalar = structure(dtype=Int, value=Pointer)
Buffer = structure(**HEAD, dtype=Int, data=Pointer, rank=Long, dims=Pointer)
Operands = structure(**HEAD, size=Long, kinds=Pointer, values=Pointer)
Attributes = structure(**HEAD, size=Long, kinds=Pointer, names=Pointer, values=Pointer)
ErrorArguments = structure(**HEAD, message=ctypes.c_char_p, code=Int)
CreateError = ctypes.CFUNCTYPE(Pointer, ctypes.POINTER(ErrorArguments))
Api = structure(**HEAD, version=Version, internal=Pointer, create_error=CreateError)
Frame = structure(
    **HEAD,
    api=Pointer,
    context=Pointer,
    stage=Int,
    arguments=Operands,
    results=Operands,
    attributes=Attributes,
)
Metadata = structure(bytes=Size, version=Version, traits=ctypes.c_uint32, state_type=Long)
Extension = structure(bytes=Size, kind=Int, next=Pointer, metadata=Pointer)


def address(x: Any) -> Any:
    return ctypes.cast(ctypes.pointer(x), Pointer)


class Call:
    """A call frame for a handler, and the error that it makes."""

    def __init__(self, operands: dict[str, Any], results: dict[str, Any], /, **attributes: Any) -> None:
        self.alive: list[Any] = []
        self.errors: list[tuple[int, str]] = []
        self.create_error = CreateError(self._create_error)
        self.version = Version(ctypes.sizeof(Version), None, MAJOR, 3)
        self.api = Api(ctypes.sizeof(Api), None, self.version, None, self.create_error)
        attributes = {
            "operands": " ".join(operands),
            "results": " ".join(results),
            "layout": "bshd",
            **attributes,
        }
        self.frame = Frame(
            ctypes.sizeof(Frame), None, address(self.api), None, EXECUTE,
            self._operands(operands), self._operands(results), self._attributes(attributes),
        )  # fmt: skip

    def _create_error(self, arguments: Any) -> int:
        error = arguments.contents
        assert error.bytes == ctypes.sizeof(ErrorArguments)
        self.errors.append((error.code, error.message.decode()))
        return 0xE44

    def keep(self, x: Any) -> Any:
        self.alive.append(x)
        return address(x)

    def _array(self, kind: Any, items: list[Any]) -> Any:
        return self.keep((kind * len(items))(*items))

    def _operands(self, arrays: dict[str, np.ndarray]) -> Any:
        buffers = []
        for x in arrays.values():
            assert x.flags.c_contiguous
            self.alive.append(x)
            dims = self._array(Long, list(x.shape))
            data = x.ctypes.data if x.size else None
            buffer = Buffer(ctypes.sizeof(Buffer), None, DTYPES.get(x.dtype.name, 15), data, x.ndim, dims)
            buffers.append(self.keep(buffer))
        kinds = self._array(Int, [BUFFER] * len(buffers))
        values = self._array(Pointer, buffers)
        return Operands(ctypes.sizeof(Operands), None, len(buffers), kinds, values)

    def _text(self, text: str) -> Any:
        data = text.encode()
        self.alive.append(data)
        return self.keep(Text(data, len(data)))

    def _attributes(self, attributes: dict[str, Any]) -> Any:
        names, kinds, values = [], [], []
        for name, value in sorted(attributes.items()):
            names.append(self._text(name))
            if isinstance(value, str):
                kinds.append(STRING)
                values.append(self._text(value))
            else:
                number = np.array(value)
                self.alive.append(number)
                kinds.append(SCALAR)
                values.append(self.keep(Scalar(DTYPES[number.dtype.name], number.ctypes.data)))
        arrays = self._array(Int, kinds), self._array(Pointer, names), self._array(Pointer, values)
        return Attributes(ctypes.sizeof(Attributes), None, len(names), *arrays)

    def run(self, target: str = "mha") -> list[tuple[int, str]]:
        """Calls the handler; the errors that it made."""
        capsule = _core.xla_ffi_targets()[target]
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = Pointer, [ctypes.py_object, ctypes.c_char_p]
        handler = ctypes.CFUNCTYPE(Pointer, Pointer)(get(capsule, None))
        returned = handler(address(self.frame))
        assert returned == (0xE44 if self.errors else None)
        return self.errors


def forward(**attributes: Any) -> tuple[Call, np.ndarray]:
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2)
    out = np.full(q.shape, np.nan, np.float32)
    return Call({"q": q, "k": k, "v": v}, {"out": out}, **attributes), out


def test_forward_and_backward():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2)
    side = {"bias": normal((5, 7), np.float32, 1), "kv_lens": np.array([3, 7])}
    settings = {"causal": True, "scale": 0.3, "softcap": 2.0, "dropout": 0.25}
    out, lse = np.empty_like(q), np.empty((2, 4, 5), np.float32)
    seed = {"seed": np.array([1, 2], np.uint32), "q_offset": np.array(3)}
    operands = {"q": q, "k": k, "v": v, **side, **seed}
    window = {"window_left": np.int64(4), "window_right": np.int64(2**40)}
    assert not Call(operands, {"out": out, "lse": lse}, kernel="cpu-scalar", **settings, **window).run()
    kwargs = {
        **side,
        **settings,
        "window": (4, None),
        "seed": 2**32 + 2,
        "q_offset": 3,
        "kernel": "cpu-scalar",
    }
    want = fastattn.mha(q, k, v, return_lse=True, **kwargs)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])

    dout, dlse = normal(out.shape, np.float32, 2), normal(lse.shape, np.float32, 3)
    results = {"dq": q * np.nan, "dk": k * np.nan, "dv": v * np.nan, "dbias": side["bias"] * np.nan}
    operands |= {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
    assert not Call(operands, results, kernel="cpu-scalar", **settings, **window).run("mha_backward")
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, dlse=dlse, **kwargs)
    for name, x in results.items():
        np.testing.assert_array_equal(x, getattr(grads, name))


@pytest.mark.parametrize("target", _core.xla_ffi_targets())
@pytest.mark.parametrize(
    ("theirs", "answer"), [(None, 1), ((0, 1), 1), ((0, 2), 2), ((0, 3), 3), ((0, 9), 3), ((1, 0), 1)]
)
def test_metadata(target, theirs, answer):
    """Versions: (of the runtime, None where it does not say; minor of the answer)."""
    call, out = forward()
    old = Metadata.state_type.offset  # before jaxlib 0.8 the last field was not there
    for size in (ctypes.sizeof(Metadata), old):
        metadata = Metadata(size, Version(ctypes.sizeof(Version)), 77, 88)
        extension = Extension(ctypes.sizeof(Extension), METADATA, None, address(metadata))
        unknown = Extension(ctypes.sizeof(Extension), 99, address(extension), None)
        call.frame.extensions = address(unknown)
        if theirs is None:
            call.frame.api = None
        else:
            call.api.version.major, call.api.version.minor = theirs
        assert not call.run(target)
        assert (metadata.version.major, metadata.version.minor) == (MAJOR, answer)
        assert (metadata.traits, metadata.state_type) == (0, 88 if size == old else 0)
    assert np.isnan(out).all()


def test_other_runtimes():
    for change, message in (
        (lambda call: setattr(call.api.version, "major", 1), "fastattn: XLA's FFI has version 1.3; "),
        (lambda call: setattr(call.frame, "stage", 1), "fastattn: XLA asks for a stage that there is not; "),
        (
            lambda call: setattr(call.frame.results, "bytes", 48),
            "fastattn: XLA's call frame has another layout; ",
        ),
    ):
        call, out = forward()
        change(call)
        ((code, text),) = call.run()
        assert code == 13
        assert text.startswith(message)
        assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"operands": "q k v mask"}, 'no buffer for "mask"'),
        ({"operands": "q k"}, "more buffers than names"),
        ({"operands": "q k value"}, 'no array is called "value"'),
        ({"results": ""}, "more buffers than names"),
        ({"layout": "sbhd"}, 'layout is "sbhd"'),
        ({"scale": np.float32(1)}, 'the attribute "scale" has another element type'),
        ({"scale": "1"}, 'the attribute "scale" is of another kind'),
        ({"kernel": 1.0}, 'the attribute "kernel" is of another kind'),
        ({"sharpness": 1.0}, "there are attributes of unknown names"),
    ],
)
def test_other_callers(attributes, message):
    call, out = forward(**attributes)
    assert call.run() == [(13, f"fastattn: {message}; fastattn.jax and fastattn._core do not fit together")]
    assert np.isnan(out).all()


def test_errors_of_the_core():
    q, k, v = qkv(np.float32, B=2, Sq=5, Sk=7)
    out = np.empty_like(q)
    for change, attributes, code, message in (
        ({"k": k[:1]}, {}, 3, "k: expected shape"),
        ({"q": q.astype(np.complex64)}, {}, 3, "q: XLA's element type 15 is not supported"),
        ({"kv_lens": np.array([1, 8])}, {}, 3, "kv_lens: expected lengths from 0 to 7, got 8 at index 1"),
        ({"seed": np.array(-1)}, {"dropout": 0.5}, 3, "seed: expected 0 <= seed < 2**64, got -1"),
        ({"seed": np.array([1, 2])}, {"dropout": 0.5}, 3, "seed: expected an integer or uint32"),
        ({"q_offset": np.array(1.0)}, {}, 3, "q_offset: expected an integer dtype, got float64"),
        ({"mask": np.zeros((1, 1, 1, 1, 1), bool)}, {}, 3, "mask: expected at most 4 axes"),
        ({"q": out}, {}, 3, "out: "),
        ({}, {"kernel": "none"}, 12, "kernel: expected one of"),
    ):
        call = Call({"q": q, "k": k, "v": v, **change}, {"out": out}, **attributes)
        ((got, text),) = call.run()
        assert got == code
        assert text.startswith(message)
    ((code, text),) = forward()[0].run("not_here")
    assert code == 12
    assert text.startswith("fastattn.jax computes on the CPU only")


def test_arrays_without_elements():
    q, k, v = qkv(np.float32, B=2, Sq=0, Sk=7)
    assert not Call({"q": q, "k": k, "v": v, "mask": np.zeros((0, 7), bool)}, {"out": q.copy()}).run()
