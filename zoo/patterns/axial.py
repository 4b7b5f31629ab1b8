"""Axial attention: the sequence as an image, whose pixels see their row or their column."""

import functools
from typing import Literal, Unpack, get_args

from flax import nnx

from subquad.kernels import patterns, softmax, strided
from subquad.kernels.patterns import Interleaved, SameBlock, Strided
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_sizes, check_word, refuse
from subquad.zoo.patterns.groups import EVEN, ODD, in_groups

Axis = Literal["row", "column", "both"]


class AxialAttention(Attention):
    """Softmax attention along the rows and along the columns of an image that is given row by row.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s div C = t div C  (row),  or  s mod C = t mod C  (column)

    C is row_length, and t = C r + c the pixel in column c of row r. `axis` "both" attends along the row in even heads and
    along the column in odd ones. Since the output projection adds heads up, that is the sum of two layers of one axis each.

    Cost: time O(T (C + T / C) N H), so O(T^1.5) where C is about sqrt(T); memory O(T); one extended token
        O((C + S / C) N H) after S tokens, cache O(max_length).
    Differs from the paper: which stacks layers of one axis each (`mixer_options=[dict(axis="row", ...),
        dict(axis="column", ...)]`), and takes images of any rank. Causal attention sees what comes before in the order of
        rows: the row up to the pixel, the column up to its row. The paper's decoder has more: its outer part sees whole earlier
        rows, which it shifts down by one.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        row_length: C, pixels of a row; the last row may be shorter.
        axis: "row", "column", or "both" with at least two heads.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; rows count real tokens.
        segment_ids: [T] or [*B, T]; rows are counted from the start of the whole input.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: an unknown axis; "both" with one head; a row_length below 1; a mask that is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = AxialAttention(4, 64, row_length=10, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Ho et al., Axial Attention in Multidimensional Transformers, 2019, arXiv 1912.12180.
    """

    supports = Support(cost="T^1.5", is_pattern=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        row_length: int = 32,
        axis: Axis = "both",
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_word("AxialAttention", "axis", axis, get_args(Axis))
        check_sizes("AxialAttention", row_length=row_length)
        if axis == "both" and num_heads < 2:
            refuse("AxialAttention", "num_heads", num_heads, "be at least 2 with axis='both'", "Use 'row' or 'column'.")
        self.axis, self.row_length = axis, int(row_length)
        row, column = SameBlock(self.row_length), Strided(self.row_length, None)
        seen: dict[str, patterns.Pattern] = dict(row=row, column=column, both=Interleaved((row, column), num_heads))
        self.sees = seen[axis] & self.sees

    def attend(self, query, key, value, mask, segment_ids=None):
        options = dict(mask=mask, is_causal=self.is_causal, implementation=self.implementation)
        row = functools.partial(
            softmax.attention, pattern=SameBlock(self.row_length), query_segment_ids=segment_ids,
            key_segment_ids=segment_ids, **options,
        )
        column = functools.partial(
            strided.attention, stride=self.row_length, window_size=None, segment_ids=segment_ids, **options
        )
        if self.axis != "both":
            return (row if self.axis == "row" else column)(query, key, value)
        return in_groups([(EVEN, row), (ODD, column)], query, key, value)
