"""A layer's mechanism in the place of Flax's attention function."""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from subquad.kernels import softmax
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, sow
from subquad.zoo.checks import check_mask, check_rate, refuse, unsupported
from subquad.zoo.compilation import by_sample
from subquad.zoo.options import check_complete, check_flags_of, check_options
from subquad.zoo.registry import LAYERS, Layer, find, options

PROJECTIONS = {"query", "key", "value", "out"}
# What Flax's attention has itself, and says by the arrays it hands over or in the call.
FLAXS = {"num_heads", "num_kv_heads", "in_features", "rngs", "dropout_rate", "broadcast_dropout"}


def attention_fn(name: str, *, seed: int = 0, **given) -> "AttentionFn":
    """A layer's mechanism as an `attention_fn` of Flax.

    It drops into `nnx.MultiHeadAttention(..., attention_fn=attention_fn("local", window_size=64))` and into Linen's, their
    decode mode included (with `is_causal=True`).

    Args:
        name: a key of `LAYERS` whose mechanism is a function of query, key and value alone: "nystrom" with conv_width=None,
            "entmax" with a number for alpha.
        seed: of the random features, where the mechanism has any: the same in every call.
        given: the layer's own options, `is_causal` and `implementation`. Projections, dtypes, precision and dropout are
            Flax's.
    Returns: a function of query, key and value, see `AttentionFn`. Equal arguments give equal functions.
    Raises:
        ValueError: unknown name; a mechanism with parameters of its own.
        TypeError: an option that is unknown, missing, or no plain value (a number, a word, a list of them).
    Example:
        >>> attention_fn("local", window_size=64) == attention_fn("local", window_size=64)
        True
    """
    layer = find(name)
    if not layer.supports.attention_fn:
        usable = ", ".join(known for known, other in LAYERS.items() if other.supports.attention_fn)
        refuse("attention_fn", "layer", f"{name!r}, which has parameters of its own or ties queries to keys",
               "be a function of separate query, key and value", f"Use zoo.make, or one of: {usable}.")
    owner = f"attention_fn({name!r})"
    shared = {"is_causal", "implementation"} | ({"rotary_base"} if layer.supports.rotary else set())
    check_options(owner, given, options(name) - set(Shell.__annotations__) - FLAXS | shared)
    check_flags_of(owner, layer, given)
    check_complete(owner, layer, {*FLAXS, *given})
    return AttentionFn(name, seed, tuple((word, plain(owner, word, given[word])) for word in sorted(given)))


