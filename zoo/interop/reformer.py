"""Reformers: reversible layers of hashing and of local attention, whose two streams are both kept to the end."""

import functools
from collections.abc import Mapping
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels.patterns import CAUSAL, Band, InBlocks
from subquad.zoo import reversible
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.checks import refuse
from subquad.zoo.interop.loading import OWNER, Names, Source, layer, read
from subquad.zoo.interop.published import LanguageHead, Published, PublishedEncoder, set_epsilon

LAYER = "encoder.layers.*"
NAMES: Names = {
    "encoder.embed": "embeddings.word_embeddings",
    "encoder.positions": "embeddings.position_embeddings.embedding",
    **{
        f"encoder.positions.{name}": Source(
            (f"embeddings.position_embeddings.weights.{i}",), lambda table: table.reshape(-1, table.shape[-1])
        )
        for i, name in enumerate(("rows", "columns"))
    },
    "encoder.blocks.*.mixer_norm": f"{LAYER}.attention.layer_norm",
    "encoder.blocks.*.mixer.query.kernel": Source(
        tuple(f"{LAYER}.attention.self_attention.{name}.weight" for name in ("query_key", "query")), np.transpose
    ),
    "encoder.blocks.*.mixer.key": f"{LAYER}.attention.self_attention.key",
    "encoder.blocks.*.mixer.value": f"{LAYER}.attention.self_attention.value",
    "encoder.blocks.*.mixer.out": f"{LAYER}.attention.output.dense",
    "encoder.blocks.*.mlp_norm": f"{LAYER}.feed_forward.layer_norm",
    "encoder.blocks.*.mlp.inner": f"{LAYER}.feed_forward.dense.dense",
    "encoder.blocks.*.mlp.outer": f"{LAYER}.feed_forward.output.dense",
    "encoder.norm": "encoder.layer_norm",
    "head.out": "lm_head.decoder",
    "head.bias": Source(("lm_head.decoder.bias", "lm_head.bias")),
}


class ChunkAttention(Attention):
    """Causal softmax attention to the chunk of the query and to so many chunks before it.

    Args:
        chunk_size: tokens of a chunk.
        chunks_before: chunks before that of the query.
        shell: see `Attention`.
    """

    supports = Support(cost="T", bidirectional=False, is_pattern=True, rotary=True)

    def __init__(
        self, num_heads: int, in_features: int, *, chunk_size: int, chunks_before: int, is_causal: bool = True, rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):  # fmt: skip
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        self.sees = InBlocks(chunk_size, Band(chunks_before, 0)) & CAUSAL


class AxialPositions(nnx.Module):
    """Embeddings of positions t of which one part follows from t // C, and the other from t % C.

    Args:
        shape: numbers R and C of embeddings of the two kinds.
        features: of each kind.
    """

    def __init__(self, shape: tuple[int, int], features: tuple[int, int], *, param_dtype: Any, rngs: nnx.Rngs):
        draw = nnx.initializers.normal(1.0)
        self.rows, self.columns = (
            nnx.Param(draw(rngs.params(), ends, param_dtype)) for ends in zip(shape, features, strict=True)
        )

    def __call__(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        row, column = jnp.divmod(positions, self.columns.shape[0])
        return jnp.concatenate([self.rows[...][row], self.columns[...][column]], axis=-1)


class ReformerEncoder(PublishedEncoder):
    """`PublishedEncoder` of reversible layers whose result is both streams: tokens [B, T] -> features [B, T, 2 D]."""

    def __init__(self, *, epsilon: float, rngs: nnx.Rngs, **options):
        super().__init__(reversible=True, epsilon=epsilon, rngs=rngs, **options)
        dtypes = {word: options[word] for word in ("dtype", "param_dtype")}
        self.norm = nnx.LayerNorm(2 * self.in_features, **dtypes, rngs=rngs)
        set_epsilon(self, epsilon)

    def run_blocks(self, hidden, call, deterministic, rngs):
        first, second, losses = reversible.streams(self.layers, hidden, call, deterministic, rngs)
        return jnp.concatenate([first, second], axis=-1).astype(hidden.dtype), losses


def build(config: Mapping[str, Any], options: Mapping[str, Any], *, has_head: bool, rngs: nnx.Rngs, **dtypes) -> Published:
    of = functools.partial(read, config)
    kinds, is_causal = of("attn_layers"), of("is_decoder")
    heads = dict(
        num_heads=of("num_attention_heads"), qkv_features=of("num_attention_heads") * of("attention_head_size"), use_bias=False,
        is_causal=is_causal,
    )  # fmt: skip
    layers = []
    for kind in kinds:
        if kind == "local":
            # What is not causal sees the last chunk from the first one.
            of("is_decoder", among=(True,))
            own = dict(chunk_size=of("local_attn_chunk_length"), chunks_before=of("local_num_chunks_before"))
            layers.append(layer(ChunkAttention, heads | own, options))
            continue
        buckets = of("num_buckets")
        if buckets is None:
            refuse(OWNER, "config['num_buckets']", None, "be even, or a list of even factors",
                   "transformers sets it by the first call: to a power of 2 near 2 T / lsh_attn_chunk_length.")
        own = dict(
            num_hashes=of("num_hashes"), num_buckets=buckets if isinstance(buckets, int) else tuple(buckets),
            chunk_size=of("lsh_attn_chunk_length"), chunks_before=of("lsh_num_chunks_before"),
            chunks_after=of("lsh_num_chunks_after"), scale=1.0, reach="ring", correct_duplicates=False,
        )  # fmt: skip
        layers.append(layer(ReformerAttention, heads | own, options))
    is_axial = of("axial_pos_embds")
    encoder = ReformerEncoder(
        vocab_size=of("vocab_size"), in_features=of("hidden_size"), num_layers=len(kinds), mlp_features=of("feed_forward_size"),
        max_length=1 if is_axial else of("max_position_embeddings"), mixer=layers, dropout_rate=of("hidden_dropout_prob"),
        activation=of("hidden_act"), inner_dropout=of("hidden_dropout_prob"), epsilon=of("layer_norm_eps"), rngs=rngs, **dtypes,
    )
    if is_axial:
        shape, features = tuple(of("axial_pos_shape")), tuple(of("axial_pos_embds_dim"))
        positions: Any = AxialPositions(shape, features, param_dtype=dtypes["param_dtype"], rngs=rngs)
        encoder.positions, encoder.max_length = positions, min(of("max_position_embeddings"), shape[0] * shape[1])
    if not has_head:
        return Published(encoder, None)
    head = LanguageHead(
        2 * of("hidden_size"), of("vocab_size"), activation=None, has_norm=False, is_tied=False, rngs=rngs, **dtypes
    )
    return Published(encoder, head)
