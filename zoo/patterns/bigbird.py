"""BigBird's attention: blocks of a window, of global tokens, and blocks that are drawn."""

from typing import Unpack

from flax import nnx

from subquad.kernels.patterns import CAUSAL, Band, GlobalKeys, Globals, InBlocks, Pattern, Random
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes


class BigBirdAttention(Attention):
    """Softmax attention of blocks of queries to neighbouring, global and random blocks of keys.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s in a block of {i - 1, i, i + 1} + G + R_h(i),  i = t // block_size

    Without num_global (the paper's internal construction, ITC) G is the first and the last of n = ceil(max_length / block_size)
    blocks, and queries of these two see all keys. With num_global = g (the external construction, ETC) the first g real tokens
    are seen by all and see all: tokens that stand in front of the text. R_h(i) are num_random blocks, drawn once without
    replacement from those that block i does not see otherwise, in every head.

    Cost: time O(T (5 + num_random) block_size N H), memory O(T); one extended token O((4 + num_random) block_size N H), cache
        O(max_length).
    Differs from the paper: a shorter input is one of max_length padded at its end, so that the same blocks are random and
        global at every length: choose max_length near the usual length, or short inputs meet few random blocks, and no last
        one. In the external construction blocks are counted from the first global token on. Causal attention, which the paper
        does not have, keeps what is past of a window and of the global tokens, and draws from past blocks alone: there nothing
        depends on n.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: the longest input, in tokens.
        block_size: tokens per block; the last block may be shorter.
        num_random: random blocks of each block of queries and each head.
        num_global: g, global tokens in front; None: the first and the last block.
        random_seed: of the random blocks. They follow from it, the head and the block alone: the same in training and
            evaluation and in every process. They are no variables: not a checkpoint, but this option says which they are.
            Layers above each other should have seeds of their own, `mixer_options=[dict(random_seed=i, ...) for i in ...]`.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D] with T <= max_length.  mask: True = attend; key padding only, [*B, 1, 1, T]; blocks count real
            tokens.
        segment_ids: [T] or [*B, T]; blocks are counted from the start of the whole input, and so are global tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: an input longer than max_length; a size below 1 or a number below 0; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = BigBirdAttention(4, 64, max_length=512, block_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape, round(layer.sees.density(512), 3)
        ((2, 100, 64), 0.295)

    Source: Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv 2007.14062.
    """

    supports = Support(cost="T", is_pattern=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int,
        block_size: int = 64,
        num_random: int = 3,
        num_global: int | None = None,
        random_seed: int = 0,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("BigBirdAttention", max_length=max_length, block_size=block_size)
        check_sizes("BigBirdAttention", 0, num_random=num_random, num_global=num_global or 0, random_seed=random_seed)
        self.max_length, self.block_size, self.num_random = int(max_length), int(block_size), int(num_random)
        self.num_global, self.random_seed = None if num_global is None else int(num_global), int(random_seed)
        past = CAUSAL if is_causal else None
        count = -(-self.max_length // self.block_size)
        blocks: Pattern = Band(1, 1)
        if num_global is None:
            blocks |= GlobalKeys(0, 1) if is_causal else Globals(0, 1) | Globals(count - 1, count)
        if num_random:
            blocks |= Random(self.num_random, count, self.random_seed, num_heads, ~blocks & past)
        self.sees = InBlocks(self.block_size, blocks & past)
        if num_global:
            self.sees |= GlobalKeys(0, num_global) if is_causal else Globals(0, num_global)
        self.sees &= past
