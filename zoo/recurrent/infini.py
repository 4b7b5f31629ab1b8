"""Infini-attention: exact attention within a segment, and linear attention to all segments before it."""

from typing import Any, Literal, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision, softmax
from subquad.kernels.patterns import CAUSAL, SameBlock
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, counts, pieces, places, write
from subquad.zoo.checks import check_sizes, check_word, require_extend
from subquad.zoo.extending import attend_to_cache
from subquad.zoo.features import elu_plus_one
from subquad.zoo.projection import head_by_head
from subquad.zoo.recurrent import segments

Update = Literal["linear", "delta"]
Memory = tuple[Float[Array, "B K H V"], Float[Array, "B K H"]]  # sums of features times values, and of features
LEAST = 1e-10  # of a denominator


class InfiniCache(NamedTuple):
    """The memory of each sample's whole segments so far, and keys and values of the segment that is not whole."""

    memory: Float[Array, "B K H V"]  # float32, whatever the dtype of the layer, as the normaliser
    normaliser: Float[Array, "B K H"]
    key: Float[Array, "B P K H"]  # P = segment_length - 1, not rotated; those after the newest mean nothing
    value: Float[Array, "B P K V"]
    seen: Int[Array, "B"]  # real tokens so far: the position of the next one


class InfiniAttention(Attention):
    """Causal softmax attention within segments, and linear attention to a memory of all segments before them.

        y_t = g a_mem + (1 - g) a_dot,   g = sigmoid(beta) for each head                                         (eq. 10)
        a_dot: softmax attention to the tokens up to t of its segment                                            (eq. 2)
        a_mem = s(q_t) M / (s(q_t) . z),   s = elu + 1                                                           (eq. 7)
        "linear":  M <- M + sum_s s(k_s)^T v_s,                           z <- z + sum_s s(k_s)                   (eq. 8)
        "delta":   M <- M + sum_s s(k_s)^T (v_s - s(k_s) M / (s(k_s) . z)),  z likewise                           (eq. 9)

    M and z are updated with a whole segment after it, so that a token sees the memory of the segments before its own. In the
    first segment, whose memory is empty, y_t = a_dot.

    Cost: time O(T (L + H) N H), memory O(T + (T / L) N H^2), L = segment_length; one extended token O((L + H) N H) whatever
        came before, and once in a segment its update; cache O(L N H + N H^2).
    Differs from the paper: eq. 7 is 0 / 0 in the first segment, where this layer has no gate. Gradients pass through the memory
        within a call; they stop between `extend` calls only if the caller stops them. Rotary positions (`rotary_base`) are in
        a_dot alone: the memory has no order. beta starts at 0. Equation numbers are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K, each with a memory; must divide num_heads. None: num_heads.
        segment_length: tokens L of a segment, counted from the first real token.
        update: "linear", or "delta", which writes of a value what the memory does not hold already.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; segments count real tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that are not positive or do not divide; a mask that is not key padding.
    Numerics: memory and softmax in float32, denominators at least 1e-10; agrees with the reference to 1e-5 (float32), 2e-2
        (bfloat16).
    Example:
        >>> layer = InfiniAttention(4, 64, segment_length=32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Munkhdalai et al., Leave No Context Behind: Efficient Infinite Context Transformers with Infini-attention, 2024,
        arXiv 2404.07143.
    """

    supports = Support(
        cost="T", bidirectional=False, grouped=True, rotary=True, mixes_all="its memory holds all segments before"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        segment_length: int = 2048,
        update: Update = "delta",
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("InfiniAttention", segment_length=segment_length)
        check_word("InfiniAttention", "update", update, get_args(Update))
        self.segment_length, self.update = int(segment_length), update
        self.within = SameBlock(self.segment_length) & CAUSAL
        self.beta = nnx.Param(jnp.zeros(num_heads, self.param_dtype))

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Heads, and queries and keys once more, which are not rotated."""
        query, key, value = super().project(inputs_q)
        return query, key, value, query, key

    def attend(self, query, key, value, plain_query, plain_key, mask):
        size, length = self.segment_length, query.shape[1]
        near = softmax.attention(query, key, value, pattern=self.within, implementation=self.implementation)
        if length <= size:
            return near
        whole = lambda x: padded(x, -length % size)
        from_nothing = lambda query, key, value: self.through(empty_memory(key, value), query, key, value)[0]
        far = head_by_head(from_nothing, *map(whole, (plain_query, plain_key, value)))
        return segments.gated(near, far[:, :length], self.beta, jnp.arange(length)[None], size)

    def through(self, memory: Memory, query, key, value) -> tuple[Float[Array, "B T N V"], Any]:
        """What the memory gives to whole segments, one after the other; and the memories before each, and after the last."""
        cut = lambda x: rearrange(x, "b (i l) ... -> i b l ...", l=self.segment_length)

        @jax.checkpoint
        def step(memory, segment):
            query, key, value = segment
            return self.updated(memory, key, value), (read(memory, features(query)).astype(value.dtype), memory)

        last, (far, before) = jax.lax.scan(step, memory, tuple(map(cut, (query, key, value))))
        states = jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), before, last)
        return rearrange(far, "i b l n v -> b (i l) n v"), states

    @precision.full
    def updated(self, memory: Memory, key, value) -> Memory:
        """The memory after a segment."""
        key, value = features(key), value.astype(jnp.float32)
        if self.update == "delta":
            value -= read(memory, key)
        return memory[0] + jnp.einsum("blkh,blkv->bkhv", key, value), memory[1] + key.sum(1)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> InfiniCache:
        """An empty cache; it keeps a segment and the memory, and takes more than max_length without harm."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        heads, features = self.num_kv_heads, self.head_features
        tokens = KVCache.zeros(batch_size, self.segment_length - 1, heads, features, self.cache_dtype(dtype))
        return InfiniCache(*empty_memory(*tokens[:2]), *tokens)

    def attend_cached(self, query, key, value, plain_query, plain_key, mask, cache):
        size, tokens, memory = self.segment_length, query.shape[1], tuple(cache[:2])
        at, new = cache.seen % size, counts(query, mask)
        number = -(-(size - 1 + tokens) // size)  # segments that the tokens may touch
        grid = lambda x: padded(x, number * size - x.shape[1])
        keys, values = (
            write(grid(old.astype(new.dtype)), new, at, mask) for old, new in ((cache.key, plain_key), (cache.value, value))
        )
        first = places(cache.seen - at, number * size)
        rotated = self.rotate(keys, keys, first, first)[1]
        near = attend_to_cache(self.within, query, KVCache(rotated, values, at + new), at, self.implementation)
        done = (at + new) // size
        if tokens == 1:
            far = read(memory, features(plain_query)).astype(near.dtype)
            updated = jax.lax.cond((done > 0).any(), lambda: self.updated(memory, keys, values), lambda: memory)
            states = jax.tree.map(lambda *x: jnp.stack(x), memory, updated)
        else:
            queries = write(grid(jnp.zeros((len(query), 0, *query.shape[2:]), query.dtype)), plain_query, at, mask)
            far, states = self.through(memory, queries, keys, values)
            far = pieces(padded(far, size), at, tokens)
        heads = segments.gated(near, far, self.beta, places(cache.seen, tokens), size)
        memory = jax.tree.map(lambda x: x[done, jnp.arange(len(done))], states)
        rest = (pieces(padded(x, size), done * size, size - 1).astype(cache.key.dtype) for x in (keys, values))
        return heads, InfiniCache(*memory, *rest, cache.seen + new)


def padded(tokens, more: int):
    """Tokens [B, S, ...] and room for some more."""
    return jnp.pad(tokens, ((0, 0), (0, more), (0, 0), (0, 0)))


def empty_memory(key: Float[Array, "B T K H"], value: Float[Array, "B T K V"]) -> Memory:
    """The memory of keys and values such as these, before the first."""
    (batch, _, heads, features), float32 = key.shape, jnp.float32
    return jnp.zeros((batch, heads, features, value.shape[3]), float32), jnp.zeros((batch, heads, features), float32)


def features(x):
    """s(x), in float32."""
    return elu_plus_one(x.astype(jnp.float32))


@precision.full
def read(memory: Memory, features: Float[Array, "B T N H"]) -> Float[Array, "B T N V"]:
    """The memory's values of some features, of its heads or of groups of them."""
    grouped = rearrange(features, "b t (k g) h -> b t k g h", k=memory[0].shape[1])
    values, total = jnp.einsum("btkgh,bkhv->btkgv", grouped, memory[0]), jnp.einsum("btkgh,bkh->btkg", grouped, memory[1])
    return rearrange(values / jnp.maximum(total, LEAST)[..., None], "b t k g v -> b t (k g) v")
