"""mLSTM: the matrix memory of xLSTM, whose input gate is an exponential."""

import functools
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import linear, precision
from subquad.zoo.base import Support
from subquad.zoo.cache import MLSTMCache, first_real
from subquad.zoo.checks import check_divides, check_sizes
from subquad.zoo.convolution.taps import CausalConvolution
from subquad.zoo.gated.decay import running_largest, with_segments
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.projection import in_pieces

FLOOR = -80.0  # least m of the 1 that becomes exp(-m), which would overflow: beside it all weights are 0


class MLSTM(Headless):
    """The block of xLSTM with a matrix memory: linear attention with a forget gate and an exponential input gate.

        u = W_u x,   c = silu(b + sum_j p_j * u_{t-j}),   q, k, v = W_q c, W_k c, W_v u
        i_t = exp(w_i [q; k; v] + b_i),   f_t = sigmoid(w_f [q; k; v] + b_f),   one number for each head      (eqs. 25, 26)
        C_t = f_t C_{t-1} + i_t k_t v_t^T / sqrt(P),   n_t = f_t n_{t-1} + i_t k_t / sqrt(P)                  (eqs. 19, 20)
        h_t = C_t^T q_t / max(|n_t . q_t|, 1)                                                                 (eq. 21)
        outputs = W_o ((norm(h) + s * c) * silu(W_z x)),   norm: of each head, centred, with a scale

    C and n are held as exp(-m_t) times themselves, m_t = max(log f_t + m_{t-1}, log i_t), so that no weight in them exceeds 1
    and the 1 becomes exp(-m_t). W_q, W_k and W_v are block-diagonal.

    Cost: time O(T R (D + P)) for heads of P features, R of all; memory O(T R); one extended token O(R (D + P)) and a cache of
        R P + K R numbers.
    Differs from the paper: a forget gate may also be an exponential there. The released code adds 1e-6 to what is divided by,
        after exp(-m). Maps start as Flax's do.

    Args:
        in_features: features D of the inputs.
        hidden_features: R, of all heads. None: 2 D.
        num_heads: N; must divide hidden_features.
        block_size: features of a block of W_q, W_k and W_v; must divide hidden_features.
        conv_width: taps K.
        is_causal: must be True: a token sees itself and those before it.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]; no time passes at padding.
        segment_ids: [T] or [*B, T]: different runs of equal ids do not see each other; the taps are then laid out for every
            token, O(T K R) numbers.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: sizes that do not divide; is_causal=False; a pairwise mask.
    Numerics: gates, m, states and the norm in float32. An input gate of exp(1000) is as exact as one of 1.
    Example:
        >>> layer = MLSTM(64, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> outputs, cache = layer.extend(jnp.ones((2, 1, 64)), layer.init_cache(2, 100))
        >>> cache.state.shape, cache.recent.shape
        ((2, 4, 32, 32), (2, 3, 128))

    Source: Beck et al., xLSTM: Extended Long Short-Term Memory, NeurIPS 2024, arXiv 2405.04517, figure 11; code: NX-AI/xlstm,
        for block sizes and starting values. The figure is cited from memory.
    """

    supports = Support(cost="T", bidirectional=False, segment_ids=True)

    def __init__(
        self,
        in_features: int,
        *,
        hidden_features: int | None = None,
        num_heads: int = 4,
        block_size: int = 4,
        conv_width: int = 4,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner, hidden = type(self).__name__, 2 * in_features if hidden_features is None else hidden_features
        check_sizes(owner, hidden_features=hidden, num_heads=num_heads, block_size=block_size, conv_width=conv_width)
        check_divides(owner, f"hidden_features = {hidden}", hidden, num_heads=num_heads, block_size=block_size)
        self.hidden_features, self.heads = hidden, (num_heads, hidden // num_heads)
        self.input, self.gate = (self.linear(in_features, hidden, rngs, use_bias=False) for _ in range(2))
        self.convolution = CausalConvolution(
            hidden, conv_width, use_bias=True, param_dtype=self.param_dtype, implementation=self.implementation, rngs=rngs
        )
        blocks, init = hidden // block_size, nnx.initializers.lecun_normal(in_axis=0, out_axis=2, batch_axis=1)
        self.query, self.key, self.value = (
            nnx.Einsum(
                "tjk,kjl->tjl", (block_size, blocks, block_size), kernel_init=init, dtype=self.dtype,
                param_dtype=self.param_dtype, precision=self.precision, rngs=rngs,
            )
            for _ in range(3)
        )
        param = lambda x: nnx.Param(x.astype(self.param_dtype))
        self.gates = param(jnp.zeros((2, 3 * hidden, num_heads)))  # w_i and w_f
        self.input_bias = param(0.1 * jax.random.normal(rngs.params(), (num_heads,), jnp.float32))
        self.forget_bias = param(jnp.linspace(3, 6, num_heads))  # so that all remember at first, for 20 to 400 tokens
        self.norm = GatedNorm(self.heads, is_centred=True, use_bias=False, param_dtype=self.param_dtype)
        self.direct = param(jnp.ones(hidden))
        self.out = self.linear(hidden, self.out_features, rngs, use_bias=False)

    def projected(self, name: str, inputs: Float[Array, "N R"]) -> Float[Array, "N H P"]:
        """q, k or v of each head."""
        of = getattr(self, name)
        return of(inputs.reshape(len(inputs), *of.kernel.shape[1::-1])).reshape(-1, *self.heads)

    @precision.promoting
    def gate_logits(self, query, key, value) -> Float[Array, "N 2 H"]:
        """log i and the logit of f."""
        inputs = jnp.concatenate([x.reshape(len(x), -1) for x in (query, key, value)], -1)
        logits = jnp.einsum("tr,grn->tgn", inputs, self.gates[...].astype(inputs.dtype), precision=self.precision)
        return precision.wide(logits) + jnp.stack([self.input_bias[...], self.forget_bias[...]])

    def recall(
        self, query, key, value, log_input, log_forget, kept: Bool[Array, "B 1 1 T"] | None = None,
        state: tuple[Array, Array, Array] | None = None,
    ) -> tuple[Float[Array, "B T N V"], tuple[Array, Array, Array]]:  # fmt: skip
        """h, and exp(-m) C, exp(-m) n and m after the last token that is `kept`, from those before the first.

        C and n are not yet divided by sqrt(P). A state of None: no token before.
        """
        if kept is not None:
            real = kept[:, 0, 0, :, None]
            log_input, log_forget = jnp.where(real, log_input, -jnp.inf), jnp.where(real, log_forget, 0)
        start = jnp.full_like(log_input[:, 0], -jnp.inf) if state is None else state[2]
        largest = running_largest(*map(jax.lax.stop_gradient, (log_forget, log_input, start)))
        before, largest = largest[:, :-1], largest[:, 1:]
        finite = jnp.where(jnp.isneginf(largest), 0, largest)  # nothing was seen yet
        # m cancels, so it is a constant to every derivative; rounded, a decay must not grow.
        fallen = jax.lax.stop_gradient(jnp.minimum(before - finite, jnp.where(jnp.isneginf(log_forget), 0, -log_forget)))
        weight = jnp.exp(log_input - finite)[..., None]
        key = in_pieces(lambda key, weight: key * weight.astype(key.dtype), key, weight)
        heads, after = linear.gated(
            query, key, value, log_forget + fallen, floor=jnp.exp(-jnp.maximum(finite, FLOOR)), mask=kept, normalize=True,
            initial_state=None if state is None else state[:2], return_state=True, scale=query.shape[-1] ** -0.5,
            implementation=self.implementation,
        )  # fmt: skip
        return heads, (*after, largest[:, -1])

    def _recur(
        self, inputs: Float[Array, "B T D"], counts: Int[Array, "B"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, cache: MLSTMCache | None = None,
    ) -> tuple[Float[Array, "B T R"], Any]:  # fmt: skip
        """norm(h) + s * c, and the cache after the last real token, where there is one before the first."""
        state, recent = (None, None) if cache is None else (cache[:3], cache.recent)
        kept = first_real(inputs, counts)
        hidden = in_pieces(self.input, inputs)
        convolved, recent = self.convolution(hidden, kept, segment_ids, recent)
        convolved = in_pieces(nnx.silu, convolved)
        sources = dict(query=convolved, key=convolved, value=hidden)
        projected = [in_pieces(functools.partial(self.projected, name), source) for name, source in sources.items()]
        logits = in_pieces(self.gate_logits, *projected)
        log_forget = with_segments(-nnx.softplus(-logits[:, :, 1]), segment_ids)
        query, key, value = projected
        heads, after = self.recall(query, key, value, logits[:, :, 0], log_forget, kept, state)
        outputs = in_pieces(self.normed, heads, convolved)
        if cache is not None:  # in float32, as before, where the gates are float64
            cache = jax.tree.map(lambda new, old: new.astype(old.dtype), MLSTMCache(*after, recent), cache)
        return outputs, cache

    def normed(self, heads, convolved):
        direct = self.direct[...].astype(convolved.dtype)[None] * convolved
        return self.norm.of_tokens(heads).reshape(convolved.shape) + direct

    def finish(self, inputs, responses):
        return self.out(responses * nnx.silu(self.gate(inputs)))

    def state(self, batch_size):
        heads, size = self.heads
        zeros = lambda *shape: jnp.zeros((batch_size, *shape), jnp.float32)
        largest = jnp.full((batch_size, heads), -jnp.inf, jnp.float32)
        return MLSTMCache(zeros(heads, size, size), zeros(heads, size), largest, self.convolution.empty(batch_size))
