"""How long a run will take, roughly: said at its start."""

from __future__ import annotations

from collections.abc import Sequence

from attnbench import timing
from attnbench.cases import Case
from attnbench.limits import Limits
from attnbench.peers import base as peers

# Of the FMA peak, and of the read bandwidth for decode.
SHARE = {"fastattn": 0.7, "torch": 0.5, "onnxruntime": 0.4, "jax": 0.15, "numpy": 0.2}
DECODE_SHARE = {"fastattn": 0.7, "torch": 0.1, "onnxruntime": 0.1, "jax": 0.1, "numpy": 0.3}
DRAWN_BYTES_PER_SECOND = 1e9  # arrays filled, copied and checked


def seconds_of(
    case: Case, implementations: Sequence[peers.Implementation], rounds: int, limits: Limits
) -> float:
    """Of one case with its preparation."""
    peak = limits.best_flops("float32" if case.dtype != "float64" else "float64")
    calls = []
    for implementation in implementations:
        name = implementation.name
        if case.kind == "decode":
            call = case.kv_bytes / (DECODE_SHARE[name] * limits.bandwidth[limits.levels["DRAM"]])
        else:
            flops = case.flops if name in ("fastattn", "torch") else case.dense_flops
            call = flops / (SHARE[name] * peak)
        try:
            if implementation.candidates(case) and call <= timing.LONG_CALL_SECONDS:
                calls.append(call)
        except peers.NotApplicable:
            continue
    once = sum(max(call, timing.MIN_SECONDS) + timing.SETTLE_SECONDS for call in calls)
    if once > timing.LONG_ROUND_SECONDS:
        rounds = min(rounds, timing.ROUNDS_OF_LONG_CASE)
    before = sum(call if call > 1.0 else 5 * call for call in calls)  # checked and timed for the first time
    return rounds * once + before + (len(calls) + 2) * case.bytes / DRAWN_BYTES_PER_SECOND + 0.5


def minutes_text(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} minutes"
