"""The quickstart's recipe, and that of the Long Range Arena as its code was released."""

from collections.abc import Mapping
from typing import Any

from subquad.lra.recipes.base import BLACK, DRAWN, Recipe

QUICKSTART = Recipe(
    id="quickstart",
    defaults={},
    layers={
        "softmax": dict(num_heads=4),
        "blockwise": dict(num_heads=4, max_length="{length}", block_size=32),
        "local": dict(num_heads=4, window_size=16),
        "strided": dict(num_heads=4, stride=16),
        "reformer": dict(num_heads=4, num_hashes=2, chunk_size=32),
        "linformer": dict(num_heads=4, max_length="{length}", num_landmarks=16),
        "performer": dict(num_heads=4, num_features=32),
        "transformer_xl": dict(num_heads=4, segment_length=50, memory_length=50),
        "s4": dict(state_size=16, dt_min=0.01, dt_max=0.5),
    },
    equal_parameters=True,
    source="subquad",
    # Ten times as long, so wider, too: else Linformer's projections alone would be more than the budget.
    configs={"lra": dict(in_features=128, mlp_features=512, evaluate_every=150)},
    # As long, and no wider.
    pairs={
        (task, "linformer"): dict(layer_options=dict(num_landmarks=8, sharing="key_value"))
        for task in ("text", "pathfinder", "bbc_text", "bbc_halves", "photo_patches")
    },
)

# Features D, those of all heads, heads, blocks, features of the feed-forward networks.
Size = tuple[int, int, int, int, int]
ATTENTION = (
    "softmax", "blockwise", "local", "strided", "reformer", "linformer", "performer", "transformer_xl"
)  # fmt: skip
_BASE: dict[str, Size] = {
    "listops": (512, 512, 8, 4, 1024),
    "text": (256, 256, 4, 4, 1024),
    "retrieval": (128, 128, 4, 4, 512),
    "image": (32, 32, 1, 1, 64),
    "pathfinder": (32, 16, 2, 1, 32),
    "pathfinder/64": (32, 32, 4, 2, 32),
    "pathfinder/128": (32, 16, 2, 1, 32),
    "pathfinder/256": (32, 32, 4, 2, 32),
}
_OF_LAYERS: dict[tuple[str, str], Size] = {
    ("image", "softmax"): (128, 64, 8, 1, 128),
    ("image", "local"): (128, 64, 2, 1, 128),
    ("image", "strided"): (128, 64, 8, 1, 128),
    ("image", "linformer"): (128, 64, 8, 1, 128),
    ("image", "performer"): (128, 64, 8, 1, 128),
    ("image", "reformer"): (64, 64, 8, 4, 64),
    ("pathfinder", "softmax"): (32, 16, 4, 4, 32),
    ("pathfinder", "local"): (64, 32, 4, 2, 64),
    ("pathfinder", "strided"): (32, 16, 8, 1, 32),
    ("pathfinder", "linformer"): (32, 16, 2, 1, 32),
    ("pathfinder", "performer"): (32, 16, 8, 4, 32),
    ("pathfinder", "reformer"): (64, 64, 8, 2, 64),
}
_LENGTHS = {
    "listops": 2000, "text": 1000, "retrieval": 4000, "image": 1024, "pathfinder": 1024, "pathfinder/64": 4096,
    "pathfinder/128": 16384, "pathfinder/256": 65536,
}  # fmt: skip


