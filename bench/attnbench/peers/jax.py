"""JAX: jax.nn.dot_product_attention and its gradients, compiled."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

from attnbench import dense
from attnbench.cases import Case
from attnbench.peers.base import Inputs, Maker, NotApplicable, Runner, refuse_large_scores


class Jax:
    name = "jax"
    limited_by = "NPROC in the environment before its import"

    def __init__(self, threads: int) -> None:
        # XLA sizes its pool once, from this variable, when the CPU client starts.
        os.environ["NPROC"] = str(threads)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax = importlib.import_module("jax")

    def candidates(self, case: Case) -> list[Maker]:
        if case.dtype == "float64":
            raise NotApplicable("float64 only where the whole process asks for it")
        if case.softcap is not None:
            raise NotApplicable("it has no softcap")
        if case.feature == "sinks":
            raise NotApplicable("it has no sinks")
        if case.v_dim != case.head_dim:
            raise NotApplicable("it needs v as wide as k")
        refuse_large_scores(case)
        return [self._maker]

    def _maker(self, inputs: Inputs) -> Runner:
        jax, case = self.jax, inputs.case
        square = case.q_size == case.kv_size
        window = None
        if square and case.window is not None:
            window = tuple(case.kv_size if side is None else side for side in case.window)
        if square:  # causal and window are its own; the rest of the mask is an array
            mask = inputs.options.get("mask")
        else:
            mask = dense.allowed(case, inputs.options) if dense.hides_pairs(case) else None
        added = dense.bias(case, inputs.options)
        arrays = [jax.numpy.asarray(x) for x in (inputs.q, inputs.k, inputs.v)]
        sides = {
            name: jax.numpy.asarray(x, dtype=x.dtype if name == "mask" else inputs.q.dtype)
            for name, x in (("mask", mask), ("bias", added))
            if x is not None
        }

        def attend(q: Any, k: Any, v: Any, sides: dict[str, Any]) -> Any:
            return jax.nn.dot_product_attention(
                q, k, v, is_causal=case.causal and square, local_window_size=window, **sides
            )

        compiled = jax.jit(attend)

        def run() -> Any:
            return compiled(*arrays, sides).block_until_ready()

        if inputs.dout is None:
            return Runner(run, np.asarray, "jax.nn.dot_product_attention", case.dense_flops)

        # The forward runs here, and what it saves for the gradients is an argument of the timed function.
        _, pull_back = jax.vjp(lambda q, k, v: compiled(q, k, v, sides), *arrays)
        dout = jax.numpy.asarray(inputs.dout)
        compiled_backward = jax.jit(lambda pull_back, dout: pull_back(dout))

        def run_backward() -> Any:
            return jax.block_until_ready(compiled_backward(pull_back, dout))

        def to_numpy(gradients: Any) -> Any:
            return tuple(map(np.asarray, gradients))

        return Runner(run_backward, to_numpy, "gradient of jax.nn.dot_product_attention", case.dense_flops)
