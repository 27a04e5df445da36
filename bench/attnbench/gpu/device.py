"""The GPU of ``bench --device cuda``, by way of PyTorch: arrays, events, memory."""

from __future__ import annotations

import importlib
import math
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from attnbench.cases import Case
from fastattn._check import machine

PACKAGES = ("cupy", "cupy-cuda12x", "cupy-cuda13x", "jax", "nvidia-cublas", "nvidia-cudnn-cu13", "triton")
SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu")
FLUSH_BYTES = 1 << 26  # and at least twice the L2 cache


class Gpu:
    """One GPU. Everything runs on torch's current stream.

    Raises
    ------
    ValueError
        No PyTorch, or one that sees no GPU.
    """

    def __init__(self) -> None:
        try:
            torch = importlib.import_module("torch")
        except ImportError:
            raise ValueError("--device cuda: needs PyTorch, to hold the arrays and to compare with") from None
        if not torch.cuda.is_available():
            raise ValueError(f"--device cuda: PyTorch {torch.__version__} sees no GPU")
        self.torch = torch
        self.device = f"cuda:{torch.cuda.current_device()}"
        self.l2_bytes = int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        size = max(FLUSH_BYTES, 2 * self.l2_bytes)
        # Not when first used: that may be in inference mode, whose tensors cannot be written to elsewhere.
        self.flushed = torch.empty(size, dtype=torch.int8, device=self.device)

    # ---- arrays -----------------------------------------------------------------------------------------
    def dtype(self, name: str) -> Any:
        return getattr(self.torch, name)

    def draw(self, case: Case, seed: int = 0) -> tuple[Any, Any, Any]:
        """q, k and v of a case, standard normal, in layout bhsd: what PyTorch takes."""
        torch = self.torch
        generator = torch.Generator(device=self.device)
        generator.manual_seed(seed)
        rows = (case.batch, case.q_heads, case.q_size), (case.batch, case.kv_heads, case.kv_size)
        shapes = (*rows[0], case.head_dim), (*rows[1], case.head_dim), (*rows[1], case.v_dim)
        made = [torch.empty(x, dtype=self.dtype(case.dtype), device=self.device) for x in shapes]
        q, k, v = (x.normal_(generator=generator) for x in made)
        return q, k, v

    # ---- time -------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def times(self, run: Callable[[], object], calls: int, flush: bool) -> list[float]:
        """Seconds between two events around each call; with `flush` nothing of its inputs is in L2.

        The flush also lets the host run ahead, so that it does not wait for a short call's launches.
        """
        event = self.torch.cuda.Event
        pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(calls)]
        for start, end in pairs:
            if flush:
                self.flush()
            start.record()
            run()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def flush(self) -> None:
        self.flushed.zero_()

    # ---- memory -----------------------------------------------------------------------------------------
    def free_bytes(self) -> int:
        """Of the whole GPU: what other processes take counts too."""
        return int(self.torch.cuda.mem_get_info()[0])

    def release(self) -> None:
        """Gives what torch keeps for later back to the driver."""
        self.synchronize()
        self.torch.cuda.empty_cache()

    def call_memory(self, run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
        """A call's result, and the memory that it took beside that.

        "allocated" is torch's own count at its highest. "device" is what the whole GPU has less than before,
        looked at before the call has finished: pools of others count too, but not what they held already.
        """
        cuda = self.torch.cuda
        self.release()
        cuda.reset_peak_memory_stats()
        before, free = cuda.memory_allocated(), self.free_bytes()
        result = run()
        during = self.free_bytes()
        self.synchronize()
        size = result.nbytes
        return result, {
            "allocated": max(0, cuda.max_memory_allocated() - before - size),
            "device": max(0, free - min(during, self.free_bytes()) - size),
        }

    # ---- what it is -------------------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """Name, size, driver and clocks."""
        torch = self.torch
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "smi": smi(SMI_FIELDS),
        }


def smi(fields: Sequence[str]) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; empty where it says nothing."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def versions() -> dict[str, str]:
    """Installed packages that only matter on a GPU."""
    found = {name: machine.installed_version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def calls_for(seconds: float, wanted: float, most: int) -> int:
    """How many calls take `wanted` seconds together: at least one."""
    return max(1, min(most, math.ceil(wanted / max(seconds, 1e-9))))
