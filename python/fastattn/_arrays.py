"""Results as arrays of q's kind, for every kind but NumPy's own.

Called from the compiled module, only when q is not a NumPy array. Other libraries are looked up in
``sys.modules`` and never imported: an array of theirs can only come from a process that has them.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from fastattn._core import Buffer


_CPU = 1  # DLDeviceType


def _is_instance(module_name: str, class_name: str, array: Any) -> bool:
    module = sys.modules.get(module_name)
    kind = getattr(module, class_name, None)
    return isinstance(kind, type) and isinstance(array, kind)


_is_torch = partial(_is_instance, "torch", "Tensor")
_is_jax = partial(_is_instance, "jax", "Array")
_is_cupy = partial(_is_instance, "cupy", "ndarray")


def cuda_stream(array: Any) -> int | None:
    """Handle of the CUDA stream in which the array's library queues work now; None where we know none."""
    if _is_torch(array):
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    if _is_cupy(array):
        cupy = sys.modules["cupy"]
        with array.device:
            return int(cupy.cuda.get_current_stream().ptr)
    return None


def cuda_capsule(array: Any, stream: int, version: tuple[int, int]) -> Any:
    """Ask an array on a CUDA device for its memory, to be read in `stream`."""
    if _is_torch(array):  # exports only what is on its current device
        with sys.modules["torch"].cuda.device(array.device):
            return array.__dlpack__(stream=stream, max_version=version)
    try:
        return array.__dlpack__(stream=stream, max_version=version)
    except TypeError:  # a producer from before 1.0 does not know the second keyword
        return array.__dlpack__(stream=stream)


def empty(q: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """Make an uninitialised writable array of q's kind and device, which has ``__dlpack__``.

    None where q's kind cannot be written to, or has no such function that we know: then `adopt` makes
    the array when the result is there.
    """
    if _is_cupy(q):
        cupy = sys.modules["cupy"]
        try:
            with q.device:
                return cupy.empty(shape, dtype=q.dtype if str(q.dtype) == dtype else dtype)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
    if not _is_torch(q):
        return None
    torch = sys.modules["torch"]
    # torch has no exception of its own for the host's memory.
    no_memory = RuntimeError if q.device.type == "cpu" else torch.OutOfMemoryError
    try:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=q.device)
    except no_memory as error:
        raise MemoryError(str(error)) from error


def adopt(q: Any, buffer: Buffer) -> Any:
    """Make an array of q's kind of finished memory, without a copy where the library can."""
    if _is_jax(q):
        jax_dlpack = sys.modules["jax"].dlpack
        devices = q.devices()
        return jax_dlpack.from_dlpack(buffer, device=next(iter(devices)) if len(devices) == 1 else None)
    namespace = _array_namespace(q)
    if namespace is not None:
        return namespace.from_dlpack(buffer)
    if buffer.__dlpack_device__()[0] != _CPU:
        return buffer  # of a library that we do not know; from_dlpack of any other takes it
    return _as_numpy(buffer)


def _array_namespace(q: Any) -> ModuleType | Any | None:
    """Find the ``from_dlpack`` of q's library: by the array API standard, else its root module's."""
    if hasattr(q, "__array_namespace__"):
        namespace = q.__array_namespace__()
    else:
        namespace = sys.modules.get(type(q).__module__.partition(".")[0])
    return namespace if callable(getattr(namespace, "from_dlpack", None)) else None


def _as_numpy(buffer: Buffer) -> Any:
    import numpy as np

    array = np.asarray(buffer)
    if buffer.dtype == "bfloat16":
        import ml_dtypes

        array = array.view(ml_dtypes.bfloat16)
    return array


def check_writable(out: Any) -> None:
    """Refuse an `out` whose library promises that arrays never change."""
    if _is_jax(out):
        raise TypeError(f"out: expected an array that can be written to, got an immutable {type(out).__name__}")


def mark_written(out: Any) -> None:
    """Tell torch that `out` changed, so that autograd notices where a saved tensor was overwritten."""
    if _is_torch(out) and not out.is_inference():
        sys.modules["torch"].autograd.graph.increment_version(out)
