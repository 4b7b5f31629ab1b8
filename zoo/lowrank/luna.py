"""Luna: tokens are packed into a few slots by one attention, and unpacked by another."""

import math
from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import linear, precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import LunaCache, counts, places
from subquad.zoo.checks import check_sizes, check_word, refuse, require_extend
from subquad.zoo.features import elu_plus_one
from subquad.zoo.padding import any_key
from subquad.zoo.projection import in_pieces, projection

Activation = Literal["softplus", "elu"]


class LunaAttention(Attention):
    """Two nested attentions: L learned slots attend to the tokens, and the tokens to what the slots gathered.

        y_P = Attn(p, x),   y_t = Attn(x_t, y_P),   Attn(a, b) = softmax(W_q a (W_k b)^T / sqrt(H)) W_v b    (pack, unpack)
        causal:  y_t = softmax(q_t K_t^T / sqrt(H)) V_t,   K_t = mean_{s <= t} a_s k_s^T,  V_t = mean_{s <= t} a_s v_s^T
                 a_s = omega(W_q p (W_k x_s)^T / sqrt(H)), a weight for each slot;  omega(z) = log2(1 + 2^z) or elu(z) + 1

    Both attentions have projections of their own. In the causal form a running mean with positive weights stands in the place
    of the softmax over positions, and q, k and v are projections of the tokens.

    Cost: time O((T + S) L N H), memory O((T + S) N (H + L)); one extended token O(L N H) and a cache of that size whatever
        came before.
    Differs from the paper: p is a parameter of each layer. There the first layer's is, and the next one takes y_P, with a
        residual and a norm, in its place; a layer of this library hands on its outputs alone, so that slots do not depend on
        the input of layers before. p starts normal with variance 1, as large as a token after a norm. Equations are from the
        authors' code, and from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_slots: slots L, the length of p. The paper has 16 to 256.
        share_key_value: keys are the values, in both attentions, as in the paper's experiments.
        activation: omega, with is_causal alone: "softplus", that of the released code, which has base 2 to be 1 at 0, or "elu".
            None: "softplus".
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; an unknown activation, or one without is_causal; a pairwise mask.
    Numerics: softmax, activation and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = LunaAttention(4, 64, num_slots=16, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Ma et al., Luna: Linear Unified Nested Attention, NeurIPS 2021, arXiv 2106.01540; code: facebookresearch/mega.
    """

    supports = Support(cost="T", cross=True, mixes_all="its slots hold mixtures of the whole sequence")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_slots: int = 256,
        share_key_value: bool = True,
        activation: Activation | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("LunaAttention", num_slots=num_slots)
        if activation is not None:
            check_word("LunaAttention", "activation", activation, get_args(Activation))
            if not is_causal:
                refuse("LunaAttention", "activation", repr(activation), "be None where is_causal is False",
                       "There the slots attend by softmax.")
        self.num_slots, self.share_key_value, self.activation = num_slots, share_key_value, activation or "softplus"
        self.slots = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (num_slots, in_features), self.param_dtype))
        heads = num_heads, self.head_features
        packed = in_features if is_causal else math.prod(heads)
        self.pack_query = projection(shell, in_features, heads, rngs=rngs)
        self.unpack_key = projection(shell, packed, heads, rngs=rngs)
        self.unpack_value = None if share_key_value else projection(shell, packed, heads, rngs=rngs)
        if share_key_value or is_causal:
            del self.value

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, and key and value of the packing; causal: query, key of the packing, and (key, value) of the unpacking."""
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        query, key = self.query(inputs_q), self.key(inputs_kv)
        if self.is_causal:
            return query, key, self.unpacked(inputs_q)
        if self.share_key_value:
            return query, key, key if inputs_v is None else self.key(inputs_v)
        return query, key, self.value(inputs_kv if inputs_v is None else inputs_v)

    def unpacked(self, inputs):
        """Keys and values that the tokens attend to."""
        key = self.unpack_key(inputs)
        return key, key if self.unpack_value is None else self.unpack_value(inputs)

    def attend(self, query, key, value, mask):
        slots = self.pack_query(self.slots[...][None])
        if self.is_causal:
            return self._attend_causal(query, key, value, slots, mask)[0]
        packed = self.pack(jnp.broadcast_to(slots.astype(key.dtype), (len(key), *slots.shape[1:])), key, value, mask)
        return softmax.attention(
            query, *self.unpacked(packed), mask=any_key(mask, self.num_slots), implementation=self.implementation
        )

    def pack(self, slots: Float[Array, "B L N H"], key, value, mask) -> Float[Array, "B L NH"]:
        """y_P, what the slots gather: all heads in a row."""
        packed: Any = softmax.attention(slots, key, value, mask=mask, implementation=self.implementation)
        return packed.reshape(*packed.shape[:2], -1)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> LunaCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        sums = lambda *shape: jnp.zeros((batch_size, self.num_heads, *shape), jnp.float32)
        features, slots = self.head_features, self.num_slots
        return LunaCache(sums(features, slots), sums(slots, features), jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, query, key, value, mask, cache):
        slots = self.pack_query(self.slots[...][None])
        heads, keys, values = self._attend_causal(query, key, value, slots, mask, cache)
        return heads, LunaCache(keys, values, cache.seen + counts(query, mask))

    def _attend_causal(self, query, key, value, slots, mask, cache=None):
        """Heads, and the sums after the last token."""
        keys, values, seen = (None, None, jnp.zeros(1, jnp.int32)) if cache is None else cache
        counted = jnp.broadcast_to(places(seen + 1, query.shape[1]), query.shape[:2])
        gates = in_pieces(lambda key: gate(key, slots[0], self.activation), key)
        options: dict[str, Any] = dict(mask=mask, return_state=True, implementation=self.implementation)
        sums, keys = linear.gated(query, value[0], gates, initial_state=keys, scale=self.head_features**-0.5, **options)
        weights = in_pieces(weights_of, sums, counted)
        sums, values = linear.gated(weights, gates, value[1], initial_state=values, **options)
        return in_pieces(mean, sums, counted), keys, values


@precision.promoting
@precision.full
def gate(key: Float[Array, "T N H"], slots: Float[Array, "L N H"], activation: Activation) -> Float[Array, "T N L"]:
    """omega of the scaled products with the slots."""
    wide = precision.wide  # on a CPU, bfloat16 products have bfloat16 sums
    logits = jnp.einsum("tnh,lnh->tnl", wide(key), wide(slots)) * key.shape[-1] ** -0.5
    if activation == "elu":
        return elu_plus_one(logits).astype(key.dtype)
    return jnp.logaddexp2(logits, jnp.zeros_like(logits)).astype(key.dtype)


@precision.promoting
def mean(sums: Float[Array, "T N X"], counted: Int[Array, "T"]) -> Float[Array, "T N X"]:
    return (precision.wide(sums) / counted[:, None, None]).astype(sums.dtype)


@precision.promoting
def weights_of(sums: Float[Array, "T N L"], counted: Int[Array, "T"]) -> Float[Array, "T N L"]:
    return jax.nn.softmax(precision.wide(sums) / counted[:, None, None], axis=-1).astype(sums.dtype)
