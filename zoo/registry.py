"""Layers by name: the table, and the two ways to build from it."""

import contextlib
import inspect
from collections.abc import Callable

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from subquad.kernels.dispatch import nearest
from subquad.zoo.base import Shell, check_options, options_of
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.checks import check_mask, refuse
from subquad.zoo.dense.softmax import SoftmaxAttention
from subquad.zoo.kernelized.performer import PerformerAttention
from subquad.zoo.lowrank.linformer import LinformerAttention
from subquad.zoo.patterns.blockwise import BlockwiseAttention
from subquad.zoo.patterns.local import LocalAttention
from subquad.zoo.patterns.strided import StridedAttention
from subquad.zoo.recurrent.transformer_xl import TransformerXLAttention
from subquad.zoo.statespace.s4 import S4

LAYERS: dict[str, type[nnx.Module]] = {
    "softmax": SoftmaxAttention,
    "blockwise": BlockwiseAttention,
    "local": LocalAttention,
    "strided": StridedAttention,
    "reformer": ReformerAttention,
    "linformer": LinformerAttention,
    "performer": PerformerAttention,
    "transformer_xl": TransformerXLAttention,
    "s4": S4,
}


def find(name: str) -> type[nnx.Module]:
    """The class of a layer, or a ValueError with the nearest known name."""
    if name not in LAYERS:
        raise ValueError(f"zoo: layer must be a known name, got {name!r}. {nearest(name, LAYERS)}")
    return LAYERS[name]


def options(name: str) -> set[str]:
    """The words that the constructor of a layer knows."""
    return options_of(find(name))


def check_complete(owner: str, layer: type[nnx.Module], given: set[str]) -> None:
    """Refuses to leave out a word that the layer has no default for."""
    for parameter in inspect.signature(layer.__init__).parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        if needed and parameter.name not in {"self", *given}:
            raise TypeError(f"{owner}: {parameter.name} must be given, got nothing. Pass {parameter.name}=...")


def make(name: str, *, in_features: int, rngs: nnx.Rngs, **given) -> nnx.Module:
    """A layer by its name.

    Args:
        name: a key of `LAYERS`.
        in_features: features D of the inputs.
        given: the layer's own options, and those of `Attention` where it has that shell.
    Raises: ValueError: unknown name.  TypeError: unknown or missing option.
    Example:
        >>> make("softmax", in_features=64, num_heads=4, rngs=nnx.Rngs(0))(jnp.ones((1, 10, 64))).shape
        (1, 10, 64)
    """
    layer = find(name)
    check_options(layer.__name__, given, options(name))
    check_complete(layer.__name__, layer, {"in_features", "rngs", *given})
    return layer(in_features=in_features, rngs=rngs, **given)


# What Flax's attention has of its own, and says by the arrays it hands over.
SIZES = {"num_heads", "num_kv_heads", "in_features", "rngs"}


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


def attention_fn(name: str, *, seed: int = 0, **given) -> Callable[..., jax.Array]:
    """A layer's mechanism as an `attention_fn` of Flax.

    It drops into `nnx.MultiHeadAttention(..., attention_fn=attention_fn("local", window_size=64))` and into Linen's.

    Args:
        name: a key of `LAYERS` whose mechanism is a function of query, key and value alone.
        seed: of the random features, where the mechanism has any: the same in every call.
        given: the layer's own options, `is_causal` and `implementation`. Projections, dtypes and precision are Flax's.
    Returns: f(query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, H], *, mask, is_causal, ...) -> [*B, T, N, H].
    Raises:
        ValueError: unknown name; a mechanism with parameters of its own; at the call, what the mechanism cannot honour
            (bias, dropout, sowing, a pairwise mask, a pair of precisions).
        TypeError: an option that is unknown or missing.
    """
    layer = find(name)
    if not layer.supports.attention_fn:
        usable = ", ".join(known for known, other in LAYERS.items() if other.supports.attention_fn)
        raise ValueError(
            f"attention_fn: layer must be a function of separate query, key and value, got {name!r}, which has parameters "
            f"of its own or ties queries to keys. Use zoo.make, or one of: {usable}."
        )
    owner = f"attention_fn({name!r})"
    check_options(owner, given, options(name) - set(Shell.__annotations__) - SIZES | {"is_causal", "implementation"})
    check_complete(owner, layer, {*SIZES, *given})

    def apply(
        query, key, value, bias=None, mask=None, broadcast_dropout=True, dropout_rng=None, dropout_rate=0.0,
        deterministic=False, dtype=None, precision=None, module=None, promote_dtype=promote_dtype, is_causal=False,
    ):
        if bias is not None:
            refuse(owner, "bias", "an array", "be None", "Use Flax's own attention for biased logits.")
        if dropout_rate > 0 and not deterministic:
            refuse(owner, "dropout_rate", dropout_rate, "be 0 (weights are never stored)", "Drop outputs instead.")
        if module is not None:
            refuse(owner, "sow_weights", True, "be False (weights are never stored)", "Use layer.pattern.")
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        batch, (heads, features) = query.shape[:-3], query.shape[-2:]
        if key.shape[-3] != query.shape[-3] and not layer.supports.cross:
            refuse(owner, "key", key.shape, f"have the length {query.shape[-3]} of query", "Use softmax or performer.")
        words = dict(given, is_causal=is_causal or given.get("is_causal", False))
        if key.shape[-2] != heads:
            words["num_kv_heads"] = key.shape[-2]
        with jax.ensure_compile_time_eval():  # its random features are constants of the computation
            mechanism = layer(heads, 1, qkv_features=heads * features, rngs=nnx.Rngs(seed), **words)
        mask = check_mask(
            owner, None if mask is None else mask.astype(bool), batch, heads, query.shape[-3], key.shape[-3],
            layer.supports.pairwise_mask,
        )
        flat = (a.reshape(-1, *a.shape[-3:]) for a in (query, key, value))
        with matmul_precision(owner, precision):
            heads_out = mechanism.attend(*flat, mask)
        return heads_out.reshape(*batch, *heads_out.shape[1:])

    return apply
