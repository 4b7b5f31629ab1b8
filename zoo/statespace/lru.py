"""LRU: the linear recurrent unit, a diagonal complex recurrence on a ring."""

import math
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from subquad.kernels import precision
from subquad.zoo.base import Support
from subquad.zoo.checks import check_number, check_sizes
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.statespace import mimo
from subquad.zoo.statespace.output import Gate, activated, normal, output_map, skipped


class LRU(Headless):
    """Linear recurrent unit: one complex diagonal recurrence of all features, whose step is part of its eigenvalues.

        x_t = lambda * x_{t-1} + gamma * (B u_t),   y_t = Re(C x_t) + D * u_t                              (section 3)
        lambda = exp(-exp(log_decay) + i exp(log_phase)),   gamma = exp(log_scale)
        outputs = glu(W gelu(y) + b)

    |lambda| < 1 whatever is learned. N modes are N complex numbers, not one of each conjugate pair.

    Cost: time O(T N D), memory O(T (N + D)), log T steps deep; one extended token O(N D) and a cache of 2 N numbers.
    Differs from the paper: not at all in the recurrence. Its GELU may be the approximate one, as in the code that was read. The
        paper's models are causal but for Path-X, whose second direction it does not write down: here a second C reads the
        recurrence run backwards, and both see the present token.
    Training: the paper learns lambda, gamma and B slowly and without weight decay.

    Args:
        in_features: features D of the inputs.
        state_size: modes N.
        is_causal: a token sees itself and those before it.
        r_min, r_max: |lambda| starts uniformly on the ring between these radii, of area, not of radius.
        max_phase: its phases start uniformly between 0 and this; pi / 10 for very long memories.
        gate: "full" is the paper's; "half": g sigmoid(W g + b) with g = gelu(y); "only": y sigmoid(W g + b); None: W g + b.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. out_features may be another number than D with gate "full" or None only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: a ring or phase that is none; an unknown gate; out_features that the gate cannot make.
    Numerics: the recurrence and its states in float32; call and `extend` agree to 2e-5.
    Example:
        >>> layer = LRU(64, state_size=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 64)

    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, ICML 2023, arXiv 2303.06349;
        initialisation as in NicolasZucchet/minimal-LRU.
    """

    supports = Support(cost="T", segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        state_size: int = 64,
        is_causal: bool = False,
        r_min: float = 0.0,
        r_max: float = 0.99,
        max_phase: float = 2 * math.pi,
        gate: Gate | None = "full",
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, state_size=state_size)
        check_number(owner, "r_max", r_max, "(0, 1]", "0.99 and 0.999 are the paper's.")
        check_number(owner, "r_min", r_min, f"[0, {r_max})", "It is below r_max; 0 and 0.9 are the paper's.")
        check_number(owner, "max_phase", max_phase, f"(0, {2 * math.pi}]", "pi / 10 is the paper's for Path-X.")
        self.state_size, self.gate = state_size, gate

        def param(values):
            return nnx.Param(values.astype(self.param_dtype))

        # Of (0, 1], so that no phase is 0 and its logarithm finite.
        radius, phase = (1 - jax.random.uniform(rngs.params(), (state_size,), jnp.float32) for _ in range(2))
        square = radius * (r_max**2 - r_min**2) + r_min**2
        square = jnp.minimum(square, 1 - 1e-6)
        self.log_decay = param(jnp.log(-0.5 * jnp.log(square)))
        self.log_phase = param(jnp.log(max_phase * phase))
        self.log_scale = param(0.5 * jnp.log1p(-square))  # sqrt(1 - |lambda|^2): states as large as their inputs
        outputs = 1 if is_causal else 2
        draw = lambda *shape: jax.random.normal(rngs.params(), shape, jnp.float32)
        self.input_matrix = param(draw(state_size, in_features, 2) / math.sqrt(2 * in_features))
        self.output_matrix = param(draw(outputs, in_features, state_size, 2) / math.sqrt(state_size))
        self.skip = normal(rngs, (in_features,), self.param_dtype)
        self.out = output_map(self, gate, rngs)

    @precision.promoting
    def system(self):
        """(lambda [N], gamma B [N, D], C [1 or 2, D, N])."""
        read = lambda param: jnp.exp(param[...].astype(jnp.float32))
        decay = jnp.exp(jax.lax.complex(-read(self.log_decay), read(self.log_phase)))
        input_matrix, output_matrix = (mimo.complex_of(x) for x in (self.input_matrix, self.output_matrix))
        return decay, read(self.log_scale)[:, None] * input_matrix, output_matrix

    def respond(self, inputs, mask, segment_ids):
        return mimo.respond(inputs, *self.system(), segment_ids, self.implementation)

    def finish(self, inputs, responses):
        return activated(skipped(self.skip, inputs, responses), self.out, self.gate)

    def state(self, batch_size):
        return jnp.zeros((batch_size, 2 * self.state_size), jnp.float32)

    def respond_after(self, inputs, state, counts):
        decay, input_matrix, (output_matrix,) = self.system()
        return mimo.respond_after(inputs, decay, input_matrix, output_matrix, state, counts, self.implementation)
