"""The error gate: how far a kernel may be from the float64 reference.

    max|out - ref| <= 2 * max|textbook - ref| + floor * max(1, max|v|)

Textbook is the unfused computation in the dtype of q, written here a second time and in another way
than the reference (whole 4-D arrays instead of one head at a time).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from inputs import DTYPES, PARTIAL, stats_dtype

import fastattn
from fastattn import reference
from fastattn._check.gate import FLOOR


class Oracle(NamedTuple):
    out: np.ndarray  # float64
    lse: np.ndarray
    weights: np.ndarray
    textbook_error: float  # of out
    textbook_weight_error: float
    max_v: float


class NoWeights:
    """Stands for the weights that a kernel does not return; a test that looks at them ends as skipped."""

    def __init__(self, kernel: str | None) -> None:
        self.kernel = kernel

    def _skip(self, *_: Any, **__: Any) -> Any:
        pytest.skip(f"{self.kernel} does not return the weights")

    __array__ = __getitem__ = __gt__ = __eq__ = __sub__ = __array_ufunc__ = _skip
    __hash__ = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._skip()


def check(
    kernel: str | None,
    q: Any,
    k: Any,
    v: Any,
    *,
    weights: bool = False,
    score_size: float = 0.0,
    **kwargs: Any,
) -> Any:
    """Runs one call on a kernel and holds out, lse and (if asked) weights against the gate.

    Rows whose reference is NaN must be NaN; lse there must only not be finite. Lists become arrays.
    score_size: the largest score of a test of large ones. A sum of that size is known to eps * score_size,
    the weights no better, and in float64 nor is the reference itself. Returns the results of the call.
    """
    kwargs = {name: np.array(x) if isinstance(x, list) else x for name, x in kwargs.items()}
    without_weights = weights and kernel in PARTIAL
    weights = weights and not without_weights
    results = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, return_weights=weights, **kwargs)
    want = oracle(q, k, v, **kwargs)
    where = describe(kernel, q, k, v, kwargs)
    assert isinstance(results, tuple), where
    assert len(results) == 2 + weights, where
    slack = float(np.finfo(stats_dtype(q.dtype)).eps) * score_size
    assert_out(results[0], want, q.dtype, where, slack)
    assert_lse(results[1], want, q.dtype, where)
    if weights:
        assert_weights(results[2], want, q.dtype, where, slack)
    return (*results, NoWeights(kernel)) if without_weights else results


def assert_out(out: np.ndarray, want: Oracle, dtype: Any, where: str = "", slack: float = 0.0) -> None:
    assert isinstance(out, np.ndarray), where
    assert (out.dtype, out.shape) == (dtype, want.out.shape), where
    error = max_error(out, want.out, where)
    limit = 2.0 * want.textbook_error + (FLOOR[np.dtype(dtype).name] + slack) * max(1.0, want.max_v)
    assert error <= limit, (
        f"out: error {error:.3g} > {limit:.3g} (textbook {want.textbook_error:.3g}): {where}"
    )


def assert_lse(lse: np.ndarray, want: Oracle, dtype: Any, where: str = "") -> None:
    assert (lse.dtype, lse.shape) == (stats_dtype(dtype), want.lse.shape), where
    undefined = np.isnan(want.lse) | (want.lse == np.inf)
    assert not np.isfinite(lse[undefined]).any(), (
        f"lse: finite where {want.lse[undefined]} was expected: {where}"
    )
    got, ref = lse[~undefined].astype(np.float64), want.lse[~undefined]
    infinite = ref == -np.inf
    assert (got[infinite] == -np.inf).all(), f"lse: expected -inf, got {got[infinite]}: {where}"
    got, ref = got[~infinite], ref[~infinite]
    # The half dtypes' and f64's bounds are absolute for scores of a usual size; past |lse| = 100 no dtype
    # resolves them, so they grow with |lse| like the spacing of the accumulator's numbers.
    size = np.abs(ref)
    name = np.dtype(dtype).name
    if name == "float64":
        limit = np.maximum(1e-12, 1e-14 * size)
    elif name == "float32":
        limit = 1e-5 * np.maximum(1.0, size)
    else:
        limit = np.maximum(1e-3, 1e-5 * size)
    bad = ~(np.abs(got - ref) <= limit)
    assert not bad.any(), f"lse: {got[bad][:4]} where {ref[bad][:4]} was expected: {where}"


def assert_weights(
    weights: np.ndarray, want: Oracle, dtype: Any, where: str = "", slack: float = 0.0
) -> None:
    assert (weights.dtype, weights.shape) == (stats_dtype(dtype), want.weights.shape), where
    error = max_error(weights, want.weights, where)
    limit = 2.0 * want.textbook_weight_error + FLOOR[np.dtype(dtype).name] + slack
    assert error <= limit, f"weights: error {error:.3g} > {limit:.3g}: {where}"


def max_error(got: np.ndarray, ref: np.ndarray, where: str = "") -> float:
    """max|got - ref|; NaN and Inf must stand where they stand in ref."""
    got = got.astype(np.float64)
    nan = np.isnan(ref)
    assert (np.isnan(got) == nan).all(), (
        f"NaN at {np.argwhere(np.isnan(got) != nan)[:4].tolist()} is wrong: {where}"
    )
    infinite = np.isinf(ref)
    assert (got[infinite] == ref[infinite]).all(), f"expected {ref[infinite]}, got {got[infinite]}: {where}"
    finite = ~(nan | infinite)
    return float(np.max(np.abs(got[finite] - ref[finite]), initial=0.0))


def describe(kernel: str | None, q: Any, k: Any, v: Any, kwargs: dict[str, Any]) -> str:
    def short(x: Any) -> str:
        return f"{x.dtype}{x.shape}" if isinstance(x, np.ndarray) and x.size > 8 else repr(x)

    arguments = ", ".join(f"{name}={short(x)}" for name, x in kwargs.items())
    return f"mha(q {q.dtype}{q.shape}, k {k.shape}, v {v.shape}, kernel={kernel!r}, {arguments})"


# The same inputs go to every kernel: the oracle is computed once.
_cache: OrderedDict[bytes, Any] = OrderedDict()


def cached(key: bytes, compute: Callable[[], Any]) -> Any:
    """compute(), a named tuple with arrays, or what it gave for this key before."""
    if key not in _cache:
        _cache[key] = compute()
        while len(_cache) > 3000 or sum(_nbytes(x) for x in _cache.values()) > 4e8:
            _cache.popitem(last=False)
            if len(_cache) == 1:
                break
    return _cache[key]


def _nbytes(x: Any) -> int:
    return sum(map(_nbytes, x)) if isinstance(x, tuple) else getattr(x, "nbytes", 0)


def oracle(q: Any, k: Any, v: Any, *, out: Any = None, **kwargs: Any) -> Oracle:
    def compute() -> Oracle:
        ref, lse, weights = reference.mha(q, k, v, return_lse=True, return_weights=True, **kwargs)
        errors = [0.0]
        weight_errors = [0.0]
        for order in orders(q.dtype):
            book, book_weights = textbook(q, k, v, order=order, **kwargs)
            errors.append(_finite_error(book, ref))
            weight_errors.append(_finite_error(book_weights, weights))
        values = np.abs(v.astype(np.float64))
        max_v = float(np.max(values[np.isfinite(values)], initial=0.0))
        return Oracle(ref, lse, weights, max(errors), max(weight_errors), max_v)

    return cached(digest((q, k, v), kwargs), compute)


def _finite_error(got: np.ndarray, ref: np.ndarray) -> float:
    error = np.abs(got.astype(np.float64) - ref)
    return float(np.max(error[np.isfinite(error)], initial=0.0))


def digest(arrays: tuple[np.ndarray, ...], kwargs: dict[str, Any]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for name, x in [*enumerate(arrays), *sorted(kwargs.items())]:
        state.update(repr(name).encode())
        if isinstance(x, np.ndarray):
            state.update(f"{x.dtype}{x.shape}".encode())
            state.update(x.tobytes())
        else:
            state.update(repr(x).encode())
    return state.digest()


# ---- textbook -------------------------------------------------------------------------------------
class Pieces(NamedTuple):
    """What forward and backward have in common, in 4-D arrays of the dtype that products accumulate in."""

    q: np.ndarray  # (B,Hq,S,F) all three, k and v repeated for the query heads; non-finite values are 0
    k: np.ndarray
    v: np.ndarray
    scale: Any
    allowed: np.ndarray  # (B,Hq,Sq,Sk)
    distance: np.ndarray  # (B,1,Sq,Sk), |p - j|
    cap_slope: np.ndarray  # derivative of softcap
    score: np.ndarray  # -inf where not allowed
    lse: np.ndarray  # (B,Hq,Sq,1)
    weight: np.ndarray  # before dropout, not rounded
    sink_weight: np.ndarray  # (B,Hq,Sq,1)
    keep: np.ndarray  # factor of dropout


def orders(dtype: Any) -> tuple[str, ...]:
    """The orders of summation of which the worst counts."""
    return ("blas", "reversed", "sequential") if np.dtype(dtype).itemsize > 2 else ("blas",)


def textbook(
    q: Any, k: Any, v: Any, *, order: str = "blas", layout: str = "bshd", **kwargs: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Unfused attention in q's dtype: (out, weights before dropout). Scaled scores, weights and result
    are rounded to the dtype once each; products accumulate in f32 (f64 for f64)."""
    dtype, rank = q.dtype, q.ndim
    acc = stats_dtype(dtype)
    with np.errstate(all="ignore"):
        x = pieces(q, k, v, order=order, layout=layout, **kwargs)
        kept = (x.weight * x.keep).astype(dtype).astype(acc)
        out = product(kept, x.v, order).astype(dtype)
        weight = x.weight.astype(dtype)
    return as_given(out, rank, layout), weight[(0,) * (4 - rank)]


