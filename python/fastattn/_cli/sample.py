"""The float64 reference on a few rows of a case."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn import reference
from fastattn._cli.cases import Array
from fastattn._cli.peers import Inputs


class Sample:
    """A few rows of the first and last key/value head of the first and last entry of the batch.

    Rows and heads are independent of each other, so a sample finds another scale, mask or head order as
    well as the whole result would, in a fraction of the time.
    """

    ROWS = 4

    def __init__(self, inputs: Inputs) -> None:
        case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
        group = case.q_heads // case.kv_heads
        self.parts: list[tuple[tuple[Any, ...], Array]] = []
        starts = {0, max(0, case.q_size // 2), max(0, case.q_size - self.ROWS)}
        for b in {0, case.batch - 1}:
            for g in {0, case.kv_heads - 1}:
                heads = slice(g * group, (g + 1) * group)
                kv = (slice(b, b + 1), slice(None), slice(g, g + 1))
                for start in starts:
                    rows = slice(start, min(start + self.ROWS, case.q_size))
                    index = (slice(b, b + 1), rows, heads)
                    options = _part(inputs.options, *index)
                    options["q_offset"] = start + case.kv_size - case.q_size
                    self.parts.append((index, reference.mha(q[index], k[kv], v[kv], **options)))
        self.max_v = float(np.abs(v[:, :, :1].astype(np.float32)).max())

    def error(self, out: Array) -> float:
        """The largest difference, infinite for another shape."""
        return max(_error(out[index], part) for index, part in self.parts)


def _error(out: Array, want: Array) -> float:
    return float(np.abs(out.astype(np.float64) - want).max()) if out.shape == want.shape else np.inf


def _part(options: dict[str, Any], batch: slice, rows: slice, heads: slice) -> dict[str, Any]:
    """The arguments for a few rows and heads: arrays are cut along their axes that are not broadcast."""
    part = dict(options)
    for name in ("mask", "bias"):
        if name in part:
            x = part[name]
            cuts = (batch, heads, rows)
            index = tuple(cut if n > 1 else slice(None) for cut, n in zip(cuts, x.shape, strict=False))
            part[name] = x[index]
    for name in ("alibi_slopes", "sinks"):
        if name in part:
            part[name] = part[name][heads]
    return part
