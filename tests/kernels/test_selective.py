"""The selective scan: states step by step, chunks that end anywhere, memory, and the authors' code."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import ssm
from subquad.kernels.selective import xla
from tests import oracle
from tests.zoo.test_contract import arrays_of

B, T, D, N = 2, 11, 3, 4


def draw(length=T, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    step = np.exp(rng.uniform(-4, 1, (B, length, D))).astype(np.float32)
    diagonal = -np.exp(normal(D, N))
    return normal(B, length, D), step, diagonal, normal(B, length, N), normal(B, length, N), normal(B, D, N)


def outputs_and_gradients(arrays, **options):
    def loss(arrays):
        outputs, state = ssm.selective_scan(*arrays, return_state=True, **options)
        weights = jnp.arange(1.0, 1 + outputs.size).reshape(outputs.shape) / outputs.size
        return jnp.sum(weights * outputs) + jnp.sum(state**2), (outputs, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def test_the_formula_step_by_step():
    u, step, a, into, out, state = (np.float64(x) for x in draw())
    expected, h = np.zeros((B, T, D)), state.copy()
    for b, t, d in np.ndindex(B, T, D):
        h[b, d] = np.exp(step[b, t, d] * a[d]) * h[b, d] + step[b, t, d] * u[b, t, d] * into[b, t]
        expected[b, t, d] = out[b, t] @ h[b, d]
    for implementation in ("xla", "reference"):
        outputs, last = ssm.selective_scan(*draw(), return_state=True, implementation=implementation)
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(last, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("walk", [xla.steps, xla.tree])
def test_chunks_end_anywhere(monkeypatch, walk):
    """With a ragged one in front, by steps and by the tree that accelerators take; segments begin inside of them."""
    ids = jnp.asarray([[0] * 3 + [1] * 8, [0] * 5 + [2] + [0] * 5])
    want = outputs_and_gradients(draw(), segment_ids=ids, implementation="reference")
    monkeypatch.setattr(xla, "LEAST", 3)
    monkeypatch.setattr(xla, "MOST", 3)
    arrays = tuple(map(jnp.asarray, draw()))
    breaks = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    monkeypatch.setattr(ssm, "selective_scan", lambda *arrays, **_: xla._scan((0, walk), *arrays, breaks))
    got = outputs_and_gradients(arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_a_step_of_nothing_holds_the_state():
    u, step, *rest = draw()
    last = ssm.selective_scan(u[:, :6], step[:, :6], rest[0], *(x[:, :6] for x in rest[1:3]), rest[3], return_state=True)[1]
    step[:, 6:] = 0
    np.testing.assert_allclose(ssm.selective_scan(u, step, *rest, return_state=True)[1], last, atol=1e-6)


def test_states_are_never_all_in_memory():
    length, features, states = 4096, 32, 16
    shapes = [(1, length, features)] * 2 + [(features, states)] + [(1, length, states)] * 2
    loss = lambda *arrays: jnp.sum(ssm.selective_scan(*arrays, implementation="xla") ** 2)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(*arrays)
    largest = max(math.prod(aval.shape) for aval in arrays_of(jaxpr.jaxpr))
    assert largest <= length * features


def test_oracle():
    """The authors' reference, the term D u and the gate of its layer around the scan."""
    peer = oracle.load("mamba_selective_scan")

    def run(inputs, w):
        u, delta, into, out, z = (inputs[name].swapaxes(1, 2) for name in ("u", "delta", "B", "C", "z"))
        step = jax.nn.softplus(delta + w["delta_bias"])
        outputs, state = ssm.selective_scan(u, step, w["A"], into, out, return_state=True, implementation="xla")
        return {"y": ((outputs + w["D"] * u) * jax.nn.silu(z)).swapaxes(1, 2), "last_state": state}

    oracle.compare(None, peer, run)
