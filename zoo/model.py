"""Models around the mixers: encoder, classifier, dual encoder, causal language model."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_embed_init
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels.dispatch import nearest
from subquad.zoo import positions as encodings
from subquad.zoo import registry
from subquad.zoo.block import Block

POSITIONS = ("learned", "sinusoidal", None)
POOLINGS = ("mean", "max", "first", "last")
INTERACTIONS = {"nli": lambda a, b: [a, b, a * b, a - b], "concat": lambda a, b: [a, b]}


class EncoderOptions(TypedDict, total=False):
    """The options of `Encoder`, which every model takes."""

    vocab_size: int
    in_features: int
    num_layers: int
    mlp_features: int
    max_length: int
    mixer: str | Callable[..., nnx.Module]
    mixer_options: Mapping[str, Any] | None
    positions: Literal["learned", "sinusoidal"] | None
    dropout_rate: float
    remat: bool
    embed: nnx.Module | None
    embedding_init: nnx.Initializer
    position_init: nnx.Initializer
    dtype: Any
    param_dtype: Any


class Encoder(nnx.Module):
    """Token embedding, positions, blocks, final normalisation: tokens [B, T] -> features [B, T, D].

    Args:
        vocab_size: token ids are 0..vocab_size-1.
        in_features: features D.
        num_layers: number of blocks.
        mlp_features: features inside the feed-forward networks; 0 leaves them out.
        max_length: longest sequence; bounds the learned positions.
        mixer: a name in `zoo.LAYERS`, or a function (in_features=..., rngs=...) -> layer.
        mixer_options: the named layer's options; a dtype among them is the layer's own.
        positions: "learned" or "sinusoidal" encodings added to the embeddings, or None.
        dropout_rate: of embeddings and block outputs.
        remat: the backward pass computes each block anew and keeps only what is between blocks; same values, less memory.
        embed: takes the place of the token embedding: tokens [B, T] -> features [B, T, D].
        embedding_init, position_init: initializers of the token embedding and of the learned positions.
    Call:
        tokens: [B, T] integers.  mask: [B, T], True = a real token, False = padding.
    Raises: ValueError: unknown mixer or positions; a sequence longer than max_length.  TypeError: unknown mixer option.
    """

    def __init__(
        self,
        vocab_size: int,
        in_features: int,
        *,
        num_layers: int,
        mlp_features: int,
        max_length: int,
        mixer: str | Callable[..., nnx.Module] = "softmax",
        mixer_options: Mapping[str, Any] | None = None,
        positions: Literal["learned", "sinusoidal"] | None = "learned",
        dropout_rate: float = 0.0,
        remat: bool = False,
        embed: nnx.Module | None = None,
        embedding_init: nnx.Initializer = default_embed_init,
        position_init: nnx.Initializer = default_embed_init,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if positions not in POSITIONS:
            raise ValueError(
                f"Encoder: positions must be one of {POSITIONS}, got {positions!r}. Use mixer_options for the mixer's own."
            )
        if callable(mixer) and mixer_options:
            raise ValueError(
                f"Encoder: mixer_options must be empty when mixer is a function, got {dict(mixer_options)}. "
                "Bind them with functools.partial."
            )
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)

        def build():
            if callable(mixer):
                return mixer(in_features=in_features, rngs=rngs)
            return registry.make(mixer, in_features=in_features, rngs=rngs, **{**dtypes, **(mixer_options or {})})

        self.in_features, self.max_length, self.position_kind, self.remat = in_features, max_length, positions, remat
        table = functools.partial(nnx.Embed, features=in_features, **dtypes, rngs=rngs)
        self.embed = table(vocab_size, embedding_init=embedding_init) if embed is None else embed
        if positions == "learned":
            self.positions = table(max_length, embedding_init=position_init)
        self.dropout = nnx.Dropout(dropout_rate)
        self.blocks = nnx.List(
            Block(build(), in_features, mlp_features=mlp_features, dropout_rate=dropout_rate, **dtypes, rngs=rngs)
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(in_features, **dtypes, rngs=rngs)

    def embed_at(self, tokens: Int[Array, "B T"], positions: Int[Array, "... T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens at positions."""
        check_tokens(self, tokens)
        hidden = self.embed(tokens)
        if self.position_kind == "learned":
            hidden = hidden + self.positions(positions)
        elif self.position_kind == "sinusoidal":
            hidden = hidden + encodings.sinusoidal(positions, self.in_features).astype(hidden.dtype)
        return hidden

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        check_tokens(self, tokens, mask)
        hidden = self.embed_at(tokens, jnp.arange(tokens.shape[1]))
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        key_mask = None if mask is None else mask[:, None, None, :]
        run = lambda block, hidden, rngs: block(hidden, mask=key_mask, deterministic=deterministic, rngs=rngs)
        run = nnx.remat(run) if self.remat else run
        for block in self.blocks:
            # nnx.remat writes every variable back, which those made outside of the caller's jax.grad do not allow: a copy.
            hidden = run(nnx.clone(block) if self.remat else block, hidden, rngs)
        return self.norm(hidden)


