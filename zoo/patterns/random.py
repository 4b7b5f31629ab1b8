"""Random attention: every block of queries sees blocks of keys that were drawn for it."""

from typing import Unpack

from flax import nnx

from subquad.kernels.patterns import CAUSAL, Band, InBlocks, Random
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes


class RandomAttention(Attention):
    """Softmax attention of blocks of queries to random blocks of keys.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s // block_size in R_h(t // block_size)    (section 2)

    R_h(i) are num_random of n = ceil(max_length / block_size) blocks, drawn once without replacement for block i in head h.
    With num_random >= n this is softmax attention.

    Cost: time O(T num_random block_size N H), memory O(T); one extended token O(num_random block_size N H), cache
        O(max_length).
    Differs from the paper: which has random keys beside a window and global ones (`BigBirdAttention`), and alone in an
        ablation. A shorter input is one of max_length padded at its end, so that the blocks are the same at every length;
        a head whose blocks all lie past the end gives 0. Causal attention draws from the blocks up to the query's own.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: the longest input, in tokens.
        block_size: tokens per block; the last block may be shorter.
        num_random: random blocks of each block of queries and each head.
        random_seed: of the blocks, see `BigBirdAttention`.
        is_causal: a token sees itself and those before it, within the blocks that were drawn.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D] with T <= max_length.  mask: True = attend; key padding only, [*B, 1, 1, T]; blocks count real
            tokens.
        segment_ids: [T] or [*B, T]; blocks are counted from the start of the whole input.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; a head that sees nothing adds 0.
    Raises: ValueError: an input longer than max_length; a size below 1; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = RandomAttention(4, 64, max_length=512, block_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape, round(layer.sees.density(512), 5)
        ((2, 100, 64), 0.09375)

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
        random_seed: int = 0,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("RandomAttention", max_length=max_length, block_size=block_size, num_random=num_random)
        check_sizes("RandomAttention", 0, random_seed=random_seed)
        self.max_length, self.block_size = int(max_length), int(block_size)
        self.num_random, self.random_seed = int(num_random), int(random_seed)
        among = CAUSAL if is_causal else Band(None, None)
        count = -(-self.max_length // self.block_size)
        drawn = Random(self.num_random, count, self.random_seed, num_heads, among)
        self.sees = InBlocks(self.block_size, drawn) & (CAUSAL if is_causal else None)
