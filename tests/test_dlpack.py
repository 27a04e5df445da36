"""The consumer of DLPack: what it takes, what it refuses, and that it gives back everything exactly once."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from dlpack_producer import DELETER, VERSIONS, Producer
from inputs import qkv

import fastattn


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return qkv(np.float32, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("version", VERSIONS)
def test_producer(dtype, version):
    arrays = qkv(dtype, B=2, Sq=5, Sk=7, Hq=4, Hkv=2, Dv=3)
    for one in range(3):
        given: list[Any] = list(arrays)
        given[one] = Producer(arrays[one], version)
        out = fastattn.mha(*given)
        assert type(out) is np.ndarray  # the class lives in a module that has no from_dlpack
        assert np.array_equal(out, fastattn.mha(*arrays))
        assert given[one].asked == [{"max_version": (1, 1)}]
        given[one].assert_returned()


@pytest.mark.parametrize("version", VERSIONS)
def test_side_arguments(arrays, version):
    sides = {
        "mask": np.random.default_rng(0).random((2, 1, 5, 7)) > 0.3,
        "bias": np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7),
        "alibi_slopes": np.linspace(0, 1, 4).astype(np.float16),
        "sinks": np.linspace(0, 1, 4),
        "q_lens": np.array([4, 5], np.uint8),
        "kv_lens": np.array([7, 2], np.int32),
        "q_offset": np.array([1, 2], np.int16),
    }
    producers = {name: Producer(x, version) for name, x in sides.items()}
    out = fastattn.mha(*arrays, causal=True, **producers)
    assert same(out, fastattn.mha(*arrays, causal=True, **sides))
    for producer in producers.values():
        producer.assert_returned()


def test_producer_that_does_not_know_max_version(arrays):
    q = Producer(arrays[0], "legacy", knows_version=False)
    assert same(fastattn.mha(q, *arrays[1:]), fastattn.mha(*arrays))
    assert q.asked == [{"max_version": (1, 1)}, {}]
    q.assert_returned()


@pytest.mark.parametrize("version", VERSIONS)
def test_null_strides_and_byte_offset(arrays, version):
    q, k, v = arrays
    buffer = np.concatenate([np.zeros(3, np.float32), q.ravel()])
    lent = Producer(q, version, data=buffer.ctypes.data, byte_offset=12, strides=None)
    assert same(fastattn.mha(lent, k, v), fastattn.mha(q, k, v))
    lent.assert_returned()


def test_misaligned_data(arrays):
    q, k, v = arrays
    raw = np.zeros(q.nbytes + 1, np.uint8)
    raw[1:] = q.ravel().view(np.uint8)
    lent = Producer(q, data=raw.ctypes.data, byte_offset=1)
    assert same(fastattn.mha(lent, k, v), fastattn.mha(q, k, v))
    lent.assert_returned()


def test_negative_and_zero_strides(arrays):
    q, k, v = arrays
    back = q[:, ::-1, ::-1, ::-1]
    wide = np.broadcast_to(k[:, :, :1], k.shape)
    out = fastattn.mha(Producer(back), Producer(wide), v)
    assert same(out, fastattn.mha(back.copy(), wide.copy(), v))


def test_no_data_for_no_elements():
    empty = np.zeros((0, 3, 2, 4), np.float32)
    out = fastattn.mha(Producer(empty, data=None), Producer(empty, data=None), empty)
    assert out.shape == (0, 3, 2, 4)


def test_null_deleter(arrays):
    q = Producer(arrays[0], deleter=DELETER(0))
    assert same(fastattn.mha(q, *arrays[1:]), fastattn.mha(*arrays))


BROKEN = {
    "lanes": ({"lanes": 4}, TypeError, r"4 lanes\) is not supported"),
    "complex": ({"code": 5, "bits": 64}, TypeError, r"code 5, 64 bits, 1 lanes\) is not supported"),
    "opaque": ({"code": 3}, TypeError, "code 3"),
    "float8": ({"bits": 8}, TypeError, "8 bits"),
    "int4": ({"code": 0, "bits": 4}, TypeError, "4 bits"),
    "negative ndim": ({"ndim": -1}, TypeError, "ndim -1"),
    "null shape": ({"shape": None}, TypeError, "no usable shape"),
    "negative size": ({"shape": (ctypes.c_int64 * 4)(2, -5, 4, 16)}, TypeError, "length -5"),
    "null data": ({"data": None}, TypeError, "no data"),
    "overflow": ({"shape": (ctypes.c_int64 * 4)(*[2**40] * 4), "strides": None}, ValueError, "2\\*\\*63"),
    "other device after all": ({"device_type": 2, "device_id": 3}, TypeError, "cpu and .* cuda:3"),
    "rank 5": ({"ndim": 5, "shape": (ctypes.c_int64 * 5)(*[1] * 5), "strides": None}, ValueError, "got 5"),
    "rank 9": ({"ndim": 9, "shape": (ctypes.c_int64 * 9)(*[1] * 9), "strides": None}, ValueError, "got 9"),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", BROKEN)
def test_broken_tensors_are_refused_and_given_back(arrays, how, version):
    fields, exception, message = BROKEN[how]
    q, k = Producer(arrays[0], version, **fields), Producer(arrays[1], version)
    with pytest.raises(exception, match=rf"^q: .*{message}"):
        fastattn.mha(q, k, arrays[2])
    q.assert_returned()
    assert k.deleted == len(k.capsules)


def test_newer_major_version_is_refused_and_given_back(arrays):
    # Nothing behind the first three members may be read, so these are all nonsense.
    q = Producer(arrays[0], major=2, minor=3, flags=2**64 - 1, ndim=2**30, shape=None, data=None, lanes=9)
    with pytest.raises(TypeError, match=r"^q: Producer exports DLPack version 2\.3, expected 1\.x"):
        fastattn.mha(q, *arrays[1:])
    q.assert_returned()


@pytest.mark.parametrize("version", VERSIONS)
def test_deleter_runs_once_when_another_argument_is_wrong(arrays, version):
    q, k, v = (Producer(x, version) for x in arrays)
    mask = Producer(np.ones((3, 3), bool), version)
    with pytest.raises(ValueError, match=r"^mask: "):
        fastattn.mha(q, k, v, mask=mask)
    for producer in (q, k, v, mask):
        producer.assert_returned()
    with pytest.raises(TypeError, match=r"^bias: "):
        fastattn.mha(q, k, v, bias="no array")
    for producer in (q, k, v):
        producer.assert_returned(2)
    with pytest.raises(fastattn.UnsupportedError):
        fastattn.mha(q, k, v, kernel="no-such-kernel")
    for producer in (q, k, v):
        producer.assert_returned(3)


def test_explain_gives_back_too(arrays):
    q, k, v = (Producer(x) for x in arrays)
    assert fastattn.explain(q, k, v).kernel == fastattn.explain(*arrays).kernel
    for producer in (q, k, v):
        producer.assert_returned()


def test_capsule_that_was_used_already(arrays):
    class Again(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            return self.capsules[0] if self.capsules else super().__dlpack__(**keywords)

    q = Again(arrays[0])
    fastattn.mha(q, *arrays[1:])
    with pytest.raises(
        TypeError, match=r'^q: __dlpack__\(\) of Again returned <capsule .*"used_dltensor_versioned"'
    ):
        fastattn.mha(q, *arrays[1:])
    q.assert_returned()


@pytest.mark.parametrize("capsule", [None, 7, (1, 2)])
def test_no_capsule(arrays, capsule):
    class Odd(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            return capsule

    with pytest.raises(TypeError, match=r"^q: __dlpack__\(\) of Odd returned .*, expected a capsule"):
        fastattn.mha(Odd(arrays[0]), *arrays[1:])


@pytest.mark.parametrize("device", [None, 1, (1,), (1, 0, 0), ("cpu", 0), (2**70, 0)])
def test_no_device(arrays, device):
    q = Producer(arrays[0], device=device)
    with pytest.raises(
        TypeError, match=r"^q: __dlpack_device__\(\) of Producer returned .*, expected a tuple"
    ):
        fastattn.mha(q, *arrays[1:])
    assert q.asked == []


def test_missing_device_method(arrays):
    class Half:
        def __dlpack__(self, **keywords: Any) -> Any:
            raise AssertionError("the device comes first")

    with pytest.raises(TypeError, match=r"^q: this Half cannot be read.*__dlpack_device__"):
        fastattn.mha(Half(), *arrays[1:])


@pytest.mark.parametrize(
    ("device", "text"), [((2, 99), "cuda:99"), ((10, 0), "rocm:0"), ((8, 0), r"\(8, 0\)")]
)
@pytest.mark.parametrize("name", ["q", "v", "bias", "out"])
def test_other_devices(arrays, name, device, text):
    given = dict(zip("qkv", arrays, strict=True)) | {"bias": np.zeros((5, 7), np.float32)}
    given["out"] = fastattn.mha(*arrays)
    lent = given[name] = Producer(given[name], device=device)
    with pytest.raises(
        fastattn.UnsupportedError, match=rf"^{name}: the array is on .*{text}.*copy it to the host"
    ):
        fastattn.mha(given.pop("q"), given.pop("k"), given.pop("v"), **given)
    assert lent.asked == []


@pytest.mark.parametrize("device", [(3, 0), (11, 0)])
def test_page_locked_host_memory_is_fine(arrays, device):
    q = Producer(arrays[0], device=device, device_type=device[0])
    assert same(fastattn.mha(q, *arrays[1:]), fastattn.mha(*arrays))


@pytest.mark.parametrize("error", [BufferError, ValueError, NotImplementedError])
def test_refusal_of_the_producer_is_passed_on(arrays, error):
    class Refuses(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise error("because it is Friday")

    with pytest.raises(TypeError, match=r"^q: this Refuses cannot be read.*because it is Friday") as caught:
        fastattn.mha(Refuses(arrays[0]), *arrays[1:])
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_other_errors_of_the_producer_are_left_alone(arrays, error):
    class Fails(Producer):
        def __dlpack__(self, **keywords: Any) -> Any:
            raise error("no")

    k = Producer(arrays[1])
    with pytest.raises(error, match="no"):
        fastattn.mha(arrays[0], k, Fails(arrays[2]))
    k.assert_returned()


# ---- out ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", VERSIONS)
def test_out(arrays, version):
    expected, lse = fastattn.mha(*arrays, return_lse=True)
    target = np.zeros_like(expected)
    out = Producer(target, version)
    assert fastattn.mha(*arrays, out=out) is out
    assert same(target, expected)
    out.assert_returned()
    result = fastattn.mha(*arrays, out=out, return_lse=True)
    assert result[0] is out
    assert same(result[1], lse)


def test_misaligned_out(arrays):
    expected = fastattn.mha(*arrays)
    raw = np.zeros(expected.nbytes + 2, np.uint8)
    out = Producer(expected, data=raw.ctypes.data, byte_offset=1)
    assert fastattn.mha(*arrays, out=out) is out
    assert np.array_equal(raw[1:-1], expected.ravel().view(np.uint8))
    assert raw[0] == raw[-1] == 0


def test_read_only_out(arrays):
    out = Producer(fastattn.mha(*arrays), flags=1)
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        fastattn.mha(*arrays, out=out)
    out.assert_returned()
    assert same(fastattn.mha(Producer(arrays[0], flags=1), *arrays[1:]), fastattn.mha(*arrays))


def test_out_that_lends_a_copy(arrays):
    out = Producer(fastattn.mha(*arrays), flags=2)
    with pytest.raises(ValueError, match=r"^out: Producer exports a copy"):
        fastattn.mha(*arrays, out=out)
    out.assert_returned()
