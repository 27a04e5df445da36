"""One case of ``bench``: every implementation checked, then timed in interleaved rounds."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnbench.cases import Case
from attnbench.limits import Limits
from attnbench.peers import base as peers
from attnbench.sample import BackwardSample, Sample, sample_of
from fastattn._check.output import Progress

MIN_SECONDS = 0.02  # of one timed burst: short calls are repeated
# Before a burst: threads of the one before may still be at work, OpenBLAS's and XLA's for more than 0.1 s.
SETTLE_SECONDS = 0.03
SETTLED_SHARE = 0.1  # of one CPU
LONGEST_SETTLE_SECONDS = 3.0
LONG_CALL_SECONDS = 20.0  # a peer that needs longer is skipped
LONG_ROUND_SECONDS = 10.0
ROUNDS_OF_LONG_CASE = 3
NUMPY_FLOPS = 5e9  # per second, before it has been timed
# A peer may be less exact than fastattn's own gate asks for; these only tell another computation from
# rounding: max|out - reference| / max|v|, or of each gradient in units of its largest number.
SAME_COMPUTATION = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"--rounds: expected at least 1, got {rounds}")


class Speeds:
    """What a peer needed for the largest case so far of a kind and dtype: says how long the next may take."""

    def __init__(self) -> None:
        self.largest: dict[tuple[str, ...], tuple[float, float]] = {}  # FLOPs, seconds

    def add(self, name: str, case: Case, runner: peers.Runner, seconds: float) -> None:
        key = name, runner.implementation, case.kind, case.dtype
        self.largest[key] = max(self.largest.get(key, (0.0, 0.0)), (runner.flops, seconds))

    def refuse_long_call(self, name: str, case: Case, runner: peers.Runner) -> None:
        first = (NUMPY_FLOPS, 1.0) if name == "numpy" else (math.inf, 0.0)
        key = name, runner.implementation, case.kind, case.dtype
        flops, seconds = self.largest.get(key, first)
        expected = runner.flops * (seconds / flops)
        if expected > LONG_CALL_SECONDS:
            raise peers.NotApplicable(f"a call is expected to take {expected:.0f} s")


@dataclass
class Timed:
    """One implementation on one case."""

    name: str
    runner: peers.Runner
    max_error: float
    calls: int  # per burst
    first_seconds: float  # of one call, before the rounds
    candidates: dict[str, float] = field(default_factory=dict)  # first_seconds of each
    seconds: list[float] = field(default_factory=list)  # of one call, per round


def bench_case(
    case: Case,
    implementations: Sequence[peers.Implementation],
    rounds: int,
    limits: Limits,
    speeds: Speeds,
    progress: Progress,
) -> dict[str, Any]:
    """The case's entry in the document, but for what is only known at the end of the run."""
    inputs = peers.Inputs.of(case)
    sample = sample_of(inputs)
    timed: list[Timed] = []
    skipped: dict[str, str] = {}
    for implementation in implementations:
        progress.step(f"{case.name}: checking {implementation.name}", 0)
        try:
            timed.append(_prepare(implementation, inputs, sample, speeds))
        except Exception as reason:  # whatever a peer cannot do must not end the run
            if implementation.name == "fastattn":
                raise
            skipped[implementation.name] = first_line(reason)

    ours, *others = timed
    kernel = ours.runner.implementation
    plain = [] if case.plain is None else [_without_feature(implementations[0], inputs)]
    peaks, rates = _rounds(case, [ours, *plain, *others], rounds, limits, progress)
    results = [_result(case, entry, peaks, rates) for entry in timed]
    best = min(results[1:], key=lambda r: r["seconds"], default=None)
    return {
        "name": case.name,
        "title": case.title,
        "family": case.family,
        "kind": case.kind,
        "shape": case.shape,
        "batch": case.batch,
        "q_heads": case.q_heads,
        "kv_heads": case.kv_heads,
        "q_size": case.q_size,
        "kv_size": case.kv_size,
        "head_dim": case.head_dim,
        "value_dim": case.v_dim,
        "dtype": case.dtype,
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "feature": case.feature,
        "plain_case": case.plain,
        "slowdown": _slowdown(case, ours, plain[0]) if plain else None,
        "plain_seconds_per_round": plain[0].seconds if plain else [],
        "flops": case.flops,
        "bytes": case.bytes + sum(getattr(x, "nbytes", 0) for x in inputs.options.values()),
        "kv_bytes": case.kv_bytes,
        "kernel": kernel,
        "rounds": len(timed[0].seconds),
        "peak_gflops_per_round": [x / 1e9 for x in peaks],
        "read_gbytes_per_round": [x / 1e9 for x in rates],
        "results": results,
        "skipped": skipped,
        "best_peer": best["name"] if best else None,
        "ratio_to_best_peer": best["seconds"] / results[0]["seconds"] if best else None,
    }


def _prepare(
    implementation: peers.Implementation,
    inputs: peers.Inputs,
    sample: Sample | BackwardSample,
    speeds: Speeds,
) -> Timed:
    """The fastest of its candidates whose result is right."""
    best: Timed | None = None
    seconds: dict[str, float] = {}
    reasons = []
    for make in implementation.candidates(inputs.case):
        try:
            tried = _try(implementation.name, make, inputs, sample, speeds)
        except Exception as reason:
            if implementation.name == "fastattn":
                raise
            reasons.append(first_line(reason))
            continue
        seconds[tried.runner.implementation] = tried.first_seconds
        if best is None or tried.first_seconds < best.first_seconds:
            best = tried
    if best is None:
        raise peers.NotApplicable("; ".join(dict.fromkeys(reasons)))
    best.candidates = seconds
    return best


