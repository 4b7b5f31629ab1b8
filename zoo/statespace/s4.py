"""S4: a linear state space model per feature, run as a convolution or as a recurrence."""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx

from subquad.kernels import ssm
from subquad.zoo.base import Support
from subquad.zoo.checks import check_sizes
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.statespace import hippo
from subquad.zoo.statespace.output import activated, normal, output_map, skipped
from subquad.zoo.statespace.system import Mode, StateSpace, check_system


class S4(Headless):
    """Structured state space layer (S4, and S4D with mode="diagonal").

        x'(t) = A x(t) + B u(t),  y(t) = C x(t) + D u(t)    per feature                                      (eq. 1)
        x_t = A_bar x_{t-1} + B_bar u_t                     discretised with the feature's step               (eq. 3)
        y = u * K + D u,  K_l = C A_bar^l B_bar             the same as one convolution                    (eqs. 4-5)
        outputs = glu(W gelu(y) + b)

    A = Lambda - P P^* (mode "dplr") or A = Lambda (mode "diagonal"). With "dplr" a call convolves and `extend` recurs; with
    "diagonal" both run the recurrence in chunks, which is the same convolution without the kernel of length T. With
    `segment_ids` both convolve: a state begins at 0 in each run of equal ids.

    Cost: time O(T D P) for mode "diagonal", O(T D (P + log T) + D P^2 (sqrt(T) + P log T)) for mode "dplr", memory O(T D);
        one extended token O(D P) and a cache of that size whatever came before. With segments the convolution
        costs O(T D log^2 T).
    Differs from the paper: C is C itself, not the C (I - A_bar^L) that the paper trains for one length L, so a layer is
        right at every length and its convolution is its recurrence. P and B of LegS are in a basis where they are positive;
        they are not clipped as in the authors' code. Mode "diagonal" with LegS halves B as S4D's theorem says, which that
        code leaves out. Not in the paper: bidirectional layers are the code's, a second C and kernel over the tokens after
        the present one, which is counted once; `glu=False` gives the linear map of the first version.
    Training: the papers learn A, B and the steps, all of `layer.system` but output_matrix, slowly (at most 0.001) and without
        weight decay. That is the optimiser's to do, for example by optax.multi_transform.

    Args:
        in_features: features D of the inputs, one system each.
        state_size: P, states per system; even, as P / 2 conjugate pairs of modes.
        mode: "dplr" (S4) or "diagonal" (S4D).
        init: of A and B: "legs" (HiPPO-LegS), or for mode "diagonal" also "lin" (S4D-Lin) and "inv" (S4D-Inv).
        discretization: "bilinear", or for mode "diagonal" also "zoh". None: "bilinear" for dplr, "zoh" for diagonal.
        num_ssm: how many A, B are trained; must divide in_features, which share them in turn. None: in_features.
        is_causal: a token sees itself and those before it.
        dt_min, dt_max: steps are drawn log-uniformly between these; 1 / step is the memory in tokens.
        glu: gate the output map; False: a plain linear map.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. Long convolutions, which "dplr" and segments need, are "xla" and "reference" only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: an odd state_size, an unknown name, or a mode without that init or discretisation.
    Numerics: kernels, convolution and states in float32; convolution and recurrence agree to 2e-5.
    Example:
        >>> layer = S4(64, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 64, 64)

    Source: Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces, ICLR 2022, arXiv 2111.00396;
        Gu et al., On the Parameterization and Initialization of Diagonal State Space Models, NeurIPS 2022, arXiv 2206.11893.
    """

    supports = Support(cost="T log T", segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        state_size: int = 64,
        mode: Mode = "dplr",
        init: hippo.Init = "legs",
        discretization: ssm.Discretization | None = None,
        num_ssm: int | None = None,
        is_causal: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        owner = type(self).__name__
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        num_ssm = in_features if num_ssm is None else num_ssm
        if discretization is None:
            discretization = "bilinear" if mode == "dplr" else "zoh"
        check_sizes(owner, state_size=state_size, num_ssm=num_ssm)
        system: dict[str, Any] = dict(state_size=state_size, mode=mode, init=init, discretization=discretization,
                                      num_ssm=num_ssm, dt_min=dt_min, dt_max=dt_max)
        check_system(owner, in_features, **system)
        self.state_size, self.glu = state_size, glu
        self.system = StateSpace(
            in_features, num_outputs=1 if is_causal else 2, param_dtype=self.param_dtype,
            implementation=self.implementation, rngs=rngs, **system,
        )
        self.skip = normal(rngs, (in_features,), self.param_dtype)
        self.out = output_map(self, "full" if glu else None, rngs)

    def respond(self, inputs, mask, segment_ids):
        return self.system.respond(inputs, segment_ids)

    def finish(self, inputs, responses):
        return activated(skipped(self.skip, inputs, responses), self.out, "full" if self.glu else None)

    def state(self, batch_size):
        return jnp.zeros((batch_size, self.in_features, self.state_size), jnp.float32)

    def respond_after(self, inputs, state, counts):
        return self.system.recur(inputs, state, counts)
