"""S4 against the papers' formulas and against the authors' implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.kernels import convolution, ssm
from subquad.zoo import projection
from subquad.zoo.statespace import hippo
from subquad.zoo.statespace.s4 import S4
from tests import oracle


def u(length, features=4, batch=2, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, length, features)).astype(np.float32)


# HiPPO and the initialisations.


def test_hippo_legs_is_equation_2():
    matrix, inputs = hippo.legs(7)
    for n in range(7):
        assert inputs[n] == pytest.approx(np.sqrt(2 * n + 1))
        for k in range(7):
            expected = -np.sqrt(2 * n + 1) * np.sqrt(2 * k + 1) if n > k else -(n + 1) if n == k else 0
            assert matrix[n, k] == pytest.approx(expected)


@pytest.mark.parametrize("size", [2, 8, 64])
def test_legs_modes_are_the_hippo_system(size):
    # What a system does does not depend on its basis: compare C A^k B for C = P and C = B.
    matrix, inputs = hippo.legs(size)
    low_rank = np.sqrt(np.arange(size) + 0.5)
    modes = hippo.legs_modes(size)
    assert len(modes.diagonal) == size // 2 and (modes.diagonal.imag > 0).all()
    diagonal, drive, column = (np.concatenate([a, a.conj()]) for a in modes)
    dense = np.diag(diagonal) - np.outer(column, column.conj())
    for row, ours in ((low_rank, column), (inputs, drive)):
        state, mode_state = inputs, drive
        for _ in range(5):
            assert np.vdot(ours, mode_state) == pytest.approx(row @ state, rel=1e-9)
            state, mode_state = matrix @ state / size**2, dense @ mode_state / size**2


def test_hippo_legs_as_annotated_s4_has_it():
    peer = oracle.load("hippo_legs_init").outputs
    matrix, inputs = hippo.legs(8)
    # annotated-s4 returns -A.
    np.testing.assert_allclose(min((matrix, -matrix), key=lambda a: np.abs(a - peer["A"]).max()), peer["A"], atol=1e-12)
    np.testing.assert_allclose(inputs, peer["B"], atol=1e-12)
    np.testing.assert_allclose(np.sqrt(np.arange(8) + 0.5), peer["P"], atol=1e-12)
    theirs = peer["Lambda_re"] + 1j * peer["Lambda_im"]
    ours = hippo.legs_modes(8).diagonal
    ours = np.concatenate([ours, ours.conj()])
    np.testing.assert_allclose(np.sort_complex(1j * ours), np.sort_complex(1j * theirs), atol=1e-9)


def test_diagonal_initialisations():
    n = np.arange(8)
    lin, inv = (hippo.diagonal_modes(init, 16) for init in ("lin", "inv"))
    np.testing.assert_allclose(lin.diagonal, -0.5 + 1j * np.pi * n)
    np.testing.assert_allclose(inv.diagonal, -0.5 + 1j * 16 / np.pi * (16 / (2 * n + 1) - 1))
    np.testing.assert_allclose(lin.input_matrix, 1)
    # S4D-Inv approximates the frequencies of LegS.
    legs = np.sort(hippo.diagonal_modes("legs", 256).diagonal.imag)[::-1]
    inv = hippo.diagonal_modes("inv", 256).diagonal.imag
    np.testing.assert_allclose(inv[:5], legs[:5], rtol=0.05)


def test_diagonal_legs_approaches_dplr_legs():
    # S4D theorem 3: x' = Lambda x + B/2 u has the impulse responses of x' = A x + B u as the state grows. Compared through
    # C = V^* e_0, the first Legendre coefficient, at t = l step.
    def difference(size):
        matrix, inputs = hippo.legs(size)
        low_rank = np.sqrt(np.arange(size) + 0.5)
        normal = matrix + np.outer(low_rank, low_rank)
        identity, step = np.eye(size), 0.01

        def response(a, b):
            decay = np.linalg.solve(identity - step / 2 * a, identity + step / 2 * a)
            state, rows = np.linalg.solve(identity - step / 2 * a, b), []
            for _ in range(100):
                rows.append(state[:4])
                state = decay @ state
            return np.array(rows)

        return np.abs(response(matrix, inputs) - response(normal, inputs / 2)).mean()

    assert difference(256) < 0.5 * difference(64) < 0.25 * difference(16)


# The layer.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", ["dplr", "diagonal"])
def test_parameters(mode, is_causal):
    layer = S4(6, out_features=5, state_size=8, mode=mode, num_ssm=2, is_causal=is_causal, rngs=nnx.Rngs(0))
    shapes = {"/".join(map(str, path)): value[...].shape for path, value in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    expected = {
        "system/log_decay": (2, 4),
        "system/frequency": (2, 4),
        "system/input_matrix": (2, 4, 2),
        "system/low_rank": (2, 4, 2),
        "system/output_matrix": (1 if is_causal else 2, 6, 4, 2),
        "system/log_step": (6,),
        "skip": (6,),
        "out/kernel": (6, 10),
        "out/bias": (10,),
    }
    if mode == "diagonal":
        del expected["system/low_rank"]
    assert shapes == expected


def test_steps_lie_between_dt_min_and_dt_max():
    steps = np.exp(S4(2000, state_size=2, dt_min=1e-4, dt_max=1e-2, mode="diagonal", rngs=nnx.Rngs(0)).system.log_step[...])
    assert 1e-4 <= steps.min() < 1.1e-4 and 0.9e-2 < steps.max() <= 1e-2
    assert np.median(steps) == pytest.approx(1e-3, rel=0.2)  # log-uniform


def test_features_share_systems_in_turn():
    layer = S4(6, state_size=8, num_ssm=2, rngs=nnx.Rngs(0))
    layer.system.frequency[...] = layer.system.frequency[...].at[1].add(1.0)
    frequency = layer.system._system()[0].imag
    np.testing.assert_array_equal(frequency, frequency[np.array([0, 1, 0, 1, 0, 1])])
    assert (frequency[0] != frequency[1]).all()


@pytest.mark.parametrize("options", [
    dict(), dict(num_ssm=1, glu=False), dict(mode="diagonal"), dict(mode="diagonal", init="lin"),
    dict(mode="diagonal", init="inv", discretization="bilinear"),
], ids=str)
def test_convolution_equals_recurrence(options):
    layer = S4(4, is_causal=True, **options, rngs=nnx.Rngs(0))
    x = u(400)
    expected = jax.jit(lambda x: layer(x))(x)
    outputs, _ = jax.jit(lambda x: layer.extend(x, layer.init_cache(2, 400)))(x)
    np.testing.assert_allclose(outputs, expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["dplr", "diagonal"])
def test_no_time_passes_at_padding(mode):
    layer, x = S4(4, state_size=8, mode=mode, is_causal=True, rngs=nnx.Rngs(0)), u(11)
    extend = jax.jit(lambda x, cache, mask=None: layer.extend(x, cache, mask=mask))
    _, before = extend(x[:, :4], layer.init_cache(2, 20))
    mask = jnp.arange(7) < jnp.array([[[[0]]], [[[5]]]])
    outputs, after = extend(jnp.where(mask[:, 0, 0, :, None], x[:, 4:], jnp.nan), before, mask)
    expected, (state,) = extend(x[:, 4:9], before)
    np.testing.assert_array_equal(after.state[0], before.state[0])
    np.testing.assert_allclose(after.state[1], state[1], atol=2e-6)
    np.testing.assert_allclose(outputs[1, :5], expected[1], atol=2e-6)
    assert jnp.isfinite(outputs).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", ["dplr", "diagonal"])
def test_packed_sequences_are_as_alone(mode, is_causal):
    layer, x = S4(4, state_size=8, mode=mode, is_causal=is_causal, rngs=nnx.Rngs(0)), u(23)
    ids = jnp.asarray([3] * 6 + [1] * 10 + [3] * 7)
    run = jax.jit(lambda x, ids=None, mask=None: layer(x, segment_ids=ids, mask=mask))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:16]), run(x[:, 16:])], axis=1)
    packed = run(x, ids)
    np.testing.assert_allclose(packed, alone, atol=2e-5)
    # Segments go with their tokens where padding is taken out.
    is_real = jnp.asarray(np.random.default_rng(0).random((2, 31)) < 0.7).at[:, -1].set(True)
    place = jnp.clip(jnp.cumsum(is_real, axis=1) - 1, 0, 22)
    spread = jnp.where(is_real[..., None], jnp.take_along_axis(x, place[..., None], axis=1), jnp.nan)
    padded = run(spread, jnp.where(is_real, ids[place], 7), is_real[:, None, None])
    for sample in range(2):
        count = min(int(is_real[sample].sum()), 23)
        expected = run(x[sample : sample + 1, :count], ids[:count])[0]
        np.testing.assert_allclose(padded[sample][is_real[sample]][:count], expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["dplr", "diagonal"])
def test_bidirectional_layers_count_the_present_token_once(mode):
    """One kernel over the present token and those before it, the other over those after it, from the next one on."""
    system, x = S4(4, state_size=8, mode=mode, rngs=nnx.Rngs(0)).system, np.asarray(u(9))
    past, ahead = np.asarray(system.kernel(9))
    expected = np.zeros_like(x)
    for t in range(9):
        for s in range(9):
            expected[:, t] += (past[:, t - s] if s <= t else ahead[:, s - t - 1]) * x[:, s]
    np.testing.assert_allclose(system.respond(jnp.asarray(x)), expected, rtol=0, atol=1e-5 * abs(expected).max())


def test_many_features_are_kernels_in_groups():
    """64 states of 52 features have too many powers to be kept at once; each feature's kernel is in its own place."""
    system = S4(52, rngs=nnx.Rngs(0)).system
    taps = jax.jit(lambda: system.kernel(64))()
    assert len(ssm.xla.feature_groups((52, 32), 3)[0](taps[0], 0)) == 2
    system.implementation = "reference"
    expected = jax.jit(lambda: system.kernel(64))()
    np.testing.assert_allclose(taps, expected, rtol=0, atol=1e-4 * abs(expected).max())