def check_tokens(encoder: Encoder, tokens, mask=None) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"Encoder: tokens must be integers of shape [B, T], got {tokens.dtype} {tokens.shape}. Pad and stack them."
        )
    if encoder.position_kind == "learned" and tokens.shape[1] > encoder.max_length:
        raise ValueError(
            f"Encoder: tokens must have length <= max_length = {encoder.max_length}, got {tokens.shape[1]}. "
            "Truncate them, or construct the model with a larger max_length."
        )
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != bool):
        raise ValueError(
            f"Encoder: mask must be boolean of shape [B, T] = {tokens.shape}, got {mask.dtype} {mask.shape}. "
            "True = a real token."
        )


def pool(hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None, pooling: str) -> Float[Array, "B D"]:
    """One vector per sequence, of its real tokens only: their mean or maximum, the first or the last of them."""
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    if pooling == "mean":
        total = jnp.sum(jnp.where(mask[..., None], hidden, 0).astype(jnp.float32), axis=1)
        return (total / jnp.maximum(mask.sum(1), 1)[:, None]).astype(hidden.dtype)
    if pooling == "max":
        top = jnp.max(jnp.where(mask[..., None], hidden, -jnp.inf), axis=1)
        return jnp.where(mask.any(1)[:, None], top, 0)
    at = jnp.argmax(mask, 1) if pooling == "first" else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0]


def check_pooling(owner: str, pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"{owner}: pooling must be a known name, got {pooling!r}. {nearest(pooling, POOLINGS)}")


class Head(nnx.Module):
    """Linear maps with a ReLU between: features [B, D] -> logits [B, num_classes].

    Args:
        in_features: features D.
        hidden: features of the layers between; none: one linear map.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], num_classes: int, *, dtype=None, param_dtype, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.inner = nnx.List(linear(*ends) for ends in itertools.pairwise((in_features, *hidden)))
        self.outer = linear((in_features, *hidden)[-1], num_classes)

    def __call__(self, inputs: Float[Array, "B D"]) -> Float[Array, "B classes"]:
        for layer in self.inner:
            inputs = nnx.relu(layer(inputs))
        return self.outer(inputs)


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
        check_pooling("Classifier", pooling)
        self.pooling = pooling
        self.encoder = Encoder(**encoder, rngs=rngs)
        self.head = Head(
            self.encoder.in_features, head_features, num_classes, dtype=encoder.get("dtype"),
            param_dtype=encoder.get("param_dtype", jnp.float32), rngs=rngs,
        )

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool = True, rngs=None
    ) -> Float[Array, "B classes"]:
        hidden = self.encoder(tokens, mask=mask, deterministic=deterministic, rngs=rngs)
        return self.head(pool(hidden, mask, self.pooling))


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
        check_pooling("DualEncoder", pooling)
        if interaction not in INTERACTIONS:
            raise ValueError(
                f"DualEncoder: interaction must be a known name, got {interaction!r}. {nearest(interaction, INTERACTIONS)}"
            )
        self.pooling, self.interaction = pooling, interaction
        self.encoder = Encoder(**encoder, rngs=rngs)
        features = self.encoder.in_features
        self.head = Head(
            features * (4 if interaction == "nli" else 2), (features,) if head_features is None else head_features, num_classes,
            dtype=encoder.get("dtype"), param_dtype=encoder.get("param_dtype", jnp.float32), rngs=rngs,
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        other: Int[Array, "B S"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        other_mask: Bool[Array, "B S"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B classes"]:
        a, b = (
            pool(self.encoder(sequence, mask=real, deterministic=deterministic, rngs=rngs), real, self.pooling)
            for sequence, real in ((tokens, mask), (other, other_mask))
        )
        return self.head(jnp.concatenate(INTERACTIONS[self.interaction](a, b), axis=-1))


class LMCache(NamedTuple):
    """The caches of a language model's layers, and how many tokens they have seen."""

    layers: tuple
    length: Int[Array, ""]


