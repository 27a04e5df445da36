"""Exact attention for NumPy arrays, fused and fast on any CPU.

`mha` computes multi-head attention; `explain` says how it would; `kernels` lists what this build can
run. Arrays of other libraries (PyTorch, JAX, anything with ``__dlpack__``) work too and come back as the
same kind. ``fastattn.reference`` is the readable NumPy version of the same function.
"""

from __future__ import annotations

import sys
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
    mha_varlen,
    mha_varlen_backward,
    set_num_threads,
)
from fastattn._merge import merge_states

if TYPE_CHECKING:
    from typing import Any

    from fastattn import jax as jax
    from fastattn import masks as masks
    from fastattn import reference as reference
    from fastattn import torch as torch
    from fastattn._cache import KVCache as KVCache
    from fastattn._cache import mha_cached as mha_cached

__all__ = [
    "CudaError",
    "Explanation",
    "Gradients",
    "KVCache",
    "KernelInfo",
    "UnsupportedError",
    "__version__",
    "explain",
    "get_num_threads",
    "kernels",
    "masks",
    "merge_states",
    "mha",
    "mha_backward",
    "mha_cached",
    "mha_varlen",
    "mha_varlen_backward",
    "reference",
    "set_num_threads",
]

_threadpoolctl.register()

# Modules, imported when first used, and what each needs beside NumPy.
_OF_CACHE = ("KVCache", "mha_cached")  # need NumPy, which `import fastattn` leaves alone
_ON_DEMAND = {"jax": "jax", "masks": None, "reference": None, "torch": "torch"}


def __getattr__(name: str) -> Any:
    if name in _OF_CACHE:
        from fastattn import _cache

        return getattr(_cache, name)
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return importlib.import_module(f"fastattn.{name}")
    except Exception as error:  # only so may hasattr, help and inspect walk over a module that has none
        raise AttributeError(f"module {__name__!r} has no attribute {name!r} here: {error}") from error


def __dir__() -> list[str]:
    here = {name for name, needed in _ON_DEMAND.items() if needed is None or _can_be_found(needed)}
    return sorted({*globals(), *__all__, *here})


def _can_be_found(module: str) -> bool:
    """Whether it is imported or installed, without importing it."""
    import importlib.util

    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # a finder that raises finds nothing
        return False


def _imports_of_the_core() -> None:
    """Never called. What the compiled module imports, for tools that freeze applications to see."""
    import threading  # noqa: F401

    import numpy.ma  # noqa: F401

    import fastattn._arrays
    import fastattn._cuda
    import fastattn.reference  # noqa: F401
