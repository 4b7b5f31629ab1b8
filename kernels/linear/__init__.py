"""Linear attention: sums of values weighted by products of features, normalised or with a state that decays."""

import math
import numbers
from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from subquad.kernels import checks, dispatch
from subquad.kernels.axes import KeyMask
from subquad.kernels.linear import reference, xla
from subquad.kernels.linear.features import FeatureMap, relu_features, softmax_features

__all__ = ["attention", "empty_state", "gated", "random_feature_attention", "relu_features", "softmax_features"]

NO_WEIGHTS = "Linear attention never forms the [T, S] weights that another mask would need."
ATTENTION = dispatch.implementations("attention", xla, reference)
GATED = dispatch.implementations("gated", xla, reference)
RANDOM_FEATURE_ATTENTION = dispatch.implementations("random_feature_attention", xla, reference)

GatedState = Float[Array, "B N M V"] | tuple[Float[Array, "B N M V"], Float[Array, "B N M"]]
State = tuple[Float[Array, "B N M V"], Float[Array, "B N M"], Float[Array, "B N"]]


def attention(
    query: Float[Array, "B T N M"],
    key: Float[Array, "B S N M"],
    value: Float[Array, "B S N V"],
    *,
    key_log_scale: Float[Array, "B S N"] | None = None,
    mask: KeyMask | None = None,
    segment_ids: Int[Array, "_ T"] | None = None,
    is_causal: bool = False,
    initial_state: State | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], State]:
    """Attention whose weights are products of nonnegative features, in linear time.

        y_t = sum_s w_ts v_s / (sum_s w_ts + eps),   w_ts = exp(r_s - c_t) q_t . k_s,   s <= t if causal
        c_t = max of r_s over the keys that t sees

    c_t cancels (where eps = 0); it keeps every weight exp(r_s - c_t) at most 1. In the causal form it is the running
    maximum, so a key of the future changes nothing before it, however large.

    Cost: time O(T M V), causal O(T (M V + C (M + V))) by chunks of C; memory O(T (M + V)), of which at most a number per
        query and sqrt(T / C) states are kept for the backward pass beside arguments and outputs; Triton's causal kernels
        take T / C states while they run. One extended token O(M V) whatever came before.

    Args:
        query: features of the queries, nonnegative.
        key: features of the keys, nonnegative.
        value: V may differ from M.
        key_log_scale: r, weighs key s by exp(r_s); any finite size. None: 0.
        mask: key padding, True = attend. What padding holds reaches nothing, NaN included.
        segment_ids: of packed sequences, with T = S: a query sees the keys of its own segment, a run of equal ids. What came
            before belongs to the first one; the state that is returned is that of the last one. Bidirectional attention
            takes twice the time with them.
        is_causal: query t sees keys 0..t, and so T = S.
        initial_state: what came before, seen by every query: numerator [B, N, M, V], the sum of exp(r_s - c) k_s v_s^T;
            denominator [B, N, M], the sum of exp(r_s - c) k_s; and c [B, N], the maximum of r_s, -inf before any key.
        return_state: also return the state after the last key.
        eps: added to the denominator, in units of the largest visible exp(r_s); a constant to the derivative.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the dtype of value; with return_state also the state, float32.
    Raises:
        TypeError: mask is not boolean; segment_ids are no integers; other arrays are; eps is not a number.
        ValueError: shapes that do not fit, axes of 0; is_causal or segment_ids with T != S; a negative eps.
        NotImplementedError: an implementation that does not exist here.
    Numerics: sums and exponentials in float32. With eps = 0 a row is a mean of values: its weights sum to 1. A row
        whose denominator is below 1e-30 (no visible key, or only keys whose features are 0 where the query's are not)
        gives 0 and passes no gradient.
    Example:
        >>> query, key = jnp.ones((1, 5, 2, 16)), jnp.ones((1, 5, 2, 16))
        >>> value = jnp.arange(10.0).reshape(1, 5, 2, 1)
        >>> attention(query, key, value, is_causal=True)[0, :, 0, 0].tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]

    Source: Katharopoulos et al., Transformers are RNNs, ICML 2020, arXiv 2006.16236, eqs. 5, 8-12; the log scales
        and their running maximum are ours.
    """
    owner = "linear.attention"
    segments = _check(owner, query, key, value, key_log_scale, mask, segment_ids, is_causal, initial_state, query.shape[-1])
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"{owner}: eps must be a number, got {type(eps).__name__}. It is part of the program, not an array.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{owner}: eps must be finite and at least 0, got {eps}. 0 gives means of the values.")
    key, value, key_log_scale = checks.hide(mask, key, value, key_log_scale)
    outputs, state = dispatch.run(
        owner, ATTENTION, implementation,
        query, key, value, key_log_scale, mask, segments, is_causal, initial_state, float(eps),
    )  # fmt: skip
    return (outputs, state) if return_state else outputs


