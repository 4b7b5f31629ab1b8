"""Models around the mixers: encoder, classifier, dual encoder, causal language model."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_embed_init
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels.dispatch import nearest
from subquad.zoo import positions as encodings
from subquad.zoo import registry
from subquad.zoo.block import Block
from subquad.zoo.checks import refuse

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
        max_length: longest sequence with learned positions; other positions have no bound.
        mixer: a name in `zoo.LAYERS`, or a function (in_features=..., rngs=...) -> layer.
        mixer_options: the named layer's options; a dtype among them is the layer's own.
        positions: "learned" or "sinusoidal" encodings added to the embeddings, or None.
        dropout_rate: of embeddings and block outputs; `train()` and `eval()` turn it on and off, off to begin with.
        remat: the backward pass computes each block anew and keeps only what is between blocks; same values, less memory.
            What a mixer of the user's writes into itself in a call (`sow`, counters) is then lost.
        embed: takes the place of the token embedding: tokens [B, T] -> features [B, T, D].
        embedding_init, position_init: initializers of the token embedding and of the learned positions.
    Call:
        tokens: [B, T] integers.  mask: [B, T], True = a real token, False = padding. Positions count from the first
            column, padding or not: pad on the right.
        deterministic: without dropout; None takes what `train()` or `eval()` set.
        rngs: `rngs.dropout()` draws the dropout.
    Raises:
        ValueError: unknown mixer or positions; num_layers, mlp_features or dropout_rate out of range; a mixer with other
            features out than in; with learned positions, a sequence longer than max_length.
        TypeError: unknown mixer option; tokens or mask that are no arrays.
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
        if not isinstance(num_layers, int | np.integer) or num_layers < 1:
            refuse("Encoder", "num_layers", repr(num_layers), "be a positive integer", "Use 1 for a single block.")
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
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True)
        self.blocks = nnx.List(
            Block(build(), in_features, mlp_features=mlp_features, dropout_rate=dropout_rate, **dtypes, rngs=rngs)
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(in_features, **dtypes, rngs=rngs)

    def embed_at(self, tokens: Int[Array, "B T"], positions: Int[Array, "... T"]) -> Float[Array, "B T D"]:
        """Embeddings of tokens at positions."""
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
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        check_tokens(self, tokens, mask)
        hidden = self.embed_at(tokens, jnp.arange(tokens.shape[1]))
        return self.transform(hidden, mask=mask, deterministic=deterministic, rngs=rngs)

    def transform(self, hidden: Float[Array, "B T D"], *, mask, deterministic, rngs) -> Float[Array, "B T D"]:
        """Dropout, blocks and final normalisation of embedded tokens."""
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        key_mask = None if mask is None else mask[:, None, None, :]
        run = lambda block, hidden, rngs: block(hidden, mask=key_mask, deterministic=deterministic, rngs=rngs)
        run = nnx.remat(run) if self.remat else run
        for block in self.blocks:
            # nnx.remat writes every variable back, which those made outside of the caller's jax.grad do not allow: a copy.
            hidden = run(nnx.clone(block) if self.remat else block, hidden, rngs)
        return self.norm(hidden)


def check_tokens(encoder: Encoder, tokens, mask=None) -> None:
    for name, array in (("tokens", tokens), ("mask", mask)):
        if array is not None and not hasattr(array, "shape"):
            raise TypeError(f"Encoder: {name} must be an array [B, T], got {type(array).__name__}. Use jnp.asarray({name}).")
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
    """One vector per sequence, of its real tokens only: their mean or maximum, the first or the last of them; 0 of none."""
    if mask is None:
        mask = jnp.ones(hidden.shape[:2], bool)
    if pooling == "mean":
        total = jnp.sum(jnp.where(mask[..., None], hidden, 0).astype(jnp.float32), axis=1)
        return (total / jnp.maximum(mask.sum(1), 1)[:, None]).astype(hidden.dtype)
    if pooling == "max":
        top = jnp.max(jnp.where(mask[..., None], hidden, -jnp.inf), axis=1)
        return jnp.where(mask.any(1)[:, None], top, 0)
    at = jnp.argmax(mask, 1) if pooling == "first" else mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1)
    return jnp.where(mask.any(1)[:, None], jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0], 0)


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
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool | None = None, rngs=None
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
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B classes"]:
        a, b = (
            pool(self.encoder(sequence, mask=real, deterministic=deterministic, rngs=rngs), real, self.pooling)
            for sequence, real in ((tokens, mask), (other, other_mask))
        )
        return self.head(jnp.concatenate(INTERACTIONS[self.interaction](a, b), axis=-1))


class LMCache(NamedTuple):
    """The caches of a language model's layers, and how many real tokens of each sample they have seen."""

    layers: tuple
    length: Int[Array, "B"]


