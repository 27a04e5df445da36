"""How far the gradients of a kernel may be from the float64 reference.

    max|g - ref| <= 3 * max|textbook - ref| + floor * max(1, max|ref|)

for each gradient by itself. Textbook is the unfused backward in the dtype of the inputs, from `out` and the
weights of the forward: products accumulate in float32 (float64 for float64); weights, out, dP, dS and the
gradients are rounded to the dtype once each.

dbias, dalibi_slopes and dsinks may be single numbers, of which the textbook may be right by luck. To their
floor comes eps of the dtype times the root of the sum of the squares of what they add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn import reference
from fastattn._check import gate
from fastattn._check.shapes import Array

SIDES = ("bias", "alibi_slopes", "sinks")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
Sides = tuple[Array | None, ...]


class Expected(NamedTuple):
    gradients: fastattn.Gradients  # float64
    limits: tuple[float, ...]


def expected(dout: Array, q: Array, k: Array, v: Array, **kwargs: Any) -> Expected:
    """The reference, and how far from it each gradient may be. Arguments as for `gate.expected`."""
    want = reference.mha_backward(dout, q, k, v, **kwargs)
    orders = (False, True) if q.dtype.itemsize > 2 else (False,)
    books = [textbook(dout, q, k, v, backwards=order, **kwargs) for order in orders]
    floor, eps = gate.FLOOR[q.dtype.name], EPS[q.dtype.name]
    squares = (None, None, None, *books[0][1])
    limits = []
    for ref, square, *found in zip(want, squares, *(book for book, _ in books), strict=True):
        error = 0.0 if ref is None else max(gate.largest(x - ref) for x in found)
        noise = 0.0 if square is None else eps * gate.largest(square) ** 0.5
        limits.append(3.0 * error + floor * max(1.0, 0.0 if ref is None else gate.largest(ref)) + noise)
    return Expected(want, tuple(limits))


def worst(got: fastattn.Gradients, want: Expected) -> tuple[float, float, str]:
    """The largest error in units of its limit, that error, and the name of the gradient."""
    found = [
        (*gate.worst(x, ref, limit)[::-1], name)
        for name, x, ref, limit in zip(got._fields, got, want.gradients, want.limits, strict=True)
        if ref is not None
    ]
    return max(found)


def textbook(
    dout: Array, q: Array, k: Array, v: Array, *, backwards: bool = False, **kwargs: Any
) -> tuple[fastattn.Gradients, Sides]:
    """The gradients in q's dtype, as float64, and the sums of the squares of dbias, dalibi_slopes and dsinks.

    `backwards` is as for `gate.textbook`. delta is then added up one by one: where a row sees few keys, dS is
    what the rounding of two equal sums leaves, and the same order would leave nothing.
    """
    dtype = q.dtype
    with np.errstate(all="ignore"):
        x = gate.pieces(q, k, v, backwards=backwards, **kwargs)
        do = dout.swapaxes(1, 2).astype(x.q.dtype)
        weight, kept = gate.rounded(x.weight, dtype), gate.rounded(x.weight * x.keep, dtype)
        terms = do * gate.rounded(gate.product(kept, x.v, backwards), dtype)
        delta = terms.cumsum(axis=3)[..., -1:] if backwards else terms.sum(axis=3, keepdims=True)
        dweight = gate.rounded(gate.product(do, x.v.swapaxes(2, 3), backwards), dtype) * x.keep
        dscore = gate.rounded(weight * (dweight - delta), dtype)
        dproduct = x.scale * dscore * x.cap_slope

        def of_queries(gradient: Array) -> Array:
            return gradient.astype(dtype).swapaxes(1, 2).astype(np.float64)

        def of_keys(pairs: Array, rows: Array) -> Array:
            """Summed over rows and over the heads of a group."""
            sums = gate.product(pairs.swapaxes(2, 3), rows, backwards)
            return of_queries(sums.reshape(len(sums), k.shape[2], -1, *sums.shape[2:]).sum(axis=2))

        def of_sides(pairs: Array, distance: Array, sinks: Array) -> Sides:
            sums = (pairs, (pairs * distance).sum(axis=(2, 3)), sinks.sum(axis=(2, 3)))
            return tuple(_summed_as(total, kwargs.get(name)) for total, name in zip(sums, SIDES, strict=True))

        gradients = fastattn.Gradients(
            of_queries(gate.product(dproduct, x.k, backwards)),
            of_keys(dproduct, x.q),
            of_keys(kept, do),
            *of_sides(dscore, -x.distance, -x.sink_weight * delta),
        )
        size = weight * (np.abs(dweight) + np.abs(delta))
        return gradients, of_sides(size**2, x.distance**2, (x.sink_weight * delta) ** 2)


def _summed_as(x: Array, argument: Any) -> Array | None:
    """Over the axes that the argument broadcasts, in its dtype; as float64."""
    if argument is None:
        return None
    given = np.asarray(argument)
    x = x.sum(axis=tuple(range(x.ndim - given.ndim)))
    ones = tuple(axis for axis, size in enumerate(given.shape) if size == 1)
    return np.asarray(x.sum(axis=ones, keepdims=True).astype(given.dtype).astype(np.float64))
