"""Compressive Transformer: Transformer-XL whose oldest memories are compressed before they are forgotten."""

import math
from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from subquad.kernels import softmax
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import CompressiveCache, counts, pieces, write
from subquad.zoo.checks import check_call, check_sizes, check_word, refuse, require_extend
from subquad.zoo.projection import projection
from subquad.zoo.recurrent import segments

Compression = Literal["mean", "max", "conv", "dilated", "most_used"]


class CompressiveAttention(Attention):
    """Causal attention within segments, to a memory of the tokens before them, and to groups of the tokens before that.

        h~_tau = [SG(c_tau), SG(m_tau), h_tau];  attention of h_tau to h~_tau as in Transformer-XL         (section 3, alg. 1)
        m_tau: the memory_length inputs before segment tau;  c_tau: the last compressed_length of f_c(groups of `rate` before m)

    f_c is a mean, a maximum, a convolution of as many taps as its stride, `rate`, or such a one whose taps stand `dilation`
    tokens apart; or it keeps one in `rate` of the tokens that leave with a segment, those that got most of the attention of all
    its queries and heads, in their order. Distances count slots: that of a compressed one is one more than that of the slot
    after it. At rate 1, where mean, maximum and most used do nothing, the layer is Transformer-XL with a memory of
    memory_length + compressed_length. Information travels back memory_length + rate x compressed_length tokens per layer,
    rounded up to segments where tokens of a whole segment share its slots.

    Convolutions learn from `reconstruction_loss` alone, which trains nothing else: add it to the loss of the task.

    Cost: time O(T (L + M + C) N H), memory O(T); one extended token O((L + M + C) D N H), as keys of the memories are projected
        anew; cache O((L + M + C) D). L = segment_length, M = memory_length, C = compressed_length. "most_used" takes the time
        of attention and its gradient once more, in `extend` where a segment ends.
    Differs from the paper: its text was not at hand, and what gradients stop at is as others report its algorithm 2. Its
        dilated convolutions are given by name alone; here one is of the tokens that leave with a segment, zeros around them.
        What it says of the most used, "sorted by their average attention", is taken of the segment with which they leave. The
        norm of the reconstruction loss is a mean of squares. Groups are counted from the first real token, so
        that a call of any length gives what `extend` gives however the tokens are cut. Biases, u and v as in
        `TransformerXLAttention`; gradients also stop between `extend` calls.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        segment_length: tokens L of a segment, counted from the first real token. A multiple of rate.
        memory_length: tokens M of memory before a segment. A multiple of rate.
        compressed_length: slots C of compressed memory before that.
        rate: tokens of a compressed slot.
        compression: f_c, "mean", "max", "conv", "dilated" or "most_used".
        dilation: tokens from tap to tap of "dilated", where 1 is "conv"; without a divisor in common with rate, as otherwise
            some tokens have no tap. None: rate + 1.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: is_causal=False, a length out of range or no multiple of rate, a dilation that leaves tokens out or is
        not asked for, a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = CompressiveAttention(
        ...     4, 64, segment_length=32, memory_length=32, compressed_length=16, compression="conv", rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 100, 64))
        >>> layer(x).shape, layer.reconstruction_loss(x).shape
        ((2, 100, 64), ())

    Source: Rae et al., Compressive Transformers for Long-Range Sequence Modelling, ICLR 2020, arXiv 1911.05507.
    """

    supports = Support(cost="T", bidirectional=False, mixes_all="a compressed slot holds tokens of several segments")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        segment_length: int = 512,
        memory_length: int = 512,
        compressed_length: int = 512,
        rate: int = 4,
        compression: Compression = "mean",
        dilation: int | None = None,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, segment_length=segment_length, rate=rate)
        check_sizes(owner, 0, memory_length=memory_length, compressed_length=compressed_length)
        check_word(owner, "compression", compression, get_args(Compression))
        for name, length in (("segment_length", segment_length), ("memory_length", memory_length)):
            if length % rate:
                refuse(owner, name, length, f"be a multiple of rate = {rate}", "Groups of tokens are compressed whole.")
        self.segment_length, self.memory_length = segment_length, memory_length
        self.compressed_length, self.rate, self.compression = compressed_length, rate, compression
        self.dilation = self._checked_dilation(dilation)
        segments.add_relative(self, shell, rngs)
        self.compressor = nnx.data(None)
        if compression in ("conv", "dilated"):
            self.compressor = projection(shell, (rate, in_features), in_features, axis=(-2, -1), rngs=rngs)

    def _checked_dilation(self, dilation):
        owner, rate = type(self).__name__, self.rate
        if self.compression != "dilated":
            if dilation is not None:
                refuse(owner, "dilation", dilation, f'be None where compression is "{self.compression}"', 'Choose "dilated".')
            return 1
        dilation = rate + 1 if dilation is None else dilation
        check_sizes(owner, dilation=dilation)
        if math.gcd(dilation, rate) > 1:
            refuse(owner, "dilation", dilation, f"have no divisor in common with rate = {rate}", "Or tokens have no tap.")
        return dilation

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """The inputs themselves: they are projected segment by segment, with their memory."""
        return (inputs_q,)

    def compress(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B G D"]:
        """f_c of whole segments, a slot for `rate` tokens; no gradient reaches the tokens."""
        tokens = lax.stop_gradient(tokens)
        if self.dilation == 1:
            groups = rearrange(tokens, "b (g r) d -> b g r d", r=self.rate)
        else:
            wider = (self.rate - 1) * (self.dilation - 1)  # than a group
            segment = rearrange(tokens, "b (i t) d -> b i t d", t=self.segment_length)
            segment = jnp.pad(segment, ((0, 0), (0, 0), (wider // 2, -(-wider // 2)), (0, 0)))
            at = np.arange(0, self.segment_length, self.rate)[:, None] + self.dilation * np.arange(self.rate)
            groups = rearrange(segment[:, :, at], "b i g r d -> b (i g) r d")
        if self.compressor is not None:
            return self.compressor(groups).astype(tokens.dtype)
        return groups.max(2) if self.compression == "max" else groups.mean(2)

    def attend(self, inputs, mask):
        batch, length, features = inputs.shape
        before = (length - 1) // self.segment_length * self.segment_length  # tokens before the last segment
        room, slots = min(self.memory_length, before), min(self.compressed_length, (before - self.memory_length) // self.rate)
        past, known = jnp.zeros((batch, room, features), inputs.dtype), jnp.zeros(batch, jnp.int32)
        older = None
        if slots > 0:
            nothing = jnp.zeros((batch, slots, features), inputs.dtype), jnp.zeros((batch, slots), bool)
            older = nothing, self._entering(jnp.concatenate([past, inputs], axis=1), length, known)
        return segments.attend_in_segments(self, inputs, past, known, mask, older=older)[0]

    def _entering(self, stream, length, known):
        """What enters the compressed memory after each whole segment of `length` tokens, and whether that is of tokens.

        The number alone of those that the attention to come must tell.

        Args:
            stream: [B, M + length, D], the first memory, of which the last `known` [B] are tokens, and then the tokens.
        """
        if self.compression == "most_used":
            return self.segment_length // self.rate
        whole = length // self.segment_length * self.segment_length
        first = jnp.arange(0, whole, self.rate)[None]
        return lax.stop_gradient(self.compress(stream[:, :whole])), first >= self.memory_length - known[:, None]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> CompressiveCache:
        """An empty cache; it keeps a fixed number of tokens and takes more than max_length without harm."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        zeros = lambda room: jnp.zeros((batch_size, room, self.in_features), self.cache_dtype(dtype))
        hidden = zeros(self.memory_length + self.segment_length - 1)
        return CompressiveCache(hidden, zeros(self.compressed_length), jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, inputs, mask, cache):
        size, room, slots = self.segment_length, self.memory_length, self.compressed_length
        tokens, new = inputs.shape[1], counts(inputs, mask)
        position, length = cache.seen % size, size - 1 + tokens
        known = cache.seen - position  # tokens before the segment
        # From the start of the memory on, so that segments stand where they stand in a call.
        stream = jnp.pad(cache.hidden.astype(inputs.dtype), ((0, 0), (0, tokens), (0, 0)))
        stream = write(stream, inputs, room + position, mask)
        stream = jnp.where((jnp.arange(room + length)[None] < room + (position + new)[:, None])[..., None], stream, 0)
        compressed = cache.compressed.astype(inputs.dtype)
        held = jnp.arange(slots)[None] >= slots - (jnp.maximum(known - room, 0) // self.rate)[:, None]
        known_past, done = jnp.minimum(known, room), (position + new) // size  # segments
        entering = self._entering(stream, length, known_past)

        def in_segments():
            real = jnp.arange(length)[None] < (position + new)[:, None]
            older = (compressed, held), entering
            return segments.attend_in_segments(
                self, stream[:, room:], stream[:, :room], known_past, real[:, None, None], older=older
            )

        if tokens == 1:
            heads, kept = self._attend_one(inputs, stream, compressed, held, known, position), None
            if self.compression == "most_used":
                nothing = jnp.zeros((len(inputs), 1, entering), jnp.int32)
                kept = lax.cond((done > 0).any(), lambda: in_segments()[1], lambda: nothing)
        else:
            heads, kept = in_segments()
            heads = pieces(heads, position, tokens)
        if kept is not None:
            at = (kept + size * jnp.arange(kept.shape[1])[:, None]).reshape(len(kept), -1, 1)
            entering = (jnp.take_along_axis(stream, at, axis=1),)
        hidden = pieces(jnp.pad(stream, ((0, 0), (0, size), (0, 0))), done * size, room + size - 1)
        compressed = pieces(jnp.concatenate([compressed, entering[0]], axis=1), done * (size // self.rate), slots)
        memories = ((hidden, cache.hidden), (compressed, cache.compressed))
        return heads, CompressiveCache(*(lax.stop_gradient(x).astype(old.dtype) for x, old in memories), cache.seen + new)

    def _attend_one(self, inputs, stream, compressed, held, known, position):
        """Attention of the one new token: the last of the keys, so that slots have their distances to it."""
        room, size = self.memory_length, self.segment_length
        at = jnp.arange(room + size)[None]
        valid = (at >= room - known[:, None]) & (at <= room + position[:, None])
        hidden = jnp.concatenate([compressed, stream], axis=1)
        hidden, valid = (
            jax.vmap(lambda x, by: jnp.roll(x, by, axis=0))(x, size - 1 - position)
            for x in (lax.stop_gradient(hidden), jnp.concatenate([held, valid], axis=1))
        )
        hidden = jnp.concatenate([hidden[:, :-1], inputs], axis=1)
        distances = segments.encodings(self, hidden.shape[1])
        query, key, value = self.query(inputs), self.key(hidden), self.value(hidden)
        return segments.attend(self, query, key, value, distances, valid[:, None, None])

    def reconstruction_loss(
        self, inputs: Float[Array, "*B T D"], *, mask: Bool[Array, "*B 1 1 T"] | None = None
    ) -> Float[Array, ""]:
        """How far attention to compressed memories is from attention to what they were made of (section 3, algorithm 2).

            mean |attn(h_tau, o_tau) - attn(h_tau, f_c(o_tau))|^2,   attn(h, o) = softmax((h W_q)(o W_k)^T / sqrt(H)) o W_v

        o_tau are the tokens that leave the memory after segment tau. Gradients stop at the inputs and at the projections: they
        reach the compressor alone. The mean is over queries of whole segments that lose tokens, and over features.

        Args:
            inputs, mask: as in a call.
        Returns: float32; 0 where nothing is compressed yet.
        Raises: ValueError: compression is "most_used", which has nothing to learn.
        """
        if self.compression == "most_used":
            refuse(type(self).__name__, "compression", '"most_used"', "be a function of what leaves the memory",
                   "Leave the loss out: the most used tokens are kept as they are.")
        call = check_call(self, self.num_heads, inputs, None, None, mask, None, None)
        x, mask = call.inputs_q, call.mask
        order = None if mask is None else padding.real_first(mask, x.shape[0])
        valid = jnp.ones(x.shape[:2], bool) if order is None else order.mask
        x = lax.stop_gradient(x if order is None else order.pack(x))
        whole = x.shape[1] // self.segment_length * self.segment_length
        if whole <= self.memory_length:
            return jnp.zeros((), jnp.float32)
        fold = lambda y: rearrange(y, "b (i c) ... -> (b i) c ...", i=whole // self.segment_length)
        old = jnp.pad(x, ((0, 0), (self.memory_length, 0), (0, 0)))[:, :whole]
        is_old = jnp.broadcast_to(jnp.arange(whole)[None] >= self.memory_length, old.shape[:2])
        query, key, value = (frozen(one) for one in (self.query, self.key, self.value))
        heads = fold(query(x[:, :whole]))

        def attention(hidden, seen):
            found = fold(key(hidden)), fold(value(hidden))
            found = softmax.attention(heads, *found, mask=fold(seen)[:, None, None], implementation=self.implementation)
            return found.astype(jnp.float32)

        error = jnp.square(attention(old, is_old) - attention(self.compress(old), is_old[:, :: self.rate])).mean((2, 3))
        counted = (fold(valid[:, :whole]) & fold(is_old).any(1, keepdims=True)).astype(jnp.float32)
        return jnp.sum(error * counted) / jnp.maximum(counted.sum(), 1)

    def pattern(self, length: int) -> np.ndarray:
        query, key = np.arange(length)[:, None], np.arange(length)
        start = query // self.segment_length * self.segment_length
        before = self.rate * self.compressed_length
        if self.compression in ("dilated", "most_used"):
            before = -(-before // self.segment_length) * self.segment_length
        return ((start - self.memory_length - before <= key) & (key <= query))[None]


def frozen(module: nnx.Module):
    """A copy of a module whose parameters have no gradient."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lax.stop_gradient, state))
