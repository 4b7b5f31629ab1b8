"""Encoders as BERT is built, norms after the sums, with other mixers: FNet, Nystromformer, Longformer, BigBird."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import softmax
from subquad.kernels.matrix.reference import improve
from subquad.kernels.patterns import Band, Globals, InBlocks, Pattern, grid
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.dense.fnet import FNet
from subquad.zoo.dense.softmax import SoftmaxAttention
from subquad.zoo.interop.loading import Names, Source, layer, read
from subquad.zoo.interop.published import LanguageHead, Published, PublishedEncoder
from subquad.zoo.lowrank.nystrom import NystromAttention
from subquad.zoo.patterns.longformer import LongformerAttention

ENCODER: Names = {
    "encoder.embed": "embeddings.word_embeddings",
    "encoder.positions": "embeddings.position_embeddings",
    "encoder.token_types": "embeddings.token_type_embeddings",
    "encoder.embed_norm": "embeddings.LayerNorm",
    "encoder.blocks.*.mlp.inner": "encoder.layer.*.intermediate.dense",
    "encoder.blocks.*.mlp.outer": "encoder.layer.*.output.dense",
    "encoder.blocks.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
}
ATTENTION: Names = {
    **{
        f"encoder.blocks.*.mixer.{name}": f"encoder.layer.*.attention.self.{name}"
        for name in ("query", "key", "value", "query_global", "key_global", "value_global")
    },
    "encoder.blocks.*.mixer.out": "encoder.layer.*.attention.output.dense",
    "encoder.blocks.*.mixer_norm": "encoder.layer.*.attention.output.LayerNorm",
}
HEAD: Names = {
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.out": "cls.predictions.decoder",
    "head.bias": Source(("cls.predictions.bias", "cls.predictions.decoder.bias")),
}
# The first two rows of these tables stand for padding.
SHIFTED: Names = {"encoder.positions.embedding": Source(("embeddings.position_embeddings.weight",), lambda table: table[2:])}


def build(
    config: Mapping[str, Any], layers: Sequence[Callable[..., nnx.Module]], *, max_length: int, has_head: bool,
    head_activation: str | None = None, embed_map: bool = False, embed_scale: float = 1.0, rngs: nnx.Rngs, **dtypes,
) -> Published:  # fmt: skip
    """BERT with these mixers."""
    of = functools.partial(read, config)
    of("is_decoder", False, among=(False,))
    of("position_embedding_type", "absolute", among=("absolute", None))
    encoder = PublishedEncoder(
        vocab_size=of("vocab_size"), in_features=of("hidden_size"), num_layers=of("num_hidden_layers"),
        mlp_features=of("intermediate_size"), max_length=max_length, mixer=layers, norm_order="post",
        dropout_rate=of("hidden_dropout_prob"), activation=of("hidden_act"), epsilon=of("layer_norm_eps"),
        token_types=of("type_vocab_size"), embed_norm=True, embed_map=embed_map, embed_scale=embed_scale, rngs=rngs, **dtypes,
    )
    if not has_head:
        return Published(encoder, None)
    head = LanguageHead(
        of("hidden_size"), of("vocab_size"), activation=head_activation or of("hidden_act"), has_norm=True,
        is_tied=of("tie_word_embeddings", True), epsilon=of("layer_norm_eps"), rngs=rngs, **dtypes,
    )
    return Published(encoder, head)


# ------------------------------------------------------------------------------------------------------------------ FNet

FNET_NAMES: Names = {
    **ENCODER, **HEAD, "encoder.embed_map": "embeddings.projection",
    "encoder.blocks.*.mixer_norm": "encoder.layer.*.fourier.output.LayerNorm",
}


def fnet(config, options, **more) -> Published:
    layers = [layer(FNet, {}, options)] * read(config, "num_hidden_layers")
    return build(config, layers, max_length=read(config, "max_position_embeddings"), embed_map=True, **more)


# --------------------------------------------------------------------------------------------------------- Nystromformer


class NystromOfSample(NystromAttention):
    """`NystromAttention` whose iteration starts from one scale for all heads of a sample, as in the authors' code.

    There it is one of the whole batch, so that a sample's output depends on the others: this is what it gives for a batch of
    one. Six iterations do not forget where they started.
    """

    def invert(self, between):
        scale = 1 / jnp.maximum(between.sum(2).max((1, 2)), 1e-30)
        inverse = scale[:, None, None, None] * between.swapaxes(2, 3)
        for _ in range(self.num_iterations):
            inverse = improve(between, inverse)
        return inverse


NYSTROM_NAMES: Names = {
    **ENCODER, **ATTENTION, **HEAD, **SHIFTED,
    "encoder.blocks.*.mixer.taps": Source(
        ("encoder.layer.*.attention.self.conv.weight",), lambda taps: taps[:, 0, ::-1, 0].T  # theirs is a correlation
    ),
}


def nystromformer(config, options, **more) -> Published:
    of = functools.partial(read, config)
    of("inv_coeff_init_option", False, among=(False, None))
    heads: dict[str, Any] = dict(num_heads=of("num_attention_heads"))
    if of("num_landmarks") == of("segment_means_seq_len"):
        of("conv_kernel_size", None, among=(None,))  # it would be softmax attention and a convolution
        mixer = layer(SoftmaxAttention, heads, options)
    else:
        own = dict(num_landmarks=of("num_landmarks"), conv_width=of("conv_kernel_size", None))
        mixer = layer(NystromOfSample, heads | own, options)
    return build(config, [mixer] * of("num_hidden_layers"), max_length=of("max_position_embeddings"), **more)


# ------------------------------------------------------------------------------------------------------------ Longformer

LONGFORMER_NAMES: Names = {
    **ENCODER, **ATTENTION, **SHIFTED, "head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm",
    "head.out": "lm_head.decoder", "head.bias": Source(("lm_head.bias", "lm_head.decoder.bias")),
}


def longformer(config, options, **more) -> Published:
    of = functools.partial(read, config)
    of("pad_token_id", 1, among=(1,))  # positions start behind it
    count = of("num_hidden_layers")
    windows = of("attention_window")
    windows = [windows] * count if isinstance(windows, int) else windows
    own = lambda window: dict(num_heads=of("num_attention_heads"), window_size=window // 2, num_global=0)
    layers = [layer(LongformerAttention, own(window), options) for window in windows]
    return build(config, layers, max_length=of("max_position_embeddings") - 2, head_activation="gelu", **more)


# --------------------------------------------------------------------------------------------------------------- BigBird


class BigBirdOfEvaluation(Attention):
    """BigBird's attention as Hugging Face's evaluates it, with no random blocks.

        y_t = sum_s w_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s in a block of {0, i - 1, i, i + 1, n - 1},  i = t // block_size
        w_s = 1 + num_random  for s in block 0 and 0 < i < n - 1, else 1

    In evaluation its random blocks are all the first one, which is then counted so many times again; queries of the first and
    of the last block see all keys, and so do all where T <= (5 + 2 num_random) block_size. `BigBirdAttention` draws as the
    paper says, in evaluation too.

    Cost: time O(T block_size N H), memory O(T).

    Args:
        block_size: tokens of a block; the last one may be shorter.
        num_random: how often the first block counts again.
        shell: see `Attention`.
    """

    supports = Support(cost="T", causal=False, extend=False, mixes_all="all would share the first block and the last")

    def __init__(
        self, num_heads: int, in_features: int, *, block_size: int, num_random: int, is_causal: bool = False, rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):  # fmt: skip
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        self.block_size, self.num_random = block_size, num_random

    def seen(self, length: int) -> Pattern | None:
        """The pattern of an input of this length; None: all see all."""
        count = -(-length // self.block_size)
        if length <= (5 + 2 * self.num_random) * self.block_size:
            return None
        return InBlocks(self.block_size, Band(1, 1) | Globals(0, 1) | Globals(count - 1, count))

    def attend(self, query, key, value, mask):
        length, size = query.shape[1], self.block_size
        pattern = self.seen(length)
        attention = functools.partial(softmax.attention, implementation=self.implementation, return_lse=True)
        heads, lse = attention(query, key, value, mask=mask, pattern=pattern)
        if pattern is None or not self.num_random:
            return heads
        first = None if mask is None else mask[..., :size]
        again, more = attention(query, key[:, :size], value[:, :size], mask=first)
        block = np.arange(length)[None, :, None] // size
        is_inner = (block > 0) & (block < (length - 1) // size)
        more = jnp.where(is_inner, more + np.log(self.num_random), -jnp.inf)
        return softmax.merge((heads, again), (lse, more))[0]

    def pattern(self, length: int) -> np.ndarray:
        return grid(self.seen(length), length, length)


BIG_BIRD_NAMES: Names = {**ENCODER, **ATTENTION, **HEAD}


def big_bird(config, options, **more) -> Published:
    of = functools.partial(read, config)
    of("use_bias", True, among=(True,))
    heads = dict(num_heads=of("num_attention_heads"))
    if of("attention_type", among=("block_sparse", "original_full")) == "original_full":
        mixer = layer(SoftmaxAttention, heads, options)
    else:
        own = dict(block_size=of("block_size"), num_random=of("num_random_blocks"))
        mixer = layer(BigBirdOfEvaluation, heads | own, options)
    scale = of("hidden_size") ** 0.5 if of("rescale_embeddings", False) else 1.0
    count = of("num_hidden_layers")
    return build(config, [mixer] * count, max_length=of("max_position_embeddings"), embed_scale=scale, **more)
