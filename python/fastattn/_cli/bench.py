"""``python -m fastattn bench``: fastattn beside the installed peers, and beside the machine's limits.

Every round times all implementations of a case one after the other, so that a slow minute of the machine hits
all of them; the figure is the median over the rounds. Before its clock starts, each peer's result is compared
with the float64 reference on a sample of rows: a peer that computes something else is not timed.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastattn
from fastattn import reference
from fastattn._cli import machine, peers
from fastattn._cli.cases import Case, select
from fastattn._cli.limits import Limits
from fastattn._cli.output import Progress
from fastattn._cli.report import report

Array = np.ndarray[Any, Any]

SCHEMA = 1
MIN_SECONDS = 0.02  # of one timed burst: short calls are repeated
# Before a burst: threads of the one before may still be spinning, OpenBLAS's for more than 0.1 s.
SETTLE_SECONDS = 0.05
SETTLE_AFTER_NUMPY_SECONDS = 0.3
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
# A peer may be less exact than fastattn's own gate asks for; these only tell another computation from
# rounding: max|out - reference| / max|v|.
SAME_COMPUTATION = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass
class Timed:
    """One implementation on one case."""

    name: str
    runner: peers.Runner
    max_error: float
    calls: int  # per burst
    seconds: list[float] = field(default_factory=list)  # of one call, per round


def run(
    *,
    cases: str | None = None,
    threads: int | None = None,
    rounds: int = 7,
    peer_names: str | None = None,
    kernel: str | None = None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Times the cases and returns everything that is known of the run, ready for JSON.

    Parameters
    ----------
    cases, peer_names : str, optional
        Comma-separated; None takes all, of the peers all that are installed.
    threads : int, optional
        For fastattn and every peer; default `fastattn.get_num_threads()`.
    rounds : int
    kernel : str, optional
        Forces this kernel of fastattn.
    command : sequence of str
        What the user typed, for the record.

    Raises
    ------
    ValueError
        Cases or peers that do not exist, threads or rounds below 1, `UnsupportedError` for the kernel.
    """
    chosen = select(cases)
    names = peers.choose(peer_names)
    skipped_cases = {}
    if machine.installed_version("ml_dtypes") is None:
        skipped_cases = {c.name: "needs ml_dtypes" for c in chosen if c.dtype == "bfloat16"}
        chosen = [c for c in chosen if c.name not in skipped_cases]
    threads = fastattn.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, got {threads}")
    if rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {rounds}")

    progress = Progress(len(chosen) * rounds)
    before = fastattn.get_num_threads()
    try:
        progress.step("importing the peers", 0)
        implementations: list[peers.Implementation] = [peers.FastAttn(threads, kernel)]
        unavailable = {}
        for name in names:
            try:
                implementations.append(peers.PEERS[name](threads))
            except (ImportError, peers.NotApplicable) as error:
                unavailable[name] = str(error)
        limits = Limits(threads)
        results = [_bench_case(case, implementations, rounds, limits, progress) for case in chosen]
    finally:
        progress.clear()
        fastattn.set_num_threads(before)
    for result in results:  # only now are the limits final
        _set_limits(result, limits)
    return {
        "schema": SCHEMA,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": {"fastattn": fastattn.__version__, **machine.versions()},
        "threads": threads,
        "rounds": rounds,
        "peers": [x.name for x in implementations[1:]],
        "unavailable_peers": unavailable,
        "skipped_cases": skipped_cases,
        "cases": results,
    }


def _bench_case(
    case: Case,
    implementations: Sequence[peers.Implementation],
    rounds: int,
    limits: Limits,
    progress: Progress,
) -> dict[str, Any]:
    q, k, v = case.arrays()
    timed: list[Timed] = []
    skipped: dict[str, str] = {}
    expected = _Sample(case, q, k, v)
    for implementation in implementations:
        progress.step(f"{case.name}: checking {implementation.name}", 0)
        try:
            runner = implementation.prepare(case, q, k, v)
            error = expected.error(runner.to_numpy(runner.run()))
            if not error <= SAME_COMPUTATION[case.dtype] * expected.max_v:
                raise RuntimeError(f"wrong result, off by {error:.3g}")
        except Exception as reason:  # whatever a peer cannot do must not end the run
            if implementation.name == "fastattn":
                raise
            skipped[implementation.name] = str(reason).splitlines()[0] if str(reason) else repr(reason)
            continue
        calls = max(1, math.ceil(MIN_SECONDS / _burst(runner, 2)))
        timed.append(Timed(implementation.name, runner, error, calls))

    kernel = timed[0].runner.implementation
    plan = fastattn.explain(q, k, v, causal=case.causal, kernel=kernel)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            progress.step(f"{case.name}, round {number + 1} of {rounds}", 0)
            for before, entry in zip(timed[-1:] + timed, timed, strict=False):
                time.sleep(SETTLE_AFTER_NUMPY_SECONDS if before.name == "numpy" else SETTLE_SECONDS)
                if entry.calls > 1:  # others have used the caches since; a long call does not notice
                    entry.runner.run()
                entry.seconds.append(_burst(entry.runner, entry.calls))
            if number in (0, rounds - 1) and case.kind != "latency":
                limits.measure_flops(kernel, case.dtype)
                if case.kind == "decode":
                    limits.measure_bandwidth(case.kv_bytes)
            progress.step(f"{case.name}, round {number + 1} of {rounds}")
    finally:
        if collecting:
            gc.enable()

    results: list[dict[str, Any]] = []
    for entry in timed:
        seconds = statistics.median(entry.seconds)
        results.append(
            {
                "name": entry.name,
                "implementation": entry.runner.implementation,
                "seconds": seconds,
                "seconds_min": min(entry.seconds),
                "seconds_max": max(entry.seconds),
                "seconds_per_round": entry.seconds,
                "calls_per_round": entry.calls,
                "gflops": case.flops / seconds / 1e9,
                "gbytes": case.kv_bytes / seconds / 1e9,
                "max_error": entry.max_error,
            }
        )
    others = [r for r in results if r["name"] != "fastattn"]
    best = min(others, key=lambda r: r["seconds"]) if others else None
    return {
        "name": case.name,
        "title": case.title,
        "kind": case.kind,
        "shape": case.shape,
        "batch": case.batch,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "q_size": case.q_size,
        "kv_size": case.kv_size,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "causal": case.causal,
        "flops": case.flops,
        "kv_bytes": case.kv_bytes,
        "kernel": kernel,
        "algorithm": plan.algorithm,
        "results": results,
        "skipped": skipped,
        "best_peer": best["name"] if best else None,
        "ratio_to_best_peer": best["seconds"] / results[0]["seconds"] if best else None,
    }


