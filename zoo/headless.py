"""The shell that mixers without heads share: the contract of `Attention` where there are no queries and keys."""

from typing import Any, ClassVar, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import dispatch, patterns
from subquad.kernels.patterns import CAUSAL, Pattern
from subquad.zoo import dropout, padding
from subquad.zoo.base import Support
from subquad.zoo.cache import StateCache, counts, in_dtypes_of
from subquad.zoo.checks import (
    FlaxCall,
    check_call,
    check_causality,
    check_dtypes,
    check_extend,
    check_flax_call,
    check_rngs,
    check_sizes,
    check_sowing,
    require_extend,
)
from subquad.zoo.compilation import compile_once
from subquad.zoo.options import check_flags_of, check_options, options_of
from subquad.zoo.projection import in_pieces, in_turn


class HeadlessShell(TypedDict, total=False):
    """The options that every mixer without heads takes, after its own."""

    out_features: int | None
    dtype: Any
    param_dtype: Any
    precision: Any
    implementation: dispatch.Implementation | None


class Headless(nnx.Module):
    """The shell of a mixer without heads: checks, batch axes, padding.

        y = finish(x, respond(x))

    A variant derives from this class directly. It writes `respond`, which mixes tokens, and where it can extend `state` and
    `respond_after`; or `state` and `_recur`, which does for both. It has `out`, or writes `finish`, of each token alone.

    Args:
        in_features: features D of the inputs.
        out_features: features F of the output. None: in_features.
        is_causal: a token sees itself and those before it.
        dtype: dtype of the computation, where its layer does not say float32. None: promoted from inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the linear maps.
        implementation: of the kernels; None takes the best that can run here; "reference" has forward derivatives, too, on a
            CPU of arrays below 4 Mi numbers: larger ones are computed a piece at a time, with backward passes written by hand.
    """

    supports: ClassVar[Support]
    shell: ClassVar[type] = HeadlessShell
    sees: Pattern | None  # which positions reach which, causality included; None: all reach all
    out: Any  # the output map, or None

    def __new__(cls, *arguments: Any, **given: Any):
        check_flags_of(cls.__name__, cls, given)
        return super().__new__(cls)

    def __init__(
        self, in_features: int, *, out_features: int | None = None, is_causal: bool = False, dtype: Any = None,
        param_dtype: Any = jnp.float32, precision: Any = None, implementation: dispatch.Implementation | None = None,
        rngs: nnx.Rngs, **unknown: Any,
    ):  # fmt: skip
        owner = type(self).__name__
        check_options(owner, unknown, options_of(type(self)) - set(unknown))
        out_features = in_features if out_features is None else out_features
        check_sizes(owner, in_features=in_features, out_features=out_features)
        check_causality(owner, self.supports, is_causal)
        check_dtypes(owner, dtype=dtype, param_dtype=param_dtype)
        dispatch.check_name(owner, implementation)
        check_rngs(owner, rngs)
        self.in_features, self.out_features = in_features, out_features
        self.is_causal, self.implementation = is_causal, implementation
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.sees = CAUSAL if is_causal else None

    def linear(self, in_features: int, out_features: int, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
        """A linear map in the layer's dtypes."""
        dtypes = dict[str, Any](dtype=self.dtype, param_dtype=self.param_dtype)
        return nnx.Linear(in_features, out_features, use_bias=use_bias, precision=self.precision, rngs=rngs, **dtypes)

    def respond(self, inputs: Float[Array, "B T D"], mask, segment_ids, **draws) -> Float[Array, "B T R"]:
        """What each token gets from all: of inputs whose padding, by `mask` [B, 1, 1, T], comes last and is 0."""
        if segment_ids is not None:
            return self._recur(inputs, segment_ids=segment_ids)[0]
        return in_turn(lambda inputs, state: self._recur(inputs, cache=state), inputs, self.state(len(inputs)))[0]

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: Any = None,
    ) -> tuple[Float[Array, "B T R"], Any]:  # fmt: skip
        """`respond`, and the cache after the last real token, where there is one before the first.

        `counts` is how many of the tokens each sample has, the first ones. None: all. Without a cache there is no token before.
        """
        raise NotImplementedError

    def finish(self, inputs: Float[Array, "N D"], responses: Float[Array, "N R"]) -> Float[Array, "N F"]:
        """The outputs, token by token."""
        return responses if self.out is None else self.out(responses)

    def draws(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> dict[str, Any]:
        """The keys of a call's random draws, by their words in `respond`; none where a layer draws nothing in a call."""
        return {}

    set_view = dropout.set_view

    def state(self, batch_size: int) -> Any:
        """The state before the first token, in float32: [B, *state], or a cache of several arrays by name."""
        raise NotImplementedError

    def respond_after(self, inputs: Float[Array, "B T D"], state, counts: Int[Array, "B"] | None):
        """`respond` for T more tokens from `state` on -> (responses, state).

        `counts` is how many of them each sample has, the first ones; the state is that after these. None: all.
        """
        return self._recur(inputs, counts, cache=state)

    def _promote(self, inputs):
        """The inputs in the dtype of the computation."""
        parameters = jax.tree.leaves(nnx.state(self, nnx.Param))
        return promote_dtype((inputs, *parameters[:1]), dtype=self.dtype)[0]

    def __call__(
        self,
        inputs_q: Float[Array, "*B T D"],
        inputs_kv: None = None,
        inputs_v: None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: None = None,
        segment_ids: Int[Array, "..."] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        sow_weights: bool = False,
        **flax: Unpack[FlaxCall],
    ) -> Float[Array, "*B T F"]:
        """Mixes the sequence. `deterministic`, `rngs` and `flax` are there so that layers interchange; few layers draw."""
        check_flax_call(self, flax)
        check_sowing(self, sow_weights)
        call = check_call(self, 1, inputs_q, inputs_kv, inputs_v, mask, positions, segment_ids)
        draws = self.draws(deterministic, rngs)
        outputs = self._call(call.inputs_q, call.mask, call.extras.get("segment_ids"), draws)
        return outputs.reshape(*call.batch, *outputs.shape[1:])

    @compile_once
    def _call(self, inputs, mask, segment_ids, draws):
        order = None if mask is None else padding.real_first(mask, inputs.shape[0])
        if order is not None:
            inputs, segment_ids = jax.tree.map(order.pack, (inputs, segment_ids))
            mask = order.mask[:, None, None]
        inputs = self._promote(inputs)
        outputs = in_pieces(self.finish, inputs, self.respond(inputs, mask, segment_ids, **draws))
        return outputs if order is None else order.unpack(outputs)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> Any:
        """The state before the first token. It holds float32 numbers for any length: max_length and dtype change nothing."""
        check_dtypes(type(self).__name__, dtype=dtype)
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return as_cache(self.state(batch_size))

    def extend(self, inputs: Float[Array, "B T D"], cache: Any, *, mask: Bool[Array, "B 1 1 T"] | None = None):
        """T >= 1 more tokens after those in `cache` -> (outputs [B, T, F], cache): the recurrence.

        Args:
            inputs: the new tokens.
            cache: of `init_cache`, or of the call before; not changed.
            mask: key padding of the new tokens; no time passes at a token masked out.
        """
        mask = check_extend(self, inputs, cache, mask)
        return self._extend(inputs, cache, mask)

    @compile_once
    def _extend(self, inputs, cache, mask):
        order = None if mask is None else padding.real_first(mask, inputs.shape[0])
        inputs = self._promote(inputs if order is None else order.pack(inputs))
        responses, after = self._respond_cached(inputs, cache, None if order is None else order.mask[:, None, None])
        outputs = in_pieces(self.finish, inputs, responses)
        return outputs if order is None else order.unpack(outputs), in_dtypes_of(cache, after)

    def _respond_cached(self, inputs: Float[Array, "B T D"], cache: Any, mask) -> tuple[Float[Array, "B T R"], Any]:
        """`respond` for T more tokens after those in `cache`, of which `mask` [B, 1, 1, T] has the real ones first."""
        state = cache.state if isinstance(cache, StateCache) else cache
        responses, state = self.respond_after(inputs, state, None if mask is None else counts(inputs, mask))
        return responses, as_cache(state)

    def pattern(self, length: int) -> np.ndarray:
        """What attends to what: bool [1, T, S] for T = S = length, True where the query may see the key."""
        check_sizes(type(self).__name__, 0, length=length)
        return patterns.grid(self.sees, length, length)


def as_cache(state: Any) -> Any:
    """The cache that holds a state, which may be one already."""
    return state if isinstance(state, tuple) else StateCache(state)
