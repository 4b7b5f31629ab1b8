"""Linear attention in memory O(T (M + V)), O(T (H + V)) with a projection: the recurrence, chunk by chunk.

Everything of a chunk, features included, is computed where it is used, and again in the backward pass. An operation is
the recurrence of `recurrence.py` inside wrappers: features, a stabiliser, a normaliser.
"""

import functools

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.linear import chunks, recurrence
from subquad.kernels.linear.features import relu_features, softmax_features
from subquad.kernels.linear.reference import divide, finite, normalized, repeated
from subquad.kernels.xla_cpu import hide_zeros

# The log decay between two segments: more than any two log scales differ by. Its multiples are exact.
FOREVER = 2.0**100


@functools.partial(jax.jit, static_argnames=("normalize", "scale"))
def gated(query, key, value, log_decay, beta, bonus, floor, erase, initial_state, normalize, scale):
    """See `linear.gated`; returns the outputs and the state after the last token."""
    heads = initial_state.shape[1]

    def step(bonus, states, chunk):
        # Of one chunk: of all tokens, shared heads would take the memory of N.
        query, key, value = repeated(heads, 1, *(chunk[name] for name in ("query", "key", "value")))
        values = with_ones(value) if normalize else (value,)
        decay = None if chunk["log_decay"] is None else recurrence.cumulate(chunk["log_decay"])
        advance = recurrence.advance if bonus is None else functools.partial(recurrence.advance_after_reading, bonus)
        if erase is None:
            states, outputs = advance(states, scale * query, key, values, decay, chunk["beta"])
        else:
            pair = chunk["reader"], chunk["eraser"]
            states, outputs = recurrence.advance_erasing(states, scale * query, key, values, decay, *pair)
        return states, normalized(*outputs, chunk["floor"]) if normalize else outputs[0]

    rows = dict(log_decay=as_rows(log_decay), beta=as_rows(beta), floor=as_rows(floor))
    reader, eraser = (None, None) if erase is None else erase
    arrays = dict(query=query, key=key, value=value, reader=reader, eraser=eraser, **rows)
    bonus = None if bonus is None else bonus.astype(jnp.float32)
    state = hide_zeros(initial_state.astype(jnp.float32))
    states = (state[..., :-1], state[..., -1:]) if normalize else (state,)
    size = chunks.chunk_size(is_delta=not (beta is None and erase is None))
    states, outputs = chunks.scan(step, size, bonus, states, arrays, value.dtype)
    return outputs, jnp.concatenate(states, -1)


def attention(query, key, value, key_log_scale, mask, segments, is_causal, initial_state, eps):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    return _attention("given", is_causal, float(eps), query, key, value, None, key_log_scale, mask, segments, initial_state)


