"""A run of ``bench`` as text."""

from __future__ import annotations

import math
from typing import Any

from fastattn._cli import machine
from fastattn._cli.output import table, three_digits, time_text

HEADER = ("", "time", "speed", "of limit", "time / ours")


def report(document: dict[str, Any]) -> str:
    """What `bench.run` returned, a heading per case and a line per implementation."""
    versions = document["versions"]
    others = ", ".join(f"{name} {versions[name]}" for name in document["peers"])
    lines = [
        f"fastattn {versions['fastattn']} on {machine.summary(document['machine'])}",
        f"threads: {document['threads']}, median of {document['rounds']} interleaved rounds",
        f"peers: {others or 'none'}",
    ]
    lines += [f"{name} is left out: {reason}" for name, reason in document["unavailable_peers"].items()]
    lines += [f"{name} is left out: {reason}" for name, reason in document["skipped_cases"].items()]

    # One table for all cases, so that the columns line up; the headings go between its lines.
    rows = [_row(case, entry) for case in document["cases"] for entry in case["results"]]
    text = iter(table(HEADER, rows).splitlines())
    lines += ["", next(text), next(text)]
    for case in document["cases"]:
        lines += ["", _heading(case), *(next(text) for _ in case["results"])]
        lines += [f"  {name}: {reason}" for name, reason in case["skipped"].items()]
    return "\n".join([*lines, *_summary(document["cases"])])


def speed(case: dict[str, Any], entry: dict[str, Any]) -> str:
    """GFLOP/s where arithmetic is the limit, GB/s of K and V where memory is, nothing for latency."""
    if case["kind"] == "latency":
        return ""
    figure, unit = ("gbytes", "GB/s") if case["kind"] == "decode" else ("gflops", "GFLOP/s")
    return f"{three_digits(entry[figure])} {unit}"


def _row(case: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    ours = case["results"][0]
    name = f"  {entry['name']} ({entry['implementation']})" if entry is ours else f"  {entry['name']}"
    fraction = entry["fraction_of_limit"]
    return (
        name,
        time_text(entry["seconds"]),
        speed(case, entry),
        f"{100 * fraction:.0f} %" if fraction is not None else "",
        f"{entry['seconds'] / ours['seconds']:.2f}",
    )


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


def _summary(cases: list[dict[str, Any]]) -> list[str]:
    ratios = [case["ratio_to_best_peer"] for case in cases if case["best_peer"] is not None]
    if not ratios:
        return []
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    won = sum(ratio > 1.0 for ratio in ratios)
    speed_text = f"{mean:.2f}x the best peer's speed (geometric mean)"
    return ["", f"faster than every peer in {won} of {len(ratios)} cases; {speed_text}"]
