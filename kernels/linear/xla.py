"""Linear attention in memory O(T (M + V)), O(T (H + V)) with a projection: loops over chunks that carry the state.

Everything of a chunk, features included, is computed where it is used, and again in the backward pass; what is kept of
the forward pass is the outputs, and two numbers per query: 1 / denominator and the running maximum.
"""

import functools
import math

import jax
import jax.numpy as jnp

from subquad.kernels import precision
from subquad.kernels.linear import chunks, recurrence
from subquad.kernels.linear.features import LOG_FLOOR, RELU_OFFSET
from subquad.kernels.linear.gradient import Arrays, Plan, bind, differentiable
from subquad.kernels.linear.old import BIDIRECTIONAL_CHUNK, chunk, empty, put, put_rows, sweep, take, take_rows
from subquad.kernels.linear.reference import SMALLEST_DENOMINATOR, finite, normalized
from subquad.kernels.memory import numbers

HIGHEST = jax.lax.Precision.HIGHEST


def attention(query, key, value, key_log_scale, mask, is_causal, initial_state, eps):
    """See `linear.attention`; returns the outputs and the state after the last key."""
    if key_log_scale is not None:
        # Rows [B, N, S], before any loop: in one that cuts them out of [B, S, N] XLA on a CPU gathers them for every pair.
        key_log_scale = key_log_scale.astype(jnp.float32).swapaxes(1, 2)
    arrays = bind(query, key, value, key_log_scale, mask, None, initial_state)
    return _run(Plan("given", is_causal, float(eps)), arrays)


def random_feature_attention(query, key, value, projection, kernel, mask, is_causal, initial_state):
    """See `linear.random_feature_attention`; returns the outputs and the state after the last key."""
    arrays = bind(query, key, value, None, mask, projection, initial_state)
    return _run(Plan(kernel, is_causal, 0.0), arrays)


@functools.partial(jax.jit, static_argnames=("normalize", "scale"))
def gated(query, key, value, log_decay, beta, initial_state, normalize, scale):
    """See `linear.gated`; returns the outputs and the state after the last token."""

    def step(_, state, chunk):
        value, decay = chunk["value"], chunk["log_decay"]
        if normalize:
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)
        decay = None if decay is None else recurrence.cumulate(decay)
        state, outputs = recurrence.advance(state, scale * chunk["query"], chunk["key"], value, decay, chunk["beta"])
        return state, normalized(outputs) if normalize else outputs

    rows = lambda x: x if x is None or x.ndim == 4 else x.astype(jnp.float32).swapaxes(1, 2)
    arrays = dict(query=query, key=key, value=value, log_decay=rows(log_decay), beta=rows(beta))
    state = chunks.hide_zeros(initial_state.astype(jnp.float32))
    state, outputs = chunks.scan(step, chunks.chunk_size(), (), state, arrays)
    return outputs, state


# Features.


def project(inputs, projection):
    if projection.ndim == 3:
        projection = projection[0]
    return jnp.einsum("bnch,mh->bncm", inputs, projection, precision=HIGHEST)


def scaled_projection(plan: Plan, arrays: Arrays):
    """The projection in float32, times what the features scale their inputs with."""
    if arrays.projection is None:
        return None
    projection = arrays.projection[0].astype(jnp.float32)
    return projection * projection.shape[1] ** -0.25 if plan.features == "softmax" else projection


def features(plan: Plan, inputs, projection):
    """[B, N, C, M] features and their log scale without the terms that do not need the projection, or None."""
    if plan.features == "given":
        return inputs, None
    logits = project(inputs, projection)
    if plan.features == "softmax":
        largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
        return jnp.exp(jnp.maximum(logits - largest, LOG_FLOOR)), largest[..., 0]
    return (jnp.maximum(logits, 0) + RELU_OFFSET) * projection.shape[0] ** -0.5, None


