"""What `operation` makes of two functions, on one device; tests/kernels/test_mesh.py has more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import patterns, softmax, specs
from subquad.kernels.operation import operation
from tests.kernels import toy_attention

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3


def draw(*lead):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (1, 1, T, S)
    return [jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) for shape in shapes]


def run(*arrays, attend=None):
    attend = attend or toy_attention.attention
    out, log_total = attend(0.5, *arrays, jnp.arange(T) + S - T)
    return jnp.sum(out**2) + jnp.sum(jnp.sin(log_total))


def plain(*arrays):
    return run(*arrays, attend=lambda *words: toy_attention.forward(*words)[0])


def close(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert specs.error(one, other) < 2e-6


def test_gradients_and_second_derivatives():
    arrays = draw()
    close(jax.value_and_grad(run, range(4))(*arrays), jax.value_and_grad(plain, range(4))(*arrays))
    again = lambda loss: jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, *arrays[1:]) ** 2)))
    close(again(run)(arrays[0]), again(plain)(arrays[0]))
    without = [*arrays[:3], None]
    close(jax.grad(run)(*without), jax.grad(plain)(*without))


@pytest.mark.parametrize("mapped", [(0,), (1, 2), (3,), (0, 1, 2, 3)])
def test_vmap(mapped):
    """What is not mapped is shared; the bias is shared by the batch as well, which makes its gradient a sum."""
    many, one = draw(3), draw()
    arrays = [many[i] if i in mapped else one[i] for i in range(4)]
    axes = [0 if i in mapped else None for i in range(4)]
    both = lambda loss: jax.jit(jax.vmap(jax.value_and_grad(loss, range(4)), axes))(*arrays)
    close(both(run), both(plain))


def test_vmap_twice_under_remat_and_scan():
    words = lambda loss: jax.jit(jax.value_and_grad(lambda x: total(loss, x)))(draw(2, 3)[0])

    def total(loss, query):
        others = draw(2, 3)[1:]
        step = lambda carry, _: (carry + jnp.sum(jax.vmap(jax.vmap(jax.checkpoint(loss)))(query, *others)), None)
        return jax.lax.scan(step, 0.0, None, 2)[0]

    close(words(run), words(plain))


def test_export_leaves_the_batch_open():
    (size,) = jax.export.symbolic_shape("b")
    arrays = draw()
    shapes = [jax.ShapeDtypeStruct((size if x.shape[0] == B else 1, *x.shape[1:]), x.dtype) for x in arrays]
    exported = jax.export.export(jax.jit(jax.grad(run)))(*shapes)
    close(exported.call(*arrays), jax.grad(plain)(*arrays))


def test_residuals_that_are_arrays_or_outputs_are_not_stored_again():
    def forward(_, x, unused):
        y = jnp.exp(x)
        return y, (y, None, x, y + 1)

    def backward(_, residuals, grad):
        y, none, x, more = residuals
        assert none is None
        return grad * (y + 0 * x + 0 * more), None

    run = operation(forward, backward, arrays=("b n", "b n"), outputs="b n", saved=("b n",))
    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(lambda x: run(None, x, x), x)[1](x))(jnp.ones((2, 3)))
    calls = [line for line in str(jaxpr).splitlines() if "on_mesh[" in line]
    assert len(calls) == 2 and calls[0].split("=")[0].count("f32[2,3]") == 2, calls


def test_without_jit():
    """`jax.disable_jit`, to look into a layer: also where the traced operation has constants of its own."""
    x = jnp.ones((1, 9, 2, 4))
    run = lambda x: softmax.attention(x, x, x, pattern=patterns.Columns(3, ((0, 1),)) & patterns.CAUSAL, implementation="xla")
    want = jax.vjp(run, x)[1](x)[0]
    with jax.disable_jit():
        np.testing.assert_allclose(jax.vjp(run, x)[1](x)[0], want, atol=1e-6)
