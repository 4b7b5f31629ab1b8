"""Fixed patterns: windows, blocks, strides, axes, global tokens, random blocks."""

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
    layer = make_layer(
        case, "bigbird", max_length=case.length, block_size=BIGBIRD_BLOCK, num_random=BIGBIRD_RANDOM
    )
    return layer_side(case, layer)


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


def ours_axial(case: Case):
    layer = make_layer(case, "axial", row_length=int(case.length**0.5), use_bias=False)
    return layer_side(case, layer)


def axial_attention(case: Case):
    from axial_attention import AxialAttention

    side = int(case.length**0.5)
    layer = AxialAttention(case.width, heads=case.heads)
    call = lambda tokens: layer(tokens.reshape(case.batch, side, side, case.width)).reshape(tokens.shape)
    return torch_side(case, call, [case.tokens()], layer)


def longt5(case: Case):
    import torch
    from transformers import LongT5Config
    from transformers.models.longt5.modeling_longt5 import LongT5TransientGlobalAttention

    config = LongT5Config(
        d_model=case.width, d_kv=case.features, num_heads=case.heads, local_radius=WINDOW - 1, dropout_rate=0.0,
    )  # fmt: skip
    layer = LongT5TransientGlobalAttention(config, has_relative_attention_bias=True)
    real = torch.ones(case.batch, case.length)
    return torch_side(case, lambda tokens: layer(tokens, real)[0], [case.tokens()], layer)


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
        "bigbird", "Hugging Face layer", "transformers", ours_bigbird, bigbird,
        note=f"block {BIGBIRD_BLOCK}, {BIGBIRD_RANDOM} random; ours has the output projection too",
    ),
    Contest(
        "strided", "fused SDPA, causal", "torch", ours_strided, lambda case: dense.sdpa(case, True),
        note=f"stride {STRIDE}; PyPI has no strided attention, so dense attention is the peer",
    ),
    Contest(
        "axial", "axial-attention layer", "axial-attention", ours_axial, axial_attention,
        note="the rows and columns of a square; theirs has projections for each of the two, ours one set",
    ),
    Contest(
        "longt5", "Hugging Face layer", "transformers",
        lambda case: layer_side(case, make_layer(case, "longt5", radius=WINDOW - 1, use_bias=False)), longt5,
        note=f"radius {WINDOW - 1}, a transient global token for 16",
    ),
]  # fmt: skip
