"""Random features and linear attention."""

from peers import Contest
from peers.sides import Case, make_layer, mechanism_side, torch_side

FEATURES = 256


def ours(case: Case, kernel: str, is_causal: bool):
    layer = make_layer(case, "performer", num_features=FEATURES, kernel=kernel, is_causal=is_causal)
    return mechanism_side(case, layer)


def performer(case: Case, kernel: str, is_causal: bool):
    from performer_pytorch import FastAttention

    layer = FastAttention(
        case.features, nb_features=FEATURES, causal=is_causal, generalized_attention=kernel == "relu"
    )
    return torch_side(case, layer, case.draw(3), heads_first=True)


def ours_efficient(case: Case, is_causal: bool):
    return mechanism_side(case, make_layer(case, "efficient", is_causal=is_causal))


def linear_transformer(case: Case, is_causal: bool):
    from linear_attention_transformer import linear_attention_transformer as theirs

    attend = theirs.causal_linear_attn if is_causal else theirs.linear_attn
    return torch_side(case, attend, case.draw(3), heads_first=True)


def ours_linear(case: Case):
    return mechanism_side(case, make_layer(case, "linear", is_causal=True))


def fast_transformers(case: Case):
    """As its CausalLinearAttention, which beside this needs all the package's extensions."""
    import torch
    from fast_transformers.causal_product import causal_dot_product
    from torch.nn.functional import elu

    def attend(query, key, value):
        query, key = elu(query) + 1, elu(key) + 1
        total = torch.einsum("nhti,nhti->nht", query, key.cumsum(2)) + 1e-6
        return causal_dot_product(query, key, value) / total[..., None]

    return torch_side(case, attend, case.draw(3), heads_first=True)


CONTESTS = [
    Contest(
        "performer", f"performer-pytorch, {kernel}, {word}", "performer-pytorch",
        lambda case, k=kernel, c=causal: ours(case, k, c), lambda case, k=kernel, c=causal: performer(case, k, c),
        note=f"{FEATURES} features", longest=4096 if causal else None,
        why="it needs 128 states per feature and value at once, 10 GB at 16384" if causal else "",
    )
    for kernel, word, causal in (("softmax", "full", False), ("relu", "full", False), ("softmax", "causal", True))
] + [
    Contest(
        "efficient", f"linear-attention-transformer, {word}", "linear-attention-transformer",
        lambda case, c=causal: ours_efficient(case, c), lambda case, c=causal: linear_transformer(case, c), note=note,
    )
    for word, causal, note in (
        ("full", False, ""),
        ("causal", True, "theirs sees whole blocks of 64 before a query's own, ours every key up to it"),
    )
] + [
    Contest(
        "linear", "fast-transformers, causal", "pytorch-fast-transformers", ours_linear, fast_transformers, same=True,
        note="its sums are a loop over tokens in C++",
    )
]  # fmt: skip
