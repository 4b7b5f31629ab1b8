"""Linformer."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, torch_side

LANDMARKS = 256


def ours(case: Case):
    layer = make_layer(case, "linformer", max_length=case.length, num_landmarks=LANDMARKS, sharing="headwise")
    return layer_side(case, layer)


def linformer(case: Case):
    from linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(dim=case.width, seq_len=case.length, k=LANDMARKS, heads=case.heads)
    return torch_side(case, layer, [case.tokens()], layer)


CONTESTS = [
    Contest("linformer", "linformer layer", "linformer", ours, linformer, note=f"{LANDMARKS} landmarks, E and F for all heads")
]