def random_feature_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N V"],
    projection: Float[Array, "M H"],
    *,
    kernel: FeatureMap = "softmax",
    mask: KeyMask | None = None,
    segment_ids: Int[Array, "_ T"] | None = None,
    is_causal: bool = False,
    initial_state: State | None = None,
    return_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], State]:
    """Linear attention over random features of query and key, of which only those of a piece of the sequence are in memory.

        y_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = phi(q_t) . phi(k_s),   s <= t if causal
        softmax:  phi(x)_i = M^-1/2 exp(w_i . x' - |x'|^2 / 2),  x' = x / H^1/4
        relu:     phi(x)_i = M^-1/2 (max(w_i . x, 0) + 0.001)

    It is `attention` over `softmax_features` (with their log scales for the keys) or `relu_features`.

    Cost: time O(T M (H + V)), causal O(T M (H + V + C)); memory O(T (H + V)), whatever M, beside a chunk of features (Triton:
        those of 2048 tokens, and their states); one extended token O(M (H + V)).

    Args:
        query, key: what the features are made of.
        value: V may differ from H.
        projection: rows w_i; the same for all heads.
        kernel: "softmax" or "relu".
        mask: key padding, True = attend. What padding holds reaches nothing, NaN included.
        segment_ids: see `attention`.
        is_causal: query t sees keys 0..t, and so T = S.
        initial_state: what came before, made with the same projection; see `attention`.
        return_state: also return the state after the last key.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the dtype of value; with return_state also the state, float32.
    Raises:
        TypeError: mask is not boolean; segment_ids are no integers; other arrays are.
        ValueError: an unknown kernel; shapes that do not fit, axes of 0; is_causal or segment_ids with T != S.
        NotImplementedError: an implementation that does not exist here.
    Numerics: features, sums and exponentials in float32; a kernel multiplies bfloat16 features as bfloat16. The
        derivative takes each token's log scale for a constant, which is exact, and is 0 through a floored feature.
    Example:
        >>> x, projection = jnp.ones((1, 5, 2, 4)), jnp.eye(4)
        >>> value = jnp.arange(10.0).reshape(1, 5, 2, 1)
        >>> random_feature_attention(x, x, value, projection, is_causal=True)[0, :, 0, 0].round().tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0]

    Source: Choromanski et al., Rethinking Attention with Performers, ICLR 2021, arXiv 2009.14794, eqs. 4 and 5.
    """
    owner = "linear.random_feature_attention"
    if kernel not in get_args(FeatureMap):
        raise ValueError(f"{owner}: kernel must be 'softmax' or 'relu', got {kernel!r}. 'softmax' is the paper's.")
    checks.floating(owner, projection=projection)
    if projection.ndim != 2 or projection.shape[1] != query.shape[-1] or projection.shape[0] < 1:
        raise ValueError(
            f"{owner}: projection must have shape [M, H] with M >= 1 and H = {query.shape[-1]}, got {projection.shape}. "
            "Draw it for the features of one head."
        )
    segments = _check(owner, query, key, value, None, mask, segment_ids, is_causal, initial_state, projection.shape[0])
    key, value = checks.hide(mask, key, value)
    outputs, state = dispatch.run(
        owner, RANDOM_FEATURE_ATTENTION, implementation,
        query, key, value, projection, kernel, mask, segments, is_causal, initial_state,
    )  # fmt: skip
    return (outputs, state) if return_state else outputs


