"""PyTorch: scaled_dot_product_attention, and its gradients by autograd."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from attnbench import dense
from attnbench.cases import Case
from attnbench.peers.base import Inputs, Maker, NotApplicable, Runner
from fastattn._check.shapes import Array


class Torch:
    name = "torch"
    limited_by = "torch.set_num_threads"

    def __init__(self, threads: int) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(threads)

    def candidates(self, case: Case) -> list[Maker]:
        if case.softcap is not None:
            raise NotApplicable("it has no softcap")
        if case.feature == "sinks":
            raise NotApplicable("it has no sinks")
        return [self._maker]

    def _maker(self, inputs: Inputs) -> Runner:
        torch, case = self.torch, inputs.case
        attention = torch.nn.functional.scaled_dot_product_attention
        grouped = case.q_heads != case.kv_heads
        q, k, v = (self._tensor(x).transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v))
        is_causal = dense.square_causal(case) and case.window is None and case.feature is None
        mask = None if is_causal else self._mask(inputs)

        def attend() -> Any:
            return attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)

        def run() -> Any:
            with torch.inference_mode():
                return attend()

        def to_numpy(out: Any) -> Array:
            out = out.transpose(1, 2)
            return np.asarray((out if out.dtype == torch.float64 else out.float()).numpy())

        flops = case.flops if is_causal else case.dense_flops
        if inputs.dout is None:
            return Runner(run, to_numpy, "scaled_dot_product_attention", flops)

        # The graph is built before the clock starts, and kept from call to call.
        arrays = tuple(x.requires_grad_() for x in (q, k, v))
        out, dout = attend(), self._tensor(inputs.dout).transpose(1, 2).contiguous()

        def run_backward() -> Any:
            return torch.autograd.grad(out, arrays, dout, retain_graph=True)

        def all_to_numpy(gradients: Any) -> Any:
            return tuple(map(to_numpy, gradients))

        return Runner(run_backward, all_to_numpy, "gradient of scaled_dot_product_attention", flops)

    def _mask(self, inputs: Inputs) -> Any:
        """What its user passes as attn_mask: of booleans where these suffice."""
        case, options = inputs.case, inputs.options
        if case.feature in ("bias", "alibi"):
            return self._tensor(dense.additive(case, options, inputs.q.dtype))
        if dense.hides_pairs(case):
            return self.torch.from_numpy(dense.allowed(case, options))
        return None

    def _tensor(self, x: Any) -> Any:
        if x.dtype.name == "bfloat16":
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)
