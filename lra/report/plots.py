"""Pictures: accuracy against FLOPs or time of a training step, and time and memory against length."""

import itertools
import math
import os
import statistics
from collections.abc import Iterable, Sequence

from subquad.lra.report.measurements import MODES, Measurement, layer_label, length_label
from subquad.lra.report.results import Result, groups

# Where a label may stand around its point, in points, nearest first.
PLACES = [
    (radius * x, radius * y)
    for radius in (9, 16, 24, 34, 46, 60)
    for x, y in ((1, 0), (-1, 0), (0.7, 0.9), (-0.7, 0.9), (0.7, -0.9), (-0.7, -0.9), (0, 1.1), (0, -1.1))
]
INK, QUIET, FRONT = "#1b1b1b", "#767676", "#0b5fa5"
# Told apart by most people whose colour vision differs (Okabe and Ito), then by marker and dash.
COLORS = ("#e69f00", "#56b4e9", "#009e73", "#d55e00", "#0072b2", "#cc79a7", "#8c6d1f", "#6a3d9a")
MARKERS, DASHES = ("o", "s", "^", "D", "v", "P"), ("-", "--", "-.")
LARGEST_BUBBLE = 900.0  # area in square points


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

    Layers that failed have no accuracy and are named in the title.

    Args:
        rows: results; those that differ in the seed only become one point with a bar of one standard deviation.
        path: the file; None does not save.
    Returns: the matplotlib figure; its labels are `figure.axes[0].texts`.
    """
    figure, canvas, axes = _figure((8, 5))
    every = groups(rows)
    drawn = [[row for row in group if row.status == "ok" and row.accuracy is not None] for group in every]
    drawn = [group for group in drawn if group and group[0].flops_per_step]
    failed = sorted({row.layer for group in every for row in group if row.status != "ok"})

    points = [
        (statistics.mean(row.flops_per_step for row in group), 100 * statistics.mean(row.accuracy for row in group))
        for group in drawn
    ]
    spread = _deviations(drawn)
    best = front(points)
    axes.set(xscale="log", xlabel="FLOPs per training step", ylabel="test accuracy, %")
    if points:
        cost, accuracy = zip(*points, strict=True)
        axes.errorbar(cost, accuracy, yerr=spread, fmt="none", ecolor=QUIET, elinewidth=1)
        line = sorted(points[index] for index in best)
        axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=FRONT, linewidth=1.5, label="Pareto front")
        colors = [FRONT if index in best else QUIET for index in range(len(points))]
        axes.scatter(cost, accuracy, c=colors, s=42, zorder=3)
        axes.scatter(*zip(*line, strict=True), c=FRONT, s=42, zorder=4)
        axes.set_xlim(min(cost) / 1.6, max(cost) * 1.6)
    one = drawn[0][0] if drawn else None
    floors = {"majority floor": one and one.floor_majority, "root operator floor": one and one.floor_root}
    for (name, value), style in zip(floors.items(), (":", "--"), strict=True):
        if value is not None:
            axes.axhline(100 * value, color=INK, linestyle=style, linewidth=1, label=f"{name}, {100 * value:.1f} %")
    # Room above and below, so that every label finds a place inside.
    axes.margins(y=0.18)
    if one:
        title = f"{one.task}, {one.config}, {one.steps} steps of {one.batch_size}"
        axes.set_title(title + (f"; failed: {', '.join(failed)}" if failed else ""), loc="left", fontsize=10)
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.draw_without_rendering()
    steps = sorted(points[index] for index in best)
    _place_labels(axes, canvas.get_renderer(), points, [group[0].layer for group in drawn], steps)
    if path is not None:
        figure.savefig(path, format="png")
    return figure


def accuracy_against_time(rows: Iterable[Result], path: str | os.PathLike | None = None):
    """Draws accuracy against the time of a training step; a bubble's area is its peak memory, the Pareto front is marked.

    The Long Range Arena's figure 3, with time the other way round: left and high is good. Rows without accuracy, rate or
    memory are named in the title.

    Args:
        rows: results of one task; those that differ in the seed only become one bubble with a bar of one standard deviation.
        path: the file, PNG; None does not save.
    Returns: the matplotlib figure; its labels are `figure.axes[0].texts`.
    """
    figure, canvas, axes = _figure((8, 5.4))
    needed = ("accuracy", "steps_per_second", "memory_peak_bytes")
    every = groups(rows)
    whole = [[row for row in group if row.status == "ok" and all(getattr(row, name) for name in needed)] for group in every]
    drawn = sorted((group for group in whole if group), key=lambda group: -_mean(group, "memory_peak_bytes"))
    absent = sorted({group[0].layer for group, kept in zip(every, whole, strict=True) if not kept})
    points = [(1e3 / _mean(group, "steps_per_second"), 100 * _mean(group, "accuracy")) for group in drawn]
    memory = [_mean(group, "memory_peak_bytes") for group in drawn]
    best = front(points)
    axes.set(xscale="log", xlabel="time of a training step, ms", ylabel="test accuracy, %")
    if drawn:
        areas = [LARGEST_BUBBLE * size / memory[0] for size in memory]
        colors = [FRONT if index in best else QUIET for index in range(len(points))]
        # Large ones first, so that none hides another.
        axes.scatter(*zip(*points, strict=True), s=areas, c=colors, alpha=0.45, edgecolors=colors, linewidths=1)
        axes.scatter(*zip(*points, strict=True), s=6, c=INK, zorder=4)
        axes.errorbar(*zip(*points, strict=True), yerr=_deviations(drawn), fmt="none", ecolor=INK, elinewidth=1)
        line = [points[index] for index in best]
        axes.plot(*zip(*line, strict=True), drawstyle="steps-post", color=FRONT, linewidth=1.5, label="Pareto front")
        least, most = min(x for x, _ in points), max(x for x, _ in points)
        axes.set_xlim(least / 1.8, most * 1.8)
        _plain_ticks(axes.xaxis)
        for size in (memory[0] / 4, memory[0]):
            area = LARGEST_BUBBLE * size / memory[0]
            axes.scatter([], [], s=area, c=QUIET, alpha=0.45, label=f"{_mebi(size)} peak memory")
        one = drawn[0][0]
        title = f"{one.task}, {one.config}, {one.steps} steps of {one.batch_size}; {one.hardware}"
        axes.set_title(title + (f"\nnot drawn: {', '.join(absent)}" if absent else ""), loc="left", fontsize=9)
        figure.legend(
            loc="outside lower center", ncols=3, frameon=False, fontsize=8, handletextpad=1.4, borderpad=2.0, columnspacing=4.0
        )
    axes.margins(y=0.22)
    figure.draw_without_rendering()
    names, steps = [group[0].layer for group in drawn], [points[index] for index in best]
    # An area in square points is that of the square around the bubble.
    radii = [math.sqrt(LARGEST_BUBBLE * size / memory[0]) / 2 for size in memory]
    _place_labels(axes, canvas.get_renderer(), points, names, steps, radii)
    if path is not None:
        figure.savefig(path, format="png")
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
    figure, _, _ = _figure((12, 0.8 + 3.1 * max(1, len(modes))), panels=0)
    names = list(dict.fromkeys(layer_label(row, rows) for row in rows))
    columns = (("median_ms", "time, ms", 1.0), ("peak_bytes", "peak memory, MiB", 2.0**20))
    for index, mode in enumerate(modes):
        for place, (column, label, unit) in enumerate(columns):
            axes = figure.add_subplot(len(modes), 2, 2 * index + place + 1)
            _style(axes)
            axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel=label)
            axes.set_title(mode, loc="left", fontsize=10)
            for number, name in enumerate(names):
                found = [row for row in rows if row.mode == mode and layer_label(row, rows) == name and getattr(row, column)]
                found = sorted(found, key=lambda row: row.length)
                points = [(row.length, getattr(row, column) / unit) for row in found]
                if not points:
                    continue
                bold = found[0].layer == found[0].baseline
                color = INK if bold else COLORS[number % len(COLORS)]
                marker, dash = MARKERS[number // len(COLORS) % len(MARKERS)], DASHES[number // len(COLORS) % len(DASHES)]
                power = slope(points)
                label = name if power is None else f"{name}, slope {power:.2f}"
                words = dict(color=color, marker=marker, markersize=4)
                axes.plot(*zip(*points, strict=True), dash, linewidth=2.2 if bold else 1.3, label=label, zorder=3, **words)
                hollow = [point for point, row in zip(points, found, strict=True) if row.status != "ok"]
                if hollow:
                    axes.plot(*zip(*hollow, strict=True), linestyle="none", markerfacecolor="white", zorder=4, **words)
            lengths = sorted({row.length for row in rows})
            axes.set_xlim(lengths[0] / 1.15, lengths[-1] * 1.15)
            axes.set_xticks(lengths)
            low, high = axes.get_ylim()
            if high < 4 * low:  # else a difference of one part in a hundred would look large
                axes.set_ylim(math.sqrt(low * high) / 2, math.sqrt(low * high) * 2)
            axes.xaxis.set_major_formatter(lambda value, _: length_label(round(value)))
            axes.xaxis.set_minor_locator(_null())
            _plain_ticks(axes.yaxis)
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if rows:
        one = rows[0]
        hollow = any(row.status != "ok" and row.peak_bytes for row in rows)
        figure.suptitle(
            f"{one.model}, batch {one.batch_size}, {one.dtype}; {one.hardware}" + "; hollow: did not run" * hollow,
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
    if path is not None:
        figure.savefig(path, format="png")
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


def _figure(size: tuple[float, float], panels: int = 1):
    """(figure, its canvas, its one panel or None)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot() if panels else None
    if axes is not None:
        _style(axes)
    return figure, canvas, axes


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


