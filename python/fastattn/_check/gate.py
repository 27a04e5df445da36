"""How far the results of a kernel may be from the float64 reference.

    max|out - ref| <= 2 * max|textbook - ref| + floor * max(1, max|v|)
    max|g - ref| <= 3 * max|textbook - ref| + floor * max(1, max|ref|)         for each gradient g by itself

Textbook is the unfused computation in the dtype of the inputs, the backward from `out` and the weights of the
forward: products accumulate in float32 (float64 for float64); scaled scores, weights, out, dP, dS and the
gradients are rounded to the dtype once each.

dbias, dalibi_slopes and dsinks may be single numbers, of which the textbook may be right by luck. To their
floor comes eps of the dtype times the root of the sum of the squares of what they add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn import reference
from fastattn._arguments import OPTIONS
from fastattn._check.shapes import Array

FLOOR = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-5, "bfloat16": 1e-5}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SIDES = ("bias", "alibi_slopes", "sinks")
Sides = tuple[Array | None, ...]


class Expected(NamedTuple):
    out: Array  # float64
    lse: Array
    out_limit: float
    lse_limit: Any


class ExpectedGradients(NamedTuple):
    gradients: fastattn.Gradients  # float64
    limits: tuple[float, ...]


def expected(q: Array, k: Array, v: Array, **kwargs: Any) -> Expected:
    """The reference, and how far from it one may be. Layout bshd, rank 4; arguments as for `fastattn.mha`."""
    out, lse = reference.mha(q, k, v, return_lse=True, **kwargs)
    errors = [_largest(textbook(q, k, v, backwards=order, **kwargs) - out) for order in _orders(q)]
    floor = FLOOR[q.dtype.name] * max(1.0, _largest(v.astype(np.float64)))
    lse_limit = {"float64": 1e-12, "float32": 1e-5 * np.maximum(1.0, np.abs(lse))}.get(q.dtype.name, 1e-3)
    return Expected(out, lse, 2.0 * max(errors) + floor, lse_limit)


def expected_gradients(dout: Array, q: Array, k: Array, v: Array, **kwargs: Any) -> ExpectedGradients:
    """The same of the gradients of sum(dout * out)."""
    want = reference.mha_backward(dout, q, k, v, **kwargs)
    books = [textbook_gradients(dout, q, k, v, backwards=order, **kwargs) for order in _orders(q)]
    floor, eps = FLOOR[q.dtype.name], EPS[q.dtype.name]
    squares = (None, None, None, *books[0][1])
    limits = []
    for ref, square, *found in zip(want, squares, *(book for book, _ in books), strict=True):
        error = 0.0 if ref is None else max(_largest(x - ref) for x in found)
        noise = 0.0 if square is None else eps * _largest(square) ** 0.5
        limits.append(3.0 * error + floor * max(1.0, 0.0 if ref is None else _largest(ref)) + noise)
    return ExpectedGradients(want, tuple(limits))


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


def worst_gradient(got: fastattn.Gradients, want: ExpectedGradients) -> tuple[float, float, str]:
    """The largest error in units of its limit, that error, and the name of the gradient."""
    found = [
        (*worst(x, ref, limit)[::-1], name)
        for name, x, ref, limit in zip(got._fields, got, want.gradients, want.limits, strict=True)
        if ref is not None
    ]
    return max(found)


def textbook(q: Array, k: Array, v: Array, *, backwards: bool = False, **kwargs: Any) -> Array:
    """Attention in q's dtype (B,Sq,Hq,Dv), as float64; `backwards` adds up from the other end."""
    problem = _problem(q, k, v, backwards, kwargs)
    out = np.zeros(problem.out_shape, q.dtype)
    with np.errstate(all="ignore"):
        for b, h, g in problem.heads():
            pairs = problem.pairs(b, h)
            weight, _, _ = reference._softmax(pairs.score, pairs.allowed, problem.sinks[h])
            kept = problem.rounded(weight * pairs.keep)
            out[b, h] = _product(kept, problem.wide(problem.v[b, g]), pairs.allowed, backwards)
    return problem.as_given(out.astype(np.float64))


