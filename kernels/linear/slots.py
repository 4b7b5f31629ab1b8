"""Slots: the rows of a state that decays, each read by a query. The gated recurrence reads their mixture."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import checks, dispatch, precision
from subquad.kernels.axes import KeyMask
from subquad.kernels.linear import NO_WEIGHTS, gated


def read_slots(
    query: Float[Array, "B T N H"],
    weight: Float[Array, "B T N M"],
    key: Float[Array, "B T N H"],
    log_decay: Float[Array, "B T N M"],
    *,
    mask: KeyMask | None = None,
    initial_state: Float[Array, "B N M H"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B T N M"], Float[Array, "B N M H"]]:
    """What a query reads in every slot of a state to which keys are written, and which decays.

        S_t = diag(exp(log_decay_t)) S_{t-1} + w_t k_t^T,   o_t = S_t q_t

    `gated` gives S_t^T c_t for a c_t of M numbers. It is linear in c, and c . (S q) = (S^T c) . q: the outputs here are its
    gradient of c at q, and of what they are made of, the derivatives are those of `gated` at a c that is the gradient of the
    outputs. So whatever implements `gated` does this too, and overflows as little.

    Cost: time and memory those of a gradient of `gated` with queries of M and values of H features, and of two in training.

    Args:
        query, key: H features.
        weight: how much of the key goes to each slot.
        log_decay: of each slot, at most 0; see `gated`.
        mask: padding, True = attend. A masked token leaves the state as it is and reads 0.
        initial_state: S before the first token. None: 0.
        implementation: of `gated`; with "reference" there are forward derivatives, too.
    Returns: [B, T, N, M] in the dtype of weight, and the state after the last token, float32.
    Raises: see `gated`.
    Numerics: see `gated`.
    Example:
        >>> ones, weight = jnp.ones((1, 3, 1, 2)), jnp.eye(3)[None, :, None]
        >>> read_slots(ones, weight, ones, jnp.zeros((1, 3, 1, 3)))[0][0, :, 0].tolist()
        [[2.0, 0.0, 0.0], [2.0, 2.0, 0.0], [2.0, 2.0, 2.0]]

    Source: the two passes of Zhang et al., Gated Slot Attention, NeurIPS 2024, arXiv 2409.07146, section 3; the transposition
        is ours.
    """
    checks.key_padding("linear.slots.read_slots", mask, *query.shape[:2], NO_WEIGHTS)
    query, weight, key, log_decay = checks.hide(mask, query, weight, key, log_decay)
    if initial_state is None:
        initial_state = jnp.zeros((len(query), *weight.shape[2:], query.shape[3]), jnp.float32)
    run = read if implementation == "reference" else read_and_transpose
    return run(implementation, query, weight, key, log_decay, initial_state)


def mixtures(implementation, mixture, weight, key, log_decay, state):
    """(S_t^T c_t of each token, the last state)."""
    return gated(mixture, weight, key, log_decay, initial_state=state, return_state=True, implementation=implementation)


def read(implementation, query, *written):
    # Whatever c is: the gradient of what is linear.
    c = jnp.zeros_like(written[0])
    _, pull, state = jax.vjp(lambda c: mixtures(implementation, c, *written), c, has_aux=True)
    return pull(query.astype(written[1].dtype))[0], state


read_and_transpose = jax.custom_vjp(read, nondiff_argnums=(0,))


def forward(implementation, query, *written):
    return read(implementation, query, *written), (query, written)


def backward(implementation, saved, gradients):
    query, written = saved
    grad_outputs, grad_state = gradients
    (mixed, _), pull = jax.vjp(lambda *written: mixtures(implementation, grad_outputs, *written), *written)
    return mixed.astype(query.dtype), *pull((query.astype(mixed.dtype), grad_state))


precision.define_passes(read_and_transpose, forward, backward)
