"""The contract of every layer, and the shell that attention layers share."""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import dispatch, patterns, softmax
from subquad.kernels.patterns import CAUSAL, Pattern
from subquad.zoo import dropout, padding
from subquad.zoo.cache import KVCache, append, in_dtypes_of, next_position, places, poisoned
from subquad.zoo.checks import (
    FlaxCall,
    cache_dtype,
    check_call,
    check_causality,
    check_divides,
    check_dtypes,
    check_extend,
    check_flax_call,
    check_length,
    check_rngs,
    check_rotary,
    check_sizes,
    check_sowing,
    refuse,
    require_extend,
    unsupported,
)
from subquad.zoo.compilation import compile_once
from subquad.zoo.extending import attend_to_cache
from subquad.zoo.options import check_flags_of, check_options, options_of
from subquad.zoo.positions import rotary
from subquad.zoo.projection import Projection


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
        mixes_all: why packed sequences cannot be kept apart, where that is the mathematics.
        positions: `positions` other than 0, 1, 2, ...
        grouped: fewer key/value heads than query heads.
        rotary: queries and keys can be rotated by their positions (`rotary_base`).
        attention_fn: the mechanism is a function of query, key and value alone, if need be with options that leave out what it
            learns.
        distances: weights follow from distances, so that `attend` takes `query_positions` and `key_positions`, [B|1, T] and
            [B|1, S].
        is_pattern: the mechanism is softmax attention under the layer's `sees`.
        weights: there is a weight of each query and key, to which a bias can be added, and which dropout can drop.
    """

    cost: Literal["T", "T log T", "T^1.5", "T^2"]
    causal: bool | Literal["mask"] = True
    bidirectional: bool = True
    cross: bool = False
    extend: bool = True
    pairwise_mask: bool = False
    segment_ids: bool = False
    mixes_all: str | None = None
    positions: bool = False
    grouped: bool = False
    rotary: bool = False
    attention_fn: bool = False
    distances: bool = False
    is_pattern: bool = False
    weights: bool = False


class Shell(TypedDict, total=False):
    """The options that every attention layer takes, after its own."""

    qkv_features: int | None
    out_features: int | None
    in_kv_features: int | None
    rotary_base: float | None
    use_bias: bool
    dtype: Any
    param_dtype: Any
    precision: Any
    kernel_init: nnx.Initializer
    bias_init: nnx.Initializer
    implementation: dispatch.Implementation | None


def sow(module, batch: tuple[int, ...], weights: Float[Array, "B N T S"]) -> None:
    """Sows attention weights in a module of Flax, NNX's or Linen's, as Flax's own attention does."""
    collection = nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates"
    module.sow(collection, "attention_weights", weights.reshape(*batch, *weights.shape[1:]))