def pieces(
    q: Any,
    k: Any,
    v: Any,
    *,
    order: str,
    layout: str,
    scale: float | None = None,
    causal: bool = False,
    window: Any = None,
    q_offset: Any = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    q_lens: Any = None,
    kv_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Pieces:
    dtype = q.dtype
    acc = stats_dtype(dtype)
    q, k, v = (bhsd(x, layout).astype(acc) for x in (q, k, v))
    B, Hq, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    k, v = (np.repeat(x, Hq // Hkv if Hkv else 1, axis=1) for x in (k, v))
    ql, kl = _column(q_lens, B, Sq), _column(kv_lens, B, Sk)
    offset = kl - ql if q_offset is None else _column(q_offset, B, 0)
    if np.abs(offset.astype(float)).max(initial=0) > 2**50:
        offset = offset.astype(np.longdouble)  # i + offset must not wrap
    i, j = np.arange(Sq)[:, None], np.arange(Sk)
    distance = (i + offset) - j  # (B,1,Sq,Sk), p - j
    allowed = np.broadcast_to((i < ql) & (j < kl), (B, Hq, Sq, Sk)).copy()
    if causal:
        allowed &= distance >= 0
    if window is not None:
        left, right = window
        allowed &= (distance <= left) if left is not None else True
        allowed &= (distance >= -right) if right is not None else True
    if mask is not None:
        allowed &= mask
    if bias is not None:
        bias = np.asarray(bias).astype(acc)
        allowed &= bias != -np.inf
    distance = np.abs(distance).astype(acc)

    with np.errstate(all="ignore"):
        scale = acc.type(1.0 / math.sqrt(D) if scale is None else scale)
        score = (product(q, k.swapaxes(2, 3), order) * scale).astype(dtype).astype(acc)
        cap_slope = np.ones_like(score)
        if softcap is not None:
            tanh = np.tanh(score / acc.type(softcap))
            score, cap_slope = acc.type(softcap) * tanh, 1 - tanh * tanh
        if alibi_slopes is not None:
            slopes = np.broadcast_to(np.asarray(alibi_slopes).astype(acc), (B, Hq))[:, :, None, None]
            score = score - slopes * distance
        if bias is not None:
            score = score + bias
        score = np.where(allowed, score, acc.type(-np.inf))
        top = np.max(score, axis=-1, keepdims=True, initial=-np.inf)
        sink = np.full(Hq, -np.inf, acc) if sinks is None else np.asarray(sinks).astype(acc)
        sink = sink[None, :, None, None]
        top = np.maximum(top, sink)
        top = np.where(np.isfinite(top), top, acc.type(0))
        exps = np.exp(score - top)
        ones = np.ones((B, Hq, Sk, 1), acc)
        denominator = product(exps, ones, order) + np.exp(sink - top)
        weight = np.where(allowed, exps / denominator, acc.type(0))
        lse = top + np.log(denominator)
        sink_weight = np.where((i < ql) & (sink > -np.inf), np.exp(sink - top) / denominator, acc.type(0))
    keep = np.ones((B, Hq, Sq, Sk), acc)
    if dropout:
        kept = [[reference.dropout_keep(Sq, Sk, dropout, seed, b, h) for h in range(Hq)] for b in range(B)]
        keep = np.where(np.reshape(kept, keep.shape), 1 / acc.type(1 - dropout), acc.type(0))
    q, k, v = (np.where(np.isfinite(x), x, acc.type(0)) for x in (q, k, v))
    return Pieces(q, k, v, scale, allowed, distance, cap_slope, score, lse, weight, sink_weight, keep)


def product(a: np.ndarray, b: np.ndarray, order: str) -> np.ndarray:
    """a (...,m,n) @ b (...,n,p), summed over n in one of several orders."""
    if order == "blas":
        return a @ b
    if order == "reversed":
        return np.ascontiguousarray(a[..., ::-1]) @ np.ascontiguousarray(b[..., ::-1, :])
    total = np.zeros(a.shape[:-1] + b.shape[-1:], a.dtype)
    for n in range(a.shape[-1]):
        total += a[..., n, None] * b[..., n, None, :]
    return total


def as_given(x: np.ndarray, rank: int, layout: str) -> np.ndarray:
    """(B,H,S,F) in the caller's rank and layout."""
    x = x[(0,) * (4 - rank)]
    return x.swapaxes(-3, -2) if rank > 2 and layout == "bshd" else x


def bhsd(x: np.ndarray, layout: str) -> np.ndarray:
    if x.ndim == 2:
        return x[None, None]
    x = x.swapaxes(-3, -2) if layout == "bshd" else x
    return x[None] if x.ndim == 3 else x


def _column(values: Any, B: int, default: int) -> np.ndarray:
    values = default if values is None else np.asarray(values, np.int64)
    return np.broadcast_to(values, (B,)).reshape(B, 1, 1, 1)


assert set(FLOOR) == set(DTYPES)
