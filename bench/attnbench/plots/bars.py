"""Draws a run of ``bench``: fastattn's share of the machine's limit, and how much faster than its peers.

A row per case; each number of threads has its own pair of columns.
"""

from __future__ import annotations

import importlib
from typing import Any

from attnbench.cases import DTYPES
from attnbench.report import speed
from fastattn._check import machine
from fastattn._check.output import three_digits, time_text

# Colours that stay apart in grey and for the colour-blind; fastattn is the only strong one.
COLORS = {
    "fastattn": "#1f4e79",
    "torch": "#e08e45",
    "onnxruntime": "#4f9d8f",
    "jax": "#b9a44c",
    "numpy": "#9aa0a6",
}
MARKERS = {"torch": "o", "onnxruntime": "s", "jax": "^", "numpy": "D"}
INK = "#2b2b2b"
GREY = "#6b6b6b"
FAINT = "#e2e2e2"
SLOWER = "#b03a2e"
SHORT = {dtype: short for short, dtype in DTYPES} | {"float64": "f64"}
FONT = 7.5
ROW_INCHES = 0.185
FULL = 100.0  # percent


def draw(document: dict[str, Any], path: str) -> None:
    """Writes the figure for what `bench.run` returned; the suffix of `path` is the format.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        The run has no cases, or matplotlib does not know the suffix.
    """
    runs = document["runs"]
    rows = _rows(runs)
    # Without pyplot: no display, no global state.
    figure_class = importlib.import_module("matplotlib.figure").Figure
    size = (4.2 + 6.8 * len(runs), 1.5 + ROW_INCHES * len(rows))
    figure = figure_class(figsize=size, layout="constrained", facecolor="white")
    columns = figure.subplots(
        1, 2 * len(runs), sharey=True, squeeze=False, width_ratios=[1.25, 1.0] * len(runs)
    )
    for run, left, right in zip(runs, columns[0, ::2], columns[0, 1::2], strict=True):
        by_name = {case["name"]: case for case in run["cases"]}
        cases = [(y, by_name[name]) for y, (name, _) in enumerate(rows) if name in by_name]
        _draw_limits(left, cases, _threads(run))
        _draw_ratios(right, cases)
        for axes in (left, right):
            axes.tick_params(colors=INK, labelsize=FONT, length=0)
            axes.spines[:].set_visible(False)
            axes.grid(axis="x", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
            for y, _ in cases[1::2]:
                axes.axhspan(y - 0.5, y + 0.5, color="#f6f6f6", zorder=0)
    first = columns[0, 0]
    first.set_yticks(range(len(rows)), [label for _, label in rows])
    for (name, _), label in zip(rows, first.get_yticklabels(), strict=True):
        if name is None:
            label.set(weight="bold", color=COLORS["fastattn"], fontsize=FONT + 1)
    first.set_ylim(len(rows) - 0.4, -0.6)
    names = list(dict.fromkeys(name for run in runs for name in run["peers"]))
    figure.legend(
        handles=_handles(names, document["versions"]),
        loc="outside upper center",
        ncols=len(names) + 1,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    where = machine.summary(document["machine"])
    rounds = f"median of up to {runs[0]['rounds']} interleaved rounds"
    figure.supxlabel(f"{where}; {rounds}; {document['when'][:10]}", fontsize=FONT, color=GREY)
    figure.savefig(path, dpi=150)


def _rows(runs: list[dict[str, Any]]) -> list[tuple[str | None, str]]:
    """The name of each row's case and its label; None and the family for a heading."""
    cases = {case["name"]: case for run in runs for case in run["cases"]}
    if not cases:
        raise ValueError("--plot: there are no cases to draw")
    rows: list[tuple[str | None, str]] = []
    family = None
    for name, case in cases.items():
        if case["family"] != family:
            family = case["family"]
            rows.append((None, family))
        rows.append((name, f"{case['title']}, {case['shape']}, {SHORT[case['dtype']]}"))
    return rows


def _threads(run: dict[str, Any]) -> str:
    return f"{run['threads']} thread{'s' if run['threads'] != 1 else ''}"


def _handles(names: list[str], versions: dict[str, str]) -> list[Any]:
    patch = importlib.import_module("matplotlib.patches").Patch
    line = importlib.import_module("matplotlib.lines").Line2D
    ours = patch(color=COLORS["fastattn"], label=f"fastattn {versions['fastattn']}")
    style = {"linestyle": "", "markersize": 5}
    return [
        ours,
        *(
            line([], [], marker=MARKERS[name], color=COLORS[name], label=f"{name} {versions[name]}", **style)
            for name in names
        ),
    ]


def _draw_limits(axes: Any, cases: list[tuple[int, dict[str, Any]]], threads: str) -> None:
    """Percent of the limit: fastattn a bar, its peers marks; the absolute figure beside."""
    for y, case in cases:
        ours, *others = case["results"]
        text = speed(case, ours) or time_text(ours["seconds"])
        if ours["fraction_of_limit"] is not None:
            width = min(FULL, FULL * ours["fraction_of_limit"])
            axes.barh(y, width, height=0.62, color=COLORS["fastattn"])
            text = f"{FULL * ours['fraction_of_limit']:.0f} %   {text}"
        for entry in others:
            if entry["fraction_of_limit"] is not None:
                _mark(axes, min(FULL, FULL * entry["fraction_of_limit"]), y, entry["name"])
        if ours["slowdown"] is not None:
            text += f"   cost {ours['slowdown']:.2f}x"
        axes.text(FULL + 2.0, y, text, va="center", fontsize=FONT - 0.5, color=INK, in_layout=False)
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.axvline(FULL, color=INK, linewidth=0.9)
    axes.set_xlim(0.0, 176.0)
    axes.set_xticks(range(0, 101, 20), [f"{x} %" for x in range(0, 101, 20)])
    title = f"{threads}: share of the limit\n(FMA peak; for decode, reads of as many bytes)"
    axes.set_title(title, fontsize=FONT + 1, color=INK, loc="left")


def _draw_ratios(axes: Any, cases: list[tuple[int, dict[str, Any]]]) -> None:
    """How many times faster than each peer fastattn is, on a logarithmic axis; below 1 it is slower."""
    low, high = 0.9, 2.0
    for y, case in cases:
        ours, *others = case["results"]
        for entry in others:
            ratio = entry["seconds"] / ours["seconds"]
            low, high = min(low, ratio), max(high, ratio)
            _mark(axes, ratio, y, entry["name"])
    low, high = 0.7 * low, 1.3 * high
    room = (high / low) ** 0.6  # for the text beside
    for y, case in cases:
        ratio = case["ratio_to_best_peer"]
        if ratio is None:
            axes.text(
                high, y, "no peer has it", va="center", fontsize=FONT - 0.5, color=GREY, in_layout=False
            )
            continue
        axes.plot([1.0, ratio], [y, y], color=GREY, linewidth=1.0, zorder=1)
        text = f"{three_digits(ratio)}x {case['best_peer']}"
        color = INK if ratio >= 1.0 else SLOWER
        axes.text(high, y, text, va="center", fontsize=FONT - 0.5, color=color, in_layout=False)
    axes.axvline(1.0, color=INK, linewidth=0.9)
    axes.set_xscale("log")
    axes.set_xlim(low, high * room)
    every = 2 if high < 32 else 4 if high < 256 else 10
    ticks = [t for t in (float(every) ** n for n in range(-6, 12)) if low <= t <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    title = "times faster than each peer\n(in figures: than the best one)"
    axes.set_title(title, fontsize=FONT + 1, color=INK, loc="left")


def _mark(axes: Any, x: float, y: float, name: str) -> None:
    style = {"markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}
    axes.plot([x], [y], MARKERS[name], color=COLORS[name], clip_on=False, **style)
