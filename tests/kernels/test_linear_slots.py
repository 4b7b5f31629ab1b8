"""Reading slots: against the recurrence, token by token, with its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels.linear.slots import read_slots

B, T, N, H, M = 2, 70, 2, 5, 3


def draw():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    decay = -jnp.abs(normal(B, T, N, M)).at[0, 30].set(1e4)
    arrays = dict(query=normal(B, T, N, H), weight=normal(B, T, N, M), key=normal(B, T, N, H), log_decay=decay)
    return arrays | dict(initial_state=normal(B, N, M, H)), jnp.asarray(rng.uniform(size=(B, 1, 1, T)) < 0.8)


def step_by_step(query, weight, key, log_decay, initial_state, mask):
    state, outputs = initial_state, []
    for t in range(T):
        real = mask[:, 0, 0, t, None, None]
        new = jnp.exp(log_decay[:, t])[..., None] * state + weight[:, t, ..., None] * key[:, t, :, None]
        state = jnp.where(real[..., None], new, state)
        outputs.append(jnp.where(real, jnp.einsum("bnmh,bnh->bnm", state, query[:, t]), 0))
    return jnp.stack(outputs, 1), state


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_the_formula_and_its_gradients(implementation):
    arrays, mask = draw()
    with_gradients = lambda run: jax.jit(lambda arrays: jax.vjp(run, arrays))(arrays)
    got, pull = with_gradients(lambda x: read_slots(**x, mask=mask, implementation=implementation))
    want, pull_back = with_gradients(lambda x: step_by_step(**x, mask=mask))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), want)
    for name, gradient in pull_back(cotangents)[0].items():
        np.testing.assert_allclose(pull(cotangents)[0][name], gradient, atol=1e-4, err_msg=name)


def test_forward_derivatives_of_the_reference():
    arrays, mask = draw()
    run = lambda x: read_slots(**dict(arrays, query=x), mask=mask, implementation="reference")[0]
    _, along = jax.jvp(run, (arrays["query"],), (arrays["key"],))
    np.testing.assert_allclose(along, run(arrays["key"]), atol=1e-5)


def test_half_precision_keeps_its_dtype():
    arrays, _ = draw()
    half = {name: x.astype(jnp.bfloat16) if name in ("query", "weight", "key") else x for name, x in arrays.items()}
    outputs, state = read_slots(**half)
    exact, _ = read_slots(**{name: x.astype(jnp.float32) for name, x in half.items()})
    assert (outputs.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(outputs.astype(jnp.float32), exact, atol=0.1)
