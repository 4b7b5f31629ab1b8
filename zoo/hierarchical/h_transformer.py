"""H-Transformer-1D: attention to near tokens, and to means of groups that double in size with the distance."""

from typing import Any, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import gather, precision, softmax
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import HTransformerCache, append, pieces, places, poisoned, write
from subquad.zoo.checks import check_sizes, refuse
from subquad.zoo.projection import head_by_head


class HTransformerAttention(Attention):
    """Softmax attention whose logits are those of groups of 2^l tokens, where l grows with the distance.

        y_t = sum_s e_ts v_s / sum_s e_ts,   e_ts = exp(q^l_t . k^l_s / sqrt(H)),   l = level(t, s)       (sections 4 to 6)
        q^l_t, k^l_s: means over the group of 2^l tokens that t or s is in; causal layers keep q_t itself
        level(t, s): the first l at which the blocks of t and s are the same or neighbours; a block is block_size 2^l tokens

    All keys of a group have one weight, so that a level is attention over groups, to means of keys and sums of values: a token
    sees itself and its neighbours as in softmax attention, and of the rest a picture that is coarser the farther it is.
    Up to two blocks of tokens it is softmax attention; so it is where queries and keys are constant within groups.

    Cost: time O(T B N H), causal O(T B log(T / B) N H); memory O(T N H), causal with lists of O(T log(T / B)) integers; one
        extended token O(B log(S / B) N H + D N H) and a cache of 2 S keys and values, which grows with the sequence.
        B = block_size, S = max_length of the cache.
    Differs from the paper: its causal form takes means of queries over tokens of the future; here causal queries are not
        coarsened, and keys only in groups of the past that are complete, so that nothing depends on what follows. Groups are
        counted from the first real token, of which alone means are taken; any length goes. Its text was not at hand: these are
        its equations as others report them, the corner of two neighbours that a finer level has seen left out. The known
        package `h-transformer-1d` is another function (see tests/zoo/test_h_transformer.py). Rotary positions are not the
        paper's: means are of rotated queries and keys.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        block_size: tokens, and at every level groups, of a block: the paper's numerical rank N_r. Even.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save cache.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; outputs at padding mean nothing.
    Raises: ValueError: sizes that do not divide; an odd block_size; a mask that is not key padding.
    Numerics: means, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = HTransformerAttention(4, 64, block_size=8, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Zhu and Soricut, H-Transformer-1D, ACL 2021, arXiv 2107.11906.
    """

    supports = Support(
        cost="T log T", grouped=True, rotary=True, mixes_all="its groups are of neighbours, whatever their segment"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        block_size: int = 16,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, block_size=block_size)
        if block_size % 2:
            refuse(owner, "block_size", block_size, "be even", "A level sees the halves of a block apart.")
        self.block_size, self.half = block_size, block_size // 2

    def attend(self, query, key, value, mask):
        if self.is_causal:
            return head_by_head(self._attend_all_causal, query, key, value)
        counts = padding.real(mask, query).astype(jnp.float32)
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        return head_by_head(self._attend_both, query, key, value, by_sample=(counts,))

    def _attend_all_causal(self, query, key, value):
        length = query.shape[1]
        halves = jnp.arange(-(-length // self.half))[None]
        keys, values, means = [key[:, :0]], [value[:, :0]], (key, value)
        keys[0] = weighted(keys[0], 1)
        for level in coarse_levels(length, self.block_size):
            means = tuple(map(halved, means))
            keys.append(weighted(means[0], 2**level))
            values.append(means[1])
        coarse = jnp.concatenate(keys, 1), jnp.concatenate(values, 1)
        return self._attend_causal(query, key, value, *coarse, halves, self.half, jnp.arange(length)[None])

    def _attend_both(self, query, key, value, counts):
        """Attention of groups to groups, level by level, added up from the coarsest; counts [B, T] is 1 for real tokens."""
        length, levels = query.shape[1], [(query, key, value, counts)]
        while levels[-1][3].shape[1] > 2 * self.block_size:
            *finer, counts = levels[-1]
            levels.append((*(mean_of_pairs(x, counts) for x in finer), in_pairs(counts)))
        seen = listed(near(jnp.arange(-(-length // self.half)), False), self.half, length)
        own = gather.attention(
            query, key, value, seen[None, None], block_size=self.half, mask=(levels[0][3] > 0)[:, None, None],
            correct_duplicates=False, return_lse=True, implementation=self.implementation,
        )  # fmt: skip
        parts = [own, *(self._attend_levels(levels[1:]) if levels[1:] else [])]
        found = parts.pop()
        for finer in reversed(parts):
            spread = [jnp.repeat(x, 2, axis=1)[:, : finer[0].shape[1]] for x in found]
            found = softmax.merge(*zip(finer, spread, strict=True))
        return found[0]

    def _attend_levels(self, levels):
        """Outputs and log-sum-exp of each level alone, in one operation: compiled once, however many there are."""
        queries, lists, start = [], [], 0
        for query, *_, counts in levels:
            groups = counts.shape[1]
            seen = listed(far(jnp.arange(-(-groups // self.half)), False), self.half, groups)
            lists.append(jnp.where(seen < 0, -1, seen + start))
            queries.append(jnp.pad(query, ((0, 0), (0, -groups % self.half), (0, 0), (0, 0))))
            start += groups
        _, key, value, counts = (jnp.concatenate(x, 1) for x in zip(*levels, strict=True))
        found = gather.attention(
            asking(jnp.concatenate(queries, 1)), weighted(key, counts), value, jnp.concatenate(lists)[None, None],
            block_size=self.half, mask=(counts > 0)[:, None, None], scale=1.0, correct_duplicates=False, return_lse=True,
            implementation=self.implementation,
        )  # fmt: skip
        ends = np.cumsum([x.shape[1] for x in queries])
        return [
            [x[:, end - query.shape[1] :][:, : level[3].shape[1]] for x in found]
            for end, query, level in zip(ends, queries, levels, strict=True)
        ]

    def _attend_causal(self, query, key, value, coarse_key, coarse_value, halves, size: int, positions):
        """Attention of tokens at `positions` [B|1, T] to keys at 0, 1, ... and to means of groups, level after level.

        Args:
            halves: half blocks [B|1, I] in which the tokens stand, `size` tokens after each other in each.
        """
        length = key.shape[1]
        options: dict[str, Any] = dict(correct_duplicates=False, return_lse=True, implementation=self.implementation)
        own = gather.attention(
            query, key, value, listed(near(halves, True), self.half, length)[:, None], block_size=size, is_causal=True,
            query_positions=positions, **options,
        )
        if not coarse_levels(length, self.block_size):
            return own[0]
        lists, start = [], 0
        for level in coarse_levels(length, self.block_size):
            seen = listed(far(halves >> level, True), self.half, length >> level)
            lists.append(jnp.where(seen < 0, -1, seen + start))
            start += length >> level
        rest = gather.attention(
            asking(query), coarse_key, coarse_value, jnp.concatenate(lists, -1)[:, None], block_size=size, scale=1.0, **options
        )
        return softmax.merge(*zip(own, rest, strict=True))[0]

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> HTransformerCache:
        """An empty cache: room for max_length tokens, and for means of as many groups."""
        fine = super().init_cache(batch_size, max_length, dtype)
        levels = coarse_levels(max_length, self.block_size)
        counts = np.repeat([2.0**level for level in levels], [max_length >> level for level in levels])[None]
        zeros = jnp.zeros((batch_size, counts.size, self.num_kv_heads, self.head_features), fine.key.dtype)
        return HTransformerCache(fine.key, fine.value, fine.length, weighted(zeros, counts), zeros)

    def attend_cached(self, query, key, value, mask, cache):
        tokens, room, start = query.shape[1], cache.key.shape[1], cache.length
        key, value, length = append(cache, key, value, mask)
        coarse, finer, at = [cache.coarse_key, cache.coarse_value], [key, value], [0, 0]
        # Of each level the groups that the new tokens are in, from those of the level below.
        for level in coarse_levels(room, self.block_size):
            groups, begin = room >> level, at[1]
            count = min(((tokens - 1) >> level) + 2, groups)
            first = jnp.minimum(start >> level, groups - count)
            new = [halved(pieces(x, at[0] + 2 * first, 2 * count)[..., : self.head_features]) for x in finer]
            new[0] = weighted(new[0], 2**level)
            coarse = [write(x, y, begin + first, None) for x, y in zip(coarse, new, strict=True)]
            finer, at = coarse, [begin, begin + groups]
        positions = places(start, tokens)
        cached = (x.astype(query.dtype) for x in (key, value, *coarse))
        heads = self._attend_causal(query, *cached, positions // self.half, 1, positions)
        cache = HTransformerCache(key, value, length, *coarse)
        return poisoned(heads, cache), cache


def coarse_levels(length: int, block_size: int) -> range:
    """The levels above 0 that the last of `length` tokens sees in causal attention."""
    return range(1, max(1, ((length - 1) // block_size).bit_length()))


def in_pairs(x: Float[Array, "B G *axes"]) -> Float[Array, "B G_2 *axes"]:
    """The sums of neighbours; the last may have none."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, 2, *x.shape[2:]).sum(2)


def mean_of_pairs(x: Float[Array, "B G N H"], counts: Float[Array, "B G"]) -> Float[Array, "B G_2 N H"]:
    """The means of neighbours that are means of `counts` tokens."""
    sums = in_pairs(precision.wide(x) * counts[..., None, None])
    return (sums / jnp.maximum(in_pairs(counts), 1)[..., None, None]).astype(x.dtype)


def halved(x: Float[Array, "B G K H"]) -> Float[Array, "B G_2 K H"]:
    """The means of neighbours, without a last one that has none."""
    return (0.5 * in_pairs(precision.wide(x[:, : x.shape[1] // 2 * 2]))).astype(x.dtype)


def asking(query: Float[Array, "B T N H"]) -> Float[Array, "B T N H+2"]:
    """Queries for `weighted` keys, at a scale of 1."""
    ones = jnp.ones((*query.shape[:3], 2), query.dtype)
    return jnp.concatenate([query * jnp.asarray(query.shape[3] ** -0.5, query.dtype), ones], -1)


@precision.promoting
def weighted(key: Float[Array, "B G K H"], counts: Float[Array, "#B #G"] | np.ndarray | int) -> Float[Array, "B G K H+2"]:
    """Keys with the weights of as many as they are means of: the logarithm, in two parts so that half precision holds it."""
    log = jnp.log(jnp.maximum(jnp.asarray(counts, jnp.float32), 1))
    most = log.astype(key.dtype)
    parts = jnp.stack([most, (log - most.astype(jnp.float32)).astype(key.dtype)], -1)[..., None, :]
    return jnp.concatenate([key, jnp.broadcast_to(parts, (*key.shape[:3], 2))], -1)


@precision.promoting
def near(halves: Int[Array, "*I"], is_causal: bool) -> Int[Array, "*I L"]:
    """The half blocks of the block before that of each, of its own, and of the one after it."""
    return (halves - halves % 2 - 2)[..., None] + jnp.arange(4 if is_causal else 6)


def far(halves: Int[Array, "*I"], is_causal: bool) -> Int[Array, "*I L"]:
    """The half blocks of the blocks beside that of each which are no neighbours of the half itself, negative for none.

    Neighbours are those of the level below, whose blocks are these halves.
    """
    is_second = halves % 2 == 1
    if is_causal:
        return jnp.stack([halves - 2, jnp.where(is_second, halves - 3, -1)], -1)
    return jnp.stack([halves - 2, halves + 2, jnp.where(is_second, halves - 3, halves + 3)], -1)


@precision.promoting
def listed(halves: Int[Array, "*I L"], size: int, length: int) -> Int[Array, "*I _"]:
    """The places in half blocks of `size`, -1 for what is not among the first `length`."""
    at = halves[..., None] * size + np.arange(size)
    return jnp.where((at >= 0) & (at < length), at, -1).reshape(*halves.shape[:-1], -1)
