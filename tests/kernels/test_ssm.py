"""State space kernels against float64 linear algebra, against their own recurrences, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import convolution, dispatch, launch, machine_code, ssm
from subquad.zoo.statespace import hippo

IMPLEMENTATIONS = ("xla", "reference")
dplr_kernel = jax.jit(ssm.dplr_kernel, static_argnums=5, static_argnames="implementation")
diagonal_kernel = jax.jit(ssm.diagonal_kernel, static_argnums=2, static_argnames="implementation")
by_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def random_complex(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def system(features=4, pairs=6, rank=1, seed=0):
    """HiPPO-LegS, each entry jittered, with steps from 1e-3 to 1e-1: (Lambda, P, B, C, step), C with two rows."""
    jitter = lambda *shape, seed: 1 + 0.1 * random_complex(*shape, seed=seed)
    modes = hippo.legs_modes(2 * pairs)
    diagonal = modes.diagonal.real * (1 + 0.2 * np.random.default_rng(seed).random((features, pairs)))
    diagonal = diagonal + 1j * modes.diagonal.imag
    low_rank = modes.low_rank * jitter(rank, features, pairs, seed=seed + 1)
    inputs = modes.input_matrix * jitter(features, pairs, seed=seed + 2)
    outputs = random_complex(2, features, pairs, seed=seed + 3)
    arrays = (array.astype(np.complex64) for array in (diagonal, low_rank, inputs, outputs))
    return *arrays, np.geomspace(1e-3, 1e-1, features).astype(np.float32)


def discrete(diagonal, low_rank, inputs, step):
    """Dense A_bar and B_bar, over all modes, in complex128 (S4 eq. 3)."""
    both = lambda a: np.concatenate([a, a.conj()], -1).astype(np.complex128)
    diagonal, low_rank, inputs = both(diagonal), both(low_rank), both(inputs)
    matrix = np.stack([np.diag(row) for row in diagonal]) - np.einsum("rdp,rdq->dpq", low_rank, low_rank.conj())
    half, identity = step.astype(float)[:, None, None] / 2 * matrix, np.eye(diagonal.shape[-1])
    start = np.linalg.solve(identity - half, (step.astype(float)[:, None] * inputs)[..., None])
    return np.linalg.solve(identity - half, identity + half), start[..., 0]


def dplr_taps(diagonal, low_rank, inputs, outputs, step, length):
    decay, state = discrete(diagonal, low_rank, inputs, step)
    outputs = np.concatenate([outputs, outputs.conj()], -1)
    taps = []
    for _ in range(length):
        taps.append(np.einsum("kdp,dp->kd", outputs, state).real)
        state = np.einsum("dpq,dq->dp", decay, state)
    return np.stack(taps, -1)


def close_per_feature(actual, expected, tolerance):
    """Within `tolerance` of each feature's largest tap: slow systems have small ones."""
    assert actual.dtype == np.float32
    error = np.abs(np.asarray(actual, float) - expected[..., : actual.shape[-1]]).max(-1) / np.abs(expected).max(-1)
    assert error.max() < tolerance, error


# Discretisation.


@pytest.mark.parametrize("per_mode", [False, True])
@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretize(method, per_mode):
    diagonal, *_, step = system()
    step = np.geomspace(1e-6, 1e-1, 4).astype(np.float32)  # 1e-6: a naive exp(x) - 1 has no digits left
    step = step[:, None] * np.linspace(1, 2, 6, dtype=np.float32) if per_mode else step
    log_decay, scale = (np.asarray(a) for a in ssm.discretize(diagonal, step, method))
    scaled = (step if per_mode else step[:, None]).astype(float) * diagonal.astype(complex)
    if method == "zoh":
        expected_log, expected_scale = scaled, np.expm1(scaled) / diagonal
    else:
        expected_log = 2 * np.arctanh(scaled / 2)
        expected_scale = scaled / diagonal / (1 - scaled / 2)
    for ours, expected in ((log_decay, expected_log), (scale, expected_scale)):
        assert (np.abs(ours - expected) < 1e-6 * np.abs(expected)).all()


