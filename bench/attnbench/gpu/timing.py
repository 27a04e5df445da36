"""One case of ``bench --device cuda``: every implementation checked, then timed in interleaved rounds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnbench.cases import Case
from attnbench.gpu import cases as cuda_cases
from attnbench.gpu.check import SAME_COMPUTATION, Reference
from attnbench.gpu.device import Gpu, calls_for
from attnbench.gpu.peers import Implementation, Runner, first_call, refusal
from fastattn._check.output import Progress

BURST_SECONDS = 0.03  # of the calls of one round
MOST_CALLS = 50
FLUSHED_L2 = 4  # arrays smaller than so many L2 caches are flushed out of them before each call
LONG_ROUND_SECONDS = 5.0
ROUNDS_OF_LONG_CASE = 3
QUEUED_CALLS = 20
QUEUE_REPEATS = 7


@dataclass
class Timed:
    """One implementation on one case."""

    name: str
    runner: Runner
    max_error: float
    memory: dict[str, int]
    calls: int  # per round
    host_seconds: float
    seconds: list[float] = field(default_factory=list)  # of one call, per round


def bench_case(
    case: Case, implementations: Sequence[Implementation], rounds: int, gpu: Gpu, progress: Progress
) -> dict[str, Any]:
    """The case's entry in the document, without what the limits add."""
    progress.step(f"{case.name}: reference", 0)
    q, k, v = gpu.draw(case)
    reference = Reference(gpu, case, q, k, v)
    flush = case.bytes < FLUSHED_L2 * gpu.l2_bytes
    timed: list[Timed] = []
    skipped: dict[str, str] = {}
    errors: dict[str, str] = {}
    for implementation in implementations:
        progress.step(f"{case.name}: checking {implementation.name}", 0)
        try:
            timed.append(_prepare(implementation, case, (q, k, v), reference, gpu, flush))
        except WrongResult as error:
            errors[implementation.name] = str(error)
        except Exception as reason:  # whatever a peer cannot do must not end the run
            # What is asked of fastattn it must be able to do.
            found = errors if implementation.name == "fastattn" else skipped
            found[implementation.name] = refusal(reason, [])
        gpu.release()
    _rounds(case, timed, rounds, gpu, flush, progress)
    results = [result(case, entry) for entry in timed]
    return {**describe(case), "l2_flushed": flush, **compare(results), "skipped": skipped, "errors": errors}


class WrongResult(Exception):
    """Not a time but an error."""


def _prepare(
    implementation: Implementation,
    case: Case,
    arrays: tuple[Any, Any, Any],
    reference: Reference,
    gpu: Gpu,
    flush: bool,
) -> Timed:
    name = implementation.name
    runner = implementation.make(case, *arrays)
    with runner.context():
        # Twice: the first call of a shape may load kernels and choose algorithms, in memory of their own.
        first_call(runner, lambda run: run())
        out, memory = first_call(runner, lambda run: gpu.call_memory(run))
        error = reference.error(runner.to_torch(out))
        if not error <= SAME_COMPUTATION[cuda_cases.limit_name(case)] * reference.max_v:
            raise WrongResult(f"wrong result, off by {error:.3g}")
        del out
        seconds = statistics.median(gpu.times(runner.run, 3, flush))
        calls = calls_for(seconds, BURST_SECONDS, MOST_CALLS)
        host_seconds = queue_seconds(gpu, runner.run, calls_for(seconds, BURST_SECONDS, QUEUED_CALLS))
    return Timed(name, runner, error, memory, calls, host_seconds)


def queue_seconds(gpu: Gpu, run: Callable[[], object], calls: int = QUEUED_CALLS) -> float:
    """How long the host needs to queue one call, at best: the GPU may still be at work when it returns.

    With few calls in the queue the driver does not make the host wait.
    """
    best = float("inf")
    for _ in range(QUEUE_REPEATS):
        gpu.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - start) / calls)
    gpu.synchronize()
    return best


def _rounds(
    case: Case, timed: Sequence[Timed], rounds: int, gpu: Gpu, flush: bool, progress: Progress
) -> None:
    """Every round times all, one after the other; a call's time is the median of its burst."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        number, last = 0, rounds
        while number < last:
            progress.step(f"{case.name}, round {number + 1} of {last}", 0)
            start = time.perf_counter()
            for entry in timed:
                with entry.runner.context():
                    entry.runner.run()  # clocks and caches are those of the one before
                    entry.seconds.append(statistics.median(gpu.times(entry.runner.run, entry.calls, flush)))
            if time.perf_counter() - start > LONG_ROUND_SECONDS:
                last = min(last, max(ROUNDS_OF_LONG_CASE, number + 1))
            number += 1
            progress.step(f"{case.name}, round {number} of {last}")
        progress.step("", rounds - number)
    finally:
        if collecting:
            gc.enable()
            gc.collect()


def describe(case: Case) -> dict[str, Any]:
    """The case itself."""
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
        "dtype": case.dtype,
        "limit_name": cuda_cases.limit_name(case),
        "causal": case.causal,
        "flops": cuda_cases.flops(case),
        "bytes": case.bytes,
        "kv_bytes": case.kv_bytes,
    }


def result(case: Case, entry: Timed) -> dict[str, Any]:
    """The entry of one implementation."""
    seconds = statistics.median(entry.seconds)
    return {
        "name": entry.name,
        "implementation": entry.runner.implementation,
        "seconds": seconds,
        "seconds_min": min(entry.seconds),
        "seconds_max": max(entry.seconds),
        "seconds_per_round": entry.seconds,
        "calls_per_round": entry.calls,
        "host_seconds": entry.host_seconds,
        "tflops": cuda_cases.flops(case) / seconds / 1e12,
        "gbytes": case.kv_bytes / seconds / 1e9,
        "max_error": entry.max_error,
        "memory_bytes": entry.memory,
        **entry.runner.facts,
    }


def compare(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The results, and how ours stands beside the fastest of the others."""
    ours = next((x for x in results if x["name"] == "fastattn"), None)
    best = min((x for x in results if x is not ours), key=lambda x: x["seconds"], default=None)
    both = ours is not None and best is not None
    return {
        "results": results,
        "best_peer": best["name"] if best and both else None,
        "ratio_to_best_peer": best["seconds"] / ours["seconds"] if ours and best else None,
    }
