"""The encoder of LongT5: norms before the sums, no positions but the biases of its layers, which all share the first one's."""

import functools
from collections.abc import Mapping
from typing import Any

from flax import nnx

from subquad.zoo.checks import refuse
from subquad.zoo.interop.loading import OWNER, Names, Source, layer, read
from subquad.zoo.interop.published import Published, PublishedEncoder
from subquad.zoo.patterns.longt5 import EPSILON, LongT5Attention

KINDS = {"local": "LocalSelfAttention", "transient-global": "TransientGlobalSelfAttention"}


def names(config: Mapping[str, Any]) -> Names:
    attention = f"encoder.block.*.layer.0.{KINDS[read(config, 'encoder_attention_type', among=tuple(KINDS))]}"
    is_gated = read(config, "feed_forward_proj").startswith("gated-")
    network = "encoder.block.*.layer.1.DenseReluDense"
    return {
        "encoder.embed.embedding": Source(("shared.weight", "encoder.embed_tokens.weight")),
        **{f"encoder.blocks.*.mixer.{ours}": f"{attention}.{ours[0]}" for ours in ("query", "key", "value", "out")},
        "encoder.blocks.*.mixer.bias": Source((f"{attention}.relative_attention_bias.weight",)),
        "encoder.blocks.*.mixer.global_bias": Source((f"{attention}.global_relative_attention_bias.weight",)),
        "encoder.blocks.*.mixer.global_scale": Source((f"{attention}.global_input_layer_norm.weight",)),
        "encoder.blocks.*.mixer_norm": "encoder.block.*.layer.0.layer_norm",
        "encoder.blocks.*.mlp.gate": f"{network}.wi_1",
        "encoder.blocks.*.mlp.inner": f"{network}.{'wi_0' if is_gated else 'wi'}",
        "encoder.blocks.*.mlp.outer": f"{network}.wo",
        "encoder.blocks.*.mlp_norm": "encoder.block.*.layer.1.layer_norm",
        "encoder.norm": "encoder.final_layer_norm",
    }


def build(config: Mapping[str, Any], options: Mapping[str, Any], *, has_head: bool, rngs: nnx.Rngs, **dtypes) -> Published:
    of = functools.partial(read, config)
    if of("layer_norm_epsilon") != EPSILON:
        refuse(OWNER, "config['layer_norm_epsilon']", of("layer_norm_epsilon"), f"be {EPSILON}", "So it is in the layer.")
    is_global = of("encoder_attention_type", among=tuple(KINDS)) == "transient-global"
    own = dict(
        num_heads=of("num_heads"), qkv_features=of("num_heads") * of("d_kv"), use_bias=False, radius=of("local_radius"),
        block_size=of("global_block_size") if is_global else None, num_buckets=of("relative_attention_num_buckets"),
        max_distance=of("relative_attention_max_distance"),
    )  # fmt: skip
    kind = of("feed_forward_proj")
    encoder = PublishedEncoder(
        vocab_size=of("vocab_size"), in_features=of("d_model"), num_layers=of("num_layers"), mlp_features=of("d_ff"),
        max_length=0, mixer=layer(LongT5Attention, own, options), positions=None, norm="rms", dropout_rate=of("dropout_rate"),
        activation="gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"), is_gated=kind.startswith("gated-"),
        use_bias=False, inner_dropout=of("dropout_rate"), epsilon=of("layer_norm_epsilon"), rngs=rngs, **dtypes,
    )
    first: Any = encoder.blocks[0].mixer
    for block in encoder.blocks:
        for name in ("bias", "global_bias"):
            if hasattr(first, name):
                setattr(block.mixer, name, getattr(first, name))
    return Published(encoder, None)
