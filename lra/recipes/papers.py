"""Recipes of papers after the Long Range Arena: the small model of 2 x 64 that four share, and S4's."""

import math
from typing import Any

from subquad.lra.recipes.arena import ATTENTION
from subquad.lra.recipes.base import BLACK, DRAWN, HELD_OUT, Recipe

PICTURES = ("image", "pathfinder")
PATH_X = ("pathfinder/128_hard", "pathfinder/release_128_hard")
# Training examples, of which epochs are made.
EXAMPLES = {
    "listops": 96_000, "text": 22_500, "retrieval": 147_086, "image": 45_000, "pathfinder": 160_000, "path_x": 160_000
}  # fmt: skip
CONFIGS = {"listops": "lra", "text": "modern", "retrieval": "lra", "image": "lra", "pathfinder": "32_hard"}

_HEADS = dict(num_heads=2)
_SMALL_LAYERS = {
    "softmax": _HEADS,
    "blockwise": dict(**_HEADS, max_length="{length}", block_size=64),
    "local": dict(**_HEADS, window_size=32),
    "strided": dict(**_HEADS, stride=64),
    "reformer": dict(**_HEADS, num_hashes=2, chunk_size=64),
    "linformer": dict(**_HEADS, max_length="{length}", num_landmarks=256),
    "performer": dict(**_HEADS, num_features=256, kernel="relu"),
    "transformer_xl": dict(**_HEADS, segment_length=256, memory_length=256),
    "s4": dict(state_size=64),
}
_SMALL = dict(
    in_features=64, num_layers=2, mlp_features=128, pooling="mean", positions="learned", dropout_rate=0.1, head="mlp",
    learning_rate=1e-4, schedule="linear", weight_decay=0.0, b2=0.999, clip_norm=None, selection="best", protocol="modern",
)  # fmt: skip


