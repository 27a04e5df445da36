"""Arrays on a CUDA device through DLPack, on the emulated GPU: streams, results, devices, failures."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types

import numpy as np
import pytest
from subproc import run

import fastattn

from emulated_gpu import (  # isort: skip
    LIBRARY,
    DeviceArray,
    LibraryArray,
    fail_next,
    live_allocations,
    needs_emulated_gpu,
    pending,
    read_buffer,
    reset,
    synchronize,
)

pytestmark = needs_emulated_gpu


@pytest.fixture(autouse=True)
def clean_gpu():
    if hasattr(LIBRARY, "fastattn_emulator_reset"):
        reset()


@pytest.fixture
def qkv() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 8)]
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def on_device(arrays, kind=LibraryArray, **keywords):
    return [kind(x.copy(), **keywords) for x in arrays]


def close(a, b):
    return np.allclose(a, b, atol=2e-6, rtol=0)


def test_result_is_of_the_kind_of_q(qkv):
    out = fastattn.mha(*on_device(qkv), causal=True)
    assert type(out) is LibraryArray
    assert close(out.numpy(), fastattn.mha(*qkv, causal=True, device="cpu"))


def test_lse_and_weights_too(qkv):
    results = fastattn.mha(*on_device(qkv), return_lse=True, return_weights=True)
    expected = fastattn.mha(*qkv, return_lse=True, return_weights=True, device="cpu")
    assert [type(x) for x in results] == [LibraryArray] * 3
    assert all(close(x.numpy(), y) for x, y in zip(results, expected, strict=True))


def test_unknown_kinds_get_a_buffer(qkv):
    out = fastattn.mha(*on_device(qkv, DeviceArray))
    assert out.__dlpack_device__() == (2, 0)
    assert close(read_buffer(out), fastattn.mha(*qkv, device="cpu"))
    with pytest.raises(AttributeError, match="cuda:0"):
        _ = out.__array_interface__
    with pytest.raises(BufferError, match="cuda:0"):
        out.__dlpack__(dl_device=(1, 0))


def test_memory_of_results_is_freed(qkv):
    before = live_allocations()
    out = fastattn.mha(*on_device(qkv, DeviceArray))
    assert live_allocations() == before + 1
    del out
    assert live_allocations() == before


def test_call_waits_for_libraries_without_a_stream(qkv):
    fastattn.mha(*on_device(qkv))
    assert pending() == 0


def test_producers_are_asked_for_our_stream(qkv):
    arrays = on_device(qkv, DeviceArray)
    fastattn.mha(*arrays)
    streams = {asked["stream"] for x in arrays for asked in x.asked}
    assert len(streams) == 1
    assert streams.pop() not in (None, 0, 1, 2, -1)
    for x in arrays:
        x.assert_returned()


def test_legacy_producers(qkv):
    arrays = on_device(qkv, DeviceArray)
    for x in arrays:
        x.version = "legacy"
    fastattn.mha(*arrays)
    for x in arrays:
        x.assert_returned()


class FakeTorch(types.ModuleType):
    """As much of torch as the glue needs: a tensor type, the current stream, empty()."""

    def __init__(self):
        super().__init__("torch")
        self.stream_handle = 0
        self.cuda = types.SimpleNamespace(
            current_stream=lambda device: types.SimpleNamespace(cuda_stream=self.stream_handle),
            device=lambda device: contextlib.nullcontext(),
        )
        self.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
        self.float32, self.float64 = np.float32, np.float64
        self.autograd = types.SimpleNamespace(
            graph=types.SimpleNamespace(increment_version=lambda tensor: None)
        )

        class Tensor(DeviceArray):
            def __init__(self, array, device=0):
                super().__init__(array, device)
                self.device = types.SimpleNamespace(type="cuda", index=device)

            def __dlpack_device__(self):
                return (2, self.device.index)

            def is_inference(self):
                return False

        self.Tensor = Tensor

    def empty(self, shape, dtype, device):
        return self.Tensor(np.full(shape, 77, dtype), device=device.index)


@pytest.fixture
def torch(monkeypatch):
    fake = FakeTorch()
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(DeviceArray, "requires_grad", False, raising=False)
    return fake


def test_calls_take_their_place_in_the_callers_stream(qkv, torch):
    torch.stream_handle = LIBRARY.fastattn_emulator_create_stream()
    arrays = on_device(qkv, torch.Tensor)
    out = fastattn.mha(*arrays)
    assert type(out) is torch.Tensor
    assert {asked["stream"] for x in arrays for asked in x.asked} == {-1}  # in order already
    assert pending() > 0, "nothing is waited for"
    assert (out.array == 77).all()
    arrays[0].array[:] = qkv[0][::-1]  # the caller's order: what is queued has not been read yet
    synchronize()
    assert close(out.array, fastattn.mha(qkv[0][::-1], *qkv[1:], device="cpu"))
    LIBRARY.fastattn_emulator_destroy_stream(torch.stream_handle)


def test_default_stream_is_asked_for_by_its_dlpack_number(qkv, torch):
    q, others = torch.Tensor(qkv[0]), on_device(qkv[1:], DeviceArray)
    out = fastattn.mha(q, *others)
    assert {asked["stream"] for x in others for asked in x.asked} == {1}
    assert close(out.numpy(), fastattn.mha(*qkv, device="cpu"))


def test_arrays_of_two_libraries_make_the_call_wait(qkv, torch):
    q = torch.Tensor(qkv[0])
    out = fastattn.mha(q, *on_device(qkv[1:], DeviceArray))
    assert pending() == 0
    assert close(out.array, fastattn.mha(*qkv, device="cpu"))


def test_out_is_written_on_the_device(qkv, torch):
    out = torch.Tensor(np.zeros((2, 5, 4, 8), np.float32))
    assert fastattn.mha(*on_device(qkv, torch.Tensor), out=out) is out
    assert close(out.numpy(), fastattn.mha(*qkv, device="cpu"))


def test_second_device(qkv):
    out = fastattn.mha(*on_device(qkv, DeviceArray, device=1))
    assert out.__dlpack_device__() == (2, 1)
    assert close(read_buffer(out), fastattn.mha(*qkv, device="cpu"))
    assert fastattn.explain(*on_device(qkv, DeviceArray, device=1)).device == "cuda:1"


def test_managed_memory_counts_as_the_devices(qkv):
    assert close(
        read_buffer(fastattn.mha(*on_device(qkv, DeviceArray, device_type=13))),
        fastattn.mha(*qkv, device="cpu"),
    )


@pytest.mark.parametrize("side_on_device", [False, True])
@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8])
def test_side_arrays_from_either_side(qkv, side_on_device, kind):
    sides = {
        "kv_lens": np.array([7, 3], kind),
        "q_lens": np.array([5, 2], kind),
        "mask": np.random.default_rng(1).random((5, 7)) < 0.7,
        "bias": np.random.default_rng(2).standard_normal((2, 1, 5, 7)).astype(np.float32),
        "sinks": np.array([0.5, -1.0, 2.0, 0.0]),
        "alibi_slopes": np.array([0.5, 1.0, 2.0, 0.1], np.float32),
    }
    expected = fastattn.mha(*qkv, **sides, device="cpu")
    given = {name: DeviceArray(x) for name, x in sides.items()} if side_on_device else sides
    assert close(read_buffer(fastattn.mha(*on_device(qkv, DeviceArray), **given)), expected)


def test_nan_beyond_lengths_that_only_the_device_knows(qkv):
    lens = np.array([7, 3], np.int32)
    expected = fastattn.mha(*qkv, kv_lens=lens, device="cpu")
    for x in qkv[1:]:
        x[1, 3:] = np.nan
    out = fastattn.mha(*on_device(qkv, DeviceArray), kv_lens=DeviceArray(lens))
    assert close(read_buffer(out), expected)


def test_odd_strides(qkv):
    q, k, v = qkv
    wide = np.repeat(q, 2, axis=-1)
    expected = fastattn.mha(q, k, v[:, ::-1].copy(), device="cpu")
    out = fastattn.mha(
        DeviceArray(wide[..., ::2]), DeviceArray(np.asfortranarray(k)), DeviceArray(v[:, ::-1])
    )
    assert close(read_buffer(out), expected)


def test_misaligned_memory_is_refused(qkv):
    raw = np.zeros(qkv[0].nbytes + 1, np.uint8)
    q = raw[1:].view(np.float32).reshape(qkv[0].shape)
    with pytest.raises(ValueError, match=r"^q: expected addresses that are multiples"):
        fastattn.mha(DeviceArray(q), *on_device(qkv[1:], DeviceArray))


@pytest.mark.parametrize("where", ["host", "other device"])
def test_operands_must_be_together(qkv, where):
    k = qkv[1] if where == "host" else DeviceArray(qkv[1], device=1)
    with pytest.raises(ValueError, match=r"^k: .*cuda:0"):
        fastattn.mha(DeviceArray(qkv[0]), k, DeviceArray(qkv[2]))


def test_device_arrays_do_not_leave_their_device(qkv):
    arrays = on_device(qkv, DeviceArray)
    for wanted in ["cpu", "cuda:1"]:
        with pytest.raises(fastattn.UnsupportedError, match="the arrays are on cuda:0"):
            fastattn.mha(*arrays, device=wanted)
    with pytest.raises(fastattn.UnsupportedError, match="cpu-scalar"):
        fastattn.mha(*arrays, kernel="cpu-scalar")


def test_no_such_device(qkv):
    with pytest.raises(fastattn.UnsupportedError, match=r"^q: the array is on cuda:7.*no such device"):
        fastattn.mha(*on_device(qkv, DeviceArray, device=7))
    with pytest.raises(fastattn.UnsupportedError, match="cuda:7 cannot be used: this process sees 2"):
        fastattn.mha(*qkv, device="cuda:7")


@pytest.mark.parametrize("kind", ["host", "device"])
def test_failures_become_exceptions_and_the_next_call_works(qkv, kind):
    arrays = qkv if kind == "host" else on_device(qkv, DeviceArray)
    keywords = {"device": "cuda"}

    def result():
        out = fastattn.mha(*arrays, **keywords)
        return out if kind == "host" else read_buffer(out)

    expected = result()
    fail_next("allocate", 2)
    with pytest.raises(MemoryError, match=r"\d+ bytes"):
        result()
    assert np.array_equal(result(), expected)
    fail_next("Matmul", 13)
    with pytest.raises(fastattn.CudaError, match="cuBLAS"):
        result()
    assert np.array_equal(result(), expected)
    fail_next("launch", 700)
    with pytest.raises(fastattn.CudaError, match="must restart"):
        result()
    assert np.array_equal(result(), expected)
    assert pending() == 0


def test_memory_limit(qkv):
    LIBRARY.fastattn_emulator_set_memory_limit(1 << 20)
    with pytest.raises(MemoryError, match=r"\d+ bytes"):
        fastattn.mha(*qkv, device="cuda")
    reset()
    fastattn.mha(*qkv, device="cuda")


def test_threads_at_once(qkv):
    expected = fastattn.mha(*qkv, device="cpu")
    wrong = []

    def work(device):
        for _ in range(10):
            if not close(fastattn.mha(*qkv, device=device), expected):
                wrong.append(device)
            arrays = on_device(qkv, DeviceArray, device=int(device[-1]))
            if not close(read_buffer(fastattn.mha(*arrays)), expected):
                wrong.append(device + " arrays")

    threads = [threading.Thread(target=work, args=(f"cuda:{n % 2}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_child_after_fork_is_told(qkv):
    fastattn.mha(*qkv, device="cuda")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            fastattn.mha(*qkv, device="cuda")
            text = "no error"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        fastattn.mha(*qkv)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert text.startswith("UnsupportedError")
    assert "forked" in text


def test_large_host_calls_choose_the_gpu_by_the_estimate():
    q = np.zeros((1, 2048, 2, 32), np.float32)
    speeds = fastattn._core.device_speeds()
    try:
        fastattn._core.set_device_speeds(gpu_f32=1e18, to_device=1e18, to_host=1e18, gpu_seconds=1e-9)
        plan = fastattn.explain(q, q, q)
        assert plan.device == "cuda:0"
        assert "estimated" in plan.device_choice
        fastattn._core.set_device_speeds(**speeds | {"gpu_seconds": 1.0})
        assert fastattn.explain(q, q, q).device == "cpu"
        assert fastattn.explain(q, q, q, device="cuda").device_choice == "the call asks for it"
        assert fastattn.explain(q, q, q, kernel="cuda-cublas").device == "cuda:0"
    finally:
        fastattn._core.set_device_speeds(**speeds)
    with pytest.raises(TypeError, match="none named 'warp'"):
        fastattn._core.set_device_speeds(warp=1.0)
    with pytest.raises(ValueError, match="above 0"):
        fastattn._core.set_device_speeds(gpu_f32=-1.0)


def test_a_gpu_that_nobody_asked_for_is_no_reason_to_fail():
    q = np.random.default_rng(3).standard_normal((1, 1300, 1, 32)).astype(np.float32)
    speeds = fastattn._core.device_speeds()
    try:
        fastattn._core.set_device_speeds(gpu_f32=1e18, to_device=1e18, to_host=1e18, gpu_seconds=1e-9)
        assert fastattn.explain(q, q, q).device == "cuda:0"
        want = fastattn.mha(q, q, q, device="cpu")
        LIBRARY.fastattn_emulator_set_memory_limit(1 << 20)
        assert np.array_equal(fastattn.mha(q, q, q), want)
        with pytest.raises(MemoryError):
            fastattn.mha(q, q, q, device="cuda")
    finally:
        fastattn._core.set_device_speeds(**speeds)


def test_failures_wait_for_what_was_queued(qkv):
    arrays = on_device(qkv, DeviceArray)
    fail_next("Matmul", 13)
    with pytest.raises(fastattn.CudaError):
        fastattn.mha(*arrays)
    assert pending() == 0


def test_tensors_beside_torchs_current_device(qkv, torch):
    entered = []

    @contextlib.contextmanager
    def device(where):
        entered.append(where.index)
        yield

    torch.cuda.device = device
    out = fastattn.mha(*on_device(qkv, torch.Tensor, device=1))
    assert entered == [1, 1, 1, 1]  # the result too
    assert close(out.numpy(), fastattn.mha(*qkv, device="cpu"))


def test_long_rows_of_float16_keep_their_small_weights():
    """A weight of 2e-6 has five bits in float16; here each would be 1.3 % too large."""
    v = np.ones((1, 500_000, 1, 1), np.float16)
    q = np.zeros((1, 1, 1, 1), np.float16)
    out = fastattn.mha(q, v, v, device="cuda")
    np.testing.assert_allclose(out.astype(float), 1, atol=6e-3)


def test_numpy_calls_with_another_device_do_not_start_cuda():
    """Neither does the estimate, where it prefers the CPU."""
    run("""
        few, many = np.zeros((1, 1, 1, 512), np.float16), np.zeros((1, 110_000, 1, 512), np.float16)
        fastattn.mha(few, many, many)  # more to transfer than to compute
        q = np.zeros((1, 1500, 1, 32), np.float32)
        for keywords in ({"device": "cpu"}, {"kernel": "cpu-avx2"}):
            fastattn.mha(q, q, q, **keywords)
        # What starts the driver leaves its mark: a child is then told so.
        pid = os.fork()
        if pid == 0:
            ok = [k.usable for k in fastattn.kernels() if k.name == "cuda-cublas"][0]
            os._exit(0 if ok else 1)
        assert os.waitpid(pid, 0)[1] == 0
    """)
