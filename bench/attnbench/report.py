"""A run of ``bench`` as text."""

from __future__ import annotations

import math
from typing import Any

from fastattn._check import machine
from fastattn._check.output import table, three_digits, time_text

HEADER = ("", "time", "speed", "of limit", "of best limit", "time / ours", "cost")
BACKWARD_NOTE = "backward: the gradients alone, after the forward; five products for each pair instead of two"


def report(document: dict[str, Any]) -> str:
    """What `bench.run` returned, a heading per case and a line per implementation."""
    versions = document["versions"]
    lines = [f"fastattn {versions['fastattn']} on {machine.summary(document['machine'])}"]
    for run in document["runs"]:
        lines += _run(run, versions)
    return "\n".join(lines)


def _run(run: dict[str, Any], versions: dict[str, str]) -> list[str]:
    others = ", ".join(f"{name} {versions[name]}" for name in run["peers"])
    lines = [
        "",
        f"threads: {run['threads']}, median of up to {run['rounds']} interleaved rounds",
        f"peers: {others or 'none'}",
    ]
    for left_out in (run["unavailable_peers"], run["skipped_cases"]):
        lines += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    lines += ["", *_limits(run["limits"])]
    if not run["cases"]:
        return lines

    # One table for all cases, so that the columns line up; the headings go between its lines.
    rows = [_row(case, entry) for case in run["cases"] for entry in case["results"]]
    text = iter(table(HEADER, rows).splitlines())
    lines += [
        "",
        "of limit: beside the peak of the same round, median; of best limit: beside the best peak of the run",
        "cost: time per computed score, in units of the plain case's (fastattn's from the same rounds)",
        *([BACKWARD_NOTE] if any(case["kind"] == "backward" for case in run["cases"]) else []),
        *("", next(text), next(text)),
    ]
    for case in run["cases"]:
        lines += ["", _heading(case), *(next(text) for _ in case["results"])]
        lines += [f"  {name}: {reason}" for name, reason in case["skipped"].items()]
    return [*lines, *summary(run["cases"])]


def _limits(limits: dict[str, Any]) -> list[str]:
    """FMA peaks, a line per kernel and a column per dtype, and the read bandwidths."""
    dtypes = list(dict.fromkeys(peak["dtype"] for peak in limits["fma_peak"]))
    rows: dict[str, dict[str, str]] = {}
    for peak in limits["fma_peak"]:
        rows.setdefault(peak["kernel"], {})[peak["dtype"]] = three_digits(peak["gflops"])
    cells = [(kernel, *(row.get(dtype, "") for dtype in dtypes)) for kernel, row in rows.items()]
    lines = table(("FMA peak, GFLOP/s", *dtypes), cells).splitlines()
    reads = [
        f"{x['level']} ({x['bytes'] / 2**20:g} MiB) {three_digits(x['gbytes'])} GB/s"
        for x in limits["read_bandwidth"]
    ]
    return [*lines, f"reading: {', '.join(reads)}"]


def speed(case: dict[str, Any], entry: dict[str, Any]) -> str:
    """GFLOP/s where arithmetic is the limit, GB/s of K and V where memory is, nothing for latency."""
    if case["kind"] == "latency":
        return ""
    figure, unit = ("gbytes", "GB/s") if case["kind"] == "decode" else ("gflops", "GFLOP/s")
    return f"{three_digits(entry[figure])} {unit}"


def _row(case: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    slowdown = entry["slowdown"]
    return (
        f"  {entry['name']} ({entry['implementation']})",
        time_text(entry["seconds"]),
        speed(case, entry),
        percent(entry["fraction_of_limit"]),
        percent(entry["fraction_of_best_limit"]),
        f"{entry['seconds'] / case['results'][0]['seconds']:.2f}",
        f"{slowdown:.2f}x" if slowdown is not None else "",
    )


def percent(fraction: float | None) -> str:
    return f"{100 * fraction:.0f} %" if fraction is not None else ""


def _heading(case: dict[str, Any]) -> str:
    text = f"{case['name']}: {case['title']}, {case['shape']}, {case['dtype']}"
    limit = case["limit"]
    if limit["kind"] == "flops":
        text += f"; limit {three_digits(limit['gflops'])} GFLOP/s"
    elif limit["kind"] == "bandwidth":
        text += f"; limit {three_digits(limit['gbytes'])} GB/s"
    if case["best_peer"] is not None:
        text += f"; {case['ratio_to_best_peer']:.2f}x the speed of {case['best_peer']}"
    return text


def summary(cases: list[dict[str, Any]]) -> list[str]:
    ratios = [case["ratio_to_best_peer"] for case in cases if case["best_peer"] is not None]
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    won = sum(ratio > 1.0 for ratio in ratios)
    speed_text = f"{mean:.2f}x the best peer's speed (geometric mean)"
    return ["", f"faster than every peer in {won} of {len(ratios)} cases; {speed_text}"]
