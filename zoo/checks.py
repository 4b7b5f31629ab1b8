"""The checks that every layer makes of its arguments, before any work."""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.kernels import dispatch
from subquad.zoo.cache import room
from subquad.zoo.masks import signed


class FlaxCall(TypedDict, total=False):
    """What a call of `nnx.MultiHeadAttention` may say and a layer is built as: taken where both say the same."""

    decode: Literal[False] | None
    is_causal: bool | None


class Call(NamedTuple):
    """The arguments of a call, checked, with one batch axis."""

    inputs_q: Float[Array, "B T D"]
    inputs_kv: Float[Array, "B S E"] | None  # None: attends to inputs_q
    inputs_v: Float[Array, "B S E"] | None  # None: values are made of what keys are made of
    mask: Bool[Array, "_ _ _ S"] | None
    extras: dict[str, Array]  # `positions` [B, T] and `segment_ids` [B, T], where given
    batch: tuple[int, ...]  # the caller's batch axes


def check_features(owner: str, name: str, inputs, features: int) -> None:
    """Refuses `inputs` that are not [*B, T, features] floating-point numbers, at least one of them."""
    if not hasattr(inputs, "shape") or not jnp.issubdtype(inputs.dtype, jnp.floating):
        kind = getattr(inputs, "dtype", type(inputs).__name__)
        raise TypeError(
            f"{owner}: {name} must be an array of floating-point features, got {kind}. "
            "Embed integer tokens first, for example with nnx.Embed."
        )
    if inputs.ndim < 2 or inputs.shape[-1] != features:
        refuse(owner, name, inputs.shape, f"have shape [*B, T, {features}]",
               "Project it, or construct the layer with another in_features.")
    if 0 in inputs.shape:
        refuse(owner, name, inputs.shape, "have a token and a sample at least", "Leave empty batches out.")
    # With explicit mesh axes every operation must state its output sharding; our kernels do not.
    if jax.sharding.AxisType.Explicit in jax.typeof(inputs).sharding.mesh.axis_types:
        refuse(owner, name, jax.typeof(inputs), "lie on a mesh without explicit axes",
               "Pass axis_types=(jax.sharding.AxisType.Auto,) * axes to jax.make_mesh, or call within jax.sharding.auto_axes.")


def check_mask(owner: str, mask, batch: tuple[int, ...], heads: int, queries: int, keys: int, pairwise: bool):
    """The mask with one batch axis, [B|1, N|1, T|1, S], or an error that says what is wrong with it."""
    if mask is None:
        return None
    if isinstance(mask, bool | np.bool_):
        raise TypeError(
            f"{owner}: mask must be a boolean array, True = attend, got {mask!r}. Leave it out where all may see all."
        )
    if getattr(mask, "dtype", None) != jnp.dtype(bool):
        raise TypeError(
            f"{owner}: mask must be a boolean array, True = attend, got {getattr(mask, 'dtype', type(mask).__name__)}. "
            "Use jnp.asarray(mask, bool), or mask > 0 for Flax's masks of 0 and 1."
        )
    full, shape = (*batch, heads, queries, keys), mask.shape
    if len(shape) > 3 and set(shape[:-3]) == {1}:  # one mask for all samples, whatever their batch axes
        shape = (1,) * len(batch) + shape[-3:]
    # All axes, spelt out: a [B, T, S] mask must not pass for one of [N, T, S].
    if len(shape) != len(full) or any(m not in (1, f) for m, f in zip(shape, full, strict=True)):
        is_padding = mask.shape == (*batch, keys)
        cure = "Pass mask[..., None, None, :]." if is_padding else "Insert axes of 1, or build it with subquad.zoo.masks."
        refuse(owner, "mask", mask.shape, f"have the axes [*B, N, T, S] = {full}, each full or 1", cure)
    if not pairwise and shape[-3:] != (1, 1, keys):
        refuse(owner, "mask", mask.shape, f"be key padding of shape [*B, 1, 1, S] = {(*batch, 1, 1, keys)}",
               "Use masks.padding_mask(lengths, S), is_causal in the constructor, or SoftmaxAttention for pairwise masks.")
    batch = batch if any(size != 1 for size in shape[:-3]) else (1,) * len(batch)
    mask = jnp.broadcast_to(mask.reshape(shape), (*batch, *shape[-3:-1], keys))
    return mask.reshape(-1, *mask.shape[-3:])


def refuse(owner: str, argument: str, value, condition: str, instead: str) -> NoReturn:
    """Raises the error for an argument that this layer cannot honour."""
    raise ValueError(f"{owner}: {argument} must {condition}, got {value}. {instead}")


