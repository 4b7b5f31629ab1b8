"""The cells of published tables: the run that answers to each figure, or why there is none."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad import zoo
from subquad.lra import recipes
from subquad.lra.report import published

# Points. One seed was published without a deviation; this is the spread that re-runs of these models show.
TOLERANCE = 2.0
# Where a deviation was published twice that is tolerated, and never less than this.
LEAST_TOLERANCE = 1.0
# Of a ratio of speeds or of memory, as a factor: machines differ.
RATIO_TOLERANCE = 1.25
CHANCE = 50.0  # of Path-X, in per cent
# Tokens of a trained model's further tests, also of one whose cost is quadratic: of 32K, 500 examples take Mamba 3 minutes.
LONGEST_TEST, LONGEST_QUADRATIC_TEST = 32_768, 2048
# What a table's column is called -> the task and its configuration, where the name alone does not say.
COLUMNS = {
    "path_x": ("pathfinder", "128_hard"), "path_256": ("pathfinder", "256_hard"),
    **{name: ("mad", name) for name in ("compression", "fuzzy_recall", "in_context_recall", "memorisation", "noisy_recall")},
    "mad_selective_copy": ("mad", "selective_copy"),  # Mamba's paper has a task of this name, too
}  # fmt: skip
NAMES = {
    "listops": "ListOps", "text": "Text", "retrieval": "Retrieval", "image": "Image", "pathfinder": "Pathfinder",
    "path_x": "Path-X", "path_256": "Path-256", "average": "Average", "all": "All tasks",
    "mad_selective_copy": "selective copy",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What answers to the rows of a table that one model makes.

    Attributes:
        recipe, layer, layer_options: what `plan.plan` takes; recipe None: nothing here answers, and `cannot` says why.
        values: more of what it takes.
        note: what the published model computes, where that is not what its name says.
    """

    recipe: str | None = None
    layer: str | None = None
    layer_options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    cannot: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell(published.Figure):
    """One cell of a published table: the figure, its note also of what the published model really computed, and what answers.

    Attributes:
        id: paper, table, row, task and metric, in lower case.
        recipe, layer, overrides: what `plan.plan` takes; recipe None: see `cannot`.
        tolerance: a difference up to it counts as reproduced; a factor for ratios.
        source: of the figure.
        cannot: why no run here answers to it.
        deviations: what that run does otherwise than the paper, a sentence each.
    """

    id: str
    recipe: str | None
    layer: str | None
    overrides: Mapping[str, Any]
    tolerance: float
    source: str
    cannot: str = ""
    deviations: tuple[str, ...] = ()


def _none(reason: str) -> Answer:
    return Answer(cannot=reason)


_NO_LAYER = _none("no such layer here")
_ARENA_LAYERS = {
    "Transformer": "softmax",
    "Local Attention": "local",
    "Sparse Transformer": "strided",
    "Longformer": "longformer",
    "BigBird": "bigbird",
    "Linformer": "linformer",
    "Reformer": "reformer",
    "Sinkhorn Transformer": "sinkhorn",
    "Synthesizer": "synthesizer",
    "Linear Transformer": "linear",
    "Performer": "performer",
}
_ARENA = {row: Answer("lra-2020", layer) for row, layer in _ARENA_LAYERS.items()}
# The model of table 2 is that of Text, whatever the length. What the arena emulates by masks it does not time.
_SPEED = {row: Answer("bench", layer) for row, layer in _ARENA_LAYERS.items() if layer not in ("strided", "longformer")}


_USUAL_LAYERS = {"Linformer": "linformer", "Performer": "performer", "Reformer": "reformer"}
_OF_SKYFORMER = {
    "BigBird": "bigbird", "Nystromformer": "nystrom", "Kernelized Attention": "kernelized", "Skyformer": "skyformer",
} | _USUAL_LAYERS  # fmt: skip


def _rows(recipe: str, layers: Mapping[str, str]) -> dict[str, Answer]:
    return {row: Answer(recipe, layer) for row, layer in layers.items()}