def _try(
    name: str,
    make: peers.Maker,
    inputs: peers.Inputs,
    sample: Sample | BackwardSample,
    speeds: Speeds,
) -> Timed:
    """One candidate, checked, and timed once; the first call of a session or a compiler is no measure."""
    runner, case = make(inputs), inputs.case
    if name != "fastattn":
        speeds.refuse_long_call(name, case, runner)
    start = time.perf_counter()
    result = runner.run()
    seconds = time.perf_counter() - start
    error = sample.error(runner.to_numpy(result))
    if not error <= SAME_COMPUTATION[case.dtype] * sample.size:
        raise RuntimeError(f"wrong result, off by {error:.3g}")
    if seconds < LONG_CALL_SECONDS / 20:
        seconds = min(burst(runner, 2), burst(runner, 2))
    speeds.add(name, case, runner, seconds)
    if name != "fastattn" and seconds > LONG_CALL_SECONDS:
        raise peers.NotApplicable(f"a call takes {seconds:.0f} s")
    calls = max(1, math.ceil(MIN_SECONDS / seconds))
    return Timed(name, runner, error, calls, seconds)


def _without_feature(implementation: peers.Implementation, inputs: peers.Inputs) -> Timed:
    """fastattn on the plain case, to be timed in the same rounds."""
    case = replace(inputs.case, feature=None, softcap=None, window=None)
    (make,) = implementation.candidates(case)
    runner = make(replace(inputs, case=case, options=case.options()))
    seconds = min(burst(runner, 1), burst(runner, 2))
    return Timed("fastattn", runner, 0.0, max(1, math.ceil(MIN_SECONDS / seconds)), seconds)


def _slowdown(case: Case, ours: Timed, plain: Timed) -> float:
    """Time per computed score, over that of the plain case in the same round."""
    ratios = [a / b for a, b in zip(ours.seconds, plain.seconds, strict=True)]
    return statistics.median(ratios) * plain.runner.flops / case.flops


def _rounds(
    case: Case, timed: Sequence[Timed], rounds: int, limits: Limits, progress: Progress
) -> tuple[list[float], list[float]]:
    """Times everything; returns the FMA peak and the read bandwidth of each round, where they matter."""
    peaks: list[float] = []
    rates: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        number, last = 0, rounds
        while number < last:
            progress.step(f"{case.name}, round {number + 1} of {last}", 0)
            start = time.perf_counter()
            for entry in timed:
                settle()
                measured = entry is timed[0] and case.kind != "latency"
                before_it = _peak(case, entry, limits) if measured else (0.0, 0.0)
                if entry.calls > 1:  # others have used the caches since; a long call does not notice
                    entry.runner.run()
                entry.seconds.append(burst(entry.runner, entry.calls))
                if measured:
                    # On both sides of the burst: the machine's speed may change within seconds, and a
                    # measurement of 30 ms may be interrupted itself.
                    after_it = _peak(case, entry, limits)
                    peaks.append(max(before_it[0], after_it[0]))
                    rates.append(max(before_it[1], after_it[1]))
            if time.perf_counter() - start > LONG_ROUND_SECONDS:
                last = min(last, max(ROUNDS_OF_LONG_CASE, number + 1))
            number += 1
            progress.step(f"{case.name}, round {number} of {last}")
        progress.step("", rounds - number)
    finally:
        if collecting:
            gc.enable()
            gc.collect()
    return peaks, rates if case.kind == "decode" else []


def settle() -> None:
    """Waits until no thread of this process works any more."""
    last = time.perf_counter() + LONGEST_SETTLE_SECONDS
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(SETTLE_SECONDS)
        now = time.perf_counter()
        if time.process_time() - cpu < SETTLED_SHARE * (now - wall) or now > last:
            return


def _peak(case: Case, entry: Timed, limits: Limits) -> tuple[float, float]:
    """FLOP/s, and bytes per second for decode."""
    rate = limits.measure_bandwidth(case.kv_bytes) if case.kind == "decode" else 0.0
    return limits.measure_flops(entry.runner.implementation, case.dtype), rate


def _result(case: Case, entry: Timed, peaks: Sequence[float], rates: Sequence[float]) -> dict[str, Any]:
    seconds = statistics.median(entry.seconds)
    work, limit = (case.kv_bytes, rates) if case.kind == "decode" else (case.flops, peaks)
    shares = [work / s / x for s, x in zip(entry.seconds, limit, strict=False)]
    return {
        "name": entry.name,
        "implementation": entry.runner.implementation,
        "candidates": entry.candidates,
        "seconds": seconds,
        "seconds_min": min(entry.seconds),
        "seconds_max": max(entry.seconds),
        "seconds_per_round": entry.seconds,
        "calls_per_round": entry.calls,
        "gflops": case.flops / seconds / 1e9,
        "gbytes": case.kv_bytes / seconds / 1e9,
        "max_error": entry.max_error,
        "fraction_of_limit": statistics.median(shares) if shares else None,
    }


def burst(runner: peers.Runner, calls: int) -> float:
    """Seconds of one call, over `calls` in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        runner.run()
    return (time.perf_counter() - start) / calls


def first_line(reason: Exception) -> str:
    return str(reason).splitlines()[0] if str(reason) else repr(reason)
