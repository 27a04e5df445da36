"""Draws a run of ``bench`` as a roofline: speed against arithmetic intensity, under the machine's roofs.

A pair of panels per dtype and number of threads: cases that memory bounds, and those that arithmetic does.
Every case is a labelled point, its best peer a hollow one below or above it.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

from attnbench.plots.bars import FAINT, GREY, INK, SHORT
from fastattn._check import machine
from fastattn._check.output import three_digits

PANELS = (("float32", "float64"), ("bfloat16",), ("float16",))
FAMILY_COLORS = ("#1f4e79", "#b4552d", "#3d7d54", "#7a4b94", "#8a6d1f")
ROOF_STYLES = {"DRAM": "-", "L3": "--"}
FONT = 6.5
POINT = 5.0
STEPS = 80  # of the search for a free place
SPLIT = 16.0  # FLOP per byte
BOUNDS = ((0.0, SPLIT), (SPLIT, math.inf))

Box = tuple[float, float, float, float]  # left, bottom, right, top


class Point(NamedTuple):
    """One case: FLOP per byte of inputs and outputs, GFLOP/s of fastattn and of the best peer."""

    case: dict[str, Any]
    x: float
    y: float
    best_peer: float | None


def draw(document: dict[str, Any], path: str) -> None:
    """Writes the figure for what `bench.run` returned; the suffix of `path` is the format."""
    runs = document["runs"]
    families = list(dict.fromkeys(case["family"] for run in runs for case in run["cases"]))
    colors = {family: FAMILY_COLORS[i % len(FAMILY_COLORS)] for i, family in enumerate(families)}
    rows = [
        (run, dtypes)
        for run in runs
        for dtypes in PANELS
        if any(case["dtype"] in dtypes for case in run["cases"])
    ]
    figure_class = importlib.import_module("matplotlib.figure").Figure
    figure = figure_class(figsize=(15.0, 1.0 + 5.0 * len(rows)), layout="constrained", facecolor="white")
    grid = figure.subplots(len(rows), 2, squeeze=False, width_ratios=[1.0, 1.6])
    panels = [
        (axes, run, dtypes, _points(run, dtypes, bound))
        for columns, (run, dtypes) in zip(grid, rows, strict=True)
        for axes, bound in zip(columns, BOUNDS, strict=True)
    ]
    for axes, run, dtypes, points in panels:
        _draw_panel(axes, run, dtypes, points, colors)
    figure.legend(
        handles=_handles(colors),
        loc="outside upper center",
        ncols=len(colors) + 1,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    where = machine.summary(document["machine"])
    figure.supxlabel(f"{where}; {document['when'][:10]}", fontsize=8, color=GREY)
    figure.draw_without_rendering()  # from here on the panels stay where they are
    for axes, _, _, points in panels:
        _label(axes, points)
    figure.savefig(path, dpi=130)


def _points(run: dict[str, Any], dtypes: tuple[str, ...], bound: tuple[float, float]) -> list[Point]:
    """The cases of these dtypes whose intensity lies within the bound."""
    points = []
    for case in run["cases"]:
        x = case["flops"] / case["bytes"]
        if case["dtype"] in dtypes and bound[0] <= x < bound[1]:
            ours, *others = (entry["gflops"] for entry in case["results"])
            points.append(Point(case, x, ours, max(others, default=None)))
    return points


def _draw_panel(
    axes: Any, run: dict[str, Any], dtypes: tuple[str, ...], points: list[Point], colors: dict[str, str]
) -> None:
    shown = [dtype for dtype in dtypes if any(point.case["dtype"] == dtype for point in points)] or dtypes[:1]
    peaks = {dtype: _peak(run, dtype) for dtype in shown}
    rates = {x["level"]: x["gbytes"] for x in run["limits"]["read_bandwidth"]}
    intensities = [point.x for point in points] or [1.0, SPLIT]
    speeds = [y for point in points for y in (point.y, point.best_peer) if y is not None]
    top = max(peaks.values())
    left, right = min(intensities) / 2.0, max(intensities) * 2.5
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    highest = max([min(top, rates["L3"] * right), *speeds])
    axes.set_ylim(min([*speeds, highest / 10.0]) / 2.2, 1.4 * highest)
    for (dtype, peak), style in zip(peaks.items(), ("-", ":"), strict=False):
        label = f"{dtype} FMA peak, {three_digits(peak)} GFLOP/s"
        axes.axhline(peak, color=INK, linewidth=1.2, linestyle=style, label=label)
    for level, style in ROOF_STYLES.items():
        if rates[level] * left > top:  # out of sight
            continue
        ends = (left, top / rates[level])
        label = f"reading {level}, {three_digits(rates[level])} GB/s"
        axes.plot(ends, [rates[level] * x for x in ends], style, color=GREY, linewidth=1.1, label=label)
    for point in points:
        color = colors[point.case["family"]]
        if point.best_peer is not None:
            ends = (point.y, point.best_peer)
            axes.plot([point.x, point.x], ends, color=color, linewidth=0.5, alpha=0.5)
            axes.plot(point.x, point.best_peer, "o", color=color, markersize=POINT, markerfacecolor="white")
        axes.plot(point.x, point.y, "o", color=color, markersize=POINT)
    threads = f"{run['threads']} thread{'s' if run['threads'] != 1 else ''}"
    axes.set_title(f"{' and '.join(dtypes)}, {threads}", fontsize=10, color=INK, loc="left")
    axes.set_xlabel("FLOP per byte of inputs and outputs", fontsize=8, color=INK)
    axes.set_ylabel("GFLOP/s", fontsize=8, color=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.tick_params(which="both", colors=INK, labelsize=8)
    ticker = importlib.import_module("matplotlib.ticker")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(ticker.NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", fontsize=7.5, frameon=False, labelcolor=INK)


def _peak(run: dict[str, Any], dtype: str) -> float:
    """GFLOP/s of the fastest kernel that takes this dtype."""
    return float(max(x["gflops"] for x in run["limits"]["fma_peak"] if x["dtype"] == dtype))


def _handles(colors: dict[str, str]) -> list[Any]:
    line = importlib.import_module("matplotlib.lines").Line2D
    style = {"marker": "o", "linestyle": "", "markersize": 6}
    families = [line([], [], color=color, label=family, **style) for family, color in colors.items()]
    hollow = line([], [], color=GREY, markerfacecolor="white", label="best peer", **style)
    return [*families, hollow]


def _label(axes: Any, points: list[Point]) -> None:
    """Names beside the points, each at the nearest place where it covers nothing."""
    pixel = axes.figure.dpi / 72.0
    height = 1.2 * FONT * pixel
    to_pixels, to_data = axes.transData.transform, axes.transData.inverted().transform
    inside = axes.get_window_extent()
    marks = [(p.x, y) for p in points for y in (p.y, p.best_peer) if y is not None]
    taken = [_box(x, y, POINT * pixel, POINT * pixel) for x, y in map(to_pixels, marks)]
    taken.append(tuple(axes.get_legend().get_window_extent().extents))
    for point in sorted(points, key=lambda p: -p.y):
        case = point.case
        name = (
            case["name"].removesuffix(f"-{SHORT[case['dtype']]}")
            if case["dtype"] != "float64"
            else case["name"]
        )
        width = 0.6 * FONT * pixel * len(name)
        x, y = to_pixels((point.x, point.y))
        gap = POINT * pixel
        places = [
            (middle, y + sign * step * height / 2)
            for step in range(STEPS)
            for sign in (1, -1)
            for middle in (x + gap + step * 1.5 + width / 2, x - gap - step * 1.5 - width / 2)
        ]
        boxes = [_box(*place, width, height) for place in places]
        free = (box for box in boxes if _within(box, inside) and not any(_overlap(box, b) for b in taken))
        box = next(free, boxes[0])
        taken.append(box)
        text_x, text_y = to_data((box[0], (box[1] + box[3]) / 2))
        if abs((box[1] + box[3]) / 2 - y) > 0.6 * height:
            near_x = to_data((min(max(x, box[0]), box[2]), y))[0]
            axes.plot([point.x, near_x], [point.y, text_y], color=GREY, linewidth=0.4, zorder=1)
        axes.text(text_x, text_y, name, fontsize=FONT, color=INK, va="center")


def _box(x: float, y: float, width: float, height: float) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _within(box: Box, inside: Any) -> bool:
    return bool(inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
