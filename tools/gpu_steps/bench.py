"""The step that times."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_steps.commands import TAIL, Context, Done, Step

FUSED = {  # kernel, cases
    "hopper": ("cuda-flash-sm90", "*-bf16"),
    "fused": ("cuda-flash-sm80", "*-bf16"),
    "decode": ("cuda-decode", "decode-*-bf16"),
}


def bench(context: Context) -> Step:
    """tune, the benchmark beside torch, the same of each fused kernel by its name, the one with transfers."""
    # Shares of the time that is left.
    names = {"tune": 0.15, "bench": 0.5, "hopper": 0.4, "fused": 0.4, "decode": 0.4, "transfers": 1.0}
    commands, failures = [], []
    results: dict[str, Any] = {}
    states = []
    for name, share in names.items():
        path = context.scratch / f"{name}.json"
        path.unlink(missing_ok=True)
        if name == "tune":
            path = context.scratch / "cache" / "fastattn" / "tune.json"
            path.unlink(missing_ok=True)
        (done,) = context.run(bench_command(name, path, context.quick), share=share)
        commands.append(done)
        results[name] = read_json(path)
        state, failed = judge_bench(name, done, results[name])
        states.append((name, state))
        failures += failed
    status = next((x for x in ("failed", "partial") if x in (state for _, state in states)), "passed")
    return Step(status, bench_summary(states, results), commands, results, failures)


def bench_command(name: str, path: Path, quick: bool) -> list[str]:
    module = [sys.executable, "-m", "fastattn"]
    if name == "tune":
        return [*module, "tune"]
    command = [*module, "bench", "--device", "cuda"]
    if name in FUSED:
        kernel, cases = FUSED[name]
        peers = ["--peers", "torch-flash,torch-cudnn"]
        options = ["--kernel", kernel, "--cases", cases, *peers, "--rounds", "5"]
    else:
        options = ["--quick"] * quick + ["--transfers"] * (name == "transfers")
    return [*command, *options, "--json", str(path)]


def judge_bench(name: str, done: Done, document: Any) -> tuple[str, list[dict[str, str]]]:
    """passed, partial or failed, and the wrong results and failures of the document."""
    failures = []
    for case in (document or {}).get("cases", []):
        failures += [
            {"where": f"{name}, {case['name']}, {who}", "text": why} for who, why in case["errors"].items()
        ]
    for case_name, why in (document or {}).get("failed", {}).items():
        failures.append({"where": f"{name}, {case_name}", "text": why})
    if document is None or (done.rc != 0 and not done.timed_out and not failures):
        text = done.output[-TAIL:].strip() or f"ended with {done.rc}, without output"
        failures.append({"where": name, "text": "cut short: " * done.timed_out + text})
    if done.timed_out:
        return ("partial" if document is not None else "failed"), failures
    return ("failed" if failures else "passed"), failures


def bench_summary(states: Sequence[tuple[str, str]], results: dict[str, Any]) -> str:
    parts = []
    for name, state in states:
        cases = (results[name] or {}).get("cases")
        ratios = [
            case["ratio_to_best_peer"] for case in cases or [] if case["ratio_to_best_peer"] is not None
        ]
        won = f", faster than every peer in {sum(x > 1 for x in ratios)} of {len(ratios)}" if ratios else ""
        parts.append(f"{name} {state}" + (f", {len(cases)} cases{won}" if cases is not None else ""))
    return "; ".join(parts)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