def grad_inputs(plan: Plan, grad, phi, inputs, projection):
    """(gradient of the inputs, that of the scaled projection) from that of the features [B, N, C, M]."""
    if plan.features == "given":
        return grad, None
    count, width = projection.shape
    if plan.features == "softmax":
        grad = jnp.where(phi > 1.01 * math.exp(LOG_FLOOR), grad * phi, 0)
    else:
        grad = jnp.where(phi > 1.000001 * RELU_OFFSET * count**-0.5, grad * count**-0.5, 0)
    of_inputs = jnp.einsum("bncm,mh->bnch", grad, projection)
    if plan.features == "softmax":
        of_inputs -= inputs * (grad.sum(-1, keepdims=True) * width**-0.5)
    return of_inputs, jnp.einsum("bncm,bnch->mh", grad, inputs)


def has_scale(plan: Plan, arrays: Arrays) -> bool:
    """Whether any key or state has a log scale other than 0."""
    return plan.features == "softmax" or arrays.scale is not None or arrays.mask is not None or arrays.numerator is not None


def key_chunk(plan: Plan, arrays: Arrays, projection, start, size):
    """(what the features are made of, features, values, log scales or None) of a chunk of keys, -inf where masked."""
    inputs, value = take(arrays.key, start, size), take(arrays.value, start, size)
    phi, scale = features(plan, inputs, projection)
    if not has_scale(plan, arrays):
        return inputs, phi, value, None
    if scale is not None:
        width = inputs.shape[-1]
        scale -= 0.5 * width**-0.5 * jnp.sum(inputs**2, -1) + 0.5 * math.log(phi.shape[-1])
    elif arrays.scale is not None:
        scale = take_rows(arrays.scale, start, size)
    else:
        scale = jnp.zeros(inputs.shape[:3], jnp.float32)
    if arrays.mask is not None:
        scale = jnp.where(jax.lax.dynamic_slice_in_dim(arrays.mask, start, size, 1)[:, None], scale, -jnp.inf)
    return inputs, phi, value, scale


# The state: sums over the keys so far.


def first_state(plan: Plan, arrays: Arrays):
    if arrays.numerator is not None:
        return arrays.numerator, arrays.denominator, arrays.largest
    batch, _, heads, count = arrays.query.shape
    count = count if arrays.projection is None else arrays.projection.shape[1]
    largest = jnp.full((batch, heads), -jnp.inf if has_scale(plan, arrays) else 0.0, jnp.float32)
    shapes = (batch, heads, count, arrays.value.shape[-1]), (batch, heads, count)
    return *unknown(tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)), largest


def unknown(arrays):
    """The arrays, without XLA knowing that they are zeros where they are.

    In a sequence of one chunk the state is known, and one dot product of two that XLA gives to its library for CPUs then
    multiplies by whatever is in memory where the zeros should be (jaxlib 0.10 to 0.12).
    """
    return jax.tree.map(lambda x: x + 0.0 * jax.lax.broadcasted_iota(x.dtype, x.shape, x.ndim - 1), arrays)


def transposed(x, y):
    """x^T y over the chunk: [B, N, C, M], [B, N, C, V] -> [B, N, M, V]."""
    if x.shape[-1] > y.shape[-1]:  # XLA on a CPU turns the left operand
        return transposed(y, x).swapaxes(2, 3)
    return jnp.einsum("bncm,bncv->bnmv", x, y)


def add(state, phi, value, scale):
    """The state after the keys of a chunk, relative to the new maximum."""
    numerator, denominator, before = state
    if scale is None:
        return numerator + transposed(phi, value), denominator + phi.sum(2), before
    last = maximum_of(scale.max(-1), before)
    weights = jnp.exp(scale - finite(last)[..., None])
    decay = jnp.exp(before - finite(last))
    numerator = decay[..., None, None] * numerator + transposed(phi, weights[..., None] * value)
    denominator = decay[..., None] * denominator + jnp.einsum("bncm,bnc->bnm", phi, weights)
    return numerator, denominator, last


def maximum_of(scales, before):
    """The largest log scale, a constant to every derivative: it cancels, or is the unit of what it does not cancel from."""
    return jax.lax.stop_gradient(jnp.maximum(scales, before))


