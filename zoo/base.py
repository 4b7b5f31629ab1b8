"""The contract of every layer, and the shell that attention layers share."""

import dataclasses
import inspect
import math
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import dispatch
from subquad.zoo.tokenwise import tokenwise


@dataclasses.dataclass(frozen=True)
class Support:
    """What a layer can do. The layer refuses the rest by name.

    Args:
        cost: how time and memory grow with the length T.
        causal: `is_causal=True` exists. "mask": keys of the future are masked, but the paper chooses buckets by looking at
            all positions, so a future token can change which past keys are compared.
        bidirectional: `is_causal=False` exists.
        cross: `inputs_kv` of another length than `inputs_q` exists.
        extend: `init_cache` and `extend` exist (for a causal layer).
        pairwise_mask: any mask that broadcasts to [B, N, T, S]; else key padding [B, 1, 1, S] only.
        segment_ids: packed sequences.
        positions: `positions` other than 0, 1, 2, ...
        grouped: fewer key/value heads than query heads.
        attention_fn: the mechanism is a function of query, key and value alone.
    """

    cost: Literal["T", "T log T", "T^1.5", "T^2"]
    causal: bool | Literal["mask"] = True
    bidirectional: bool = True
    cross: bool = False
    extend: bool = True
    pairwise_mask: bool = False
    segment_ids: bool = False
    positions: bool = False
    grouped: bool = False
    attention_fn: bool = False


class Call(NamedTuple):
    """The arguments of a call, checked, with one batch axis."""

    inputs_q: Float[Array, "B T D"]
    inputs_kv: Float[Array, "B S D"]
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
        raise ValueError(
            f"{owner}: {name} must have shape [*B, T, {features}], got {inputs.shape}. "
            "Project it, or construct the layer with another in_features."
        )
    if 0 in inputs.shape:
        raise ValueError(
            f"{owner}: {name} must have a token and a sample at least, got {inputs.shape}. Leave empty batches out."
        )
    # Of arrays on explicit axes each operation must be told how its result lies; the kernels leave that to the compiler.
    if jax.sharding.AxisType.Explicit in jax.typeof(inputs).sharding.mesh.axis_types:
        refuse(owner, name, jax.typeof(inputs), "lie on a mesh without explicit axes",
               "Pass axis_types=(jax.sharding.AxisType.Auto,) * axes to jax.make_mesh, or call within jax.sharding.auto_axes.")


def check_mask(owner: str, mask, batch: tuple[int, ...], heads: int, queries: int, keys: int, pairwise: bool):
    """The mask with one batch axis, [B|1, N|1, T|1, S], or an error that says what is wrong with it."""
    if mask is None:
        return None
    if getattr(mask, "dtype", None) != jnp.dtype(bool):
        raise TypeError(
            f"{owner}: mask must be a boolean array, True = attend, got {getattr(mask, 'dtype', type(mask).__name__)}. "
            "Use jnp.asarray(mask, bool)."
        )
    full, shape = (*batch, heads, queries, keys), mask.shape
    if len(shape) > 3 and set(shape[:-3]) == {1}:  # one mask for all samples, whatever their batch axes
        shape = (1,) * len(batch) + shape[-3:]
    # All axes, spelt out: a [B, T, S] mask must not pass for one of [N, T, S].
    if len(shape) != len(full) or any(m not in (1, f) for m, f in zip(shape, full, strict=True)):
        raise ValueError(
            f"{owner}: mask must have the axes [*B, N, T, S] = {full}, each full or 1, got {mask.shape}. "
            "Insert axes of 1, or build it with subquad.zoo.masks."
        )
    if not pairwise and shape[-3:] != (1, 1, keys):
        raise ValueError(
            f"{owner}: mask must be key padding of shape [*B, 1, 1, S] = {(*batch, 1, 1, keys)}, got {mask.shape}. "
            "Use masks.padding_mask(lengths, S), is_causal in the constructor, or SoftmaxAttention for pairwise masks."
        )
    batch = batch if math.prod(shape[:-3]) > 1 else (1,) * len(batch)
    mask = jnp.broadcast_to(mask.reshape(shape), (*batch, *shape[-3:-1], keys))
    return mask.reshape(-1, *mask.shape[-3:])


def refuse(owner: str, argument: str, value, condition: str, instead: str) -> None:
    """Raises the error for an argument that this layer cannot honour."""
    raise ValueError(f"{owner}: {argument} must {condition}, got {value}. {instead}")


