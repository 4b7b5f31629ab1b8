"""Pictures: accuracy against FLOPs or time of a training step, and time and memory against length."""

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from subquad.lra.report.measurements import MODES, Measurement, layer_label, length_label
from subquad.lra.report.results import Result, groups

INK, QUIET, FRONT = "#1b1b1b", "#767676", "#0b5fa5"
# Told apart by most people whose colour vision differs (Okabe and Ito), then by marker and dash.
COLORS = (
    "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#8c6d1f", "#6a3d9a", "#f0e442", "#882255", "#44aa99",
    "#999999",
)  # fmt: skip
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.")
POINT, LARGEST_BUBBLE = 42.0, 900.0  # areas in square points


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, cheapest first: points that none beats in accuracy at the same or a lower cost.

    Args:
        points: (cost, accuracy) pairs.
    Example:
        >>> front([(1, 0.2), (2, 0.1), (3, 0.4), (3, 0.3)])
        [0, 2]
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[index][1] > points[found[-1]][1]:
            found.append(index)
    return found


def accuracy_against_cost(rows: Iterable[Result], path: str | os.PathLike | None = None):
    """Draws accuracy against FLOPs per step, with the Pareto front and the floors, and saves it as PNG.

    Layers without accuracy or FLOPs are named in the title.

    Args:
        rows: results; those that differ in the seed only become one point with a bar of one standard deviation.
        path: the file; None does not save.
    Returns: the matplotlib figure.
    """
    flops = lambda group: _mean(group, "flops_per_step") / 1e9
    return _accuracy_against(flops, "GFLOPs per training step", rows, path, ("accuracy", "flops_per_step"))


def accuracy_against_time(rows: Iterable[Result], path: str | os.PathLike | None = None):
    """Draws accuracy against the time of a training step, as `accuracy_against_cost`; a point's area is its peak memory.

    The Long Range Arena's figure 3, with time the other way round: left and high is good.
    """
    milliseconds = lambda group: 1e3 / _mean(group, "steps_per_second")
    needed = ("accuracy", "steps_per_second", "memory_peak_bytes")
    return _accuracy_against(milliseconds, "time of a training step, ms", rows, path, needed)


def _accuracy_against(cost: Callable, label: str, rows: Iterable[Result], path, needed: Sequence[str]):
    figure = _figure((9, 5))
    axes = figure.add_subplot()
    _style(axes)
    axes.set(xscale="log", xlabel=label, ylabel="test accuracy, %")
    every = groups(rows)
    drawn = [[row for row in group if all(getattr(row, name) is not None for name in needed)] for group in every]
    absent = sorted({group[0].layer for group, kept in zip(every, drawn, strict=True) if not kept})
    drawn, bubbles = list(filter(None, drawn)), "memory_peak_bytes" in needed
    if bubbles:  # large ones first, so that none hides another
        drawn.sort(key=lambda group: -_mean(group, "memory_peak_bytes"))
    points = [(cost(group), 100 * _mean(group, "accuracy")) for group in drawn]
    names = sorted(group[0].layer for group in drawn)
    for group, (x, y) in zip(drawn, points, strict=True):
        color, marker, _ = _look(names.index(group[0].layer))
        memory = _mean(group, "memory_peak_bytes") / _mean(drawn[0], "memory_peak_bytes") if bubbles else 0.0
        deviation = 100 * statistics.stdev(row.accuracy for row in group) if len(group) > 1 else 0.0
        axes.errorbar(x, y, yerr=deviation, fmt="none", ecolor=QUIET, elinewidth=1)
        area, shape = (LARGEST_BUBBLE * memory, "o") if bubbles else (POINT, marker)
        said = f"{group[0].layer}, {_mean(group, 'memory_peak_bytes') / 2**20:.0f} MiB" if bubbles else group[0].layer
        shown = dict(color=color, marker=shape, alpha=0.6 if bubbles else 1.0, edgecolors=INK)
        axes.scatter(x, y, s=area, label=said, zorder=3, **shown)
    if points:
        line = [points[index] for index in front(points)]
        axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=FRONT, linewidth=1.5, label="Pareto front")
        one = drawn[0][0]
        for name, value, dash in (("majority", one.floor_majority, ":"), ("root operator", one.floor_root, "--")):
            if value is not None:
                axes.axhline(100 * value, color=INK, linestyle=dash, linewidth=1, label=f"{name} floor, {100 * value:.1f} %")
        axes.margins(0.12)
        _plain_ticks(axes.xaxis)
        title = f"{one.task}, {one.config}, {one.steps} steps of {one.batch_size}; {one.hardware}"
        axes.set_title(title + (f"; not drawn: {', '.join(absent)}" if absent else ""), loc="left", fontsize=9)
        legend = axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for handle in legend.legend_handles[: len(points)] if bubbles else ():
            handle.set_sizes([POINT])
    return _saved(figure, path)