# Kernels.


@by_implementation
@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 100, 500])
def test_diagonal_kernel(implementation, length):
    diagonal, _, inputs, outputs, step = system()
    log_decay, scale = ssm.discretize(diagonal, step)
    taps = diagonal_kernel(log_decay, outputs * inputs * scale, length, implementation=implementation)
    scaled = step.astype(float)[:, None] * diagonal
    coefficients = outputs.astype(complex) * inputs * np.expm1(scaled) / diagonal
    expected = 2 * np.einsum("kdp,dpl->kdl", coefficients, np.exp(scaled[..., None] * np.arange(length))).real
    close_per_feature(taps, expected, 2e-5)


@by_implementation
@pytest.mark.parametrize("length,rank", [(1, 1), (2, 1), (63, 1), (64, 2), (100, 3), (256, 1), (257, 2)])
def test_dplr_kernel(implementation, length, rank):
    modes = system(rank=rank)
    taps = dplr_kernel(*modes, length, implementation=implementation)
    expected = dplr_taps(*modes, max(length, 64))  # a kernel of one tap may happen to be close to 0
    close_per_feature(taps, expected, 1e-5)


def test_dplr_kernel_at_the_papers_size():
    modes = system(features=2, pairs=32)
    close_per_feature(dplr_kernel(*modes, 1000), dplr_taps(*modes, 1000), 2e-5)