_S4_ROWS = {
    "S4 (original, v1)": Answer("s4-v1", "s4"),
    "S4 (updated, = S4-LegS)": Answer("s4d", "s4"),  # S4-LegS of the paper of S4D: the same numbers
    "Nystromformer": Answer("nystromformer", "nystrom"),
    "FNet": _none("its sizes and schedule on the arena are not in what was read"),
    "Random": _none("a guess, and no model"),
    "Luna-256 (v1)": _none("its sizes are not in what was read"),
}
_DIAGONAL = "The released kernel leaves out half of B that the theorem has; here it is there."
_DRAWN_OTHERWISE = "How B and C were drawn for this Lambda is not in what was read."
_UNKNOWN = "the size of its model is not in what was read"
_OWN_RESIDUAL = _none("its layer is its own residual branch, and every block here adds another")
_MEAN = _none("a mean over levels of difficulty, each at the best of six rates and decays; --recipe mad trains one of them")
_MACHINE = _none("an absolute time or memory of its authors' machine; subquad bench has this machine's")

# (paper, table) -> row -> what answers. A row that is not there has no layer here.
ANSWERS: dict[tuple[str, str], dict[str, Answer]] = {
    ("lra", "1"): _ARENA,
    ("lra", "2"): _SPEED,
    ("lra", "3"): _ARENA,
    ("lra", "a2"): {},
    ("s4", "10"): _ARENA | _S4_ROWS,
    ("s4", "3"): _rows("bench", {
        "Transformer": "softmax", "Linear Transformer": "linear", "Performer": "performer", "S4": "s4",
    }),
    ("s4", "2"): {"S4": _MACHINE},
    ("s4", "repository"): {"S4 (repo, approximate)": Answer("s4", "s4")},
    ("s4", "s4d"): {
        "S4-LegS": Answer("s4d", "s4"),
        "S4D-LegS": Answer("s4d", "s4", dict(mode="diagonal", init="legs"), _DIAGONAL),
        "S4D-Inv": Answer("s4d", "s4", dict(mode="diagonal", init="inv")),
        "S4D-Lin": Answer("s4d", "s4", dict(mode="diagonal", init="lin")),
    },
    ("s5", "1"): {"S5": Answer("s5", "s5")},
    ("s5", "inits"): {
        "S5-Inv init": Answer("s5", "s5", dict(init="inv"), _DRAWN_OTHERWISE),
        "S5-Lin init": Answer("s5", "s5", dict(init="lin"), _DRAWN_OTHERWISE),
    },
    ("s5", "v1"): {"S5 (v1)": _none("its configurations are not in what was read")},
    ("mega", "2"): {
        "Transformer (re-implemented)": Answer("bench", "softmax"),
        "Reformer": Answer("bench", "reformer"),
        "Linformer": Answer("bench", "linformer"),
        "Performer": Answer("bench", "performer"),
        "Luna-256": Answer("bench", "luna", note="Its packed tokens go from layer to layer."),
        "S4-v2 (re-run)": Answer("s4", "s4"),
        **dict.fromkeys(("Mega", "Mega-chunk"), _OWN_RESIDUAL),
    },
    ("mega", "3"): {f"Mega, attention fn {function}": _OWN_RESIDUAL for function in ("softmax", "relu2", "laplace")},
    ("nystromformer", "3"): _rows("nystromformer", {
        "Transformer (2-layer, d=64)": "softmax", "Linformer-256": "linformer", "Performer-256": "performer",
        "Reformer-2": "reformer", "Nystromformer-64": "nystrom",
    }),
    ("skyformer", "1"): _rows("skyformer", {"Self-Attention": "softmax", **_OF_SKYFORMER}) | {
        "Informer": Answer("skyformer", "informer", note="Its factor is not in what was read."),
    },
    ("skyformer", "2"): dict.fromkeys(("Informer", "Self-Attention", *_OF_SKYFORMER), _MACHINE),
    ("xformers", "1"): _rows("xformers", {
        "Standard": "softmax", "Linformer-seq/4 (no redraw)": "linformer", "Favor-256 (redraw)": "performer",
        "Nystromformer-128": "nystrom",
    }) | {"FourierMix": _none("it transforms each head of projected inputs, and a linear map follows: not FNet's layer")},
    ("flashattention", "3"): _rows("nystromformer", {"Transformer": "softmax", **_USUAL_LAYERS}) | {
        "FlashAttention": Answer("nystromformer", "softmax", note="The same function as softmax attention."),
        "Linear Attention": Answer("nystromformer", "linear"),
        "Smyrf": Answer("nystromformer", "smyrf", note="Its rounds and clusters are not in what was read."),
        "Local Attention": Answer("nystromformer", "local", note="The window's size is not in what was read."),
    },
    ("flashattention", "6"): {"FlashAttention": _none(_UNKNOWN)},
    ("mamba", "11"): {
        "MHA-Abs": Answer("mamba", "softmax"),
        "MHA-RoPE": Answer(
            "mamba", "softmax", dict(rotary_base=10_000), values=dict(positions=None, steps=409_600),
        ),
        "H3": Answer("mamba", "h3"),
        "Hyena": _none("its filters end at the length that was trained"),
        "Mamba": Answer("mamba", "mamba"),
    },
    ("mamba", "1"): _rows("mamba", {"S4": "s4", "H3": "h3", "H3, Hyena": "hyena", "Mamba": "mamba"}) | dict.fromkeys(
        ("S6", "H3, S6", "Mamba, S4", "Mamba, Hyena"), _none("one layer inside another's block: no such layer here")
    ),
    ("state-tracking", "3"): _rows("state-tracking", {"Transformer": "softmax", "mLSTM": "mlstm", "Mamba [0, 1]": "mamba"}) | {
        "DeltaNet [0, 1]": Answer("state-tracking", "deltanet"),
        "DeltaNet [-1, 1]": Answer("state-tracking", "deltanet", dict(negative_eigenvalues=True)),
        "Mamba [-1, 1]": _none("its decays are the exponentials of the paper, which are positive"),
    },
    ("mad", "deltanet"): dict.fromkeys(("Transformer", "Hyena", "Mamba", "GLA", "DeltaNet"), _MEAN),
}  # fmt: skip


