"""A GPU that is torch on this CPU, for the host logic of ``bench --device cuda``."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from attnbench.gpu.device import Gpu


class FakeGpu(Gpu):
    """Arrays in CPU memory; a call is over when it returns."""

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.device = "cpu"
        self.l2_bytes = 1 << 16
        self.flushes = 0

    def synchronize(self) -> None:
        pass

    def times(self, run: Callable[[], object], calls: int, flush: bool) -> list[float]:
        seconds = []
        for _ in range(calls):
            if flush:
                self.flush()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return seconds

    def flush(self) -> None:
        self.flushes += 1

    def release(self) -> None:
        pass

    def call_memory(self, run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        return run(), {"allocated": 1000, "device": 2 << 20}

    def describe(self) -> dict[str, Any]:
        return {"name": "fake GPU", "cuda": "0.0"}