@pytest.mark.parametrize("length", [1, 24, 100])
def test_hardly_damped_modes_keep_their_digits(length):
    # On the unit circle the resolvent of such a mode is 1e6 times the answer, and its gradient worse.
    diagonal, low_rank, inputs, outputs, step = system()
    modes = (1j * diagonal.imag - 1e-4).astype(np.complex64), low_rank, inputs, outputs, step / 10
    close_per_feature(dplr_kernel(*modes, length), dplr_taps(*modes, max(length, 64)), 1e-5)
    gradients = lambda name: jax.jit(jax.grad(run_dplr(name, length, 1.0), argnums=range(5)))(*modes)
    with jax.enable_x64(True):
        modes = [np.asarray(a, np.complex128 if np.iscomplexobj(a) else float) for a in modes]
        exact = [np.asarray(g) for g in gradients("reference")]
    modes = [a.astype(np.complex64 if np.iscomplexobj(a) else np.float32) for a in modes]
    for ours, expected in zip(gradients("xla"), exact, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@by_implementation
def test_a_longer_kernel_begins_with_the_shorter(implementation):
    # state-spaces/s4 trains C (I - A_bar^L) for one L; here C is C.
    modes = system()
    long = dplr_kernel(*modes, 700, implementation=implementation)
    short = dplr_kernel(*modes, 40, implementation=implementation)
    np.testing.assert_allclose(long[..., :40], short, atol=1e-5 * np.abs(short).max())


def test_leading_axes_are_free():
    diagonal, low_rank, inputs, outputs, step = system()
    expected = dplr_kernel(diagonal, low_rank, inputs, outputs, step, 9)
    nested = dplr_kernel(diagonal, low_rank, inputs, outputs[None], step, 9)
    single = dplr_kernel(diagonal, low_rank, inputs, outputs[0], step, 9)
    np.testing.assert_allclose(nested[0], expected, atol=1e-6)
    np.testing.assert_allclose(single, expected[0], atol=1e-6)
    log_decay, scale = ssm.discretize(diagonal, step)
    single = diagonal_kernel(log_decay, outputs[1] * scale, 9)
    np.testing.assert_allclose(single, diagonal_kernel(log_decay, outputs * scale, 9)[1], atol=1e-6)


def run_diagonal(implementation, length, weights):
    def loss(diagonal, low_rank, inputs, outputs, step):
        log_decay, scale = ssm.discretize(diagonal, step, "bilinear")
        coefficients = outputs * inputs * scale * (1 + jnp.sum(low_rank))  # low_rank: some gradient for it too
        return jnp.sum(weights * diagonal_kernel(log_decay, coefficients, length, implementation=implementation))

    return loss


def run_dplr(implementation, length, weights):
    return lambda *modes: jnp.sum(weights * dplr_kernel(*modes, length, implementation=implementation))


@pytest.mark.parametrize("run,rank,length", [(run_diagonal, 1, 63), (run_dplr, 1, 64), (run_dplr, 2, 7)])
def test_gradients(run, rank, length):
    modes = system(rank=rank)
    weights = np.random.default_rng(9).normal(size=(2, 4, length)).astype(np.float32)
    gradients = lambda name: jax.jit(jax.grad(run(name, length, weights), argnums=range(5)))
    with jax.enable_x64(True):
        exact = [np.asarray(a, np.complex128 if np.iscomplexobj(a) else float) for a in modes]
        expected = [np.asarray(g) for g in gradients("reference")(*exact)]
        double = [np.asarray(g) for g in gradients("xla")(*exact)]
    single = [np.asarray(g) for g in gradients("xla")(*modes)]
    for ours, low, right in zip(double, single, expected, strict=True):
        np.testing.assert_allclose(ours, right, atol=1e-9 * np.abs(right).max())
        np.testing.assert_allclose(low, right, atol=1e-4 * np.abs(right).max())


# Recurrences.


def recurrence(kind, implementation="xla"):
    """(inputs, state) -> (outputs, state), and the taps of the same systems."""
    diagonal, low_rank, inputs, outputs, step = system(rank=2)
    if kind == "dplr":
        modes = diagonal, low_rank, inputs, outputs[0], step
        run = lambda u, state=None: ssm.dplr_recurrence(u, *modes, state, implementation=implementation)
        return run, lambda length: dplr_kernel(*modes, length)
    log_decay, scale = ssm.discretize(diagonal, step, kind)
    run = lambda u, state=None: ssm.diagonal_scan(
        u, log_decay, inputs * scale, outputs[0], state, return_state=True, implementation=implementation
    )
    return run, lambda length: diagonal_kernel(log_decay, outputs[0] * inputs * scale, length)


@by_implementation
@pytest.mark.parametrize("kind", ["dplr", "zoh", "bilinear"])
def test_convolution_equals_recurrence(kind, implementation):
    run, taps = recurrence(kind, implementation)
    u = np.random.default_rng(1).normal(size=(2, 200, 4)).astype(np.float32)
    expected = convolution.convolve(u, taps(200))
    outputs, _ = jax.jit(run)(u)
    np.testing.assert_allclose(outputs, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["dplr", "zoh"])
def test_recurrence_in_pieces(kind):
    run, _ = recurrence(kind)
    u = np.random.default_rng(1).normal(size=(2, 30, 4)).astype(np.float32)
    whole, last = run(u)
    state, pieces = None, []
    for start, stop in ((0, 1), (1, 2), (2, 20), (20, 30)):
        outputs, state = run(u[:, start:stop], state)
        pieces.append(outputs)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, atol=5e-6)
    np.testing.assert_allclose(state, last, atol=5e-6)
    assert state.shape == (2, 4, 12) and state.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["dplr", "zoh"])
def test_recurrences_agree_with_the_reference(kind):
    u = np.random.default_rng(1).normal(size=(2, 30, 4)).astype(np.float32)
    start = np.random.default_rng(2).normal(size=(2, 4, 12)).astype(np.float32)
    loss = lambda name: lambda u, state: sum(jnp.sum(x**2) for x in recurrence(kind, name)[0](u, state))
    ours, expected = (jax.jit(jax.value_and_grad(loss(name), argnums=(0, 1)))(u, start) for name in IMPLEMENTATIONS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, expected)


