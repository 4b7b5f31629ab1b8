"""First-order recurrences: what is refused, degenerate decays, pieces, segments and chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, scan, specs, tuning
from subquad.kernels.scan import xla

IMPLEMENTATIONS = ["reference", "xla", pytest.param("interpret", marks=pytest.mark.interpret)]

first_order = jax.jit(scan.first_order, static_argnames=("reverse", "implementation"))


def draw(length, *, decay=None, batch=2, features=3, is_complex=False, seed=0):
    """decay of the shape given (default: of every token), inputs, initial_state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape) + (1j * rng.normal(size=shape) if is_complex else 0)
    dtype = np.complex64 if is_complex else np.float32
    a = normal(*(decay or (batch, length)), features)
    a *= rng.uniform(0.5, 1, a.shape) / np.abs(a)
    return a.astype(dtype), normal(batch, length, features).astype(dtype), normal(batch, features).astype(dtype)


def loop(decay, inputs, state, reverse=False):
    """The definition, in double precision."""
    wide = np.complex128 if np.iscomplexobj(inputs) else np.float64
    decay, states = np.broadcast_to(decay, inputs.shape), np.zeros(inputs.shape, wide)
    state = state.astype(wide)
    for t in range(inputs.shape[1])[:: -1 if reverse else 1]:
        state = states[:, t] = decay[:, t] * state + inputs[:, t]
    return states, state