def test_memory_lasts_as_long_as_the_step_says():
    def late(step):  # the largest tap after 1000 tokens, of the largest of all
        layer = S4(4, mode="diagonal", dt_min=step, dt_max=step, rngs=nnx.Rngs(0))
        taps = np.abs(layer.system.kernel(1400)[0])
        return taps[:, 1000:].max() / taps.max()

    assert late(1e-3) > 0.1 > 1e-3 > late(1e-1)


@pytest.mark.parametrize("options,words", [
    (dict(state_size=7), "state_size must be even, got 7"),
    (dict(state_size=0), "state_size must be a positive integer"),
    (dict(num_ssm=3), "num_ssm must divide in_features = 4, got 3"),
    (dict(mode="dense"), "mode must be a known name, got 'dense'"),
    (dict(mode="diagonal", init="linear"), "init must be a known name, got 'linear'. Did you mean 'lin'"),
    (dict(init="lin"), "init must be 'legs' when mode is 'dplr'"),
    (dict(discretization="zoh"), "discretization must be 'bilinear' when mode is 'dplr'"),
    (dict(dt_min=0.2), r"dt_min must be a number in \(0, 0.1\]"),
])
def test_bad_options_are_named(options, words):
    with pytest.raises(ValueError, match=f"S4: {words}"):
        S4(4, **options, rngs=nnx.Rngs(0))