def _pair(task: str, layer: str) -> dict[str, Any]:
    """What the released configurations set for a task and a layer."""
    features, all_heads, heads, blocks, inner = _OF_LAYERS.get((task, layer), _BASE[task])
    all_heads = features if layer == "reformer" else all_heads  # theirs has no width of its own
    pictures = task.startswith(("image", "pathfinder"))
    block = 64 if pictures else 50
    # Their Reformer cuts every sequence of the released configurations into ten chunks.
    own = {
        "blockwise": dict(max_length="{length}", block_size=block),
        "local": dict(window_size=block // 2),
        "strided": dict(pattern="fixed", stride=50, num_summary=10),
        "reformer": dict(num_hashes=1, num_buckets=10, chunk_size=-(-_LENGTHS[task] // 10)),
        "linformer": dict(max_length="{length}", num_landmarks=16),
        "performer": dict(num_features=2) if task == "listops" else dict(num_features=all_heads // heads, kernel="relu"),
        "transformer_xl": dict(segment_length=256, memory_length=256),
    }
    # Where it is the layer's own default it follows in_features, whatever a caller makes of them.
    width = {"qkv_features": all_heads} if pictures else {}
    options = {"num_heads": heads, "use_bias": False, **width, **own.get(layer, {})}
    values = dict(in_features=features, num_layers=blocks, mlp_features=inner, layer_options=options)
    if task.startswith("pathfinder"):
        more = task == "pathfinder" and layer in ("softmax", "strided", "linformer", "reformer", "performer")
        values["dropout_rate"] = 0.2 if more else 0.1
    if (task, layer) == ("image", "local"):
        values["pooling"] = "mean"
    return values


def _spread(of: Mapping[str, Any]) -> dict[str, Any]:
    """Pathfinder's sizes stand for all difficulties and for the arena's own files."""
    found = {}
    for task, values in of.items():
        name, slash, side = task.partition("/")
        levels = ("hard", "intermediate", "easy", "hard_all_directions", "hard_10k") if slash else ()
        found |= {f"{name}/{side}_{level}": values for level in levels}
        found |= {f"{name}/release_{side}_{level}": values for level in levels[:3]}
        found |= {} if slash else {task: values}
    return found


def _pairs() -> dict[tuple[str, str], Mapping[str, Any]]:
    return {
        (task, layer): values
        for layer in ATTENTION
        for task, values in _spread({task: _pair(task, layer) for task in _BASE}).items()
    }


def _sizes(task: str) -> dict[str, int]:
    features, _, _, blocks, inner = _BASE[task]
    return dict(in_features=features, num_layers=blocks, mlp_features=inner)


_PICTURES = dict(schedule="cosine", weight_decay=0.0)
_NO_MASK = "Padding is masked out; the released layer ignores it."
# See ERRATA.md.
_OWN_DEVIATIONS: dict[str | tuple[str, str], tuple[str, ...]] = DRAWN | {
    "local": ("Neighbours are attended to, as many as the released layer's groups of 50 distant positions hold.",),
    "strided": ("The pattern looks both ways; the released code masks a dense causal attention.",),
    "linformer": ("Keys and values have a projection each; the released layer has one for both.", _NO_MASK),
    "reformer": (
        "Logits are divided by sqrt(d) and keys normalised; the released layer multiplies, and normalises nothing.", _NO_MASK,
    ),
    "performer": (_NO_MASK,),
    ("listops", "performer"): ("Random features are fixed; the released ones are drawn anew from the queries of each call.",),
    **{
        (task, "performer"): ("The ReLU is of a random projection; the released one is of the features themselves.",)
        for task in ("text", "retrieval", "image", "pathfinder")
    },
    # The released Performer drops none either.
    **{
        (task, layer): (f"Attention weights are not dropped; the released code drops {share} of them.",)
        for task, share in dict(listops=0.1, text=0.1, retrieval=0.1, image=0.2, pathfinder=0.1).items()
        for layer in ("softmax", "local", "strided", "linformer")
    },
    "text": ("Sequences have 1,000 bytes, as released; the paper took the best of 1K to 4K.",),
    "retrieval": ("Both documents reach the head; in the released code the second one does not.",),
    "image": (BLACK,),
    "pathfinder": (BLACK,),
}  # fmt: skip
_LEARNED = dict(positions="learned", position_std=0.02)

ARENA = Recipe(
    id="lra-2020",
    defaults=dict(
        config="lra", pooling="cls", positions="sinusoidal", dropout_rate=0.1, steps=5000, batch_size=32, learning_rate=0.05,
        schedule="rsqrt", warmup_steps=1000, weight_decay=0.1, decay="all", eps=1e-9, clip_norm=None, evaluate_every=50,
        selection="last", protocol="lra-2020", embedding_std=1.0, **_sizes("listops"),
    ),
    layers={layer: _pair("listops", layer)["layer_options"] for layer in ATTENTION} | {"s4": {}},
    tasks={
        "text": dict(steps=20_000, warmup_steps=8000, evaluate_every=100, **_sizes("text")),
        # Theirs names CLS and has none: the first byte is read.
        "retrieval": dict(warmup_steps=8000, evaluate_every=100, pooling="first", **_sizes("retrieval")),
        "image": dict(
            steps=35_000, batch_size=256, learning_rate=5e-4, warmup_steps=175, evaluate_every=175, dropout_rate=0.3,
            **_LEARNED, **_PICTURES, **_sizes("image"),
        ),
        "pathfinder": dict(
            config="32_hard", steps=62_400, batch_size=512, learning_rate=1e-3, warmup_steps=312, evaluate_every=312,
            pooling="mean", **_PICTURES, **_sizes("pathfinder"),
        ),
        **_spread({
            "pathfinder/64": dict(
                steps=125_000, batch_size=256, warmup_steps=625, evaluate_every=625, pooling="cls",
                **_LEARNED, **_sizes("pathfinder/64"),
            ),
            "pathfinder/128": dict(
                steps=500_000, batch_size=64, warmup_steps=2500, evaluate_every=2500, clip_norm=1.0,
                **_LEARNED, **_sizes("pathfinder/128"),
            ),
            "pathfinder/256": dict(
                steps=500_000, batch_size=32, warmup_steps=5000, evaluate_every=5000, pooling="cls",
                **_LEARNED, **_sizes("pathfinder/256"),
            ),
        }),
    },
    pairs=_pairs(),
    equal_parameters=False,
    source="Tay et al. 2020, arXiv 2011.04006, configurations released in google-research/long-range-arena@cd31e5c",
    deviations=(
        "Sizes and schedules are of the released configurations; the paper's appendix has others.",
        "Every test example counts; the released code drops the last partial batch.",
    ),
    own_deviations=_OWN_DEVIATIONS,
)  # fmt: skip