def gated(
    query: Float[Array, "B T J M"],
    key: Float[Array, "B T K M"],
    value: Float[Array, "B T L V"],
    log_decay: Float[Array, "B T N"] | Float[Array, "B T N M"] | None = None,
    *,
    beta: Float[Array, "B T N"] | None = None,
    bonus: Float[Array, "N M"] | None = None,
    floor: Float[Array, "B T N"] | None = None,
    erase: tuple[Float[Array, "B T N M"], Float[Array, "B T N M"]] | None = None,
    mask: KeyMask | None = None,
    initial_state: GatedState | None = None,
    normalize: bool = False,
    return_state: bool = False,
    scale: float | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], GatedState]:
    """Causal linear attention with a state that decays, by the plain update or by the delta rule.

        S_t = D_t S_{t-1} + k_t v_t^T                                 D_t = diag(exp(log_decay_t))
        S_t = D_t S_{t-1} + beta_t k_t (v_t - k_t^T D_t S_{t-1})^T    with beta
        S_t = D_t S_{t-1} + k_t v_t^T - e_t (r_t^T S_{t-1})^T         with erase = (r, e)
        o_t = scale S_t^T q_t,  divided by scale z_t . q_t if normalize, where z is S with v = 1
              divided by max(|scale z_t . q_t|, floor_t) with floor
        o_t = scale (S_{t-1} + diag(bonus) k_t v_t^T)^T q_t             with bonus

    No decay is the linear transformer; one number per head RetNet, Mamba-2 and gated RFA, with floor xLSTM's matrix memory; one
    per channel of the key GLA and HGRN2, bonus RWKV-6; beta DeltaNet, Gated DeltaNet and, with a decay per channel, Kimi
    Delta Attention; erase RWKV-7.

    Cost: time O(T (M V + C (M + V))) by chunks of C; memory O(T (M + V)) and about 2 sqrt(T / C) states for the backward
        pass, 2 T / C in Triton; one extended token O(M V) whatever came before. A decay per channel multiplies the products
        inside a chunk by log2(C); beta and erase add O(T C (C + M + V)). To erase, Triton makes two tokens of each; it takes
        M up to 256 with either, 128 in float32.

    Args:
        query, key, value: each may have fewer heads than N, the most of the three: a divisor of N, and then N over it
            neighbours share one.
        log_decay: at most 0, per head or per channel of the key; -inf forgets everything before. None: 0.
        beta: how much of the value that key t reads is replaced, in [0, 1]; in [0, 2] a state may also be reflected.
            Keys of unit length keep the update a contraction.
        erase: the generalised delta rule: what r_t reads of the state before the token, not decayed, is taken away under e_t.
            Without beta and bonus.
        bonus: with it a token reads the state of the token before, which has not decayed since, and what it brings itself as
            much as the bonus of a channel says, before it writes it. Of 0: nothing of its own.
        floor: with normalize: the least size of what is divided by. Positive; features may then have any sign.
        mask: padding, True = attend. A masked token leaves the state as it is and outputs 0; what it holds reaches
            nothing, NaN included.
        initial_state: S [B, N, M, V] before the first token; with normalize S and z [B, N, M]. None: 0.
        normalize: divide by the same recurrence with v = 1. Meant for nonnegative features, or with floor.
        return_state: also return the state after the last token.
        scale: of the query. None: 1, as in most papers; GLA takes M^-1/2.
        implementation: None takes the best that can run here.
    Returns: [B, T, N, V] in the dtype of value; with return_state also the state, float32.
    Raises:
        TypeError: mask is not boolean; arrays of integers; scale is not a number.
        ValueError: shapes that do not fit, axes of 0; heads that do not divide N; floor without normalize; erase with beta or
            bonus.
        NotImplementedError: an implementation that does not exist here.
    Numerics: sums and exponentials in float32; decays are exponentiated between two tokens only, so that no decay, however
        small, overflows or takes digits from what comes after it. exp of less than -104 is 0. Where the denominator's size
        is below 1e-30 a row is 0.
    Example:
        >>> ones, value = jnp.ones((1, 4, 1, 1)), jnp.arange(1.0, 5.0).reshape(1, 4, 1, 1)
        >>> half = jnp.full((1, 4, 1), math.log(0.5))
        >>> gated(ones, ones, value, half)[0, :, 0, 0].tolist()
        [1.0, 2.5, 4.25, 6.125]

    Source: Sun et al., Retentive Network, arXiv 2307.08621, eq. 5; Yang et al., Gated Linear Attention, arXiv 2312.06635,
        section 4; Dao & Gu, Transformers are SSMs, arXiv 2405.21060, section 6; Yang et al., Parallelizing Linear
        Transformers with the Delta Rule, arXiv 2406.06484, section 3, and Gated Delta Networks, arXiv 2412.06464; Peng et al.,
        Eagle and Finch, arXiv 2404.05892, section 4 (bonus); Beck et al., xLSTM, arXiv 2405.04517, eq. 21 (floor); Peng et
        al., RWKV-7 "Goose", arXiv 2503.14456, section 4 (erase).
    """
    owner = "linear.gated"
    checks.floating(owner, query=query, key=key, value=value, log_decay=log_decay, beta=beta, bonus=bonus,
                    floor=floor)
    _check_gated(owner, query, key, value, log_decay, beta, bonus, floor, erase, mask, initial_state, normalize)
    if scale is not None and not isinstance(scale, numbers.Real):
        raise TypeError(f"{owner}: scale must be a number, got {type(scale).__name__}. Multiply query by an array instead.")
    heads = max(x.shape[2] for x in (query, key, value))
    query, key, value, log_decay, beta, floor = checks.hide(mask, query, key, value, log_decay, beta, floor)
    erase = None if erase is None else checks.hide(mask, *erase)
    batch, features, values = query.shape[0], query.shape[3], value.shape[3]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, features, values + normalize), jnp.float32)
    elif normalize:
        initial_state = jnp.concatenate([initial_state[0], initial_state[1][..., None]], -1)
    outputs, state = dispatch.run(
        owner, GATED, implementation, query, key, value, log_decay, beta, bonus, floor, erase, initial_state,
        bool(normalize), 1.0 if scale is None else float(scale),
    )  # fmt: skip
    if not return_state:
        return outputs
    return outputs, (state[..., :-1], state[..., -1]) if normalize else state


