"""Masks and biases as arrays of scores: what peers take for the options. Made before the clock starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnbench.cases import Case
from fastattn._check.shapes import Array


def hides_pairs(case: Case) -> bool:
    """Whether some pairs may not attend."""
    return case.causal or case.window is not None or case.feature == "mask"


def square_causal(case: Case) -> bool:
    """Whether the peers' is_causal, which is aligned top-left, means the same as ours."""
    return case.causal and case.q_size == case.kv_size


def allowed(case: Case, options: dict[str, Any]) -> Array:
    """True where a pair may attend, (B or 1, 1, Sq, Sk)."""
    distance = _distance(case)  # p - j
    left, right = options.get("window") or (None, None)
    seen = np.ones_like(distance, dtype=bool)
    if case.causal:
        seen &= distance >= 0
    if left is not None:
        seen &= distance <= left
    if right is not None:
        seen &= distance >= -right
    seen = seen[None, None]
    return seen & options["mask"] if "mask" in options else seen


def bias(case: Case, options: dict[str, Any]) -> Array | None:
    """What is added to the scores, (1, Hq or 1, Sq, Sk), in float32 or the case's dtype."""
    if "bias" in options:
        return np.asarray(options["bias"])
    if "alibi_slopes" in options:
        distance = np.abs(_distance(case)).astype(np.float32)
        return np.asarray(-options["alibi_slopes"][None, :, None, None] * distance)
    return None


def additive(case: Case, options: dict[str, Any], dtype: Any) -> Array | None:
    """`bias` with -inf where a pair may not attend; None where there is neither."""
    added = bias(case, options)
    if hides_pairs(case):
        hidden = np.where(allowed(case, options), np.float32(0), np.float32(-np.inf))
        added = hidden if added is None else added + hidden
    return None if added is None else added.astype(dtype)


def _distance(case: Case) -> Array:
    """How far key j lies before row i's position, (Sq, Sk)."""
    position = np.arange(case.q_size, dtype=np.int32)[:, None] + (case.kv_size - case.q_size)
    return np.asarray(position - np.arange(case.kv_size, dtype=np.int32))
