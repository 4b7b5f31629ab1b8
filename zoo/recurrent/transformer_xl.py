"""Transformer-XL: segments that attend to a memory of those before, with relative positions."""

import functools
from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import TransformerXLCache, counts, last, places
from subquad.zoo.checks import check_sizes, require_extend
from subquad.zoo.recurrent import segments


class TransformerXLAttention(Attention):
    """Causal attention within segments and to a memory of the tokens before them, by content and distance.

        h~_tau = [SG(m_tau), h_tau];  q = W_q h_tau,  k = W_k h~_tau,  v = W_v h~_tau,  r_d = W_R R_d     (section 3.2)
        a_ij = ((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(H),    y_i = sum_j softmax_j(a_ij) v_j      (section 3.3)

    Segment tau is `segment_length` tokens; its memory m_tau is the `memory_length` inputs of this layer before it, and
    SG stops the gradient. A call of any length runs segment after segment, and gives what `extend` gives however the
    tokens are cut: a token sees the memory of its own segment and its segment up to itself. Through a stack of layers
    information therefore travels back memory_length tokens per layer.

    Cost: time O(T (L + M) N H), memory O(T); one extended token O((L + M) D N H), as keys of the memory are projected
        anew, whatever came before; cache O((L + M) D).
        L = segment_length, M = memory_length.
    Differs from the paper: the projections W_q, W_k, W_v and W_o have biases unless use_bias=False; u and v belong to
        the layer and start as in the authors' code, normal with standard deviation 0.02; normalisation and residual belong to
        the block; the encodings R_d hold sines before cosines, which permutes the rows of W_R. Gradients also stop
        between `extend` calls: to train on a stream, extend by whole segments.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        segment_length: tokens L of a segment, counted from the first real token.
        memory_length: tokens M of memory before a segment; 0: none.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T], of sequences packed into one: a token sees what it would see without them, of its own
            sequence only. Segments of segment_length are counted from the start of the whole input.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: is_causal=False, a length out of range, a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = TransformerXLAttention(4, 64, segment_length=32, memory_length=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Dai et al., Transformer-XL, ACL 2019, arXiv 1901.02860.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        segment_length: int = 512,
        memory_length: int = 512,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes(type(self).__name__, segment_length=segment_length)
        check_sizes(type(self).__name__, 0, memory_length=memory_length)
        self.segment_length, self.memory_length = segment_length, memory_length
        segments.add_relative(self, shell, rngs)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """The inputs themselves: they are projected segment by segment, with their memory."""
        return (inputs_q,)

    def attend(self, inputs, mask, segment_ids=None):
        # No more memory than the last segment can have.
        room = min(self.memory_length, (inputs.shape[1] - 1) // self.segment_length * self.segment_length)
        past = jnp.zeros((inputs.shape[0], room, inputs.shape[2]), inputs.dtype)
        known = jnp.zeros(inputs.shape[0], jnp.int32)
        return segments.attend_in_segments(self, inputs, past, known, mask, ids=segment_ids)[0]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> TransformerXLCache:
        """An empty cache; it keeps a fixed number of tokens and takes more than max_length without harm."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        room = self.memory_length + self.segment_length - 1
        hidden = jnp.zeros((batch_size, room, self.in_features), self.cache_dtype(dtype))
        return TransformerXLCache(hidden, jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, inputs, mask, cache):
        past, (room, tokens) = cache.hidden.astype(inputs.dtype), (cache.hidden.shape[1], inputs.shape[1])
        position = cache.seen % self.segment_length
        reaches = functools.partial(self._reaches, position)
        heads, _ = segments.attend_in_segments(self, inputs, past, cache.seen, mask, reaches=reaches)
        past = last(jnp.concatenate([past, lax.stop_gradient(inputs)], axis=1), room, tokens, mask)
        return heads, TransformerXLCache(past.astype(cache.hidden.dtype), cache.seen + counts(inputs, mask))

    def _reaches(self, position, length, room):
        """True where a token's segment and its memory hold the key: [B, 1, T, P + T], without regard to causality."""
        in_segment = places(position, length) % self.segment_length
        distance = room + jnp.arange(length)[:, None] - jnp.arange(room + length)[None]
        return distance[None, None] <= self.memory_length + in_segment[:, None, :, None]

    def pattern(self, length: int) -> np.ndarray:
        query, key = np.arange(length)[:, None], np.arange(length)
        start = query // self.segment_length * self.segment_length
        return ((start - self.memory_length <= key) & (key <= query))[None]
