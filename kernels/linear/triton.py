"""Linear attention with decays on a GPU: what of each operation is XLA's, before the passes of the two kernels.

Features of random projections, the running maximum of log scales and the sums of log decays are XLA's (`prepare` of a plan),
computed again in the backward pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from subquad.kernels import launch, precision
from subquad.kernels.flash.triton import padded
from subquad.kernels.linear import recurrence
from subquad.kernels.linear.passes import Operands, Plan, cut_chunks, run_means, run_sums
from subquad.kernels.linear.reference import divide, finite, normalized, repeated
from subquad.kernels.linear.xla import FEATURES, FOREVER, as_rows, first_state, running_maximum, visible_scale, with_ones
from subquad.kernels.padding import pad_to

# Tokens whose random features are in memory at once.
PIECE = 2048


def attention(query, key, value, key_log_scale, mask, segments, is_causal, initial_state, eps, *, mode):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    return attend("given", is_causal, eps, query, key, value, None, key_log_scale, mask, segments, initial_state, mode)


def random_feature_attention(query, key, value, projection, kernel, mask, segments, is_causal, initial_state, *, mode):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    return attend(kernel, is_causal, 0.0, query, key, value, projection[None], None, mask, segments, initial_state, mode)


def attend(features, is_causal, eps, query, key, value, projection, key_log_scale, mask, segments, initial_state, mode):
    log_scale = visible_scale(features, key, key_log_scale, mask, segments, initial_state)
    stabilizes = log_scale is not None or features == "softmax"
    matrix = None if projection is None else projection[0]
    (state, sums), largest = first_state(query, value, matrix, initial_state, stabilizes)
    plan = plan_of(
        (query, key, value), mode, prepare=with_running_maximum, features=features, is_causal=is_causal, divides=True,
        hides=mask is not None, differentiates=("early",) if key_log_scale is not None else (), scale=1.0, eps=float(eps),
    )  # fmt: skip

    if segments is not None and not is_causal:
        return in_segments(plan, query, key, value, log_scale, segments, projection, state, sums, largest)

    def run(query, key, value, log_scale, segments, state):
        log_scale = None if log_scale is None else log_scale[..., None]
        out, *state = run_means(plan, query, key, value, log_scale, segments, projection, *state, None, None)
        return out, tuple(state)

    if projection is not None and max(query.shape[1], key.shape[1]) > PIECE:
        log_scale = jnp.zeros(key.shape[:3], jnp.float32) if log_scale is None else log_scale
        run = functools.partial(causal_in_pieces if is_causal else bidirectional_in_pieces, run)
    return run(query, key, value, log_scale, segments, (state, sums[..., 0], largest))


def in_segments(plan: Plan, query, key, value, log_scale, segments, projection, state, sums, largest):
    """Bidirectional attention: the keys of a segment up to each query, then those after it, by the same sums from the end,
    where each token has the key of the one before it. A state forgets everything between two segments; the log scales of each
    are relative to its largest, so that nothing else decays."""
    if projection is not None and query.shape[1] > PIECE:
        raise launch.Declined(f"random features in segments have a kernel up to {PIECE} tokens only, unless causal.")
    (query, _), (key, own) = featured(plan, query, projection), featured(plan, key, projection)
    r = as_rows(log_scale) if own is None else as_rows(log_scale) + as_rows(own)
    ids = jnp.pad(segments[:, None].astype(jnp.float32), [(0, 0), (0, 0), (1, 0)])  # the state's is the first one
    c = running_maximum(jnp.concatenate([largest[..., None], jax.lax.stop_gradient(r)], 2), ids)
    c = jnp.flip(running_maximum(jnp.flip(c, 2), jnp.flip(ids, 2)), 2)
    weight = jnp.exp(r - finite(c[..., 1:])).swapaxes(1, 2)[..., None]
    before = jnp.exp(largest - finite(c[..., 0]))[..., None, None]
    values, width = with_one_more(weight * value, weight), value.shape[3]
    state = with_one_more(state, sums) * before
    causal = dataclasses.replace(
        plan, prepare=with_decay, features="given", is_causal=True, divides=False, differentiates=(), eps=0.0
    )

    def add(query, key, values, is_new, state):
        log_decay = jnp.broadcast_to(jnp.where(is_new, -jnp.inf, 0.0), (*query.shape[:3], 1))
        return run_sums(causal, query, key, values, log_decay, None, None, state, None, None, None, None)[:2]

    is_new = lambda ids: jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (1, 0)])[..., None, None]
    flip = lambda x: jnp.flip(x, 1)
    shift = lambda x: jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
    past, last = add(query, key, values, is_new(segments), state)
    is_last = is_new(flip(segments))
    future, _ = add(flip(query), shift(flip(key)), jnp.where(is_last, 0, shift(flip(values))), is_last, jnp.zeros_like(state))
    both = past + flip(future)
    out = divide(both[..., :width], both[..., width], plan.eps).astype(value.dtype)
    return out, (last[..., :width], last[..., width], c[..., -1])


def with_one_more(values, other):
    """[..., V + 16] of values [..., V] and another one [..., 1]: rows of V + 1 would lie on no boundary for wide loads."""
    return pad_to(jnp.concatenate([values, other], -1).astype(jnp.float32), -1, values.shape[-1] + 16)


def causal_in_pieces(run, query, key, value, log_scale, segments, state):
    """`run` for one piece of the sequence after another, so that only the features of one are in memory."""

    def step(carry, piece):
        state, segment = carry
        *piece, segments = piece
        if segments is not None:  # a state is of segment 0
            segments, segment = segments - segment[:, None], segments[:, -1]
        out, state = run(*piece, segments, state)
        return (state, segment), out

    segment = None if segments is None else segments[:, 0]
    pieces = *map(cut, (query, key, value)), cut(log_scale, constant_values=-jnp.inf), cut(segments, mode="edge")
    (state, _), out = jax.lax.scan(step, (state, segment), pieces)
    return joined(out, query.shape[1]), state


def bidirectional_in_pieces(run, query, key, value, log_scale, segments, state):
    """As `causal_in_pieces`, first for the keys, then for the queries, which add a key that none sees."""
    pieces = *map(cut, (key, value)), cut(log_scale, constant_values=-jnp.inf)
    add = lambda state, piece: (run(query[:, :1], *piece, None, state)[1], None)
    state, _ = jax.lax.scan(add, state, pieces)
    hidden = key[:, :1], value[:, :1], jnp.full_like(log_scale[:, :1], -jnp.inf)
    out = jax.lax.map(lambda piece: run(piece, *hidden, None, state)[0], cut(query))
    return joined(out, query.shape[1]), state


def cut(x, **options):
    """[B, T, ...] as pieces [P, B, T / P, ...] of PIECE tokens at most, padded at the end."""
    if x is None:
        return None
    length = x.shape[1]
    count = -(-length // PIECE)
    size = -(-length // count)
    x = pad_to(x, 1, count * size, **options).reshape(len(x), count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def joined(pieces, length: int):
    """The inverse of `cut`."""
    x = jnp.moveaxis(pieces, 0, 1)
    return x.reshape(len(x), -1, *x.shape[3:])[:, :length]


def gated(query, key, value, log_decay, beta, bonus, floor, erase, initial_state, normalize, scale, *, mode):
    """See `linear.gated`; returns the outputs and the state after the last token."""
    dtype = value.dtype
    query, key, value = repeated(initial_state.shape[1], 2, query, key, value)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    if normalize and not all(x is None for x in (beta, bonus, floor, erase)):
        # A sum of keys that is corrected, too, is one of the values; and a kernel divides by nothing else than the sum.
        value, width = with_one_more(*with_ones(value)), value.shape[3]
        state = with_one_more(initial_state[..., :-1], initial_state[..., -1:])
        out, state = gated(query, key, value, log_decay, beta, bonus, None, erase, state, False, scale, mode=mode)
        return normalized(out[..., :width], out[..., width : width + 1], floor).astype(dtype), state[..., : width + 1]
    if bonus is not None:
        later = recurrence.next_ones(query, 1)
        out, state = gated(later, key, value, log_decay, beta, None, None, None, initial_state, False, scale, mode=mode)
        wide_query, wide_key, wide_value = map(precision.wide, (query, key, value))
        first = precision.full(jnp.matmul)(wide_query[:, 0, :, None], initial_state).swapaxes(1, 2)
        own = recurrence.own_score(precision.wide(bonus), wide_query, wide_key) * wide_value
        return (recurrence.after_first(scale * first, precision.wide(out), 1) + scale * own).astype(dtype), state
    reader = None
    if erase is not None:
        reader, eraser = erase
        query, key, value, log_decay = in_two_steps(query, key, value, log_decay, eraser.astype(key.dtype))
    plan = plan_of(
        (query, key, value), mode, prepare=with_decay, features="given", is_causal=True, divides=normalize, hides=False,
        differentiates=("late", "early"), scale=scale, eps=0.0, is_delta=not (beta is None and erase is None),
    )  # fmt: skip
    state, sums = (initial_state[..., :-1], initial_state[..., -1]) if normalize else (initial_state, None)
    run = run_means if normalize else run_sums
    out, state, sums, _ = run(
        plan, query, key, value, log_decay, None, None, state.astype(jnp.float32), sums, None, beta, reader
    )
    out = out if erase is None else out[:, 1::2]
    return out, jnp.concatenate([state, sums[..., None]], -1) if normalize else state


def in_two_steps(query, key, value, log_decay, eraser):
    """Each token as two, as the delta rule's kernel takes them: the first decays and erases, the second writes and is asked."""
    two = lambda first, second: jnp.stack([first, second], 2).reshape(len(first), -1, *first.shape[2:])
    before = lambda x: two(jnp.zeros_like(x), x)
    decay = None if log_decay is None else two(log_decay, jnp.zeros_like(log_decay))
    return before(query), two(eraser, key), before(value), decay


