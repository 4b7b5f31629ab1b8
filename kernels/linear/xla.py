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
from subquad.kernels.linear.reference import divide, finite, normalized
from subquad.kernels.xla_cpu import hide_zeros


@functools.partial(jax.jit, static_argnames=("normalize", "scale"))
def gated(query, key, value, log_decay, beta, initial_state, normalize, scale):
    """See `linear.gated`; returns the outputs and the state after the last token."""

    def step(_, states, chunk):
        values = with_ones(chunk["value"]) if normalize else (chunk["value"],)
        decay = None if chunk["log_decay"] is None else recurrence.cumulate(chunk["log_decay"])
        states, outputs = recurrence.advance(states, scale * chunk["query"], chunk["key"], values, decay, chunk["beta"])
        return states, normalized(*outputs) if normalize else outputs[0]

    arrays = dict(query=query, key=key, value=value, log_decay=as_rows(log_decay), beta=as_rows(beta))
    state = hide_zeros(initial_state.astype(jnp.float32))
    states = (state[..., :-1], state[..., -1:]) if normalize else (state,)
    states, outputs = chunks.scan(step, chunks.chunk_size(), (), states, arrays, value.dtype)
    return outputs, jnp.concatenate(states, -1)


def attention(query, key, value, key_log_scale, mask, is_causal, initial_state, eps):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    return _attention("given", is_causal, float(eps), query, key, value, None, key_log_scale, mask, initial_state)


def random_feature_attention(query, key, value, projection, kernel, mask, is_causal, initial_state):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    return _attention(kernel, is_causal, 0.0, query, key, value, projection, None, mask, initial_state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _attention(features, is_causal, eps, query, key, value, projection, key_log_scale, mask, initial_state):
    """Both operations. Compiled once per shape also for callers who compile nothing."""
    log_scale = as_rows(key_log_scale)
    size = chunks.chunk_size() if is_causal else chunks.BIDIRECTIONAL_CHUNK
    # What a state has in units of its largest log scale is added to in such units, too.
    needs_scale = mask is not None or initial_state is not None and features != "softmax"
    if log_scale is None and (needs_scale or features != "given" and chunks.pads(key.shape[1], size)):
        log_scale = jnp.zeros((key.shape[0], key.shape[2], key.shape[1]), jnp.float32)  # -inf where nothing may be seen
    if mask is not None:
        log_scale = jnp.where(mask[:, 0], log_scale, -jnp.inf)
    projection = None if projection is None else projection.astype(jnp.float32)
    stabilizes = log_scale is not None or features == "softmax" or initial_state is not None
    state = first_state(query, value, projection, initial_state, stabilizes)
    run = causal if is_causal else bidirectional
    arrays = dict(query=query, key=key, value=value, log_scale=log_scale)
    outputs, (sums, largest) = run(FEATURES[features], size, eps, projection, state, arrays, mask is not None)
    numerator, denominator = sums
    return outputs, (numerator, denominator[..., 0], largest)


def causal(features, size, eps, projection, state, arrays, has_mask):
    """(outputs, state after the last key) of queries that see the keys up to their own."""

    def step(projection, state, chunk):
        sums, largest = state
        query, _ = features(chunk["query"], projection)
        key, values, decay, largest = stabilized(features, projection, chunk, largest)
        sums, (numerator, denominator) = recurrence.advance(sums, query, key, values, decay)
        return (sums, largest), divide(numerator, denominator[..., 0], eps)

    state, outputs = chunks.scan(step, size, projection, state, arrays, arrays["value"].dtype, skip_unused=has_mask)
    return outputs, state


def bidirectional(features, size, eps, projection, state, arrays, has_mask):
    """(outputs, state after the last key) of queries that see all keys."""
    query, dtype = arrays["query"], arrays["value"].dtype
    keys = {name: x for name, x in arrays.items() if name != "query"}
    sums, largest = state = add_keys(features, size, projection, state, keys)

    def step(constants, state, chunk):
        projection, sums = constants
        query, _ = features(chunk["query"], projection)
        numerator, denominator = (query @ x for x in sums)
        return state, divide(numerator, denominator[..., 0], eps)

    _, outputs = chunks.scan(step, size, (projection, sums), (), dict(query=query), dtype, skip_unused=has_mask)
    return outputs, state


def add_keys(features, size, projection, state, keys):
    """The state with all keys added, chunk by chunk. Its derivative needs no states between: sums depend on no order."""
    segments, inside, size = chunks.divide(keys["key"].shape[1], size)
    count = segments * inside
    keys = chunks.pad(keys, count * size)

    def sums_of(projection, chunk, largest):
        key, values, log_scale = weighed(features, projection, chunk)
        weight = 1.0 if log_scale is None else jnp.exp(log_scale - finite(largest)[..., None])[..., None]
        return tuple(recurrence.write(key, weight * value) for value in values)

    def forward(projection, state, keys):
        def body(i, state):
            sums, before = state
            chunk = chunks.take_chunk(keys, i, size)
            key, values, decay, largest = stabilized(features, projection, chunk, before)
            add = lambda x, value: recurrence.whole_chunk(x, decay) + recurrence.write(key, value, decay)
            return tuple(map(add, sums, values)), largest

        return chunks.loop(count, body, state)

    def backward(saved, gradients):
        (projection, keys, first, largest), (grad_sums, _) = saved, gradients

        def body(i, carry):
            grad_projection, grad_keys = carry
            run = lambda projection, chunk: sums_of(projection, chunk, largest)
            more, grads = jax.vjp(run, projection, chunks.take_chunk(keys, i, size))[1](grad_sums)
            return jax.tree.map(jnp.add, grad_projection, more), chunks.put_chunk(grad_keys, grads, keys, i, size)

        carry = jax.tree.map(jnp.zeros_like, projection), chunks.room_for(keys)
        grad_projection, grad_keys = chunks.loop(count, body, carry)
        decay = jnp.exp(first - finite(largest))[..., None, None]
        return grad_projection, (tuple(x * decay for x in grad_sums), jnp.zeros_like(first)), chunks.as_arrays(grad_keys, keys)

    @jax.custom_vjp
    def run(projection, state, keys):
        return forward(projection, state, keys)

    def run_forward(projection, state, keys):
        after = forward(projection, state, keys)
        return after, (projection, keys, state[1], after[1])

    precision.define_passes(run, precision.full(run_forward), precision.full(backward))
    return precision.full(run)(projection, state, keys)


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


def stabilized(features, projection, chunk, before):
    """`weighed`, with the log scales as a decay of the state relative to the running maximum: no weight exceeds 1.

        exp(r_s - c_t) = exp(r_s - c_s) exp(c_s - c_t),   c_t = max of r up to t: a log decay of c_{t-1} - c_t per token

    Returns: key, values, the decay as `recurrence.advance` takes it, and c after the last token. c cancels: a constant to
        every derivative.
    """
    key, values, log_scale = weighed(features, projection, chunk)
    if log_scale is None:
        return key, values, None, before
    largest = jnp.maximum(jax.lax.cummax(jax.lax.stop_gradient(log_scale), axis=2), before[..., None])
    largest = jnp.concatenate([before[..., None], largest], 2)
    weight = jnp.exp(log_scale - finite(largest[..., 1:]))[..., None]
    # Before any key the state is 0 and decays by nothing, as if the first maximum had been there.
    first = jnp.min(jnp.where(jnp.isneginf(largest), jnp.inf, largest), 2, keepdims=True)
    decay = -jnp.where(jnp.isneginf(largest), jnp.where(jnp.isinf(first), 0, first), largest)
    return key, tuple(weight * value for value in values), [decay], largest[..., -1]


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
