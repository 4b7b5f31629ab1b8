"""GAU: attention of one head with squared ReLUs in the place of a softmax, gated; mixer and network in one layer."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import dispatch, precision
from subquad.zoo import unit
from subquad.zoo.base import Support
from subquad.zoo.cache import KVCache, append, counts, places, poisoned
from subquad.zoo.checks import cache_dtype, check_length, check_sizes, refuse, require_extend
from subquad.zoo.extending import in_chunks
from subquad.zoo.headless import Headless, HeadlessShell

BLOCK = 256  # queries whose weights are held at a time


class GAU(Headless):
    """Gated attention unit: what one head attends to, times a gate.

        u = silu(W_u x),   v = silu(W_v x),   z = silu(W_z x)                                                (section 2.2)
        q = rotated(kappa_q z + mu_q),   k = rotated(kappa_k z + mu_k)
        y_t = W_o (u_t * sum_s a_ts v_s),   a_ts = relu(q_t . k_s / n + b_ts)^2,    s <= t if causal

    n is the number of tokens; b is a bias of positions. Two such layers are in the place of attention and network of a
    Transformer's block: V = 2 D.

    Cost: time O(T^2 (Z + V)), memory O(T (Z + V)) and the weights of a block of queries, as blocks are computed one by one and
        again in the backward pass; one extended token O(S (Z + V)), where the cache has room for S.
    Differs from the paper: where it is causal n is max_length, as there in training, whatever the length of the call, so that
        tokens to come change nothing. Its text was not at hand; the equations are those of JunnYu/FLASHQuad_pytorch, which has
        a constant n in both directions. Linear maps start as Flax's, with biases. Norm and residual belong to the block.

    Args:
        in_features: features D of the inputs.
        shared_features: Z of queries and keys.
        value_features: V. None: 2 D.
        bias: b: "rotary", the product of two learned vectors that are rotated by their positions, or "simple", one number for
            each distance, as the paper has for inputs below 512 tokens.
        rotary_base: longest wavelength of the positions that queries and keys are rotated by. None: no rotation.
        max_length: the longest input. Needed where is_causal, or with bias="simple"; else None.
        is_causal: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: an unknown bias; an odd shared_features with rotation; max_length where nothing needs it, or none where
        something does; more tokens than max_length.
    Numerics: logits and weights in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = GAU(64, shared_features=32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.
    """

    supports = Support(cost="T^2")
    shared_features: int  # these two by `unit.build`
    value_features: int

    def __init__(
        self,
        in_features: int,
        *,
        shared_features: int = 128,
        value_features: int | None = None,
        bias: unit.Bias = "rotary",
        rotary_base: float | None = 10_000.0,
        max_length: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        if (max_length is None) == (is_causal or bias == "simple"):
            refuse("GAU", "max_length", max_length, "be given where is_causal or with bias='simple', and only then",
                   "Without these n is the number of tokens.")
        if max_length is not None:
            check_sizes("GAU", max_length=max_length)
        self.max_length = max_length
        unit.build(self, 2, shared_features, value_features, bias, rotary_base, max_length or 1, rngs)

    def respond(self, inputs, mask, segment_ids):
        length = inputs.shape[1]
        check_length("GAU", "inputs_q", length, self.max_length)
        z, value = unit.tokens_of(self, inputs, None if mask is None else mask[:, 0, 0])
        query, key = unit.rotated_heads(self, z, jnp.arange(length)[None])
        number = jnp.maximum(counts(inputs, mask), 1)
        return self._attend(query, key, value, jnp.zeros(len(inputs), jnp.int32), number)

    def finish(self, inputs, responses):
        return unit.finish(self, inputs, responses)

    def _attend(self, query, key, value, start: Int[Array, "B"], number: Int[Array, "B"]) -> Float[Array, "B T V"]:
        """Weighted sums for queries at the positions from `start` on, of keys at those from 0 on; n: `number` if not causal."""
        run = lambda size: functools.partial(self._in_blocks, size)
        both = {"xla": run(BLOCK), "reference": run(query.shape[1])}
        return dispatch.run("gau.attention", both, self.implementation, query, key, value, start, number)

    @precision.full
    def _in_blocks(self, size, query, key, value, start, number):
        columns = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
        scale = 1 / self.max_length if self.is_causal else 1 / number.astype(jnp.float32)[:, None, None]

        @jax.checkpoint
        def of_block(query, start):
            rows = places(start, query.shape[1])
            logits = jnp.einsum("btnz,bsz->bts", query, key, preferred_element_type=jnp.float32)
            weights = unit.squared(logits * scale + unit.bias_of(self, rows, columns))
            if self.is_causal:
                weights = jnp.where(columns[:, None] <= rows[..., None], weights, 0)
            sums = jnp.einsum("bts,bsv->btv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
            return sums[:, :, None].astype(value.dtype)

        return in_chunks(of_block, query[:, :, None], start, size)[:, :, 0]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        check_length("GAU", "max_length", max_length, self.max_length)
        zeros = lambda features: jnp.zeros((batch_size, max_length, 1, features), cache_dtype(self, dtype))
        return KVCache(zeros(self.shared_features), zeros(self.value_features), jnp.zeros(batch_size, jnp.int32))

    def _respond_cached(self, inputs, cache, mask):
        z, value = unit.tokens_of(self, inputs, None if mask is None else mask[:, 0, 0])
        start = cache.length
        query, key = unit.rotated_heads(self, z, places(start, inputs.shape[1]))
        cache = append(cache, key[:, :, None], value[:, :, None], mask)
        keys, values = (x[:, :, 0].astype(query.dtype) for x in cache[:2])
        return poisoned(self._attend(query, keys, values, start, start), cache), cache