def empty_state(batch_size: int, num_heads: int, features: int, value_features: int) -> State:
    """The state before any key: zero sums, and -inf for the maximum of nothing."""
    return (
        jnp.zeros((batch_size, num_heads, features, value_features), jnp.float32),
        jnp.zeros((batch_size, num_heads, features), jnp.float32),
        jnp.full((batch_size, num_heads), -jnp.inf, jnp.float32),
    )


def _check(owner, query, key, value, key_log_scale, mask, segment_ids, is_causal, initial_state, features):
    """Refuses what does not fit together; the runs of equal segment ids, or None."""
    checks.floating(owner, query=query, key=key, value=value, key_log_scale=key_log_scale)
    checks.shape(owner, "query", query, "B T N H", "Flatten the batch axes.")
    batch, length, heads, width = query.shape
    sizes, instead = dict(B=batch, N=heads, H=width, M=features), "Repeat grouped heads, or reshape."
    checks.shape(owner, "key", key, "B S N H", instead, **sizes)
    keys = sizes["S"] = key.shape[1]
    checks.shape(owner, "value", value, "B S N V", instead, **sizes)
    checks.shape(owner, "key_log_scale", key_log_scale, "B S N", instead, **sizes)
    if initial_state is not None:
        if len(initial_state) != 3:
            raise ValueError(
                f"{owner}: initial_state must hold numerator, denominator and running maximum, got "
                f"{len(initial_state)} arrays. Start from linear.empty_state."
            )
        for i, axes in enumerate(("B N M V", "B N M", "B N")):
            checks.shape(owner, f"initial_state[{i}]", initial_state[i], axes, instead, V=value.shape[3], **sizes)
    if is_causal and length != keys:
        raise ValueError(
            f"{owner}: key must have the length T = {length} of query when is_causal, got {keys}. "
            "Pass earlier keys through initial_state."
        )
    checks.key_padding(owner, mask, batch, keys, NO_WEIGHTS)
    if segment_ids is not None and length != keys:
        raise ValueError(
            f"{owner}: segment_ids must be None where T = {length} differs from S = {keys}, got some. They are of one sequence."
        )
    return checks.runs(owner, segment_ids, batch, length)