def positions_of_real(tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None) -> Int[Array, "... T"]:
    """Where each token stands among the real ones; padding stands where the token before it does, or at -1."""
    if mask is None:
        return jnp.arange(tokens.shape[1], dtype=jnp.int32)
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1


class CausalLM(nnx.Module):
    """A causal language model: tokens [B, T] -> logits [B, T, vocab_size] of each next token.

    The output projection is the embedding, transposed. Positions count real tokens: pad on either side.

    Args: those of `Encoder`; the mixer is built with is_causal=True, and an `embed` has the `attend` and the
        `num_embeddings` of nnx.Embed.
    Raises: ValueError, beside those of `Encoder`: a mixer that is not causal; an `embed` without a way back to logits.
    Example:
        >>> model = CausalLM(vocab_size=16, in_features=32, num_layers=1, mlp_features=64, max_length=64,
        ...                  mixer="softmax", mixer_options=dict(num_heads=4), rngs=nnx.Rngs(0))
        >>> model.generate(jnp.ones((2, 5), jnp.int32), 10).shape
        (2, 10)
    """

    def __init__(self, *, rngs: nnx.Rngs, **encoder: Unpack[EncoderOptions]):
        embed = encoder.get("embed")
        if embed is not None and not (hasattr(embed, "attend") and hasattr(embed, "num_embeddings")):
            refuse("CausalLM", "embed", f"a {type(embed).__name__}", "have attend and num_embeddings, as nnx.Embed has",
                   "Derive it from nnx.Embed, or use Encoder with an output projection of your own.")
        if not callable(encoder.get("mixer", "softmax")):
            options = encoder.get("mixer_options") or {}
            if not options.get("is_causal", True):
                refuse("CausalLM", "mixer_options", f"is_causal={options['is_causal']}", "leave is_causal out or True",
                       "Use Encoder or Classifier for a bidirectional model.")
            encoder["mixer_options"] = {**options, "is_causal": True}
        self.encoder = Encoder(**encoder, rngs=rngs)
        for block in self.encoder.blocks:
            if not getattr(block.mixer, "is_causal", False):
                found = getattr(block.mixer, "is_causal", "no is_causal")
                refuse("CausalLM", "mixer", f"a {type(block.mixer).__name__} with {found}",
                       "build layers whose is_causal is True", "Pass is_causal=True, or give your own layer the attribute.")

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None, deterministic: bool | None = None, rngs=None
    ) -> Float[Array, "B T vocab"]:
        check_tokens(self.encoder, tokens, mask)
        hidden = self.encoder.embed_at(tokens, jnp.maximum(positions_of_real(tokens, mask), 0))
        return self.encoder.embed.attend(self.encoder.transform(hidden, mask=mask, deterministic=deterministic, rngs=rngs))

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LMCache:
        """Empty caches of all layers, for max_length tokens, padding included."""
        if self.encoder.position_kind == "learned" and max_length > self.encoder.max_length:
            raise ValueError(
                f"CausalLM: max_length of the cache must be <= max_length = {self.encoder.max_length} of the model, got "
                f"{max_length}. Construct the model with a larger max_length, or with positions='sinusoidal'."
            )
        caches = tuple(block.mixer.init_cache(batch_size, max_length, dtype) for block in self.encoder.blocks)
        return LMCache(caches, jnp.zeros(batch_size, jnp.int32))

    def extend(self, tokens: Int[Array, "B T"], cache: LMCache, *, mask: Bool[Array, "B T"] | None = None):
        """T more tokens -> (logits [B, T, vocab_size], cache), without dropout; mask: True = a real token."""
        check_tokens(self.encoder, tokens, mask)
        positions = cache.length[:, None] + positions_of_real(tokens, mask)
        hidden = self.encoder.embed_at(tokens, jnp.maximum(positions, 0))
        key_mask = None if mask is None else mask[:, None, None, :]
        layers = []
        for block, layer in zip(self.encoder.blocks, cache.layers, strict=True):
            hidden, layer = block.extend(hidden, layer, mask=key_mask)
            layers.append(layer)
        logits = self.encoder.embed.attend(self.encoder.norm(hidden))
        return logits, LMCache(tuple(layers), positions[:, -1] + 1)

    def generate(
        self,
        prompt: Int[Array, "B T"],
        num_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        stop_token: int | None = None,
        mask: Bool[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Int[Array, "B num_tokens"]:
        """Continues the prompt: one compiled program, a prefill and a loop over `extend`; without dropout.

        Args:
            prompt: [B, T] tokens, T >= 1; pad shorter prompts on the left. The padding changes nothing, except where
                the mixer is "blockwise", which counts it in its blocks.
            num_tokens: how many tokens to add.
            temperature: divides the logits before sampling; 0 takes the most likely token.
            top_k: sample among the k most likely tokens only, the first of equal ones; None among all.
            stop_token: a sample that has drawn this token holds nothing else after it; None: there is no such token.
            mask: [B, T], True = a real token of the prompt.
            rngs: `rngs.dropout()`, or the default stream, draws the samples; needed when temperature > 0.
        Returns: [B, num_tokens] int32, the new tokens.
        Raises: ValueError: an argument out of its range; sampling without rngs; a prompt that ends in padding; with
            learned positions, more than max_length tokens, the last one not counted.
        """
        vocabulary = self.encoder.embed.num_embeddings
        if num_tokens < 1:
            raise ValueError(f"generate: num_tokens must be >= 1, got {num_tokens}. Ask for at least one token.")
        if not 0 <= temperature < jnp.inf:
            raise ValueError(f"generate: temperature must be in [0, inf), got {temperature}. Use 0 for the most likely token.")
        if top_k is not None and not 1 <= top_k <= vocabulary:
            raise ValueError(f"generate: top_k must be in 1..{vocabulary}, got {top_k}. Use None for all tokens.")
        if top_k is not None and temperature == 0:
            raise ValueError(f"generate: top_k must be None when temperature is 0, got {top_k}. Set a temperature.")
        if stop_token is not None and not 0 <= stop_token < vocabulary:
            raise ValueError(f"generate: stop_token must be in 0..{vocabulary - 1}, got {stop_token}. Use None for none.")
        if temperature > 0 and rngs is None:
            raise ValueError("generate: rngs must be given when temperature > 0, got None. Pass nnx.Rngs(seed).")
        check_tokens(self.encoder, prompt, mask)
        if mask is not None and not isinstance(mask, jax.core.Tracer) and not np.asarray(mask)[:, -1].all():
            raise ValueError("generate: mask must end in real tokens, got padding on the right. Pad prompts on the left.")
        key = jax.random.key(0) if rngs is None else rngs.dropout()
        # By its state: nnx.jit would write the model back, which a caller's jax.jit does not allow.
        graph, state = nnx.split(self)
        prompt, is_greedy = prompt.astype(jnp.int32), temperature == 0
        return _generate(graph, state, prompt, mask, key, temperature, stop_token, num_tokens, top_k, is_greedy)


@functools.partial(jax.jit, static_argnums=(0, 7, 8, 9))
def _generate(graph, state, prompt, mask, key, temperature, stop_token, num_tokens, top_k, is_greedy):
    model = nnx.merge(graph, state)

    def pick(logits, key):
        logits = logits[:, -1].astype(jnp.float32)
        if is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # Differences from the best, so that no temperature, however small, leads to inf - inf.
        logits = (logits - logits.max(-1, keepdims=True)) / jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
        if top_k is not None:
            best, at = jax.lax.top_k(logits, top_k)
            logits = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), at, best, axis=-1, inplace=False)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    def step(carry, key):
        token, cache = carry
        logits, cache = model.extend(token[:, None], cache)
        following = pick(logits, key)
        if stop_token is not None:
            following = jnp.where(token == stop_token, token, following)
        return (following, cache), following

    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + num_tokens - 1)  # the last token is never fed
    logits, cache = model.extend(prompt, cache, mask=mask)
    keys = jax.random.split(key, num_tokens)
    first = pick(logits, keys[0])
    _, rest = jax.lax.scan(step, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
