"""ETC's attention: long tokens see their neighbours and some global tokens, which see everything."""

from typing import Literal, Unpack, get_args

import jax.numpy as jnp
from flax import nnx

from subquad.kernels.patterns import Band, GlobalKeys, GlobalQueries, Pattern
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes, check_word
from subquad.zoo.patterns.longformer import attend_with_globals, copied, rotated

Sharing = Literal["none", "query", "all"]


class GlobalAttention(Attention):
    """Softmax attention of a long and a global input to both, with projections for each of the four ways.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    |t - s| <= radius or s < g,  for t >= g    (section 3.2)
        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    all s,                       for t < g

    The g = num_global first real tokens are the global input, those after them the long one. Keys and values have maps of their
    own from long to long tokens (`key`, `value`), long to global (`key_to_global`), global to global (`key_global`) and global
    to long (`key_to_long`), and queries from long (`query`) and from global tokens (`query_global`). One softmax is over what
    a token sees of both inputs.

    Cost: time O(T (2 radius + 1 + g) N H), memory O(T).
    Differs from the paper: no labels of relative positions (`rotary_base` rotates by them); inputs are one sequence, global
        tokens in front. The paper's masks, by which a global token sees those that it stands for, are not taken: it sees all.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        radius: tokens that a long token sees on each side, itself not counted.
        num_global: g, at least 0. With 0 this is `LocalAttention`.
        sharing: "none": the four maps of keys and of values. "query": one of each for what long tokens ask for and one for
            what global tokens ask for, which is `LongformerAttention`. "all": one for all, queries as well.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        is_causal: must be False: global tokens see all.
        shell: see `Attention`. The other maps start as copies of those from long to long tokens.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; the radius and global tokens count real
            tokens.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: a negative radius or number; an unknown sharing; is_causal; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = GlobalAttention(4, 64, radius=16, num_global=8, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Ainslie et al., ETC: Encoding Long and Structured Inputs in Transformers, 2020, arXiv 2004.08483.
    """

    supports = Support(
        cost="T", causal=False, extend=False, grouped=True, rotary=True,
        mixes_all="all packed sequences would share the global tokens of the first",
    )  # fmt: skip

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        radius: int = 84,
        num_global: int = 1,
        sharing: Sharing = "none",
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("GlobalAttention", 0, radius=radius, num_global=num_global)
        check_word("GlobalAttention", "sharing", sharing, get_args(Sharing))
        self.radius, self.num_global, self.sharing = int(radius), int(num_global), sharing
        self.seen_by_long: Pattern = Band(self.radius, self.radius)
        self.sees = self.seen_by_long
        if not self.num_global:
            return
        self.seen_by_long |= GlobalKeys(0, self.num_global)
        self.sees = self.seen_by_long | GlobalQueries(0, self.num_global)
        if sharing != "all":
            self.query_global, self.key_global, self.value_global = map(copied, (self.query, self.key, self.value))
        if sharing == "none":
            self.key_to_global, self.value_to_global = copied(self.key), copied(self.value)
            self.key_to_long, self.value_to_long = copied(self.key), copied(self.value)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads: (what long tokens ask for, what global tokens ask for)."""
        query, key, value = super().project(inputs_q)
        if not self.num_global:
            return (query, None), (key, None), (value, None)
        first = inputs_q[:, : self.num_global]
        if self.sharing == "all":
            return (query, query[:, : self.num_global]), (key, key), (value, value)
        queries = query, self.query_global(first)
        if self.sharing == "query":
            return queries, (key, self.key_global(inputs_q)), (value, self.value_global(inputs_q))
        ahead = lambda some, heads: jnp.concatenate([some, heads[:, self.num_global :]], axis=1)
        keys = ahead(self.key_to_global(first), key), ahead(self.key_global(first), self.key_to_long(inputs_q))
        values = ahead(self.value_to_global(first), value), ahead(self.value_global(first), self.value_to_long(inputs_q))
        return queries, keys, values

    def rotate(self, query, key, query_positions=None, key_positions=None):
        return rotated(super().rotate, query, key, query_positions, key_positions)

    def attend(self, query, key, value, mask):
        return attend_with_globals(query, key, value, mask, self.seen_by_long, False, self.implementation)
