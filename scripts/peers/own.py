"""Our layers against our own dense softmax, and what each needs at 64K tokens."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, mechanism_side

LENGTH = lambda length: dict(max_length=length)
# Name in the table: layer, its options (of the length), and whether it is causal.
LAYERS = {
    "kernelized": ("kernelized", lambda length: {}, False),
    "entmax": ("entmax", lambda length: {}, False),
    "synthesizer": ("synthesizer", LENGTH, False),
    "fnet": ("fnet", lambda length: {}, False),
    "blockwise": ("blockwise", lambda length: dict(max_length=length, block_size=128), False),
    "local": ("local", lambda length: dict(window_size=128), False),
    "diagonal": ("diagonal", lambda length: dict(window_size=128), False),
    "random": ("random", LENGTH, False),
    "strided": ("strided", lambda length: dict(stride=128), True),
    "axial": ("axial", lambda length: dict(row_length=int(length**0.5)), False),
    "global": ("global", lambda length: dict(radius=128, num_global=16), False),
    "longformer": ("longformer", lambda length: dict(window_size=128), False),
    "longt5": ("longt5", lambda length: {}, False),
    "bigbird": ("bigbird", LENGTH, False),
    "reformer": ("reformer", lambda length: dict(chunk_size=64, num_hashes=4), False),
    "routing": ("routing", lambda length: dict(num_clusters=length // 128), False),
    "sinkhorn": ("sinkhorn", LENGTH, False),
    "smyrf": ("smyrf", lambda length: {}, False),
    "informer": ("informer", lambda length: {}, False),
    "clustered": ("clustered", lambda length: {}, False),
    "linformer": ("linformer", lambda length: dict(max_length=length, num_landmarks=256), False),
    "nystrom": ("nystrom", lambda length: {}, False),
    "skyformer": ("skyformer", lambda length: {}, False),
    "luna": ("luna", lambda length: {}, False),
    "luna, causal": ("luna", lambda length: {}, True),
    "isab": ("isab", lambda length: {}, False),
    "perceiver": ("perceiver", lambda length: {}, False),
    "memory_compressed": ("memory_compressed", lambda length: {}, True),
    "h_transformer": ("h_transformer", lambda length: {}, False),
    "linear": ("linear", lambda length: {}, False),
    "linear, causal": ("linear", lambda length: {}, True),
    "performer": ("performer", lambda length: dict(num_features=256), False),
    "performer, causal": ("performer", lambda length: dict(num_features=256), True),
    "cosformer": ("cosformer", LENGTH, False),
    "efficient": ("efficient", lambda length: {}, False),
    "efficient, causal": ("efficient", lambda length: {}, True),
    "rfa": ("rfa", lambda length: {}, False),
    "rfa, causal": ("rfa", lambda length: {}, True),
    "compressive": ("compressive", lambda length: dict(segment_length=512, memory_length=512), True),
    "transformer_xl": ("transformer_xl", lambda length: dict(segment_length=512, memory_length=512), True),
    "s4": ("s4", lambda length: dict(state_size=64), True),
    "s4, diagonal": ("s4", lambda length: dict(state_size=64, mode="diagonal"), True),
    "dss": ("dss", lambda length: dict(state_size=64), True),
    "mega": ("mega", lambda length: dict(chunk_size=128), True),
    "s5": ("s5", lambda length: {}, True),
    "lru": ("lru", lambda length: {}, True),
    "rglru": ("rglru", lambda length: {}, True),
    "lightconv": ("lightconv", lambda length: {}, False),
    "dynamicconv": ("dynamicconv", lambda length: {}, False),
    "lsra": ("lsra", lambda length: {}, False),
}
# Of these what stands between the projections is a function of query, key and value alone.
MECHANISMS = ("blockwise", "local", "strided", "reformer", "linformer", "performer")
LONG = dict(length=65536, heads=8, dtype="bfloat16")


def layer(case: Case, title: str):
    name, options, is_causal = LAYERS[title]
    return make_layer(case, name, is_causal=is_causal, **options(case.length))


def mechanism(case: Case, title: str):
    """Query, key and value in, heads out."""
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
    for title, (name, *_) in LAYERS.items() if name in MECHANISMS
]  # fmt: skip
