"""DSS: diagonal state spaces, one per feature, with the state matrix shared by all features."""

from typing import Literal, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import convolution, precision, ssm
from subquad.zoo.base import Support
from subquad.zoo.checks import check_length, check_sizes, check_steps, check_word, refuse
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.statespace import hippo, mimo
from subquad.zoo.statespace.output import Gate, activated, normal, output_map, skipped
from subquad.zoo.statespace.system import in_directions, recur

Normalization = Literal["exp", "softmax"]
GUARD = 1e-7  # the authors', which keeps a reciprocal of 0 finite
LARGEST = 80.0  # exponent of what a recurrence starts from: less is lost in float32


class DSS(Headless):
    """Diagonal state space layer.

        y = u * K + D u                                                                             (proposition 1)
        exp       K_l = Re sum_i w_i (exp(a_i) - 1) / lambda_i exp(l a_i),    Re lambda_i < 0
        softmax   K_l = Re sum_i w_i / lambda_i softmax_l(l a_i),  0 <= l < L,  lambda_i free
        outputs = W gelu(y) + b

    with a = lambda step for the N complex modes lambda and each feature's step. "exp" runs as a recurrence in chunks, or
    convolves where there are segments; "softmax" convolves, and `extend` is the same by a recurrence.

    Cost: time O(T D N) for "exp", O(D (T log T + L N)) for "softmax", memory O(T D + L D); one extended token O(D N).
    Differs from the paper: with "softmax" the sum over l is over the L = max_length taps of the constructor, and not over those
        of the call, so that a shorter call has the same kernel. A mode that grows (Re lambda > 0) then weighs what lies L
        tokens back. The equations are as in the authors' code, the paper's own were not at hand: so `separate_steps`, and in
        "softmax" the guard of the one reciprocal x = lambda (exp(L a) - 1), conj(x) / (|x|^2 + 1e-7), which makes kernels
        of steps below 1 / L smaller by a thousandth and more. Not in the paper: bidirectional layers have a second w, over
        the tokens after the present one.
    Training: the authors learn lambda, w and the steps slowly (about 0.001) and without weight decay.

    Args:
        in_features: features D of the inputs, one system each.
        state_size: modes N; complex, and no conjugate pairs.
        normalization: "exp" or "softmax".
        max_length: L of "softmax"; no call and no cache may have more tokens. None: "exp" needs none.
        separate_steps: a step for the real part of lambda and one for its imaginary part; they start equal.
        is_causal: a token sees itself and those before it.
        dt_min, dt_max: steps are drawn log-uniformly between these.
        gate: None is the paper's; "full": glu(W g + b) with g = gelu(y); "half": g sigmoid(W g + b);
            "only": y sigmoid(W g + b).
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. out_features may be another number than D with gate "full" or None only. Long convolutions, which
            "softmax" and segments need, are "xla" and "reference" only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: an unknown name; "softmax" without max_length, or "exp" with it; more tokens than max_length.
    Numerics: kernels, convolution and states in float32; call and `extend` agree to 2e-5. `extend` gives NaN where a mode
        grows by more than exp(80) in L tokens, which a state cannot hold, and after more than L of them.
    Example:
        >>> layer = DSS(64, state_size=16, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 64, 32)

    Source: Gupta, Gu and Berant, Diagonal State Spaces are as Effective as Structured State Spaces, NeurIPS 2022,
        arXiv 2203.14343.
    """

    supports = Support(cost="T log T", segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        state_size: int = 64,
        normalization: Normalization = "exp",
        max_length: int | None = None,
        separate_steps: bool = True,
        is_causal: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        gate: Gate | None = None,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, state_size=state_size)
        check_word(owner, "normalization", normalization, get_args(Normalization))
        if (max_length is None) != (normalization == "exp"):
            condition = "be None with 'exp', whose kernel has no end" if max_length else "be given with 'softmax'"
            refuse(owner, "max_length", max_length, condition, "It is the number of taps that a softmax is over.")
        if max_length is not None:
            check_sizes(owner, max_length=max_length)
        check_steps(owner, dt_min, dt_max)
        self.state_size, self.max_length, self.gate = state_size, max_length, gate
        modes = hippo.diagonal_modes("legs", 2 * state_size).diagonal
        param = lambda values: nnx.Param(jnp.asarray(values, self.param_dtype))
        if max_length is None:
            self.log_decay = param(np.log(-modes.real))
        else:
            self.growth = param(modes.real)
        self.frequency = param(modes.imag)
        self.output_matrix = normal(rngs, (1 if is_causal else 2, in_features, state_size, 2), self.param_dtype)
        log_step = jax.random.uniform(rngs.params(), (in_features, 1), jnp.float32, np.log(dt_min), np.log(dt_max))
        self.log_step = param(jnp.repeat(log_step, 2 if separate_steps else 1, axis=1))
        self.skip = normal(rngs, (in_features,), self.param_dtype)
        self.out = output_map(self, gate, rngs)

    @precision.promoting
    def system(self):
        """(a [D, N], c [1 or 2, D, N]): K_l = Re sum c exp(l a), of modes that grow c exp((l - L + 1) a)."""
        read = lambda param: param[...].astype(jnp.float32)
        real = -jnp.exp(read(self.log_decay)) if self.max_length is None else read(self.growth)
        modes, step = jax.lax.complex(real, read(self.frequency)), jnp.exp(read(self.log_step))
        exponent = jax.lax.complex(step[:, :1] * modes.real, step[:, -1:] * modes.imag)
        weights = mimo.complex_of(self.output_matrix)
        if self.max_length is None:
            return exponent, weights * (jnp.expm1(exponent) / modes)
        falling = jnp.where(modes.real > 0, -exponent, exponent)
        total = jnp.expm1(self.max_length * falling) * modes  # of the powers, times exp(falling) - 1
        return exponent, weights * (jnp.expm1(falling) * total.conj() / (total.real**2 + total.imag**2 + GUARD))

    def kernel(self, length: int):
        """The first `length` taps of each direction, [1 or 2, D, length]."""
        exponent, weights = self.system()
        taps = lambda exponent, weights, length: ssm.diagonal_kernel(
            exponent, weights / 2, length, implementation=self.implementation
        )
        if self.max_length is None:
            return taps(exponent, weights, length)
        grows = exponent.real > 0
        falling, growing = (jnp.where(kind, weights, 0) for kind in (~grows, grows))
        exponent = jnp.where(grows, -exponent, exponent)
        whole = taps(exponent, falling, self.max_length) + jnp.flip(taps(exponent, growing, self.max_length), -1)
        return whole[..., :length]

    def respond(self, inputs, mask, segment_ids):
        length = inputs.shape[1]
        check_length(type(self).__name__, "inputs_q", length, self.max_length)
        if self.max_length is not None or segment_ids is not None:
            past, *ahead = self.kernel(length)
            return convolution.convolve(
                inputs, past, ahead[0] if ahead else None, segment_ids, implementation=self.implementation
            )
        exponent, weights = self.system()
        scan = lambda which, **options: ssm.diagonal_scan(
            inputs, exponent, jnp.ones_like(exponent), weights[which] / 2, implementation=self.implementation, **options
        )
        return in_directions(scan, len(weights))

    def finish(self, inputs, responses):
        return activated(skipped(self.skip, inputs, responses), self.out, self.gate)

    def init_cache(self, batch_size, max_length, dtype=None):
        cache = super().init_cache(batch_size, max_length, dtype)
        check_length(type(self).__name__, "max_length", max_length, self.max_length)
        return cache

    def state(self, batch_size):
        # With an end of the kernel also the number of tokens so far.
        return jnp.zeros((batch_size, self.in_features, 2 * self.state_size + (self.max_length is not None)), jnp.float32)

    def respond_after(self, inputs, state, counts):
        exponent, weights = self.system()
        drive = jnp.ones_like(exponent)
        if self.max_length is not None:
            state, seen = state[..., :-1], state[..., -1:]
            behind = (self.max_length - 1) * exponent
            drive = jnp.where(exponent.real > 0, jnp.exp(jnp.where(exponent.real > 0, -behind, 0)), drive)
        advance = lambda inputs, state: ssm.diagonal_scan(
            inputs, exponent, drive, weights[0] / 2, state, return_state=True, implementation=self.implementation
        )
        responses, state = recur(advance, inputs, state, counts)
        if self.max_length is None:
            return responses, state
        seen += inputs.shape[1] if counts is None else counts[:, None, None]
        is_lost = (seen[..., 0] > self.max_length) | (behind.real > LARGEST).any(-1)
        return jnp.where(is_lost[:, None], jnp.nan, responses), jnp.concatenate([state, seen], -1)