def check_call(
    layer, heads: int, inputs_q, inputs_kv, mask, positions, segment_ids
) -> Call:
    """Checks a call of any layer against its `supports` and flattens the batch axes into one.

    Args:
        layer: has `in_features` and `supports`.
        heads: number of heads N that a pairwise mask may have.
    """
    owner, supports = type(layer).__name__, layer.supports
    check_features(owner, "inputs_q", inputs_q, layer.in_features)
    batch, length = inputs_q.shape[:-2], inputs_q.shape[-2]
    if inputs_kv is None or inputs_kv is inputs_q:
        inputs_kv = inputs_q
    elif not supports.cross:
        refuse(owner, "inputs_kv", getattr(inputs_kv, "shape", type(inputs_kv).__name__),
               "be None (this layer attends to its own input)",
               "Use SoftmaxAttention or PerformerAttention for cross-attention.")
    else:
        check_features(owner, "inputs_kv", inputs_kv, layer.in_features)
        if inputs_kv.shape[:-2] != batch:
            refuse(owner, "inputs_kv", inputs_kv.shape, f"have the batch axes {batch} of inputs_q", "Broadcast it first.")
    extras = {}
    for name, value in (("positions", positions), ("segment_ids", segment_ids)):
        if value is None:
            continue
        if not getattr(supports, name):
            refuse(owner, name, "an array", "be None (this layer cannot honour it)", "SoftmaxAttention does.")
        if inputs_kv is not inputs_q:
            refuse(owner, name, "an array", "be None in cross-attention", "Pass a mask instead.")
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.integer):
            kind = getattr(value, "dtype", type(value).__name__)
            raise TypeError(f"{owner}: {name} must be an array of integers, got {kind}. Use jnp.asarray({name}, int).")
        if value.shape not in ((length,), (*batch, length)):
            refuse(owner, name, value.shape, f"have shape [T] or [*B, T] = {(*batch, length)}", "Broadcast it first.")
        extras[name] = jnp.broadcast_to(value, (*batch, length)).reshape(-1, length)
    keys = inputs_kv.shape[-2]
    mask = check_mask(owner, mask, batch, heads, length, keys, supports.pairwise_mask)
    flat_q = inputs_q.reshape(-1, *inputs_q.shape[-2:])
    flat_kv = flat_q if inputs_kv is inputs_q else inputs_kv.reshape(-1, *inputs_kv.shape[-2:])
    return Call(flat_q, flat_kv, mask, extras, batch)


def check_extend(layer, inputs, cache, mask) -> Bool[Array, "B 1 1 T"] | None:
    """Checks the arguments of `extend`, [B, T, D] new tokens and their key padding, and returns the mask as [B, 1, 1, T]."""
    owner = type(layer).__name__
    require_extend(layer)
    check_features(owner, "inputs", inputs, layer.in_features)
    if inputs.ndim != 3:
        refuse(owner, "inputs", inputs.shape, "have shape [B, T, D] in extend", "Flatten the batch axes.")
    like = jax.eval_shape(lambda: layer.init_cache(inputs.shape[0], 1))
    if jax.tree.structure(cache) != jax.tree.structure(like):
        raise TypeError(
            f"{owner}: cache must be a {type(like).__name__}, got {type(cache).__name__}. "
            "Pass what init_cache, or the call before, returned."
        )
    for array, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(like), strict=True):
        if jnp.shape(array)[:1] != expected.shape[:1]:
            refuse(owner, "cache", f"an array of shape {jnp.shape(array)}", f"hold {inputs.shape[0]} sequences, as inputs do",
                   "Call init_cache with that batch_size.")
    mask = check_mask(owner, mask, inputs.shape[:1], 1, 1, inputs.shape[1], pairwise=False)
    return None if mask is None else jnp.broadcast_to(mask, (inputs.shape[0], 1, 1, inputs.shape[1]))


def require_extend(layer, **sizes: int) -> None:
    """Refuses `init_cache` and `extend` where the layer has none or was built bidirectional, and sizes of a cache below 1."""
    owner = type(layer).__name__
    if not layer.supports.extend:
        refuse(owner, "extend", "a call", "not be used (the paper's mechanism looks at the whole sequence)",
               "Use a layer whose supports.extend is True, such as PerformerAttention.")
    if not layer.is_causal:
        refuse(owner, "is_causal", False, "be True for init_cache and extend", "Construct the layer with is_causal=True.")
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            refuse(owner, name, repr(size), "be a positive integer", "Count the sequences, and the tokens of the longest.")


