"""The problems of ``check``: small, and between them every feature and every kind of edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn._check.shapes import Array, numpy_dtype

Problem = tuple[Array, Array, Array, dict[str, Any]]  # q, k, v (layout bshd) and the keyword arguments


def _qkv(rng: np.random.Generator, dtype: Any, *sizes: int) -> Any:
    """q, k and v from B, Sq, Sk, Hq, Hkv, D, Dv."""
    b, sq, sk, hq, hkv, d, dv = sizes
    shapes = ((b, sq, hq, d), (b, sk, hkv, d), (b, sk, hkv, dv))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def _with(*sizes: int, **kwargs: Any) -> Callable[[np.random.Generator, Any], Problem]:
    """A problem of these sizes, with arguments that are not random."""
    return lambda rng, dtype: (*_qkv(rng, dtype, *sizes), kwargs)


def _odd_sizes(rng: np.random.Generator, dtype: Any) -> Problem:
    q, k, v = _qkv(rng, dtype, 2, 19, 83, 3, 1, 37, 21)
    return q, k, v, {"mask": rng.random((2, 1, 19, 83)) < 0.7}


def _strided(rng: np.random.Generator, dtype: Any) -> Problem:
    q, k, v = _qkv(rng, dtype, 1, 2 * 33, 70, 2, 2, 2 * 40, 40)
    return q[:, ::-2, :, ::2], k[..., 40:], v[:, ::-1], {}


def _window(rng: np.random.Generator, dtype: Any) -> Problem:
    q, k, v = _qkv(rng, dtype, 1, 150, 270, 4, 4, 32, 32)
    return q, k, v, {"window": (40, 3), "softcap": 5.0, "sinks": rng.standard_normal(4)}


def _bias(rng: np.random.Generator, dtype: Any) -> Problem:
    q, k, v = _qkv(rng, dtype, 2, 70, 130, 4, 2, 64, 64)
    bias = rng.standard_normal((4, 1, 130)).astype(dtype)
    return q, k, v, {"bias": bias, "alibi_slopes": 2.0 ** -np.arange(1, 5), "scale": -0.2}


def _hidden_nan(rng: np.random.Generator, dtype: Any) -> Problem:
    """NaN and Inf behind the valid length must not be seen; one batch entry has no keys at all."""
    q, k, v = _qkv(rng, dtype, 3, 20, 60, 2, 2, 64, 64)
    k[:, 45:], v[:, 45:] = np.nan, np.inf
    return q, k, v, {"kv_lens": np.array([45, 0, 7])}


PROBLEMS: dict[str, Callable[[np.random.Generator, Any], Problem]] = {
    "plain": _with(2, 65, 65, 4, 4, 64, 64),
    "causal, grouped heads": _with(1, 300, 300, 4, 2, 64, 64, causal=True),
    "causal, more keys than rows": _with(1, 140, 777, 2, 1, 128, 128, causal=True),
    "decode with lengths": _with(2, 1, 5000, 4, 1, 128, 128, kv_lens=np.array([4999, 1])),
    "odd sizes, mask": _odd_sizes,
    "strided": _strided,
    "window, softcap, sinks": _window,
    "bias, alibi, negative scale": _bias,
    "dropout": _with(2, 40, 100, 2, 2, 64, 64, dropout=0.3, seed=1234, causal=True),
    "NaN behind the length": _hidden_nan,
}


def make(name: str, dtype: str) -> Problem:
    """The problem of this name in this dtype, always with the same numbers."""
    return PROBLEMS[name](np.random.default_rng(sorted(PROBLEMS).index(name)), numpy_dtype(dtype))


def dout(q: Array, v: Array) -> Array:
    """A gradient of the result, always with the same numbers."""
    shape = (*q.shape[:3], v.shape[3])
    return np.random.default_rng(1000).standard_normal(shape).astype(q.dtype)
