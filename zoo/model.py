"""Models around the encoder: classifier, dual encoder, causal language model."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision
from subquad.zoo import generation, positions
from subquad.zoo.cache import KVCache
from subquad.zoo.checks import check_dtypes, check_flags, check_rngs, check_sizes, check_word, refuse
from subquad.zoo.encoder import Encoder, EncoderOptions, blocks_of_layers, first_outside, mixers_of_layers
from subquad.zoo.experts import RouterLosses

POOLINGS = ("mean", "max", "first", "last")
INTERACTIONS = {"nli": lambda a, b: [a, b, a * b, a - b], "concat": lambda a, b: [a, b]}


def pool(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None, pooling: str) -> Float[Array, "B D"]:
    """One vector per sequence, of its real tokens only: their mean or maximum, the first or the last of them; 0 of none."""
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    if pooling == "mean":
        total = jnp.sum(precision.wide(jnp.where(mask[..., None], hidden, 0)), axis=1)
        return (total / jnp.maximum(mask.sum(1, keepdims=True), 1).astype(total.dtype)).astype(hidden.dtype)
    if pooling == "max":
        top = jnp.max(jnp.where(mask[..., None], hidden, -jnp.inf), axis=1)
        return jnp.where(mask.any(1)[:, None], top, 0)
    at = jnp.argmax(mask, 1) if pooling == "first" else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.where(mask.any(1)[:, None], jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0], 0)


class Head(nnx.Module):
    """Linear maps with a ReLU between: features [B, D] -> logits [B, num_classes].

    Args:
        in_features: features D.
        hidden: features of the layers between; none: one linear map.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], num_classes: int, *, dtype=None, param_dtype, rngs: nnx.Rngs):
        check_rngs("Head", rngs)
        check_dtypes("Head", dtype=dtype, param_dtype=param_dtype)
        check_sizes("Head", in_features=in_features, num_classes=num_classes)
        if not isinstance(hidden, Sequence | np.ndarray):
            refuse("Head", "head_features", repr(hidden), "be a sequence of sizes", "Pass (8,) for one hidden layer of 8.")
        for features in hidden:
            check_sizes("Head", head_features=features)
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.inner = nnx.List(linear(*ends) for ends in itertools.pairwise((in_features, *hidden)))
        self.outer = linear((in_features, *hidden)[-1], num_classes)

    def __call__(self, inputs: Float[Array, "B D"]) -> Float[Array, "B classes"]:
        for layer in self.inner:
            inputs = nnx.relu(layer(inputs))
        return self.outer(inputs)


def dtypes(encoder: EncoderOptions) -> dict[str, Any]:
    """The dtypes of an encoder, which its head has too."""
    return dict(dtype=encoder.get("dtype"), param_dtype=encoder.get("param_dtype", jnp.float32))


class Classifier(nnx.Module):
    """An encoder, pooling over real tokens, and a head: tokens [B, T] -> logits [B, num_classes].

    Args:
        num_classes: number of classes.
        pooling: "mean", "max", "first" or "last" of the real tokens.
        head_features: features of the head's hidden layers; none: a linear head.
        encoder: the options of `Encoder`.
    Example:
        >>> model = Classifier(10, vocab_size=16, in_features=32, num_layers=2, mlp_features=64, max_length=100,
        ...                    mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 50), jnp.int32)).shape
        (2, 10)
    """

    def __init__(
        self, num_classes: int, *, pooling: str = "mean", head_features: Sequence[int] = (), rngs: nnx.Rngs,
        **encoder: Unpack[EncoderOptions],
    ):
        check_word("Classifier", "pooling", pooling, POOLINGS)
        self.pooling = pooling
        self.encoder = Encoder(**encoder, rngs=rngs)
        self.head = Head(self.encoder.in_features, head_features, num_classes, **dtypes(encoder), rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool | None = None, rngs=None
    ) -> Float[Array, "B classes"]:
        return self.with_losses(tokens, mask=mask, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool | None = None, rngs=None
    ) -> tuple[Float[Array, "B classes"], RouterLosses]:
        """Logits, and the losses of the experts' routers for each sample, to be added to its loss; see `Encoder`."""
        hidden, losses = self.encoder.with_losses(tokens, mask=mask, deterministic=deterministic, rngs=rngs)
        return self.head(pool(hidden, mask, self.pooling)), losses


