"""NumPy: the textbook."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from attnbench import dense
from attnbench.cases import Case
from attnbench.peers.base import Inputs, Maker, NotApplicable, Runner, refuse_large_scores
from fastattn._check import machine
from fastattn._check.shapes import Array


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
        qn = _by_group(case, q)
        kn, vn = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (inputs.k, inputs.v))  # (B,Hkv,Sk,D)
        scale = q.dtype.type(1.0 / math.sqrt(case.head_dim))
        added = self._added(inputs)
        softcap = None if case.softcap is None else q.dtype.type(case.softcap)
        sinks = inputs.options.get("sinks")
        if sinks is not None:  # one per row
            sinks = np.repeat(sinks.astype(q.dtype), case.q_size).reshape(1, case.kv_heads, -1, 1)

        def weigh() -> tuple[Array, Array]:
            """exp(score - top) and its sum."""
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
            return score, total

        def run() -> Any:
            score, total = weigh()
            out = score @ vn
            out /= total
            return out

        if inputs.dout is None:
            return Runner(run, lambda out: _by_head(case, out), "matmul, exp, matmul", case.dense_flops)

        # What a textbook's forward leaves for the gradients.
        weight, total = weigh()
        weight /= total
        dn, out = _by_group(case, inputs.dout), weight @ vn

        def run_backward() -> Any:
            dv = weight.swapaxes(2, 3) @ dn
            dscore = dn @ vn.swapaxes(2, 3)
            dscore -= (dn * out).sum(axis=-1, keepdims=True)
            dscore *= weight
            dq, dk = dscore @ kn, dscore.swapaxes(2, 3) @ qn
            dq *= scale
            dk *= scale
            return dq, dk, dv

        def to_numpy(gradients: Any) -> Any:
            dq, dk, dv = gradients
            return _by_head(case, dq), dk.swapaxes(1, 2), dv.swapaxes(1, 2)

        return Runner(run_backward, to_numpy, "four matmuls, weights kept", case.dense_flops)

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


def _by_group(case: Case, x: Array) -> Array:
    """(B,Sq,Hq,D) as (B,Hkv,G*Sq,D): query heads of a group fold into rows, K and V are used as they are."""
    group = case.q_heads // case.kv_heads
    parts = x.reshape(case.batch, case.q_size, case.kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(parts).reshape(case.batch, case.kv_heads, group * case.q_size, -1)


def _by_head(case: Case, x: Array) -> Array:
    """(B,Hkv,G*Sq,D) as (B,Sq,Hq,D)."""
    rows = x.reshape(case.batch, case.kv_heads, -1, case.q_size, x.shape[-1])
    return rows.transpose(0, 3, 1, 2, 4).reshape(case.batch, case.q_size, case.q_heads, -1)
