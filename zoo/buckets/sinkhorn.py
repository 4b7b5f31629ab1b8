"""Sinkhorn attention: every block of queries sees its own block and one mixed of all blocks by a learned soft sorting."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.kernels import matrix, precision, softmax
from subquad.kernels.matrix.reference import LEAST, normaliser
from subquad.kernels.softmax import few
from subquad.zoo import padding
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, SinkhornCache, append, pieces, places, poisoned
from subquad.zoo.checks import check_number, check_sizes, refuse
from subquad.zoo.linen import call_rngs
from subquad.zoo.padding import in_blocks
from subquad.zoo.projection import in_pieces, in_rows


class SinkhornAttention(Attention):
    """Softmax attention to the own block of C tokens and to a block that a sorting network mixes of all blocks.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s in block i of t and in the sorted block i           (section 3.2)
        sorted block i:  k'_io = sum_j S_ij k_jo,  v'_io = sum_j S_ij v_jo,   o = 1 .. C, for each head
        S = exp of I times {rows, then columns of L minus their log-sum-exp},  L = (R + noise) / temperature  (section 3.1)
        R_i = W_2 relu(W_1 psi_i),   psi_i = the sum of the inputs of block i                                   (section 3.1)
        causal:  psi_i = the sum of all inputs up to the first of block i;  S_ij = 0 for j >= i               (section 3.3)
        SortCut: all queries see the sorted blocks 1 .. sort_cut, and nothing else                            (section 3.4)

    S is nearly a permutation of blocks, learned by gradients; a small temperature makes it harder.

    Cost: time O(T (C + T / C) N H), memory O(T + (T / C)^2), so T^1.5 with C = sqrt(T), and O(T) for SortCut but for S. One
        extended token O(S N H + I N S / C) after S tokens.
    Differs from the paper: its causal columns are summed over the rows of all later blocks, which lets them move the past;
        here over the rows so far, so that this is strictly causal. What iterations approach is S_i,i-1 = 1, the
        only balanced matrix below the diagonal: fewer of them look further back. The first causal block has no sorted one.
        W_1 and W_2 have no biases (balancing takes that of W_2 away), and are each head's own. Where T is no multiple of C,
        keys and values that the last block lacks are 0 in sorted blocks. Rotary positions are not the paper's. Its section
        and equation numbers are cited from memory.

    Args:
        num_heads: heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: the longest input, in tokens: W_2 has a column for each of its blocks.
        block_size: tokens C per block; the last block may be shorter.
        num_iterations: I. The paper finds 5 to 10 about equal.
        temperature: divides R; the paper's best is 0.75.
        sort_cut: sorted blocks that all queries see; None: each block sees its own. Not with is_causal.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D] with T <= max_length.  mask: True = attend; key padding only, [*B, 1, 1, T].
        deterministic: without noise; None takes what `train()` or `eval()` set.  rngs: with it and not deterministic,
            `rngs.dropout()` draws Gumbel noise into R.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the projection of 0.
    Raises: ValueError: an input longer than max_length; sizes or a temperature that are not positive; sort_cut with is_causal;
        a mask that is not key padding.
    Numerics: sorting and softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = SinkhornAttention(4, 64, max_length=512, block_size=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Tay et al., Sparse Sinkhorn Attention, ICML 2020, arXiv 2002.11296.
    """

    supports = Support(cost="T^1.5", rotary=True, mixes_all="each of its sorted tokens is a mixture of all blocks")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int,
        block_size: int = 64,
        num_iterations: int = 8,
        temperature: float = 0.75,
        sort_cut: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        sizes = dict(max_length=max_length, block_size=block_size, num_iterations=num_iterations)
        check_sizes("SinkhornAttention", **sizes, **({} if sort_cut is None else dict(sort_cut=sort_cut)))
        check_number("SinkhornAttention", "temperature", temperature, "(0, inf)", "0.75 is the paper's.")
        if is_causal and sort_cut is not None:
            refuse("SinkhornAttention", "sort_cut", sort_cut, "be None with is_causal", "Its blocks hold tokens of the future.")
        self.max_length, self.block_size, self.num_iterations = max_length, block_size, num_iterations
        self.temperature, self.sort_cut = temperature, sort_cut
        self.deterministic = True  # `train()` and `eval()` set it
        hidden, blocks = self.head_features, -(-max_length // block_size)
        draw = lambda *shape, **axes: nnx.Param(
            nnx.initializers.lecun_normal(**axes)(rngs.params(), shape, self.param_dtype))
        self.sort_hidden = draw(in_features, num_heads, hidden, in_axis=0, out_axis=(1, 2))
        self.sort_scores = draw(num_heads, hidden, blocks, in_axis=1, out_axis=2, batch_axis=0)

    def draws(self, deterministic, rngs):
        rngs = call_rngs(rngs, type(self).__name__)
        if rngs is None or (self.deterministic if deterministic is None else deterministic):
            return {}
        return {"noise_rng": rngs.dropout()}

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Heads, and the inputs themselves for the sorting network."""
        return *super().project(inputs_q), inputs_q

    def attend(self, query, key, value, inputs, mask, noise_rng=None):
        self._check_length("inputs_q", query.shape[1])
        length = query.shape[1]
        real = padding.real(mask, query)
        key, value, inputs = (padding.clear(x, real) for x in (key, value, inputs.astype(jnp.float32)))
        query, key, value, inputs, real = (in_blocks(x, self.block_size) for x in (query, key, value, inputs, real))
        sums = inputs.sum(2)
        if self.is_causal:
            sums = jnp.cumsum(sums, axis=1) - sums + inputs[:, :, 0]
        sorting = self.sort(sums, real.any(2), noise_rng)
        if self.sort_cut is not None:
            sorting = sorting[:, :, : self.sort_cut]
        # The derivative keeps no copy of the tokens head by head.
        sorted_key, sorted_value = (jax.checkpoint(mix_blocks)(sorting, x) for x in (key, value))
        # A sorted block is as long as the longest, the first; a block without tokens has none.
        visible = real[:, :1] & real[:, : sorting.shape[2], :1]
        if self.sort_cut is not None:
            query, key, value = (rearrange(x, "b i c n h -> b (i c) n h") for x in (query, sorted_key, sorted_value))
            mask = rearrange(visible, "b i c -> b 1 1 (i c)")
            return softmax.attention(query, key, value, mask=mask, implementation=self.implementation)[:, :length]
        if self.is_causal:
            visible &= jnp.arange(visible.shape[1])[None, :, None] > 0
        keys, values = (key, sorted_key), (value, sorted_value)
        heads = attend_to_blocks(query, keys, values, (real, visible), self.is_causal, self.implementation)
        return heads[:, :length]

    def sort(self, sums: Float[Array, "B I D"], real: Bool[Array, "#B I"], noise_rng=None) -> Float[Array, "B N I I"]:
        """The matrices S by what represents each block; of blocks that are not real, rows and columns are 0."""
        logits = self.logits(sums, sums.shape[1])
        if noise_rng is not None:
            logits += jax.random.gumbel(noise_rng, logits.shape, jnp.float32) / self.temperature
        if self.is_causal:
            balance = functools.partial(balance_strictly, iterations=self.num_iterations)
            return in_rows(balance, logits.reshape(-1, *logits.shape[2:])).reshape(logits.shape)
        logits = jnp.where(real[:, None, :, None] & real[:, None, None, :], logits, -jnp.inf)
        return matrix.sinkhorn(logits, iterations=self.num_iterations, implementation=self.implementation)

    @precision.full
    def logits(self, sums: Float[Array, "B I D"], count: int) -> Float[Array, "B N I J"]:
        """R / temperature: a row for each block that is represented, a column for each of `count` blocks."""
        hidden = jax.nn.relu(jnp.einsum("bid,dnh->bnih", sums, self.sort_hidden[...].astype(jnp.float32)))
        return jnp.einsum("bnih,nhj->bnij", hidden, self.sort_scores[..., :count].astype(jnp.float32)) / self.temperature

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> SinkhornCache:
        tokens: KVCache = super().init_cache(batch_size, max_length, dtype)
        total, first = jnp.zeros((2, batch_size, self.in_features), jnp.float32)
        columns = (batch_size, self.num_iterations, self.num_heads, -(-max_length // self.block_size))
        return SinkhornCache(*tokens, total, first, columns=jnp.full(columns, LEAST, jnp.float32))

    def attend_cached(self, query, key, value, inputs, mask, cache):
        *cached, total, first, columns = cache
        start, tokens = cache.length, append(KVCache(*cached), key, value, mask)
        inputs = padding.clear(inputs.astype(jnp.float32), padding.real(mask, inputs))
        totals = total[:, None] + jnp.cumsum(inputs, axis=1)
        size, length = self.block_size, query.shape[1]

        # The new tokens in whole blocks: so many can they touch, from this one on.
        touched, block, offset = (length - 1 + size - 1) // size + 1, start // size, start % size
        at = size * places(block, touched) - start[:, None]  # of the first token of each block, among the new ones
        sums = jnp.where((at < 0)[..., None], first[:, None], jnp.take_along_axis(totals, at[..., None], axis=1, mode="clip"))
        full = tokens.length // size - block  # of the touched blocks, how many are full by now
        rows, columns = self.next_rows(sums, block, full, columns)
        first = jnp.take_along_axis(sums, full[:, None, None], axis=1, mode="clip")[:, 0]

        lay = jax.vmap(lambda x, at: jax.lax.dynamic_update_slice_in_dim(
            jnp.zeros((touched * size, *x.shape[1:]), x.dtype), x, at, 0))
        own, mixed = [], []
        for x in (tokens.key, tokens.value):
            x = in_blocks(x.astype(query.dtype), size)
            mixed.append(mix_blocks(rows, x))
            own.append(jax.vmap(functools.partial(jnp.take, axis=0, mode="clip"))(x, places(block, touched)))
        seen = jnp.broadcast_to((places(block, touched) > 0)[..., None], (len(query), touched, size))
        heads = attend_to_blocks(
            in_blocks(lay(query, offset), size), (own[0], mixed[0]), (own[1], mixed[1]), (jnp.ones_like(seen), seen), True,
            self.implementation,
        )
        return poisoned(pieces(heads, offset, length), tokens), SinkhornCache(*tokens, totals[:, -1], first, columns)

    def next_rows(self, sums: Float[Array, "B I D"], block, full, columns: Float[Array, "B R N J"]):
        """(rows [B, N, I, J] of S, for I blocks from `block` [B] on; the columns' sums over those of them that are `full`).

        Causal columns are summed up to the row, so a row needs of those before it nothing but these sums.
        """
        def step(columns, row):
            number, logits = row  # among the blocks; [B, N, J]
            allowed = (jnp.arange(logits.shape[-1]) < (block + number)[:, None])[:, None]
            row, after = balance_row(logits, allowed, columns)
            return jnp.where((number < full)[:, None, None, None], after, columns), row

        logits = rearrange(self.logits(sums, columns.shape[-1]), "b n i j -> i b n j")
        columns, rows = jax.lax.scan(step, columns, (jnp.arange(len(logits)), logits))
        return rearrange(rows, "i b n j -> b n i j"), columns


def balance_strictly(logits: Float[Array, "*B I I"], iterations: int) -> Float[Array, "*B I I"]:
    """The matrix below the diagonal, balanced so that no row depends on a later one: columns are summed up to the row.

        L_ij <- L_ij - log sum_{j' < i} exp L_ij',    L_ij <- L_ij - log sum_{j < i' <= i} exp L_i'j
    """
    allowed = jnp.tri(logits.shape[-1], k=-1, dtype=bool)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(x, _):
        x = jnp.where(allowed, x - normaliser(x, -1), LEAST)
        return jnp.where(allowed, x - jax.lax.cumlogsumexp(x, axis=x.ndim - 2), LEAST), None

    balanced, _ = jax.lax.scan(step, jnp.where(allowed, logits, LEAST), None, iterations)
    return jnp.where(allowed, jnp.exp(jnp.where(allowed, balanced, 0)), 0)


def balance_row(logits: Float[Array, "B N J"], allowed: Bool[Array, "B 1 J"], columns: Float[Array, "B R N J"]):
    """One row of `balance_strictly`, and the logarithms of the columns' sums up to it, from those up to the row before."""

    def step(x, column):
        x = jnp.where(allowed, x - normaliser(x, -1), LEAST)
        column = jnp.logaddexp(column, x)
        return jnp.where(allowed, x - column, LEAST), column

    balanced, columns = jax.lax.scan(step, jnp.where(allowed, logits, LEAST), columns.swapaxes(0, 1))
    return jnp.where(allowed, jnp.exp(jnp.where(allowed, balanced, 0)), 0), columns.swapaxes(0, 1)


@precision.full
def mix_blocks(sorting: Float[Array, "B N I J"], tokens: Float[Array, "B J C N H"]) -> Float[Array, "B I C N H"]:
    """The sorted blocks, one of all blocks for each row of the sorting."""
    batch, heads, rows, blocks = sorting.shape
    if few.are_few(rows, heads, blocks):  # a step of generation reads the blocks where they lie
        mixed = sorting.reshape(batch, heads * rows, blocks) @ tokens.reshape(batch, blocks, -1).astype(sorting.dtype)
        mixed = mixed.reshape(batch, heads, rows, *tokens.shape[2:])
        return jnp.einsum("bnicnh->bicnh", mixed).astype(tokens.dtype)  # of each row, its own head
    # In float32: on the CPU a sum of bfloat16 products is either bfloat16 or not implemented.
    mix = lambda sorting, x: jnp.einsum("rij,rjch->rich", sorting, x.astype(sorting.dtype)).astype(x.dtype)
    by_head = rearrange(sorting, "b n i j -> (b n) i j"), rearrange(tokens, "b j c n h -> (b n) j c h")
    return rearrange(in_rows(mix, *by_head), "(b n) i c h -> b i c n h", b=batch)


def attend_to_blocks(query, keys, values, visible, is_causal, implementation) -> Float[Array, "B T N V"]:
    """Attention of each block [B, I, C, N, H] to the own and to the sorted one.

    Args:
        keys, values: (own, sorted), each [B, I, C, N, H].
        visible: the same for masks [#B, #I, C].
        is_causal: in the own block.
    """
    visible = [jnp.broadcast_to(x, query.shape[:3]) for x in visible]
    positions = np.arange(query.shape[2], dtype=np.int32)[None]
    first = np.concatenate([positions, np.full_like(positions, -1)], 1)  # the sorted block lies before every query
    order: dict[str, Any] = dict(query_positions=positions, key_positions=first) if is_causal else {}

    def attend(query, *pairs):
        key, value, mask = (jnp.concatenate(pair, axis=1) for pair in zip(pairs[::2], pairs[1::2], strict=True))
        return softmax.attention(
            query, key, value, mask=mask[:, None, None], is_causal=is_causal, **order, implementation=implementation
        )

    return rearrange(in_pieces(attend, query, *keys, *values, *visible), "b i c n h -> b (i c) n h")
