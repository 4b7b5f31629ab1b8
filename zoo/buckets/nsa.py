"""Native sparse attention: compressed keys, blocks that these choose, and a window, each with a gate."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision, softmax
from subquad.kernels.patterns import Band
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.buckets.blocks import attend_to_blocks, attend_to_listed, best, chosen
from subquad.zoo.cache import KVCache, append, places, poisoned
from subquad.zoo.checks import check_sizes, check_word, refuse, require_extend
from subquad.zoo.extending import attend_to_cache
from subquad.zoo.projection import projection

Compression = Literal["mlp", "mean"]


class NSACache(NamedTuple):
    """Keys and values of each sample's real tokens so far, the token at position t in slot t of S, and compressed ones."""

    key: Float[Array, "B S 3*K H"]  # of the branches: selected, compressed, window
    value: Float[Array, "B S 3*K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    compressed_key: Float[Array, "B C K H"]  # those of blocks that are not complete mean nothing
    compressed_value: Float[Array, "B C K V"]


class NSAAttention(Attention):
    """Three causal attentions and their gates: to compressed blocks, to the blocks that matter most, and to a window.

        y_t = g_sel a_sel + g_cmp a_cmp + g_win a_win,   g = sigmoid(W_g x_t + b_g) for each head and branch        (eq. 5)
        a_cmp: softmax attention to phi(keys and values j d .. j d + l - 1), of every j with j d + l - 1 <= t       (eq. 7)
        a_sel: to the keys s <= t of num_blocks blocks of l' tokens: the first, the own and the one before it, and those with
               the largest importance, sum over the heads of a group and over j of p_tj |pieces of d shared with j|  (eq. 8-12)
        a_win: to the window_size tokens up to t                                                             (section 3.3.3)

    p are the weights of a_cmp; heads that share keys choose alike. Every branch has keys and values of its own. A compressed
    block is seen when it is complete, so nothing holds a later token. Of blocks with equal importance the earlier is chosen.
    The choice has no gradient: compressed keys learn through a_cmp, and blocks through a_sel if they are chosen.

    Cost: time O(T (T / d + num_blocks l' + window_size) N H): compressed keys are few, but grow with T; memory O(T
        num_blocks N H). One extended token O((S / d + num_blocks l' + window_size) N H) after S tokens; cache O(S K H).
    Differs from the paper: it says that phi is an MLP with positions within the block, and no more. Here it has one hidden
        layer of 4 H features and GELU, and is the same in all heads. Its sum of importance is here read as counting from 1.
        With rotary_base keys are rotated before they are compressed. Equation numbers are as remembered.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K of a branch; must divide num_heads. None: num_heads. The paper has groups of 16.
        block_size: tokens l' of a block to select.
        num_blocks: blocks that a query selects, all named below among them.
        num_initial: blocks at the start that are always selected.
        num_local: blocks that end with the own one that are always selected, itself among them.
        compression_size: tokens l that become one; a multiple of the stride.
        compression_stride: tokens d from one compressed block to the next; must divide block_size.
        window_size: tokens that the window holds, the query's own among them.
        compression: phi, "mlp", or "mean", which has no parameters.
        is_causal: must be True.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; blocks and windows count real tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that are not positive or do not divide; a mask that is not key padding.
    Numerics: importance, softmax and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16) where no
        rounding chooses another block.
    Example:
        >>> layer = NSAAttention(4, 64, num_kv_heads=1, block_size=16, num_blocks=4, window_size=32, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Yuan et al., Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, ACL 2025, arXiv
        2502.11089.
    """

    supports = Support(
        cost="T^2", bidirectional=False, grouped=True, rotary=True, mixes_all="a block may hold the tokens of two sequences"
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        block_size: int = 64,
        num_blocks: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        compression_size: int = 32,
        compression_stride: int = 16,
        window_size: int = 512,
        compression: Compression = "mlp",
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("NSAAttention", block_size=block_size, num_blocks=num_blocks, num_local=num_local, window_size=window_size,
                    compression_size=compression_size, compression_stride=compression_stride)  # fmt: skip
        check_sizes("NSAAttention", 0, num_initial=num_initial)
        check_word("NSAAttention", "compression", compression, get_args(Compression))
        for word, size in dict(compression_size=compression_size, block_size=block_size).items():
            if size % compression_stride:
                refuse("NSAAttention", "compression_stride", compression_stride, f"divide {word} = {size}", "Change one.")
        if num_blocks < num_initial + num_local:
            refuse("NSAAttention", "num_blocks", num_blocks, f"be at least num_initial + num_local = {num_initial + num_local}",
                   "Those are always selected.")
        self.block_size, self.num_blocks, self.window_size = int(block_size), int(num_blocks), int(window_size)
        self.num_initial, self.num_local = int(num_initial), int(num_local)
        self.size, self.stride = int(compression_size), int(compression_stride)
        heads = self.num_kv_heads, self.head_features
        for name in ("compressed_key", "compressed_value", "window_key", "window_value"):
            setattr(self, name, projection(shell, in_features, heads, rngs=rngs))
        self.branch_gate = projection(shell, in_features, (num_heads, 3), rngs=rngs)
        make = lambda: Compressor(self.size, self.head_features, shell, self.param_dtype, rngs)
        self.compress_key: Callable[[Any], Any] = make() if compression == "mlp" else mean
        self.compress_value: Callable[[Any], Any] = make() if compression == "mlp" else mean

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query heads, key and value heads of the branches one after the other, and gates [B, T, N, 3]."""
        x, together = inputs_q, lambda *maps: jnp.concatenate([one(x) for one in maps], axis=2)
        keys = together(self.key, self.compressed_key, self.window_key)
        values = together(self.value, self.compressed_value, self.window_value)
        return self.query(x), keys, values, nnx.sigmoid(self.branch_gate(x))

    def attend(self, query, keys, values, gates, mask):
        (key, *keys), (value, *values) = (jnp.split(x, 3, axis=2) for x in (keys, values))
        at = jnp.arange(self._number(query.shape[1]))[None]
        compressed = self.compress_key(self.pieces(keys[0], at)), self.compress_value(self.pieces(values[0], at))
        blocks = chosen(lambda *of_chunk: self.choose(*of_chunk, compressed[0]), query, self.block_size)
        selected = attend_to_blocks(query, key, value, blocks, self.block_size, self.implementation)
        window = softmax.attention(
            query, keys[1], values[1], pattern=Band(self.window_size - 1, 0), implementation=self.implementation
        )
        return self.gated(gates, selected, self.attend_to_compressed(query, *compressed), window)

    def gated(self, gates, *branches):
        gates = gates.astype(branches[0].dtype)
        return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))

    def _number(self, length: int) -> int:
        """How many compressed blocks as many tokens have; at least one, which is then not complete."""
        return max(1, (length - self.size) // self.stride + 1)

    def _ends(self, blocks):
        """The last token of a compressed block."""
        return blocks * self.stride + self.size - 1

    def pieces(self, tokens: Float[Array, "B S K H"], at: Int[Array, "#B C"]) -> Float[Array, "B C K l H"]:
        """The tokens of compressed blocks."""
        at = (at[..., None] * self.stride + np.arange(self.size)[None, None]).reshape(len(at), -1)
        taken = jnp.take_along_axis(tokens, jnp.asarray(at)[..., None, None], axis=1, mode="clip")
        return rearrange(taken, "b (c l) k h -> b c k l h", l=self.size)

    def attend_to_compressed(self, query, key, value, start=None):
        positions = None if start is None else places(start, query.shape[1])
        return softmax.attention(
            query, key, value, is_causal=True, query_positions=positions,
            key_positions=self._ends(np.arange(key.shape[1]))[None], implementation=self.implementation,
        )  # fmt: skip

    @precision.promoting
    def choose(
        self, query: Float[Array, "B T N H"], positions: Int[Array, "B T"], compressed: Float[Array, "B C K H"]
    ) -> Int[Array, "B K T P"]:
        """The blocks before its own that the queries of each group select; -1 for none. No gradient passes."""
        query, compressed = jax.lax.stop_gradient((query, compressed))
        count, own = compressed.shape[1], positions // self.block_size
        query = rearrange(query, "b t (k g) h -> b k g t h", k=compressed.shape[2])
        logits = jnp.einsum("bkgth,bckh->bkgtc", query, compressed, preferred_element_type=jnp.float32, precision="highest")
        seen = (self._ends(jnp.arange(count)) <= positions[..., None])[:, None, None]
        logits = jnp.where(seen, logits / self.head_features**0.5, -jnp.inf)
        weights = jnp.where(seen, jnp.exp(logits - jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(jnp.float32).min)), 0)
        weights = (weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)).sum(2)
        importance = jnp.einsum("bktc,cm->bktm", weights, self._shared(count), precision="highest")
        is_initial = lambda block, own: block < self.num_initial
        is_local = lambda block, own: block > own - self.num_local
        return best(importance, own[:, None], self.num_blocks - 1, (is_initial, is_local))

    def _shared(self, count: int) -> Float[Array, "C M"]:
        """How many pieces of d tokens each compressed block shares with each block."""
        first = np.arange(count)[:, None] * self.stride
        start = np.arange(-(-(self._ends(count - 1) + 1) // self.block_size)) * self.block_size
        common = np.minimum(first + self.size, start + self.block_size) - np.maximum(first, start)
        return jnp.asarray(np.maximum(common, 0) / self.stride, jnp.float32)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> NSACache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        dtype, features = self.cache_dtype(dtype), self.head_features
        tokens = KVCache.zeros(batch_size, max_length, 3 * self.num_kv_heads, features, dtype)
        compressed = KVCache.zeros(batch_size, self._number(max_length), self.num_kv_heads, features, dtype)
        return NSACache(*tokens, *compressed[:2])

    @precision.promoting
    def attend_cached(self, query, keys, values, gates, mask, cache):
        start, tokens = cache.length, append(KVCache(*cache[:3]), keys, values, mask)
        (key, *keys), (value, *values) = (jnp.split(x.astype(query.dtype), 3, axis=2) for x in tokens[:2])
        # The compressed blocks that the new tokens may complete; what stands in those that they do not is never seen.
        first = jnp.maximum((start - self.size) // self.stride + 1, 0)
        at = first[:, None] + jnp.arange(-(-query.shape[1] // self.stride))
        new = self.compress_key(self.pieces(keys[0], at)), self.compress_value(self.pieces(values[0], at))
        put = lambda old, new: old.at[jnp.arange(len(at))[:, None], at].set(new.astype(old.dtype), mode="drop")
        cached = [put(*pair) for pair in zip(cache[3:], new, strict=True)]
        compressed = [x.astype(query.dtype) for x in cached]
        choose = lambda *of_chunk: self.choose(*of_chunk, compressed[0])
        selected = attend_to_listed(query, key, value, start, choose, self.block_size, self.implementation)
        window = attend_to_cache(
            Band(self.window_size - 1, 0), query, KVCache(keys[1], values[1], tokens.length), start, self.implementation
        )
        heads = self.gated(gates, selected, self.attend_to_compressed(query, *compressed, start), window)
        return poisoned(heads, tokens), NSACache(*tokens, *cached)


class Compressor(nnx.Module):
    """The MLP that makes one key, or value, of the l of a block: [..., l, H] -> [..., H]."""

    def __init__(self, size: int, features: int, shell: Shell, param_dtype, rngs: nnx.Rngs):
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (size, features), param_dtype))
        self.inner = projection(shell, (size, features), 4 * features, axis=(-2, -1), rngs=rngs)
        self.outer = projection(shell, 4 * features, features, rngs=rngs)

    @precision.promoting
    def __call__(self, tokens):
        return self.outer(nnx.gelu(self.inner(tokens + self.position[...].astype(tokens.dtype))))


def mean(tokens):
    """The mean of a block's tokens, in place of the MLP."""
    return tokens.mean(-2)
