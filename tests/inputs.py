"""Random inputs for the tests: dtypes by name, layouts, ranks, strides."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

# Kernels for some problems only; the others take every problem of their dtypes.
PARTIAL = ("cuda-decode", "cuda-flash-sm90", "cuda-flash-sm80")


def stats_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype of lse and weights."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def normal(shape: tuple[int, ...], dtype: Any, seed: int, spread: float = 1.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def qkv(
    dtype: Any,
    *,
    Sq: int,
    Sk: int | None = None,
    B: int = 1,
    Hq: int = 1,
    Hkv: int | None = None,
    D: int = 16,
    Dv: int | None = None,
    layout: str = "bshd",
    rank: int = 4,
    seed: int = 0,
    spread: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal q, k, v in the given layout and rank (rank 3: B = 1; rank 2: B = Hq = Hkv = 1)."""
    Sk = Sq if Sk is None else Sk
    Hkv = Hq if Hkv is None else Hkv
    Dv = D if Dv is None else Dv
    arrays = []
    for n, (S, H, F) in enumerate(((Sq, Hq, D), (Sk, Hkv, D), (Sk, Hkv, Dv))):
        shape = (B, S, H, F) if layout == "bshd" else (B, H, S, F)
        if rank < 4:
            assert B == 1
            shape = shape[1:]
        if rank == 2:
            assert Hq == Hkv == 1
            shape = (S, F)
        arrays.append(normal(shape, dtype, 1000 * seed + n, spread if n < 2 else 1.0))
    return arrays[0], arrays[1], arrays[2]


def restride(x: np.ndarray, how: str) -> np.ndarray:
    """The same values with other strides."""
    if how == "contiguous":
        return np.ascontiguousarray(x)
    if how == "fortran":
        return np.asfortranarray(x)
    if how == "padded":  # gaps after every axis, last axis contiguous
        big = np.full(tuple(n + 3 for n in x.shape), 77, x.dtype)
        view = big[tuple(slice(1, 1 + n) for n in x.shape)]
    elif how == "negative":  # all axes but the last run backwards
        back = (slice(None, None, -1),) * (x.ndim - 1) + (slice(None),)
        view = np.full(x.shape, 77, x.dtype)[back]
    elif how == "negative-last":
        view = np.full(x.shape, 77, x.dtype)[..., ::-1]
    elif how == "strided-last":
        view = np.full((*x.shape[:-1], 3 * x.shape[-1]), 77, x.dtype)[..., ::3]
    elif how == "swapped":  # sequence and head axes swapped in memory
        view = np.full((*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1]), 77, x.dtype).swapaxes(-3, -2)
    elif how == "misaligned":  # the pointer is no multiple of the item size
        raw = np.zeros(x.nbytes + 1, np.uint8)
        view = raw[1:].view(x.dtype).reshape(x.shape)
        assert x.size == 0 or not view.flags.aligned or x.dtype.alignment == 1
    elif how == "odd-strides":  # byte strides are no multiples of the item size
        item = x.dtype.itemsize
        raw = np.zeros((*x.shape[:-1], x.shape[-1] * item + 1), np.uint8)
        view = np.ndarray(x.shape, x.dtype, raw, 0, (*raw.strides[:-1], item))
    else:
        raise ValueError(how)
    view[...] = x
    assert (view.view() == x).all() or np.isnan(x.astype(float)).any()
    return view


STRIDES = (
    "contiguous",
    "fortran",
    "padded",
    "negative",
    "negative-last",
    "strided-last",
    "swapped",
    "misaligned",
    "odd-strides",
)
