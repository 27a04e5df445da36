"""The GPU's own limits: matrix products of each dtype, and copies. A result stands beside them."""

from __future__ import annotations

import time
from typing import Any

from attnbench.gpu.device import Gpu

# Name of the limit: dtype of torch, edge of the square matrices, whether float32 may be TF32.
PRODUCTS = {
    "float16": ("float16", 8192, False),
    "bfloat16": ("bfloat16", 8192, False),
    "float32": ("float32", 8192, False),
    "tf32": ("float32", 8192, True),
    "float64": ("float64", 4096, False),
}
COPY_BYTES = 1 << 30
CALLS = 10
LINK_BYTES = 1 << 28


class Limits:
    """The best of all measurements of the run: whatever else happens can only make one smaller."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.flops: dict[str, float] = {}  # FLOP/s
        self.copy = 0.0  # bytes/s, read and written ones together

    def measure_all(self) -> None:
        for name in PRODUCTS:
            self.flops[name] = max(self.flops.get(name, 0.0), self._product(name))
        self.copy = max(self.copy, self._copy())

    def _product(self, name: str) -> float:
        torch = self.gpu.torch
        dtype, size, tf32 = PRODUCTS[name]
        a, b, out = (
            torch.empty((size, size), dtype=self.gpu.dtype(dtype), device=self.gpu.device) for _ in range(3)
        )
        # Random ones: constant matrices take less power, and run faster than any real product.
        a.normal_()
        b.normal_()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        try:
            torch.matmul(a, b, out=out)
            seconds = min(self.gpu.times(lambda: torch.matmul(a, b, out=out), CALLS, flush=False))
        finally:
            torch.set_float32_matmul_precision(before)
        return 2.0 * size**3 / seconds

    def _copy(self) -> float:
        torch = self.gpu.torch
        source, target = (torch.zeros(COPY_BYTES, dtype=torch.int8, device=self.gpu.device) for _ in range(2))
        target.copy_(source)
        seconds = min(self.gpu.times(lambda: target.copy_(source), CALLS, flush=False))
        return 2.0 * COPY_BYTES / seconds

    def describe(self) -> dict[str, Any]:
        """For the document."""
        return {
            "gemm": [{"name": name, "tflops": peak / 1e12} for name, peak in self.flops.items()],
            "copy_gbytes": self.copy / 1e9,
        }


def link_rates(gpu: Gpu) -> dict[str, float]:
    """GB/s between host and GPU: with page-locked memory, and with memory as NumPy has it."""
    torch = gpu.torch
    rates = {}
    for kind in ("pinned", "pageable"):
        host = torch.empty(LINK_BYTES, dtype=torch.int8)
        host = host.pin_memory() if kind == "pinned" else host.zero_()
        there = torch.empty_like(host, device=gpu.device)
        rates[f"{kind}_to_device"] = _rate(gpu, there, host)
        rates[f"{kind}_to_host"] = _rate(gpu, host, there)
    return rates


def _rate(gpu: Gpu, target: Any, source: Any) -> float:
    best = float("inf")
    for _ in range(4):
        gpu.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        gpu.synchronize()
        best = min(best, time.perf_counter() - start)
    return LINK_BYTES / best / 1e9