def random_feature_attention(query, key, value, projection, kernel, mask, segments, is_causal, initial_state):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    return _attention(kernel, is_causal, 0.0, query, key, value, projection, None, mask, segments, initial_state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention(features, is_causal, eps, query, key, value, projection, key_log_scale, mask, segments, initial_state):
    """Both operations. Compiled once per shape also for callers who compile nothing."""
    is_chunked = is_causal or segments is not None
    size = chunks.chunk_size() if is_chunked else chunks.BIDIRECTIONAL_CHUNK
    pads = features != "given" and chunks.pads(key.shape[1], size)
    log_scale = as_rows(visible_scale(features, key, key_log_scale, mask, segments, initial_state, pads))
    projection = None if projection is None else projection.astype(jnp.float32)
    stabilizes = log_scale is not None or features == "softmax"
    state = first_state(query, value, projection, initial_state, stabilizes)
    arrays = dict(query=query, key=key, value=value, log_scale=log_scale)
    if segments is not None:
        arrays["segment"] = segments[:, None].astype(jnp.float32)
        state = *state, arrays["segment"][..., 0]
    run = causal if is_causal else bidirectional if segments is None else bidirectional_in_segments
    outputs, state = run(FEATURES[features], size, eps, projection, state, arrays, mask is not None)
    (numerator, denominator), largest = state[:2]
    return outputs, (numerator, denominator[..., 0], largest)


def visible_scale(features, key, key_log_scale, mask, segments, initial_state, pads=False):
    """The log scales [B, S, N] of keys, -inf where nothing may be seen; None where they are 0 and none is needed."""
    # What a state has in units of its largest log scale is added to in such units, too.
    needs_scale = mask is not None or segments is not None or initial_state is not None and features != "softmax"
    log_scale = key_log_scale
    if log_scale is None and (needs_scale or pads):
        log_scale = jnp.zeros(key.shape[:3], jnp.float32)
    return log_scale if mask is None else jnp.where(mask[:, 0, 0, :, None], log_scale, -jnp.inf)


def causal(features, size, eps, projection, state, arrays, has_mask):
    """(outputs, state after the last key) of queries that see the keys up to their own."""

    def finish(numerator, denominator, _):
        return divide(numerator, denominator[..., 0], eps)

    return causal_sums(features, size, projection, state, arrays, has_mask, finish, arrays["value"].dtype)


def causal_sums(features, size, projection, state, arrays, has_mask, finish, dtype):
    """`finish(numerator, denominator, largest log scale)` [B, N, C, ...] of each query, and the state after the last key."""

    def step(projection, state, chunk):
        sums, *before = state
        query, _ = features(chunk["query"], projection)
        key, values, decay, largest, after = stabilized(features, projection, chunk, *before)
        sums, (numerator, denominator) = recurrence.advance(sums, query, key, values, decay)
        return (sums, *after), finish(numerator, denominator, largest)

    state, outputs = chunks.scan(step, size, projection, state, arrays, dtype, skip_unused=has_mask)
    return outputs, state


def bidirectional_in_segments(features, size, eps, projection, state, arrays, has_mask):
    """(outputs, state after the last key) of queries that see the keys of their segment: those up to their own, and those
    after it, by the same sums from the end, where each token has the key of the one before it."""
    width = arrays["value"].shape[3]

    def finish(*sums):
        *sums, largest = sums
        return jnp.concatenate([*sums, largest[..., None]], -1)

    def add(projection, state, arrays):
        found, state = causal_sums(features, size, projection, state, arrays, has_mask, finish, jnp.float32)
        return found[..., :-1], jax.lax.stop_gradient(found[..., -1:]), state

    flip = lambda name: jnp.flip(arrays[name], 2 if arrays[name].ndim == 3 else 1)
    shift = lambda x: jnp.pad(x, [(0, 0), (1, 0), (0, 0), (0, 0)])[:, :-1]
    segment = arrays["segment"][..., -1:] - flip("segment")
    is_seen = jnp.pad(segment[..., 1:] == segment[..., :-1], [(0, 0), (0, 0), (1, 0)])
    log_scale = jnp.where(is_seen, jnp.roll(flip("log_scale"), 1, 2), -jnp.inf)
    back = dict(query=flip("query"), key=shift(flip("key")), value=shift(flip("value")), log_scale=log_scale, segment=segment)
    nothing = jax.tree.map(jnp.zeros_like, state[0]), jnp.full_like(state[1], -jnp.inf), segment[..., 0]
    before, largest, state = add(projection, state, arrays)
    after, other = (jnp.flip(x, 1) for x in add(projection, nothing, back)[:2])
    most = finite(jnp.maximum(largest, other))
    both = before * jnp.exp(largest - most) + after * jnp.exp(other - most)
    return divide(both[..., :width], both[..., width], eps).astype(arrays["value"].dtype), state


def bidirectional(features, size, eps, projection, state, arrays, has_mask):
    """(outputs, state after the last key) of queries that see all keys."""
    query, dtype = arrays["query"], arrays["value"].dtype
    keys = {name: x for name, x in arrays.items() if name != "query"}
    sums, _ = state = add_keys(features, size, projection, state, keys)

    def step(constants, state, chunk):
        projection, sums = constants
        query, _ = features(chunk["query"], projection)
        numerator, denominator = (query @ x for x in sums)
        return state, divide(numerator, denominator[..., 0], eps)

    _, outputs = chunks.scan(step, size, (projection, sums), (), dict(query=query), dtype, skip_unused=has_mask)
    return outputs, state


def add_keys(features, size, projection, state, keys):
    """The state with all keys added, chunk by chunk:

        S' = exp(c - c') S + sum_s exp(r_s - c') k_s v_s^T,   c' = max(c, max_s r_s)

    c' is a constant to the derivative, and given it the sums depend on no order: the states between are not needed again.
    """
    segments, inside, size = chunks.divide(keys["key"].shape[1], size)
    count = segments * inside
    keys = chunks.pad(keys, count * size)

    def chunk_sums(projection, chunk, largest):
        key, values, log_scale = weighed(features, projection, chunk)
        weight = 1.0 if log_scale is None else jnp.exp(log_scale - finite(largest)[..., None])[..., None]
        return tuple(recurrence.write(key, weight * value) for value in values)

    def forward(projection, state, keys):
        def add_chunk(i, state):
            sums, before = state
            key, values, decay, _, (largest,) = stabilized(features, projection, chunks.take_chunk(keys, i, size), before)
            add = lambda x, value: recurrence.whole_chunk(x, decay) + recurrence.write(key, value, decay)
            return tuple(map(add, sums, values)), largest

        return chunks.loop(count, add_chunk, state)

    def backward(saved, gradients):
        (projection, keys, before, largest), (grad_sums, _) = saved, gradients

        def add_gradient(i, carry):
            grad_projection, grad_keys = carry
            sums = lambda projection, chunk: chunk_sums(projection, chunk, largest)
            _, pull = jax.vjp(sums, projection, chunks.take_chunk(keys, i, size))
            more, grad_chunk = pull(grad_sums)
            return jax.tree.map(jnp.add, grad_projection, more), chunks.put_chunk(grad_keys, grad_chunk, keys, i, size)

        carry = jax.tree.map(jnp.zeros_like, projection), chunks.room_for(keys, grad_sums)
        grad_projection, grad_keys = chunks.loop(count, add_gradient, carry)
        decay = jnp.exp(before - finite(largest))[..., None, None]
        grad_state = tuple(x * decay for x in grad_sums), jnp.zeros_like(before)
        return grad_projection, grad_state, chunks.as_arrays(grad_keys, keys)

    @jax.custom_vjp
    def run(projection, state, keys):
        return forward(projection, state, keys)

    def run_forward(projection, state, keys):
        after = forward(projection, state, keys)
        return after, (projection, keys, state[1], after[1])

    dtype = keys["value"].dtype
    precision.define_passes(run, precision.full(run_forward, dtype), precision.full(backward, dtype))
    return precision.full(run, dtype)(projection, state, keys)


# The wrappers: what a chunk's queries, keys and values go through before the recurrence.


def given(inputs, _):
    return inputs, None


def relu(inputs, projection):
    return relu_features(inputs, projection), None


# (inputs [B, N, C, H], projection) -> features [B, N, C, M], and a log scale [B, N, C] or None.
FEATURES = {"given": given, "relu": relu, "softmax": softmax_features}


def weighed(features, projection, chunk):
    """(key features, values and ones, log scales or None): the recurrence of the ones is the denominator."""
    key, own = features(chunk["key"], projection)
    log_scale = chunk["log_scale"]
    if own is not None:
        log_scale = own if log_scale is None else own + log_scale
    return key, with_ones(chunk["value"]), log_scale


def stabilized(features, projection, chunk, before, segment=None):
    """`weighed`, with the log scales as a decay of the state relative to the running maximum: no weight exceeds 1.

        exp(r_s - c_t) = exp(r_s - c_s) exp(c_s - c_t),   c_t = max of r up to t: a log decay of c_{t-1} - c_t per token

    Args:
        before, segment: c and the segment of the state. In segments the maximum is that of t's own, and what was before them
            decays to nothing.
    Returns: key, values, the decay as `recurrence.advance` takes it, c of each token, and c and segment of the state
        afterwards. c cancels: a constant to every derivative.
    """
    key, values, log_scale = weighed(features, projection, chunk)
    if log_scale is None:
        return key, values, None, None, (before,)
    segments = None if segment is None else jnp.concatenate([segment[..., None], chunk["segment"]], 2)
    largest = running_maximum(jnp.concatenate([before[..., None], jax.lax.stop_gradient(log_scale)], 2), segments)
    weight = jnp.exp(log_scale - finite(largest[..., 1:]))[..., None]
    # Before any key the state is 0 and decays by nothing, as if the first maximum had been there.
    first = jnp.min(jnp.where(jnp.isneginf(largest), jnp.inf, largest), 2, keepdims=True)
    decay = [-jnp.where(jnp.isneginf(largest), jnp.where(jnp.isinf(first), 0, first), largest)]
    after = (largest[..., -1],)
    if segments is not None:
        decay, after = [-FOREVER * segments, *decay], (*after, segments[..., -1])
    return key, tuple(weight * value for value in values), decay, largest[..., 1:], after


def running_maximum(x, segments=None):
    """Of x [B, N, T] up to each token, among those of its segment [B, 1, T] where there are any."""
    if segments is None:
        return jax.lax.cummax(x, axis=2)

    def combine(one, other):
        return other[0], jnp.where(one[0] == other[0], jnp.maximum(one[1], other[1]), other[1])

    return jax.lax.associative_scan(combine, (jnp.broadcast_to(segments, x.shape), x), axis=2)[1]


def first_state(query, value, projection, initial_state, stabilizes):
    """Numerator [B, N, M, V] and denominator [B, N, M, 1], and the largest log scale [B, N]."""
    if initial_state is None:
        batch, _, heads, features = query.shape
        features = features if projection is None else projection.shape[0]
        zeros = lambda width: jnp.zeros((batch, heads, features, width), jnp.float32)
        largest = jnp.full((batch, heads), -jnp.inf if stabilizes else 0.0, jnp.float32)
        return hide_zeros((zeros(value.shape[-1]), zeros(1))), largest
    numerator, denominator, largest = (x.astype(jnp.float32) for x in initial_state)
    # In what follows the maximum is a constant to the derivative; it has its own here, that of a factor of the sums.
    constant = jax.lax.stop_gradient(largest)
    factor = jnp.where(jnp.isneginf(largest), 0, jnp.exp(finite(largest) - finite(constant)))[..., None]
    return (numerator * factor[..., None], (denominator * factor)[..., None]), constant


def with_ones(value):
    return value, jnp.ones_like(value[..., :1])


def as_rows(x):
    """[B, T, N] as rows [B, N, T], before any loop: in one that cuts them, XLA on a CPU gathers them for every pair."""
    return x if x is None or x.ndim == 4 else x.astype(jnp.float32).swapaxes(1, 2)
