"""Hyena: long convolutions, whose filters a small network makes, between gates."""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import convolution, precision
from subquad.zoo import padding
from subquad.zoo.base import Support
from subquad.zoo.cache import counts, pieces, poisoned, write
from subquad.zoo.checks import cache_dtype, check_length, check_number, check_sizes, refuse, require_extend
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import flat, in_turn

FILTER_BYTES = 1 << 24  # of the windows that are made at a time
FAST, SLOW, TARGET = 0.3, 1.5, 1e-2  # shares of max_length after which windows are at the target, as in the authors' code


class HyenaCache(NamedTuple):
    """What each long convolution has seen of each sample: the token at position t in slot t of S."""

    values: Float[Array, "B N S D"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    state: Float[Array, "B W (N+1)*D"]  # the last W inputs of the short convolution

    @property
    def room(self) -> int:
        return self.values.shape[2]


class Hyena(Headless):
    """A recurrence of N gates and long convolutions.

        x^1, .., x^N, v = short convolution of W_i x
        z^1 = v,   z^{n+1}_t = x^n_t * ((h^n conv z^n)_t + d^n * z^n_t),   outputs = W_o z^{N+1}          (section 3.1)
        h^n_t = (exp(-alpha^n t / L) + shift) * FFN(t)^n,   FFN of 1 + 2 K features of t, with sines       (section 3.3)

    A filter is as long as max_length, L, and costs parameters only in its network. FFN(t) takes t / (L - 1) and sines and
    cosines of K wavelengths down to about L / K.

    Cost: time O(N T D (log T + W) + N T D^2), memory O(N T D). No state holds the past: the cache grows by N D numbers a token,
        and one extended token takes O(N S D (1 + W / B)), where the cache of B sequences has room for S: each call makes
        its filters again.
    Differs from the paper: not at all in the recurrence; the released code has no h^1 and d^1, as with
        `convolve_values=False`, so that its order 2 has one long convolution. d is the code's; here it is part of a filter's
        first tap. Windows decay as in the code, uniformly in alpha over all filters and features. The code also trains
        the features of t, slowly; here they are fixed.
    Training: the authors give the frequencies and the filters no weight decay.

    Args:
        in_features: features D of the inputs.
        max_length: L; no call and no cache may have more tokens. Filters stretch with it.
        order: N.
        convolve_values: with h^1 and d^1; without, the first step is z^2 = x^1 * v.
        conv_width: taps of the short convolution.
        filter_features: W hidden features of FFN.
        num_inner: its layers between the first and the last.
        num_bands: wavelengths K.
        frequency: what its sines multiply their arguments by at first; a number for each hidden feature, learned.
        shift: so much of a filter never decays.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. Long convolutions are "xla" and "reference" only.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other; the long convolutions then take time
            O(N T D log^2 T), and the taps of the short one are laid out for every token.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: more tokens than max_length; is_causal=False; a pairwise mask; order 1 without a convolution.
    Numerics: filters and convolutions in float32, by FFT: rounding is in proportion to a feature's largest z of the call, the
        future ones too (see `convolution.convolve`). Sines of 14 times their arguments, one behind the other, leave a
        filter three digits of float32.
    Example:
        >>> layer = Hyena(64, max_length=128, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.values.shape
        (2, 2, 100, 64)

    Source: Poli et al., Hyena Hierarchy: Towards Larger Convolutional Language Models, ICML 2023, arXiv 2302.10866; code:
        HazyResearch/safari, whose models of The Pile have the defaults here. Sections are cited from memory.
    """

    supports = Support(cost="T log T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        max_length: int,
        order: int = 2,
        convolve_values: bool = True,
        conv_width: int = 3,
        filter_features: int = 64,
        num_inner: int = 2,
        num_bands: int = 16,
        frequency: float = 14.0,
        shift: float = 0.0,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, max_length=max_length, order=order, conv_width=conv_width, filter_features=filter_features,
                    num_inner=num_inner, num_bands=num_bands)
        check_number(owner, "frequency", frequency, "(-inf, inf)", "14 is usual.")
        check_number(owner, "shift", shift, "(-inf, inf)", "By 0 all of a filter decays.")
        if order == 1 and not convolve_values:
            refuse(owner, "convolve_values", False, "be True with order 1", "Else there is no long convolution.")
        self.max_length, self.order, self.convolve_values = max_length, order, convolve_values
        self.num_bands, self.shift = num_bands, shift
        width = (order + 1) * in_features
        self.input = self.linear(in_features, width, rngs)
        self.short = CausalConvolution(
            width, conv_width, use_bias=True, param_dtype=self.param_dtype, implementation=self.implementation, rngs=rngs,
        )  # fmt: skip

        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, self.param_dtype))
        kernel = nnx.initializers.lecun_normal(batch_axis=())
        inner = nnx.initializers.lecun_normal(batch_axis=0)
        last = nnx.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        filters = (in_features, order if convolve_values else order - 1)
        self.frequency = nnx.Param(jnp.full(filter_features, frequency, self.param_dtype))
        self.first_kernel = self.drawn(rngs, kernel, 1 + 2 * num_bands, filter_features)
        self.first_bias = zeros(filter_features)
        self.inner_kernel = self.drawn(rngs, inner, num_inner, filter_features, filter_features)
        self.inner_bias = zeros(num_inner, filter_features)
        self.last_kernel = self.drawn(rngs, last, filter_features, *filters)
        self.skip = self.drawn(rngs, jax.random.normal, *filters)
        self.out = self.linear(in_features, self.out_features, rngs)

    def drawn(self, rngs, init, *shape):
        """A parameter that is drawn in float32."""
        return nnx.Param(init(rngs.params(), shape, jnp.float32).astype(self.param_dtype))

    # ----------------------------------------------------------------------------------------------------- the filters

    @precision.promoting
    def encoding(self, length: int) -> Float[Array, "T E"]:
        """The features of the first positions."""
        t = jnp.arange(length, dtype=jnp.float32)[:, None]
        angles = 2 * math.pi / self.max_length * t * jnp.linspace(1e-4, self.num_bands - 1, self.num_bands, dtype=jnp.float32)
        return jnp.concatenate([t / max(1, self.max_length - 1), jnp.cos(angles), -jnp.sin(angles)], axis=1)

    @precision.full
    @precision.promoting
    def hidden(self, length: int) -> Float[Array, "T W"]:
        """FFN without its last layer."""
        read = lambda parameter: precision.wide(parameter[...])
        sine = lambda x, kernel, bias: jnp.sin(read(self.frequency) * (x @ kernel + bias))
        hidden = sine(self.encoding(length), read(self.first_kernel), read(self.first_bias))
        for layer in zip(read(self.inner_kernel), read(self.inner_bias), strict=True):
            hidden = sine(hidden, *layer)
        return hidden

    @precision.full
    @precision.promoting
    def filter(self, hidden: Float[Array, "T W"], n: int) -> Float[Array, "D T"]:
        """h^n, with d^n in its first tap, of some features at a time: their windows are as many numbers, and none is kept."""
        features, count = self.last_kernel.shape[1:]
        slowest, fastest = -math.log(TARGET) / SLOW, -math.log(TARGET) / FAST
        rates = jnp.linspace(slowest, fastest, features * count, dtype=jnp.float32).reshape(features, count)
        share = jnp.arange(len(hidden), dtype=jnp.float32) / max(1, self.max_length - 1)

        @jax.checkpoint
        def taps(feature):
            rate, weights, skip = feature
            return (jnp.exp(-rate * share) + self.shift) * (hidden @ weights) + jnp.where(share == 0, skip, 0)

        size = min(features, max(1, FILTER_BYTES // (4 * len(hidden))))
        weights, skip = (precision.wide(parameter[..., n]) for parameter in (self.last_kernel, self.skip))
        return jax.lax.map(taps, (rates[:, n], weights.T, skip), batch_size=size)

    # ------------------------------------------------------------------------------------------------------- the layer

    def parts(self, inputs, segment_ids=None, mask=None, state=None):
        """([x^1, .., x^N, v], the last inputs of the short convolution where there was a `state` of them)."""

        def convolve(inputs, state):
            outputs, state = self.short(flat(self.input)(inputs), mask, segment_ids, state)
            return jnp.split(outputs, self.order + 1, axis=-1), state

        if segment_ids is None and state is None:
            return in_turn(convolve, inputs, self.short.empty(len(inputs)))
        return convolve(inputs, state)

    def _through(self, gates, values, convolve):
        """z^{N+1}; `convolve(n, z)` is the n-th long convolution."""
        if not self.convolve_values:
            values, gates = gates[0] * values, gates[1:]
        for n, gate in enumerate(gates):
            values = gate * convolve(n, values)
        return values

    def respond(self, inputs, mask, segment_ids):
        check_length(type(self).__name__, "inputs_q", inputs.shape[1], self.max_length)
        (*gates, values), _ = self.parts(inputs, segment_ids)
        hidden = self.hidden(inputs.shape[1])
        return self._through(gates, values, lambda n, values: convolution.convolve(
            values, self.filter(hidden, n), segment_ids=segment_ids, implementation=self.implementation))

    def init_cache(self, batch_size, max_length, dtype=None) -> HyenaCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        check_length(type(self).__name__, "max_length", max_length, self.max_length)
        dtype, (features, count) = cache_dtype(self, dtype), self.last_kernel.shape[1:]
        values = jnp.zeros((batch_size, count, max_length, features), dtype)
        return HyenaCache(values, jnp.zeros(batch_size, jnp.int32), self.short.empty(batch_size))

    def _respond_cached(self, inputs, cache, mask):
        (*gates, values), state = self.parts(inputs, None, mask, cache.state)
        hidden, past = self.hidden(cache.room), []

        def convolve(n, values):
            past.append(write(cache.values[:, n], values, cache.length, mask))
            seen = past[-1].astype(values.dtype)
            return convolved_from(cache.length, values.shape[1], seen, self.filter(hidden, n), self.implementation)

        responses = self._through(gates, values, convolve)
        cache = HyenaCache(jnp.stack(past, 1), cache.length + counts(inputs, mask), state)
        return poisoned(responses, cache), cache


@precision.promoting
def convolved_from(start, tokens: int, past: Float[Array, "B S D"], taps: Float[Array, "D S"], implementation):
    """The convolution of the past at each sample's `tokens` positions from `start` on; of one token, by the sum itself."""
    if tokens > 1:
        outputs = convolution.convolve(past, taps, implementation=implementation)
        return pieces(padding.pad_end(outputs, tokens), start, tokens)  # of padding there may be more than room
    room = past.shape[1]
    backwards = jnp.pad(jnp.flip(taps.T, 0), ((0, room), (0, 0)))  # slot s weighs tap start - s
    of_sample = lambda start, past: jnp.sum(jax.lax.dynamic_slice_in_dim(backwards, room - 1 - start, room) * past, axis=0)
    return jax.vmap(of_sample)(start, past)[:, None].astype(past.dtype)
