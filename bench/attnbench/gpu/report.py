"""A run of ``bench --device cuda`` as text."""

from __future__ import annotations

from typing import Any

from attnbench.report import percent, summary
from fastattn._check import machine
from fastattn._check.output import table, three_digits, time_text

HEADER = ("", "time", "speed", "of limit", "time / ours", "host", "extra memory", "max error")
TRANSFER_HEADER = ("", "time", "speed", "time / ours", "max error")


def report(document: dict[str, Any]) -> str:
    """What the benchmark returned, a heading per case and a line per implementation."""
    gpu, versions = document["gpu"], document["versions"]
    lines = [
        f"fastattn {versions['fastattn']}, PyTorch {versions['torch']}, CUDA {gpu['cuda']}, on {gpu['name']}",
        machine.summary(document["machine"]),
        f"median of up to {document['rounds']} interleaved rounds",
    ]
    transfers = document["mode"] == "cuda transfers"
    if transfers:
        rates = [f"{name.replace('_', ' ')} {three_digits(x)} GB/s" for name, x in document["link"].items()]
        lines += [f"copies: {', '.join(rates)}"]
    else:
        lines += [f"{name} is left out: {reason}" for name, reason in document["unavailable_peers"].items()]
        lines += limits(document["limits"])
        lines += ["host: to queue a call; extra memory: beside inputs and result, at its highest"]
    if not document["complete"]:
        lines += ["the run was stopped before its end"]
    row, header = (_transfer_row, TRANSFER_HEADER) if transfers else (_row, HEADER)
    rows = [row(case, entry) for case in document["cases"] for entry in case["results"]]
    if rows:
        text = iter(table(header, rows).splitlines())
        lines += ["", next(text), next(text)]
        for case in document["cases"]:
            lines += ["", _heading(case), *(next(text) for _ in case["results"])]
            lines += [f"  {name}: {reason}" for name, reason in case["skipped"].items()]
            lines += [f"  ERROR {name}: {reason}" for name, reason in case["errors"].items()]
    lines += [f"ERROR {name}: {reason}" for name, reason in document["failed"].items()]
    return "\n".join([*lines, *summary(document["cases"])])


def limits(found: dict[str, Any]) -> list[str]:
    """Peaks of the products, and of the copy."""
    peaks = ", ".join(f"{x['name']} {three_digits(x['tflops'])}" for x in found["gemm"])
    return [
        f"products, TFLOP/s: {peaks}",
        f"copy on the device: {three_digits(found['copy_gbytes'])} GB/s, read and written",
    ]


def speed(case: dict[str, Any], entry: dict[str, Any]) -> str:
    """TFLOP/s where arithmetic is the limit, GB/s of K and V where memory is, nothing for latency."""
    if case["kind"] == "latency":
        return ""
    figure, unit = ("gbytes", "GB/s") if case["kind"] == "decode" else ("tflops", "TFLOP/s")
    return f"{three_digits(entry[figure])} {unit}"


def bytes_text(size: int) -> str:
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= factor:
            return f"{three_digits(size / factor)} {unit}"
    return f"{three_digits(size / 1e3)} kB"


def extra_bytes(entry: dict[str, Any]) -> int:
    """The larger of what two counters saw: neither sees every pool; and what fastattn says itself."""
    return int(max(*entry["memory_bytes"].values(), entry.get("workspace_bytes", 0)))


def _row(case: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"  {entry['name']} ({entry['implementation']})",
        time_text(entry["seconds"]),
        speed(case, entry),
        percent(entry["fraction_of_limit"]),
        _beside_ours(case, entry),
        time_text(entry["host_seconds"]),
        bytes_text(extra_bytes(entry)),
        f"{entry['max_error']:.1e}",
    )


def _transfer_row(case: dict[str, Any], entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"  {entry['name']} ({entry['implementation']})",
        time_text(entry["seconds"]),
        "" if case["kind"] == "latency" else f"{three_digits(entry['array_gbytes'])} GB/s of arrays",
        _beside_ours(case, entry),
        f"{entry['max_error']:.1e}",
    )


def _beside_ours(case: dict[str, Any], entry: dict[str, Any]) -> str:
    ours = case["results"][0]
    return f"{entry['seconds'] / ours['seconds']:.2f}" if ours["name"] == "fastattn" else ""


def _heading(case: dict[str, Any]) -> str:
    dtype = "float32 as TF32" if case["limit_name"] == "tf32" else case["dtype"]
    text = f"{case['name']}: {case['title']}, {case['shape']}, {dtype}"
    if case["best_peer"] is not None:
        text += f"; {case['ratio_to_best_peer']:.2f}x the speed of {case['best_peer']}"
    return text
