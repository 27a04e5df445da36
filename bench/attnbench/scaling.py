"""``python -m fastattn bench --scaling``: time and memory of one causal call as the sequence grows."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import fastattn
from attnbench import child_environment, timing
from attnbench import run as bench
from attnbench.cases import DTYPES, Case
from attnbench.limits import Limits
from attnbench.peers import base as peers
from attnbench.sample import Sample
from fastattn._check import machine
from fastattn._check.output import Progress, table, three_digits, time_text

SCHEMA = 1
SIZES = tuple(1024 << n for n in range(6))
SCALED_DTYPES = ("float32", "bfloat16")
PEERS = ("torch",)  # the only one that does not keep all scores
LABELS = {dtype: label for label, dtype in DTYPES}


def scaling_case(size: int, dtype: str) -> Case:
    """8 heads of 64 features, causal."""
    name = f"scaling-{size}-{LABELS[dtype]}"
    return Case(name, "causal, H8 D64", "scaling", "prefill", 1, 8, 8, size, size, 64, dtype, causal=True)


def run(
    *, threads: int, rounds: int, peer_names: str | None = None, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Times fastattn and torch side by side, and measures in a process of its own what a call adds to memory.

    Parameters
    ----------
    threads, rounds : int
        A round that takes over 10 s makes it three rounds.
    peer_names : str, optional
        Comma-separated, torch or none.
    command : sequence of str
        What the user typed, for the record.

    Raises
    ------
    ValueError
        A peer other than torch, or rounds below 1.
    """
    names = [name for name in peers.choose(peer_names) if name in PEERS or peer_names is not None]
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--scaling: expected --peers torch or none, got {name!r}")
    timing.check_rounds(rounds)
    has_bfloat16 = machine.installed_version("ml_dtypes") is not None
    dtypes = [dtype for dtype in SCALED_DTYPES if dtype != "bfloat16" or has_bfloat16]
    start = bench.header(SCHEMA, command)
    limits, points = Limits(threads), []
    progress = Progress(len(dtypes) * len(SIZES) * rounds)
    before = fastattn.get_num_threads()
    try:
        implementations, unavailable = bench.implement(names, threads)
        limits.measure_all()
        chosen = [scaling_case(size, dtype) for dtype in dtypes for size in SIZES]
        bench.print_estimate(chosen, implementations, rounds, limits)
        for case in chosen:
            points.append(_point(case, implementations, rounds, limits, progress))
    finally:
        progress.clear()
        fastattn.set_num_threads(before)
    return {
        **start,
        "mode": "scaling",
        "runs": [
            {
                **bench.describe_run(threads, rounds, implementations, unavailable, limits),
                "points": points,
            }
        ],
    }


def _point(
    case: Case,
    implementations: Sequence[peers.Implementation],
    rounds: int,
    limits: Limits,
    progress: Progress,
) -> dict[str, Any]:
    inputs = peers.Inputs.of(case)
    sample = Sample(inputs)
    (make,) = implementations[0].candidates(case)
    kernel = make(inputs).implementation
    plan = fastattn.explain(inputs.q, inputs.k, inputs.v, **inputs.options)
    runners = []
    for implementation in implementations:
        progress.step(f"{case.name}: checking {implementation.name}", 0)
        (make,) = implementation.candidates(case)
        runner = make(inputs)
        error = sample.error(runner.to_numpy(runner.run()))
        if not error <= timing.SAME_COMPUTATION[case.dtype] * sample.size:
            raise RuntimeError(f"{implementation.name}: wrong result, off by {error:.3g}")
        calls = max(1, int(timing.MIN_SECONDS / timing.burst(runner, 1)))
        runners.append((implementation.name, runner, calls))
    seconds: dict[str, list[float]] = {name: [] for name, *_ in runners}
    peaks: list[float] = []
    number, last = 0, rounds
    while number < last:
        progress.step(f"{case.name}, round {number + 1} of {last}", 0)
        start = time.perf_counter()
        peak = limits.measure_flops(kernel, case.dtype)
        for name, runner, calls in runners:
            timing.settle()
            seconds[name].append(timing.burst(runner, calls))
            if name == "fastattn":  # on both sides of its burst, as for the cases
                peaks.append(max(peak, limits.measure_flops(kernel, case.dtype)))
        if time.perf_counter() - start > timing.LONG_ROUND_SECONDS:
            last = min(last, max(timing.ROUNDS_OF_LONG_CASE, number + 1))
        number += 1
        progress.step(f"{case.name}, round {number} of {last}")
    progress.step(f"{case.name}: memory", rounds - number)
    results = [
        {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "seconds_per_round": seconds[name],
            "gflops": case.flops / statistics.median(seconds[name]) / 1e9,
            "fraction_of_limit": statistics.median(
                case.flops / s / peak for s, peak in zip(seconds[name], peaks, strict=True)
            ),
            "extra_bytes": extra_bytes(name, case.q_size, case.dtype, limits.threads),
        }
        for name, *_ in runners
    ]
    return {
        "size": case.q_size,
        "dtype": case.dtype,
        "shape": case.shape,
        "flops": case.flops,
        "input_output_bytes": case.bytes,
        "kernel": kernel,
        "workspace_bytes": plan.workspace_bytes,
        "peak_gflops_per_round": [peak / 1e9 for peak in peaks],
        "results": results,
    }


def extra_bytes(name: str, size: int, dtype: str, threads: int) -> int | None:
    """What the first call of this size adds to a process's peak memory beside its result; None: unknown."""
    command = [sys.executable, "-m", "attnbench.extra_memory", name, str(size), dtype, str(threads)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    return None if done.stdout.strip() == "null" else int(json.loads(done.stdout))


def report(document: dict[str, Any]) -> str:
    """What `run` returned, as a table per number of threads."""
    header = ("S", "dtype", "", "time", "GFLOP/s", "of limit", "extra memory", "workspace")
    lines = [
        f"fastattn {document['versions']['fastattn']} on {machine.summary(document['machine'])}",
        "causal, batch 1, 8 heads of 64; extra memory: what a call adds to the process beside its result",
    ]
    for each in document["runs"]:
        rows = []
        for point in each["points"]:
            for entry in point["results"]:
                extra = entry["extra_bytes"]
                rows.append(
                    (
                        str(point["size"]),
                        point["dtype"],
                        entry["name"],
                        time_text(entry["seconds"]),
                        three_digits(entry["gflops"]),
                        f"{100 * entry['fraction_of_limit']:.0f} %",
                        "unknown" if extra is None else _megabytes(extra),
                        _megabytes(point["workspace_bytes"]) if entry["name"] == "fastattn" else "",
                    )
                )
        rounds = f"threads: {each['threads']}, median of up to {each['rounds']} interleaved rounds"
        lines += ["", rounds, table(header, rows, left=3)]
        lines += [f"{name} is left out: {reason}" for name, reason in each["unavailable_peers"].items()]
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