def relative(scale, maximum, transpose=False):
    """exp(r_s - c_t), 0 for s > t: [B, N, t, s], or [B, N, s, t]. Without scales, 1 for 0."""
    if isinstance(scale, int):
        tri = jnp.tri(scale, dtype=jnp.float32)
        return tri.T if transpose else tri
    size = scale.shape[-1]
    if transpose:
        exponent, visible = scale[..., :, None] - maximum[..., None, :], jnp.tri(size, dtype=bool).T
    else:
        exponent, visible = scale[..., None, :] - maximum[..., :, None], jnp.tri(size, dtype=bool)
    return jnp.exp(jnp.where(visible, exponent, -jnp.inf))


def over(total, eps):
    """1 / (total + eps), and 0 where that is no positive number."""
    total = total + eps
    positive = total > SMALLEST_DENOMINATOR
    return jnp.where(positive, 1 / jnp.where(positive, total, 1), 0)


# Forward and backward. Residuals: the weights 1 / denominator and the maxima, [B, N, T], and the last state.


@precision.full
def forward(plan: Plan, arrays: Arrays):
    (batch, length, heads), values = arrays.query.shape[:3], arrays.value.shape[-1]
    projection = scaled_projection(plan, arrays)
    scaled = has_scale(plan, arrays)
    like = jax.ShapeDtypeStruct((batch, length, heads, values), arrays.value.dtype)
    out, rows = empty(like), jnp.zeros((batch, heads, length), jnp.float32)

    def causal(carry, start, size):
        state, out, weight, maximum = carry
        numerator, denominator, before = state
        phi, _ = features(plan, take(arrays.query, start, size), projection)
        _, key, value, scale = key_chunk(plan, arrays, projection, start, size)
        sums, total = phi @ numerator, jnp.einsum("bncm,bnm->bnc", phi, denominator)
        if scaled:
            largest = maximum_of(jax.lax.cummax(scale, axis=2), before[..., None])
            maximum = put_rows(maximum, largest, start)
            past = jnp.exp(before[..., None] - finite(largest))
            sums, total = sums * past[..., None], total * past
            weights = relative(scale, finite(largest))
        else:
            weights = relative(size, None)
        weights = weights * (phi @ key.swapaxes(2, 3))
        one_over = over(total + weights.sum(-1), plan.eps)
        sums = (sums + weights @ value) * one_over[..., None]
        return add(state, key, value, scale), put(out, sums, start, arrays.value), put_rows(weight, one_over, start), maximum

    def keys(state, start, size):
        return add(state, *key_chunk(plan, arrays, projection, start, size)[1:])

    def queries(carry, start, size):
        out, weight = carry
        phi, _ = features(plan, take(arrays.query, start, size), projection)
        one_over = over(jnp.einsum("bncm,bnm->bnc", phi, state[1]), plan.eps)
        return put(out, phi @ state[0] * one_over[..., None], start, arrays.value), put_rows(weight, one_over, start)

    state = first_state(plan, arrays)
    if plan.is_causal:
        state, out, weight, maximum = sweep(length, chunk(), causal, (state, out, rows, rows if scaled else None))
    else:
        state = sweep(arrays.key.shape[1], BIDIRECTIONAL_CHUNK, keys, state)
        out, weight = sweep(length, BIDIRECTIONAL_CHUNK, queries, (out, rows))
        maximum = None
    return numbers(out, like.dtype), state, (weight, maximum, state)


def saved(plan: Plan, arrays: Arrays):
    """The outputs and residuals of the forward pass."""
    out, _, residuals = forward(plan, arrays)
    return out, residuals


@precision.full
def backward(plan: Plan, arrays: Arrays, out, residuals, gradients):
    run = _backward_causal if plan.is_causal else _backward_bidirectional
    projection = scaled_projection(plan, arrays)
    grad_query, grad_key, grad_value, grad_scale, grad_projection, of_state = run(
        plan, arrays, projection, out, residuals, gradients
    )
    if projection is not None:
        factor = projection.shape[1] ** -0.25 if plan.features == "softmax" else 1.0
        grad_projection = (grad_projection * factor).astype(arrays.projection.dtype)[None]
    else:
        grad_projection = None
    grads = grad_query, grad_key, grad_value, grad_scale
    grads = (None if like is None else numbers(x, like.dtype) for x, like in zip(grads, arrays[:4], strict=True))
    if arrays.numerator is None:
        of_state = None, None, None
    else:
        decay, numerator, denominator = of_state
        numerator, denominator = numerator * decay[..., None, None], denominator * decay[..., None]
        of_largest = jnp.sum(arrays.numerator * numerator, (2, 3)) + jnp.sum(arrays.denominator * denominator, 2)
        of_state = numerator, denominator, of_largest
    return Arrays(*grads, None, grad_projection, *of_state)


