"""What a record of the benchmark says of the machine beyond ``fastattn info``. All of it may be unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastattn._check import machine


def describe() -> dict[str, Any]:
    """As `machine.describe`, with the CPU's generation."""
    found = machine.describe()
    return {"cpu": found.pop("cpu"), "cpu_id": cpu_id(), **found}


def cpu_id() -> str | None:
    """Family, model and stepping, where the model's name does not say which generation it is."""
    info = machine.cpuinfo()
    numbers = [info.get(key) for key in ("cpu family", "model", "stepping")]
    return "-".join(str(n) for n in numbers) if None not in numbers else None


def available_bytes() -> int | None:
    """Memory that can be had without swapping, where the system says."""
    for line in machine.read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def commit() -> str | None:
    """The commit of fastattn's source tree, when one stands in it; "-dirty" at its end for local changes."""
    top = machine.output_of("git", "rev-parse", "--show-toplevel")
    if not top or 'name = "fastattn"' not in machine.read(Path(top) / "pyproject.toml"):
        return None
    head = machine.output_of("git", "rev-parse", "HEAD")
    if not head:
        return None
    changed = machine.output_of("git", "status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if changed else head
