"""Accuracy against cost: the plot of a table of results."""

import itertools
import os
import statistics
from collections.abc import Iterable, Sequence

from subquad.lra.results import Result, groups

# Where a label may stand around its point, in points, nearest first.
PLACES = [
    (radius * x, radius * y)
    for radius in (9, 16, 24, 34, 46, 60)
    for x, y in ((1, 0), (-1, 0), (0.7, 0.9), (-0.7, 0.9), (0.7, -0.9), (-0.7, -0.9), (0, 1.1), (0, -1.1))
]
INK, QUIET, FRONT = "#1b1b1b", "#767676", "#0b5fa5"


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    every = groups(rows)
    drawn = [group for group in ([row for row in rows if row.status == "ok"] for rows in every) if group]
    drawn = [group for group in drawn if group[0].flops_per_step]
    failed = sorted({row.layer for group in every for row in group if row.status != "ok"})

    points = [
        (statistics.mean(row.flops_per_step for row in group), 100 * statistics.mean(row.accuracy for row in group))
        for group in drawn
    ]
    spread = [100 * statistics.stdev(row.accuracy for row in group) if len(group) > 1 else 0.0 for group in drawn]
    best = front(points)
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs per training step")
    axes.set_ylabel("test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
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


def _place_labels(axes, renderer, points, names, steps) -> None:
    """Puts each name beside its point, inside, where it covers no other name, no point, no floor and no front."""
    marks = [axes.transData.transform(point) for point in points]
    corners = [corner for one, two in itertools.pairwise(steps) for corner in (one, (two[0], one[1]), two)]
    for one, two in itertools.pairwise(axes.transData.transform(corner) for corner in corners):
        marks += [one + (two - one) * part / 60 for part in range(61)]
    floors = [line.get_window_extent(renderer).y0 for line in axes.lines if line.get_linestyle() in (":", "--")]
    inside, taken = axes.get_window_extent(renderer), []
    line = dict(arrowstyle="-", color=QUIET, linewidth=0.6, shrinkA=0, shrinkB=3)
    for index, (point, name) in enumerate(zip(points, names, strict=True)):
        scored = []
        for order, place in enumerate(PLACES):
            across = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
            text = axes.annotate(
                name, point, xytext=place, textcoords="offset points", ha=across, va="center", fontsize=9, color=INK
            )
            box = text.get_window_extent(renderer).padded(2)
            covered = sum(box.overlaps(other) for other in taken)
            covered += sum(box.contains(*mark) for mark in marks)
            crossed = sum(box.y0 <= height <= box.y1 for height in floors)
            outside = not (inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1)
            scored.append(((covered, outside, crossed, order), place, box))
            text.remove()
            if not (covered or outside or crossed):
                break
        _, place, box = min(scored, key=lambda one: one[0])
        across = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
        far = max(map(abs, place)) > 20
        axes.annotate(
            name, points[index], xytext=place, textcoords="offset points", ha=across, va="center", fontsize=9,
            color=INK, arrowprops=line if far else None,
        )  # fmt: skip
        taken.append(box)


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of labels that cover each other."""
    from matplotlib.text import Text

    renderer, boxes = figure.canvas.get_renderer(), []
    for text in figure.axes[0].texts:
        text.update_positions(renderer)
        # As plain text: an annotation's own extent includes the line to its point.
        boxes.append((text.get_text(), Text.get_window_extent(text, renderer)))
    return [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.overlaps(two)]