def check_causality(owner: str, supports: Support, is_causal: bool) -> None:
    """Refuses a direction that the layer does not have."""
    if is_causal and not supports.causal:
        refuse(owner, "is_causal", True, "be False (the paper's mechanism mixes all positions)",
               "Use a layer whose supports.causal is True, such as PerformerAttention.")
    if not is_causal and not supports.bidirectional:
        refuse(owner, "is_causal", False, "be True (the paper's mechanism is causal)",
               "Use a layer whose supports.bidirectional is True, such as SoftmaxAttention.")


class Shell(TypedDict, total=False):
    """The options that every attention layer takes, after its own."""

    qkv_features: int | None
    out_features: int | None
    use_bias: bool
    dtype: Any
    param_dtype: Any
    precision: Any
    kernel_init: nnx.Initializer
    bias_init: nnx.Initializer
    implementation: dispatch.Implementation | None


def options_of(layer: type) -> set[str]:
    """The words that the constructor of a layer knows."""
    parameters = inspect.signature(layer.__init__).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD} - {"self"}
    return known | set(Shell.__annotations__) if issubclass(layer, Attention) else known


def check_options(owner: str, given: dict[str, Any], known: set[str]) -> None:
    """Refuses a word that is not known, with the nearest that is."""
    for word, value in given.items():
        if word not in known:
            nearest = dispatch.nearest(word, known)
            raise TypeError(f"{owner}: {word} must be one of its options, got {word}={value!r}. {nearest}")


