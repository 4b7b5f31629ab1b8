"""Forgetting attention: softmax attention whose logits fall by what the tokens between query and key forget."""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import precision, softmax
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.cache import KVCache, append, counts, places, poisoned, write
from subquad.zoo.checks import require_extend
from subquad.zoo.gated.output import GatedNorm
from subquad.zoo.gated.token_shift import shift
from subquad.zoo.positions import run_starts
from subquad.zoo.projection import Projection, in_pieces, projection


class ForgettingCache(NamedTuple):
    """Keys, values and sums of log forget gates of each sample's real tokens so far: the token at position t in slot t of S."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    length: Int[Array, "B"]  # real tokens so far; more than S where they did not fit
    log_kept: Float[Array, "B S N"]  # sum of log f up to each token, in float32
    total: Float[Array, "B N"]  # that up to the newest
    recent_key: Float[Array, "B W K*H"]  # of the newest token as projected, in float32; W = 1 with the shift, else 0
    recent_value: Float[Array, "B W K*V"]


class ForgettingAttention(Attention):
    """Softmax attention with a forget gate of each head: the mechanism of the Forgetting Transformer (FoX).

        o_t = sum_{s <= t} softmax_s(q_t . k_s / sqrt(H) + D_ts) v_s,   outputs = W_o o_t
        D_ts = sum_{r=s+1..t} log f_r = c_t - c_s,   f_t = sigmoid(w_f . x_t + b_f),   c_t = sum_{r<=t} log f_r

    A gate is of a token and a query head. c_t is the same for all keys of a row, which a softmax does not see: -c_s, a bias of
    each key, is all that is added to logits. So the gates take no T x T array.

    The paper's "Pro" block has four things more, each an option here:

        use_kv_shift     k_t = a_t W_k x_{t-1} + (1 - a_t) W_k x_t,   a_t = sigmoid(w_a . x_t + b_a) of a head; v_t likewise
        use_qk_norm      norm(q_t) and norm(k_t) in place of q_t and k_t, after the shift and before rotation
        use_output_norm  norm(o_t) in place of o_t;   norm(u) = s * u / sqrt(mean(u^2) + eps) of a head, s its own
        use_output_gate  outputs = W_o (o_t * sigmoid(W_g x_t + b_g)), after the norm

    Cost: time O(T^2 N H), memory O(T); one extended token O(S N H) after S tokens.
    Differs from the paper: its projections have no biases (`use_bias=False`). Rotary positions (`rotary_base`)
        are off by default, as there: gates do without. Grouped heads (`num_kv_heads`) share keys and values, not gates. The
        four options are as in the released code: 0 stands before the first token, eps is 1e-5 of queries and keys and 1e-6 of
        outputs. Its authors say that in the paper's models all heads shared one s of queries and one of keys, by mistake. The
        paper's own text of these options was not at hand.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_kv_heads: key/value heads K; must divide num_heads. None: num_heads.
        use_output_gate, use_output_norm, use_qk_norm, use_kv_shift: as above; all four: the attention of the "Pro" block.
        is_causal: must be True: a gate forgets what came before.
        shell: see `Attention`. use_bias: of all projections but the forget gate, which keeps its own.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T]: what is hidden forgets nothing.
        segment_ids: [T] or [*B, T]; a segment is a run of equal ids.
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; rows that see nothing hold the output projection of 0.
    Raises: ValueError: is_causal=False; sizes that do not divide; a pairwise mask.
    Numerics: gates, their sums, norms and softmax in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16). A
        logit loses as many digits as the sum of all -log f so far has before its point, 1e-3 at 10,000.
    Example:
        >>> layer = ForgettingAttention(4, 64, num_kv_heads=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)

    Source: Lin et al., Forgetting Transformer: Softmax Attention with a Forget Gate, ICLR 2025, arXiv 2503.02130; code:
        zhixuan-lin/forgetting-transformer.
    """

    supports = Support(cost="T^2", bidirectional=False, segment_ids=True, grouped=True, rotary=True)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        use_output_gate: bool = False,
        use_output_norm: bool = False,
        use_qk_norm: bool = False,
        use_kv_shift: bool = False,
        is_causal: bool = True,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, num_kv_heads=num_kv_heads, is_causal=is_causal, rngs=rngs, **shell)
        self.forget_gate = projection({**shell, "use_bias": True}, in_features, num_heads, rngs=rngs)
        kv_heads, size = self.num_kv_heads, self.head_features

        def gate(is_there: bool, *shape: int) -> Any:
            return projection(shell, in_features, shape, rngs=rngs) if is_there else nnx.data(None)

        def norm(is_there: bool, heads: int, **options: Any) -> Any:
            return GatedNorm((heads, size), param_dtype=self.param_dtype, **options) if is_there else nnx.data(None)

        self.key_shift, self.value_shift = (gate(use_kv_shift, kv_heads) for _ in range(2))
        self.query_norm, self.key_norm = (norm(use_qk_norm, heads) for heads in (num_heads, kv_heads))
        self.output_norm = norm(use_output_norm, num_heads, activation="sigmoid", epsilon=1e-6)
        self.output_gate = gate(use_output_gate, num_heads, size)

    def project(self, inputs_q, inputs_kv=None, inputs_v=None):
        """Query, key and value heads, log f [B, T, N], and the inputs, of which the other gates are made."""
        return *super().project(inputs_q), nnx.log_sigmoid(precision.wide(self.forget_gate(inputs_q))), inputs_q

    def rotate(self, query, key, query_positions=None, key_positions=None):
        """Heads as they are: `prepare` rotates them, after the shift and the norms."""
        return query, key

    def prepare(
        self, query, key, value, inputs, *, segment_ids=None, recent=(None, None), counts=None, positions=None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K V"], tuple[Any, Any]]:
        """Heads for attention; and the last real key and value before the shift, in float32.

        Args:
            recent: those before the first token. None: 0.
            counts: how many tokens of a sample are real, the first ones. None: all.
            positions: of all tokens, for rotation. None: from 0.
        """
        key, recent_key = shifted(self.key_shift, inputs, key, segment_ids, recent[0], counts)
        value, recent_value = shifted(self.value_shift, inputs, value, segment_ids, recent[1], counts)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return *super().rotate(query, key, positions, positions), value, (recent_key, recent_value)

    def attend(self, query, key, value, log_forget, inputs, mask, segment_ids=None):
        query, key, value, _ = self.prepare(query, key, value, inputs, segment_ids=segment_ids)
        starts = None if segment_ids is None else run_starts(segment_ids)
        segments = None if starts is None else jnp.cumsum(starts, axis=1)
        heads = softmax.attention(
            query, key, value, mask=mask, bias=of_keys(sums_so_far(log_forget, starts)), is_causal=True,
            query_segment_ids=segments, key_segment_ids=segments, implementation=self.implementation,
        )
        return self.finish(heads, inputs)

    def finish(self, heads: Float[Array, "B T N H"], inputs: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """The heads, normed and gated."""
        norm, gate = self.output_norm, self.output_gate
        if norm is None and gate is None:
            return heads

        def of_tokens(heads, inputs):
            logits = None if gate is None else gate.of_tokens(inputs)
            if norm is None:
                return (precision.wide(heads) * nnx.sigmoid(precision.wide(logits))).astype(heads.dtype)
            return norm.of_tokens(heads, logits)

        return in_pieces(of_tokens, heads, inputs)

    def init_cache(self, batch_size: int, max_length: int, dtype: Any = None) -> ForgettingCache:
        """An empty cache for `extend`: room for max_length tokens of batch_size sequences."""
        require_extend(self, batch_size=batch_size, max_length=max_length)
        tokens = KVCache.zeros(batch_size, max_length, self.num_kv_heads, self.head_features, self.cache_dtype(dtype))
        sums = jnp.zeros((batch_size, max_length, self.num_heads), jnp.float32)
        size = (0, 0) if self.key_shift is None else (1, self.num_kv_heads * self.head_features)
        recent = lambda: jnp.zeros((batch_size, *size), jnp.float32)
        return ForgettingCache(*tokens, sums, sums[:, 0], recent(), recent())

    def attend_cached(self, query, key, value, log_forget, inputs, mask, cache):
        start, positions = cache.length, places(cache.length, query.shape[1])
        query, key, value, recent = self.prepare(
            query, key, value, inputs, recent=cache[-2:], counts=None if mask is None else counts(query, mask),
            positions=positions,
        )
        if mask is not None:
            log_forget = jnp.where(mask[:, 0, 0, :, None], log_forget, 0)
        log_kept = cache.total[:, None] + jnp.cumsum(log_forget, axis=1)
        tokens = append(KVCache(*cache[:3]), key, value, mask)
        total = log_kept[:, -1].astype(cache.total.dtype)
        cache = ForgettingCache(*tokens, write(cache.log_kept, log_kept, start, mask), total, *recent)
        heads = softmax.attention(
            query, cache.key.astype(query.dtype), cache.value.astype(query.dtype), bias=of_keys(cache.log_kept), is_causal=True,
            query_positions=positions, key_positions=jnp.arange(cache.key.shape[1])[None], implementation=self.implementation,
        )
        return poisoned(self.finish(heads, inputs), cache), cache


def shifted(
    gate: Projection | None, inputs: Float[Array, "B T D"], heads: Float[Array, "B T K H"], segment_ids, recent, counts
) -> tuple[Float[Array, "B T K H"], Any]:
    """The heads, each mixed with that of the token before, as a gate says; and the last real ones before that (see `shift`)."""
    if gate is None:
        return heads, recent
    before, recent = shift(heads.reshape(*heads.shape[:2], -1), segment_ids, recent, counts)

    @precision.promoting
    def mix(inputs, heads, before):
        share = nnx.sigmoid(precision.wide(gate.of_tokens(inputs)))[..., None]
        return (share * before.reshape(heads.shape) + (1 - share) * heads).astype(heads.dtype)

    return in_pieces(mix, inputs, heads, before), recent


def sums_so_far(log_forget: Float[Array, "B T N"], starts: Bool[Array, "B T"] | None) -> Float[Array, "B T N"]:
    """Sums up to each token, which begin anew where a segment starts, so that none has a part in another's gradient."""
    if starts is None:
        return jnp.cumsum(log_forget, axis=1)

    def join(before, after):
        (sums, any_start), (more, starts) = before, after
        return jnp.where(starts, more, sums + more), any_start | starts

    starts = jnp.broadcast_to(starts[..., None], log_forget.shape)
    return jax.lax.associative_scan(join, (log_forget, starts), axis=1)[0]


def of_keys(log_kept: Float[Array, "B S N"]) -> Float[Array, "B N 1 S"]:
    """The bias of each key, -c_s."""
    return -log_kept.swapaxes(1, 2)[:, :, None]