def _start(plan, arrays, projection):
    """Zeros to write gradients into: query, key, value, scale, projection."""
    zeros = [empty(x) for x in (arrays.query, arrays.key, arrays.value)]
    scale = None if arrays.scale is None else empty(arrays.scale)
    return *zeros, scale, None if projection is None else jnp.zeros_like(projection)


def _plus(total, more):
    return None if total is None else total + more


def of_numerators(weight, grad_out, start, size):
    """The gradients of the numerators of a chunk of queries."""
    return take(grad_out, start, size) * take_rows(weight, start, size)[..., None]


def of_denominators(out, grad, start, size):
    """Minus the gradients of the denominators of a chunk of queries, from those of the numerators."""
    return jnp.sum(grad * take(out, start, size), -1)


def _backward_bidirectional(plan, arrays, projection, out, residuals, gradients):
    (weight, _, (numerator, denominator, largest)), (grad_out, grad_state) = residuals, gradients
    grad_query, grad_key, grad_value, grad_scale, grad_projection = _start(plan, arrays, projection)

    def queries(carry, start, size):
        above, below, grad_query, grad_projection = carry
        inputs = take(arrays.query, start, size)
        phi, _ = features(plan, inputs, projection)
        grad = of_numerators(weight, grad_out, start, size)
        slope = of_denominators(out, grad, start, size)
        of_phi = grad @ numerator.swapaxes(2, 3) - slope[..., None] * denominator[:, :, None]
        of_inputs, of_projection = grad_inputs(plan, of_phi, phi, inputs, projection)
        above, below = above + transposed(phi, grad), below - jnp.einsum("bncm,bnc->bnm", phi, slope)
        return above, below, put(grad_query, of_inputs, start, arrays.query), _plus(grad_projection, of_projection)

    above, below, grad_query, grad_projection = sweep(
        arrays.query.shape[1], BIDIRECTIONAL_CHUNK, queries, (*grad_state[:2], grad_query, grad_projection)
    )

    def keys(carry, start, size):
        grad_key, grad_value, grad_scale, grad_projection = carry
        inputs, phi, value, scale = key_chunk(plan, arrays, projection, start, size)
        of_value = phi @ above
        of_phi = value @ above.swapaxes(2, 3) + below[:, :, None]
        if scale is not None:
            weights = jnp.exp(scale - finite(largest)[..., None])[..., None]
            of_value, of_phi = of_value * weights, of_phi * weights
        if grad_scale is not None:
            grad_scale = put_rows(grad_scale, jnp.sum(of_phi * phi, -1), start)
        of_inputs, of_projection = grad_inputs(plan, of_phi, phi, inputs, projection)
        grad_projection = _plus(grad_projection, of_projection)
        grad_key, grad_value = put(grad_key, of_inputs, start, arrays.key), put(grad_value, of_value, start, arrays.value)
        return grad_key, grad_value, grad_scale, grad_projection

    grads = sweep(arrays.key.shape[1], BIDIRECTIONAL_CHUNK, keys, (grad_key, grad_value, grad_scale, grad_projection))
    decay = None if arrays.largest is None else jnp.exp(arrays.largest - finite(largest))
    return grad_query, *grads, (decay, above, below)


