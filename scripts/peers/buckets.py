"""Buckets: LSH, routing, sorting."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, mechanism_side, torch_side

CHUNK, HASHES = 64, 4
OPTIONS = dict(chunk_size=CHUNK, num_hashes=HASHES)
ROUTING_WINDOW, SINKHORN_BLOCK = 128, 64


def ours(case: Case, is_causal: bool):
    return mechanism_side(case, make_layer(case, "reformer", is_causal=is_causal, **OPTIONS), 2)


def lucidrains(case: Case, is_causal: bool):
    from reformer_pytorch import LSHAttention

    layer = LSHAttention(bucket_size=CHUNK, n_hashes=HASHES, causal=is_causal)
    flat = (case.batch * case.heads, case.length, case.features)
    return torch_side(case, lambda qk, v: layer(qk, v)[0], case.draw(2, flat))


def hugging_face(case: Case):
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=case.width, num_attention_heads=case.heads, attention_head_size=case.features,
        lsh_attn_chunk_length=CHUNK, num_hashes=HASHES, num_buckets=2 * case.length // CHUNK,
        lsh_attention_probs_dropout_prob=0.0, is_decoder=False, hash_seed=0,
    )  # fmt: skip
    layer = LSHSelfAttention(config)
    return torch_side(case, lambda tokens: layer(tokens).hidden_states, [case.tokens()], layer)


def ours_routing(case: Case, is_causal: bool):
    layer = make_layer(
        case, "routing", num_clusters=case.length // ROUTING_WINDOW, window_size=ROUTING_WINDOW, is_causal=is_causal
    )
    return mechanism_side(case, layer)


def routing_transformer(case: Case, is_causal: bool):
    from routing_transformer.routing_transformer import KmeansAttention

    layer = KmeansAttention(
        case.length // ROUTING_WINDOW, ROUTING_WINDOW, case.heads, case.features, causal=is_causal, num_mem_kv=0
    ).eval()  # its centroids stay where they are, as ours do in a call
    return torch_side(case, lambda q, k, v: layer(q, k, v)[0], case.draw(3), heads_first=True)


def ours_sinkhorn(case: Case, is_causal: bool):
    layer = make_layer(case, "sinkhorn", max_length=case.length, block_size=SINKHORN_BLOCK, is_causal=is_causal, use_bias=False)
    return layer_side(case, layer)


def sinkhorn_transformer(case: Case, is_causal: bool):
    from sinkhorn_transformer.sinkhorn_transformer import SinkhornSelfAttention

    layer = SinkhornSelfAttention(
        case.width, SINKHORN_BLOCK, case.length, heads=case.heads, causal=is_causal, n_sortcut=0 if is_causal else 1
    )
    return torch_side(case, layer, [case.tokens()], layer)


CONTESTS = [
    Contest(
        "reformer", f"reformer-pytorch LSH, {word}", "reformer-pytorch", lambda case, c=causal: ours(case, c),
        lambda case, c=causal: lucidrains(case, c), note=f"{HASHES} rounds, chunk {CHUNK}, hashing included",
    )
    for word, causal in (("full", False), ("causal", True))
] + [
    Contest(
        "reformer", "Hugging Face LSH layer", "transformers",
        lambda case: layer_side(case, make_layer(case, "reformer", **OPTIONS)), hugging_face,
        note=f"{HASHES} rounds, chunk {CHUNK}; ours has the output projection too",
    ),
] + [
    Contest(
        "routing", f"routing-transformer, {word}", "routing-transformer", lambda case, c=causal: ours_routing(case, c),
        lambda case, c=causal: routing_transformer(case, c), note=f"clusters of {ROUTING_WINDOW}",
    )
    for word, causal in (("full", False), ("causal", True))
] + [
    Contest(
        "sinkhorn", f"sinkhorn-transformer layer, {word}", "sinkhorn-transformer",
        lambda case, c=causal: ours_sinkhorn(case, c), lambda case, c=causal: sinkhorn_transformer(case, c), note=note,
    )
    for word, causal, note in (
        ("full", False, f"block {SINKHORN_BLOCK}; theirs scores blocks by products of their sums, ours by a network"),
        ("causal", True, f"block {SINKHORN_BLOCK}"),
    )
]  # fmt: skip
