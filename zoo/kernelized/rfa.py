"""Random feature attention: unit queries and keys, Fourier features, and a gate that forgets."""

from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.kernels import linear, precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import GatedCache, counts
from subquad.zoo.checks import check_sizes, check_word, refuse, require_extend
from subquad.zoo.features import RandomFeature, random_projection, unit
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import in_pieces, projection

Constants = Literal["paper", "code"]


class RFAAttention(Attention):
    """Attention through sines and cosines of random projections, whose causal form has a gate for each head.

        y_t = phi(q_t)^T S_t / phi(q_t)^T z_t,   phi(x) = M^-1/2 [sin(W x / |x|), cos(W x / |x|)]       (section 3.1)
        bidirectional:  S = sum_s phi(k_s) v_s^T                                        z: the same with v = 1
        causal:  S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T,   g_t = sigmoid(w_g . x_t + b_g)         (section 3.2)

    The rows of W are sigma times standard Gaussian vectors, and sigma is learned, a number for each head and feature. Products
    of features are unbiased estimates of exp(-|sigma (q - k)|^2 / 2), which for unit vectors and sigma = 1 is exp(q . k - 1):
    without a gate the layer estimates softmax attention over unit queries and keys.

    Cost: time O(T N M H), memory O(T N (M + H)); one extended token O(N M H) and a cache of that size whatever came before.
    Differs from the paper: its text was not at hand; the equations are as others report them, and no released code has the
        gate. The paper's features of an arc-cosine kernel are not here. Features are redrawn where the caller says (`redraw`),
        never inside a call. Rows whose denominator is 0 are 0; an estimate may also be small or negative, the less often the
        more features. Rotary positions (`rotary_base`) are not the paper's: unit vectors stay so.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads. Fewer save parameters only.
        is_causal: a token sees itself and those before it.
        num_features: random projections M of each head; there are 2 M features.
        gate: the causal layer forgets; False is the sum over all tokens so far. None: where it is causal and has the paper's
            constants.
        constants: "code" has those of the authors' code, which is causal: x / (|x| + 0.001), features multiplied by 0.1 M^1/2,
            a denominator of at least 1, and no gate. The first tokens, whose denominators are less, come out small.
        shell: see `Attention`. use_bias: of query, key, value and output; b_g stays.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: True = attend; key padding only, [*B, 1, 1, S].
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; a gate, or the code's constants, without is_causal; both; a pairwise mask.
    Numerics: angles, gates and sums in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16), divided by the
        row's denominator relative to the sum of its weights' sizes.
    Example:
        >>> layer = RFAAttention(4, 64, num_features=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.projection[...] = layer.redraw(nnx.Rngs(1))

    Source: Peng et al., Random Feature Attention, ICLR 2021, arXiv 2103.02143; code: Noahs-ARK/RFA.
    """

    supports = Support(cost="T", cross=True, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        num_features: int = 64,
        gate: bool | None = None,
        constants: Constants = "paper",
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        check_sizes(owner, num_features=num_features)
        check_word(owner, "constants", constants, get_args(Constants))
        if constants == "code" and not is_causal:
            refuse(owner, "constants", "'code'", "be 'paper' where is_causal=False", "The code's are of causal attention.")
        if gate and (constants == "code" or not is_causal):
            refuse(owner, "gate", gate, "be None or False without is_causal=True and the paper's constants", "Leave it out.")
        self.num_features, self.constants = num_features, constants
        self.projection = RandomFeature(self.redraw(rngs))
        self.sigma = nnx.Param(jnp.ones((num_heads, self.head_features), self.param_dtype))
        self.gate = nnx.data(None)
        if is_causal and constants == "paper" and gate is not False:
            self.gate = projection({**shell, "use_bias": True}, in_features, num_heads, rngs=rngs)

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "N M H"]:
        """New random projections, from `rngs.params()`, for the caller to write into the layer; see `PerformerAttention`."""
        rows = self.num_heads * self.num_features
        drawn = random_projection(rngs.params(), rows, self.head_features, orthogonal=False)
        return drawn.reshape(self.num_heads, self.num_features, self.head_features)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, and the gates' logits [B, T, N] or None."""
        return *super().project(inputs_q, inputs_kv, inputs_v), None if self.gate is None else self.gate(inputs_q)

    def attend(self, query, key, value, gate, mask, segment_ids=None):
        if self.is_causal:
            starts = None if segment_ids is None else run_starts(segment_ids)
            return self._attend_causal(query, key, value, gate, mask, starts=starts)[0]
        return linear.attention(
            *self._features(query, key, value), mask=mask, segment_ids=segment_ids, implementation=self.implementation
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> GatedCache:
        """An empty cache: float32 sums, no keys or values. So max_length bounds nothing, and dtype rounds nothing."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        shape = batch_size, self.num_heads, 2 * self.num_features
        sums = jnp.zeros((*shape, self.head_features), jnp.float32), jnp.zeros(shape, jnp.float32)
        return GatedCache(*sums, jnp.zeros(batch_size, jnp.int32))

    def attend_cached(self, query, key, value, gate, mask, cache):
        *state, seen = cache
        heads, state = self._attend_causal(query, key, value, gate, mask, tuple(state))
        return heads, GatedCache(*state, seen + counts(query, mask))

    def _features(self, query, key, value, gate=None):
        """Features of query and key for each of the query heads, and the values. Keys are weighed by what their gates close."""
        key, value = (jnp.repeat(heads, self.num_heads // self.num_kv_heads, axis=2) for heads in (key, value))
        scale, offset = (0.1 * self.num_features**0.5, 1e-3) if self.constants == "code" else (1.0, 0.0)
        directions = self.sigma[...][:, None].astype(self.projection[...].dtype) * self.projection[...]
        features = lambda heads: (scale * fourier_features(unit(heads, offset=offset), directions)).astype(heads.dtype)
        weighed = lambda heads, gate: features(heads) * nnx.sigmoid(-gate)[..., None].astype(heads.dtype)
        keys = in_pieces(features, key) if gate is None else in_pieces(weighed, key, gate)
        return in_pieces(features, query), keys, value

    def _attend_causal(self, query, key, value, gate, mask, state=None, starts=None):
        """Heads, and the sums after the last token; `starts` [B, T] is where nothing of before counts."""
        gate = None if gate is None else precision.wide(gate)
        query, key, value = self._features(query, key, value, gate)
        log_decay = None if gate is None else nnx.log_sigmoid(gate)
        if starts is not None:
            kept = jnp.zeros((*query.shape[:3],), jnp.float32) if log_decay is None else log_decay
            log_decay = jnp.where(starts[..., None], -jnp.inf, kept)
        options = dict(mask=mask, return_state=True, implementation=self.implementation)
        if self.constants == "paper":
            return linear.gated(query, key, value, log_decay, normalize=True, initial_state=state, **options)
        # The denominator as one value more, to be bounded.
        pairs = precision.wide(jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1))
        state = None if state is None else jnp.concatenate([state[0], state[1][..., None]], -1)
        sums, state = linear.gated(query, key, pairs, log_decay, initial_state=state, **options)
        outputs = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
        return outputs.astype(value.dtype), (state[..., :-1], state[..., -1])


@precision.promoting
def fourier_features(inputs: Float[Array, "*B N H"], directions: Float[Array, "N M H"]) -> Float[Array, "*B N 2*M"]:
    """M^-1/2 [sin(W x), cos(W x)] of each head, wide."""
    # Angles: the short mantissas of an accelerator's default precision would be errors of per cents here.
    angles = jnp.einsum("...nh,nmh->...nm", precision.wide(inputs), directions, precision=jax.lax.Precision.HIGHEST)
    return directions.shape[1] ** -0.5 * jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
