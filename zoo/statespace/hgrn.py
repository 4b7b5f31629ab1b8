"""HGRN: a gated complex recurrence whose decays have a lower bound, which grows from layer to layer."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Complex, Float, Int

from subquad.kernels import precision, scan
from subquad.zoo.base import Support
from subquad.zoo.checks import check_number
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import flat, in_turn


class HGRN(Headless):
    """Hierarchically gated recurrent unit.

        c_t = silu(W_re x_t) + i silu(W_im x_t),   f_t = bound + (1 - bound) sigmoid(W_f x_t)
        h_t = f_t e^(i phase) * h_{t-1} + (1 - f_t) * c_t                                                  (section 3.2)
        outputs = W_o (LN([Re h_t, Im h_t]) * silu(W_g x_t))

    What is kept and what is written are one gate. A layer with a bound near 1 cannot forget fast: upper layers get a higher one
    and remember longer.

    Cost: time O(T D^2), memory O(T D), log T steps deep; one extended token O(D^2) and a cache of 2 D numbers.
    Differs from the paper: it learns the bounds of all layers together, the sums up to each layer of a softmax over layers, for
        each feature; a layer knows no others, so its bound is a number that the constructor is given. Layer k of K, from 0,
        starts the paper's at about k / K. The norm stands before the gate and all activations are silu, as in the released
        code. Both directions see the present token, as there.

    Args:
        in_features: features D of the inputs, and of the complex state.
        lower_bound: of f, in [0, 1).
        is_causal: a token sees itself and those before it. Else a second recurrence, with phases of its own, runs backwards,
            and the states are added.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: a lower_bound outside [0, 1); a pairwise mask.
    Numerics: gates and states in float32; call and `extend` agree to 2e-5.
    Example:
        >>> layer = HGRN(64, lower_bound=0.5, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape
        (2, 128)

    Source: Qin et al., Hierarchically Gated Recurrent Neural Network for Sequence Modeling, NeurIPS 2023, arXiv 2311.04823;
        code: Doraemonzzz/hgru-pytorch. The section is cited from memory.
    """

    supports = Support(cost="T", segment_ids=True)

    def __init__(
        self, in_features: int, *, lower_bound: float = 0.0, is_causal: bool = False, rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):  # fmt: skip
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_number(type(self).__name__, "lower_bound", lower_bound, "[0, 1)", "Layer k of K takes k / K.")
        self.lower_bound = lower_bound
        self.input, self.gate = (self.linear(in_features, 2 * in_features, rngs) for _ in range(2))
        self.forget = self.linear(in_features, in_features, rngs)
        phases = 10_000 ** (-2 / in_features * jnp.arange(in_features, dtype=jnp.float32))  # the code's
        self.phase = nnx.Param(jnp.stack([phases] * (1 if is_causal else 2)).astype(self.param_dtype))
        self.norm = nnx.LayerNorm(
            2 * in_features, epsilon=1e-5, dtype=self.dtype, param_dtype=self.param_dtype, rngs=rngs
        )
        self.out = self.linear(2 * in_features, self.out_features, rngs)

    @precision.promoting
    def gates(self, inputs: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Complex[Array, "B T D"]]:
        """(f, (1 - f) c) of every token."""
        written = jax.lax.complex(*jnp.split(nnx.silu(precision.wide(flat(self.input)(inputs))), 2, axis=-1))
        forgotten = (1 - self.lower_bound) * nnx.sigmoid(-precision.wide(flat(self.forget)(inputs)))
        return 1 - forgotten, forgotten * written

    @precision.promoting
    def recur(
        self, forget: Float[Array, "B T D"], drive: Complex[Array, "B T D"], start: Complex[Array, "B D"] | None = None,
        which: int = 0, kept: Bool[Array, "B T"] | None = None, segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Complex[Array, "B T D"], Complex[Array, "B D"]]:  # fmt: skip
        """h through the phases of one direction, and the last one; at tokens that are not `kept` it stays as it is."""
        phase = precision.wide(self.phase[which])
        decay = jax.lax.complex(forget * jnp.cos(phase), forget * jnp.sin(phase))
        if kept is not None:
            decay, drive = jnp.where(kept[..., None], decay, 1), jnp.where(kept[..., None], drive, 0)
        if segment_ids is not None:
            decay = jnp.where(run_starts(segment_ids)[..., None], 0, decay)
        return scan.first_order(decay, drive, start, implementation=self.implementation)

    def walk(self, inputs, state, which=0, kept=None, segment_ids=None):
        """([Re h, Im h] of every token, that after the last), from `state` on."""
        start = jax.lax.complex(*jnp.split(state, 2, axis=-1))
        states, last = self.recur(*self.gates(inputs), start, which, kept, segment_ids)
        return in_planes(states).astype(inputs.dtype), in_planes(last)

    def respond(self, inputs, mask, segment_ids):
        kept = None if mask is None or self.is_causal else jnp.broadcast_to(mask[:, 0, 0], inputs.shape[:2])
        total = []
        for which in range(len(self.phase)):
            turned = (lambda x: None if x is None else jnp.flip(x, 1)) if which else (lambda x: x)
            walk = lambda x, state, which=which, **more: self.walk(x, state, which, **more)
            arguments = turned(inputs), self.state(len(inputs))
            if kept is None and segment_ids is None:
                responses, _ = in_turn(walk, *arguments)
            else:
                responses, _ = walk(*arguments, kept=turned(kept), segment_ids=turned(segment_ids))
            total.append(turned(responses))
        return sum(total[1:], start=total[0])

    @precision.promoting
    def finish(self, inputs, responses):
        return self.out(self.norm(responses) * nnx.silu(self.gate(inputs)))

    def state(self, batch_size):
        return jnp.zeros((batch_size, 2 * self.in_features), jnp.float32)

    def respond_after(self, inputs, state, counts):
        kept = None if counts is None else jnp.arange(inputs.shape[1])[None] < counts[:, None]
        return self.walk(inputs, state, kept=kept)


def in_planes(states: Complex[Array, "*B D"]) -> Float[Array, "*B 2*D"]:
    """Real parts, then imaginary parts."""
    return jnp.concatenate([states.real, states.imag], axis=-1)
