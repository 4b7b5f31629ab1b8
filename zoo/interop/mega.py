"""Mega as it is published: the norm within the layer, so that its residual branch is of what was not normed."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.zoo.block import NORMS
from subquad.zoo.interop.loading import Names, Source, layer, read
from subquad.zoo.interop.published import LanguageHead, Published, PublishedEncoder
from subquad.zoo.statespace.mega import Mega

EPSILON = 1e-5
# A scale norm is an RMS norm with one number for all features. What transformers calls "rmsnorm" does not divide at all.
KINDS = {"layernorm": "layer", "scalenorm": "rms"}


class NormedMega(Mega):
    """What `Mega` of the norm of x adds to x itself: phi * (h - x), so that a block without a norm before it gives Mega's y.

    Args:
        norm: a key of `NORMS`.
        mega: see `Mega`.
    """

    def __init__(self, in_features: int, *, norm: str, rngs: nnx.Rngs, **mega):
        super().__init__(in_features, rngs=rngs, **mega)
        self.norm = NORMS[norm](in_features, dtype=mega.get("dtype"), param_dtype=self.param_dtype, rngs=rngs)

    def normed(self, inputs, is_real):
        hidden = self.norm(inputs)
        return hidden if is_real is None else jnp.where(is_real[..., None], hidden, 0)

    def finish(self, inputs, responses):
        return super().finish(inputs, responses) - inputs


class Identity(nnx.Module):
    """In the place of a norm, where there is none."""

    def __call__(self, inputs):
        return inputs


def spread(count: int):
    """The one number of a scale norm for all features."""
    return lambda scalar: np.broadcast_to(np.asarray(scalar).reshape(-1)[:1], count)


def longest(config: Mapping[str, Any]) -> int:
    """The tokens that a table of distances is for; it has room for max_positions, of which in chunks the first are used."""
    size = read(config, "chunk_size")
    return read(config, "max_positions") if size < 0 else size


AVERAGE = dict(
    damping="damping_factor", decay="decay_factor", expansion="ema_expansion_matrix", reduction="kernel_projection_matrix",
)  # fmt: skip


def names(config: Mapping[str, Any]) -> Names:
    of = functools.partial(read, config)
    inside, behind = "layers.*.mega_layer", "layers.*.nffn"
    features, states, directions = of("hidden_size"), of("ema_projection_size"), 2 if of("bidirectional") else 1
    by_direction = lambda table: np.reshape(table, (directions, features, states))
    scalars = {
        f"encoder.blocks.*.{ours}.scale": Source((f"{theirs}.norm.norm.scalar",), spread(features))
        for ours, theirs in (("mixer.norm", inside), ("mlp_norm", behind))
    }
    pair = (f"{inside}.rel_pos_bias.alpha", f"{inside}.rel_pos_bias.b_param")
    return {
        "encoder.embed": "embedding_layer.word_embeddings",
        "encoder.token_types": "embedding_layer.token_type_embeddings",
        **{
            f"encoder.blocks.*.mixer.{ours}": Source((f"{inside}.ema_gate.{theirs}",), by_direction)
            for ours, theirs in AVERAGE.items()
        },
        "encoder.blocks.*.mixer.skip": Source((f"{inside}.ema_gate.residual_weight",)),
        "encoder.blocks.*.mixer.query_key_scale": Source((f"{inside}.qk_weight",)),
        "encoder.blocks.*.mixer.query_key_shift": Source((f"{inside}.qk_bias",)),
        "encoder.blocks.*.mixer.distances": Source(
            (f"{inside}.rel_pos_bias.rel_pos_bias",), lambda table: table[: 2 * longest(config) - 1]
        ),
        "encoder.blocks.*.mixer.rotated": Source(pair, np.concatenate, together=True),
        "encoder.blocks.*.mixer.value": f"{inside}.v_proj",
        "encoder.blocks.*.mixer.mixed": f"{inside}.mx_proj",
        "encoder.blocks.*.mixer.hidden": f"{inside}.h_proj",
        "encoder.blocks.*.mixer.norm": f"{inside}.norm.norm",
        "encoder.blocks.*.mlp_norm": f"{behind}.norm.norm",
        "encoder.blocks.*.mlp.inner": f"{behind}.fc1",
        "encoder.blocks.*.mlp.outer": f"{behind}.fc2",
        "head.dense": "dense",
        "head.out.kernel": Source(("mlm_head.weight", "lm_head.weight"), np.transpose),
        "head.bias": Source(("mlm_head.bias", "lm_head.bias")),
        **(scalars if of("normalization_type") == "scalenorm" else {}),
    }


def build(config: Mapping[str, Any], options: Mapping[str, Any], *, has_head: bool, rngs: nnx.Rngs, **dtypes) -> Published:
    of = functools.partial(read, config)
    of("activation", among=("silu", "swish"))
    of("norm_affine", among=(True,))
    of("truncation", None, among=(None,))
    of("add_cross_attention", False, among=(False,))
    of("normalize_before_mega", among=(True,))
    of("normalize_before_ffn", among=(True,))
    is_causal = of("is_decoder", False)
    of("bidirectional", among=(not is_causal,))
    norm: Any = KINDS[of("normalization_type", among=tuple(KINDS))]
    bias, has_chunks = of("relative_positional_bias", among=("rotary", "simple")), of("use_chunking")
    own = dict(
        norm=norm, state_size=of("ema_projection_size"), shared_features=of("shared_representation_size"),
        value_features=of("intermediate_size"), function=of("attention_activation", among=("softmax", "relu2", "laplace")),
        bias=bias, chunk_size=of("chunk_size") if has_chunks else None, is_causal=is_causal,
        max_length=longest(config) if bias == "simple" and not has_chunks else None,
    )  # fmt: skip
    encoder = PublishedEncoder(
        vocab_size=of("vocab_size"), in_features=of("hidden_size"), num_layers=of("num_hidden_layers"),
        mlp_features=of("nffn_hidden_size") if of("use_normalized_ffn") else 0, max_length=0,
        mixer=layer(NormedMega, own, options), positions=None, norm=norm, dropout_rate=of("dropout_prob"),
        activation=of("activation"), inner_dropout=of("nffn_activation_dropout_prob"), epsilon=EPSILON,
        token_types=of("type_vocab_size") if of("add_token_type_embeddings") else 0, rngs=rngs, **dtypes,
    )
    encoder.norm, blocks = None, list[Any](encoder.blocks)
    for block in blocks:
        block.mixer_norm = Identity()
    if not has_head:
        return Published(encoder, None)
    head = LanguageHead(
        of("hidden_size"), of("vocab_size"), activation="tanh" if of("add_lm_hidden_dense_layer") else None, has_norm=False,
        is_tied=of("tie_word_embeddings", True), rngs=rngs, **dtypes,
    )
    return Published(encoder, head)
