"""Synthesizer: softmax attention whose logits need not compare tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, append, places, poisoned
from subquad.zoo.checks import check_length, check_sizes, check_word, refuse, require_extend
from subquad.zoo.features import RandomFeature
from subquad.zoo.projection import projection

Synthesis = Literal["dense", "factorized_dense", "random", "factorized_random", "dot_product"]


class SynthesizerAttention(Attention):
    """Softmax attention with logits of the query's token alone, or of nothing but the two positions, or mixed.

        y_t = sum_s softmax_s(sum_i a_i B^i_ts) v_s,    a = softmax(mixture)                                 (section 3)
        dense               B_ts = w_s . relu(W x_t + b) + c_s
        factorized_dense    B_ts = A_t(s div m) C_t(s mod m),   A and C dense, of ceil(max_length / m) and m columns
        random              B_ts = R_ts
        factorized_random   B_ts = r_t . r'_s
        dot_product         B_ts = q_t . k_s / sqrt(H)

    every head with parameters of its own.

    Cost: time O(T S N H), memory O(T S N) for the logits; one extended token O(S N H) after S tokens, cache O(max_length).
    Differs from the paper: rows and columns are cut to the tokens there are, so a call may have any length up to max_length,
        and nothing depends on it; positions count real tokens. The paper draws R without saying how: here the logits of
        every kind start with variance 1 for inputs of variance 1. Causality, by mask, `extend` and cross-attention are the
        formula's, where the paper has them for its language models or not at all.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        max_length: rows and columns of R, columns of the dense forms: no call may have more tokens.
        num_kv_heads: heads K of values, and of keys; must divide num_heads. None: num_heads.
        synthesis: one of the forms above, or several of them, which are mixed.
        rank: r of factorized_random has so many entries, the paper's k.
        factor: m of factorized_dense, the paper's b. None: the square root of max_length, rounded up.
        is_fixed: R, or r and r', stay as they were drawn, the paper's "fixed random"; False: they are learned.
        is_causal: a token sees those at its position and before.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  inputs_kv: [*B, S, D].  mask: [*B, N, T, S], each axis full or 1.
        segment_ids: [T] or [*B, T]; they hide, and begin no new count of positions.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows are the output projection of 0.
    Raises: ValueError: sizes that do not divide; more than max_length tokens; an unknown or repeated form, or none.
    Numerics: logits and softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = SynthesizerAttention(4, 64, max_length=512, synthesis=("random", "dot_product"), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Tay et al., Synthesizer: Rethinking Self-Attention for Transformer Models, ICML 2021, arXiv 2005.00743.
    """

    supports = Support(cost="T^2", cross=True, pairwise_mask=True, segment_ids=True, grouped=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        max_length: int | None = None,
        num_kv_heads: int | None = None,
        synthesis: Synthesis | Sequence[Synthesis] = "dense",
        rank: int = 8,
        factor: int | None = None,
        is_fixed: bool = False,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        owner = type(self).__name__
        forms = (synthesis,) if isinstance(synthesis, str) else tuple(synthesis)
        for form in forms:
            check_word(owner, "synthesis", form, get_args(Synthesis))
        if not forms or len(set(forms)) < len(forms):
            refuse(owner, "synthesis", repr(synthesis), "be a form, or some that are all different", "Name each once.")
        if max_length is None:
            refuse(owner, "max_length", None, "be the largest number of tokens", "Pass max_length=...")
        factor = math.isqrt(max(max_length, 1) - 1) + 1 if factor is None else factor
        check_sizes(owner, max_length=max_length, rank=rank, factor=factor)
        self.max_length: int = max_length
        self.forms, self.factor = forms, factor
        if "dot_product" not in forms:
            del self.query, self.key

        def dense(columns):
            return Columns(in_features, num_heads, self.head_features, columns, shell, rngs=rngs)

        def drawn(columns, variance):
            numbers = nnx.initializers.normal(variance**0.5)(rngs.params(), (num_heads, max_length, columns), self.param_dtype)
            return RandomFeature(numbers) if is_fixed else nnx.Param(numbers)

        if "dense" in forms:
            self.dense = dense(max_length)
        if "factorized_dense" in forms:
            self.outer, self.inner = dense(math.ceil(max_length / factor)), dense(factor)
        if "random" in forms:
            self.random = drawn(max_length, 1.0)
        if "factorized_random" in forms:
            self.rows, self.columns = (drawn(rank, rank**-0.5) for _ in range(2))
        if len(forms) > 1:
            self.mixture = nnx.Param(jnp.zeros(len(forms), self.param_dtype))

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """The inputs themselves, which logits are made of, and key and value heads; keys of 0 where no form compares."""
        inputs_kv = inputs_q if inputs_kv is None else inputs_kv
        value = self.value(inputs_kv if inputs_v is None else inputs_v)
        key = self.key(inputs_kv) if "dot_product" in self.forms else jnp.zeros_like(value[..., :1])
        return inputs_q, key, value

    def attend(self, inputs, key, value, mask, segment_ids=None):
        for name, size in (("inputs_q", inputs.shape[1]), ("inputs_kv", key.shape[1])):
            check_length(type(self).__name__, name, size, self.max_length)
        return softmax.attention(
            self.compared(inputs, value), key, value, bias=self.synthesize(inputs, None, key.shape[1]), mask=mask,
            pattern=self.sees, query_segment_ids=segment_ids, key_segment_ids=segment_ids, implementation=self.implementation,
        )

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None):
        """An empty cache for `extend`: room for max_length tokens, which is at most that of the layer."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        check_length(type(self).__name__, "max_length", max_length, self.max_length)
        features = self.head_features if "dot_product" in self.forms else 1
        cache = KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))
        return cache._replace(key=cache.key[..., :features])

    def attend_cached(self, inputs, key, value, mask, cache):
        rows, cache = places(cache.length, inputs.shape[1]), append(cache, key, value, mask)
        capacity = cache.key.shape[1]
        heads = softmax.attention(
            self.compared(inputs, value), cache.key.astype(value.dtype), cache.value.astype(value.dtype),
            bias=self.synthesize(inputs, rows, capacity), pattern=self.sees, query_positions=rows,
            key_positions=jnp.arange(capacity)[None], implementation=self.implementation,
        )
        return poisoned(heads, cache), cache

    def mixture_weights(self) -> dict[str, Float[Array, ""] | float]:
        """The weight a of each form."""
        if len(self.forms) == 1:
            return {self.forms[0]: 1.0}
        return dict(zip(self.forms, jax.nn.softmax(self.mixture[...].astype(jnp.float32)), strict=True))

    def compared(self, inputs, value) -> Float[Array, "B T N H"]:
        """Query heads times the weight of their products; 0 where no form compares."""
        if "dot_product" not in self.forms:
            return jnp.zeros((*inputs.shape[:2], self.num_heads, 1), value.dtype)
        query = self.query(inputs)
        return query * jnp.asarray(self.mixture_weights()["dot_product"], query.dtype)

    @precision.promoting
    def synthesize(
        self, inputs: Float[Array, "B T D"], rows: Int[Array, "B T"] | None, keys: int
    ) -> Float[Array, "_ N T S"] | None:
        """The weighted sum of the logits that compare nothing; None where there are none.

        Args:
            rows: the positions of the inputs; None: they count from 0.
            keys: S, at positions from 0 on.
        """
        read = lambda numbers: numbers[...].astype(jnp.float32)

        def of_rows(numbers):  # [N, L, ...] -> [1, N, T, ...], or [B, N, T, ...] where samples are at positions of their own
            if rows is None:
                return read(numbers)[None, :, : inputs.shape[1]]
            return jnp.moveaxis(jnp.take(read(numbers), rows, axis=1, mode="clip"), 0, 1)

        total = None
        for form, weight in self.mixture_weights().items():
            if form == "dot_product":
                continue
            if form == "dense":
                logits = self.dense(inputs, keys)
            elif form == "factorized_dense":
                outer, inner = self.outer(inputs, math.ceil(keys / self.factor)), self.inner(inputs, self.factor)
                logits = rearrange(outer[..., None] * inner[..., None, :], "b n t a m -> b n t (a m)")[..., :keys]
            elif form == "random":
                logits = of_rows(self.random)[..., :keys]
            else:
                logits = jnp.einsum("bntr,nsr->bnts", of_rows(self.rows), read(self.columns)[:, :keys], precision="highest")
            total = weight * logits + (0 if total is None else total)
        return total