def outputs_and_gradients(run, *arrays):
    """States, last state, and the gradients of all arrays for cotangents of normal numbers."""

    @jax.jit
    def both(*arrays):
        outputs, pull = jax.vjp(run, *arrays)
        rng = np.random.default_rng(1)
        return *outputs, *pull(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs))

    return both(*arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("decay", [None, (1, 1), (2, 1), (1, 17)])
def test_values_are_the_definition(decay, reverse, implementation):
    for is_complex in (False, True):
        arrays = draw(17, decay=decay, is_complex=is_complex)
        got = first_order(*arrays, reverse=reverse, implementation=implementation)
        for ours, theirs in zip(got, loop(*arrays, reverse), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_token_is_one_step(implementation):
    decay, inputs, state = draw(1)
    for reverse in (False, True):
        states, last = first_order(decay, inputs, state, reverse=reverse, implementation=implementation)
        np.testing.assert_allclose(states[:, 0], decay[:, 0] * state + inputs[:, 0], rtol=1e-6)
        np.testing.assert_array_equal(last, states[:, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_continue_each_other(reverse, implementation):
    decay, inputs, state = draw(23)
    whole, end = first_order(decay, inputs, state, reverse=reverse, implementation=implementation)
    pieces = [slice(0, 1), slice(1, 14), slice(14, 23)]
    for piece in pieces[:: -1 if reverse else 1]:
        states, state = first_order(decay[:, piece], inputs[:, piece], state, reverse=reverse, implementation=implementation)
        np.testing.assert_allclose(states, whole[:, piece], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_state_is_zero(implementation):
    decay, inputs, state = draw(9)
    without = first_order(decay, inputs, implementation=implementation)
    for one, other in zip(without, first_order(decay, inputs, 0 * state, implementation=implementation), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", [0.0, 1e-30, -1.0, 1.2])
def test_degenerate_decays(decay, implementation):
    """What forgets at once, never, or grows: nothing divides by a product of decays, which is 0 or infinite here."""
    _, inputs, state = draw(150)
    decay = np.full(inputs.shape, decay, np.float32)
    got = outputs_and_gradients(functools.partial(scan.first_order, implementation=implementation), decay, inputs, state)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (decay, inputs, state)]
        want = outputs_and_gradients(functools.partial(scan.first_order, implementation="reference"), *wide)
    for ours, theirs, exact in zip(got, want, (*loop(decay, inputs, state), None, None, None), strict=True):
        assert specs.error(ours, theirs) < 1e-5
        assert exact is None or specs.error(ours, exact) < 1e-5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_state_is_float32_for_bfloat16(implementation):
    """Counting to 600: bfloat16 stops at 256."""
    ones = jnp.ones((1, 600, 2), jnp.bfloat16)
    states, last = first_order(ones[:, :1], ones, implementation=implementation)
    assert states.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    np.testing.assert_array_equal(last, 600)
    np.testing.assert_array_equal(states, np.broadcast_to(np.arange(1, 601)[None, :, None], (1, 600, 2)).astype(states.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_complex_argument_makes_all_complex(implementation):
    decay, inputs, state = draw(6)
    plain = first_order(decay, inputs, state, implementation=implementation)
    for place in range(3):
        arrays = [x.astype(np.complex64) if i == place else x for i, x in enumerate((decay, inputs, state))]
        got = first_order(*arrays, implementation=implementation)
        for ours, theirs in zip(got, plain, strict=True):
            assert ours.dtype == jnp.complex64
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_some_arguments(implementation):
    """What is not mapped is shared, and its gradient is a sum."""
    decay, inputs, state = draw(11, decay=(1, 1))
    many = np.stack([inputs, 2 * inputs, -inputs])
    run = lambda *x: first_order(*x, implementation=implementation)[0].sum()
    mapped = lambda decay, many, state: jax.vmap(run, (None, 0, None))(decay, many, state).sum()
    looped = lambda decay, many, state: sum(run(decay, one, state) for one in many)
    for ours, theirs in zip(*(jax.grad(f, (0, 1, 2))(decay, many, state) for f in (mapped, looped)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_jacobian_of_one_sample(implementation):
    """Only a decay may have a batch of 1 beside others that have more: a state and its cotangent are those of each sample."""
    decay, inputs, state = draw(5, decay=(1, 1), batch=1)
    run = lambda *arrays: first_order(*arrays, implementation=implementation)[0]
    got = jax.jit(jax.jacrev(run, (0, 1, 2)))(decay, inputs, state)
    rows = jax.jit(jax.jacfwd(lambda *arrays: first_order(*arrays, implementation="reference")[0], (0, 1, 2)))
    for ours, theirs in zip(got, rows(decay, inputs, state), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "decay", "is_complex"), [(1, None, False), (7, (1, 7), False), (16, (2, 1), False), (29, None, True)]
)
def test_chunks_are_steps(length, decay, is_complex, reverse):
    """What runs on an accelerator without Triton gives what runs on a CPU."""
    arrays = draw(length, decay=decay, is_complex=is_complex)
    run = lambda chunk: outputs_and_gradients(lambda *x: xla._scan((reverse, chunk), *x), *arrays)
    got, want = run(8), run(1)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("decay", [None, (1, 1)])
def test_segments_and_ragged_tiles(decay, is_complex, monkeypatch):
    """Time cut into segments of several tiles, features into blocks, both with a ragged end."""
    from subquad.kernels.scan import triton

    small = tuning.Config(dict(SEGMENTS=3, BLOCK_T=8, BLOCK_D=2))
    monkeypatch.setattr(triton, "config", lambda *arguments: small)
    arrays = draw(37, decay=decay, is_complex=is_complex)
    for reverse in (False, True):
        options = dict(reverse=reverse, implementation="interpret")
        got = outputs_and_gradients(functools.partial(scan.first_order, **options), *arrays)
        want = outputs_and_gradients(functools.partial(scan.first_order, **options | dict(implementation="xla")), *arrays)
        for ours, theirs in zip(got, want, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpret
def test_what_the_kernel_declines():
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in draw(4)]
        with pytest.raises(dispatch.Declined, match="float64, and the kernels take float32, bfloat16, float16, complex64 only"):
            scan.first_order(*arrays, implementation="interpret")


def test_memory_is_that_of_the_states():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8192, 64), (1, 8192, 64), (1, 64))]
    loss = lambda *x: jnp.sum(scan.first_order(*x, implementation="xla")[0] ** 2)
    used = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 3.5 * 8192 * 64 * 4


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(inputs=(5, 3)), ValueError, "inputs must have shape"),
        (dict(inputs=(2, 0, 3)), ValueError, "inputs must have shape .* every axis at least 1"),
        (dict(decay=(5, 3)), ValueError, "decay must have shape"),
        (dict(decay=(3, 5, 3)), ValueError, r"decay must have shape \[B, T, D\] = \[2 or 1, 5 or 1, 3\]"),
        (dict(decay=(2, 4, 3)), ValueError, "decay must have shape"),
        (dict(decay=(2, 5, 1)), ValueError, "decay must have shape"),
        (dict(initial_state=(1, 3)), ValueError, r"initial_state must have shape \[B, D\] = \[2, 3\]"),
        (dict(dtype=dict(decay=jnp.int32)), TypeError, "decay must be floating or complex, got int32"),
        (dict(dtype=dict(inputs=jnp.int32)), TypeError, "inputs must be floating or complex, got int32"),
        (dict(dtype=dict(initial_state=jnp.bool_)), TypeError, "initial_state must be floating or complex, got bool"),
        (dict(implementation="tritan"), ValueError, "Did you mean 'triton'"),
        (dict(implementation="cudnn"), NotImplementedError, "'cudnn' does not exist for this operation"),
    ],
)
def test_refusals(change, error, says):
    shapes = dict(decay=(2, 5, 3), inputs=(2, 5, 3), initial_state=(2, 3))
    shapes |= {name: shape for name, shape in change.items() if name in shapes}
    arrays = {name: jnp.ones(shape, change.get("dtype", {}).get(name, jnp.float32)) for name, shape in shapes.items()}
    with pytest.raises(error, match=f"scan.first_order: .*{says}"):
        scan.first_order(**arrays, implementation=change.get("implementation"))