class CausalLM(nnx.Module):
    """A causal language model: tokens [B, T] -> logits [B, T, vocab_size] of each next token.

    The output projection is the embedding, transposed.

    Args: those of `Encoder`; the mixer is built with is_causal=True.
    Example:
        >>> model = CausalLM(vocab_size=16, in_features=32, num_layers=1, mlp_features=64, max_length=64,
        ...                  mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> model.generate(jnp.ones((2, 5), jnp.int32), 10).shape
        (2, 10)
    """

    def __init__(self, *, rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions]):
        mixer = encoder.get("mixer", "softmax")
        if not callable(mixer):
            encoder["mixer_options"] = {**(encoder.get("mixer_options") or {}), "is_causal": True}
        self.encoder = Encoder(**encoder, rngs=rngs)
        for block in self.encoder.blocks:
            if not block.mixer.is_causal:
                raise ValueError(
                    f"CausalLM: mixer must build causal layers, got a bidirectional {type(block.mixer).__name__}. "
                    "Pass is_causal=True."
                )

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool = True, rngs=None
    ) -> Float[Array, "B T vocab"]:
        return self.encoder.embed.attend(self.encoder(tokens, mask=mask, deterministic=deterministic, rngs=rngs))

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LMCache:
        """Empty caches of all layers, for max_length tokens."""
        if self.encoder.position_kind == "learned" and max_length > self.encoder.max_length:
            raise ValueError(
                f"CausalLM: max_length of the cache must be <= max_length = {self.encoder.max_length} of the model, got "
                f"{max_length}. Construct the model with a larger max_length, or with positions='sinusoidal'."
            )
        caches = tuple(block.mixer.init_cache(batch_size, max_length, dtype) for block in self.encoder.blocks)
        return LMCache(caches, jnp.zeros((), jnp.int32))

    def extend(self, tokens: Int[Array, "B T"], cache: LMCache, *, mask: Bool[Array, "B T"] | None = None):
        """T more tokens -> (logits [B, T, vocab_size], cache)."""
        hidden = self.encoder.embed_at(tokens, cache.length + jnp.arange(tokens.shape[1]))
        key_mask = None if mask is None else mask[:, None, None, :]
        layers = []
        for block, layer in zip(self.encoder.blocks, cache.layers, strict=True):
            hidden, layer = block.extend(hidden, layer, mask=key_mask)
            layers.append(layer)
        logits = self.encoder.embed.attend(self.encoder.norm(hidden))
        return logits, LMCache(tuple(layers), cache.length + tokens.shape[1])

    def generate(
        self,
        prompt: Int[Array, "B T"],
        num_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        mask: Bool[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Int[Array, "B num_tokens"]:
        """Continues the prompt: one compiled program, a prefill and a loop over `extend`.

        Args:
            prompt: [B, T] tokens, T >= 1; pad shorter prompts on the left.
            num_tokens: how many tokens to add.
            temperature: divides the logits before sampling; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only; None among all.
            mask: [B, T], True = a real token of the prompt.
            rngs: `rngs.dropout()`, or the default stream, draws the samples; needed when temperature > 0.
        Raises: ValueError: an argument out of its range; sampling without rngs; a prompt that ends in padding.
        """
        vocabulary = self.encoder.embed.num_embeddings
        if num_tokens < 1:
            raise ValueError(f"generate: num_tokens must be >= 1, got {num_tokens}. Ask for at least one token.")
        if temperature < 0:
            raise ValueError(f"generate: temperature must be >= 0, got {temperature}. Use 0 for the most likely token.")
        if top_k is not None and not 1 <= top_k <= vocabulary:
            raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {top_k}. Use None for all tokens.")
        if top_k is not None and temperature == 0:
            raise ValueError(f"generate: top_k must be None when temperature is 0, got {top_k}. Set a temperature.")
        if temperature > 0 and rngs is None:
            raise ValueError("generate: rngs must be given when temperature > 0, got None. Pass nnx.Rngs(seed).")
        check_tokens(self.encoder, prompt, mask)
        if mask is not None and not isinstance(mask, jax.core.Tracer) and not bool(mask[:, -1].all()):
            raise ValueError("generate: mask must end in real tokens, got padding on the right. Pad prompts on the left.")
        key = jax.random.key(0) if rngs is None else rngs.dropout()
        return _generate(self, prompt, mask, key, temperature, num_tokens, top_k, temperature == 0)


@nnx.jit(static_argnums=(5, 6, 7))
def _generate(model, prompt, mask, key, temperature, num_tokens, top_k, greedy):
    def pick(logits, key):
        logits = logits[:, -1].astype(jnp.float32)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def step(carry, key):
        token, cache = carry
        logits, cache = model.extend(token[:, None], cache)
        following = pick(logits, key)
        return (following, cache), following

    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + num_tokens)
    logits, cache = model.extend(prompt, cache, mask=mask)
    keys = jax.random.split(key, num_tokens)
    first = pick(logits, keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