# The authors' implementations. Theirs have inputs [B, H, L], A = -exp(A_real) - i A_imag, and one mode per conjugate pair.


# Their C~ is undone by a matrix inverse; gradients of decays are a thousandth of those of the skip, and meant to be right.
PRECISION = dict(tolerance=1e-4, part=1e-3)


def complex_of(planes):
    return jax.lax.complex(planes[..., 0], planes[..., 1])


def true_output_matrix(trained, diagonal, low_rank, step, length):
    """C of the peer's C~ = C (I - A_bar^L), all complex and dense; trained [K, H, N/2]."""
    both = lambda a: jnp.concatenate([a, a.conj()], -1)
    full, column = both(diagonal), both(low_rank)
    identity = jnp.eye(full.shape[-1])
    half = step[:, None, None] / 2 * (jax.vmap(jnp.diag)(full) - jnp.einsum("rdp,rdq->dpq", column, column.conj()))
    decay = jnp.linalg.solve(identity - half, identity + half)
    transposed = (identity - jnp.linalg.matrix_power(decay, length)).swapaxes(1, 2)
    solved = jax.vmap(lambda row: jnp.linalg.solve(transposed, row[..., None])[..., 0])(both(trained))
    return solved[..., : trained.shape[-1]]


def responses(layer, inputs):
    """y of the layer before activation and output map, as the peer's FFTConv returns it: [B, H, L]."""
    inputs = inputs.swapaxes(1, 2)
    y = convolution.convolve(inputs, *layer.system.kernel(inputs.shape[1])) + layer.skip[...] * inputs
    return y.swapaxes(1, 2)


