"""The error gate of the gradients: as the forward's (gate.py), with 3 in place of 2.

    max|g - ref| <= 3 * max|textbook - ref| + floor * max(1, max|ref|)

ref is the reference's gradient in float64, from the same rounded inputs, with out and lse unrounded.
Textbook is the unfused backward in the dtype of q, on whole 4-D arrays, with softmax backward as
P * (dP - delta). P and delta are those of the forward and sum(P * dP), and once more what can be had from
the forward's results in their dtypes, exp(score - lse) and sum(dout * out); whichever errs more.

dbias, dalibi_slopes and dsinks may be one number, and its error in the textbook a matter of luck. To their
floor comes eps of q's dtype times the root of the sum of the squares of what they add up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gate
import ml_dtypes
import numpy as np
from gate import as_given, bhsd, cached, digest, orders, pieces, product
from inputs import normal, stats_dtype

import fastattn
from fastattn import reference

SIDES = ("bias", "alibi_slopes", "sinks")


class BackwardOracle(NamedTuple):
    grads: fastattn.Gradients  # float64
    textbook_errors: tuple[float, ...]
    noise: tuple[float, ...]


def check_backward(
    kernel: str | None,
    q: Any,
    k: Any,
    v: Any,
    *,
    dout: Any = None,
    dlse: Any = None,
    score_size: float = 0.0,
    **kwargs: Any,
) -> fastattn.Gradients:
    """Runs forward and backward on a kernel and holds every gradient against the gate.

    dout: without it a normal one. Lists become arrays; score_size as in `gate.check`. NaN and Inf must stand
    where they stand in the reference. Returns the gradients.
    """
    kwargs = {name: np.array(x) if isinstance(x, list) else x for name, x in kwargs.items()}
    dout = normal((*q.shape[:-1], v.shape[-1]), q.dtype, 99) if dout is None else dout
    problem = {name: x for name, x in kwargs.items() if name != "need_dbias"}
    out, lse = fastattn.mha(q, k, v, kernel=kernel, return_lse=True, **problem)
    grads = fastattn.mha_backward(dout, q, k, v, out, lse, dlse=dlse, kernel=kernel, **kwargs)
    where = f"{gate.describe(kernel, q, k, v, kwargs)}, dlse {dlse is not None}"
    assert_gradients(grads, (q, k, v), dout, dlse, kwargs, score_size, where)
    return grads


def assert_gradients(
    grads: fastattn.Gradients,
    qkv: tuple[Any, Any, Any],
    dout: Any,
    dlse: Any,
    kwargs: dict[str, Any],
    score_size: float = 0.0,
    where: str = "",
) -> None:
    assert isinstance(grads, fastattn.Gradients), where
    want = oracle_backward(*qkv, dout, dlse, **kwargs)
    slack = float(np.finfo(stats_dtype(qkv[0].dtype)).eps) * score_size
    floor = gate.FLOOR[qkv[0].dtype.name] + slack
    arguments = (*qkv, *map(kwargs.get, SIDES))
    for name, got, ref, of, book, noise in zip(
        grads._fields, grads, want.grads, arguments, want.textbook_errors, want.noise, strict=True
    ):
        at = f"{name}: {where}"
        assert (got is None) == (ref is None), at
        if ref is None:
            continue
        assert isinstance(got, np.ndarray), at
        assert (got.dtype, got.shape) == (of.dtype, of.shape), at
        error = gate.max_error(got, ref, at)
        limit = 3.0 * book + floor * max(1.0, _largest(ref)) + noise
        assert error <= limit, f"error {error:.3g} > {limit:.3g} (textbook {book:.3g}) of {at}"


def oracle_backward(q: Any, k: Any, v: Any, dout: Any, dlse: Any, **kwargs: Any) -> BackwardOracle:
    def compute() -> BackwardOracle:
        ref = reference.mha_backward(dout, q, k, v, dlse=dlse, **kwargs)
        errors = [0.0] * len(ref)
        for order in orders(q.dtype):
            for saved in (False, True):
                book = textbook_backward(q, k, v, dout, dlse, order=order, saved=saved, **kwargs)
                errors = [
                    worst if y is None else max(worst, gate._finite_error(x, y))
                    for worst, x, y in zip(errors, book, ref, strict=True)
                ]
        noise = sum_noise(q, k, v, dout, dlse, **kwargs)
        return BackwardOracle(ref, tuple(errors), (0.0, 0.0, 0.0, *noise))

    arrays = (q, k, v, dout) if dlse is None else (q, k, v, dout, dlse)
    return cached(digest(arrays, kwargs), compute)


def textbook_backward(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    dlse: Any,
    *,
    order: str = "blas",
    saved: bool = False,
    layout: str = "bshd",
    need_dbias: bool = True,
    **kwargs: Any,
) -> fastattn.Gradients:
    """Unfused gradients in q's dtype. Scaled scores, weights, dP, dS and results are rounded to the dtype
    once each; products accumulate in f32 (f64 for f64). saved: from out and lse."""
    dtype, rank, Hkv = q.dtype, q.ndim, bhsd(k, layout).shape[1]
    acc = stats_dtype(dtype)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(acc)

    with np.errstate(all="ignore"):
        x = pieces(q, k, v, order=order, layout=layout, **kwargs)
        B, Hq = x.q.shape[:2]
        do, dl = _row_gradients(dout, dlse, layout, acc)
        weight = x.weight
        if saved:  # lse comes from a pass that may have summed in another order
            lse = pieces(q, k, v, order="blas", layout=layout, **kwargs).lse
            # A lse of a large score lacks the digits; the row's sum is then taken again.
            weight = np.where(x.allowed & (np.abs(lse) < 1e3), np.exp(x.score - lse), weight)
        weight, kept = rounded(weight), rounded(weight * x.keep)
        dweight = rounded(product(do, x.v.swapaxes(2, 3), order)) * x.keep
        if saved:
            delta = (do * rounded(product(rounded(x.weight * x.keep), x.v, order))).sum(axis=3, keepdims=True)
        else:
            delta = product(weight * dweight, np.ones((B, Hq, weight.shape[3], 1), acc), order)
        dscore = rounded(np.where(x.allowed, weight * (dweight - delta + dl), acc.type(0)))
        dproduct = x.scale * dscore * np.where(x.allowed, x.cap_slope, acc.type(0))

        def of_keys(per_query_head: np.ndarray) -> np.ndarray:
            shape = per_query_head.shape
            return per_query_head.reshape(B, Hkv, Hq // Hkv if Hkv else 0, *shape[2:]).sum(axis=2)

        dq = product(dproduct, x.k, order)
        dk = of_keys(product(dproduct.swapaxes(2, 3), x.q, order))
        dv = of_keys(product(kept.swapaxes(2, 3), do, order))
        drow = np.where(x.sink_weight > 0, x.sink_weight * (dl - delta), acc.type(0))
        bias, slopes, sinks = _side_sums(dscore, -x.distance, drow, kwargs)
        return fastattn.Gradients(
            *(as_given(g.astype(dtype), rank, layout) for g in (dq, dk, dv)),
            bias if need_dbias else None,
            slopes,
            sinks,
        )


def sum_noise(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    dlse: Any,
    *,
    layout: str = "bshd",
    need_dbias: bool = True,
    **kwargs: Any,
) -> list[float]:
    """Of dbias, dalibi_slopes, dsinks: eps of the dtype * the root of the sum of the squares of the terms."""
    if all(kwargs.get(name) is None for name in SIDES):
        return [0.0] * 3
    wide = np.dtype(np.float64)
    kwargs |= {name: kwargs[name].astype(wide) for name in SIDES if kwargs.get(name) is not None}
    with np.errstate(all="ignore"):
        x = pieces(*(a.astype(wide) for a in (q, k, v)), order="blas", layout=layout, **kwargs)
        do, dl = _row_gradients(dout, dlse, layout, wide)
        dweight = np.abs(do @ x.v.swapaxes(2, 3)) * x.keep
        drow = np.abs(dl) + np.abs(np.sum(do * ((x.weight * x.keep) @ x.v), axis=3, keepdims=True))
        dscore = x.weight * (dweight + drow)
        sums = _side_sums(dscore**2, x.distance**2, (x.sink_weight * drow) ** 2, kwargs)
    eps = float(ml_dtypes.finfo(q.dtype).eps)
    return [0.0 if x is None else eps * _largest(x) ** 0.5 for x in sums]


def _side_sums(
    dscore: np.ndarray, distance: np.ndarray, drow: np.ndarray, kwargs: dict[str, Any]
) -> list[np.ndarray | None]:
    """dscore, dscore * distance and drow, each summed to the shape and dtype of its argument."""
    sums = (dscore, (dscore * distance).sum(axis=(2, 3)), drow.sum(axis=(2, 3)))
    return [_summed_as(x, kwargs.get(name)) for name, x in zip(SIDES, sums, strict=True)]


def _row_gradients(dout: Any, dlse: Any, layout: str, acc: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """dout (B,Hq,Sq,Dv) with 0 for what is not finite, and dlse (B,Hq,Sq,1)."""
    do = bhsd(dout, layout).astype(acc)
    rows = (*do.shape[:3], 1)
    dl = np.zeros(rows, acc) if dlse is None else np.reshape(dlse, rows).astype(acc)
    return np.where(np.isfinite(do), do, acc.type(0)), dl


def _summed_as(x: np.ndarray, like: np.ndarray | None) -> np.ndarray | None:
    """x summed over the axes that like does not have, in its dtype."""
    if like is None:
        return None
    while x.ndim > like.ndim:
        x = x.sum(axis=0)
    for axis, size in enumerate(like.shape):
        if size == 1:
            x = x.sum(axis=axis, keepdims=True)
    return np.asarray(x).astype(like.dtype)


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))