class Attention(nnx.Module):
    """The shell of an attention layer: projections, checks, masks. A variant writes `attend`.

        y = W_o attend(W_q x, W_k x', W_v x')

    A variant derives from this class; those of features, and those of the delta rule, from the class that says what they share.
    One that is softmax attention under a pattern sets `sees`, and has its call, `extend` and `pattern` from that. Another
    writes `attend` (and, where it can extend, `init_cache` and `attend_cached`). Either may replace a projection that its
    paper does without.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        qkv_features: features of all heads together, N x H. None: in_features.
        out_features: features F of the output. None: in_features.
        in_kv_features: features E of inputs_kv in cross-attention. None: in_features.
        is_causal: a token sees itself and those before it.
        rotary_base: longest wavelength of rotary positions in units of 2 pi tokens, usually 10000. None: no rotation.
        use_bias: the projections have biases.
        dtype: dtype of the computation. None: promoted from inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the projections.
        kernel_init, bias_init: initialisers of the projections.
        implementation: of the kernel; None takes the best that can run here. Forward derivatives (`jax.jvp`, `jax.linearize`)
            need "reference": the others have backward passes written by hand. So has what is computed a piece at a time on a
            CPU, whatever the implementation: some maps of arrays of 4 Mi numbers and more.
        rngs: `rngs.params()` draws the parameters.
    Devices: under `jax.jit` the mesh's axes must be AxisType.Auto, which `jax.make_mesh` does not make them by itself;
        `jax.shard_map` needs check_vma=False.
    Raises: ValueError: num_heads does not divide qkv_features, num_kv_heads does not divide num_heads, a direction or
        option that the layer does not support.  TypeError: an unknown option.
    """

    supports: ClassVar[Support]
    shell: ClassVar[type] = Shell
    sees: Pattern | None  # which positions see which, causality included; None: all see all
    max_length: int | None = None  # the longest input of a layer that is built for one

    def __new__(cls, *arguments: Any, **given: Any):
        check_flags_of(cls.__name__, cls, given)
        return super().__new__(cls)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        qkv_features: int | None = None,
        out_features: int | None = None,
        in_kv_features: int | None = None,
        is_causal: bool = False,
        rotary_base: float | None = None,
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
        in_kv_features = in_features if in_kv_features is None else in_kv_features
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(owner, num_heads=num_heads, in_features=in_features, num_kv_heads=num_kv_heads, qkv_features=qkv_features,
                    out_features=out_features, in_kv_features=in_kv_features)
        if in_kv_features != in_features and not self.supports.cross:
            unsupported(owner, "in_kv_features", "it attends to its own input", "Leave it out, or use SoftmaxAttention.")
        if qkv_features % num_heads:
            refuse(owner, "num_heads", num_heads, f"divide qkv_features = {qkv_features}",
                   "Change one of them, or pass qkv_features.")
        if num_kv_heads != num_heads and not self.supports.grouped:
            unsupported(owner, "num_kv_heads", "each of its heads has keys of its own", "SoftmaxAttention has grouped heads.")
        check_divides(owner, f"num_heads = {num_heads}", num_heads, num_kv_heads=num_kv_heads)
        if rotary_base is not None:
            check_rotary(owner, self.supports, rotary_base, qkv_features // num_heads)
        check_causality(owner, self.supports, is_causal)
        check_dtypes(owner, dtype=dtype, param_dtype=param_dtype)
        check_rngs(owner, rngs)
        dispatch.check_name(owner, implementation)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.in_features, self.in_kv_features, self.out_features = in_features, in_kv_features, out_features
        self.head_features = self.value_head_features = qkv_features // num_heads
        self.is_causal, self.rotary_base, self.implementation = is_causal, rotary_base, implementation
        self.sees = CAUSAL if is_causal else None
        self.dtype, self.param_dtype = dtype, param_dtype

        def linear(inputs, outputs, axis=-1):
            return Projection(
                inputs, outputs, axis=axis, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision,
                kernel_init=kernel_init, bias_init=bias_init, rngs=rngs,
            )

        self.query = linear(in_features, (num_heads, self.head_features))
        self.key = linear(in_kv_features, (num_kv_heads, self.head_features))
        self.value = linear(in_kv_features, (num_kv_heads, self.head_features))
        self.out = linear((num_heads, self.head_features), out_features, axis=(-2, -1))

    def attend(self, query, key, value, mask, **extras):
        """The mechanism: query [B, T, N, H], key and value [B, S, K, H], mask [B|1, N|1, T|1, S] or None -> [B, T, N, H].

        `extras` holds `positions` and `segment_ids` [B, T] where the layer supports them and the caller gave them.
        """
        self._check_length("inputs_q", query.shape[1])
        segments = extras.pop("segment_ids", None)
        return softmax.attention(
            query, key, value, mask=mask, pattern=self.sees, query_segment_ids=segments, key_segment_ids=segments,
            implementation=self.implementation, **extras,
        )

    def rotate(self, query, key, query_positions=None, key_positions=None):
        """Query and key heads, rotated by positions [B|1, T] and [B|1, S] if the layer does so; None counts from 0."""
        if self.rotary_base is None:
            return query, key
        given = (query, query_positions), (key, key_positions)
        at = (jnp.arange(x.shape[1])[None] if positions is None else positions for x, positions in given)
        return tuple(rotary(x, positions, self.rotary_base) for x, positions in zip((query, key), at, strict=True))

    def draws(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> dict[str, Any]:
        """The keys of a call's random draws, by their words in `attend`; none where a layer draws nothing in a call."""
        return {}

    set_view = dropout.set_view

    def attend_cached(self, query, key, value, mask, cache):
        """The mechanism for T new tokens after those in `cache` -> ([B, T, N, H], cache); mask [B, 1, 1, T] or None."""
        start, cache = cache.length, append(cache, key, value, mask)
        return poisoned(attend_to_cache(self.sees, query, cache, start, self.implementation), cache), cache

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None):
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        self._check_length("max_length", max_length)
        return KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))

    def _check_length(self, name: str, length: int) -> None:
        """Refuses more tokens than the layer was built for."""
        check_length(type(self).__name__, name, length, self.max_length)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads of checked inputs; None: of the inputs before it."""
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        return self.query(inputs_q), self.key(inputs_kv), self.value(inputs_kv if inputs_v is None else inputs_v)

    def __call__(
        self,
        inputs_q: Float[Array, "*B T D"],
        inputs_kv: Float[Array, "*B S E"] | None = None,
        inputs_v: Float[Array, "*B S E"] | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: Int[Array, "..."] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        sow_weights: bool = False,
        **flax: Unpack[FlaxCall],
    ) -> Float[Array, "*B T F"]:
        """Mixes the sequence.

        Padding, the tokens that a key-padding mask hides, may stand anywhere and hold anything, NaN included: positions
        count the real tokens, and outputs at padding mean nothing.

        Args:
            inputs_q: [*B, T, D].
            inputs_kv: [*B, S, E] for cross-attention, E = in_kv_features; None attends to inputs_q.
            inputs_v: [*B, S, E], what values are made of where keys are made of other inputs; None: inputs_kv.
            mask: True = attend; axes [*B, N, T, S], each full or 1; key padding [*B, 1, 1, S] where the layer takes no other.
            positions: integer positions [T] or [*B, T]; None counts real tokens from 0.
            segment_ids: [T] or [*B, T]; tokens of different segments do not see each other.
            deterministic, rngs: as in Flax, so that layers interchange; a layer that draws nothing in a call is
                deterministic whatever they say.
            sow_weights: as in Flax, sows the weights [*B, N, T, S] under "attention_weights", in `nnx.Intermediate`; they take
                memory O(T S). Only where the layer makes a weight of each query and key.
            flax: decode=False, and is_causal as in the constructor, which calls of Flax's attention may say.
        Returns: [*B, T, F]; rows that see nothing hold the output projection of 0.
        """
        check_flax_call(self, flax)
        call = check_call(self, self.num_heads, inputs_q, inputs_kv, inputs_v, mask, positions, segment_ids)
        if self.is_causal and call.inputs_kv is not None:
            refuse(type(self).__name__, "inputs_kv", "an array", "be None when is_causal",
                   "Construct a second layer with is_causal=False for cross-attention.")
        draws, mix = self.draws(deterministic, rngs), self._mix
        check_sowing(self, sow_weights)
        if sow_weights:
            # Not compiled by itself: what is sown would stay inside.
            mix = functools.partial(self._mix.__wrapped__, self)
            draws["sow"] = functools.partial(sow, self, call.batch)
        outputs = mix(call.inputs_q, call.inputs_kv, call.inputs_v, call.mask, call.extras, draws)
        return outputs.reshape(*call.batch, *outputs.shape[1:])

    @compile_once
    def _mix(self, inputs_q, inputs_kv, inputs_v, mask, extras, draws):
        """The layer for checked arguments with one batch axis."""
        order = None
        if mask is not None and mask.shape[1:3] == (1, 1):
            order = padding.real_first(mask, inputs_q.shape[0])
            mask = order.mask[:, None, None]
            if "sow" in draws:
                sower, is_self = draws["sow"], inputs_kv is None
                draws = dict(draws, sow=lambda weights: sower(order.unpack_weights(weights, is_self)))
            if inputs_kv is None:
                inputs_q, extras = jax.tree.map(order.pack, (inputs_q, extras))
            else:
                inputs_kv, inputs_v = jax.tree.map(order.pack, (inputs_kv, inputs_v))
        elif mask is not None:
            # A query that sees no key, and a key that no query sees.
            inputs_kv = inputs_q if inputs_kv is None else inputs_kv
            inputs_kv, inputs_v = (padding.clear(inputs, mask.any((1, 2))) for inputs in (inputs_kv, inputs_v))
            inputs_q = padding.clear(inputs_q, mask.any((1, 3)))
        heads = self.project(inputs_q, inputs_kv, inputs_v)
        if self.rotary_base is not None:
            positions = extras.get("positions")
            heads = *self.rotate(*heads[:2], positions, positions), *heads[2:]
        heads = self.attend(*heads, mask, **extras, **draws)
        outputs = self.out(heads)
        return outputs if order is None or inputs_kv is not None else order.unpack(outputs)

    def extend(self, inputs: Float[Array, "B T D"], cache, *, mask: Bool[Array, "B 1 1 T"] | None = None):
        """T >= 1 more tokens after those in `cache` -> (outputs [B, T, F], cache).

        However a sequence is cut into calls, the outputs are those of one causal call over all of it.

        Args:
            inputs: the new tokens.
            cache: of `init_cache`, or of the call before; not changed.
            mask: key padding of the new tokens; a token masked out is seen by none, now or later, and takes no position.
        """
        mask = check_extend(self, inputs, cache, mask)
        return self._extend(inputs, cache, mask)

    @compile_once
    def _extend(self, inputs, cache, mask):
        order = None if mask is None else padding.real_first(mask, inputs.shape[0])
        if order is not None:
            inputs, mask = order.pack(inputs), order.mask[:, None, None]
        heads = self.project(inputs)
        if self.rotary_base is not None:
            positions = places(next_position(cache), inputs.shape[1])
            heads = *self.rotate(*heads[:2], positions, positions), *heads[2:]
        heads, after = self.attend_cached(*heads, mask, cache)
        outputs = self.out(heads)
        return outputs if order is None else order.unpack(outputs), in_dtypes_of(cache, after)

    def cache_dtype(self, dtype: Any):
        """The dtype of cached keys and values: `dtype`, or that of the computation on float32 inputs."""
        return cache_dtype(self, dtype)

    def pattern(self, length: int) -> np.ndarray:
        """What attends to what: bool [N|1, T, S] for T = S = length, True where the query may see the key."""
        check_sizes(type(self).__name__, 0, length=length)
        return patterns.grid(self.sees, length, length)
