"""Diagonal attention: a sliding window with gaps, whose size may differ by head."""

import functools
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from flax import nnx

from subquad.kernels import strided
from subquad.kernels.patterns import Dilated
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import refuse
from subquad.zoo.patterns.groups import in_groups
from subquad.zoo.patterns.local import sides_of


class DiagonalAttention(Attention):
    """Softmax attention to every d-th token within a window around the query, with a dilation d for each head.

        y_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,    s = t + j d_h,  -left <= j <= right    (section 3.1, dilated window)

    Cost: time O(T W N H), memory O(T), with W = left + right + 1, whatever the dilation; one extended token O(W N H), cache
        O(max_length).
    Differs from the paper: a window is counted in keys on each side, so the paper's (even) window w is window_size=w/2; every
        layer has the dilations it is given, where the paper's lower layers have none and its upper ones dilate two heads;
        no global tokens (`LongformerAttention` has them).

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        window_size: keys that a query sees on each side, itself not counted; one number or (left, right).
        dilation: d, at least 1, for all heads or one for each. With 1 this is `LocalAttention`.
        is_causal: a token sees itself and those before it.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; a window counts real tokens.
        segment_ids: [T] or [*B, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing are the projection of 0.
    Raises: ValueError: a negative window; a right side when causal; a dilation below 1, or not one for each head; a mask that
        is not key padding.
    Numerics: softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = DiagonalAttention(4, 64, window_size=8, dilation=(1, 1, 2, 4), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150.
    """

    supports = Support(cost="T", is_pattern=True, segment_ids=True, rotary=True, attention_fn=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window_size: int | tuple[int, int] = 256,
        dilation: int | Sequence[int] = 2,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        self.window_size = sides_of("DiagonalAttention", window_size, is_causal)
        dilation = dilation.tolist() if isinstance(dilation, np.ndarray) else dilation
        given = tuple(dilation) if isinstance(dilation, Sequence) else (dilation,) * num_heads
        if len(given) != num_heads or any(not isinstance(d, int | np.integer) or d < 1 for d in given):
            refuse("DiagonalAttention", "dilation", repr(dilation), f"be a number >= 1, or one for each of {num_heads} heads",
                   "1 leaves nothing out.")
        self.dilation = tuple(map(int, given))
        self.sees = Dilated(*self.window_size, self.dilation if len(set(given)) > 1 else self.dilation[:1])

    def attend(self, query, key, value, mask, segment_ids=None):
        """Heads of one dilation together."""
        dilated = functools.partial(
            strided.dilated, window_size=self.window_size, mask=mask, segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if len(set(self.dilation)) == 1:
            return dilated(query, key, value, dilation=self.dilation[0])
        heads = lambda dilation: np.flatnonzero(np.array(self.dilation) == dilation)
        groups = [(heads(d), functools.partial(dilated, dilation=d)) for d in sorted(set(self.dilation))]
        return in_groups(groups, query, key, value)
