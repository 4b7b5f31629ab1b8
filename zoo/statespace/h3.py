"""H3: a short memory and a long one, multiplied with each other and with the query."""

from typing import Any, Unpack

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision, ssm
from subquad.zoo.base import Support
from subquad.zoo.cache import RecurrentCache, first_real
from subquad.zoo.checks import check_divides, check_sizes
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import flat
from subquad.zoo.statespace import hippo
from subquad.zoo.statespace.output import normal
from subquad.zoo.statespace.system import StateSpace, check_system


class H3(Headless):
    """Hungry hungry hippo: two state spaces and two products in place of attention.

        q = W_q x,   k = W_k x,   v = W_v x
        k'_t = sum_j p_j * k_{t-j},   j = 0 .. K - 1              the shift system: what came just before
        S = SSM(k' v^T) + D k' v^T                               the diagonal system, one for each head: what came at any time
        outputs = W_o (q^T S)                                                                       (section 3.1, algorithm 1)

    k' v^T is a matrix of H x H numbers for each head of H features, each of which goes through the head's system.

    Cost: time O(T D (D + H P)), memory O(T D H); one extended token O(D (D + H P)) and a cache of (K - 1) D + H D P numbers.
        With segments the convolutions cost O(T D H log^2 T).
    Differs from the paper: the shift system's input matrix is the first unit vector, so that what is learned are the K taps
        of a convolution; the term D of that system is part of its first tap, to which it adds a normal number at the start.
        Systems are those of S4D.
    Training: as S4's: all of `layer.system` but output_matrix slowly and without weight decay.

    Args:
        in_features: features D of the inputs.
        head_features: H; must divide D.
        state_size: P, states of a diagonal system; even, as P / 2 conjugate pairs of modes.
        conv_width: taps K. None: state_size.
        init: of the diagonal systems: "lin" (S4D-Lin), "inv" (S4D-Inv) or "legs".
        discretization: "bilinear" or "zoh".
        dt_min, dt_max: steps are drawn log-uniformly between these; 1 / step is the memory in tokens.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. Long convolutions, which segments need, are "xla" and "reference" only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: head_features that does not divide D; an odd state_size, an unknown name; is_causal=False.
    Numerics: both systems in float32; call and `extend` agree to 2e-5.
    Example:
        >>> layer = H3(64, state_size=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 64, 16), (2, 15, 64))

    Source: Fu et al., Hungry Hungry Hippos: Towards Language Modeling with State Space Models, ICLR 2023, arXiv 2212.14052;
        code: HazyResearch/safari, where the paper leaves things open. The section is cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        head_features: int = 1,
        state_size: int = 64,
        conv_width: int | None = None,
        init: hippo.Init = "lin",
        discretization: ssm.Discretization = "bilinear",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        width = state_size if conv_width is None else conv_width
        check_sizes(owner, head_features=head_features, state_size=state_size, conv_width=width)
        check_divides(owner, f"in_features = {in_features}", in_features, head_features=head_features)
        heads = in_features // head_features
        steps = dict(dt_min=dt_min, dt_max=dt_max)
        system: dict[str, Any] = dict(state_size=state_size, init=init, discretization=discretization, **steps)
        check_system(owner, heads, mode="diagonal", num_ssm=heads, **system)
        self.head_features, self.state_size = head_features, state_size
        self.query, self.key, self.value = (self.linear(in_features, in_features, rngs) for _ in range(3))
        self.shift = CausalConvolution(
            in_features, width, param_dtype=self.param_dtype, implementation=self.implementation, rngs=rngs
        )
        self.shift.taps[...] = self.shift.taps[...].at[0].add(normal(rngs, (in_features,), self.param_dtype)[...])
        self.system = StateSpace(
            heads, num_outputs=1, mode="diagonal", num_ssm=heads, param_dtype=self.param_dtype,
            implementation=self.implementation, rngs=rngs, **system,
        )  # fmt: skip
        self.skip = normal(rngs, (heads,), self.param_dtype)
        self.out = self.linear(in_features, self.out_features, rngs)

    @precision.promoting
    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:  # fmt: skip
        """q^T S, and the cache after the last real token, where there is one before the first."""
        size, (state, recent) = self.head_features, (None, None) if cache is None else cache
        query, key, value = (flat(linear)(inputs) for linear in (self.query, self.key, self.value))
        key, recent = self.shift(key, first_real(inputs, counts), segment_ids, recent)
        split = lambda x: rearrange(x, "b t (n h) -> b t n h", h=size)
        product = precision.full(jnp.einsum)
        pairs = product("btni,btnj->bijtn", split(key), split(value))
        pairs = rearrange(pairs, "b i j t n -> (b i j) t n")
        repeated = lambda x: None if x is None else jnp.repeat(x, size**2, axis=0)
        if state is None:
            responses = self.system.respond(pairs, repeated(segment_ids))
        else:
            states = rearrange(state, "b (c n) p -> (b c) n p", c=size**2)
            responses, states = self.system.recur(pairs, states, repeated(counts))
            cache = RecurrentCache(rearrange(states, "(b c) n p -> b (c n) p", c=size**2), recent)
        pairs = responses + self.skip[...].astype(pairs.dtype) * pairs
        pairs = rearrange(pairs, "(b i j) t n -> b i j t n", i=size, j=size)
        heads = product("btni,bijtn->btnj", split(query), pairs)
        return rearrange(heads, "b t n j -> b t (n j)"), cache

    def state(self, batch_size):
        shape = batch_size, self.in_features * self.head_features, self.state_size
        return RecurrentCache(jnp.zeros(shape, jnp.float32), self.shift.empty(batch_size))