def _task(task: str, steps: int, batch_size: int, warmup_steps: int, **values: Any) -> dict[str, Any]:
    shared = dict(config=CONFIGS[task], steps=steps, batch_size=batch_size, warmup_steps=warmup_steps)
    return {**shared, "evaluate_every": max(50, steps // 100), **values}


# What the three share.
_SMALL_DEVIATIONS = {"image": (BLACK,), "pathfinder": (BLACK,), **DRAWN}
_ONE_CYCLE = "A linear warm-up and decay take the place of PyTorch's OneCycle."
_NYSTROMFORMER = dict(
    listops=_task("listops", 5000, 32, 1000),
    text=_task("text", 20_000, 32, 8000),
    retrieval=_task("retrieval", 30_000, 32, 800),
    image=_task("image", 35_000, 256, 175),
    pathfinder=_task("pathfinder", 62_400, 256, 312),
)
NYSTROMFORMER = Recipe(
    id="nystromformer",
    defaults=_SMALL,
    layers=_SMALL_LAYERS,
    tasks=_NYSTROMFORMER,
    equal_parameters=False,
    source="Xiong et al. 2021, arXiv 2102.03902, as in mlpen/Nystromformer@5689313",
    deviations=(_ONE_CYCLE, "Activations are float32; theirs are in half precision."),
    own_deviations=_SMALL_DEVIATIONS | {
        "text": ("Sequences have 4,096 bytes, as the paper says; their script makes 1,000 of them.",),
    },
)
SKYFORMER = Recipe(
    id="skyformer",
    defaults=_SMALL,
    layers=_SMALL_LAYERS | {
        "linformer": dict(**_HEADS, max_length="{length}", num_landmarks=128),
        "performer": dict(**_HEADS, num_features=128),
    },
    tasks=dict(
        listops=_task("listops", 50_000, 32, 1000),
        text=_task("text", 50_000, 16, 80),
        retrieval=_task("retrieval", 50_000, 16, 800, learning_rate=2e-4),
        image=_task("image", 50_000, 256, 175),
        pathfinder=_task("pathfinder", 50_000, 128, 312, learning_rate=2e-4),
    ),
    equal_parameters=False,
    source="Chen et al. 2021, arXiv 2111.00035, as in pkuzengqi/Skyformer@1a677cb",
    deviations=(
        "Which batch size is which task's is inferred from their order.",
        "The best on validation is taken of all steps; theirs stops early, at patience 10.",
    ),
    own_deviations=_SMALL_DEVIATIONS,
)  # fmt: skip
_PLAIN = "Blocks are plain ones; theirs are reversible, which saves memory."
XFORMERS = Recipe(
    id="xformers",
    defaults=_SMALL,
    layers=_SMALL_LAYERS,
    tasks=_NYSTROMFORMER | dict(
        listops=_task("listops", 10_000, 32, 1000),
        text=_task("text", 20_000, 32, 8000, in_features=256, num_layers=4, mlp_features=1024, pooling="cls"),
    ),
    # A quarter of the length.
    pairs={
        (task, "linformer"): dict(layer_options=dict(num_landmarks=landmarks))
        for task, landmarks in dict(listops=500, text=1024, retrieval=1000, image=256, pathfinder=256).items()
    } | {("text", layer): dict(layer_options=dict(num_heads=4)) for layer in ATTENTION if layer != "linformer"}
    | {("text", "linformer"): dict(layer_options=dict(num_heads=4, num_landmarks=1024))},
    equal_parameters=False,
    source="facebookresearch/xformers, the arena's configuration at the parent of 6c3890ab",
    own_deviations=_SMALL_DEVIATIONS | {
        "performer": ("Random features are fixed; theirs are drawn anew every 1000 steps.",),
        "retrieval": (_PLAIN,), "image": (_PLAIN, BLACK), "pathfinder": (_PLAIN, BLACK),
    },
)  # fmt: skip


def _epochs(task: str, epochs: int, batch_size: int) -> int:
    return epochs * math.ceil(EXAMPLES[task] / batch_size)


# What the configurations of S4 share.
_AFTER = "The norm stands before the mixer; theirs stands after it."
_CHARACTERS = "Tokens are bytes, and none ends a text; theirs are characters with an end."
_STATE_SPACE_DEVIATIONS = DRAWN | {
    "listops": ("No token ends an expression; theirs has one.",),
    "text": (HELD_OUT, _CHARACTERS),
    "retrieval": (_CHARACTERS,),
    "image": ("Pixels are scaled to -1..1; theirs are normalised by their mean and deviation.",),
}


def _state_space(
    id: str, defaults: dict, layer: dict, rows: dict[str, dict], options: dict[str, dict], source: str,
    deviations: tuple[str, ...], own: dict[str, tuple[str, ...]],
) -> Recipe:
    """A recipe of one layer, from a row of values and of layer options for each task; "path_x" is a configuration."""
    defaults = dict(
        mlp_features=0, pooling="mean", positions=None, dropout_rate=0.0, decay="all", b2=0.999, clip_norm=None,
        selection="best", protocol="modern", head="linear",
    ) | defaults  # fmt: skip
    tasks: dict[str, dict] = {}
    for task, row in rows.items():
        # All values: else those of Pathfinder would hold for Path-X, too.
        values = {**defaults, **row, "layer_options": options.get(task, {})}
        # A plateau's patience counts epochs.
        epoch = math.ceil(EXAMPLES[task] / values["batch_size"])
        values["evaluate_every"] = epoch if values["schedule"] == "plateau" else max(100, values["steps"] // 100)
        values["inputs"] = "continuous" if task in (*PICTURES, "path_x") else "tokens"
        for key in PATH_X if task == "path_x" else (task,):
            tasks[key] = values if task == "path_x" else {"config": CONFIGS[task], **values}
    own = {key: own.get(key, ()) + _STATE_SPACE_DEVIATIONS.get(key, ()) for key in {**own, **_STATE_SPACE_DEVIATIONS}}
    return Recipe(id, defaults, {"s4": layer}, False, source, tasks=tasks, deviations=deviations, own_deviations=own)


def _row(num_layers: int, in_features: int, batch_size: int, learning_rate: float, steps: int, warmup: int, **other):
    sizes = dict(num_layers=num_layers, in_features=in_features, batch_size=batch_size)
    return dict(**sizes, learning_rate=learning_rate, steps=steps, warmup_steps=warmup, **other)


# Step sizes are learned at the rate of all other parameters on tokens, at that of the state spaces on pixels.
_FAST_STEPS = dict(step_learning_rate=0.01)


_S4_SOURCE = "state-spaces/s4@e757cef, configs/experiment/lra"
_LAYER_NORM = "Layer norm takes the place of batch norm."
S4 = _state_space(
    "s4",
    dict(schedule="cosine", weight_decay=0.05, state_learning_rate=1e-3),
    {},
    dict(
        listops=_row(6, 256, 32, 0.01, 120_000, 12_000, **_FAST_STEPS),
        text=_row(6, 256, 16, 0.01, 50_000, 5000, **_FAST_STEPS),
        retrieval=_row(6, 256, 64, 0.01, 50_000, 5000, **_FAST_STEPS),
        image=_row(6, 512, 50, 0.01, 180_000, 18_000, dropout_rate=0.1),
        pathfinder=_row(6, 256, 64, 0.004, 500_000, 50_000),
        path_x=_row(6, 256, 16, 0.001, 500_000, 50_000),
    ),
    dict(
        listops=dict(state_size=4, num_ssm=1), text=dict(state_size=4, num_ssm=1), retrieval=dict(state_size=4, num_ssm=1),
        image=dict(state_size=64, num_ssm=1), pathfinder=dict(state_size=64),
        path_x=dict(state_size=64, dt_min=1e-4),
    ),
    f"Gu et al. 2022, arXiv 2111.00396, configurations of {_S4_SOURCE}",
    (_LAYER_NORM,), {"listops": (_AFTER,), "image": (_AFTER,)},
)  # fmt: skip
S4D = _state_space(
    "s4d",
    dict(schedule="cosine", weight_decay=0.05, state_learning_rate=1e-3),
    dict(state_size=64),
    dict(
        listops=_row(8, 128, 50, 0.01, 80_000, 8000, **_FAST_STEPS),
        text=_row(6, 256, 16, 0.01, 50_000, 5000, **_FAST_STEPS),
        retrieval=_row(6, 256, 64, 0.01, 50_000, 2500, **_FAST_STEPS),
        image=_row(6, 512, 50, 0.01, 180_000, 900, dropout_rate=0.1),
        pathfinder=_row(6, 256, 64, 0.004, 500_000, 2500, weight_decay=0.03, pooling="last"),
        path_x=_row(6, 256, 16, 5e-4, 500_000, 10_000),
    ),
    dict(image=dict(num_ssm=2), path_x=dict(dt_min=1e-4)),
    f"Gu et al. 2022, arXiv 2206.11893, third version of the configurations of {_S4_SOURCE}",
    (), {
        **{task: (_LAYER_NORM,) for task in ("text", "retrieval", "pathfinder")},
        "listops": (_LAYER_NORM, "The warm-up is a tenth of all steps; our source does not give theirs."),
    },
)  # fmt: skip
S4_FIRST = _state_space(
    "s4-v1",
    dict(schedule="plateau", weight_decay=0.0, state_learning_rate=1e-3),
    dict(state_size=64, is_causal=True, glu=False),
    dict(
        listops=_row(6, 128, 100, 0.01, _epochs("listops", 50, 100), 0, weight_decay=0.01, patience=5),
        text=_row(4, 64, 50, 0.001, _epochs("text", 20, 50), 0, patience=5),
        retrieval=_row(6, 256, 64, 0.002, _epochs("retrieval", 20, 64), 0),
        image=_row(6, 512, 50, 0.004, _epochs("image", 200, 50), 0, dropout_rate=0.2, weight_decay=0.01),
        pathfinder=_row(6, 256, 100, 0.004, _epochs("pathfinder", 200, 100), 0, dropout_rate=0.1),
        path_x=_row(6, 256, 32, 5e-4, _epochs("path_x", 100, 32), 0, patience=20),
    ),
    dict(path_x=dict(dt_min=1e-4)),
    "Gu et al. 2022, arXiv 2111.00396, table 11",
    (), {"listops": (_LAYER_NORM, _AFTER), "text": (_LAYER_NORM,), "image": (_AFTER,)},
)  # fmt: skip
PAPERS = (NYSTROMFORMER, SKYFORMER, XFORMERS, S4, S4D, S4_FIRST)
