"""Gated slot attention: softmax attention to a few slots, which take up tokens and forget them."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import linear, precision
from subquad.kernels.linear.slots import read_slots
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import SlotCache, counts
from subquad.zoo.checks import check_number, check_sizes, require_extend
from subquad.zoo.gated.decay import with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.projection import in_pieces, projection


class GatedSlotAttention(Attention):
    """Attention of every token to M slots, moving averages of keys and of values that gates steer: GSA.

        K_t = diag(alpha_t) K_{t-1} + (1 - alpha_t) k_t^T,   V_t = diag(alpha_t) V_{t-1} + (1 - alpha_t) v_t^T
        o_t = V_t^T softmax(K_t q_t),   alpha_t = sigmoid(W_a x_t)^{1 / tau}                              (section 3)
        q, k, v = silu(W x_t),   y_t = W_o norm(silu(o_t)),   norm(o) = s * o / sqrt(mean(o^2) + eps) of all heads together

    It is two passes of gated linear attention with a softmax between. A token that a slot has taken up stays apart from
    those in other slots, so that a small state holds single tokens.

    Cost: time O(T N M H), memory O(T N (M + H)); one extended token O(N M H) and a cache of that size whatever came before.
        Decays by slot multiply the products inside a chunk by the logarithm of its length (`kernels.linear.gated`).
    Differs from the paper: projections have biases unless `use_bias=False`, and start as other layers' do. Activations and the
        scale of the logits, 1, are those of its code.

    Args:
        num_heads: query heads N; must divide qkv_features. The paper has 4.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        num_slots: slots M of each head. The paper has 64.
        temperature: tau. The larger, the nearer to 1 the gates, and the longer the memory.
        is_causal: must be True: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; nothing fades at padding.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; a temperature that is not positive; is_causal=False; a pairwise mask.
    Numerics: gates, softmax, sums and the norm in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = GatedSlotAttention(4, 64, num_slots=32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.keys.shape
        (2, 4, 32, 16)

    Source: Zhang et al., Gated Slot Attention for Efficient Linear-Time Sequence Modeling, NeurIPS 2024, arXiv 2409.07146;
        code: fla-org/flash-linear-attention.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True, grouped=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        num_slots: int = 64,
        temperature: float = 8.0,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("GatedSlotAttention", num_slots=num_slots)
        check_number("GatedSlotAttention", "temperature", temperature, "(0, inf]", "The paper has 8.")
        self.num_slots, self.temperature = num_slots, temperature
        self.forget = projection(shell, in_features, (self.num_kv_heads, num_slots), rngs=rngs)
        self.norm = GatedNorm((num_heads, self.head_features), together=True, param_dtype=self.param_dtype)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, and the logits of alpha [B, T, K, M]."""
        maps = self.query, self.key, self.value
        # Of many tokens what goes into the activation is made twice, not kept.
        heads = (in_pieces(lambda x, linear=linear: nnx.silu(linear.of_tokens(x)), inputs_q) for linear in maps)
        return *heads, self.forget(inputs_q)

    def attend(self, query, key, value, logits, mask, segment_ids=None):
        weight, log_decay = self.gates(logits)
        return self.finish(self.recur(query, key, value, weight, with_segments(log_decay, segment_ids), mask)[0])

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> SlotCache:
        """An empty cache: float32 averages, no tokens. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        empty = lambda: jnp.zeros((batch_size, self.num_heads, self.num_slots, self.head_features), jnp.float32)
        return SlotCache(empty(), empty(), jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, query, key, value, logits, mask, cache):
        heads, *slots = self.recur(query, key, value, *self.gates(logits), mask, cache)
        return self.finish(heads), SlotCache(*slots, cache.seen + counts(query, mask))

    def gates(self, logits: Float[Array, "B T K M"]) -> tuple[Float[Array, "B T K M"], Float[Array, "B T K M"]]:
        """1 - alpha in the dtype of the logits, and log alpha in float32."""
        log_decay = in_pieces(lambda logits: nnx.log_sigmoid(precision.wide(logits)) / self.temperature, logits)
        return in_pieces(lambda log: -jnp.expm1(log).astype(logits.dtype), log_decay), log_decay

    def finish(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        return in_pieces(lambda heads: self.norm.of_tokens(nnx.silu(heads)), heads)

    def recur(self, query, key, value, weight, log_decay, mask, cache: SlotCache | None = None):
        """o [B, T, N, H], and K and V after the last token, from those of a cache, or from empty ones."""
        keys: Any = None if cache is None else cache.keys
        values: Any = None if cache is None else cache.values
        repeat = lambda heads: jnp.repeat(heads, self.num_heads // self.num_kv_heads, axis=2)
        key, value, weight, log_decay = map(repeat, (key, value, weight, log_decay))
        options: dict[str, Any] = dict(mask=mask, implementation=self.implementation)
        logits, keys = read_slots(query, weight, key, log_decay, initial_state=keys, **options)
        shares = in_pieces(lambda logits: jax.nn.softmax(precision.wide(logits), -1).astype(logits.dtype), logits)
        heads, values = linear.gated(shares, weight, value, log_decay, initial_state=values, return_state=True, **options)
        return heads, keys, values