class DualEncoder(nnx.Module):
    """Two sequences through one encoder, compared: tokens [B, T], [B, S] -> logits [B, num_classes].

        logits = W_2 relu(W_1 [a, b, a * b, a - b]),   a, b the pooled sequences

    Args:
        interaction: what the head sees: "nli" as above, or "concat", [a, b].
        head_features: features of the head's hidden layers; None: one of in_features.
        others: as `Classifier`.
    Source: Tay et al., Long Range Arena, 2020, arXiv 2011.04006, eq. 1.
    """

    def __init__(
        self, num_classes: int, *, pooling: str = "mean", interaction: str = "nli", head_features: Sequence[int] | None = None,
        rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions],
    ):
        check_word("DualEncoder", "pooling", pooling, POOLINGS)
        check_word("DualEncoder", "interaction", interaction, INTERACTIONS)
        self.pooling, self.interaction = pooling, interaction
        self.encoder = Encoder(**encoder, rngs=rngs)
        features = self.encoder.in_features
        hidden = (features,) if head_features is None else head_features
        self.head = Head(features * (4 if interaction == "nli" else 2), hidden, num_classes, **dtypes(encoder), rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], other: Int[Array, "B S"], *, mask: Bool[Array, "B T"] | None = None,
        other_mask: Bool[Array, "B S"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B classes"]:
        draws = dict[str, Any](deterministic=deterministic, rngs=rngs)
        return self.with_losses(tokens, other, mask=mask, other_mask=other_mask, **draws)[0]

    def with_losses(
        self, tokens: Int[Array, "B T"], other: Int[Array, "B S"], *, mask: Bool[Array, "B T"] | None = None,
        other_mask: Bool[Array, "B S"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B classes"], RouterLosses]:
        """Logits, and the losses of the experts' routers, the mean of both sequences."""
        self.encoder.check(tokens, mask, owner="DualEncoder")
        self.encoder.check(other, other_mask, owner="DualEncoder", name="other", mask_name="other_mask")
        if other.shape[0] != tokens.shape[0]:
            refuse("DualEncoder", "other", f"{other.shape[0]} samples", f"have the {tokens.shape[0]} samples of tokens",
                   "Each sequence is compared with one other.")
        pooled, losses = [], []
        for sequence, real in ((tokens, mask), (other, other_mask)):
            hidden, more = self.encoder.with_losses(sequence, mask=real, deterministic=deterministic, rngs=rngs)
            pooled.append(pool(hidden, real, self.pooling))
            losses.append(more)
        logits = self.head(jnp.concatenate(INTERACTIONS[self.interaction](*pooled), axis=-1))
        return logits, jax.tree.map(lambda a, b: (a + b) / 2, *losses)


class LMCache(NamedTuple):
    """The caches of a language model's layers, and how many real tokens of each sample they have seen."""

    layers: tuple
    length: Int[Array, "B"]


class CausalLM(nnx.Module):
    """A causal language model: tokens [B, T] -> logits [B, T, vocab_size] of each next token.

    Args:
        tie_embeddings: the output projection is the embedding, transposed; False: a linear map of its own, without biases.
        encoder: the options of `Encoder`. Every mixer is built with is_causal=True. With tied embeddings an `embed` has the
            `attend` and the `num_embeddings` of nnx.Embed, and vocab_size is the latter, or None.
    Raises: ValueError, beside those of `Encoder`: a mixer that is not causal; experts with a capacity, whose choice of tokens
        looks ahead; an `embed` without a way back to logits.
    Example:
        >>> model = CausalLM(vocab_size=16, in_features=32, num_layers=1, mlp_features=64, max_length=64,
        ...                  mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> model.generate(jnp.ones((2, 5), jnp.int32), 10).shape
        (2, 10)
    """

    def __init__(self, *, tie_embeddings: bool = True, rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions]):
        check_flags("CausalLM", tie_embeddings=tie_embeddings)
        embed = encoder.get("embed")
        vocab_size: Any = encoder.get("vocab_size")
        if tie_embeddings and embed is not None and not (hasattr(embed, "attend") and hasattr(embed, "num_embeddings")):
            refuse("CausalLM", "embed", f"a {type(embed).__name__}", "have attend and num_embeddings, as nnx.Embed has",
                   "Derive it from nnx.Embed, or pass tie_embeddings=False.")
        if not tie_embeddings:
            check_sizes("CausalLM", vocab_size=vocab_size)
            if embed is not None:  # which may read more tokens than the head writes
                encoder["vocab_size"] = None
        encoder.update(_causal(encoder))
        self.encoder = Encoder(**encoder, rngs=rngs)
        for block in self.encoder.blocks:
            if not getattr(block.mixer, "is_causal", False):
                found = getattr(block.mixer, "is_causal", "no is_causal")
                refuse("CausalLM", "mixer", f"a {type(block.mixer).__name__} with {found}",
                       "build layers whose is_causal is True", "Pass is_causal=True, or give your own layer the attribute.")
            if block.capacity_factor is not None:
                refuse("CausalLM", "experts", f"capacity_factor={block.capacity_factor}", "have no capacity_factor",
                       "Whether a token finds a place depends on how many follow it; leave it out, and none is left out.")
        self.tie_embeddings = tie_embeddings
        self.vocab_size: Any = self.encoder.vocab_size if tie_embeddings else vocab_size
        if not tie_embeddings:
            if (self.encoder.vocab_size or self.vocab_size) < self.vocab_size:
                refuse("CausalLM", "embed", f"{self.encoder.vocab_size} embeddings",
                       f"have num_embeddings >= vocab_size = {self.vocab_size}", "The model reads what it writes.")
            self.head = nnx.Linear(self.encoder.in_features, self.vocab_size, use_bias=False, **dtypes(encoder), rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Logits of each next token; the arguments are those of a call of `Encoder`."""
        return self.with_losses(tokens, mask=mask, segment_ids=segment_ids, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T vocab"], RouterLosses]:
        """Logits, and the losses of the experts' routers for each sample."""
        draws = dict[str, Any](deterministic=deterministic, rngs=rngs)
        hidden, losses = self.encoder.with_losses(tokens, mask=mask, segment_ids=segment_ids, **draws)
        return self.project(hidden), losses

    def project(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """The logits of features."""
        return self.encoder.embed.attend(hidden) if self.tie_embeddings else self.head(hidden)

    @property
    def longest(self) -> int | None:
        """The most tokens of a sequence, by learned positions and by mixers that are built for a length; None: any number."""
        of_mixers = [getattr(block.mixer, "max_length", None) for block in self.encoder.blocks]
        known = [length for length in of_mixers if length is not None]
        return min(known + [self.encoder.max_length] * (self.encoder.position_kind == "learned"), default=None)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LMCache:
        """Empty caches of all layers, for max_length tokens, padding included."""
        if self.encoder.position_kind == "learned" and max_length > self.encoder.max_length:
            most = f"be <= max_length = {self.encoder.max_length} of the model"
            refuse("CausalLM", "max_length of the cache", max_length, most,
                   "Construct the model with a larger max_length, or with positions='sinusoidal'.")
        for mixer in (block.mixer for block in self.encoder.blocks):
            if not (hasattr(mixer, "init_cache") and hasattr(mixer, "extend")):
                kind = type(mixer).__name__
                raise TypeError(f"CausalLM: mixer must have init_cache and extend here, got a {kind}. Write both.")
        caches = tuple(block.mixer.init_cache(batch_size, max_length, dtype) for block in self.encoder.layers)
        return LMCache(caches, jnp.zeros(batch_size, jnp.int32))

    def extend(
        self, tokens: Int[Array, "B T"], cache: LMCache, *, mask: Bool[Array, "B T"] | None = None, deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        """T more tokens -> (logits [B, T, vocab_size], cache); mask: True = a real token.

        Without dropout where deterministic; else that of features, drawn by `rngs.dropout()`, and of nothing inside of mixers.

        Raises: ValueError: a token id, or with learned positions a real token's position, out of range. Where the values are
            not known, as under `jax.jit`, such a token is NaN, and so may be others of its sample.
        """
        encoder = self.encoder
        encoder.check(tokens, mask)
        count = len(encoder.order)
        if not isinstance(cache, LMCache) or len(cache.layers) != count:
            found = f"{len(cache.layers)} layers" if isinstance(cache, LMCache) else f"a {type(cache).__name__}"
            refuse("CausalLM", "cache", found, f"be an LMCache of {count} layers",
                   "Pass what init_cache, or the call before, returned.")
        at = cache.length[:, None] + positions.positions_of_real(tokens, mask)
        if encoder.position_kind == "learned" and (wrong := first_outside(at, encoder.max_length, mask)) is not None:
            refuse("CausalLM", "tokens", f"one at position {wrong}", f"end before max_length = {encoder.max_length}",
                   "Construct the model with a larger max_length, or with positions='sinusoidal'.")
        hidden = encoder.embed_at(tokens, at, mask)
        key_mask = None if mask is None else mask[:, None, None, :]
        hidden, layers = encoder.extend_blocks(hidden, cache.layers, key_mask, deterministic=deterministic, rngs=rngs)
        return self.project(hidden), LMCache(layers, at[:, -1] + 1)

    def rewind(self, cache: LMCache, count: Int[Array, "B"]) -> LMCache | None:
        """The cache without the last `count` real tokens of each sample; None where a layer's does not keep them one by one.

        A `KVCache` does: a token's slot is its position, and nothing sees those from the length on.
        """
        if not all(type(layer) is KVCache for layer in cache.layers):
            return None
        return LMCache(tuple(layer._replace(length=layer.length - count) for layer in cache.layers), cache.length - count)

    generate = generation.generate
    stream = generation.stream


def _causal(encoder: EncoderOptions) -> EncoderOptions:
    """The mixers of each layer with is_causal=True."""
    blocks = max(blocks_of_layers(encoder.get("num_layers"), encoder.get("layer_groups"))) + 1
    given = mixers_of_layers(encoder.get("mixer", "softmax"), encoder.get("mixer_options"), blocks)
    mixers, options_of_layers = zip(*given, strict=True)
    for options in options_of_layers:
        if not options.get("is_causal", True):
            refuse("CausalLM", "mixer_options", f"is_causal={options['is_causal']}", "leave is_causal out or True",
                   "Use Encoder or Classifier for a bidirectional model.")
    causal = [{} if callable(mixer) else {**options, "is_causal": True} for mixer, options in given]
    return EncoderOptions(mixer=mixers, mixer_options=causal)