def _cell(source: published.Source, figure: published.Figure, transformer: Mapping[int | None, float]) -> Cell:
    answer = ANSWERS[source.paper, source.table].get(figure.row, _NO_LAYER)
    if figure.metric == "memory" and figure.length is not None:
        # Bytes of another machine say little; against the Transformer's they can be compared.
        note = _joined(f"{figure.value:g} {figure.unit}", figure.note)
        ratio = figure.value / transformer[figure.length]
        figure = dataclasses.replace(figure, note=note, metric="memory_ratio", unit="ratio", value=ratio)
    measured = figure.unit == "ratio" and figure.length is not None
    cannot = answer.cannot or _unanswered(figure, measured, answer)
    task, config = COLUMNS.get(figure.task, (figure.task, None))
    overrides = {"task": task, "config": config, "layer_options": answer.layer_options}
    metric = figure.metric if figure.metric != "accuracy" else None
    words = (source.paper, source.table, figure.row, figure.task, figure.length, metric)
    tolerance = TOLERANCE if figure.deviation is None else max(LEAST_TOLERANCE, 2 * figure.deviation)
    deviations: tuple[str, ...] = ()
    if not cannot and not measured:
        rules = recipes.RECIPES[answer.recipe]
        config = config or rules.config(task, answer.layer) or ""
        deviations = rules.differences(task, config, answer.layer)
    return Cell(
        **{**vars(figure), "note": _joined(answer.note, figure.note)},
        id=".".join(re.sub("[^a-z0-9]+", "_", str(word).lower()).strip("_") for word in words if word is not None),
        recipe=None if cannot else "bench" if measured else answer.recipe, layer=None if cannot else answer.layer,
        overrides={} if cannot else {name: value for name, value in overrides.items() if value} | dict(answer.values),
        tolerance=RATIO_TOLERANCE if measured else tolerance,
        source=f"{source.work}{f', arXiv {source.arxiv}' * bool(source.arxiv)}, table {source.table}, row {figure.row}",
        cannot=cannot, deviations=deviations,
    )  # fmt: skip


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _unanswered(figure: published.Figure, measured: bool, answer: Answer) -> str:
    """Why a figure has no answer although its row has a layer here; "" where it has one."""
    if figure.metric in ("accuracy", "train_accuracy"):
        if figure.task == "average":
            return "made of the other columns"
        longest = LONGEST_QUADRATIC_TEST if zoo.LAYERS[answer.layer].supports.cost == "T^2" else LONGEST_TEST
        if figure.length is not None and figure.length > longest:
            return f"tested up to {longest:,} tokens; subquad train --resume --test-lengths {figure.length} goes on"
        return "its schedule is not in what was read" if answer.recipe == "bench" else ""
    if measured:
        return ""
    return {
        "speed_ratio": "of no one length and task that was read",
        "compute": "counted by a tool of its authors that reads too low, as they say; subquad bench counts our models'",
    }.get(figure.metric, _MACHINE.cannot)


