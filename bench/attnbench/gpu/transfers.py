"""``bench --device cuda --transfers``: NumPy arrays in and out, where the copies are most of the work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import fastattn
from attnbench.cases import Case
from attnbench.gpu import timing as cuda_timing
from attnbench.gpu.device import Gpu, calls_for
from attnbench.gpu.limits import link_rates
from attnbench.gpu.peers import refusal
from attnbench.peers.base import Inputs, NotApplicable
from attnbench.sample import Sample
from attnbench.timing import SAME_COMPUTATION
from fastattn._check import machine
from fastattn._check.output import Progress
from fastattn._check.shapes import Array

BURST_SECONDS = 0.05
MOST_CALLS = 50
LONG_CALL_SECONDS = 3.0  # the CPU's share of a round

Call = Callable[[], Array]


def run(
    cases: Sequence[Case],
    rounds: int,
    gpu: Gpu,
    header: dict[str, Any],
    save: Callable[[dict[str, Any]], None],
    kernel: str | None,
) -> dict[str, Any]:
    """Times every case from and to NumPy: fastattn and torch on the GPU, and fastattn on the CPU."""
    document: dict[str, Any] = {
        **header,
        "mode": "cuda transfers",
        "rounds": rounds,
        "threads": fastattn.get_num_threads(),
        "complete": False,
        "link": link_rates(gpu),
        "cases": [],
        "failed": {},
    }
    progress = Progress(len(cases))
    try:
        for case in cases:
            progress.step(case.name, 0)
            try:
                document["cases"].append(bench_case(case, rounds, gpu, kernel))
            except Exception as error:  # the other cases go on
                document["failed"][case.name] = refusal(error, [])
            save(document)
            progress.step(case.name)
    finally:
        progress.clear()
    document["complete"] = True
    save(document)
    return document


def bench_case(case: Case, rounds: int, gpu: Gpu, kernel: str | None) -> dict[str, Any]:
    """The case's entry in the document."""
    inputs = Inputs.of(case)
    sample = Sample(inputs)
    timed: list[tuple[str, str, Call, float, int]] = []
    skipped: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, make in calls(inputs, gpu, kernel).items():
        try:
            implementation, call = make()
            error = sample.error(call())
            seconds = _seconds(call, 1)
            if seconds > LONG_CALL_SECONDS:
                raise NotApplicable(f"a call takes {seconds:.1f} s")
        except Exception as reason:
            # Ours must be able to do it; another's refusal is only noted.
            (errors if name == "fastattn" else skipped)[name] = refusal(reason, [])
            continue
        if not error <= SAME_COMPUTATION[case.dtype] * sample.size:
            errors[name] = f"wrong result, off by {error:.3g}"
            continue
        number = calls_for(seconds, BURST_SECONDS, MOST_CALLS)
        timed.append((name, implementation, call, error, number))
    per_round: dict[str, list[float]] = {name: [] for name, *_ in timed}
    for _ in range(rounds):
        for name, _, call, _, number in timed:
            call()
            per_round[name].append(_seconds(call, number))
    results = [
        {
            "name": name,
            "implementation": implementation,
            "seconds": statistics.median(per_round[name]),
            "seconds_per_round": per_round[name],
            "calls_per_round": number,
            "array_gbytes": case.bytes / statistics.median(per_round[name]) / 1e9,
            "max_error": error,
        }
        for name, implementation, _, error, number in timed
    ]
    description = cuda_timing.describe(case)
    return {**description, **cuda_timing.compare(results), "skipped": skipped, "errors": errors}


def calls(inputs: Inputs, gpu: Gpu, kernel: str | None) -> dict[str, Callable[[], tuple[str, Call]]]:
    """By name: what makes a description and a call from NumPy to NumPy. Ours is the first."""
    q, k, v, options = inputs.q, inputs.k, inputs.v, inputs.options

    def ours(**where: Any) -> tuple[str, Call]:
        plan = fastattn.explain(q, k, v, **options, **where)
        return plan.kernel, lambda: np.asarray(fastattn.mha(q, k, v, **options, **where))

    return {
        "fastattn": lambda: ours(device="cuda", kernel=kernel),
        "fastattn, no device": ours,
        "fastattn, CPU": lambda: ours(device="cpu"),
        "torch": lambda: _torch(inputs, gpu),
    }


def _torch(inputs: Inputs, gpu: Gpu) -> tuple[str, Call]:
    """Pageable arrays, as NumPy has them, in the layout that they have."""
    torch, case = gpu.torch, inputs.case
    function = torch.nn.functional.scaled_dot_product_attention
    grouped = case.q_heads != case.kv_heads

    def call() -> Array:
        with torch.inference_mode():
            arrays = (torch.from_numpy(x).to(gpu.device) for x in (inputs.q, inputs.k, inputs.v))
            q, k, v = (x.transpose(1, 2) for x in arrays)
            out = function(q, k, v, is_causal=case.causal, enable_gqa=grouped)
            return np.asarray(out.transpose(1, 2).cpu().numpy())

    return f"PyTorch {machine.installed_version('torch')}, its own choice of backend", call


def _seconds(call: Call, calls: int) -> float:
    """Of one call, over `calls` in a row; each returns when its result is there."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