def unsupported(owner: str, request: str, reason: str, instead: str) -> NoReturn:
    """Raises the error for something that this layer does not do, whatever the value."""
    raise ValueError(f"{owner} does not support {request}: {reason}. {instead}")


def check_sizes(owner: str, least: int = 1, **sizes: Any) -> None:
    """Refuses sizes that are no integers of at least `least`."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < least:
            condition = "be a positive integer" if least == 1 else f"be an integer of at least {least}"
            refuse(owner, name, repr(size), condition, f"Pass {name}={least} or more.")


def check_divides(owner: str, whole: str, size: int, **parts: int) -> None:
    """Refuses parts that do not divide `size`, which a message calls `whole`."""
    for name, part in parts.items():
        if size % part:
            refuse(owner, name, part, f"divide {whole}", "Choose a divisor.")


def check_length(owner: str, name: str, length: int, most: int | None) -> None:
    """Refuses more tokens than the `max_length` that a layer was built for; None: it takes any number."""
    if most is not None and length > most:
        refuse(owner, name, f"{length} tokens", f"be at most the layer's max_length = {most} tokens",
               "Construct the layer with a larger max_length.")


def check_number(owner: str, name: str, value: Any, interval: str, instead: str) -> None:
    """Refuses what is no number of an interval such as "[0, 1)", whose end at a parenthesis is left out."""
    low, high = map(float, interval[1:-1].split(","))
    if (
        not isinstance(value, int | float | np.integer | np.floating)
        or isinstance(value, bool)
        or not low <= value <= high
        or (value == low and interval[0] == "(")
        or (value == high and interval[-1] == ")")
    ):
        refuse(owner, name, repr(value), f"be a number in {interval}", instead)


def known_number(owner: str, name: str, value: Any) -> float:
    """A Python number of one that may be NumPy's or JAX's; refuses another kind, and what only a `jax.jit` will know."""
    return _known(owner, name, value, float, "a number")


def known_integer(owner: str, name: str, value: Any) -> int:
    """As `known_number`."""
    return _known(owner, name, value, operator.index, "an integer")


def _known(owner: str, name: str, value: Any, convert: Callable[[Any], Any], kind: str):
    try:
        if not isinstance(value, str | bool | np.bool_):
            return convert(value)
    except TypeError:  # of a tracer as well
        pass
    raise TypeError(f"{owner}: {name} must be {kind} that is known outside of jax.jit, got {value!r}. Pass a Python number.")


def check_steps(owner: str, dt_min: float, dt_max: float) -> None:
    """Refuses bounds that no step lies between."""
    check_number(owner, "dt_max", dt_max, "(0, inf)", "0.1 is the papers'.")
    check_number(owner, "dt_min", dt_min, f"(0, {dt_max}]", "It is at most dt_max; 0.001 is the papers'.")


def check_rate(owner: str, rate: float, name: str = "dropout_rate") -> None:
    """Refuses a rate that is no probability."""
    check_number(owner, name, rate, "[0, 1]", "It is a probability of dropping.")


def check_dtypes(owner: str, **dtypes: Any) -> None:
    """Refuses what is no floating-point dtype, nor None."""
    for name, dtype in dtypes.items():
        try:
            is_float = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
        except TypeError:  # NumPy knows no such dtype
            is_float = False
        if not is_float:
            refuse(owner, name, repr(dtype), "be a floating-point dtype", "Pass jnp.float32, jnp.bfloat16 or jnp.float16.")


def check_rngs(owner: str, rngs: Any) -> None:
    """Refuses what no parameters can be drawn from."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"{owner}: rngs must be an nnx.Rngs, got {type(rngs).__name__}. Pass nnx.Rngs(0).")
    check_stream(owner, rngs, "params")


def check_stream(owner: str, rngs: nnx.Rngs, name: str) -> None:
    """Refuses `rngs` that nothing can be drawn from by this name."""
    if name not in rngs and "default" not in rngs:
        refuse(owner, "rngs", f"those of {', '.join(rngs) or 'none'}", f"have a stream {name!r} or a default one",
               f"Pass nnx.Rngs({name}=seed), or nnx.Rngs(seed) for all.")


