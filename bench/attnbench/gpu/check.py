"""What the right result is, on the GPU: PyTorch's unfused attention in float64, or float32 for half types."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

from attnbench.cases import Case
from attnbench.gpu.device import Gpu

WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float64", "float64": "float64"}
SCORE_BYTES = 2e9  # of one piece's scores; the unfused computation keeps several copies
# These tell another computation from rounding: max|out - reference| / max|v|. TF32 has 10 bits of mantissa.
SAME_COMPUTATION = {"float64": 1e-9, "float32": 1e-4, "tf32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}


class Reference:
    """The whole result of a case, computed once for all implementations."""

    def __init__(self, gpu: Gpu, case: Case, q: Any, k: Any, v: Any) -> None:
        torch = gpu.torch
        self.gpu = gpu
        wide = gpu.dtype(WIDER[case.dtype])
        attention = importlib.import_module("torch.nn.attention")
        shape = case.batch, case.q_heads, case.q_size, case.v_dim
        self.out = torch.empty(shape, dtype=wide, device=gpu.device)
        self.max_v = float(v.abs().max())
        group = case.q_heads // case.kv_heads
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.inference_mode(), attention.sdpa_kernel(attention.SDPBackend.MATH):
                for b, h in pieces(case, SCORE_BYTES):
                    heads = slice(h.start * group, h.stop * group)
                    self.out[b, heads] = torch.nn.functional.scaled_dot_product_attention(
                        *(x.to(wide) for x in (q[b, heads], k[b, h], v[b, h])),
                        is_causal=case.causal,
                        enable_gqa=group > 1,
                    )
        finally:
            torch.set_float32_matmul_precision(before)
        gpu.release()

    def error(self, out: Any) -> float:
        """The largest difference; infinite for another shape, and where a number is missing."""
        if tuple(out.shape) != tuple(self.out.shape):
            return math.inf
        largest = max(float((x.to(y.dtype) - y).abs().max()) for x, y in zip(out, self.out, strict=True))
        return math.inf if math.isnan(largest) or any(bool(x.isnan().any()) for x in out) else largest


def pieces(case: Case, score_bytes: float) -> Iterator[tuple[slice, slice]]:
    """Batch entries and key/value heads whose scores take at most so many bytes in float64, or one each."""
    head = 8.0 * case.q_size * case.kv_size * (case.q_heads // case.kv_heads)
    heads = min(case.kv_heads, max(1, int(score_bytes // head)))
    batches = (
        min(case.batch, max(1, int(score_bytes // (head * case.kv_heads)))) if heads == case.kv_heads else 1
    )
    for b in range(0, case.batch, batches):
        for h in range(0, case.kv_heads, heads):
            yield slice(b, min(b + batches, case.batch)), slice(h, min(h + heads, case.kv_heads))
