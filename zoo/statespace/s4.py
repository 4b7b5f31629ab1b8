"""S4: a linear state space model per feature, run as a convolution or as a recurrence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import dispatch, ssm
from subquad.zoo import padding
from subquad.zoo.base import Support
from subquad.zoo.cache import S4Cache, counts
from subquad.zoo.checks import check_call, check_causality, check_extend, check_sizes, require_extend
from subquad.zoo.compilation import compile_once
from subquad.zoo.projection import in_pieces
from subquad.zoo.statespace import hippo
from subquad.zoo.statespace.system import Mode, StateSpace, check_system


class S4(nnx.Module):
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
        out_features: features F of the output. None: in_features.
        state_size: P, states per system; even, as P / 2 conjugate pairs of modes.
        mode: "dplr" (S4) or "diagonal" (S4D).
        init: of A and B: "legs" (HiPPO-LegS), or for mode "diagonal" also "lin" (S4D-Lin) and "inv" (S4D-Inv).
        discretization: "bilinear", or for mode "diagonal" also "zoh". None: "bilinear" for dplr, "zoh" for diagonal.
        num_ssm: how many A, B are trained; must divide in_features, which share them in turn. None: in_features.
        is_causal: a token sees itself and those before it.
        dt_min, dt_max: steps are drawn log-uniformly between these; 1 / step is the memory in tokens.
        glu: gate the output map; False: a plain linear map.
        dtype: dtype of the computation outside the state space model. None: promoted from inputs and parameters.
        param_dtype: dtype of the parameters.
        precision: `jax.lax.Precision` of the output map.
        implementation: None takes the best that can run here; "reference" has forward derivatives, too. Long convolutions,
            which "dplr" and segments need, are "xla" and "reference" only.
        rngs: `rngs.params()` draws the parameters.
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
        out_features: int | None = None,
        state_size: int = 64,
        mode: Mode = "dplr",
        init: hippo.Init = "legs",
        discretization: ssm.Discretization | None = None,
        num_ssm: int | None = None,
        is_causal: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        glu: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        implementation: dispatch.Implementation | None = None,
        rngs: nnx.Rngs,
    ):
        owner = type(self).__name__
        out_features = in_features if out_features is None else out_features
        num_ssm = in_features if num_ssm is None else num_ssm
        if discretization is None:
            discretization = "bilinear" if mode == "dplr" else "zoh"
        check_sizes(owner, in_features=in_features, out_features=out_features, state_size=state_size, num_ssm=num_ssm)
        system: dict[str, Any] = dict(state_size=state_size, mode=mode, init=init, discretization=discretization,
                                      num_ssm=num_ssm, dt_min=dt_min, dt_max=dt_max)
        check_system(owner, in_features, **system)
        check_causality(owner, self.supports, is_causal)
        dispatch.check_name(owner, implementation)
        self.in_features, self.out_features, self.state_size = in_features, out_features, state_size
        self.is_causal, self.glu, self.dtype, self.implementation = is_causal, glu, dtype, implementation
        self.system = StateSpace(
            in_features, num_outputs=1 if is_causal else 2, param_dtype=param_dtype, implementation=implementation, rngs=rngs,
            **system,
        )
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (in_features,), jnp.float32).astype(param_dtype))
        self.out = nnx.Linear(
            in_features, out_features * (2 if glu else 1), dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )

    def _promote(self, inputs):
        """The inputs in the dtype of the computation."""
        return promote_dtype((inputs, self.skip[...]), dtype=self.dtype)[0]

    def _mix(self, inputs, responses):
        """The pointwise rest of the layer, from u and C x."""
        hidden = nnx.gelu(responses + self.skip[...].astype(inputs.dtype)[None] * inputs, approximate=False)
        return gated_linear(self.out, hidden) if self.glu else self.out(hidden)

    def __call__(
        self,
        inputs_q: Float[Array, "*B T D"],
        inputs_kv: None = None,
        inputs_v: None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
        positions: None = None,
        segment_ids: Int[Array, "..."] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "*B T F"]:
        """Mixes the sequence. `deterministic` and `rngs` are there so that layers interchange; nothing is drawn."""
        call = check_call(self, 1, inputs_q, inputs_kv, inputs_v, mask, positions, segment_ids)
        outputs = self._call(call.inputs_q, call.mask, call.extras.get("segment_ids"))
        return outputs.reshape(*call.batch, *outputs.shape[1:])

    @compile_once
    def _call(self, inputs, mask, segment_ids):
        order = None if mask is None else padding.real_first(mask, inputs.shape[0])
        if order is not None:
            inputs, segment_ids = jax.tree.map(order.pack, (inputs, segment_ids))
        inputs = self._promote(inputs)
        outputs = in_pieces(self._mix, inputs, self.system.respond(inputs, segment_ids))
        return outputs if order is None else order.unpack(outputs)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> S4Cache:
        """The state before the first token. It holds float32 numbers for any length: max_length and dtype change nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        return S4Cache(jnp.zeros((batch_size, self.in_features, self.state_size), jnp.float32))

    def extend(self, inputs: Float[Array, "B T D"], cache: S4Cache, *, mask: Bool[Array, "B 1 1 T"] | None = None):
        """T >= 1 more tokens after those in `cache` -> (outputs [B, T, F], cache): the recurrence.

        Args:
            inputs: the new tokens.
            cache: of `init_cache`, or of the call before; not changed.
            mask: key padding of the new tokens; no time passes at a token masked out.
        """
        mask = check_extend(self, inputs, cache, mask)
        return self._extend(inputs, cache, mask)

    @compile_once
    def _extend(self, inputs, cache, mask):
        order = None if mask is None else padding.real_first(mask, inputs.shape[0])
        inputs = self._promote(inputs if order is None else order.pack(inputs))
        responses, state = self.system.recur(inputs, cache.state, None if mask is None else counts(inputs, mask))
        outputs = in_pieces(self._mix, inputs, responses)
        return outputs if order is None else order.unpack(outputs), S4Cache(state)

    def pattern(self, length: int) -> np.ndarray:
        """What attends to what: bool [1, T, S] for T = S = length, True where the query may see the key."""
        full = np.ones((1, length, length), bool)
        return np.tril(full) if self.is_causal else full


def gated_linear(linear, inputs):
    """glu(W x + b): one half of the features of a linear layer, gated by the other half.

    Each half by itself: the gradients of both would be one array, twice as wide as any other. A gradient of S4D holds 25 MB
    of temporaries in place of 32 (4,096 tokens of 256 features in float32; jaxlib 0.10.2 on a CPU).
    """
    graph, params = nnx.split(linear)
    half = lambda i: nnx.merge(graph, jax.tree.map(lambda x: jnp.split(x, 2, -1)[i], params))(inputs)
    return half(0) * nnx.sigmoid(half(1))
