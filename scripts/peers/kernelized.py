"""Random features and linear attention."""

from peers import Contest
from peers.sides import Case, jax_side, make_layer, mechanism_side, torch_side

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


def ours_linear(case: Case, is_causal: bool):
    """Features as linear-attention-transformer's: a softmax over the features of a query, exponentials of a key."""
    import jax

    from subquad.kernels import linear

    def attend(query, key, value):
        largest = jax.lax.stop_gradient(key.max(-1, keepdims=True))
        # As a matrix: sums over the last of several axes take XLA ten times as long where there is one sample.
        query = jax.nn.softmax(query.reshape(-1, query.shape[-1])).reshape(query.shape)
        key = jax.numpy.exp(key - largest)
        return linear.attention(query, key, value, key_log_scale=largest[..., 0], is_causal=is_causal)

    return jax_side(case, attend, case.draw(3))


def linear_transformer(case: Case, is_causal: bool):
    from linear_attention_transformer import linear_attention_transformer as theirs

    attend = theirs.causal_linear_attn if is_causal else theirs.linear_attn
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
        "linear", f"linear-attention-transformer, {word}", "linear-attention-transformer",
        lambda case, c=causal: ours_linear(case, c), lambda case, c=causal: linear_transformer(case, c), note=note,
    )
    for word, causal, note in (
        ("full", False, "theirs normalises each feature of the keys, ours each query"),
        ("causal", True, "theirs sees whole blocks of 64 before a query's own, ours every key up to it"),
    )
]  # fmt: skip
