"""Draws a run of ``bench``: everybody's share of the machine's limit, and fastattn beside each peer."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

from fastattn._cli import machine
from fastattn._cli.output import three_digits, time_text
from fastattn._cli.report import speed

# Colours that stay apart in grey and for the colour-blind; fastattn is the only strong one.
COLORS = {
    "fastattn": "#1f4e79",
    "torch": "#e08e45",
    "onnxruntime": "#8aa29e",
    "jax": "#b9a44c",
    "numpy": "#c9cdd2",
}
INK = "#2b2b2b"
GREY = "#6b6b6b"
FAINT = "#d9d9d9"


GAP = 0.9  # between cases, in bars


def draw(document: dict[str, Any], path: str) -> None:
    """Writes the figure for what `bench.run` returned; the suffix of `path` is the format.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        The run has no cases, or matplotlib does not know the suffix.
    """
    cases = document["cases"]
    if not cases:
        raise ValueError("--plot: there are no cases to draw")
    # Without pyplot: no display, no global state.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    starts = [0.0]  # where each case's bars begin, counted in bars from the top
    for case in cases:
        starts.append(starts[-1] + len(case["results"]) + GAP)
    figure = figure_class(figsize=(11.0, 1.5 + 0.185 * starts[-1]), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.7, 1.0])
    _draw_limits(left, cases, starts)
    _draw_ratios(right, cases, starts)
    middles = [(start + end - GAP) / 2 for start, end in itertools.pairwise(starts)]
    left.set_yticks(middles, [f"{case['title']}, {case['dtype']}\n{case['shape']}" for case in cases])
    left.set_ylim(starts[-1] - GAP / 2, -GAP / 2)
    for axes in (left, right):
        axes.tick_params(colors=INK, labelsize=8.5, length=0)
        axes.spines[:].set_visible(False)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        for start in starts[1:-1]:
            axes.axhline(start - GAP / 2, color=FAINT, linewidth=0.6)

    names = ["fastattn", *document["peers"]]
    versions = document["versions"]
    patch = importlib.import_module("matplotlib.patches").Patch
    figure.legend(
        handles=[patch(color=COLORS[name], label=f"{name} {versions[name]}") for name in names],
        loc="outside upper center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    threads = f"{document['threads']} thread{'s' if document['threads'] != 1 else ''}"
    rounds = f"median of {document['rounds']} interleaved rounds"
    where = machine.summary(document["machine"])
    figure.supxlabel(f"{where}; {threads}; {rounds}; {document['when'][:10]}", fontsize=7.5, color=GREY)
    figure.savefig(path, dpi=160)


def _draw_limits(axes: Any, cases: list[dict[str, Any]], starts: list[float]) -> None:
    """Percent of the limit, with the absolute figure at the end of each bar."""
    for case, start in zip(cases, starts, strict=False):
        for i, entry in enumerate(case["results"]):
            ours = entry["name"] == "fastattn"
            y, width, text = start + i + 0.5, 0.0, time_text(entry["seconds"])
            if entry["fraction_of_limit"] is not None:
                width, text = 100.0 * entry["fraction_of_limit"], speed(case, entry)
            axes.barh(y, width, height=0.84, color=COLORS[entry["name"]])
            weight = "bold" if ours else "normal"
            inside = width > 78.0  # beside the bar it would run into the line at 100 %
            style = {"ha": "right", "color": "white"} if inside else {"ha": "left", "color": INK}
            x = width + (-0.8 if inside else 0.8)
            axes.text(x, y, text, va="center", fontsize=7, weight=weight, **style)
        limit = case["limit"]
        if limit["kind"] is not None:
            figure, unit = (
                (limit["gflops"], "GFLOP/s") if limit["kind"] == "flops" else (limit["gbytes"], "GB/s")
            )
            middle = start + len(case["results"]) / 2
            axes.text(101.0, middle, f"{three_digits(figure)}\n{unit}", va="center", fontsize=7, color=GREY)
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.axvline(100.0, color=INK, linewidth=0.9)
    axes.set_xlim(0.0, 112.0)
    axes.set_xticks(range(0, 101, 20), [f"{x} %" for x in range(0, 101, 20)])
    title = "share of the limit: multiply-adds in registers, or for decode reads of as many bytes"
    axes.set_title(title, fontsize=8.5, color=INK, loc="left")


def _draw_ratios(axes: Any, cases: list[dict[str, Any]], starts: list[float]) -> None:
    """How many times faster than each peer fastattn is, on a logarithmic axis; below 1 it is slower."""
    low, high = 0.9, 2.0
    for case, start in zip(cases, starts, strict=False):
        ours, *others = case["results"]
        for i, entry in enumerate(others, start=1):
            ratio, y, color = entry["seconds"] / ours["seconds"], start + i + 0.5, COLORS[entry["name"]]
            low, high = min(low, ratio), max(high, ratio)
            axes.plot([1.0, ratio], [y, y], color=color, linewidth=1.4, solid_capstyle="butt")
            axes.plot([ratio], [y], "o", color=color, markersize=4.5)
            faster = ratio >= 1.0
            axes.annotate(
                f"{three_digits(ratio)}x",
                (ratio, y),
                xytext=(5 if faster else -5, 0),
                textcoords="offset points",
                ha="left" if faster else "right",
                va="center",
                fontsize=7,
                color=INK,
                weight="bold" if entry["name"] == case["best_peer"] else "normal",
            )
    low, high = 0.7 * low, 1.9 * high  # room for the figures beside the dots
    axes.axvline(1.0, color=INK, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    every = 2 if high < 64 else 4
    ticks = [t for t in (float(every) ** n for n in range(-6, 12)) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("times faster than each peer (bold: the best peer)", fontsize=8.5, color=INK, loc="left")
