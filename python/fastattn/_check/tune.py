"""``python -m fastattn tune``: measures the speeds by which a call on NumPy arrays chooses its device.

All of them are those of NumPy calls, transfers included, as that is what the choice is about. A figure that
cannot be measured here keeps its default (csrc/core/device_choice.h).
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastattn
from fastattn import _core, _cuda
from fastattn._check import machine
from fastattn._check.output import Progress, table, three_digits, time_text
from fastattn._check.shapes import Shape

MEASUREMENTS = 14  # arrays are drawn and grown beside some
LONG_ENOUGH = 0.04  # of one call that measures arithmetic
LEAST_SHARE = 0.25  # of arithmetic in such a call: below, transfers hide it
TINY = Shape(1, 1, 1, 1, 8, 8)
# Sq rows of one key: hardly any arithmetic. In the first nearly all bytes are inputs, in the second results.
INPUTS = Shape(8, 8, 1, 32768, 128, 128)
RESULTS = Shape(8, 8, 16384, 1, 8, 256)
# For Sq * group = Sk the arithmetic of a byte grows with Sk; doubled until a call is long enough.
CPU_SHAPE = Shape(8, 8, 512, 512, 64, 64)
GPU_SHAPE = Shape(8, 1, 1024, 8192, 128, 128)
MOST_KEYS = {"cpu": 1 << 13, "cuda": 1 << 17}
CPU_SPEEDS = {"float64": "cpu_per_thread_f64", "float32": "cpu_per_thread_f32", "bfloat16": "cpu_per_thread_bf16"}
GPU_SPEEDS = {"float64": "gpu_f64", "float32": "gpu_f32", "float16": "gpu_half"}


class Timed(NamedTuple):
    """A shape and what its fastest call took."""

    shape: Shape
    seconds: float


def main(arguments: Any) -> int:
    """Measures, prints, and writes the file that later processes read."""
    if not arguments.seconds > 0:
        raise ValueError(f"--seconds: expected a number above 0, got {arguments.seconds}")
    path = _cuda.tune_file()
    if path is None and not arguments.dry_run:
        raise ValueError("XDG_CACHE_HOME: expected an absolute path, since this user has no home to write to")
    if path is not None and not arguments.dry_run:
        check_writable(path)
    reason = cuda_problem()
    speeds, notes = measure(arguments.seconds / MEASUREMENTS, reason is None)
    if reason is not None:
        notes.append(f"no GPU was measured: {reason}")
    print(report(speeds, _core.device_speeds(), notes))
    if path is None or arguments.dry_run:
        return 0
    write(path, document(speeds))
    print(f"\nwrote {path}; it counts from the next process on")
    return 0


def check_writable(path: Path) -> None:
    """Raises ValueError, before anything is measured, where the file could not be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"XDG_CACHE_HOME: expected a folder to write {path} to ({error.strerror}); or use --dry-run"
        ) from error


def cuda_problem() -> str | None:
    """Why NumPy arrays cannot be computed on a GPU here; None where they can."""
    q = np.zeros((1, 1), np.float32)
    try:
        fastattn.mha(q, q, q, device="cuda")
    except (fastattn.UnsupportedError, fastattn.CudaError) as error:
        return str(error)
    return None


def measure(seconds: float, has_gpu: bool) -> tuple[dict[str, float], list[str]]:
    """The speeds that can be measured here, and remarks on the others; `seconds` for each measurement."""
    notes: list[str] = []
    speeds: dict[str, float] = {}
    has_bfloat16 = machine.installed_version("ml_dtypes") is not None
    progress = Progress(4 + 6 * has_gpu)
    try:
        progress.step("CPU: empty call", 0)
        cpu_empty = fastest(TINY, "cpu", seconds)
        speeds["cpu_seconds"] = cpu_empty.seconds
        for dtype, name in CPU_SPEEDS.items():
            progress.step(f"CPU: {dtype}")
            if dtype == "bfloat16" and not has_bfloat16:
                notes.append(f"{name} keeps its default: needs ml_dtypes")
                continue
            timed = long_enough(replace(CPU_SHAPE, dtype=dtype), "cpu", seconds)
            speeds[name] = cpu_speed(timed, cpu_empty.seconds, fastattn.get_num_threads())
        if has_gpu:
            speeds |= _measure_gpu(seconds, progress, notes)
    finally:
        progress.clear()
    return speeds, notes


