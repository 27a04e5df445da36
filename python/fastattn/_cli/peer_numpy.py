"""NumPy: the textbook."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from fastattn._cli import dense, machine
from fastattn._cli.cases import Array, Case
from fastattn._cli.peers import Inputs, Maker, NotApplicable, Runner, refuse_large_scores


class NumPy:
    """The textbook, as one would write it for speed: batched products, everything after them in place."""

    name = "numpy"
    limited_by = "threadpoolctl, on NumPy's BLAS"

    def __init__(self, threads: int) -> None:
        try:
            threadpoolctl = importlib.import_module("threadpoolctl")
        except ImportError:
            # Without it NumPy's BLAS keeps the threads it started with: all CPUs.
            if threads != machine.usable_cpus():
                raise NotApplicable("needs threadpoolctl to run on --threads threads") from None
            self.limited_by = "not at all: its BLAS takes all CPUs"
        else:
            threadpoolctl.threadpool_limits(threads, user_api="blas")

    def candidates(self, case: Case) -> list[Maker]:
        if case.dtype not in ("float32", "float64"):
            raise NotApplicable(f"its {case.dtype} products are plain loops")
        refuse_large_scores(case)
        return [self._maker]

    def _maker(self, inputs: Inputs) -> Runner:
        case, q = inputs.case, inputs.q
        group = case.q_heads // case.kv_heads
        batch, heads, dim = case.batch, case.kv_heads, case.head_dim
        # Query heads of a group fold into rows, so that K and V are used as they are: (B,Hkv,G*Sq,D).
        parts = q.reshape(batch, case.q_size, heads, group, dim).transpose(0, 2, 3, 1, 4)
        qn = np.ascontiguousarray(parts).reshape(batch, heads, group * case.q_size, dim)
        kn, vn = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (inputs.k, inputs.v))  # (B,Hkv,Sk,D)
        scale = q.dtype.type(1.0 / math.sqrt(dim))
        added = self._added(inputs)
        softcap = None if case.softcap is None else q.dtype.type(case.softcap)
        sinks = inputs.options.get("sinks")
        if sinks is not None:  # one per row
            sinks = np.repeat(sinks.astype(q.dtype), case.q_size).reshape(1, heads, group * case.q_size, 1)

        def run() -> Any:
            score = (qn * scale) @ kn.swapaxes(2, 3)  # (B,Hkv,G*Sq,Sk)
            if softcap is not None:
                score /= softcap
                np.tanh(score, out=score)
                score *= softcap
            if added is not None:
                score += added
            top = score.max(axis=-1, keepdims=True)
            score -= top
            np.exp(score, out=score)
            total = score.sum(axis=-1, keepdims=True)
            if sinks is not None:
                total += np.exp(sinks - top)
            out = score @ vn
            out /= total
            return out

        def to_numpy(out: Array) -> Array:
            rows = out.reshape(batch, heads, group, case.q_size, case.v_dim)
            return rows.transpose(0, 3, 1, 2, 4).reshape(*q.shape[:3], case.v_dim)

        return Runner(run, to_numpy, "matmul, exp, matmul", case.dense_flops)

    def _added(self, inputs: Inputs) -> Array | None:
        """Mask and bias as one array in the order of the scores."""
        case = inputs.case
        added = dense.additive(case, inputs.options, inputs.q.dtype)
        if added is None:
            return None
        group = case.q_heads // case.kv_heads
        batch, heads, rows, keys = added.shape
        if heads == 1:
            return np.tile(added, (1, 1, group, 1))
        return added.reshape(batch, case.kv_heads, group * rows, keys)
