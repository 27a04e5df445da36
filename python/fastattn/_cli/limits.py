"""What the machine can do at most, measured in the same run as the figures set against it."""

from __future__ import annotations

from fastattn import _core

SECONDS = 0.15  # per measurement


class Limits:
    """Peaks for one number of threads: the best of all measurements of the run.

    A busy machine can only make a measurement smaller, so a later, larger one is nearer to the truth.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.flops: dict[tuple[str, str], float] = {}  # (kernel, dtype) -> FLOP/s
        self.bandwidth: dict[int, float] = {}  # bytes -> B/s

    def measure_flops(self, kernel: str, dtype: str) -> float:
        """FLOP/s of this kernel's multiply-adds in registers."""
        peak = _core.measure_fma_peak(kernel, dtype, self.threads, SECONDS)
        self.flops[kernel, dtype] = max(peak, self.flops.get((kernel, dtype), 0.0))
        return self.flops[kernel, dtype]

    def measure_bandwidth(self, size: int) -> float:
        """Bytes per second of reading `size` bytes over and over, each thread its own part."""
        rate = _core.measure_read_bandwidth(size, self.threads, SECONDS)
        self.bandwidth[size] = max(rate, self.bandwidth.get(size, 0.0))
        return self.bandwidth[size]
