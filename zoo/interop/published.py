"""What published encoders have around their layers: `Encoder` with other embeddings and networks, and a language head."""

from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo import positions as encodings
from subquad.zoo.block import FeedForward
from subquad.zoo.checks import check_word, refuse
from subquad.zoo.encoder import Encoder, EncoderOptions, check_tokens

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_fast": nnx.gelu,
    "gelu_new": nnx.gelu,
    "gelu_pytorch_tanh": nnx.gelu,
    "relu": nnx.relu,
    "silu": nnx.silu,
    "swish": nnx.silu,
    "tanh": jnp.tanh,
}


class ScaledEmbed(nnx.Embed):
    """An embedding whose vectors are multiplied by a number where tokens become features, and not where they become logits."""

    def __init__(self, num_embeddings: int, features: int, scale: float, **options):
        super().__init__(num_embeddings, features, **options)
        self.scale = scale

    def __call__(self, inputs):
        return self.scale * super().__call__(inputs)


class PublishedEncoder(Encoder):
    """`Encoder` with token types, a norm and a linear map behind the embeddings, and other feed-forward networks.

    Args:
        token_types: number of them; 0: none.
        embed_norm, embed_map: after the sum of embeddings stands a layer norm, and then a linear map.
        embed_scale: of the token embeddings, before the sum.
        activation, is_gated, use_bias, inner_dropout: of the networks; see `FeedForward`.
        epsilon: of all norms.
        encoder: the options of `Encoder`.
    Call:
        token_types: [B, T] integers; None: all 0. The rest as in `Encoder`, without segment_ids.
    """

    def __init__(
        self, *, token_types: int = 0, embed_norm: bool = False, embed_map: bool = False, embed_scale: float = 1.0,
        activation: str, is_gated: bool = False, use_bias: bool = True, inner_dropout: float = 0.0, epsilon: float,
        rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions],
    ):  # fmt: skip
        check_word("from_huggingface", "the activation", activation, ACTIVATIONS)
        features = encoder["in_features"]
        param_dtype = encoder.get("param_dtype", jnp.float32)
        options: dict[str, Any] = dict(dtype=encoder.get("dtype"), param_dtype=param_dtype, rngs=rngs)
        if embed_scale != 1:
            vocab_size: Any = encoder["vocab_size"]
            encoder["embed"] = ScaledEmbed(vocab_size, features, embed_scale, **options)
        super().__init__(**encoder, rngs=rngs)
        self.token_types = nnx.Embed(token_types, features, **options) if token_types else None
        self.embed_norm = nnx.LayerNorm(features, **options) if embed_norm else None
        self.embed_map = nnx.Linear(features, features, **options) if embed_map else None
        blocks: Any = self.blocks
        for block in blocks if encoder["mlp_features"] else ():
            block.mlp = FeedForward(
                features, encoder["mlp_features"], activation=ACTIVATIONS[activation], is_gated=is_gated, use_bias=use_bias,
                dropout_rate=inner_dropout, **options,
            )
        set_epsilon(self, epsilon)

    def embed_at(self, tokens, positions, mask, token_types: Int[Array, "B T"] | None = None) -> Float[Array, "B T D"]:
        hidden = super().embed_at(tokens, positions, mask)
        if self.token_types is not None:
            hidden += self.token_types(jnp.zeros_like(tokens) if token_types is None else token_types)
        hidden = hidden if self.embed_norm is None else self.embed_norm(hidden)
        hidden = hidden if self.embed_map is None else self.embed_map(hidden)
        return hidden if mask is None else jnp.where(mask[..., None], hidden, 0)

    def __call__(  # type: ignore[override]  # no segment_ids: some of the layers could not honour them
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T F"]:
        self.check(tokens, mask)
        if token_types is not None:
            if self.token_types is None:
                refuse("PublishedEncoder", "token_types", "an array", "be None", "This checkpoint has no token types.")
            check_tokens("PublishedEncoder", "token_types", token_types, mask, vocab_size=self.token_types.num_embeddings)
        hidden = self.embed_at(tokens, encodings.positions_of_real(tokens, mask), mask, token_types)
        return self.transform(hidden, mask, None, deterministic, rngs)[0]


class LanguageHead(nnx.Module):
    """Logits of the vocabulary: a linear map and an activation and a norm, where they are, then a linear map with a bias.

    Args:
        in_features: features of the encoder.
        vocab_size: logits.
        activation: after a linear map of its own; None: there is no such map.
        has_norm: a layer norm follows.
        is_tied: the last map is the token embedding, transposed.
        epsilon: of the norm.
    """

    def __init__(
        self, in_features: int, vocab_size: int, *, activation: str | None, has_norm: bool, is_tied: bool,
        epsilon: float = 1e-6, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if activation is not None:
            check_word("from_huggingface", "the activation", activation, ACTIVATIONS)
        self.activation = activation
        self.dense = None if activation is None else nnx.Linear(in_features, in_features, **options)
        self.norm = nnx.LayerNorm(in_features, epsilon=epsilon, **options) if has_norm else None
        self.out = None if is_tied else nnx.Linear(in_features, vocab_size, use_bias=False, **options)
        self.bias = nnx.Param(jnp.zeros(vocab_size, param_dtype))

    def __call__(self, hidden: Float[Array, "B T F"], embed: nnx.Embed) -> Float[Array, "B T vocab"]:
        if self.activation is not None and self.dense is not None:
            hidden = ACTIVATIONS[self.activation](self.dense(hidden))
        hidden = hidden if self.norm is None else self.norm(hidden)
        logits = embed.attend(hidden) if self.out is None else self.out(hidden)
        return logits + self.bias[...].astype(logits.dtype)


class Published(nnx.Module):
    """A published encoder, and its language head where it has one: tokens [B, T] -> logits [B, T, vocab_size], or features.

    Args:
        encoder: tokens -> features [B, T, F].
        head: None: the features are the result.
    Call: as of `PublishedEncoder`.
    """

    def __init__(self, encoder: PublishedEncoder, head: LanguageHead | None):
        self.encoder, self.head = encoder, head

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        token_types: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T F"]:
        hidden = self.encoder(tokens, mask=mask, token_types=token_types, deterministic=deterministic, rngs=rngs)
        return hidden if self.head is None else self.head(hidden, self.encoder.embed)


def set_epsilon(model: nnx.Module, epsilon: float) -> None:
    """The epsilon of all norms of a model."""
    for _, node in nnx.iter_modules(model):
        if isinstance(node, nnx.LayerNorm | nnx.RMSNorm):
            node.epsilon = epsilon