def check_flags(owner: str, **flags: Any) -> None:
    """Refuses a word such as "false", which Python takes for true, where an option is true or false."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            refuse(owner, name, repr(value), "be True or False", "Pass one of them, not a word or a number.")


def check_word(owner: str, name: str, word: Any, known: Iterable[str]) -> None:
    """Refuses a word that is not known, with the nearest that is."""
    if word not in list(known):  # a dictionary would ask for its hash
        refuse(owner, name, repr(word), "be a known name", dispatch.nearest(word, known))


def check_activation(owner: str, activation: Any) -> None:
    """Refuses what is no function, such as its name."""
    if not callable(activation):
        refuse(owner, "activation", repr(activation), "be a function", "Pass nnx.relu or nnx.gelu, for example.")


def check_flax_call(layer, given: Mapping[str, Any]) -> None:
    """Refuses words of a call that the layer does not know, and Flax's where they ask for another layer than this."""
    owner = type(layer).__name__
    for word, value in given.items():
        if word == "decode":
            if value is not None and value is not False:
                refuse(owner, word, repr(value), "be False or None", "Use init_cache and extend instead.")
        elif word == "is_causal":
            if value is not None and bool(value) != bool(layer.is_causal):
                refuse(owner, word, repr(value), f"be {layer.is_causal}, as the layer was built, or None",
                       "Pass is_causal to the constructor.")
        elif word == "inputs_k":
            raise TypeError(f"{owner}: inputs_k must be called inputs_kv, got inputs_k. Pass inputs_kv=, or by its place.")
        else:
            words = inspect.signature(layer).parameters.values()
            known = {*FlaxCall.__annotations__, *(one.name for one in words if one.kind is one.KEYWORD_ONLY)}
            raise TypeError(f"{owner}: {word} must be a word of a call, got {word}={value!r}. {dispatch.nearest(word, known)}")


def check_call(layer, heads: int, inputs_q, inputs_kv, inputs_v, mask, positions, segment_ids) -> Call:
    """Checks a call of any layer against its `supports` and flattens the batch axes into one.

    Args:
        layer: has `in_features` and `supports`, and `in_kv_features` where it supports cross-attention.
        heads: number of heads N that a pairwise mask may have.
    """
    owner, supports = type(layer).__name__, layer.supports
    check_features(owner, "inputs_q", inputs_q, layer.in_features)
    batch, length = inputs_q.shape[:-2], inputs_q.shape[-2]
    kv_features = getattr(layer, "in_kv_features", layer.in_features)
    # layer(x, x, x) attends to its own input, as layer(x) does.
    inputs_v = None if inputs_v is inputs_kv else inputs_v
    inputs_kv = None if inputs_kv is inputs_q else inputs_kv
    if inputs_v is not None and inputs_kv is None:
        inputs_kv = inputs_q
    for name, inputs in (("inputs_kv", inputs_kv), ("inputs_v", inputs_v)):
        if inputs is None:
            continue
        if not supports.cross:
            unsupported(owner, name, "it attends to its own input",
                        "Use SoftmaxAttention or PerformerAttention for cross-attention.")
        check_features(owner, name, inputs, kv_features)
        if inputs.shape[:-2] != batch:
            refuse(owner, name, inputs.shape, f"have the batch axes {batch} of inputs_q", "Broadcast it first.")
        if inputs.shape[-2] != inputs_kv.shape[-2]:
            refuse(owner, name, inputs.shape, f"have the length {inputs_kv.shape[-2]} of inputs_kv", "Pad the shorter one.")
    if inputs_kv is None and kv_features != layer.in_features:
        refuse(owner, "inputs_kv", None, f"be given where in_kv_features = {kv_features}", "Pass what keys are made of.")
    extras = {}
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is None:
            continue
        if not getattr(supports, name):
            reason = supports.mixes_all if name == "segment_ids" else "it counts them itself"
            unsupported(owner, name, reason or "its tokens are mixed whatever their segment", "SoftmaxAttention does.")
        if inputs_kv is not None:
            refuse(owner, name, "an array", "be None in cross-attention", "Pass a mask instead.")
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.integer):
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{owner}: {name} must be an array of integers, got {kind}. Use jnp.asarray({name}, int).")
        if value.shape not in ((length,), (*batch, length)):
            refuse(owner, name, value.shape, f"have shape [T] or [*B, T] = {(*batch, length)}", "Broadcast it first.")
        extras[name] = jnp.broadcast_to(signed(value), (*batch, length)).reshape(-1, length)
    keys = length if inputs_kv is None else inputs_kv.shape[-2]
    mask = check_mask(owner, mask, batch, heads, length, keys, supports.pairwise_mask)
    flat = lambda inputs: inputs.reshape(-1, *inputs.shape[-2:])
    flat_kv, flat_v = (None if inputs is None else flat(inputs) for inputs in (inputs_kv, inputs_v))
    return Call(flat(inputs_q), flat_kv, flat_v, mask, extras, batch)


