"""Memorizing attention: a window, and the nearest keys of all segments before, by a gate."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import gather, precision, softmax
from subquad.kernels.patterns import Band
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import append, places, poisoned
from subquad.zoo.checks import check_sizes
from subquad.zoo.extending import attend_to_cache, in_chunks
from subquad.zoo.features import unit
from subquad.zoo.recurrent import segments

CHUNK = 64  # queries whose scores are held at a time
EPSILON = 1e-12  # added to the square of a length


class MemorizingAttention(Attention):
    """Causal attention to the tokens just before, and to the keys of earlier segments that are nearest to the query.

        y_t = g a_mem + (1 - g) a_dot,   g = sigmoid(b) for each head                                      (section 3.2)
        a_dot: softmax attention to the segment_length tokens before t, and t
        a_mem: softmax attention to the num_neighbors tokens s before the segment of t with the largest q_t . k_s
        logits are c q_t . k_s, where q and k have length 1, and c is learned by each head

    The memory is what earlier segments left: no gradient reaches its keys and values, and the choice has none; the query learns
    from what it found. Of keys that are equally near the earlier is chosen. In the first segment, whose memory is empty, y_t
    = a_dot.

    Cost: time O(T^2 N H) for the exact search and O(T (num_neighbors + segment_length) N H) for the rest, memory O(T
        num_neighbors N), no array of queries by keys; one extended token O(S N H) after S tokens.
    Differs from the paper: neighbours are exact, where it searches approximately on accelerators. Gradients pass through the
        window across segments, where it stops them at the segment. The window has no T5 biases; positions are left to the
        model. c starts at sqrt(H), and b at 0. One layer of its models has the memory: other layers are others of the zoo. That
        queries and keys have length 1, and the section, are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Every query head finds keys for itself.
        segment_length: tokens of a segment, counted from the first real token, and of the window.
        num_neighbors: keys that each query and head finds in the memory.
        memory_length: tokens before the segment that the memory holds. None: all.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; segments count real tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that are not positive or do not divide; a mask that is not key padding.
    Numerics: scores, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding finds another key.
    Example:
        >>> layer = MemorizingAttention(4, 64, segment_length=32, num_neighbors=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Wu et al., Memorizing Transformers, ICLR 2022, arXiv 2203.08913; queries and keys of length 1 of Henry et al.,
        Query-Key Normalization for Transformers, 2020, arXiv 2010.04245.
    """

    supports = Support(
        cost="T^2", bidirectional=False, grouped=True, mixes_all="its memory holds all tokens before, whatever their sequence"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        segment_length: int = 512,
        num_neighbors: int = 32,
        memory_length: int | None = None,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("MemorizingAttention", segment_length=segment_length, num_neighbors=num_neighbors)
        if memory_length is not None:
            check_sizes("MemorizingAttention", memory_length=memory_length)
        self.segment_length, self.num_neighbors, self.memory_length = int(segment_length), int(num_neighbors), memory_length
        self.window = Band(self.segment_length, 0)
        self.scale = nnx.Param(jnp.full(num_heads, self.head_features**0.5, self.param_dtype))
        self.gate = nnx.Param(jnp.zeros(num_heads, self.param_dtype))

    @precision.promoting
    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Queries of length c sqrt(H), so that attention divides by the latter; keys of length 1; values."""
        query, key, value = super().project(inputs_q)
        scale = (self.head_features**0.5 * self.scale[...].astype(jnp.float32))[:, None]
        return (unit(query, EPSILON) * scale).astype(query.dtype), unit(key, EPSILON).astype(key.dtype), value

    def attend(self, query, key, value, mask):
        start = jnp.zeros(len(query), jnp.int32)
        near = softmax.attention(query, key, value, pattern=self.window, implementation=self.implementation)
        return near if query.shape[1] <= self.segment_length else self.with_memory(near, query, key, value, start)

    def attend_cached(self, query, key, value, mask, cache):
        start, cache = cache.length, append(cache, key, value, mask)
        near = attend_to_cache(self.window, query, cache, start, self.implementation)
        key, value = (x.astype(query.dtype) for x in cache[:2])
        return poisoned(self.with_memory(near, query, key, value, start), cache), cache

    def with_memory(self, near, query, key, value, start: Int[Array, "B"]):
        """The attention of queries at the positions from `start` on, of which `near` is what the window gave."""
        key, value = jax.lax.stop_gradient((key, value))
        find = lambda query, start: self.find(query, places(start, query.shape[1]), key).swapaxes(1, 2)
        found = in_chunks(find, query, start, CHUNK).swapaxes(1, 2)
        far: Any = gather.attention(query, key, value, found, correct_duplicates=False, implementation=self.implementation)
        return segments.gated(near, far, self.gate, places(start, query.shape[1]), self.segment_length)

    @precision.promoting
    def find(
        self, query: Float[Array, "B T N H"], positions: Int[Array, "B T"], key: Float[Array, "B S K H"]
    ) -> Int[Array, "B N T L"]:
        """The nearest keys before the segment of each query; -1 for none. No gradient passes."""
        query = rearrange(jax.lax.stop_gradient(query), "b t (k g) h -> b k g t h", k=key.shape[2])
        scores = jnp.einsum("bkgth,bskh->bkgts", query, key, preferred_element_type=jnp.float32, precision="highest")
        at, first = jnp.arange(key.shape[1]), (positions // self.segment_length * self.segment_length)[..., None]
        held = at < first if self.memory_length is None else (at < first) & (at >= first - self.memory_length)
        scores, found = jax.lax.top_k(jnp.where(held[:, None, None], scores, -jnp.inf), min(self.num_neighbors, len(at)))
        return rearrange(jnp.where(scores > -jnp.inf, found, -1), "b k g t l -> b (k g) t l")
