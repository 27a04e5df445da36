"""Gradients of arrays on a CUDA device, on the emulated GPU: kinds, memory, failures."""

from __future__ import annotations

import numpy as np
import pytest

import fastattn

from emulated_gpu import (  # isort: skip
    DeviceArray,
    LibraryArray,
    fail_next,
    live_allocations,
    needs_emulated_gpu,
    pending,
    read_buffer,
    reset,
)

pytestmark = needs_emulated_gpu


@pytest.fixture(autouse=True)
def clean_gpu():
    reset()


def call(dtype=np.float32):
    """Positions and side arguments of mha_backward, and the gradients of the CPU."""
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 8), (2, 5, 4, 8))
    q, k, v, dout = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    sides = {"bias": rng.standard_normal((4, 1, 7)).astype(dtype), "sinks": np.zeros(4, dtype)}
    out, lse = fastattn.mha(q, k, v, return_lse=True, device="cpu", **sides)
    arrays = (dout, q, k, v, out, lse)
    return arrays, sides, fastattn.mha_backward(*arrays, device="cpu", **sides)


def on_device(arrays, kind=LibraryArray):
    return [kind(x.copy()) for x in arrays]


def close(a, b):
    return np.allclose(a, b, atol=5e-6, rtol=0)


@pytest.mark.parametrize("sides_on_device", [False, True])
def test_gradients_are_of_the_kind_of_q(sides_on_device):
    arrays, sides, expected = call()
    if sides_on_device:
        sides = dict(zip(sides, on_device(sides.values()), strict=True))
    grads = fastattn.mha_backward(*on_device(arrays), **sides)
    assert isinstance(grads, fastattn.Gradients)
    assert grads.dalibi_slopes is None
    for x, y in zip(grads, expected, strict=True):
        if y is not None:
            assert type(x) is LibraryArray
            assert close(x.numpy(), y)


def test_unknown_kinds_get_buffers_whose_memory_is_freed():
    arrays, sides, expected = call()
    before = live_allocations()
    grads = fastattn.mha_backward(*on_device(arrays, DeviceArray), **sides)
    assert live_allocations() == before + 5
    assert pending() == 0  # the library does not say its stream
    assert close(read_buffer(grads.dk), expected.dk)
    del grads
    assert live_allocations() == before


def test_host_arrays_on_request_and_by_kernel():
    arrays, sides, expected = call()
    for choice in ({"device": "cuda"}, {"device": "cuda:1"}, {"kernel": "cuda-cublas"}):
        grads = fastattn.mha_backward(*arrays, **sides, **choice)
        assert all(
            y is None or (type(x) is np.ndarray and close(x, y)) for x, y in zip(grads, expected, strict=True)
        )
    assert live_allocations() == 0


def test_failures_are_errors_and_leave_nothing():
    arrays, sides, expected = call()
    for function, code, error in (("allocate", 2, MemoryError), ("Matmul", 13, fastattn.CudaError)):
        for given in (arrays, on_device(arrays)):
            fail_next(function, code)
            with pytest.raises(error):
                fastattn.mha_backward(*given, **sides, device="cuda")
            assert live_allocations() == 0
    assert close(fastattn.mha_backward(*arrays, **sides, device="cuda").dq, expected.dq)
