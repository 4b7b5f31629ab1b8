"""Transformer-XL: segments that attend to a memory of those before, with relative positions."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jax import lax

from subquad.kernels import relative
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import TransformerXLCache, counts, last, places
from subquad.zoo.checks import check_sizes, require_extend
from subquad.zoo.positions import sinusoidal


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
        the layer and start as in the authors' code, normal with deviation 0.02; normalisation and residual belong to
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
        self.position_features = in_features + in_features % 2
        self.relative = nnx.LinearGeneral(
            self.position_features, (num_heads, self.head_features), use_bias=False, dtype=self.dtype,
            param_dtype=self.param_dtype, precision=shell.get("precision"),
            kernel_init=shell.get("kernel_init", default_kernel_init), rngs=rngs,
        )
        bias = nnx.initializers.normal(0.02)
        shape = (num_heads, self.head_features)
        self.content_bias = nnx.Param(bias(rngs.params(), shape, self.param_dtype))
        self.position_bias = nnx.Param(bias(rngs.params(), shape, self.param_dtype))

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """The inputs themselves: they are projected segment by segment, with their memory."""
        return (inputs_q,)

    def attend(self, inputs, mask, segment_ids=None):
        # No more memory than the last segment can have.
        room = min(self.memory_length, (inputs.shape[1] - 1) // self.segment_length * self.segment_length)
        past = jnp.zeros((inputs.shape[0], room, inputs.shape[2]), inputs.dtype)
        return self._run(inputs, past, jnp.zeros(inputs.shape[0], jnp.int32), mask, ids=segment_ids)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> TransformerXLCache:
        """An empty cache; it keeps a fixed number of tokens and takes more than max_length without harm."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        room = self.memory_length + self.segment_length - 1
        hidden = jnp.zeros((batch_size, room, self.in_features), self.cache_dtype(dtype))
        return TransformerXLCache(hidden, jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, inputs, mask, cache):
        past, (room, tokens) = cache.hidden.astype(inputs.dtype), (cache.hidden.shape[1], inputs.shape[1])
        heads = self._run(inputs, past, cache.seen, mask, cache.seen % self.segment_length)
        past = last(jnp.concatenate([past, lax.stop_gradient(inputs)], axis=1), room, tokens, mask)
        return heads, TransformerXLCache(past.astype(cache.hidden.dtype), cache.seen + counts(inputs, mask))

    def _run(self, inputs, past, known, mask, position=None, ids=None):
        """Attention of the inputs in chunks of segment_length, each to the `past` before it and to itself.

        Args:
            inputs: [B, T, D] with key padding `mask` [B, 1, 1, T] or None.
            past: [B, P, D], the inputs just before, of which the last `known` [B] are some.
            position: of the first input in its segment, [B]; then each token's own segment bounds what it sees of the past.
                None: the chunks are the segments, and the past is their memory.
            ids: [B, T], of packed sequences; None: there is one.
        Returns: the heads [B, T, N, H].
        """
        length, room = inputs.shape[1], past.shape[1]
        size = min(self.segment_length, length)
        relative_key = self.relative(sinusoidal(jnp.arange(room + size), self.position_features))
        past = lax.stop_gradient(past)
        past_valid = jnp.arange(room)[None] >= room - known[:, None]
        valid = jnp.ones(inputs.shape[:2], bool) if mask is None else jnp.broadcast_to(mask[:, 0, 0], inputs.shape[:2])
        past_ids = None if ids is None else jnp.zeros(past_valid.shape, ids.dtype)  # nothing of a past that is not valid counts
        append = functools.partial(jax.tree.map, lambda *pair: jnp.concatenate(pair, axis=1))

        def chunk(memory, xs):
            hidden, *own = xs
            key, value, seen, key_ids = append(memory, (self.key(hidden), self.value(hidden), *own))
            mask = seen[:, None, None]
            if position is not None:
                mask &= self._reaches(position, hidden.shape[1], room)
            heads = relative.attention(
                self.query(hidden), key, value, relative_key, self.content_bias[...], self.position_bias[...],
                mask=mask, query_segment_ids=own[1], key_segment_ids=key_ids, implementation=self.implementation,
            )
            # The keys and values are those above; as memory they train the projections, but not the inputs.
            fixed = lax.stop_gradient(hidden)
            memory = append(memory, (self.key(fixed), self.value(fixed), *own))
            return jax.tree.map(lambda x: x[:, hidden.shape[1] :], memory), heads

        memory, outputs = (self.key(past), self.value(past), past_valid, past_ids), []
        tokens = inputs, valid, ids
        whole = length // size * size if length > size else 0
        if whole:
            chunks = jax.tree.map(lambda x: rearrange(x[:, :whole], "b (i c) ... -> i b c ...", c=size), tokens)
            # The backward pass projects each chunk anew, but keeps what attention gave.
            keep = jax.checkpoint_policies.save_only_these_names(relative.SAVED)
            memory, heads = lax.scan(jax.checkpoint(chunk, policy=keep, prevent_cse=False), memory, chunks)
            outputs.append(rearrange(heads, "i b c n h -> b (i c) n h"))
        if whole < length:
            _, heads = chunk(memory, jax.tree.map(lambda x: x[:, whole:], tokens))
            outputs.append(heads)
        return jnp.concatenate(outputs, axis=1)

    def _reaches(self, position, length, room):
        """True where a token's segment and its memory hold the key: [B, 1, T, P + T], without regard to causality."""
        in_segment = places(position, length) % self.segment_length
        distance = room + jnp.arange(length)[:, None] - jnp.arange(room + length)[None]
        return distance[None, None] <= self.memory_length + in_segment[:, None, :, None]

    def pattern(self, length: int) -> np.ndarray:
        query, key = np.arange(length)[:, None], np.arange(length)
        start = query // self.segment_length * self.segment_length
        return ((start - self.memory_length <= key) & (key <= query))[None]
