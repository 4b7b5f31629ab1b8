"""Pictures: accuracy against FLOPs or time of a training step, and time and memory against length."""

import contextlib
import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from subquad.lra.files import explained
from subquad.lra.report.measurements import MODES, Measurement, layer_label, length_label
from subquad.lra.report.results import Result, distinct, labelled, trained

INK, QUIET, FRONT = "#1b1b1b", "#767676", "#0b5fa5"
# Told apart by most people whose colour vision differs (Okabe and Ito), then by marker and dash.
COLORS = (
    "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#8c6d1f", "#6a3d9a", "#f0e442", "#882255", "#44aa99",
    "#999999",
)  # fmt: skip
LOOKS = [
    dict(color=color, marker=marker, linestyle=dash)
    for marker, dash in zip("os^DvP", ("-", "--", "-.") * 2, strict=True)
    for color in COLORS
]
STYLE = {
    "figure.dpi": 150, "figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8,
    "axes.titlelocation": "left", "axes.titlesize": 10, "legend.frameon": False,
}  # fmt: skip
BESIDE = dict(loc="center left", bbox_to_anchor=(1.0, 0.5))  # of a legend
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
    every = labelled(rows)
    drawn = {
        name: kept for name, group in every.items()
        if (kept := [row for row in group if all(getattr(row, column) is not None for column in needed)])
    }  # fmt: skip
    absent, names = sorted(every.keys() - drawn.keys()), sorted(drawn)
    memory = {}
    if "memory_peak_bytes" in needed:  # large ones first, so that none hides another
        memory = {name: _mean(group, "memory_peak_bytes") for name, group in drawn.items()}
        drawn = dict(sorted(drawn.items(), key=lambda one: -memory[one[0]]))
    points = [(cost(group), 100 * _mean(group, "accuracy")) for group in drawn.values()]
    with _figure((9, 5), path) as figure:
        axes = figure.add_subplot()
        axes.set(xscale="log", xlabel=label, ylabel="test accuracy, %")
        if len({x for x, _ in points}) == 1:  # of which no limits follow
            axes.set_xlim(points[0][0] / 2, points[0][0] * 2)
        for (name, group), (x, y) in zip(drawn.items(), points, strict=True):
            deviation = 100 * statistics.stdev(row.accuracy for row in group) if group[1:] else 0.0
            axes.errorbar(x, y, yerr=deviation, fmt="none", ecolor=QUIET, elinewidth=1)
            look = {word: LOOKS[names.index(name) % len(LOOKS)][word] for word in ("color", "marker")} | {"s": POINT}
            if memory:
                look |= dict(marker="o", s=LARGEST_BUBBLE * memory[name] / max(memory.values()), alpha=0.6)
                name = f"{name}, {memory[name] / 2**20:.0f} MiB"
            axes.scatter(x, y, edgecolors=INK, label=name, zorder=3, **look)
        if points:
            line = [points[index] for index in front(points)]
            axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=FRONT, linewidth=1.5, label="Pareto front")
            shown = [row for group in drawn.values() for row in group]
            one = shown[0]
            for name, value, dash in (("majority", one.floor_majority, ":"), ("root operator", one.floor_root, "--")):
                if value is not None:
                    floor = f"{name} floor, {100 * value:.1f} %"
                    axes.axhline(100 * value, color=INK, linestyle=dash, linewidth=1, label=floor)
            axes.margins(0.12)
            _plain_ticks(axes.xaxis)
            title = f"{one.task}, {one.config}, {trained(shown)}; {distinct(row.hardware for row in shown)}"
            axes.set_title(title + (f"; not drawn: {', '.join(absent)}" if absent else ""), fontsize=9)
            legend = axes.legend(fontsize=8, **BESIDE)
            for handle in legend.legend_handles[: len(points)]:
                handle.set_sizes([POINT])
    return figure


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
    lengths = sorted({point.length for *_, lines in panels for points in lines.values() for point in points})
    most = max((len(lines) for *_, lines in panels), default=0)  # which the legend beside a panel has
    with _figure((12, 0.8 + max(3.1, 0.16 * most) * max(1, len(panels) // 2)), path) as figure:
        for place, (heading, label, lines) in enumerate(panels, 1):
            axes = figure.add_subplot(len(panels) // 2, 2, place)
            axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel=label, title=heading)
            for name, points in lines.items():
                power, is_bold = slope([point[:2] for point in points]), points[0].bold
                look = LOOKS[numbers[name] % len(LOOKS)] | dict(markersize=4) | (dict(color=INK) if is_bold else {})
                shown = name if power is None else f"{name}, slope {power:.2f}"
                across, up, *_ = zip(*points, strict=True)
                axes.plot(across, up, linewidth=2.2 if is_bold else 1.3, label=shown, zorder=3, **look)
                hollow = [point[:2] for point in points if not point.ran]
                if hollow:
                    axes.plot(*zip(*hollow, strict=True), markerfacecolor="white", zorder=4, **look | dict(linestyle="none"))
            axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
            axes.set_xticks(lengths)
            low, high = axes.get_ylim()
            if high < 4 * low:  # else a difference of one part in a hundred would look large
                axes.set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
            axes.xaxis.set_major_formatter(lambda value, _: length_label(round(value)))
            axes.xaxis.set_minor_locator(NullLocator())
            _plain_ticks(axes.yaxis)
            axes.legend(fontsize=7, **BESIDE)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def learning_curves(curves: Mapping[Result, Sequence[tuple[int, float]]], path: str | os.PathLike | None = None):
    """Draws the validations of runs against steps: a line for the mean of a layer's seeds, and a band from worst to best.

    Args:
        curves: result -> (step, score) of each validation.
        path: the file, PNG; None does not save.
    Returns: the matplotlib figure.
    """
    seeds = {label: [dict(curves[row]) for row in group] for label, group in labelled(curves).items()}
    language = any(row.bits_per_byte is not None for row in curves)
    with _figure((9, 4.5), path) as figure:
        axes = figure.add_subplot()
        for number, (layer, runs) in enumerate(sorted(seeds.items())):
            steps = sorted(set.intersection(*map(set, runs)))
            scores = [[run[step] for run in runs] for step in steps]
            axes.plot(steps, list(map(statistics.mean, scores)), markersize=3, label=layer, **LOOKS[number % len(LOOKS)])
            if len(runs) > 1:
                color = LOOKS[number % len(LOOKS)]["color"]
                axes.fill_between(steps, list(map(min, scores)), list(map(max, scores)), color=color, alpha=0.2, linewidth=0)
        axes.set(xlabel="step", ylabel="bits per byte of validation" if language else "accuracy of validation")
        axes.legend(fontsize=8, **BESIDE)
    return figure


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


def patterns(drawn: Mapping[str, Sequence], path: str | os.PathLike | None = None):
    """Draws which keys each query sees, the share of heads as a shade, and saves it as PNG.

    Args:
        drawn: for each layer its patterns, bidirectional and causal: bool [N, T, S], query by row, or None where it has none.
        path: the file; None does not save.
    Returns: the matplotlib figure.
    """
    across = min(4, len(drawn))
    rows = -(-len(drawn) // across)
    with _figure((3.0 * across, 1.75 * rows), path) as figure:
        panels = figure.subplots(rows, 2 * across, squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for at, (name, pair) in enumerate(drawn.items()):
            row, column = divmod(at, across)
            for axes, pattern, direction in zip(panels[row, 2 * column :], pair, ("bidirectional", "causal"), strict=False):
                axes.set_title(f"{name}\n{direction}" if direction == "bidirectional" else direction, fontsize=7)
                if pattern is None:
                    axes.text(0.5, 0.5, "none", ha="center", va="center", color=QUIET, fontsize=7, transform=axes.transAxes)
                    continue
                axes.imshow(pattern.mean(0), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.set_axis_on()
                axes.spines[:].set_visible(True)
                axes.grid(False)
    return figure


@contextlib.contextmanager
def _figure(size: tuple[float, float], path: str | os.PathLike | None):
    """A figure to draw in, in our style, and saved at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure
        if path is not None:
            with explained(f"picture: file {path} must be writable", "Choose another --out.", OSError):
                figure.savefig(path, format="png")


def _plain_ticks(axis) -> None:
    """Numbers instead of powers of ten, at 1, 2 and 5 of each."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1e6 else f"{value:.0e}")
    axis.set_minor_formatter(NullFormatter())


def _mean(rows: Sequence[Result], name: str) -> float:
    return statistics.mean(getattr(row, name) for row in rows)
