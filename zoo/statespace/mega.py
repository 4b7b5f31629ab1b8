"""Mega: single-head gated attention over a moving average."""

import math
from typing import Any, Literal, NamedTuple, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, ssm
from subquad.zoo import padding, unit
from subquad.zoo.base import Support
from subquad.zoo.cache import KVCache, append, counts, places, poisoned
from subquad.zoo.checks import cache_dtype, check_length, check_sizes, check_word, refuse, require_extend
from subquad.zoo.headless import Headless, HeadlessShell
from subquad.zoo.statespace.system import recur

Function = Literal["softmax", "relu2", "laplace"]


class MegaCache(NamedTuple):
    """Keys and values of each sample's real tokens so far, and the moving average after them."""

    key: Float[Array, "B S 1 Z"]
    value: Float[Array, "B S 1 V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    average: Float[Array, "B D h"]


class Mega(Headless):
    """Moving average equipped gated attention.

        h_t = p beta x_t + (1 - p r) h_{t-1},   x'_t = silu(sum_n gamma_n h_tn / sqrt(n) + omega x_t)       (section 3.1)
        z = silu(W_z x'),   q = kappa_q z + mu_q,   k = kappa_k z + mu_k,   v = silu(W_v x)                 (section 3.2)
        o = f(q k^T / tau + b) v
        g = silu(W_g x'),   phi = sigmoid(W_phi x'),   h = silu(W_h x' + U_h (g * o))
        y = phi * h + (1 - phi) * x

    with p and r in (0, 1) for each of D x n averages. f is softmax with tau = sqrt(Z), or a function of each logit by itself,
    relu^2 or Laplace's, with tau the number of keys: those of the row where it is causal. With chunks attention stays in each.

    Cost: time O(T^2 (Z + V)), with chunks of C tokens O(T C (Z + V)); memory that of the logits; the averages O(T D n). One
        extended token O(S (Z + V) + D n), where the cache has room for S.
    Differs from the paper: tau and chunks count real tokens, wherever padding stands. Parameters start as Flax's linear maps
        do; the paper draws all maps with a standard deviation of 0.02. The paper's layer is its own residual branch, y has x in
        it already: a `Block` adds it once more. `out_features` is not in the paper.

    Args:
        in_features: features D of the inputs.
        state_size: averages n of each feature.
        shared_features: Z of queries and keys.
        value_features: V. None: 2 D.
        chunk_size: tokens C of a chunk. None: one chunk.
        function: f: "softmax", "relu2" or "laplace".
        bias: b: "rotary", the product of two learned vectors that are rotated by their positions, or "simple", one number for
            each distance.
        max_length: of "simple" without chunks: no call may have more tokens. Else None.
        is_causal: a token sees itself and those before it. Else a second average runs backwards; both averages hold the
            present token, as in the code's first version.
        rngs: `rngs.params()` draws the parameters.
        shell: see `Headless`. A linear map to out_features follows; None: there is none, F = D.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters.
    Raises: ValueError: an unknown name; an odd shared_features with "rotary"; max_length where nothing needs it, or none where
        something does; more tokens than max_length.
    Numerics: averages, logits and f in float32.
    Example:
        >>> layer = Mega(64, shared_features=16, chunk_size=32, is_causal=True, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Ma et al., Mega: Moving Average Equipped Gated Attention, ICLR 2023, arXiv 2209.10655; the released code,
        facebookresearch/mega, where the paper leaves things open.
    """

    supports = Support(cost="T^2")

    def __init__(
        self,
        in_features: int,
        *,
        state_size: int = 16,
        shared_features: int = 64,
        value_features: int | None = None,
        chunk_size: int | None = None,
        function: Function = "softmax",
        bias: unit.Bias = "rotary",
        max_length: int | None = None,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[HeadlessShell],
    ):
        super().__init__(in_features, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        value_features = 2 * in_features if value_features is None else value_features
        check_sizes(owner, state_size=state_size, shared_features=shared_features, value_features=value_features)
        check_word(owner, "function", function, get_args(Function))
        unit.check_bias(owner, bias, shared_features)
        needs_length = bias == "simple" and chunk_size is None
        if (max_length is None) == needs_length:
            refuse(owner, "max_length", max_length, "be given with bias='simple' without chunks, and only then",
                   "Chunks and rotation have no largest distance.")
        for name, size in (("chunk_size", chunk_size), ("max_length", max_length)):
            if size is not None:
                check_sizes(owner, **{name: size})
        self.state_size, self.shared_features, self.value_features = state_size, shared_features, value_features
        self.chunk_size, self.function, self.max_length = chunk_size, function, max_length
        directions = 1 if is_causal else 2
        averages = (directions, in_features, state_size)

        def drawn(deviation, *shape):
            return nnx.Param(nnx.initializers.normal(deviation)(rngs.params(), shape, self.param_dtype))

        self.damping, self.decay = drawn(0.2, *averages), drawn(0.2, *averages)  # logits of p and r
        signs = jnp.asarray([1, -1] * state_size, self.param_dtype)[:state_size]
        self.expansion = drawn(0.02, *averages)
        self.expansion[...] += jnp.broadcast_to(signs, averages)
        self.reduction, self.skip = drawn(1.0, *averages), drawn(1.0, in_features)
        unit.add_heads(self, 2, rngs)
        unit.add_bias(self, bias, chunk_size or max_length or 1, rngs)

        self.value = self.linear(in_features, value_features, rngs)
        self.mixed = self.linear(in_features, 2 * in_features + shared_features + value_features, rngs)
        self.hidden = self.linear(value_features, in_features, rngs)
        self.out = None if shell.get("out_features") is None else self.linear(in_features, self.out_features, rngs)

    # ------------------------------------------------------------------------------------------- the moving average

    @precision.promoting
    def averages(self):
        """(log of the decay, input, output) of each direction, [1 or 2, D, n]."""
        read = lambda param: param[...].astype(jnp.float32)
        damping, decay = read(self.damping), read(self.decay)
        p = nnx.sigmoid(damping)
        rest = nnx.sigmoid(-damping) + p * nnx.sigmoid(-decay)  # 1 - p r, which is never 0
        return jnp.log(rest), p * read(self.expansion), read(self.reduction) / math.sqrt(self.state_size)

    def normed(self, inputs, is_real: Bool[Array, "B T"] | None):
        """What everything but the last term of y is made of: x itself, and in a variant that norms it, its norm."""
        return inputs

    def smoothed(self, inputs, average=None, counts=None):
        """x' of the inputs, and the state of the average after them where it is given."""
        scan = lambda inputs, which, **options: ssm.diagonal_scan(
            inputs, *(x[which] for x in self.averages()), implementation=self.implementation, **options
        )
        if average is None:
            total = sum(scan(inputs, which, is_reversed=which == 1) for which in range(1 if self.is_causal else 2))
        else:
            advance = lambda inputs, state: scan(inputs, 0, initial_state=state, return_state=True)
            total, average = recur(advance, inputs, average, counts)
        return nnx.silu(total + self.skip[...].astype(inputs.dtype)[None, None] * inputs), average

    # -------------------------------------------------------------------------------------------------- attention

    def parts(self, inputs, smoothed):
        """(query, key, value, g, phi, W_h x') of every token."""
        widths = np.cumsum([self.in_features, self.shared_features, self.value_features])
        phi, z, g, rest = jnp.split(self.mixed(smoothed), widths, axis=-1)
        query, key = unit.heads_of(self, nnx.silu(z))
        return query, key, nnx.silu(self.value(inputs)), nnx.silu(g), nnx.sigmoid(phi), rest

    @precision.full
    @precision.promoting
    def attend(self, query, key, value, rows, columns, visible: Bool[Array, "B T S"]) -> Float[Array, "B T V"]:
        """f(q k^T / tau + b) v of the visible keys; 0 where there are none."""
        logits = jnp.einsum("btz,bsz->bts", query, key, preferred_element_type=jnp.float32)
        bias = unit.bias_of(self, rows, columns)
        if self.function == "softmax":
            logits = jnp.where(visible, logits / math.sqrt(self.shared_features) + bias, -jnp.inf)
            some = visible.any(-1, keepdims=True)
            weights = jnp.where(some, jax.nn.softmax(jnp.where(some, logits, 0.0)), 0.0)
        else:
            logits = logits / jnp.maximum(visible.sum(-1, keepdims=True), 1) + bias
            f = unit.squared(logits) if self.function == "relu2" else laplace(logits)
            weights = jnp.where(visible, f, 0.0)
        return jnp.einsum("bts,bsv->btv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)

    def gated(self, inputs, attended, g, phi, rest):
        """y."""
        hidden = nnx.silu(rest + self.hidden(g * attended.astype(g.dtype)))
        return phi * hidden + (1 - phi) * inputs

    def respond(self, inputs, mask, segment_ids):
        length = inputs.shape[1]
        check_length(type(self).__name__, "inputs_q", length, self.max_length)
        is_real = padding.real(mask, inputs)
        normed = self.normed(inputs, None if mask is None else is_real)
        query, key, value, *gates = self.parts(normed, self.smoothed(normed)[0])
        size = min(self.chunk_size or length, length)
        cut = lambda x: rearrange(
            jnp.pad(x, ((0, 0), (0, -length % size), *((0, 0),) * (x.ndim - 2))), "b (n c) ... -> (b n) c ...", c=size
        )
        at = jnp.arange(size)[None]
        visible = cut(is_real)[:, None, :]
        visible = visible & (at[..., None] >= at[:, None]) if self.is_causal else visible.repeat(size, 1)
        attended = self.attend(cut(query), cut(key), cut(value), at, at, visible)
        attended = rearrange(attended, "(b n) c v -> b (n c) v", b=len(inputs))[:, :length]
        return self.gated(inputs, attended, *gates)

    # ------------------------------------------------------------------------------------------------------ extend

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> MegaCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        check_length(type(self).__name__, "max_length", max_length, self.max_length)
        dtype = cache_dtype(self, dtype)
        zeros = lambda features: jnp.zeros((batch_size, max_length, 1, features), dtype)
        average = jnp.zeros((batch_size, self.in_features, self.state_size), jnp.float32)
        return MegaCache(zeros(self.shared_features), zeros(self.value_features), jnp.zeros(batch_size, jnp.int32), average)

    def _respond_cached(self, inputs, cache, mask):
        normed = self.normed(inputs, None if mask is None else mask[:, 0, 0])
        smoothed, average = self.smoothed(normed, cache.average, None if mask is None else counts(inputs, mask))
        query, key, value, *gates = self.parts(normed, smoothed)
        tokens = append(KVCache(*cache[:3]), key[:, :, None], value[:, :, None], mask)
        rows, columns = places(cache.length, inputs.shape[1]), jnp.arange(cache.key.shape[1], dtype=jnp.int32)[None]
        visible = columns[:, None] <= rows[..., None]
        if self.chunk_size is not None:
            visible &= columns[:, None] // self.chunk_size == rows[..., None] // self.chunk_size
        keys, values = (x[:, :, 0].astype(query.dtype) for x in tokens[:2])
        outputs = self.gated(inputs, self.attend(query, keys, values, rows, columns, visible), *gates)
        return poisoned(outputs, tokens), MegaCache(*tokens, average)


def laplace(x):
    """The distribution function of a normal number of mean sqrt(1/2) and variance 1 / (4 pi): like relu^2, but bounded."""
    return 0.5 * (1 + jax.lax.erf((x - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))