NAMES = {"A_real": "log_decay", "B": "input_matrix", "C": "output_matrix", "P": "low_rank", "inv_dt": "log_step"}
NAMES = {f"kernel.{theirs}": f"system.{ours}" for theirs, ours in NAMES.items()} | {"D": "skip"}


def filled(layer, weights):
    """A copy of `layer` with the peer's parameters, which may be traced."""
    layer = oracle.holding(layer, weights, NAMES | {"kernel.A_imag": "system.frequency"})
    system = layer.system
    system.frequency[...] *= -1
    if "kernel.P" in weights:
        diagonal, low_rank, _, trained, step = system._system()
        true = true_output_matrix(trained, diagonal, low_rank[None], step, 24)
        system.output_matrix[...] = jnp.stack([true.real, true.imag], -1)
    return layer


@pytest.mark.parametrize("name,options", [
    # The saved C is C~ for L = 24 (state-spaces/s4 rewrites C in its first call); `filled` takes that back.
    ("s4_dplr_legs", dict()),
    # The reverse kernel starts at the next token, which its authors call a deliberate off-by-one; ours is the same.
    ("s4_dplr_bidir", dict(is_causal=False)),
    ("s4_diag_zoh", dict(mode="diagonal", init="lin")),
    ("s4_diag_bilinear", dict(mode="diagonal", discretization="bilinear")),
])
def test_state_spaces_s4(name, options):
    peer = oracle.load(name)
    layer = S4(4, state_size=8, **{"is_causal": True, **options}, rngs=nnx.Rngs(0))
    run = lambda inputs, weights: responses(filled(layer, weights), inputs["u"])
    oracle.compare("s4", peer, run, **PRECISION, of="mechanism")


@pytest.mark.parametrize("name,options", [
    ("s4_dplr_legs", dict()),
    ("s4_diag_zoh", dict(mode="diagonal")),
    ("s4_diag_bilinear", dict(mode="diagonal", discretization="bilinear")),
])
def test_state_spaces_s4_step_by_step(name, options):
    peer = oracle.load(name)
    layer = filled(S4(4, state_size=8, is_causal=True, **options, rngs=nnx.Rngs(0)), peer.weights)
    inputs = peer.inputs["u"].swapaxes(1, 2)
    outputs, _ = layer.system.recur(inputs, layer.init_cache(2, 24).state)
    outputs = (outputs + layer.skip[...] * inputs).swapaxes(1, 2)
    assert oracle.relative_error(outputs, peer.constants["y_recurrent"]) < 1e-5
    taps = layer.system.kernel(24)
    assert oracle.relative_error(taps, peer.constants["K"]) < 1e-5


def test_state_spaces_s4_of_rank_2():
    # LegT, which no option of the layer builds: the kernel function with two columns.
    peer = oracle.load("s4_dplr_rank2")

    def run(inputs, weights):
        diagonal = jax.lax.complex(-jnp.exp(weights["kernel.A_real"]), -weights["kernel.A_imag"])
        low_rank, drive, trained = (complex_of(weights[f"kernel.{name}"]) for name in "PBC")
        step = jnp.exp(weights["kernel.inv_dt"][:, 0])
        true = true_output_matrix(trained, diagonal, low_rank, step, 24)
        (taps,) = ssm.dplr_kernel(diagonal, low_rank, drive[0], true, step, 24)
        inputs = inputs["u"].swapaxes(1, 2)
        return (convolution.convolve(inputs, taps) + weights["D"] * inputs).swapaxes(1, 2)

    oracle.compare("s4", peer, run, **PRECISION, of="mechanism")


