"""FLASH: gated attention units with squared ReLUs inside of chunks, and linear attention across them."""

import functools
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import dispatch, precision
from subquad.zoo import padding, unit
from subquad.zoo.base import Support
from subquad.zoo.cache import counts, pieces, places, write
from subquad.zoo.checks import cache_dtype, check_sizes, require_extend
from subquad.zoo.headless import Headless, HeadlessShell


class FLASHCache(NamedTuple):
    """The tokens of each sample's last, open chunk as they are, and sums of key times value before it and in it."""

    shared: Float[Array, "B C Z"]  # z; what stands after the newest token means nothing
    value: Float[Array, "B C V"]
    whole: Float[Array, "B Z V"]  # over all chunks before, in float32
    open: Float[Array, "B Z V"]  # over the open chunk so far
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class FLASH(Headless):
    """Mixed chunk attention in a gated attention unit: exact inside of chunks, linear from chunk to chunk.

        y_t = W_o (u_t * (sum_{s in t's chunk} relu(q_t . k_s / C + b_ts)^2 v_s + q'_t^T sum_{s'} k'_s' v_s'^T / n))
        u = silu(W_u x),   v = silu(W_v x),   z = silu(W_z x);   q, k, q', k': each rotated(kappa z + mu), its own kappa and mu
        bidirectional:  s' over all tokens, n their number
        causal:  s <= t;  s' over the chunks before t's, n = C                                              (section 3.2)

    Cost: time O(T (C (Z + V) + Z V)), memory O(T (C + Z + V + Z V / C)); one extended token O(C (Z + V) + Z V) and a cache of
        that size whatever came before.
    Differs from the paper: its text was not at hand; the equations and constant factors are those of FLASH-pytorch, which
        rotates half of the features and has T5's buckets for a bias. Chunks are counted from the first real token. Linear maps
        start as Flax's, with biases. Norm and residual belong to the block.

    Args:
        in_features: features D of the inputs.
        chunk_size: tokens C of a chunk.
        shared_features: Z of queries and keys.
        value_features: V. None: 2 D.
        bias: b, of positions in a chunk: "rotary", the product of two learned vectors that are rotated by their positions, or
            "simple", one number for each distance.
        rotary_base: longest wavelength of the positions that queries and keys are rotated by. None: no rotation.
        is_causal: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: an unknown bias; an odd shared_features with rotation; sizes below 1.
    Numerics: logits, weights and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = FLASH(64, chunk_size=32, shared_features=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Hua et al., Transformer Quality in Linear Time, ICML 2022, arXiv 2202.10447.
    """

    supports = Support(cost="T")
    shared_features: int  # these two by `unit.build`
    value_features: int

    def __init__(
        self,
        in_features: int,
        *,
        chunk_size: int = 256,
        shared_features: int = 128,
        value_features: int | None = None,
        bias: unit.Bias = "rotary",
        rotary_base: float | None = 10_000.0,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("FLASH", chunk_size=chunk_size)
        self.chunk_size = int(chunk_size)
        unit.build(self, 4, shared_features, value_features, bias, rotary_base, self.chunk_size, rngs)

    def respond(self, inputs, mask, segment_ids):
        z, value = unit.tokens_of(self, inputs, None if mask is None else mask[:, 0, 0])
        start, number = jnp.zeros(len(inputs), jnp.int32), jnp.maximum(counts(inputs, mask), 1)
        both = {"xla": lambda *arrays: self._in_chunks(*arrays)[0], "reference": self._at_once}
        return dispatch.run("flash.attention", both, self.implementation, z, value, start, number)

    def finish(self, inputs, responses):
        return unit.finish(self, inputs, responses)

    @precision.full
    def _in_chunks(
        self, z, value, start: Int[Array, "B"], number: Int[Array, "B"], before: Float[Array, "B Z V"] | None = None
    ):
        """Sums for tokens from `start` on, the first of a chunk -> (sums, what each chunk adds [B, G, Z, V]).

        Args:
            number: of all tokens, where it is not causal.
            before: the sum over all chunks before. None: 0.
        """
        length, size = z.shape[1], self.chunk_size
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        heads = unit.rotated_heads(self, z, places(start, length))
        query, key, far_query, far_key, value = (padding.in_blocks(x, size) for x in (*heads, value))
        at = jnp.arange(size)[None]
        weights = unit.squared(product("bgtz,bgsz->bgts", query, key) / size + unit.bias_of(self, at, at)[:, None])
        if self.is_causal:
            weights = jnp.where(jnp.tri(size, dtype=bool), weights, 0)
        near = product("bgts,bgsv->bgtv", weights.astype(value.dtype), value)
        added = product("bgsz,bgsv->bgzv", far_key, value)
        if self.is_causal:
            before = jnp.zeros_like(added[:, 0]) if before is None else before
            sums = jnp.cumsum(jnp.concatenate([before[:, None], added[:, :-1]], 1), axis=1) / size
        else:
            sums = added.sum(1, keepdims=True) / number.astype(jnp.float32)[:, None, None, None]
            sums = jnp.broadcast_to(sums, added.shape)
        far = product("bgtz,bgzv->bgtv", far_query, sums.astype(far_query.dtype))
        return rearrange((near + far).astype(value.dtype), "b g t v -> b (g t) v")[:, :length], added

    @precision.full
    def _at_once(self, z, value, start, number):
        """The same by the weights of all pairs: the specification."""
        at = places(start, z.shape[1])
        query, key, far_query, far_key = (precision.wide(x) for x in unit.rotated_heads(self, z, at))
        chunk, near = at // self.chunk_size, at % self.chunk_size
        near_weights = unit.squared(jnp.einsum("btz,bsz->bts", query, key) / self.chunk_size + unit.bias_of(self, near, near))
        far_weights = jnp.einsum("btz,bsz->bts", far_query, far_key)
        rows, columns = (lambda x: x[..., None]), (lambda x: x[:, None])
        is_near = rows(chunk) == columns(chunk)
        if self.is_causal:
            is_near &= columns(at) <= rows(at)
            far_weights = jnp.where(columns(chunk) < rows(chunk), far_weights / self.chunk_size, 0)
        else:
            far_weights = far_weights / number.astype(jnp.float32)[:, None, None]
        weights = jnp.where(is_near, near_weights, 0) + far_weights
        return jnp.einsum("bts,bsv->btv", weights, precision.wide(value)).astype(value.dtype)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> FLASHCache:
        """An empty cache; it keeps one chunk and two sums, and takes more than max_length without harm."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        zeros = lambda *shape: jnp.zeros((batch_size, *shape), cache_dtype(self, dtype))
        sums = lambda: jnp.zeros((batch_size, self.shared_features, self.value_features), jnp.float32)
        tokens = zeros(self.chunk_size, self.shared_features), zeros(self.chunk_size, self.value_features)
        return FLASHCache(*tokens, sums(), sums(), jnp.zeros(batch_size, jnp.int32))

    def _respond_cached(self, inputs, cache, mask):
        z, value = unit.tokens_of(self, inputs, None if mask is None else mask[:, 0, 0])
        run = self._one_more if inputs.shape[1] == 1 else self._more
        return dispatch.run("flash.attention", {"xla": run, "reference": run}, self.implementation, z, value, mask, cache)

    def _streams(self, z, value, mask, cache, room: int):
        """z and v from the open chunk's first token on, with `room` for more behind it; v is 0 where no token is yet."""
        position = cache.seen % self.chunk_size
        streams = []
        for held, new in ((cache.shared, z), (cache.value, value)):
            stream = padding.pad_end(held.astype(new.dtype), room)
            streams.append(write(stream, new, position, mask))
        total = position + counts(z, mask)
        is_token = jnp.arange(streams[0].shape[1])[None] < total[:, None]
        return streams[0], jnp.where(is_token[..., None], streams[1], 0), position, total

    def _more(self, z, value, mask, cache):
        size, length = self.chunk_size, z.shape[1]
        z, value, position, total = self._streams(z, value, mask, cache, size + length)
        sums, added = self._in_chunks(z, value, cache.seen - position, total, cache.whole)
        done = total // size  # chunks
        is_done = jnp.arange(added.shape[1])[None] < done[:, None]
        whole = cache.whole + jnp.sum(jnp.where(is_done[..., None, None], added, 0), axis=1)
        kept = (pieces(x, done * size, size).astype(old.dtype) for x, old in ((z, cache.shared), (value, cache.value)))
        cache = FLASHCache(*kept, whole, pieces(added, done, 1)[:, 0], cache.seen - position + total)
        return pieces(sums, position, length), cache

    @precision.full
    def _one_more(self, z, value, mask, cache):
        """`_more` of one token, which alone is a query."""
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        chunk, values, position, total = self._streams(z, value, mask, cache, 0)
        at = jnp.arange(self.chunk_size)[None]
        query, _, far_query, far_key = unit.rotated_heads(self, z, cache.seen[:, None])
        key = unit.rotated_heads(self, chunk, (cache.seen - position)[:, None] + at)[1]
        logits = product("btz,bsz->bts", query, key) / self.chunk_size + unit.bias_of(self, position[:, None], at)
        near = product("bts,bsv->btv", unit.squared(logits).astype(values.dtype), values)  # no value stands behind the newest
        far = product("btz,bzv->btv", far_query, (cache.whole / self.chunk_size).astype(far_query.dtype))
        so_far = cache.open + product("bsz,bsv->bzv", far_key, value)
        is_whole = (total == self.chunk_size)[:, None, None]
        whole, rest = jnp.where(is_whole, cache.whole + so_far, cache.whole), jnp.where(is_whole, 0, so_far)
        kept = (x.astype(old.dtype) for x, old in ((chunk, cache.shared), (values, cache.value)))
        return (near + far).astype(value.dtype), FLASHCache(*kept, whole, rest, cache.seen - position + total)
