"""Transformer-XL: Hugging Face's, which transformers had before version 5."""

from peers import Contest
from peers.sides import Case, jax_side, layer_side, make_layer, torch_side

SEGMENT = 512


def ours_segments(case: Case):
    return layer_side(case, make_layer(case, "transformer_xl", segment_length=SEGMENT, memory_length=SEGMENT, use_bias=False))


def ours_memory(case: Case):
    """One segment with a memory as long as itself, by the layer's own projections."""
    import jax.numpy as jnp
    from flax import nnx

    from subquad.kernels import relative
    from subquad.zoo.positions import sinusoidal

    layer = make_layer(case, "transformer_xl", segment_length=case.length, memory_length=case.length, use_bias=False)
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)
    encoding = sinusoidal(jnp.arange(2 * case.length), layer.position_features)

    def attend(parameters, tokens, memory, rest, encoding):
        layer, seen = nnx.merge(graph, parameters, rest), jnp.concatenate([memory, tokens], axis=1)
        heads = relative.attention(
            layer.query(tokens), layer.key(seen), layer.value(seen), layer.relative(encoding), layer.content_bias[...],
            layer.position_bias[...],
        )  # fmt: skip
        return layer.out(heads)

    tokens, memory = case.draw(2, (case.batch, case.length, case.width))
    return jax_side(case, lambda p, x, c: attend(p, x, *c), (parameters, tokens), ((jnp.asarray(memory), rest, encoding),))


def theirs(case: Case, segment: int, with_memory: bool):
    """Segment after segment, each with the one before as its memory; `with_memory`: the first has one, too."""
    import torch
    from transformers.models.deprecated.transfo_xl.modeling_transfo_xl import (
        PositionalEmbedding,
        RelPartialLearnableMultiHeadAttn,
    )

    segment, kind = min(segment, case.length), getattr(torch, case.dtype)
    layer = RelPartialLearnableMultiHeadAttn(case.heads, case.width, case.features, dropout=0.0)
    for bias in (layer.r_r_bias, layer.r_w_bias):
        torch.nn.init.normal_(bias, std=0.02)
    positions = PositionalEmbedding(case.width)
    tokens, memory = case.draw(2, (case.batch, case.length, case.width))
    memory = torch.from_numpy(memory[:, :segment]).to(kind).transpose(0, 1) if with_memory else None

    def setting(past):
        keys = past + segment
        encoding = positions(torch.arange(keys - 1, -1, -1.0)).to(kind)
        return encoding, torch.triu(torch.ones(segment, keys), diagonal=1 + past)[:, :, None]

    settings = {past: setting(past) for past in ({segment} if with_memory else {0, segment})}

    def call(tokens):
        past, outputs = memory, []
        for part in tokens.transpose(0, 1).split(segment):
            encoding, mask = settings[0 if past is None else segment]
            outputs.append(layer(part, encoding, attn_mask=mask, mems=past)[0])
            past = part.detach()
        return torch.cat(outputs).transpose(0, 1)

    return torch_side(case, call, [tokens], layer)


CONTESTS = [
    Contest(
        "transformer_xl", f"Hugging Face layer, segments of {SEGMENT}", "transformers", ours_segments,
        lambda case: theirs(case, SEGMENT, with_memory=False),
        note=f"memory {SEGMENT}; theirs adds residual and normalisation",
    ),
    Contest(
        "transformer_xl", "Hugging Face layer, memory = T", "transformers", ours_memory,
        lambda case: theirs(case, case.length, with_memory=True), longest=4096,
        why="its scores alone take 8 GB a copy at 16384", note="one segment; theirs adds residual and normalisation",
    ),
]  # fmt: skip