@pytest.mark.parametrize("name", ["s4_diag_dt_untied", "s4_diag_dss"])
def test_state_spaces_s4_kernels_without_an_option(name):
    # A step per mode, and the DSS weights (a softmax over the length, one mode for a pair): both are the same Vandermonde.
    peer = oracle.load(name)

    def run(inputs, weights):
        diagonal = jax.lax.complex(-jnp.exp(weights["kernel.A_real"]), -weights["kernel.A_imag"])
        drive, outputs = complex_of(weights["kernel.B"])[0], complex_of(weights["kernel.C"])
        step = jnp.broadcast_to(jnp.exp(weights["kernel.inv_dt"]), diagonal.shape)
        log_decay, scale = ssm.discretize(diagonal, step, "zoh")
        if name == "s4_diag_dss":
            total = jnp.expm1(24 * log_decay) * diagonal
            scale = jnp.expm1(log_decay) * total.conj() / (total * total.conj() + 1e-7) / 2
        (taps,) = ssm.diagonal_kernel(log_decay, outputs * drive * scale, 24)
        inputs = inputs["u"].swapaxes(1, 2)
        return (convolution.convolve(inputs, taps) + weights["D"] * inputs).swapaxes(1, 2)

    oracle.compare("s4", peer, run, **PRECISION, of="mechanism")


def test_s4d_minimal():
    # The whole layer, gate included. It has no B (ours is 1) and A_imag has our sign.
    peer = oracle.load("s4d_minimal")
    layer = S4(4, state_size=8, mode="diagonal", init="lin", is_causal=True, rngs=nnx.Rngs(0))

    names = {"log_A_real": "log_decay", "A_imag": "frequency", "C": "output_matrix", "log_dt": "log_step"}
    names = {f"kernel.{theirs}": f"system.{ours}" for theirs, ours in names.items()} | {"D": "skip", "output_linear.0": "out"}

    def run(inputs, weights):
        held = oracle.holding(layer, weights, names)
        return {"y": held(inputs["u"].swapaxes(1, 2)).swapaxes(1, 2), "K": held.system.kernel(24)[0]}

    oracle.compare("s4", peer, run)


def test_annotated_s4():
    # It keeps N complex modes without their conjugates and takes the real part of K. That is the real system of N pairs
    # with half of C, in which P P^* must not couple a mode with its conjugate: two columns, P and i P, each over sqrt(2).
    # It conjugates C, and its C is C~ for L = 24.
    peer = oracle.load("annotated_s4_dplr")

    def run(_, weights):
        diagonal = jax.lax.complex(weights["Lambda_re"], weights["Lambda_im"])
        column, drive, trained = (complex_of(weights[name]) for name in "PBC")
        step = weights["step"]
        half, identity = step / 2 * (jnp.diag(diagonal) - jnp.outer(column, column.conj())), jnp.eye(8)
        decay = jnp.linalg.solve(identity - half, identity + half)
        true = jnp.linalg.solve((identity - jnp.linalg.matrix_power(decay, 24)).T, trained.conj())
        low_rank = jnp.stack([column, 1j * column])[:, None] / np.sqrt(2)
        taps = ssm.dplr_kernel(diagonal[None], low_rank, drive[None], true[None] / 2, step[None], 24)
        return {"K": taps[0]}

    peer.grad_inputs = {}
    oracle.compare("s4", peer, run, **PRECISION, of="mechanism")
    taps = run(None, {name: jnp.asarray(value, jnp.float32) for name, value in peer.weights.items()})["K"]
    y = convolution.convolve(peer.inputs["u"][None, :, None], taps[None])[0, :, 0]
    for name in ("y", "y_recurrent"):
        assert oracle.relative_error(y, peer.outputs[name]) < 1e-5


def test_long_sequences_are_mixed_in_pieces(monkeypatch):
    layer, x = S4(4, state_size=8, rngs=nnx.Rngs(0)), u(100)
    graph, state = nnx.split(layer)

    def loss(state, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(x)))

    want = jax.jit(jax.grad(lambda *a: loss(*a), argnums=(0, 1)))(state, x)
    monkeypatch.setattr(projection, "LARGE_BYTES", 1)
    monkeypatch.setattr(projection, "PIECE_BYTES", 1)
    got = jax.jit(jax.grad(lambda *a: loss(*a), argnums=(0, 1)))(state, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)