def _check_gated(owner, query, key, value, log_decay, beta, bonus, floor, erase, mask, initial_state, normalize) -> None:
    checks.shape(owner, "query", query, "B T J M", "Flatten the batch axes.")
    (batch, length, _, width), instead = query.shape, "Reshape it."
    sizes = dict(B=batch, T=length, M=width)
    checks.shape(owner, "key", key, "B T K M", instead, **sizes)
    checks.shape(owner, "value", value, "B T L V", instead, **sizes)
    heads = max(x.shape[2] for x in (query, key, value))
    for name, array in (("query", query), ("key", key), ("value", value)):
        if heads % array.shape[2]:
            raise ValueError(
                f"{owner}: {name} must have a number of heads that divides N = {heads}, got {array.shape[2]}. Repeat its heads."
            )
    sizes |= dict(N=heads, V=value.shape[3])
    by_channel = log_decay is not None and log_decay.ndim == 4
    checks.shape(owner, "log_decay", log_decay, "B T N M" if by_channel else "B T N", instead, **sizes)
    checks.shape(owner, "beta", beta, "B T N", instead, **sizes)
    checks.shape(owner, "bonus", bonus, "N M", instead, **sizes)
    checks.shape(owner, "floor", floor, "B T N", instead, **sizes)
    if erase is not None:
        if not isinstance(erase, tuple | list) or len(erase) != 2:
            raise ValueError(f"{owner}: erase must hold r and e, got {type(erase).__name__}. Pass (r, e), each [B, T, N, M].")
        if beta is not None or bonus is not None:
            raise ValueError(f"{owner}: erase must be None beside beta or bonus, got some. Choose one of them.")
        for i, array in enumerate(erase):
            checks.floating(owner, **{f"erase[{i}]": array})
            checks.shape(owner, f"erase[{i}]", array, "B T N M", instead, **sizes)
    if floor is not None and not normalize:
        raise ValueError(f"{owner}: floor must be None without normalize, got some. It is the least that is divided by.")
    if initial_state is not None:
        parts = initial_state if normalize else (initial_state,)
        if isinstance(initial_state, tuple | list) != bool(normalize) or len(parts) != 1 + bool(normalize):
            raise ValueError(
                f"{owner}: initial_state must hold S and z if normalize, and be S alone if not, got "
                f"{type(initial_state).__name__}. Pass what an earlier call like this one returned."
            )
        for i, array in enumerate(parts):
            name = f"initial_state[{i}]" if normalize else "initial_state"
            checks.shape(owner, name, array, ("B N M V", "B N M")[i], instead, **sizes)
    checks.key_padding(owner, mask, batch, length, NO_WEIGHTS)
