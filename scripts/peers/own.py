"""Our layers against our own dense softmax, and what each needs at 64K tokens."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, mechanism_side

# Name in the table: layer, its options (of the length), and whether it is causal.
LAYERS = {
    "blockwise": ("blockwise", lambda length: dict(max_length=length, block_size=128), False),
    "local": ("local", lambda length: dict(window_size=128), False),
    "strided": ("strided", lambda length: dict(stride=128), True),
    "reformer": ("reformer", lambda length: dict(chunk_size=64, num_hashes=4), False),
    "linformer": ("linformer", lambda length: dict(max_length=length, num_landmarks=256), False),
    "performer": ("performer", lambda length: dict(num_features=256), False),
    "performer, causal": ("performer", lambda length: dict(num_features=256), True),
    "transformer_xl": ("transformer_xl", lambda length: dict(segment_length=512, memory_length=512), True),
    "s4": ("s4", lambda length: dict(state_size=64), True),
    "s4, diagonal": ("s4", lambda length: dict(state_size=64, mode="diagonal"), True),
}
LONG = dict(length=65536, heads=8, dtype="bfloat16")


def layer(case: Case, title: str):
    name, options, is_causal = LAYERS[title]
    return make_layer(case, name, is_causal=is_causal, **options(case.length))


def mechanism(case: Case, title: str):
    """Query, key and value in, heads out, where the layer is made so."""
    return mechanism_side(case, layer(case, title), 2 if LAYERS[title][0] == "reformer" else 3)


def softmax(case: Case, is_causal: bool):
    return layer_side(case, make_layer(case, "softmax", is_causal=is_causal))


CONTESTS = [
    Contest(
        "own", f"our softmax layer against {title}", "subquad", lambda case, t=title: layer_side(case, layer(case, t)),
        lambda case, c=causal: softmax(case, c), devices=("cpu", "gpu"), note="causal" if causal else "",
    )
    for title, (_, _, causal) in LAYERS.items()
] + [
    Contest("memory", f"{title}, layer", "", lambda case, t=title: layer_side(case, layer(case, t)), None, fixed=LONG)
    for title in LAYERS
] + [
    Contest("memory", f"{title}, mechanism", "", lambda case, t=title: mechanism(case, t), None, fixed=LONG)
    for title in LAYERS if not title.startswith(("s4", "transformer_xl"))
]  # fmt: skip