def plain(owner: str, word: str, value: Any) -> Hashable:
    """The value of an option as numbers, words and tuples of them, which are equal where they look equal."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        return tuple(plain(owner, word, item) for item in value)
    if value is not None and not isinstance(value, str | bool | int | float):
        raise TypeError(
            f"{owner}: {word} must be a number, a word or a list of them, got {type(value).__name__}. "
            "Functions that are equal and can be pickled are made of plain values."
        )
    return value


@dataclasses.dataclass(frozen=True, repr=False)
class AttentionFn:
    """The mechanism of a layer as a value: frozen, hashable, picklable, equal to one of the same name, seed and options.

    A model that holds it has the graph of any other that holds an equal one, so `nnx.jit` compiles once for both.

    Call:
        query: [*B, T, N, H].  key: [*B, S, K, H].  value: [*B, S, K, V].
        mask: True, or not 0, = attend; axes [*B, N, T, S], each full or 1; key padding [*B, 1, 1, S] where the layer takes
            no other.
        is_causal: as the option; either is enough.
        bias: added to the logits, axes as of mask; softmax only.
        dropout_rate, dropout_rng, broadcast_dropout, deterministic: of the attention weights, as in Flax; softmax only.
            They take memory O(T S), as does `module`, in which the weights are sown under "attention_weights".
        dtype, precision, promote_dtype: as in Flax, but of one precision for all products.
    Positions: with key padding, those of windows, blocks, strides and rotation count real tokens only, wherever the
        padding stands. Where T = S, query t is the token of key t. Where T < S and causal, the queries are the last T of
        the keys that the mask shows, as in the decode mode of Flax (where Flax's own `is_causal` takes them for the first
        T); such a step costs O(T S), as it does in Flax. With a pairwise mask (softmax) positions count all keys, and the
        last query is the last key that any query may see.
    Returns: [*B, T, N, V]; a query that may see no key gives 0.
    Raises: ValueError: what the mechanism cannot honour: bias, dropout, sowing, a pairwise mask, a pair of precisions;
        lengths T != S, where it is neither causal nor one of cross-attention; T > S where it is causal; 1 < T < S for a
        causal performer.
    """

    name: str
    seed: int = 0
    options: tuple[tuple[str, Hashable], ...] = ()

    def __repr__(self) -> str:
        seed = [f"seed={self.seed}"] if self.seed else []
        return f"attention_fn({', '.join([repr(self.name), *seed, *(f'{word}={value!r}' for word, value in self.options)])})"

    def __call__(
        self, query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
        deterministic=False, dtype=None, precision=None, module=None, promote_dtype=promote_dtype, is_causal=False,
        force_fp32_for_softmax=False, einsum_dot_general=None, qk_attn_weights_einsum=None, attn_weights_value_einsum=None,
    ) -> Float[Array, "*B T N V"]:
        """See the class. Linen's force_fp32_for_softmax holds always; its products are not to be replaced."""
        owner, layer = repr(AttentionFn(self.name)), find(self.name)
        for word, product in (("einsum_dot_general", einsum_dot_general), ("qk_attn_weights_einsum", qk_attn_weights_einsum),
                              ("attn_weights_value_einsum", attn_weights_value_einsum)):
            if product is not None:
                refuse(owner, word, "a function", "be None (products are inside the kernels)", "Use Flax's own attention.")
        rate = 0.0 if deterministic else dropout_rate
        check_weights(owner, layer, bias, rate, dropout_rng, module)
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        is_causal = bool(is_causal or dict(self.options).get("is_causal", False))
        check_arrays(owner, layer, is_causal, query, key, value)
        batch, (queries, heads, _), keys = query.shape[:-3], query.shape[-3:], key.shape[-3]
        if hasattr(mask, "astype"):
            mask = mask.astype(bool)  # Flax's masks are 0 and 1 in float32
        mask = check_mask(owner, mask, batch, heads, queries, keys, layer.supports.pairwise_mask)
        bias = None if bias is None else flat_bias(owner, bias, (*batch, heads, queries, keys))
        sower = None if module is None else functools.partial(sow, module, batch)
        query, key, value = (array.reshape(-1, *array.shape[-3:]) for array in (query, key, value))
        dropout = rate, broadcast_dropout
        with matmul_precision(owner, precision):
            mix = mix_once if module is None else mix_now
            outputs = mix(self, is_causal, dropout, sower, query, key, value, mask, bias, dropout_rng if rate else None)
        return outputs.reshape(*batch, *outputs.shape[1:])


