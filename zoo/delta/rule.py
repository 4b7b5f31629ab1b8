"""What layers of the delta rule share: short convolutions, keys of unit length, the state, and the norm of what is read."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import linear, precision
from subquad.zoo.base import Attention
from subquad.zoo.cache import counts
from subquad.zoo.checks import check_sizes, require_extend
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.features import elu_plus_one, unit
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import Activation, GatedNorm
from subquad.zoo.projection import in_pieces

SMALL = 1e-6  # added to a squared length


class DeltaCache(NamedTuple):
    """The state after each sample's real tokens so far, and the last inputs of the convolutions; all float32, of one size."""

    state: Float[Array, "B N M V"]
    query: Float[Array, "B W-1 N*M"]
    key: Float[Array, "B W-1 K*M"]
    value: Float[Array, "B W-1 K*V"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class DeltaRule(nnx.Module):
    """The mechanism between the projections of a layer and its output map.

        q, k = u(c(q')), u(c(k')),   v = c(v'),   c(x) = silu(conv(x)), or x without a convolution
        S_t = D_t S_{t-1} + beta_t k_t (v_t - k_t^T D_t S_{t-1})^T,   o_t = norm(S_t^T q_t) * f(g_t)

    With several steps a token has so many keys, values and rates, which are written one after the other; D is of the first.

    Args:
        layer: that has it, with its `query`, `key` and `value` projections and `value_head_features`.
        conv_width: taps W of each convolution; None: no convolutions.
        num_steps: n steps for each token.
        features: u, of heads [..., M], wide. None: of length 1.
        gate: f.
    """

    def __init__(
        self, layer: Attention, *, conv_width: int | None, num_steps: int = 1, features: Callable[[Any], Any] | None = None,
        gate: Activation = "silu", rngs: nnx.Rngs,
    ):  # fmt: skip
        if conv_width is not None:
            check_sizes(type(layer).__name__, conv_width=conv_width)

        def convolution(projection):
            if conv_width is None:
                return nnx.data(None)
            return CausalConvolution(
                math.prod(projection.out_features), conv_width, param_dtype=layer.param_dtype,
                implementation=layer.implementation, rngs=rngs,
            )

        self.query, self.key, self.value = map(convolution, (layer.query, layer.key, layer.value))
        self.norm = GatedNorm((layer.value_head_features,), activation=gate, param_dtype=layer.param_dtype)
        self.features, self.implementation = unit_key if features is None else features, layer.implementation
        self.num_steps = num_steps
        self.state_shape = layer.num_heads, layer.head_features, layer.value_head_features

    def __call__(
        self, query, key, value, beta, log_decay, gate, mask, segment_ids=None, cache: DeltaCache | None = None
    ) -> tuple[Float[Array, "B T N V"], Any]:
        """The heads, and the cache after them where there is one before them.

        Args:
            query, key, value: as projected, [B, T, N, M], [B, T, n K, M] and [B, T, n K, V].
            beta: [B, T, n N].
            log_decay: of D, [B, T, N] or [B, T, N, M], or None.
            gate: g, [B, T, N, V], or None.
            mask: the real tokens, which are the first ones of each sample.
        """
        state, *before = (None,) * 4 if cache is None else cache[:4]
        convolutions, features = (self.query, self.key, self.value), (self.features, self.features, None)
        given = zip(convolutions, features, (query, key, value), before, strict=True)
        prepared = [prepare(*of, mask, segment_ids) for of in given]
        (query, key, value), recent = zip(*prepared, strict=True)
        if segment_ids is not None:
            log_decay = with_segments(jnp.zeros(query.shape[:3]) if log_decay is None else log_decay, segment_ids)
        steps_mask = mask
        if self.num_steps > 1:
            query, key, value, beta, log_decay, steps_mask = self.in_steps(query, key, value, beta, log_decay, mask)
        heads, after = linear.gated(
            query, key, value, log_decay, beta=beta, mask=steps_mask, initial_state=state, return_state=True,
            implementation=self.implementation,
        )  # fmt: skip
        heads = self.norm(heads[:, self.num_steps - 1 :: self.num_steps], gate)
        return heads, None if cache is None else DeltaCache._make([after, *recent, cache.seen + counts(heads, mask)])

    def in_steps(self, query, key, value, beta, log_decay, mask):
        """Steps in place of tokens: the first of a token decays, and the last is read."""
        n = self.num_steps
        key, value, beta = (rearrange(x, "b t (s k) ... -> b (t s) k ...", s=n) for x in (key, value, beta))
        beside = lambda x, before, after: jnp.pad(x[:, :, None], [(0, 0)] * 2 + [(before, after)] + [(0, 0)] * (x.ndim - 2))
        query = rearrange(beside(query, n - 1, 0), "b t s ... -> b (t s) ...")
        if log_decay is not None:
            log_decay = rearrange(beside(log_decay, 0, n - 1), "b t s ... -> b (t s) ...")
        return query, key, value, beta, log_decay, None if mask is None else jnp.repeat(mask, n, axis=-1)

    def empty(self, batch_size: int) -> DeltaCache:
        """The cache before the first token."""
        recent = [
            jnp.zeros((batch_size, 0, 0), jnp.float32) if convolution is None else convolution.empty(batch_size)
            for convolution in (self.query, self.key, self.value)
        ]
        state = jnp.zeros((batch_size, *self.state_shape), jnp.float32)
        return DeltaCache._make([state, *recent, jnp.zeros(batch_size, jnp.int32)])


class DeltaAttention(Attention):
    """The shell of a layer of the delta rule: a variant has a `rule`, and its `project` returns what that takes."""

    rule: DeltaRule

    def attend(self, query, key, value, beta, log_decay, gate, mask, segment_ids=None):
        return self.rule(query, key, value, beta, log_decay, gate, mask, segment_ids)[0]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> DeltaCache:
        """An empty cache: a state and a few inputs in float32. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return self.rule.empty(batch_size)

    def attend_cached(self, query, key, value, beta, log_decay, gate, mask, cache):
        return self.rule(query, key, value, beta, log_decay, gate, mask, cache=cache)


def prepare(convolution: CausalConvolution | None, features, heads: Float[Array, "B T N M"], state, mask, segment_ids):
    """u(c(x)) of projected heads, c(x) without features, and the state of the convolution after them.

    One pass over the tokens behind the convolution: the backward pass keeps what goes into it, and nothing between.
    """

    def activate(heads):
        heads = heads if convolution is None else nnx.silu(heads)
        return heads if features is None else features(heads).astype(heads.dtype)

    if convolution is not None:
        outputs, state = convolution(heads.reshape(*heads.shape[:2], -1), mask, segment_ids, state)
        heads = outputs.reshape(heads.shape)
    return in_pieces(activate, heads), state


def unit_key(heads: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
    """x / |x|, as far as |x| is not tiny, wide."""
    return unit(heads, SMALL)


@precision.promoting
def shares(heads: Float[Array, "*B M"]) -> Float[Array, "*B M"]:
    """elu(x) + 1, divided by its sum, wide."""
    x = elu_plus_one(precision.wide(heads))
    return x / jnp.sum(x, axis=-1, keepdims=True)


def rates(logits: Float[Array, "B T N"], negative_eigenvalues: bool) -> Float[Array, "B T N"]:
    """beta in (0, 1), or in (0, 2), where I - beta k k^T has the eigenvalue 1 - beta < 0."""
    return (1.0 + negative_eigenvalues) * nnx.sigmoid(precision.wide(logits))