def cost_against_length(rows: Iterable[Measurement], path: str | os.PathLike | None = None):
    """Draws time and peak memory against length, both logarithmic, a row of panels for each mode.

    A slope in the legend is that between the two longest lengths: 1 is linear, 2 quadratic. Memory of what did not fit is
    known from its compiled program, and drawn hollow.

    Args:
        rows: measurements of one model, batch size, dtype and machine: one of `bench.groups`.
        path: the file, PNG; None does not save.
    Returns: the matplotlib figure; panels of a mode are neighbours in `figure.axes`.
    """
    rows = list(rows)
    modes = [mode for mode in MODES if any(row.mode == mode and row.peak_bytes for row in rows)]
    columns = (("median_ms", "time, ms", 1.0), ("peak_bytes", "peak memory, MiB", 2.0**20))
    panels = []
    for mode, (column, label, unit) in itertools.product(modes, columns):
        lines: dict[str, list[Point]] = {}
        for row in sorted(rows, key=lambda row: row.length):
            if row.mode == mode and getattr(row, column):
                point = Point(row.length, getattr(row, column) / unit, row.status == "ok", row.layer == row.baseline)
                lines.setdefault(layer_label(row, rows), []).append(point)
        panels.append((mode, label, lines))
    title = ""
    if rows:
        one, hollow = rows[0], any(row.status != "ok" and row.peak_bytes for row in rows)
        title = f"{one.model}, batch {one.batch_size}, {one.dtype}; {one.hardware}" + "; hollow: did not run" * hollow
    return against_length(panels, [layer_label(row, rows) for row in rows], title, path)


class Point(NamedTuple):
    """A value at a length, whether what it is of ran, and whether its line is the one that others are compared with."""

    length: int
    value: float
    ran: bool = True
    bold: bool = False


def against_length(
    panels: Sequence[tuple[str, str, Mapping[str, Sequence[Point]]]], names: Iterable[str], title: str, path
):
    """Draws panels, two in a row, of lines against length, both logarithmic, with their slopes in a legend.

    Args:
        panels: (title, label of the values, name of a line -> its points in the order of their lengths) of each.
        names: of the lines, which look the same in all panels.
        path: the file, PNG; None does not save.
    """
    from matplotlib.ticker import NullLocator

    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    figure = _figure((12, 0.8 + 3.1 * max(1, len(panels) // 2)))
    for place, (heading, label, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(len(panels) // 2, 2, place)
        _style(axes)
        axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel=label)
        axes.set_title(heading, loc="left", fontsize=10)
        for name, points in lines.items():
            bold, (color, marker, dash) = points[0].bold, _look(numbers[name])
            power = slope([point[:2] for point in points])
            shown = name if power is None else f"{name}, slope {power:.2f}"
            words = dict(color=INK if bold else color, marker=marker, markersize=4)
            across, up, *_ = zip(*points, strict=True)
            axes.plot(across, up, dash, linewidth=2.2 if bold else 1.3, label=shown, zorder=3, **words)
            hollow = [point[:2] for point in points if not point.ran]
            if hollow:
                axes.plot(*zip(*hollow, strict=True), linestyle="none", markerfacecolor="white", zorder=4, **words)
        lengths = sorted({point.length for *_, every in panels for points in every.values() for point in points})
        axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
        axes.set_xticks(lengths)
        low, high = axes.get_ylim()
        if high < 4 * low:  # else a difference of one part in a hundred would look large
            axes.set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
        axes.xaxis.set_major_formatter(lambda value, _: length_label(round(value)))
        axes.xaxis.set_minor_locator(NullLocator())
        _plain_ticks(axes.yaxis)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _saved(figure, path)


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """The power of x that y grows with between the two largest x; None for fewer than two points.

    Example:
        >>> slope([(1, 7.0), (2, 4.0), (4, 16.0)])
        2.0
    """
    if len(points) < 2:
        return None
    (x, y), (later, grown) = sorted(points)[-2:]
    return math.log(grown / y) / math.log(later / x)


def _figure(size: tuple[float, float]):
    from matplotlib.figure import Figure

    return Figure(figsize=size, dpi=150, layout="constrained")


def _saved(figure, path: str | os.PathLike | None):
    if path is not None:
        figure.savefig(path, format="png")
    return figure


def _look(number: int) -> tuple[str, str, str]:
    """(colour, marker, dash) of the layer of a number."""
    again = number // len(COLORS)
    return COLORS[number % len(COLORS)], MARKERS[again % len(MARKERS)], DASHES[again % len(DASHES)]


def _style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _plain_ticks(axis) -> None:
    """Numbers instead of powers of ten, at 1, 2 and 5 of each."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())


def _mean(rows: Sequence[Result], name: str) -> float:
    return statistics.mean(getattr(row, name) for row in rows)
