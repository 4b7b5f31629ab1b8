"""Short convolutions of each feature by itself, with taps that are fixed or made by every token."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subquad.kernels import checks, dispatch, precision
from subquad.kernels.axes import KeyMask
from subquad.kernels.depthwise import reference, xla

__all__ = ["depthwise"]

OWNER = "convolution.depthwise"
IMPLEMENTATIONS = {"xla": xla.depthwise, "reference": reference.depthwise}


def depthwise(
    inputs: Float[Array, "B T D"],
    kernel: Float[Array, "W N"] | Float[Array, "B T W N"],
    *,
    is_causal: bool = False,
    mask: KeyMask | None = None,
    segment_ids: Int[Array, "#B T"] | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    return_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Weighs W neighbouring tokens, with one set of taps for each of N groups of D / N consecutive features.

        y_tc = sum_{j = 0}^{W - 1} kernel_{jn} u_{t - j, c}                  causal;  n = floor(c N / D)
        y_tc = sum_{j = 0}^{W - 1} kernel_{jn} u_{t + floor((W - 1) / 2) - j, c}     not causal: the taps lie around t
        kernel_{tjn} in place of kernel_{jn}                                 taps of each token's own: dynamic convolution

    As in `convolve`, the first tap of a causal kernel weighs the present token. Tokens before the first and after the last
    count as 0. N = D is the convolution of gated layers and state space models, N < D the lightweight one.

    Cost: time O(B T W D); memory O(B T D), the backward pass included. One extended token O(W D), its state O(W D). With
        `segment_ids` every token has taps of its own: memory O(B T (D + W N)).

    Args:
        inputs: u, [B, T, D].
        kernel: taps [W, N], or [B, T, W, N] for each token its own; N divides D. A softmax over W, where the paper has one,
            is the caller's.
        is_causal: a token sees no later one.
        mask: False where a token is padding: it counts as 0, whatever it holds, and its output is 0.
        segment_ids: int [B, T] or [1, T], for sequences packed one after the other: tokens of different runs of equal ids do
            not see each other, and a tap on another run weighs 0. None: all one run.
        initial_state: causal only: the W - 1 inputs before the first one; None: 0.
        return_state: causal only: also return the state after the last token that is not padding. However a sequence is cut
            into calls, each given the state of the one before, the outputs are those of one call.
        implementation: "xla", or "reference" by a sum over pairs of tokens; None: "xla".
    Returns: y [B, T, D] in the dtype of `inputs`; with `return_state` also the last W - 1 inputs, in that dtype too.
    Raises:
        TypeError: arrays of integers or complex numbers, a mask that is not boolean, segment_ids that are not integers.
        ValueError: shapes that do not fit; an axis of 0; a state of a convolution that is not causal, or has segments.
        NotImplementedError: an implementation that does not exist.
    Numerics: products and sums are float32; they agree with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> first, state = depthwise(jnp.ones((1, 2, 1)), jnp.ones((3, 1)), is_causal=True, return_state=True)
        >>> then = depthwise(jnp.ones((1, 2, 1)), jnp.ones((3, 1)), is_causal=True, initial_state=state)
        >>> first.ravel().tolist(), then.ravel().tolist()
        ([1.0, 2.0], [3.0, 3.0])

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, ICLR 2019, arXiv 1901.10430, eqs. 3-5.
    """
    _check(inputs, kernel, is_causal, mask, segment_ids, initial_state, return_state)
    inputs, kernel, initial_state = precision.matched((inputs, kernel, initial_state))
    before = kernel.shape[-2] - 1
    runs = checks.runs(OWNER, segment_ids, *inputs.shape[:2])
    if runs is not None:
        kernel = _within(runs, kernel, is_causal, inputs.shape[0])
    if mask is not None:
        kept = jnp.broadcast_to(mask[:, 0, 0], inputs.shape[:2])
        inputs = jnp.where(kept[..., None], inputs, 0)
        kernel = jnp.where(kept[..., None, None], kernel, 0) if kernel.ndim == 4 else kernel
    state = initial_state
    if is_causal and state is None and return_state:
        state = jnp.zeros((inputs.shape[0], before, inputs.shape[2]), inputs.dtype)
    outputs = dispatch.run(OWNER, IMPLEMENTATIONS, implementation, inputs, kernel, state, is_causal)
    outputs = outputs if mask is None else jnp.where(kept[..., None], outputs, 0)
    if not return_state:
        return outputs
    past = jnp.concatenate([state.astype(inputs.dtype), inputs], axis=1)
    if mask is None:
        return outputs, past[:, inputs.shape[1] :]
    length = jnp.max(jnp.where(kept, jnp.arange(1, kept.shape[1] + 1)[None], 0), axis=1)  # up to the last real token
    places = length[:, None] + jnp.arange(before)[None]
    return outputs, jnp.take_along_axis(past, places[..., None], axis=1)


@precision.promoting
def _within(runs, kernel, is_causal, batch):
    """The taps of every token, [B, T, W, N], with 0 for those that lie on another run than the token's."""
    width, length = kernel.shape[-2], runs.shape[1]
    of = jnp.arange(length)[:, None] + (0 if is_causal else (width - 1) // 2) - jnp.arange(width)  # taps out of reach see 0
    same = jnp.take(runs, of, axis=1, mode="clip") == runs[..., None]
    return jnp.where(jnp.broadcast_to(same[..., None], (batch, *same.shape[1:], 1)), kernel, 0)


def _check(inputs, kernel, is_causal, mask, segment_ids, initial_state, return_state):
    checks.floating(OWNER, inputs=inputs, kernel=kernel, initial_state=initial_state)
    checks.shape(OWNER, "inputs", inputs, "B T D", "Flatten the batch.")
    batch, length, features = inputs.shape
    taps_fit = kernel.ndim in (2, 4) and 0 not in kernel.shape and kernel.shape[:-2] in ((), (batch, length))
    if not taps_fit or features % kernel.shape[-1]:
        raise ValueError(
            f"{OWNER}: kernel must have shape [W, N] or [{batch}, {length}, W, N] with W >= 1 and N dividing D = {features}, "
            f"got {kernel.shape}. Give every feature its taps, or equal groups of features."
        )
    if return_state or initial_state is not None:
        name, words = "return_state" if return_state else "initial_state", None
        if not is_causal:
            words = "where is_causal is False, got one. A state knows no later tokens: use is_causal=True."
        elif segment_ids is not None:
            words = "where there are segment_ids, got one. A state is of one sequence: leave segment_ids out."
        if words:
            raise ValueError(f"{OWNER}: {name} must be left out {words}")
    if initial_state is not None and initial_state.shape != (batch, kernel.shape[-2] - 1, features):  # of one tap it is empty
        raise ValueError(
            f"{OWNER}: initial_state must have shape [B, W - 1, D] = {(batch, kernel.shape[-2] - 1, features)}, got "
            f"{initial_state.shape}. Pass the state that the call before returned."
        )
    checks.key_padding(OWNER, mask, batch, length, "The taps decide the rest.")