class Columns(nnx.Module):
    """w_s . relu(W x_t + b) + c_s for each of the columns s, by head: two linear maps, each with parameters for every head.

    Args:
        features: of the inputs.
        heads: N.
        hidden: features H of W x of a head.
        columns: how many s there are.
        shell: the options of a layer's shell; the w start with twice LeCun's variance, as half of what they are multiplied with
            is 0.
    """

    def __init__(self, features: int, heads: int, hidden: int, columns: int, shell: Mapping[str, Any], *, rngs: nnx.Rngs):
        self.hidden = projection(shell, features, (heads, hidden), rngs=rngs)
        draw = nnx.initializers.variance_scaling(2.0, "fan_in", "truncated_normal", in_axis=1, batch_axis=0)
        self.columns = nnx.Param(draw(rngs.params(), (heads, hidden, columns), self.hidden.param_dtype))
        bias_init, size = shell.get("bias_init", nnx.initializers.zeros), (heads, columns)
        self.bias = nnx.Param(bias_init(rngs.params(), size, self.hidden.param_dtype)) if self.hidden.use_bias else None

    def __call__(self, inputs: Float[Array, "B T D"], keys: int) -> Float[Array, "B N T S"]:
        """The first `keys` columns, in float32."""
        hidden = nnx.relu(self.hidden(inputs))
        columns = self.columns[..., :keys].astype(hidden.dtype)
        wide = jnp.promote_types(hidden.dtype, jnp.float32)
        logits = jnp.einsum("btnh,nhs->bnts", hidden, columns, precision=self.hidden.precision, preferred_element_type=wide)
        return logits if self.bias is None else logits + self.bias[None, :, None, :keys].astype(wide)