def textbook_gradients(
    dout: Array, q: Array, k: Array, v: Array, *, backwards: bool = False, **kwargs: Any
) -> tuple[fastattn.Gradients, Sides]:
    """The gradients in q's dtype, as float64, and the sums of the squares of dbias, dalibi_slopes and dsinks.

    `backwards` also adds up delta one by one: where a row sees few keys, dS is what the rounding of two equal
    sums leaves, and the same order would leave nothing.
    """
    problem = _problem(q, k, v, backwards, kwargs)
    douts = problem.as_bhsd("dout", dout)
    dq, dk, dv = (np.zeros(x.shape, problem.wide(0).dtype) for x in (problem.q, problem.k, problem.v))
    dscores, squares = np.zeros((2, *problem.score_shape))
    per_head = np.zeros((4, *problem.lse_shape[:2]))  # dalibi_slopes, dsinks, and the sums of their squares
    with np.errstate(all="ignore"):
        for b, h, g in problem.heads():
            pairs = problem.pairs(b, h)
            q_h, k_h, v_h, do = (
                problem.wide(x) for x in (problem.q[b, h], problem.k[b, g], problem.v[b, g], douts[b, h])
            )
            weight, _, sink_weight = reference._softmax(pairs.score, pairs.allowed, problem.sinks[h])
            weight, kept = problem.rounded(weight), problem.rounded(weight * pairs.keep)
            terms = do * problem.rounded(_product(kept, v_h, pairs.allowed, backwards))
            delta = terms.cumsum(axis=1)[:, -1:] if backwards else terms.sum(axis=1, keepdims=True)
            dweight = problem.rounded(do @ np.where(np.isfinite(v_h), v_h, 0).T) * pairs.keep
            dscore = problem.rounded(weight * (dweight - delta))
            dproduct = problem.wide(problem.scale * dscore * pairs.cap_slope)

            dq[b, h] = _product(dproduct, k_h, pairs.allowed, backwards)
            dk[b, g] += _product(dproduct.T, q_h, pairs.allowed.T, backwards)
            dv[b, g] += _product(kept.T, do, pairs.allowed.T, backwards)
            size = weight * (np.abs(dweight) + np.abs(delta))
            dscores[b, h], squares[b, h] = dscore, size**2
            dsink = sink_weight * delta[:, 0]
            per_head[:, b, h] = [
                *(-np.sum(dscore * pairs.distance), -np.sum(dsink)),
                *(np.sum((size * pairs.distance) ** 2), np.sum(dsink**2)),
            ]

    features = slice(None, None, -1 if backwards else 1)
    gradients = [problem.as_given(x.astype(q.dtype).astype(np.float64)) for x in (dq, dk, dv)]
    gradients[:2] = (x[..., features] for x in gradients[:2])
    sides = _of_sides((dscores, *per_head[:2]), kwargs)
    return fastattn.Gradients(*gradients, *sides), _of_sides((squares, *per_head[2:]), kwargs)


def _problem(q: Array, k: Array, v: Array, backwards: bool, given: dict[str, Any]) -> reference._Problem:
    if backwards:
        q, k = q[..., ::-1], k[..., ::-1]
    defaults = {x.name: x.default for x in OPTIONS}
    return reference._Problem({**defaults, **given, "q": q, "k": k, "v": v}, q.dtype)


def _product(weight: Array, value: Array, allowed: Array, backwards: bool) -> Array:
    """weight @ value over the allowed pairs."""
    order = slice(None, None, -1 if backwards else 1)
    return reference._weighted_sum(weight[:, order], value[order], allowed[:, order])


def _of_sides(sums: tuple[Array, ...], kwargs: dict[str, Any]) -> Sides:
    """The sums over what each side argument broadcasts, in its dtype, as float64."""
    given = [None if kwargs.get(name) is None else np.asarray(kwargs[name]) for name in SIDES]
    return tuple(
        None if x is None else reference._sum_to(total, x.shape).astype(x.dtype).astype(np.float64)
        for total, x in zip(sums, given, strict=True)
    )


def _orders(q: Array) -> tuple[bool, ...]:
    """In the wide dtypes the textbook's own error depends on the order of its sums: the worst of two."""
    return (False, True) if q.dtype.itemsize > 2 else (False,)


def _largest(x: Array) -> float:
    return float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))