def check_extend(layer, inputs, cache, mask) -> Bool[Array, "B 1 1 T"] | None:
    """Checks the arguments of `extend`, [B, T, D] new tokens and their key padding, and returns the mask as [B, 1, 1, T]."""
    owner = type(layer).__name__
    require_extend(layer)
    check_features(owner, "inputs", inputs, layer.in_features)
    if inputs.ndim != 3:
        refuse(owner, "inputs", inputs.shape, "have shape [B, T, D] in extend", "Flatten the batch axes.")
    capacity, longest = room(cache) if hasattr(cache, "length") else 1, getattr(layer, "max_length", None)
    capacity = capacity if longest is None else min(capacity, longest)
    like = jax.eval_shape(lambda: layer.init_cache(1, capacity))  # jax.export may leave the batch size open
    kind: Any = jax.tree.structure(like)
    if kind != jax.tree.structure(cache):
        raise TypeError(
            f"{owner}: cache must be a {type(like).__name__}, got {type(cache).__name__}. "
            "Pass what init_cache, or the call before, returned."
        )
    for array, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(like), strict=True):
        found, wanted = jnp.shape(array), (inputs.shape[0], *expected.shape[1:]) if expected.ndim else ()
        if expected.ndim and found[:1] != wanted[:1]:
            refuse(owner, "cache", f"an array of shape {found}", f"hold {inputs.shape[0]} sequences, as inputs do",
                   "Call init_cache with that batch_size.")
        if found != wanted:
            refuse(owner, "cache", f"one of shape {found}", f"be of this layer, with an array of shape {wanted}",
                   "Pass what this layer's init_cache, or the call before, returned.")
    mask = check_mask(owner, mask, inputs.shape[:1], 1, 1, inputs.shape[1], pairwise=False)
    mask = None if mask is None else jnp.broadcast_to(mask, (inputs.shape[0], 1, 1, inputs.shape[1]))
    if hasattr(cache, "length"):
        check_room(owner, cache, inputs.shape[1], mask)
    return mask


def check_room(owner: str, cache, tokens: int, mask) -> None:
    """Refuses tokens that do not fit into a cache, where the numbers are known; under `jax.jit` such a cache turns to NaN."""
    most, needed = room(cache), tokens if mask is None else mask.sum(axis=(1, 2, 3))
    total, cure = cache.length + needed, "Pass init_cache a larger max_length."
    if isinstance(total, jax.core.Tracer):
        if mask is None and tokens > most:
            refuse(owner, "cache", f"room for {most}", f"have room for {tokens} more tokens", cure)
    elif np.max(total) > most:
        refuse(owner, "cache", f"room for {most}", f"have room for {np.max(total)} tokens", cure)


def require_extend(layer, **sizes: int) -> None:
    """Refuses `init_cache` and `extend` where the layer has none or was built bidirectional, and sizes of a cache below 1."""
    owner = type(layer).__name__
    if not layer.supports.extend:
        unsupported(owner, "extend", "the paper's mechanism looks at the whole sequence",
                    "Use a layer whose supports.extend is True, such as PerformerAttention.")
    if not layer.is_causal:
        refuse(owner, "is_causal", False, "be True for init_cache and extend", "Construct the layer with is_causal=True.")
    check_sizes(owner, **sizes)


def check_rotary(owner: str, supports, rotary_base: float, head_features: int) -> None:
    """Refuses a rotation that the layer does not have, or that its heads cannot take."""
    if not supports.rotary:
        unsupported(owner, "rotary_base", "its scores take no rotation",
                    "Use a layer whose supports.rotary is True, such as SoftmaxAttention or PerformerAttention.")
    if head_features % 2:
        refuse(owner, "rotary_base", rotary_base, f"be None with an odd number of head features, {head_features}",
               "Choose qkv_features / num_heads even.")
    check_number(owner, "rotary_base", rotary_base, "(0, inf)", "10000 is usual, None does not rotate.")


def check_sowing(layer, sow_weights: bool) -> None:
    """Refuses to sow the weights of a layer that makes none."""
    if sow_weights and not layer.supports.weights:
        unsupported(type(layer).__name__, "sow_weights", "its weights are never stored",
                    "Use layer.pattern to see which keys count, or SoftmaxAttention.")


def check_causality(owner: str, supports, is_causal: bool) -> None:
    """Refuses a direction that the layer does not have."""
    if is_causal and not supports.causal:
        unsupported(owner, "is_causal=True", "the paper's mechanism mixes all positions",
                    "Use a layer whose supports.causal is True, such as PerformerAttention.")
    if not is_causal and not supports.bidirectional:
        unsupported(owner, "is_causal=False", "the paper's mechanism is causal",
                    "Use a layer whose supports.bidirectional is True, such as SoftmaxAttention.")


def cache_dtype(layer, dtype: Any):
    """The dtype of cached keys and values: `dtype`, or that of the layer's computation on float32 inputs."""
    if dtype is not None:
        check_dtypes(type(layer).__name__, dtype=dtype)
        return jnp.dtype(dtype)
    return jnp.result_type(layer.param_dtype, jnp.float32) if layer.dtype is None else jnp.result_type(layer.dtype)
