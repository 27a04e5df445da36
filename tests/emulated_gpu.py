"""The emulated GPU of a build with FASTATTN_CUDA=EMULATED, and arrays "on" it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from dlpack_producer import Producer

from fastattn import _core

LIBRARY = ctypes.CDLL(str(_core.__file__))
IS_HERE = hasattr(LIBRARY, "fastattn_emulator_synchronize")
needs_emulated_gpu = pytest.mark.skipif(
    not IS_HERE,
    reason="needs the emulated GPU: build with FASTATTN_CUDA=EMULATED (tools/emulated_pytest.sh)",
)

if IS_HERE:
    LIBRARY.fastattn_emulator_fail_next.argtypes = (ctypes.c_char_p, ctypes.c_int)
    LIBRARY.fastattn_emulator_set_memory_limit.argtypes = (ctypes.c_size_t,)
    LIBRARY.fastattn_emulator_live_allocations.restype = ctypes.c_size_t
    LIBRARY.fastattn_emulator_pending.restype = ctypes.c_size_t
    LIBRARY.fastattn_emulator_create_stream.restype = ctypes.c_void_p
    LIBRARY.fastattn_emulator_destroy_stream.argtypes = (ctypes.c_void_p,)


def reset() -> None:
    LIBRARY.fastattn_emulator_reset()


def synchronize() -> None:
    LIBRARY.fastattn_emulator_synchronize()


def fail_next(function: str, code: int) -> None:
    LIBRARY.fastattn_emulator_fail_next(function.encode(), code)


def pending() -> int:
    return int(LIBRARY.fastattn_emulator_pending())


def set_copies_eager(eager: bool) -> None:
    LIBRARY.fastattn_emulator_set_copies_eager(int(eager))


def set_threads_reversed(reversed_: bool) -> None:
    LIBRARY.fastattn_emulator_set_threads_reversed(int(reversed_))


def live_allocations() -> int:
    return int(LIBRARY.fastattn_emulator_live_allocations())


class DeviceArray(Producer):
    """An array of a library that says nothing of its streams; its memory is that of a NumPy array."""

    def __init__(self, array: np.ndarray, device: int = 0, device_type: int = 2, **fields: Any) -> None:
        super().__init__(
            array, device=(device_type, device), device_type=device_type, device_id=device, **fields
        )

    def numpy(self) -> np.ndarray:
        synchronize()
        return self.array


class Library:
    """A library with ``from_dlpack``, as the array API standard has it."""

    @staticmethod
    def from_dlpack(buffer: Any) -> LibraryArray:
        return LibraryArray(read_buffer(buffer), buffer)


class LibraryArray(DeviceArray):
    """An array whose library can make arrays of foreign memory."""

    def __init__(self, array: np.ndarray, owner: Any = None, device: int = 0) -> None:
        super().__init__(array, device)
        self.owner = owner

    def __array_namespace__(self) -> type[Library]:
        return Library


class OnHost:
    """What a device buffer exports, said to be on the host: the emulated device's memory is."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **keywords: Any) -> Any:
        keywords.pop("stream", None)
        capsule = self.buffer.__dlpack__(stream=1)
        pointer = _pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(pointer + 8).value = 1  # DLTensor.device.device_type
        return capsule


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def read_buffer(buffer: Any) -> np.ndarray:
    """A copy of a result buffer (not bfloat16, which NumPy cannot import)."""
    return np.from_dlpack(OnHost(buffer)).copy()
