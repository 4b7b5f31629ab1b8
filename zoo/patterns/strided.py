"""Sparse Transformer: a local pattern and a long-range one, whose two steps connect any two tokens."""

from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from subquad.kernels import softmax
from subquad.kernels.dispatch import nearest
from subquad.zoo.base import Attention, Shell, Support, refuse, require_extend
from subquad.zoo.cache import KVCache, append

Pattern = Literal["strided", "fixed"]

# Queries that `extend` compares with the whole cache at once.
EXTEND_CHUNK = 64


class StridedAttention(Attention):
    """Softmax attention over the union, or by heads over one each, of two sparse patterns with stride l.

        y_i = sum_{j in A_i} softmax_j(q_i . k_j / sqrt(H)) v_j                                        (eqs. 2-4)
        strided:  A1_i = {j : i - l <= j <= i},                 A2_i = {j <= i : (i - j) mod l = 0}    (section 4.3)
        fixed:    A1_i = {j <= i : floor(j/l) = floor(i/l)},    A2_i = {j <= i : j mod l >= l - c}

    Cost: time O(T (l + T/l) N H) for "strided" and O(T (l + c T/l) N H) for "fixed", memory O(T): T^1.5 where l is about
        sqrt(T). One extended token O(S N H) after S tokens.
    Differs from the paper: `is_causal=False` is the symmetric extension, the same sets without j <= i and with
        |i - j| <= l; a row that may see no key gives 0 (A2 of "fixed" is empty before the first summary column).

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        is_causal: a token sees itself and those before it, as in the paper.
        pattern: "strided" for data with a period, such as images; "fixed" for text.
        stride: l, in tokens; about the square root of the length.
        num_summary: c, columns at the end of each block of "fixed" that all later tokens see.
        merge_heads: every head sees A1 and A2 together; False: even heads see A1, odd heads A2.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: an unknown pattern, a stride < 1, num_summary out of 1..stride, a pairwise mask.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = StridedAttention(4, 64, stride=10, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019, arXiv 1904.10509.
    """

    supports = Support(cost="T^1.5", grouped=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        pattern: Pattern = "strided",
        stride: int = 64,
        num_summary: int = 8,
        merge_heads: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        if pattern not in get_args(Pattern):
            refuse(owner, "pattern", repr(pattern), "be a known name", nearest(pattern, get_args(Pattern)))
        for name, size in (("stride", stride), ("num_summary", num_summary)):
            if not isinstance(size, int | np.integer) or size < 1:
                refuse(owner, name, repr(size), "be a positive integer", "Count tokens.")
        if pattern == "fixed" and num_summary > stride:
            refuse(owner, "num_summary", num_summary, f"be at most stride = {stride}", "The paper has 8 of 128.")
        if not merge_heads and self.num_kv_heads != num_heads:
            refuse(owner, "num_kv_heads", num_kv_heads, "be num_heads with merge_heads=False", "Leave it out.")
        self.kind, self.stride, self.num_summary, self.merge_heads = pattern, stride, num_summary, merge_heads

    def sees(self, query, key):
        """What the positions `query` see of the positions `key`, which broadcast: [1, ...] merged, else [2, ...]: A1, A2."""
        if self.kind == "strided":
            first, second = abs(query - key) <= self.stride, (query - key) % self.stride == 0
        else:
            first = query // self.stride == key // self.stride
            second = (key % self.stride >= self.stride - self.num_summary) & (query == query)
        if self.is_causal:
            first, second = first & (key <= query), second & (key <= query)
        return (first | second)[None] if self.merge_heads else np.stack([first, second])

    def attend(self, query, key, value, mask):
        local, far = (self._window, self._columns) if self.kind == "strided" else (self._block, self._summaries)
        if self.merge_heads:
            parts = [local(query, key, value, mask), *far(query, key, value, mask)]
            return softmax.merge(*zip(*parts, strict=True))[0]
        even, odd = ([heads[:, :, start::2] for heads in (query, key, value)] for start in (0, 1))
        heads = jnp.zeros_like(query).at[:, :, ::2].set(local(*even, mask)[0])
        if query.shape[2] == 1:
            return heads
        outputs, lses = zip(*far(*odd, mask), strict=True)
        return heads.at[:, :, 1::2].set(softmax.merge(outputs, lses)[0])

    # Each part returns outputs and log-sum-exps. Merged, the parts are disjoint: a key in both A1 and A2 is left to A1.

    def _call(self, query, key, value, mask, **positions):
        return softmax.attention(
            query, key, value, mask=mask, return_lse=True, implementation=self.implementation, **positions
        )

    def _window(self, query, key, value, mask):
        # Merged, the key at distance l belongs to A2.
        width = self.stride - self.merge_heads
        return self._call(query, key, value, mask, window_size=(width, 0 if self.is_causal else width))

    def _columns(self, query, key, value, mask):
        """A2 of "strided": every residue class modulo l is a sequence of its own, T/l long."""
        length, stride = query.shape[1], self.stride
        fold = lambda x: rearrange(_pad(x, 1, stride), "b (n l) ... -> (b l) n ...", l=stride)
        if mask is None and length % stride:
            mask = jnp.ones((1, 1, 1, length), bool)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (query.shape[0], 1, 1, length))
            mask = rearrange(_pad(mask, 3, stride), "b x y (n l) -> (b l) x y n", l=stride)
        unfold = lambda x: rearrange(x, "(b l) n ... -> b (n l) ...", l=stride)[:, :length]
        parts = self._before_and_after(*map(fold, (query, key, value)), mask, np.arange(-(-length // stride)))
        return [tuple(map(unfold, part)) for part in parts]

    def _block(self, query, key, value, mask):
        """A1 of "fixed"."""
        length, stride = query.shape[1], self.stride
        block = np.arange(length)[None] // stride
        return self._call(
            query, key, value, mask, is_causal=self.is_causal, query_segment_ids=block, key_segment_ids=block,
            window_size=stride - 1,
        )

    def _summaries(self, query, key, value, mask):
        """A2 of "fixed": the last c columns of each block, of the other blocks if merged."""
        length, stride, columns = query.shape[1], self.stride, self.num_summary
        chosen = np.flatnonzero(np.arange(length) % stride >= stride - columns)
        if not chosen.size:
            return [(jnp.zeros_like(query), jnp.full(query.shape[:3], -jnp.inf))]
        key, value = key[:, chosen], value[:, chosen]
        mask = None if mask is None else mask[..., chosen]
        if self.merge_heads:
            return self._before_and_after(query, key, value, mask, np.arange(length) // stride, chosen // stride)
        at = dict(query_positions=np.arange(length)[None], key_positions=chosen[None])
        return [self._call(query, key, value, mask, is_causal=self.is_causal, **(at if self.is_causal else {}))]

    def _before_and_after(self, query, key, value, mask, query_at, key_at=None):
        """The keys at smaller positions and, if not causal, those at larger ones: all but those at the query's own.

        With `merge_heads=False` the query's own position is no other part's, and is included.
        """
        key_at = query_at if key_at is None else key_at
        if not self.merge_heads:
            at = dict(query_positions=query_at[None], key_positions=key_at[None])
            return [self._call(query, key, value, mask, is_causal=self.is_causal, **(at if self.is_causal else {}))]
        sides = [(query_at - 1, (None, 0))] + [(query_at + 1, (0, None))] * (not self.is_causal)
        return [
            self._call(query, key, value, mask, query_positions=at[None], key_positions=key_at[None], window_size=window)
            for at, window in sides
        ]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> KVCache:
        require_extend(self)
        return KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))

    def attend_cached(self, query, key, value, mask, cache):
        start, length = cache.length, query.shape[1]
        cache = append(cache, key, value, None if mask is None else mask[:, 0, 0])
        slots = jnp.arange(cache.key.shape[1])
        keys, values = cache.key.astype(query.dtype), cache.value.astype(query.dtype)

        def some(queries_and_positions):
            queries, at = queries_and_positions
            seen = jnp.stack([*self.sees(at[:, None], slots[None])])
            seen = jnp.tile(seen, (-(-self.num_heads // len(seen)), 1, 1))[: self.num_heads] if len(seen) > 1 else seen
            seen = seen & cache.valid[:, None, None]
            return softmax.attention(queries, keys, values, mask=seen, implementation=self.implementation)

        chunk = min(length, EXTEND_CHUNK)
        padded = _pad(query, 1, chunk)
        at = start + jnp.arange(padded.shape[1])
        if chunk == padded.shape[1]:
            return some((query, at)), cache
        chunks = rearrange(padded, "b (i c) n h -> i b c n h", c=chunk), at.reshape(-1, chunk)
        return rearrange(jax.lax.map(some, chunks), "i b c n h -> b (i c) n h")[:, :length], cache

    def pattern(self, length: int) -> np.ndarray:
        at = np.arange(length)
        seen = np.asarray(self.sees(at[:, None], at[None]))
        return seen if self.merge_heads else seen[np.arange(self.num_heads) % 2]


def _pad(array, axis: int, multiple: int):
    """`array` with zeros (or False) at the end of `axis`, up to a multiple."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, width) if width[axis][1] else array
