"""S5: one linear state space model for all features, run as a scan."""

from typing import Literal, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.kernels import ssm
from subquad.zoo.base import Support
from subquad.zoo.checks import check_sizes, check_steps, check_word, refuse
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.statespace import hippo, mimo
from subquad.zoo.statespace.output import Gate, activated, normal, output_map, skipped

OutputInit = Literal["lecun", "truncated", "complex"]


class S5(Headless):
    """Simplified state space layer: a single system that all features drive and all are read from.

        x'(t) = Lambda x(t) + B u(t),  y(t) = C x(t) + D u(t)                                               (section 3)
        x_t = Lambda_bar x_{t-1} + B_bar u_t,  y_t = 2 Re(C x_t) + D * u_t,   one step for each mode
        outputs = g sigmoid(W g + b),  g = gelu(y)                                  gate "half"

    Lambda holds one mode of each of P / 2 conjugate pairs.

    Cost: time O(T P D), memory O(T (P + D)), log T steps deep; one extended token O(P D) and a cache of P numbers.
    Differs from the paper: Re Lambda = -exp(log_decay), so the system is stable whatever is learned; the authors' code trains
        Re Lambda itself, and clips it where asked. Its GELU is the approximate one. With init "lin" or "inv" the paper's
        ablation does not say how B and C are drawn: here as the authors draw them, without a basis to turn them into.
    Training: the paper learns Lambda, B and the steps slowly (about 0.001) and without weight decay, C as all else.

    Args:
        in_features: features D of the inputs.
        state_size: P, the size of the state; even.
        num_blocks: J blocks of the state start from a HiPPO matrix of P / J each; P / J must be even.
        init: of Lambda: "legs" (the normal part of HiPPO-LegS, the paper's HiPPO-N), "lin" or "inv" (those of S4D).
        output_init: of C, as the authors' code names them: "lecun" with variance 1 / (P D), "truncated" with 1 / P, both turned
            into the basis of Lambda; "complex" with variance 1.
        discretization: "zoh" or "bilinear".
        is_causal: a token sees itself and those before it. Else a second C reads the system run backwards, and both see the
            present token.
        dt_min, dt_max: steps are drawn log-uniformly between these; 1 / step is the memory in tokens.
        gate: "half" is the paper's; "full": glu(W g + b); "only": y sigmoid(W g + b); None: W g + b.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. out_features may be another number than D with gate "full" or None only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; an unknown name; out_features that the gate cannot make.
    Numerics: the system and its states in float32; call and `extend` agree to 2e-5.
    Example:
        >>> layer = S5(64, state_size=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 32)

    Source: Smith, Warrington and Linderman, Simplified State Space Layers for Sequence Modeling, ICLR 2023, arXiv 2208.04933;
        initialisation and gates as in lindermanlab/S5.
    """

    supports = Support(cost="T", segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        state_size: int = 64,
        num_blocks: int = 1,
        init: hippo.Init = "legs",
        output_init: OutputInit = "lecun",
        discretization: ssm.Discretization = "zoh",
        is_causal: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        gate: Gate | None = "half",
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, state_size=state_size, num_blocks=num_blocks)
        if state_size % (2 * num_blocks):
            refuse(owner, "state_size", state_size, f"be a multiple of 2 num_blocks = {2 * num_blocks}",
                   "Modes come in conjugate pairs, in each block.")
        words = (("init", init, hippo.INITS), ("output_init", output_init, get_args(OutputInit)),
                 ("discretization", discretization, ssm.DISCRETIZATIONS))
        for name, word, known in words:
            check_word(owner, name, word, known)
        check_steps(owner, dt_min, dt_max)
        self.state_size, self.discretization, self.gate = state_size, discretization, gate
        diagonal, basis = hippo.blocks(init, state_size, num_blocks)  # [P/2], [P, P/2]
        real, imag = np.float32(basis.real), np.float32(basis.imag)
        pairs, outputs = state_size // 2, 1 if is_causal else 2

        def param(values):
            return nnx.Param(jnp.asarray(values, self.param_dtype))

        def drawn(variance, *shape):  # cut at two standard deviations
            return nnx.initializers.truncated_normal(variance**0.5 / 0.87962566)(rngs.params(), shape, jnp.float32)

        self.log_decay, self.frequency = param(np.log(-diagonal.real)), param(diagonal.imag)
        # V^* B and C V of B and C that are drawn for the state itself.
        of_state = drawn(1 / state_size, state_size, in_features)
        self.input_matrix = param(jnp.einsum("znp,nd->pdz", np.stack([real, -imag]), of_state))  # [P/2, D, 2]
        if output_init == "complex":
            numbers = jax.random.normal(rngs.params(), (outputs, in_features, pairs, 2), jnp.float32) / np.sqrt(2)
        else:
            variance = 1 / (state_size * in_features) if output_init == "lecun" else 1 / state_size
            of_state = drawn(variance, 2, outputs, in_features, state_size)
            numbers = jnp.einsum("ykdn,yznp->kdpz", of_state, np.stack([[real, imag], [-imag, real]]))
        self.output_matrix = param(numbers)  # [1 or 2, D, P/2, 2]
        log_step = jax.random.uniform(rngs.params(), (pairs,), jnp.float32, np.log(dt_min), np.log(dt_max))
        self.log_step = param(log_step)
        self.skip = normal(rngs, (in_features,), self.param_dtype)
        self.out = output_map(self, gate, rngs)

    def system(self):
        """(Lambda_bar [P/2], B_bar [P/2, D], 2 C [1 or 2, D, P/2])."""
        diagonal = jax.lax.complex(
            -jnp.exp(self.log_decay[...].astype(jnp.float32)), self.frequency[...].astype(jnp.float32)
        )
        step = jnp.exp(self.log_step[...].astype(jnp.float32))
        log_decay, scale = (x[0] for x in ssm.discretize(diagonal[None], step[None], self.discretization))
        input_matrix, output_matrix = (mimo.complex_of(x) for x in (self.input_matrix, self.output_matrix))
        return jnp.exp(log_decay), scale[:, None] * input_matrix, 2 * output_matrix

    def respond(self, inputs, mask, segment_ids):
        return mimo.respond(inputs, *self.system(), segment_ids, self.implementation)

    def finish(self, inputs, responses):
        return activated(skipped(self.skip, inputs, responses), self.out, self.gate)

    def state(self, batch_size):
        return jnp.zeros((batch_size, self.state_size), jnp.float32)

    def respond_after(self, inputs, state, counts):
        decay, input_matrix, (output_matrix,) = self.system()
        return mimo.respond_after(inputs, decay, input_matrix, output_matrix, state, counts, self.implementation)
