"""The float64 reference on a part of a case."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnbench.peers.base import Inputs
from fastattn import reference
from fastattn._check.shapes import Array


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
        self.size = float(np.abs(v[:, :, :1].astype(np.float32)).max())  # an error is measured in it

    def error(self, out: Array) -> float:
        """The largest difference, infinite for another shape."""
        return max(_error(out[index], part) for index, part in self.parts)


class BackwardSample:
    """dq, dk and dv of the last key/value head of the last entry of the batch.

    With its group of query heads and all rows, for dk and dv are sums over them.
    """

    size = 1.0

    def __init__(self, inputs: Inputs, dout: Array) -> None:
        case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v
        last = slice(case.batch - 1, case.batch)
        rows = (last, slice(None), slice(case.q_heads - case.q_heads // case.kv_heads, case.q_heads))
        keys = (last, slice(None), slice(case.kv_heads - 1, case.kv_heads))
        options = _part(inputs.options, *rows)
        self.want = reference.mha_backward(dout[rows], q[rows], k[keys], v[keys], **options)[:3]
        self.indices = rows, keys, keys

    def error(self, gradients: tuple[Array, Array, Array]) -> float:
        """The largest difference in units of its gradient's largest number, infinite for another shape."""
        parts = zip(gradients, self.indices, self.want, strict=True)
        return max(_error(x[index], want) / float(np.abs(want).max()) for x, index, want in parts)


def sample_of(inputs: Inputs) -> Sample | BackwardSample:
    return Sample(inputs) if inputs.dout is None else BackwardSample(inputs, inputs.dout)


def _error(out: Array, want: Array) -> float:
    """Infinite for another shape, and where a number is missing: max() may pass over NaN."""
    error = float(np.abs(out.astype(np.float64) - want).max()) if out.shape == want.shape else np.inf
    return np.inf if np.isnan(error) else error


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
