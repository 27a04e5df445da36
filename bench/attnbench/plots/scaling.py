"""Draws a run of ``bench --scaling``: time and extra memory against the length of the sequence."""

from __future__ import annotations

import importlib
from typing import Any

from attnbench.plots.bars import COLORS, FAINT, GREY, INK, SHORT
from fastattn._check import machine

LINES = {"float32": "-", "bfloat16": "--"}
MEBI = 2.0**20


def draw(document: dict[str, Any], path: str) -> None:
    """Writes the figure for what `scaling.run` returned; the suffix of `path` is the format."""
    runs = document["runs"]
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(11.5, 0.6 + 4.6 * len(runs)), layout="constrained", facecolor="white")
    for run, (left, right) in zip(runs, figure.subplots(len(runs), 2, squeeze=False), strict=True):
        threads = f"{run['threads']} thread{'s' if run['threads'] != 1 else ''}"
        _draw_times(left, run)
        left.set_title(f"{threads}: time of a call, ms", fontsize=10, color=INK, loc="left")
        _draw_memory(right, run)
        right.set_title("memory beside inputs and result, MiB", fontsize=10, color=INK, loc="left")
        for axes in (left, right):
            _finish(axes, sorted({point["size"] for point in run["points"]}))
    where = machine.summary(document["machine"])
    figure.supxlabel(f"causal, B1 H8 D64; {where}; {document['when'][:10]}", fontsize=8, color=GREY)
    figure.savefig(path, dpi=150)


def _curves(run: dict[str, Any]) -> dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """(point, result) of every implementation with each dtype."""
    curves: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for point in run["points"]:
        for entry in point["results"]:
            curves.setdefault((entry["name"], point["dtype"]), []).append((point, entry))
    return curves


def _draw_times(axes: Any, run: dict[str, Any]) -> None:
    for (name, dtype), curve in _curves(run).items():
        sizes = [point["size"] for point, _ in curve]
        times = [1e3 * entry["seconds"] for _, entry in curve]
        _plot(axes, sizes, times, name, dtype)
        if (name, dtype) == ("fastattn", "float32"):
            square = [times[-1] * (size / sizes[-1]) ** 2 for size in sizes]
            axes.plot(sizes, square, ":", color=GREY, linewidth=1.2, label="S², through the last point")


def _draw_memory(axes: Any, run: dict[str, Any]) -> None:
    for (name, dtype), curve in _curves(run).items():
        known = [(p["size"], e["extra_bytes"] / MEBI) for p, e in curve if e["extra_bytes"] is not None]
        _plot(axes, [size for size, _ in known], [extra for _, extra in known], name, dtype)
        if (name, dtype) == ("fastattn", "float32"):
            sizes = [point["size"] for point, _ in curve]
            workspace = [point["workspace_bytes"] / MEBI for point, _ in curve]
            label = "fastattn f32, workspace as explain says"
            axes.plot(sizes, workspace, "x", color=COLORS["fastattn"], markersize=5, label=label)
            linear = [point["input_output_bytes"] / MEBI for point, _ in curve]
            axes.plot(sizes, linear, ":", color=GREY, linewidth=1.2, label="S: inputs and result, f32")


def _plot(axes: Any, x: Any, y: Any, name: str, dtype: str) -> None:
    label = f"{name} {SHORT[dtype]}"
    axes.plot(x, y, "o" + LINES[dtype], color=COLORS[name], markersize=4, linewidth=1.4, label=label)


def _finish(axes: Any, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    # Memory may be zero where nothing was added.
    axes.set_yscale("symlog" if any(y <= 0.0 for line in axes.lines for y in line.get_ydata()) else "log")
    axes.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes])
    axes.set_xlabel("sequence length S", fontsize=8, color=INK)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=FAINT, linewidth=0.6)
    axes.tick_params(colors=INK, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