def _set_limits(result: dict[str, Any], limits: Limits) -> None:
    """Fills in the limits of one case, and the fraction of them that each implementation reached."""
    flops = limits.flops.get((result["kernel"], result["dtype"]))
    bandwidth = limits.bandwidth.get(result["kv_bytes"]) if result["kind"] == "decode" else None
    result["limit"] = {
        "kind": {"prefill": "flops", "decode": "bandwidth", "latency": None}[result["kind"]],
        "gflops": flops / 1e9 if flops else None,
        "gbytes": bandwidth / 1e9 if bandwidth else None,
    }
    for entry in result["results"]:
        of_flops = entry["gflops"] * 1e9 / flops if flops else None
        of_bandwidth = entry["gbytes"] * 1e9 / bandwidth if bandwidth else None
        entry["fraction_of_flops"] = of_flops
        entry["fraction_of_bandwidth"] = of_bandwidth
        fractions = {"flops": of_flops, "bandwidth": of_bandwidth}
        entry["fraction_of_limit"] = fractions.get(result["limit"]["kind"])


class _Sample:
    """The float64 reference on a few rows of the first and last key/value head of the first and last entry.

    Rows and heads are independent of each other, so a sample finds another scale, mask or head order as
    well as the whole result would, in a fraction of the time.
    """

    ROWS = 4

    def __init__(self, case: Case, q: Array, k: Array, v: Array) -> None:
        group = case.q_heads // case.kv_heads
        self.parts: list[tuple[tuple[Any, ...], Array]] = []
        starts = {0, max(0, case.q_size // 2), max(0, case.q_size - self.ROWS)}
        for b in {0, case.batch - 1}:
            for g in {0, case.kv_heads - 1}:
                heads = slice(g * group, (g + 1) * group)
                kv = (slice(b, b + 1), slice(None), slice(g, g + 1))
                for start in starts:
                    rows = slice(start, min(start + self.ROWS, case.q_size))
                    index = (slice(b, b + 1), rows, heads)
                    offset = start + case.kv_size - case.q_size
                    part = reference.mha(q[index], k[kv], v[kv], causal=case.causal, q_offset=offset)
                    self.parts.append((index, part))
        self.max_v = float(np.abs(v[:, :, :1].astype(np.float32)).max())

    def error(self, out: Array) -> float:
        return max(float(np.abs(out[index].astype(np.float64) - part).max()) for index, part in self.parts)


def _burst(runner: peers.Runner, calls: int) -> float:
    """Seconds of one call, over `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        runner.run()
    return (time.perf_counter() - start) / calls


def main(arguments: Any) -> int:
    """Runs, prints, and writes what was asked for; `arguments` is what argparse made of the command line."""
    for path in (arguments.json, arguments.plot):  # before minutes of work
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise ValueError(f"{path}: the folder does not exist")
    if arguments.plot is not None and Path(arguments.plot).suffix not in PLOT_SUFFIXES:
        raise ValueError(
            f"--plot: expected a name that ends in {', '.join(PLOT_SUFFIXES)}, got {arguments.plot!r}"
        )
    if arguments.plot is not None and machine.installed_version("matplotlib") is None:
        raise ValueError("--plot: needs matplotlib: pip install 'fastattn[bench]'")
    document = run(
        cases=arguments.cases,
        threads=arguments.threads,
        rounds=arguments.rounds,
        peer_names=arguments.peers,
        kernel=arguments.kernel,
        command=["python", "-m", "fastattn", *sys.argv[1:]],
    )
    print(report(document))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(document, indent=1) + "\n")
        print(f"\nwrote {arguments.json}")
    if arguments.plot is not None:
        from fastattn._cli import plot  # matplotlib only when asked for

        plot.draw(document, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0
