"""Exact attention for NumPy arrays, fused and fast on any CPU.

`mha` computes multi-head attention; `explain` says how it would; `kernels` lists what this build can
run. Arrays of other libraries (PyTorch, JAX, anything with ``__dlpack__``) work too and come back as the
same kind. ``fastattn.reference`` is the readable NumPy version of the same function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastattn import _threadpoolctl
from fastattn._attention import Explanation, Gradients, KernelInfo, kernels
from fastattn._core import (
    CudaError,
    UnsupportedError,
    __version__,
    explain,
    get_num_threads,
    mha,
    mha_backward,
    set_num_threads,
)

if TYPE_CHECKING:
    from types import ModuleType

    from fastattn import jax as jax
    from fastattn import reference as reference
    from fastattn import torch as torch

__all__ = [
    "CudaError",
    "Explanation",
    "Gradients",
    "KernelInfo",
    "UnsupportedError",
    "__version__",
    "explain",
    "get_num_threads",
    "kernels",
    "mha",
    "mha_backward",
    "reference",
    "set_num_threads",
]

_threadpoolctl.register()

_ON_DEMAND = ("jax", "reference", "torch")  # modules, imported when first used


def __getattr__(name: str) -> ModuleType:
    if name in _ON_DEMAND:
        import importlib

        return importlib.import_module(f"fastattn.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ON_DEMAND})