@functools.cache
def cells_of_table(paper: str, name: str) -> tuple[Cell, ...]:
    """The cells of one table, in its order.

    Raises: ValueError: unknown paper or table; the nearest known one is named.
    Example:
        >>> cell = cells_of_table("lra", "1")[0]
        >>> cell.id, cell.recipe, cell.layer, cell.overrides
        ('lra.1.transformer.listops', 'lra-2020', 'softmax', {'task': 'listops'})
    """
    source, found = published.find_table(paper, name)
    memory = {one.length: one.value for one in found if one.metric == "memory" and one.row == "Transformer"}
    # An absolute speed stands in the note of the ratio beside it.
    speeds = {(one.row, one.length): one for one in found if one.metric == "steps_per_second"}
    cells = []
    for figure in found:
        beside = speeds.get((figure.row, figure.length)) if figure.metric == "speed_ratio" else None
        if beside is not None:
            figure = dataclasses.replace(figure, note=_joined(f"{beside.value:g} {beside.unit}", beside.note))
        if figure not in speeds.values():
            cells.append(_cell(source, figure, memory))
    return tuple(cells)


@functools.cache
def all_cells() -> tuple[Cell, ...]:
    """The cells of all tables."""
    return tuple(cell for paper, name in published.sources() for cell in cells_of_table(paper, name))


def lengths_to_test(cell: Cell) -> list[int]:
    """The lengths of all cells that the run of this one answers to, also of those that nobody asked for now."""
    table = cells_of_table(cell.paper, cell.table)
    alike = [one for one in table if (one.recipe, one.layer, one.overrides) == (cell.recipe, cell.layer, cell.overrides)]
    return [one.length for one in alike if one.length is not None]


def _configuration(cell: Cell) -> tuple:
    """What two cells share that one run, or one measurement, answers to."""
    return cell.recipe, cell.layer, cell.length, cell.metric, json.dumps(cell.overrides, sort_keys=True)


@functools.cache
def _answered() -> Mapping[tuple, tuple[Cell, ...]]:
    found: dict[tuple, list[Cell]] = {}
    for cell in all_cells():
        if not cell.cannot:
            found.setdefault(_configuration(cell), []).append(cell)
    return {key: tuple(cells) for key, cells in found.items()}


def published_elsewhere(cell: Cell) -> tuple[Cell, ...]:
    """The cells with another published value for what answers to this one; one that is rounded more is no other.

    Example:
        >>> cell = next(one for one in cells_of_table("nystromformer", "3") if one.id.endswith("performer_256.listops"))
        >>> cell.value, [(other.paper, other.value) for other in published_elsewhere(cell)]
        (18.8, [('flashattention', 36.8)])
    """
    others = () if cell.cannot else _answered()[_configuration(cell)]
    return tuple(one for one in others if one.id != cell.id and not _same(one.value, cell.value))


def _same(one: float | None, other: float | None) -> bool:
    """Whether two printed values agree to the digits that both have."""
    if one is None or other is None:
        return one is other
    digits = min(len(f"{value:g}".partition(".")[2]) for value in (one, other))
    return abs(one - other) <= 0.51 * 10**-digits


def contradict(one: Cell, other: Cell) -> bool:
    """Whether two published values of one configuration cannot both be reproduced: no value is within both tolerances."""
    first, second = (CHANCE if cell.value is None else cell.value for cell in (one, other))
    if one.unit == "ratio":
        return max(first / second, second / first) > one.tolerance * other.tolerance
    return abs(first - second) > one.tolerance + other.tolerance