def plan_of(arrays, mode, is_delta=False, **options) -> Plan:
    launch.require_floats(*(x.dtype for x in arrays))
    dtypes = {x.dtype.name for x in arrays}
    bf16, length = dtypes == {"bfloat16"}, max(x.shape[1] for x in arrays)
    most = 32 if "float32" in dtypes and mode == "triton" else 64
    # float16 has the digits of TF32.
    precision = launch.dot_precision(jnp.float32 if "float32" in dtypes else jnp.float16)
    if is_delta and mode == "triton":  # where the tiles of a chunk are as wide as the state
        width, size = padded(arrays[0].shape[3]), 8192 if bf16 else 2048 if precision == "tf32x3" else 4096
        most = min(most, size // width)
        if most < 16:
            raise launch.Declined(f"the delta rule takes heads of at most {size // 16} features in this dtype, got {width}.")
    return Plan(chunk=min(most, padded(length)), bf16=bf16, precision=precision, mode=mode, **options)


def with_decay(plan: Plan, query, key, value, log_decay, segments, projection, state, sums, largest, beta, reader):
    """A plan's `prepare` for `linear.gated`: sums of log decays that start anew in every chunk."""
    g = parts = erase = None
    (batch, length, heads, _), cut = query.shape, lambda x: cut_chunks(x.astype(jnp.float32), plan.chunk)
    if log_decay is not None:
        parts, channels = recurrence.cumulate(cut(log_decay)), log_decay.shape[3]
        g = jnp.stack(parts, 3).reshape(batch, heads, -1, plan.chunk + 1, len(parts), channels)
        parts = parts if channels > 1 else [g[..., 0] for g in parts]
    if beta is not None or reader is not None:
        if reader is None:
            found = without_state(cut(key), cut(value), parts, cut(beta[..., None])[..., 0])
        else:
            found = erased_without_state(cut_chunks(reader.astype(jnp.float32), plan.chunk // 2), cut(key), cut(value), parts)
        joined = lambda x: x.reshape(batch, heads, -1, x.shape[3])[:, :, :length].swapaxes(1, 2).astype(plan.dtype)
        erase, value = map(joined, found)
    return Operands(query, key, value, g, g, state, sums, erase), None


@jax.checkpoint  # exponentials of every pair and channel are not kept for the derivative
@precision.full
def without_state(key, value, decay, beta):
    """W and U of `passes`, for chunks [B, N, C, ...]."""
    solve = recurrence.delta_rule(key, decay, beta)
    return solve @ recurrence.decayed(key, decay), solve @ value


@jax.checkpoint
@precision.full
def erased_without_state(reader, key, value, decay):
    """W and U of `passes` for tokens that are two each: what the first reads of the state, and finds of values."""
    decay = None if decay is None else [g[:, :, ::2] for g in decay]
    (eraser, key), value = (key[:, :, 0::2], key[:, :, 1::2]), value[:, :, 1::2]
    of_state, of_values = recurrence.erase_rule(reader, eraser, key, decay)
    two = lambda first, second: jnp.stack([first, second], 3).reshape(*first.shape[:2], -1, first.shape[3])
    return two(of_state, jnp.zeros_like(of_state)), two(-of_values @ value, value)


def with_running_maximum(plan: Plan, query, key, value, log_scale, segments, projection, state, sums, largest, *_):
    """A plan's `prepare` for `linear.attention`: g is -c of a query, the largest r up to it, and -r of a key.

    c cancels in what is divided, and keeps all weights at most 1; it is a constant to every derivative.
    """
    (query, _), (key, own) = featured(plan, query, projection), featured(plan, key, projection)
    r = None if log_scale is None else as_rows(log_scale[..., 0])
    if own is not None:
        r = as_rows(own) if r is None else as_rows(own) + r
    if r is None:
        return Operands(query, key, value, None, None, state, sums), largest
    c = jnp.concatenate([largest[..., None], jax.lax.stop_gradient(r)], 2)
    if segments is not None:  # the state's is the first one
        segments = jnp.pad(segments[:, None].astype(jnp.float32), [(0, 0), (0, 0), (1, 0)])
    if plan.is_causal:
        c = running_maximum(c, segments)
    else:
        c = jnp.broadcast_to(c.max(2, keepdims=True), (*c.shape[:2], max(query.shape[1], key.shape[1]) + 1))
        before = jnp.exp(largest - finite(c[..., 0]))
        state, sums = state * before[..., None, None], sums * before[..., None]
    chunks = -(-(c.shape[2] - 1) // plan.chunk)

    def in_chunks(start, tokens, **options):
        """[B, N, K, C + 1], of [B, N, K] and of tokens [B, N, L] with padding."""
        tokens = pad_to(tokens, 2, chunks * plan.chunk, **options)
        return jnp.concatenate([start[..., None], tokens.reshape(*start.shape, plan.chunk)], 3)

    # Where nothing was seen yet, of this segment, the state is 0 and infinitely far away.
    start = -c[..., : -1 : plan.chunk]
    parts = [(in_chunks(start, -finite(c[..., 1:]), mode="edge"), in_chunks(start, -r, constant_values=jnp.inf))]
    if segments is not None:
        segments = -FOREVER * jnp.broadcast_to(segments, c.shape)
        parts.insert(0, (in_chunks(segments[..., : -1 : plan.chunk], segments[..., 1:], mode="edge"),) * 2)
    late, early = (jnp.stack(g, 4)[..., None] for g in zip(*parts, strict=True))
    return Operands(query, key, value, late, early, state, sums), c[..., -1]


def featured(plan: Plan, inputs, projection):
    """(features, their own log scales or None)."""
    run = FEATURES[plan.features]
    if projection is None:
        return run(inputs, None)
    projection = projection.astype(jnp.float32)
    found, own = run(inputs, projection[0]) if len(projection) == 1 else jax.vmap(run)(inputs, projection)
    return found.astype(plan.dtype), own