def mix_now(fn: AttentionFn, is_causal: bool, dropout: tuple[float, bool], sower, query, key, value, mask, bias, dropout_rng):
    """The mechanism for checked arrays with one batch axis.

    Args:
        dropout: its rate, and whether all samples and heads drop the same weights.
        sower: is given the weights, where it is not None.
    """
    (queries, heads, features), layer = query.shape[1:], cast(type[Attention], find(fn.name))
    steps = is_causal and queries < key.shape[1]
    words: dict[str, Any] = dict(fn.options, is_causal=is_causal and not (steps and not knows_positions(layer)))
    if key.shape[2] != heads:
        words["num_kv_heads"] = key.shape[2]
    if dropout_rng is not None:
        words |= dict(zip(("dropout_rate", "broadcast_dropout"), dropout, strict=True))
    with jax.ensure_compile_time_eval():  # its random features are constants of the computation
        mechanism = layer(heads, 1, qkv_features=heads * features, rngs=nnx.Rngs(fn.seed), **words)
    own = [name for name in nnx.to_pure_dict(nnx.state(mechanism, nnx.Param)) if name not in PROJECTIONS]
    if own:
        refuse(repr(AttentionFn(fn.name)), "its options", f"{', '.join(own)}, which would be learned", "leave no parameters",
               f"See {layer.__name__} for options without: conv_width=None, or a number for alpha.")
    extras = {word: given for word, given in dict(bias=bias, sow=sower, dropout_rng=dropout_rng).items() if given is not None}
    if mask is not None:  # what no query may see
        key, value = (padding.clear(array, mask.any((1, 2))) for array in (key, value))
    return (step if steps else whole)(mechanism, query, key, value, mask, **extras)


# Called eagerly, it compiles once per shape; and inside a caller's jit it leaves no function of its own.
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def mix_once(fn: AttentionFn, is_causal: bool, dropout: tuple[float, bool], sower, *arrays):
    """`mix_now`, for an open batch as well."""
    *others, key = arrays
    if key is not None and not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):  # so that it is known as a key
        key = jax.random.wrap_key_data(key)
    return by_sample(lambda arrays: mix_now(fn, is_causal, dropout, sower, *arrays), (*others, key))


def knows_positions(layer: type[Layer]) -> bool:
    """Whether the mechanism takes the positions of queries and keys. One that does not knows their order alone."""
    return layer.supports.positions or layer.supports.is_pattern


def whole(mechanism, query, key, value, mask, **extras):
    """The mechanism for queries that are the tokens of the keys, or for cross-attention."""
    is_padding = mask is not None and mask.shape[1:3] == (1, 1) and query.shape[1] == key.shape[1]
    positions = jnp.cumsum(mask[:, 0, 0], axis=1, dtype=jnp.int32) - 1 if is_padding else None
    query, key = mechanism.rotate(query, key, positions, positions)
    # Cross-attention's queries are no tokens of the keys. It knows no positions but their order, which padding leaves as it is.
    if not is_padding or mechanism.supports.cross:
        if is_padding and mechanism.supports.distances:
            extras |= dict(query_positions=positions, key_positions=positions)
        return mechanism.attend(query, key, value, mask, **extras)
    order = padding.real_first(mask, len(query))
    packed = (order.pack(array) for array in (query, key, value))
    return order.unpack(mechanism.attend(*packed, order.mask[:, None, None], **extras))


def step(mechanism, query, key, value, mask, **extras):
    """A causal mechanism for the last T of the S keys, or of those that the mask shows."""
    queries, keys = query.shape[1], key.shape[1]
    shown = jnp.ones((1, keys), bool) if mask is None else mask.any((1, 2))
    slots = jnp.arange(keys, dtype=jnp.int32)[None]
    is_padding = mask is None or mask.shape[1:3] == (1, 1)
    at_keys = jnp.cumsum(shown, axis=1, dtype=jnp.int32) - 1 if is_padding else jnp.broadcast_to(slots, shown.shape)
    last = jnp.where(shown, at_keys, -1).max(axis=1, keepdims=True)
    at_queries = last + jnp.arange(1 - queries, 1, dtype=jnp.int32)[None]
    query, key = mechanism.rotate(query, key, at_queries, at_keys)
    if mechanism.supports.positions:
        return mechanism.attend(query, key, value, mask, positions=at_queries, key_positions=at_keys, **extras)
    if mechanism.supports.is_pattern:
        return softmax.attention(
            query, key, value, mask=mask, pattern=mechanism.sees, query_positions=at_queries, key_positions=at_keys,
            implementation=mechanism.implementation,
        )
    if mechanism.supports.distances:
        extras |= dict(query_positions=at_queries, key_positions=at_keys)
    return mechanism.attend(query, key, value, mask, **extras)  # of one query, built without causality