def _null():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _mean(rows: Sequence[Result], name: str) -> float:
    return statistics.mean(getattr(row, name) for row in rows)


def _deviations(drawn: Sequence[Sequence[Result]]) -> list[float]:
    """Standard deviations of accuracy over seeds, in per cent; 0 of one seed."""
    return [100 * statistics.stdev(row.accuracy for row in group) if len(group) > 1 else 0.0 for group in drawn]


def _mebi(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _place_labels(axes, renderer, points, names, steps, radii=None) -> None:
    """Puts each name beside its point, inside, where it covers no other name, no point, no floor and no front.

    Points may be bubbles of `radii`, in points, which names stay outside of.
    """
    bubbles = [] if radii is None else [radius * axes.figure.dpi / 72 for radius in radii]
    centres = list(axes.transData.transform(points)) if bubbles else []
    marks = [axes.transData.transform(point) for point in points]
    corners = [corner for one, two in itertools.pairwise(steps) for corner in (one, (two[0], one[1]), two)]
    for one, two in itertools.pairwise(axes.transData.transform(corner) for corner in corners):
        marks += [one + (two - one) * part / 60 for part in range(61)]
    floors = [line.get_window_extent(renderer).y0 for line in axes.lines if line.get_linestyle() in (":", "--")]
    inside, taken = axes.get_window_extent(renderer), []
    line = dict(arrowstyle="-", color=QUIET, linewidth=0.6, shrinkA=0, shrinkB=3)
    for index, (point, name) in enumerate(zip(points, names, strict=True)):
        scored = []
        for order, near in enumerate(PLACES):
            grown = 1 + (radii[index] - 4) / math.hypot(*near) if radii else 1.0
            place = (near[0] * grown, near[1] * grown)
            across = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
            text = axes.annotate(
                name, point, xytext=place, textcoords="offset points", ha=across, va="center", fontsize=9, color=INK
            )
            box = text.get_window_extent(renderer).padded(2)
            covered = sum(box.overlaps(other) for other in taken)
            covered += sum(box.contains(*mark) for mark in marks)
            others = zip(centres[:index] + centres[index + 1 :], bubbles[:index] + bubbles[index + 1 :], strict=True)
            covered += sum(_distance(box, centre) < bubble for centre, bubble in others)
            crossed = sum(box.y0 <= height <= box.y1 for height in floors)
            outside = not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
            scored.append(((covered, outside, crossed, order), place, box))
            text.remove()
            if not (covered or outside or crossed):
                break
        _, place, box = min(scored, key=lambda one: one[0])
        across = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
        far = max(map(abs, place)) > 20 + (radii[index] if radii else 0)
        axes.annotate(
            name, points[index], xytext=place, textcoords="offset points", ha=across, va="center", fontsize=9,
            color=INK, arrowprops=line if far else None,
        )  # fmt: skip
        taken.append(box)


def _distance(box, point) -> float:
    """From a point to the nearest edge of a box, 0 inside of it."""
    across, up = (max(low - at, 0, at - high) for low, high, at in zip(box.min, box.max, point, strict=True))
    return math.hypot(across, up)


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of labels that cover each other."""
    from matplotlib.text import Text

    renderer, boxes = figure.canvas.get_renderer(), []
    for text in figure.axes[0].texts:
        text.update_positions(renderer)
        # As plain text: an annotation's own extent includes the line to its point.
        boxes.append((text.get_text(), Text.get_window_extent(text, renderer)))
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]
