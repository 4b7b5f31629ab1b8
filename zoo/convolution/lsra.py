"""LSRA: attention for one half of the features, a short convolution for the other."""

from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import dispatch
from subquad.zoo.base import Support
from subquad.zoo.cache import KVCache, StateCache, poisoned
from subquad.zoo.checks import (
    FlaxCall,
    cache_dtype,
    check_call,
    check_divides,
    check_extend,
    check_flax_call,
    check_rate,
    check_sizes,
    check_sowing,
    refuse,
    require_extend,
)
from subquad.zoo.convolution.dynamicconv import DynamicConv
from subquad.zoo.convolution.lightconv import LightConv
from subquad.zoo.dense.softmax import SoftmaxAttention
from subquad.zoo.headless import Headless, HeadlessShell


class LSRACache(NamedTuple):
    """Keys and values of each sample's real tokens so far, and the last inputs of the convolution."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    state: Float[Array, "B W D/2"]


class LSRA(Headless):
    """Long-short range attention: softmax attention of the first half of the features beside a convolution of the second.

        x = [x^1, x^2],   y = [softmax attention(x^1), lightweight or dynamic convolution(x^2)]                (section 4)

    Each has maps of its own from D / 2 features to F / 2; nothing mixes the halves but the feed-forward network behind.

    Cost: time O(T^2 D / 2 + T D (D + K)), memory O(T D); one extended token O(S D / 2), where the cache has room for S.
    Differs from the paper: not at all in the split. The released models have a lightweight convolution without GLU on the
        smallest task, elsewhere a dynamic one with it; here both are options. `dropout_rate` serves for weights and taps alike.

    Args:
        in_features: features D of the inputs; even.
        num_heads: heads of the attention; must divide D / 2.
        conv_heads: groups of features of the convolution with taps of their own; must divide D / 2. None: num_heads, as in the
            released models.
        conv_width: taps K of the convolution.
        is_dynamic: the convolution is `DynamicConv`, else `LightConv`.
        use_glu: gate its inputs.
        is_causal: a token sees itself and those before it.
        dropout_rate: probability of dropping an attention weight, and a tap; `train()` and `eval()` turn it on and off, off to
            begin with.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. out_features must be even.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]; tokens of different segments do not see each other; to the convolution, each run of
            equal ids is one.
        deterministic: without dropout; None takes what `train()` or `eval()` set.  rngs: `rngs.dropout()` draws the dropout.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: odd features; heads that do not divide; a dropout_rate outside 0..1; dropout without rngs.
    Numerics: those of `SoftmaxAttention` and of the convolution.
    Example:
        >>> layer = LSRA(64, num_heads=4, conv_width=7, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.key.shape, cache.state.shape
        ((2, 100, 4, 8), (2, 6, 32))

    Source: Wu et al., Lite Transformer with Long-Short Range Attention, ICLR 2020, arXiv 2004.11886; code:
        mit-han-lab/lite-transformer. The section is cited from memory.
    """

    supports = Support(cost="T^2", segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int = 4,
        conv_heads: int | None = None,
        conv_width: int = 31,
        is_dynamic: bool = False,
        use_glu: bool = True,
        is_causal: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        conv_heads = num_heads if conv_heads is None else conv_heads
        check_sizes(owner, num_heads=num_heads, conv_heads=conv_heads, conv_width=conv_width)
        check_rate(owner, dropout_rate)
        for name, features in (("in_features", in_features), ("out_features", self.out_features)):
            if features % 2:
                refuse(owner, name, features, "be even", "Half of them are the attention's, half the convolution's.")
        half = in_features // 2
        check_divides(owner, f"in_features / 2 = {half}", half, num_heads=num_heads, conv_heads=conv_heads)
        same = dict(
            out_features=self.out_features // 2, is_causal=is_causal, dropout_rate=dropout_rate, dtype=self.dtype,
            param_dtype=self.param_dtype, precision=self.precision, rngs=rngs,
        )  # fmt: skip
        self.attention = SoftmaxAttention(num_heads, half, broadcast_dropout=False, implementation=self.implementation, **same)
        self.local = (DynamicConv if is_dynamic else LightConv)(
            half, num_heads=conv_heads, conv_width=conv_width, use_glu=use_glu,
            implementation=dispatch.reference_or_best(self.implementation), **same,
        )

    def __call__(
        self, inputs_q, inputs_kv=None, inputs_v=None, *, mask=None, positions=None, segment_ids=None, deterministic=None,
        rngs=None, sow_weights=False, **flax: Unpack[FlaxCall],
    ):  # fmt: skip
        check_sowing(self, sow_weights)
        check_flax_call(self, flax)
        call = check_call(self, 1, inputs_q, inputs_kv, inputs_v, mask, positions, segment_ids)
        left, right = jnp.split(call.inputs_q, 2, axis=-1)
        words = dict(mask=call.mask, segment_ids=call.extras.get("segment_ids"), deterministic=deterministic, rngs=rngs)
        outputs = jnp.concatenate([self.attention(left, **words), self.local(right, **words)], axis=-1)
        return outputs.reshape(*call.batch, *outputs.shape[1:])

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LSRACache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        keys = self.attention.init_cache(batch_size, max_length, cache_dtype(self, dtype))
        return LSRACache(*keys, *self.local.init_cache(batch_size, max_length))

    def extend(self, inputs: Float[Array, "B T D"], cache: LSRACache, *, mask: Bool[Array, "B 1 1 T"] | None = None):
        """T >= 1 more tokens after those in `cache` -> (outputs [B, T, F], cache).

        Args:
            inputs: the new tokens.
            cache: of `init_cache`, or of the call before; not changed.
            mask: key padding of the new tokens; one masked out is seen by none, now or later.
        """
        mask = check_extend(self, inputs, cache, mask)
        left, right = jnp.split(inputs, 2, axis=-1)
        attended, keys = self.attention.extend(left, KVCache(*cache[:3]), mask=mask)
        convolved, state = self.local.extend(right, StateCache(cache.state), mask=mask)
        return poisoned(jnp.concatenate([attended, convolved], axis=-1), keys), LSRACache(*keys, *state)