def check_weights(owner: str, layer: type[Layer], bias, rate: float, dropout_rng, module) -> None:
    """Refuses what a mechanism without weights cannot honour, and dropout that cannot be drawn."""
    if not layer.supports.weights:
        if bias is not None:
            unsupported(owner, "bias", "its logits are not all made", "Use attention_fn('softmax').")
        if rate:
            unsupported(owner, "dropout_rate", "its weights are never stored",
                        "Drop outputs instead, or use attention_fn('softmax').")
        if module is not None:
            unsupported(owner, "sow_weights", "its weights are never stored",
                        "Use layer.pattern to see which keys count, or attention_fn('softmax').")
    check_rate(owner, rate)
    if rate and dropout_rng is None:
        refuse(owner, "dropout_rng", None, "be given for dropout", "Pass a key of jax.random, or deterministic=True.")


def check_arrays(owner: str, layer: type[Layer], is_causal: bool, query, key, value) -> None:
    """Refuses arrays that do not go together, and lengths that mean nothing to the mechanism."""
    if query.ndim < 3:
        refuse(owner, "query", query.shape, "have the axes [*B, T, N, H]", "Split the features into heads.")
    for name, array in (("key", key), ("value", value)):
        if array.shape[:-3] != query.shape[:-3] or array.ndim != query.ndim:
            refuse(owner, name, array.shape, f"have the batch axes {query.shape[:-3]} of query", "Broadcast it first.")
        if array.shape[-3:-1] != key.shape[-3:-1]:
            refuse(owner, name, array.shape, f"have the length and heads {key.shape[-3:-1]} of key", "Check the projections.")
    if key.shape[-1] != query.shape[-1]:
        refuse(owner, "key", key.shape, f"have the {query.shape[-1]} features of query", "Project both to one size.")
    queries, keys = query.shape[-3], key.shape[-3]
    if is_causal and queries > keys:
        refuse(owner, "query", query.shape, f"have at most the length {keys} of key when causal",
               "Leave is_causal out for cross-attention.")
    if not is_causal and queries != keys and not layer.supports.cross:
        refuse(owner, "key", key.shape, f"have the length {queries} of query where is_causal is False",
               "Pass is_causal=True for decoding; use softmax or performer for cross-attention.")
    # Of a mechanism that knows no positions, the last token sees all keys: cross-attention of one query.
    if is_causal and queries < keys and not knows_positions(layer) and (queries > 1 or not layer.supports.cross):
        refuse(owner, "query", query.shape, f"have length 1, or the length {keys} of key, when causal",
               "Decode one token at a time, or use the layer's extend.")


def flat_bias(owner: str, bias, full: tuple[int, ...]) -> Float[Array, "_ _ _ _"]:
    """The bias with one batch axis."""
    if bias.ndim != len(full) or any(size not in (1, most) for size, most in zip(bias.shape, full, strict=True)):
        refuse(owner, "bias", bias.shape, f"have the axes [*B, N, T, S] = {full}, each full or 1", "Insert axes of 1.")
    if any(size > 1 for size in bias.shape[:-3]):
        bias = jnp.broadcast_to(bias, (*full[:-3], *bias.shape[-3:]))
    return bias.reshape(-1, *bias.shape[-3:])


def matmul_precision(owner: str, precision):
    """The context in which products have this precision; None: the caller's own."""
    if precision is None:
        return contextlib.nullcontext()
    try:
        is_preset = isinstance(precision, jax.lax.DotAlgorithmPreset)
        return jax.default_matmul_precision(precision.name if is_preset else jax.lax.Precision(precision).name.lower())
    except (TypeError, ValueError):
        refuse(owner, "precision", precision, "be one jax.lax.Precision, its name, or a jax.lax.DotAlgorithmPreset",
               "One precision holds for all products of a mechanism.")