def _backward_causal(plan, arrays, projection, out, residuals, gradients):
    (weight, maximum, last_state), (grad_out, grad_state) = residuals, gradients
    grad_query, grad_key, grad_value, grad_scale, grad_projection = _start(plan, arrays, projection)
    length, scaled = arrays.query.shape[1], has_scale(plan, arrays)

    def ahead(carry, start, size):
        """The gradients of the denominators and of the query, from the state before each chunk."""
        state, slopes, grad_query, grad_projection = carry
        numerator, denominator, before = state
        _, key, value, scale = key_chunk(plan, arrays, projection, start, size)
        grad = of_numerators(weight, grad_out, start, size)
        slope = of_denominators(out, grad, start, size)
        of_phi = grad @ numerator.swapaxes(2, 3) - slope[..., None] * denominator[:, :, None]
        if scaled:
            largest = finite(take_rows(maximum, start, size))
            of_phi *= jnp.exp(before[..., None] - largest)[..., None]
            weights = relative(scale, largest)
        else:
            weights = relative(size, None)
        of_phi += (weights * (grad @ value.swapaxes(2, 3) - slope[..., None])) @ key
        if plan.features == "given":
            of_inputs = of_phi
        else:
            inputs = take(arrays.query, start, size)
            phi, _ = features(plan, inputs, projection)
            of_inputs, of_projection = grad_inputs(plan, of_phi, phi, inputs, projection)
            grad_projection = _plus(grad_projection, of_projection)
        grad_query = put(grad_query, of_inputs, start, arrays.query)
        return add(state, key, value, scale), put_rows(slopes, slope, start), grad_query, grad_projection

    _, slopes, grad_query, grad_projection = sweep(
        length, chunk(), ahead, (first_state(plan, arrays), jnp.zeros_like(weight), grad_query, grad_projection)
    )
    first = first_state(plan, arrays)[2]

    def back(carry, start, size):
        """The gradients of key and value, from what all later queries send back, relative to the maximum here."""
        (above, below, last), grad_key, grad_value, grad_scale, grad_projection = carry
        inputs, key, value, scale = key_chunk(plan, arrays, projection, start, size)
        phi, _ = features(plan, take(arrays.query, start, size), projection)
        grad, slope = of_numerators(weight, grad_out, start, size), take_rows(slopes, start, size)
        of_value, of_phi = key @ above, value @ above.swapaxes(2, 3) + below[:, :, None]
        if scaled:
            after = jnp.exp(scale - finite(last)[..., None])[..., None]
            of_value, of_phi = of_value * after, of_phi * after
            largest = finite(take_rows(maximum, start, size))
            weights = relative(scale, largest, transpose=True)
        else:
            weights = relative(size, None, transpose=True)
        of_value += (weights * (key @ phi.swapaxes(2, 3))) @ grad
        of_phi += (weights * (value @ grad.swapaxes(2, 3) - slope[..., None, :])) @ phi
        if scaled:
            before = take_rows(maximum, jnp.maximum(start - 1, 0), 1)[..., 0]
            before = jnp.where(start == 0, first, before)
            decay, past = jnp.exp(before - finite(last)), jnp.exp(before[..., None] - largest)
            above, below = above * decay[..., None, None], below * decay[..., None]
            grad, slope, last = grad * past[..., None], slope * past, before
        above, below = above + transposed(phi, grad), below - jnp.einsum("bncm,bnc->bnm", phi, slope)
        if grad_scale is not None:
            grad_scale = put_rows(grad_scale, jnp.sum(of_phi * key, -1), start)
        of_inputs, of_projection = grad_inputs(plan, of_phi, key, inputs, projection)
        grad_projection = _plus(grad_projection, of_projection)
        grad_key, grad_value = put(grad_key, of_inputs, start, arrays.key), put(grad_value, of_value, start, arrays.value)
        return (above, below, last), grad_key, grad_value, grad_scale, grad_projection

    later, *grads = sweep(
        length, chunk(), back,
        ((*unknown(grad_state[:2]), last_state[2]), grad_key, grad_value, grad_scale, grad_projection), reverse=True,
    )  # fmt: skip
    return grad_query, *grads, (jnp.ones_like(later[2]), later[0], later[1])


# Compiled once per plan and shape also for callers who compile nothing; inside their `jit` it is part of theirs.
_run = jax.jit(differentiable(forward, backward), static_argnums=0)
