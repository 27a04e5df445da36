"""What the machine can do at most, measured in the same run as the figures set against it."""

from __future__ import annotations

import re
from typing import Any

import fastattn
from fastattn import _core
from fastattn._check import machine

SECONDS = 0.03  # per measurement
# Where the caches are unknown.
CACHE_BYTES = {"L2": 1 << 19, "L3": 1 << 23}
DRAM_BYTES = 1 << 28  # and at least eight times the last cache


class Limits:
    """Peaks for one number of threads: the best of all measurements of the run.

    A busy machine can only make a measurement smaller, so a later, larger one is nearer to the truth.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.flops: dict[tuple[str, str], float] = {}  # (kernel, dtype) -> FLOP/s
        self.bandwidth: dict[int, float] = {}  # bytes -> B/s
        self.levels = level_bytes(machine.caches(), threads)

    def measure_flops(self, kernel: str, dtype: str) -> float:
        """FLOP/s of this kernel's multiply-adds in registers, now."""
        peak = _core.measure_fma_peak(kernel, dtype, self.threads, SECONDS)
        self.flops[kernel, dtype] = max(peak, self.flops.get((kernel, dtype), 0.0))
        return peak

    def measure_bandwidth(self, size: int) -> float:
        """Bytes per second of reading `size` bytes over and over, each thread its own part, now."""
        rate = _core.measure_read_bandwidth(size, self.threads, SECONDS)
        self.bandwidth[size] = max(rate, self.bandwidth.get(size, 0.0))
        return rate

    def measure_all(self) -> None:
        """Every usable kernel with its dtypes, and each level of memory."""
        for kernel in fastattn.kernels():
            if kernel.usable and kernel.device == "cpu":
                for dtype in kernel.dtypes:
                    self.measure_flops(kernel.name, dtype)
        for size in self.levels.values():
            self.measure_bandwidth(size)

    def best_flops(self, dtype: str) -> float:
        """Of all kernels that take this dtype."""
        return max(peak for (_, name), peak in self.flops.items() if name == dtype)

    def describe(self) -> dict[str, Any]:
        """For the document."""
        return {
            "fma_peak": [
                {"kernel": kernel, "dtype": dtype, "gflops": peak / 1e9}
                for (kernel, dtype), peak in self.flops.items()
            ],
            "read_bandwidth": [
                {"level": level, "bytes": size, "gbytes": self.bandwidth[size] / 1e9}
                for level, size in self.levels.items()
            ],
        }


def level_bytes(caches: dict[str, str], threads: int) -> dict[str, int]:
    """Buffers that fit well into L2 and L3, and one that fits into no cache."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = dict(CACHE_BYTES)
    for level, text in caches.items():
        found = re.fullmatch(r"(\d+)([KMG]?)", text)
        if level in sizes and found:
            sizes[level] = int(found[1]) * units[found[2]]
    # L2 belongs to a core, and the threads share the buffer; L3 is shared, by others too.
    return {
        "L2": threads * sizes["L2"] // 2,
        "L3": max(sizes["L3"] // 2, threads * sizes["L2"]),
        "DRAM": max(DRAM_BYTES, 8 * sizes["L3"]),
    }
