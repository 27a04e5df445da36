"""How far a kernel may be from the float64 reference.

    max|out - ref| <= 2 * max|textbook - ref| + floor * max(1, max|v|)

Textbook is the unfused computation in the dtype of the inputs: products accumulate in float32 (float64 for
float64); scaled scores, weights and the result are rounded to the dtype once each.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from fastattn import reference
from fastattn._check.shapes import Array

FLOOR = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-5, "bfloat16": 1e-5}


class Expected(NamedTuple):
    out: Array  # float64
    lse: Array
    out_limit: float
    lse_limit: Array


def expected(q: Array, k: Array, v: Array, **kwargs: Any) -> Expected:
    """The reference, and how far from it one may be. Layout bshd, rank 4; arguments as for `fastattn.mha`."""
    out, lse = reference.mha(q, k, v, return_lse=True, **kwargs)
    # In the wide dtypes the textbook's own error depends on the order of its sums: the worst of two.
    orders = (False, True) if q.dtype.itemsize > 2 else (False,)
    errors = [largest(textbook(q, k, v, backwards=order, **kwargs) - out) for order in orders]
    floor = FLOOR[q.dtype.name] * max(1.0, largest(v.astype(np.float64)))
    size = np.abs(lse)
    lse_limit = {
        "float64": np.full_like(lse, 1e-12),
        "float32": 1e-5 * np.maximum(1.0, size),
    }.get(q.dtype.name, np.full_like(lse, 1e-3))
    return Expected(out, lse, 2.0 * max(errors) + floor, lse_limit)


def worst(got: Array, ref: Array, limit: Any) -> tuple[float, float]:
    """The largest error, and the largest error in units of its limit: above 1 is too much.

    Infinite where one of the two is NaN or infinite and the other is not the same.
    """
    got = got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - ref)
    same = (got == ref) | (np.isnan(got) & np.isnan(ref))
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    return float(np.max(error, initial=0.0)), float(np.max(error / limit, initial=0.0))


class Pieces(NamedTuple):
    """What the textbook's forward and backward share: heads first, in the dtype of accumulation."""

    q: Array  # (B,Hq,Sq,D)
    k: Array  # (B,Hq,Sk,D), repeated for each query head of the group; 0 for NaN and Inf, which are masked
    v: Array  # (B,Hq,Sk,Dv), likewise
    scale: Any
    allowed: Array  # (B,Hq,Sq,Sk), as the following
    distance: Array  # |p - j|
    cap_slope: Array  # derivative of softcap
    keep: Array  # factor of the weight by dropout
    weight: Array  # not rounded, before dropout
    sink_weight: Array  # (B,Hq,Sq,1)


def textbook(q: Array, k: Array, v: Array, *, backwards: bool = False, **kwargs: Any) -> Array:
    """Unfused attention in q's dtype (B,Sq,Hq,Dv), as float64; `backwards` sums from the other end."""
    x = pieces(q, k, v, backwards=backwards, **kwargs)
    with np.errstate(all="ignore"):
        out = product(rounded(x.weight * x.keep, q.dtype), x.v, backwards).astype(q.dtype)
    return np.asarray(out.swapaxes(1, 2).astype(np.float64))


def pieces(
    q: Array,
    k: Array,
    v: Array,
    *,
    backwards: bool,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    softcap: float | None = None,
    sinks: Any = None,
    kv_lens: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Pieces:
    dtype = q.dtype
    acc = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    batch, n_q, heads, dim = q.shape
    n_k, kv_heads = k.shape[1:3]
    qs, ks, vs = (x.swapaxes(1, 2).astype(acc) for x in (q, k, v))  # (B,H,S,D)
    ks, vs = (np.repeat(np.where(np.isfinite(x), x, 0), heads // kv_heads, axis=1) for x in (ks, vs))
    lens = np.full(batch, n_k) if kv_lens is None else np.asarray(kv_lens)
    lens = lens.reshape(batch, 1, 1, 1)
    distance = np.arange(n_q)[:, None] + (lens - n_q) - np.arange(n_k)  # p - j, (B,1,Sq,Sk)
    allowed = np.broadcast_to(np.arange(n_k) < lens, (batch, heads, n_q, n_k))
    if causal:
        allowed = allowed & (distance >= 0)
    if window is not None:
        left, right = window
        allowed = allowed & (left is None or distance <= left) & (right is None or distance >= -right)
    if mask is not None:
        allowed = allowed & mask
    distance = np.abs(distance).astype(acc)

    with np.errstate(all="ignore"):
        factor = acc.type(1.0 / math.sqrt(dim) if scale is None else scale)
        score = rounded(product(qs, ks.swapaxes(2, 3), backwards) * factor, dtype)
        cap_slope = np.ones_like(score)
        if softcap is not None:
            tanh = np.tanh(score / acc.type(softcap))
            score, cap_slope = acc.type(softcap) * tanh, 1 - tanh * tanh
        if alibi_slopes is not None:
            score = score - np.asarray(alibi_slopes, acc)[:, None, None] * distance
        if bias is not None:
            score = score + np.asarray(bias).astype(acc)
        score = np.where(allowed, score, acc.type(-np.inf))
        sink = np.full(heads, -np.inf, acc) if sinks is None else np.asarray(sinks).astype(acc)
        sink = sink[:, None, None]
        top = np.maximum(score.max(axis=-1, keepdims=True), sink)
        top = np.where(np.isfinite(top), top, acc.type(0))
        exps = np.exp(score - top)
        total = product(exps, np.ones((batch, heads, n_k, 1), acc), backwards) + np.exp(sink - top)
        weight = np.where(allowed, exps / total, acc.type(0))
        sink_weight = np.exp(sink - top) / total
    keep = np.ones_like(weight)
    if dropout:
        pairs = np.ndindex(batch, heads)
        kept = np.stack([reference.dropout_keep(n_q, n_k, dropout, seed, b, h) for b, h in pairs])
        keep = kept.reshape(weight.shape) / acc.type(1 - dropout)
    return Pieces(qs, ks, vs, factor, allowed, distance, cap_slope, keep, weight, sink_weight)


def rounded(x: Array, dtype: Any) -> Array:
    """To the dtype and back."""
    return x.astype(dtype).astype(x.dtype)


def product(a: Array, b: Array, backwards: bool) -> Array:
    if backwards:
        return np.asarray(np.ascontiguousarray(a[..., ::-1]) @ np.ascontiguousarray(b[..., ::-1, :]))
    return np.asarray(a @ b)


def largest(x: Array) -> float:
    return float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))
