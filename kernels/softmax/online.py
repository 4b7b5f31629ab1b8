"""The online softmax: one tile of logits after another, with the running maximum and sum of each row.

Shared by every operation that visits attention tile by tile. Logits are float32 with -inf where a key is not seen; any
batch axes `...` come first. They may be of any finite size: float32 has no room for log(normaliser) beside a maximum of
1e10, so the backward pass is given the two apart.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import checks


class State(NamedTuple):
    """What a row remembers of the tiles so far."""

    maximum: Float[Array, "... T"]
    normaliser: Float[Array, "... T"]  # sum of exp(logit - maximum)
    accumulator: Float[Array, "... T V"]  # sum of exp(logit - maximum) value


def rounded(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Logits that were just multiplied, at most the largest finite number.

    A compiler that may contract x * y - z into one operation would else subtract a maximum that was rounded from a product
    that was not: beyond 1e9 the difference is hundreds, and exp of it overflows. A comparison between the two forbids that.
    """
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max)


def start(rows: tuple[int, ...], features: int, dtype) -> State:
    """The state of rows that have seen nothing."""
    return State(jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros((*rows, features), dtype))


def update(state: State, logits: Float[Array, "... T S"], weigh) -> State:
    """The state after one more tile; `weigh` maps weights [..., T, S] to their sum of values [..., T, V]."""
    maximum = jnp.maximum(state.maximum, logits.max(-1))
    # A row that has seen nothing has maximum -inf, and -inf - -inf is not 0.
    shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(state.maximum - shift)
    normaliser = state.normaliser * decay + weights.sum(-1)
    return State(maximum, normaliser, state.accumulator * decay[..., None] + weigh(weights))


def finish(state: State) -> tuple[Float[Array, "... T V"], Float[Array, "... T"], Float[Array, "... T"]]:
    """Outputs, maximum and log(normaliser), whose sum is the log-sum-exp; 0, -inf and 0 for rows that have seen nothing."""
    empty = state.normaliser == 0
    normaliser = jnp.where(empty, 1.0, state.normaliser)
    return state.accumulator / normaliser[..., None], jnp.where(empty, -jnp.inf, state.maximum), jnp.log(normaliser)


def counted(logits: Float[Array, "... T S"], counts: Float[Array, "... T S"]):
    """The weights of keys that a row sees so many times, and the log-sum-exp; 0 and -inf for rows that see nothing."""
    seen = counts > 0
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-jnp.inf))
    largest = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = counts * jnp.exp(jnp.where(seen, logits - largest, 0))
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total > 0, total, 1)
    return weights / safe, jnp.where(total > 0, largest + jnp.log(safe), -jnp.inf)[..., 0]


def split_lse(lse: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A log-sum-exp as maximum and log(normaliser): the latter is 0, and has the gradient of the log-sum-exp."""
    maximum = jax.lax.stop_gradient(lse)
    empty = jnp.isneginf(maximum)
    return maximum, jnp.where(empty, 0.0, lse) - jnp.where(empty, 0.0, maximum)


def merge(outs, maxima, log_normalisers):
    """One result from those of disjoint sets of keys, each given first axis first: (out, maximum, log(normaliser)).

        y = sum_i w_i y_i / sum_i w_i,    w_i = exp(maximum_i - max_j maximum_j) normaliser_i
    """
    maximum = jax.lax.stop_gradient(functools.reduce(jnp.maximum, maxima))
    shift = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = [jnp.exp(jax.lax.stop_gradient(x) - shift + y) for x, y in zip(maxima, log_normalisers, strict=True)]
    total = sum(weights)
    total = jnp.where(total == 0, 1.0, total)
    mixed = sum((weight / total)[..., None] * out.astype(weight.dtype) for weight, out in zip(weights, outs, strict=True))
    return mixed.astype(outs[0].dtype), maximum, jnp.log(total)


def weights_of(logits, maximum, log_normaliser):
    """The weights of a row, computed again in the backward pass; `maximum` of `backward_rows`.

    Logits that come out of another product may be above their maximum, by a rounding that is hundreds at 1e10.
    """
    return jnp.exp(jnp.minimum(logits - maximum, 0) - log_normaliser)


def backward_rows(out, sums, grad_out, grad_lse, is_masked: bool, *queries):
    """What the backward pass needs of each row, in float32: (*sums, delta, *queries).

    With weights p = exp(logits - lse) the gradient of the logits is p * (grad_out . value - delta), where
    delta = grad_out . out - grad_lse. An empty row gets +inf as the first of its sums, so that its weights are 0 and not NaN.

    Args:
        sums: maximum and log(normaliser) of each row, or the log-sum-exp alone.
        is_masked: whether queries may be padding, which holds anything: one that saw nothing, or that `checks.may_be_padding`
            names, then counts as 0, and its row as empty.
    """
    first, *rest = sums
    empty = jnp.isneginf(first)
    # A product is much faster on a CPU than a sum over the last axis.
    options = dict(preferred_element_type=first.dtype, precision=jax.lax.Precision.HIGHEST)
    delta = jnp.einsum("...v,...v->...", grad_out, out, **options) - grad_lse
    if is_masked:
        empty |= checks.may_be_padding(queries, grad_out, jnp.asarray(grad_lse)[..., None])[..., 0]
        queries = (jnp.where(empty[..., None], 0, query) for query in queries)
    return jnp.where(empty, jnp.inf, first), *(jnp.where(empty, 0.0, x) for x in (*rest, delta)), *queries
