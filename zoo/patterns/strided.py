"""The Sparse Transformer's factorised attention: a local part and a part that reaches far in steps."""

import functools
from typing import Literal, Unpack, get_args

import numpy as np
from flax import nnx

from subquad.kernels import patterns, softmax, strided
from subquad.kernels.patterns import Band, Columns, Interleaved, SameBlock, Strided
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes, check_word, refuse
from subquad.zoo.patterns.groups import EVEN, ODD, in_groups

Pattern = Literal["strided", "fixed"]
Heads = Literal["merged", "separate"]


class StridedAttention(Attention):
    """Softmax attention to nearby tokens and, further away, to every l-th token or to summary columns.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s in A1(t) or A2(t)                            (section 4.3)
        strided:  A1 = {s: t - l <= s <= t},        A2 = {s <= t: (t - s) mod l = 0}
        fixed:    A1 = {s <= t: s // l = t // l},   A2 = {s <= t: s mod l >= l - c}

    `heads="merged"` attends to the union of A1 and A2; "separate" to A1 in even heads and to A2 in odd heads.

    Cost: time O(T (l + c T / l) N H) with c = 1 if strided, so O(T^1.5) where l is about sqrt(T); memory O(T); one extended
        token O((l + c S / l) N H) after S tokens, cache O(max_length).
    Differs from the paper: A2 of "fixed" has the c columns that the text describes and the authors' code uses, not the
        c + 1 of the formula's inclusive range; bidirectional attention, which the paper does not have, drops s <= t and
        makes the window t - l <= s <= t + l; nothing is interleaved between layers.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        pattern: "strided" or "fixed".
        stride: l, in tokens; best near the square root of the usual length.
        num_summary: c, the columns of each block of l that "fixed" shows to all later tokens; at most l. None: l / 16.
        distinct_summary: each head has summary columns of its own: the last c of a block, the c before those, and so on
            around (the paper's advice for several heads). False: all heads have the last c.
        heads: "merged" or "separate".
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
        segment_ids: [T] or [*B, T]; strides and blocks are counted from the start of the whole input.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; a head that sees nothing adds 0.
    Raises: ValueError: an unknown pattern; summary columns that are more than the stride, or any where the pattern is not
        "fixed"; one head to separate; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = StridedAttention(4, 64, stride=16, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Child et al., Generating Long Sequences with Sparse Transformers, 2019, arXiv 1904.10509.
    """

    supports = Support(cost="T^1.5", is_pattern=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        pattern: Pattern = "strided",
        stride: int = 128,
        num_summary: int | None = None,
        distinct_summary: bool = False,
        heads: Heads = "merged",
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_word("StridedAttention", "pattern", pattern, get_args(Pattern))
        check_word("StridedAttention", "heads", heads, get_args(Heads))
        check_sizes("StridedAttention", stride=stride, num_summary=1 if num_summary is None else num_summary)
        for name, given in (("num_summary", num_summary is not None), ("distinct_summary", distinct_summary)):
            if given and pattern == "strided":
                refuse("StridedAttention", name, "a value", "be left out with pattern='strided'", "Use pattern='fixed'.")
        if num_summary is None:
            num_summary = max(1, stride // 16)
        if num_summary > stride:
            refuse("StridedAttention", "num_summary", num_summary, f"be at most stride = {stride}", "Choose it smaller.")
        if heads == "separate" and num_heads < 2:
            refuse("StridedAttention", "num_heads", num_heads, "be at least 2 with heads='separate'", "Use 'merged'.")
        self.kind, self.heads, self.stride = pattern, heads, int(stride)
        self.num_summary, self.distinct_summary = int(num_summary), distinct_summary
        near: patterns.Pattern
        far: patterns.Pattern
        both: patterns.Pattern
        if pattern == "strided":
            near, far, both = Band(self.stride, self.stride), Strided(self.stride, None), Strided(self.stride, self.stride)
        else:
            far_heads = num_heads // 2 if heads == "separate" else num_heads
            columns = self._columns(far_heads if distinct_summary else 1)
            near, far = SameBlock(self.stride), Columns(self.stride, tuple(map(tuple, columns.tolist())))
            both = near | far
        self.sees = (both if heads == "merged" else Interleaved((near, far), num_heads)) & self.sees

    def _columns(self, heads: int) -> np.ndarray:
        """int [N, c]: the summary columns of each head."""
        c, l = self.num_summary, self.stride
        turn = np.arange(heads) % (l // c) if self.distinct_summary else np.zeros(heads, int)
        return l - c * (turn[:, None] + 1) + np.arange(c)

    def attend(self, query, key, value, mask, segment_ids=None):
        l, options = self.stride, dict(mask=mask, is_causal=self.is_causal, implementation=self.implementation)
        segments = dict(query_segment_ids=segment_ids, key_segment_ids=segment_ids)
        near_options, options = options | segments, options | dict(segment_ids=segment_ids)
        if self.kind == "strided":
            union = functools.partial(strided.attention, stride=l, window_size=l, **options)
            near = functools.partial(softmax.attention, window_size=l, **near_options)
            far = functools.partial(strided.attention, stride=l, window_size=None, **options)
        else:
            fixed = functools.partial(strided.fixed, block_size=l, **options)
            columns = lambda query: self._columns(query.shape[2] if self.distinct_summary else 1)
            union = lambda *arrays: fixed(*arrays, columns=columns(arrays[0]))
            far = lambda *arrays: fixed(*arrays, columns=columns(arrays[0]), own_block=False)
            near = functools.partial(softmax.attention, pattern=SameBlock(l), **near_options)
        if self.heads == "merged":
            return union(query, key, value)
        return in_groups([(EVEN, near), (ODD, far)], query, key, value)
