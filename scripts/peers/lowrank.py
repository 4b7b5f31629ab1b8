"""Linformer and Nystromformer."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, torch_side

LANDMARKS = 256
NYSTROM_LANDMARKS, NYSTROM_TAPS = 64, 33


def ours(case: Case):
    layer = make_layer(case, "linformer", max_length=case.length, num_landmarks=LANDMARKS, sharing="headwise")
    return layer_side(case, layer)


def linformer(case: Case):
    from linformer import LinformerSelfAttention

    layer = LinformerSelfAttention(dim=case.width, seq_len=case.length, k=LANDMARKS, heads=case.heads)
    return torch_side(case, layer, [case.tokens()], layer)


def ours_nystrom(case: Case):
    layer = make_layer(case, "nystrom", num_landmarks=NYSTROM_LANDMARKS, conv_width=NYSTROM_TAPS, use_bias=False)
    return layer_side(case, layer)


def nystrom_attention(case: Case):
    from nystrom_attention import NystromAttention

    layer = NystromAttention(
        dim=case.width, dim_head=case.features, heads=case.heads, num_landmarks=NYSTROM_LANDMARKS,
        residual_conv_kernel=NYSTROM_TAPS,
    )  # fmt: skip
    return torch_side(case, layer, [case.tokens()], layer)


def hugging_face(case: Case):
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=case.width, num_attention_heads=case.heads, num_landmarks=NYSTROM_LANDMARKS,
        segment_means_seq_len=case.length, conv_kernel_size=NYSTROM_TAPS, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = NystromformerSelfAttention(config)
    return torch_side(case, lambda tokens: layer(tokens)[0], [case.tokens()], layer)


NYSTROM = f"{NYSTROM_LANDMARKS} landmarks, {NYSTROM_TAPS} taps"
CONTESTS = [
    Contest("linformer", "linformer layer", "linformer", ours, linformer, note=f"{LANDMARKS} landmarks, E and F for all heads"),
    Contest("nystrom", "nystrom-attention layer", "nystrom-attention", ours_nystrom, nystrom_attention, note=NYSTROM),
    Contest(
        "nystrom", "Hugging Face layer", "transformers", ours_nystrom, hugging_face,
        note=f"{NYSTROM}; ours has the output projection too",
    ),
]  # fmt: skip