def _measure_gpu(seconds: float, progress: Progress, notes: list[str]) -> dict[str, float]:
    progress.step("GPU: empty call")
    empty = fastest(TINY, "cuda", seconds)
    progress.step("GPU: transfers")
    rates = transfer_rates(empty, fastest(INPUTS, "cuda", seconds), fastest(RESULTS, "cuda", seconds))
    speeds = {"gpu_seconds": empty.seconds, **rates}
    for dtype, name in GPU_SPEEDS.items():
        progress.step(f"GPU: {dtype}")
        timed = long_enough(replace(GPU_SHAPE, dtype=dtype), "cuda", seconds)
        speeds[name], hidden = gpu_speed(timed, speeds)
        if hidden:
            notes.append(f"{name} is a lower bound: even with {timed.shape.kv_size} keys the transfers take longer")
    return speeds


def cpu_speed(timed: Timed, empty_seconds: float, threads: int) -> float:
    """FLOP/s of one thread."""
    return timed.shape.flops / max(timed.seconds - empty_seconds, 0.1 * timed.seconds) / threads


def transfer_rates(empty: Timed, inputs: Timed, results: Timed) -> dict[str, float]:
    """Bytes/s in both directions, as the choice's sum of times counts them.

    Each call has a little of the other direction: t = empty + in / to_device + out / to_host, twice.
    """
    seconds = [max(x.seconds - empty.seconds, 0.1 * x.seconds) for x in (inputs, results)]
    matrix = [[x.shape.bytes_in, x.shape.bytes_out] for x in (inputs, results)]
    per_byte = np.linalg.solve(np.array(matrix), np.array(seconds))
    if not np.all(per_byte > 0):  # transfers of both directions at once: each call for itself
        per_byte = np.array([seconds[0] / inputs.shape.bytes_in, seconds[1] / results.shape.bytes_out])
    return {"to_device": float(1 / per_byte[0]), "to_host": float(1 / per_byte[1])}


def gpu_speed(timed: Timed, speeds: dict[str, float]) -> tuple[float, bool]:
    """FLOP/s beside what the transfers take, and whether those take so long that it is a lower bound."""
    transfers = timed.shape.bytes_in / speeds["to_device"] + timed.shape.bytes_out / speeds["to_host"]
    rest = timed.seconds - speeds["gpu_seconds"] - transfers
    hidden = rest < LEAST_SHARE * timed.seconds
    return timed.shape.flops / (LEAST_SHARE * timed.seconds if hidden else rest), hidden


def long_enough(shape: Shape, device: str, seconds: float) -> Timed:
    """The shape with as many rows and keys as make a call of LONG_ENOUGH seconds."""
    while True:
        timed = fastest(shape, device, 0.0)
        if timed.seconds >= LONG_ENOUGH or shape.kv_size >= MOST_KEYS[device]:
            return fastest(shape, device, seconds)
        shape = replace(shape, q_size=2 * shape.q_size, kv_size=2 * shape.kv_size)


def fastest(shape: Shape, device: str, seconds: float) -> Timed:
    """Its fastest call in so many seconds, after one that does not count."""
    q, k, v = shape.arrays()
    return Timed(shape, fastest_call(lambda: fastattn.mha(q, k, v, device=device), seconds))


def fastest_call(call: Callable[[], object], seconds: float) -> float:
    """Of at least two."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def document(speeds: dict[str, float]) -> dict[str, Any]:
    """What the file holds."""
    return {
        "schema": _cuda.TUNE_SCHEMA,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": fastattn.__version__,
        "threads": fastattn.get_num_threads(),
        "machine": _cuda.this_machine(),
        "speeds": speeds,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Another process that reads it meanwhile sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def report(speeds: dict[str, float], defaults: dict[str, float], notes: list[str]) -> str:
    """A line per speed."""
    rows = [
        (name, value_text(name, (defaults | speeds)[name]), "" if name in speeds else "not measured")
        for name in _cuda.SPEEDS
    ]
    return "\n".join([table(("speed", "value", ""), rows), *notes])


def value_text(name: str, value: float) -> str:
    if name.endswith("_seconds"):
        return time_text(value)
    return f"{three_digits(value / 1e9)} {'GB/s' if name.startswith('to_') else 'GFLOP/s'}"
