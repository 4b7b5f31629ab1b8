"""Fixed patterns: windows, blocks, strides, BigBird."""

import numpy as np

from peers import Contest, dense
from peers.sides import Case, jax_side, layer_side, make_layer, mechanism_side, torch_side

WINDOW, BLOCK, STRIDE = 128, 128, 128
BIGBIRD_BLOCK, BIGBIRD_RANDOM = 64, 3


def ours_local(case: Case, is_causal: bool):
    from subquad.kernels import softmax

    attend = lambda q, k, v: softmax.attention(q, k, v, window_size=WINDOW, is_causal=is_causal)
    return jax_side(case, attend, case.draw(3))


def local_attention(case: Case, is_causal: bool, exact: bool):
    from local_attention import LocalAttention

    layer = LocalAttention(
        WINDOW, causal=is_causal, look_backward=1, look_forward=0 if is_causal else 1, exact_windowsize=exact,
        use_rotary_pos_emb=False,
    )  # fmt: skip
    return torch_side(case, layer, case.draw(3), heads_first=True)


def longformer(case: Case):
    import torch
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=case.width, num_attention_heads=case.heads, attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = LongformerSelfAttention(config, layer_id=0)
    mask = torch.zeros(case.batch, case.length)
    none = torch.zeros(case.batch, case.length, dtype=torch.bool)

    def call(tokens):
        return layer(
            tokens, attention_mask=mask, is_index_masked=none, is_index_global_attn=none, is_global_attn=False
        )[0]  # fmt: skip

    return torch_side(case, call, [case.tokens()], layer)


def ours_blockwise(case: Case):
    layer = make_layer(case, "blockwise", max_length=case.length, block_size=BLOCK, shifts=[0] * case.heads)
    return mechanism_side(case, layer)


def local_blocks(case: Case):
    from local_attention import LocalAttention

    layer = LocalAttention(BLOCK, look_backward=0, look_forward=0, use_rotary_pos_emb=False)
    return torch_side(case, layer, case.draw(3), heads_first=True)


def ours_bigbird(case: Case):
    """Query, key and value projections, and attention over BigBird's lists of blocks."""
    import jax.numpy as jnp

    from subquad.kernels import block_sparse

    count, rng = case.length // BIGBIRD_BLOCK, np.random.default_rng(0)
    blocks = np.full((case.heads, count, count), -1)
    blocks[:, (0, count - 1)] = np.arange(count)
    for head in range(case.heads):
        for row in range(1, count - 1):
            near = {0, count - 1, row - 1, row, row + 1}
            far = rng.permutation([block for block in range(count) if block not in near])[:BIGBIRD_RANDOM]
            found = sorted({*near, *far.tolist()})
            blocks[head, row, : len(found)] = found
    weights = case.draw(3, (case.width, case.heads, case.features))

    def attend(tokens, *weights):
        heads = [jnp.einsum("btd,dnh->btnh", tokens, weight / case.width**0.5) for weight in weights]
        return block_sparse.attention(*heads, blocks, block_size=BIGBIRD_BLOCK)

    return jax_side(case, attend, [case.tokens(), *weights])


def bigbird(case: Case):
    import torch
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=case.width, num_attention_heads=case.heads, block_size=BIGBIRD_BLOCK, num_random_blocks=BIGBIRD_RANDOM,
        attention_probs_dropout_prob=0.0, max_position_embeddings=case.length,
    )  # fmt: skip
    layer = BigBirdBlockSparseAttention(config, seed=0).train()  # in eval() its random blocks are all block 0
    given = torch.ones(case.batch, case.length, dtype=getattr(torch, case.dtype))
    blocked, band, before, after = BigBirdModel.create_masks_for_block_sparse_attn(given, BIGBIRD_BLOCK)
    call = lambda tokens: layer(
        tokens, band_mask=band, from_mask=before, to_mask=after, from_blocked_mask=blocked, to_blocked_mask=blocked
    )[0]  # fmt: skip
    return torch_side(case, call, [case.tokens()], layer)


def ours_strided(case: Case):
    layer = make_layer(case, "strided", stride=STRIDE, is_causal=True)
    return mechanism_side(case, layer)


CONTESTS = [
    Contest(
        "local", f"local-attention, {word}", "local-attention", lambda case, c=causal: ours_local(case, c),
        lambda case, c=causal: local_attention(case, c, exact=False),
        note=f"window {WINDOW}; theirs sees whole blocks, up to {2 * WINDOW - 1} keys on a side",
    )
    for word, causal in (("full", False), ("causal", True))
] + [
    Contest(
        "local", "local-attention, full, exact window", "local-attention", lambda case: ours_local(case, False),
        lambda case: local_attention(case, False, exact=True), same=True, note=f"window {WINDOW} on each side",
    ),
    Contest(
        "local", "Longformer layer", "transformers",
        lambda case: layer_side(case, make_layer(case, "local", window_size=WINDOW)), longformer,
        note=f"window {WINDOW} on each side; ours has the output projection too",
    ),
    Contest(
        "blockwise", "local-attention, own block", "local-attention", ours_blockwise, local_blocks, same=True,
        note=f"block {BLOCK}, the identity permutation",
    ),
    Contest(
        "blockwise", "BigBird layer", "transformers", ours_bigbird, bigbird,
        note=f"block {BIGBIRD_BLOCK}, {BIGBIRD_RANDOM} random; theirs and ours without the output projection",
    ),
    Contest(
        "strided", "fused SDPA, causal", "torch", ours_strided, lambda case: dense.sdpa(case, True),
        note=f"stride {STRIDE}; PyPI has no strided attention, so dense attention is the peer",
    ),
]  # fmt: skip