def test_slow_modes_keep_their_decay():
    # A_bar is I and a little: rounded as one number, what is left of that little has lost digits of the memory.
    diagonal, low_rank, inputs, outputs, step = system()
    modes = diagonal, low_rank, inputs, outputs[:1], step / 100
    impulse = np.zeros((1, 500, 4), np.float32)
    impulse[:, 0] = 1
    responses, _ = jax.jit(ssm.dplr_recurrence)(impulse, *modes[:3], modes[3][0], modes[4])
    close_per_feature(np.asarray(responses)[0].T[None], dplr_taps(*modes, 500), 1e-5)


@pytest.mark.parametrize("kind", ["dplr", "zoh"])
def test_recurrence_in_bfloat16_keeps_a_float32_state(kind):
    run, _ = recurrence(kind)
    u = jnp.asarray(np.random.default_rng(1).normal(size=(2, 30, 4)), jnp.bfloat16)
    outputs, state = run(u)
    assert outputs.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    np.testing.assert_allclose(state, run(u.astype(jnp.float32))[1], atol=5e-6)
    rounded = state.astype(jnp.bfloat16)
    np.testing.assert_array_equal(run(u, rounded)[0], run(u, rounded.astype(jnp.float32))[0])


# Cost.


def temporary(step, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(step).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("run", [run_diagonal, run_dplr])
def test_no_array_of_features_by_modes_by_length(run):
    features, pairs, length = 64, 32, 4096
    modes = [((features, pairs), jnp.complex64), ((1, features, pairs), jnp.complex64), ((features, pairs), jnp.complex64)]
    modes += [((1, features, pairs), jnp.complex64), ((features,), jnp.float32)]
    cauchy = features * pairs * length * 8  # bytes of that array
    used = [temporary(jax.grad(run("xla", n, 1.0), argnums=range(5)), *modes) for n in (length, 2 * length)]
    assert used[0] < cauchy / 3
    assert used[1] < 2.2 * used[0]
    if run is run_diagonal:
        assert temporary(jax.grad(run("reference", length, 1.0), argnums=range(5)), *modes) > cauchy  # the test can fail


def test_recurrence_stores_no_states():
    run, _ = recurrence("dplr")
    states = 2 * 4096 * 4 * 12 * 4  # bytes of all states: B T D 2P
    assert temporary(lambda u: run(u), ((2, 4096, 4), jnp.float32)) < states / 2


# Resets.


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, pytest.param("interpret", marks=pytest.mark.interpret)])
def test_a_log_decay_of_minus_infinity_forgets_everything_before(implementation, dtype):
    """Of each feature one mode does, the other decays: as without the first mode, but for what a token reads of itself."""
    log_decay = np.array([[-np.inf, -0.1], [-0.2, -np.inf], [-np.inf, -np.inf]]).astype(dtype)
    into, out = (np.random.default_rng(i).normal(size=(3, 2)).astype(dtype) for i in range(2))
    inputs = np.random.default_rng(2).normal(size=(2, 70, 3)).astype(np.float32)
    state = np.random.default_rng(3).normal(size=(2, 3, 2 if dtype == "float32" else 4)).astype(np.float32)

    def run(log_decay, into, out, inputs, state, implementation):
        return ssm.diagonal_scan(inputs, log_decay, into, out, state, return_state=True, implementation=implementation)

    def with_gradients(log_decay, implementation):
        outputs, pull = jax.vjp(lambda *x: run(*x, implementation), log_decay, into, out, inputs, state)
        return outputs, pull(outputs)

    got = jax.jit(with_gradients, static_argnums=1)(log_decay, implementation)
    want = with_gradients(np.where(np.isinf(log_decay.real), -200, log_decay).astype(dtype), "reference")  # exp is 0, too
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    (outputs, last), (grad_decay, *_) = got
    assert not np.asarray(grad_decay)[np.isinf(log_decay.real)].any()
    alone = np.einsum("dp,btd->btd", (into * out).real * (1 if dtype == "float32" else 2), inputs)
    np.testing.assert_allclose(outputs[..., 2], alone[..., 2], rtol=1e-5)
    louder = run(log_decay, into, out, np.where(np.arange(70)[:, None] < 69, 1e6, 1) * inputs, 1e6 * state, implementation)
    np.testing.assert_array_equal(louder[0][:, -1, 2], outputs[:, -1, 2])
    np.testing.assert_array_equal(louder[1][:, 2], last[:, 2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_kernel_of_a_system_that_forgets_is_one_tap(implementation):
    log_decay, coefficients = jnp.full((2, 3), -jnp.inf, jnp.complex64), jnp.asarray(random_complex(2, 3))
    taps, pull = jax.vjp(lambda *x: diagonal_kernel(*x, 40, implementation=implementation), log_decay, coefficients)
    np.testing.assert_allclose(taps[:, 0], 2 * coefficients.real.sum(1), rtol=1e-5)
    assert not taps[:, 1:].any() and all(np.isfinite(x).all() for x in pull(taps))


# Bad input.


def test_bad_input_is_named():
    diagonal, low_rank, inputs, outputs, step = system()
    with pytest.raises(ValueError, match="discretize: method must be a known name, got 'zero'.*zoh"):
        ssm.discretize(diagonal, step, "zero")
    with pytest.raises(ValueError, match="diagonal_kernel: length must be an integer of at least 1"):
        ssm.diagonal_kernel(diagonal, outputs, 0)
    with pytest.raises(ValueError, match="diagonal_kernel: coefficients must end in the axes"):
        ssm.diagonal_kernel(diagonal, outputs[..., :3], 5)
    with pytest.raises(ValueError, match=r"dplr_kernel: low_rank must have shape \[R, D, P\]"):
        ssm.dplr_kernel(diagonal, low_rank[:, :2], inputs, outputs, step, 5)
    # Read as 4 columns of rank one, it would be a system of its own.
    with pytest.raises(ValueError, match=r"dplr_recurrence: low_rank must have shape .*low_rank\[None\]"):
        ssm.dplr_recurrence(jnp.ones((2, 5, 4)), diagonal, low_rank[0], inputs, outputs[0], step)
    with pytest.raises(ValueError, match="dplr_recurrence: inputs must have shape"):
        ssm.dplr_recurrence(jnp.ones((2, 5, 3)), diagonal, low_rank, inputs, outputs[0], step)
    with pytest.raises(ValueError, match="diagonal_scan: state must have shape"):
        ssm.diagonal_scan(jnp.ones((2, 5, 4)), diagonal, inputs, outputs[0], jnp.ones((2, 4, 6)))
    with pytest.raises(NotImplementedError, match="'triton' does not exist for this operation"):
        ssm.dplr_kernel(diagonal, low_rank, inputs, outputs, step, 5, implementation="triton")


def test_more_modes_than_the_registers_hold_are_declined():
    modes = jnp.ones((2, 129), jnp.complex64)
    with launch.recording(), pytest.raises(dispatch.Declined, match="129 modes|interpreter"):
        ssm.diagonal_scan(jnp.ones((1, 20, 2)), modes, modes, modes, implementation="triton")


@pytest.mark.aot
@pytest.mark.parametrize("pairs,batch,dtype", [
    (16, 1, jnp.float32), (32, 64, jnp.complex64), (64, 64, jnp.float32), (128, 64, jnp.complex64), (128, 1, jnp.float32),
])
def test_no_number_of_modes_spills(pairs, batch, dtype):
    modes, tokens = jax.ShapeDtypeStruct((3, pairs), dtype), jax.ShapeDtypeStruct((batch, 4096, 3), jnp.bfloat16)
    loss = lambda *x: jnp.sum(ssm.diagonal_scan(*x, implementation="triton").astype(jnp.float32) ** 2)
    with launch.recording() as launches:
        jax.eval_shape(jax.grad(loss), tokens, modes, modes, modes)
    for launched in launches:
        compiled = machine_code.compile(launched, "sm_90")
        assert compiled.spills == 0 and compiled.shared <= machine_code.SHARED_LIMIT["sm_90"], (launched, compiled)
    assert len(launches) >= 2
