"""LSH attention."""

from peers import Contest
from peers.sides import Case, layer_side, make_layer, mechanism_side, torch_side

CHUNK, HASHES = 64, 4
OPTIONS = dict(chunk_size=CHUNK, num_hashes=HASHES)


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
]  # fmt: skip