class Attention(nnx.Module):
    """The shell of an attention layer: projections, checks, masks. A variant writes `attend`.

        y = W_o attend(W_q x, W_k x', W_v x')

    A variant derives from this class directly and writes `attend` (and, where it can extend, `init_cache` and
    `attend_cached`); it may replace a projection that its paper does without.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        qkv_features: features of all heads together, N x H. None: in_features.
        out_features: features F of the output. None: in_features.
        is_causal: a token sees itself and those before it.
        use_bias: the projections have biases.
        dtype: dtype of the computation. None: promoted from inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the projections.
        kernel_init, bias_init: initialisers of the projections.
        implementation: of the kernel; None takes the best that can run here. Forward derivatives (`jax.jvp`, `jax.linearize`)
            need "reference": the others have backward passes written by hand.
        rngs: `rngs.params()` draws the parameters.
    Devices: under `jax.jit` the mesh's axes must be AxisType.Auto, which `jax.make_mesh` does not make them by itself;
        `jax.shard_map` needs check_vma=False.
    Raises: ValueError: num_heads does not divide qkv_features, num_kv_heads does not divide num_heads, a direction or
        option that the layer does not support.  TypeError: an unknown option.
    """

    supports: ClassVar[Support]

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        is_causal: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = default_kernel_init,
        bias_init: nnx.Initializer = default_bias_init,
        implementation: dispatch.Implementation | None = None,
        rngs: nnx.Rngs,
        **unknown: Any,
    ):
        owner = type(self).__name__
        check_options(owner, unknown, options_of(type(self)) - set(unknown))
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = dict(num_heads=num_heads, in_features=in_features, num_kv_heads=num_kv_heads,
                     qkv_features=qkv_features, out_features=out_features)
        for name, size in sizes.items():
            if not isinstance(size, int | np.integer) or size < 1:
                refuse(owner, name, repr(size), "be a positive integer", "Check the constructor.")
        if qkv_features % num_heads:
            refuse(owner, "num_heads", num_heads, f"divide qkv_features = {qkv_features}",
                   "Change one of them, or pass qkv_features.")
        if num_kv_heads != num_heads and not self.supports.grouped:
            refuse(owner, "num_kv_heads", num_kv_heads, f"be num_heads = {num_heads}", "SoftmaxAttention has grouped heads.")
        if num_heads % num_kv_heads:
            refuse(owner, "num_kv_heads", num_kv_heads, f"divide num_heads = {num_heads}", "Choose a divisor.")
        check_causality(owner, self.supports, is_causal)
        dispatch.check_name(owner, implementation)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.in_features, self.out_features = in_features, out_features
        self.head_features = qkv_features // num_heads
        self.is_causal, self.implementation = is_causal, implementation
        self.dtype, self.param_dtype = dtype, param_dtype

        def linear(inputs, outputs, axis=-1):
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision,
                kernel_init=kernel_init, bias_init=bias_init, rngs=rngs,
            )

        self.query = linear(in_features, (num_heads, self.head_features))
        self.key = linear(in_features, (num_kv_heads, self.head_features))
        self.value = linear(in_features, (num_kv_heads, self.head_features))
        self.out = linear((num_heads, self.head_features), out_features, axis=(-2, -1))

    def attend(self, query, key, value, mask, **extras):
        """The mechanism: query [B, T, N, H], key and value [B, S, K, H], mask [B|1, N|1, T|1, S] or None -> [B, T, N, H].

        `extras` holds `positions` and `segment_ids` [B, T] where the layer supports them and the caller gave them.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attend")

    def attend_cached(self, query, key, value, mask, cache):
        """The mechanism for T new tokens after those in `cache` -> ([B, T, N, H], cache); mask [B, 1, 1, T] or None."""
        raise NotImplementedError(f"{type(self).__name__} has no attend_cached")

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None):
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        raise NotImplementedError(f"{type(self).__name__} has no init_cache")

    def project(self, inputs_q, inputs_kv):
        """Query, key and value heads of checked inputs."""
        if inputs_kv is inputs_q:
            heads = lambda inputs: (self.query(inputs), self.key(inputs), self.value(inputs))
            return tokenwise(heads, inputs_q, is_linear=True)
        key_value = lambda inputs: (self.key(inputs), self.value(inputs))
        return tokenwise(self.query, inputs_q, is_linear=True), *tokenwise(key_value, inputs_kv, is_linear=True)

    def __call__(
        self,
        inputs_q: Float[Array, "*B T D"],
        inputs_kv: Float[Array, "*B S D"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: Int[Array, "..."] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B T F"]:
        """Mixes the sequence.

        Args:
            inputs_q: [*B, T, D].
            inputs_kv: [*B, S, D] for cross-attention; None attends to inputs_q.
            mask: True = attend; axes [*B, N, T, S], each full or 1; key padding [*B, 1, 1, S] where the layer takes no other.
            positions: integer positions [T] or [*B, T]; None counts from 0.
            segment_ids: [T] or [*B, T]; tokens of different segments do not see each other.
            deterministic, rngs: as in Flax, so that layers interchange; a layer that draws nothing in a call is
                deterministic whatever they say.
        Returns: [*B, T, F]; rows that see nothing hold the output projection of 0.
        """
        call = check_call(self, self.num_heads, inputs_q, inputs_kv, mask, positions, segment_ids)
        if self.is_causal and call.inputs_kv is not call.inputs_q:
            refuse(type(self).__name__, "inputs_kv", "an array", "be None when is_causal",
                   "Construct a second layer with is_causal=False for cross-attention.")
        heads = self.attend(*self.project(call.inputs_q, call.inputs_kv), call.mask, **call.extras)
        outputs = tokenwise(self.out, heads, is_linear=True)
        return outputs.reshape(*call.batch, *outputs.shape[1:])

    def extend(self, inputs: Float[Array, "B T D"], cache, *, mask: Bool[Array, "B 1 1 T"] | None = None):
        """T >= 1 more tokens after those in `cache` -> (outputs [B, T, F], cache).

        However a sequence is cut into calls, the outputs are those of one causal call over all of it.

        Args:
            inputs: the new tokens.
            cache: of `init_cache`, or of the call before; not changed.
            mask: key padding of the new tokens; a token masked out is seen by none, now or later.
        """
        mask = check_extend(self, inputs, cache, mask)
        heads, cache = self.attend_cached(*self.project(inputs, inputs), mask, cache)
        return self.out(heads), cache

    def cache_dtype(self, dtype: Any):
        """The dtype of cached keys and values: `dtype`, or that of the computation on float32 inputs."""
        if dtype is not None:
            if not jnp.issubdtype(dtype, jnp.floating):
                refuse(type(self).__name__, "dtype", jnp.dtype(dtype), "be a floating-point dtype in init_cache",
                       "Integers would cut off keys and values; jnp.bfloat16 halves the cache.")
            return jnp.dtype(dtype)
        return jnp.result_type(self.param_dtype, jnp.float32) if self.dtype is None else jnp.result_type(self.dtype)

    def pattern(self, length: int) -> np.ndarray:
        """What attends to what: bool [N|1, T, S] for T = S = length, True where the query may see the key."""
        full = np.ones((1, length, length), bool)
        return np.tril(full) if self.is_causal else full
