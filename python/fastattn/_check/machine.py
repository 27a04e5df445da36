"""What is on this machine: CPU, memory, versions. Everything here may be unknown, nothing raises."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# The instruction sets that a kernel of fastattn could use, as Linux names them.
FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "fphp", "bf16", "sve", "sve2", "i8mm"),
)
PACKAGES = ("torch", "onnxruntime", "jax", "ml_dtypes", "matplotlib", "threadpoolctl")


def describe() -> dict[str, Any]:
    """CPU model, its features and caches, usable CPUs, memory and operating system."""
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "features": cpu_features(),
        "cpus": usable_cpus(),
        "caches": caches(),
        "memory_bytes": memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    """Python, NumPy and every installed package of `PACKAGES`, without importing any of them."""
    found = {"python": platform.python_version()}
    for package in ("numpy", *PACKAGES):
        version = installed_version(package)
        if version is not None:
            found[package] = version
    return found


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    if sys.platform == "darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    info = cpuinfo()
    return info.get("model name") or info.get("Processor") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    info = cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in FEATURES if name in flags]


def usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def caches() -> dict[str, str]:
    """Sizes of the first CPU's data caches, such as {"L2": "1024K"}."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (read(index / name) for name in ("type", "level", "size"))
        if kind in ("Data", "Unified") and level and size:
            found[f"L{level}"] = size
    return found


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def summary(machine: dict[str, Any]) -> str:
    """The machine in one line."""
    parts = [machine["cpu"], f"{machine['cpus']} CPUs"]
    parts += [f"{level} {size}" for level, size in machine["caches"].items()]
    if machine["memory_bytes"]:
        parts.append(f"{machine['memory_bytes'] / 2**30:.0f} GiB memory")
    return ", ".join(parts)


def cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in read(Path("/proc/cpuinfo")).split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
