"""S5 against its formula, step by step, its initial system, its gates, and the authors' and another implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace import hippo
from subquad.zoo.statespace.output import skipped
from subquad.zoo.statespace.s5 import S5
from tests import oracle

FEATURES, STATE = 4, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return S5(FEATURES, **dict(state_size=STATE) | options, rngs=nnx.Rngs(0))


def linear_part(layer, x, segment_ids=None):
    """y = C x + D u."""
    return skipped(layer.skip, x, layer.respond(x, None, segment_ids))


# The initial system.


@pytest.mark.parametrize("blocks", [1, 3])
def test_legs_is_the_normal_part_of_hippo_in_blocks(blocks):
    size, whole = 6, 6 * blocks
    diagonal, basis = hippo.blocks("legs", whole, blocks)
    matrix, _ = hippo.legs(size)
    low_rank = np.sqrt(np.arange(size) + 0.5)
    expected = np.kron(np.eye(blocks), matrix + np.outer(low_rank, low_rank))
    np.testing.assert_allclose(2 * (basis @ np.diag(diagonal) @ basis.conj().T).real, expected, atol=1e-12)


@pytest.mark.parametrize("init", hippo.INITS)
def test_modes_and_basis(init):
    diagonal, basis = hippo.blocks(init, 12, 2)
    np.testing.assert_allclose(np.tile(hippo.diagonal_modes(init, 6).diagonal, 2), diagonal)
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(6), atol=1e-12)
    assert (diagonal.imag >= 0).all()


def test_variances_are_those_of_the_authors_code():
    """Of B and C before they are turned into the basis, which leaves half of the variance to either part."""
    for options, variance in (
        (dict(output_init="lecun"), 1 / (64 * 96)), (dict(output_init="truncated"), 1 / 64), (dict(output_init="complex"), 1.0)
    ):  # fmt: skip
        layer = S5(96, state_size=64, **options, rngs=nnx.Rngs(0))
        assert np.var(layer.input_matrix[...]) == pytest.approx(0.5 / 64, rel=0.1)
        scale = 0.5 if options["output_init"] == "complex" else 1.0  # C is complex before it is turned
        assert np.var(layer.output_matrix[...]) == pytest.approx(scale * variance, rel=0.1)
    steps = np.exp(S5(4, state_size=2000, init="lin", dt_min=1e-4, dt_max=1e-2, rngs=nnx.Rngs(0)).log_step[...])
    assert 1e-4 <= steps.min() < 1.1e-4 and 0.9e-2 < steps.max() <= 1e-2
    assert np.median(steps) == pytest.approx(1e-3, rel=0.2)


# The layer.


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_the_formula_step_by_step(discretization, is_causal):
    """With both modes of each pair, in complex numbers."""
    layer, x = build(num_blocks=2, discretization=discretization, is_causal=is_causal), normal(2, 9, FEATURES)
    both = lambda a, axis=0: np.concatenate([a, a.conj()], axis)
    diagonal = both(-np.exp(np.float64(layer.log_decay[...])) + 1j * layer.frequency[...])
    step = np.tile(np.exp(np.float64(layer.log_step[...])), 2)
    B, C = (np.float64(m[...]) @ [1, 1j] for m in (layer.input_matrix, layer.output_matrix))
    B, C = both(B), both(C, -1)
    if discretization == "zoh":
        decay, drive = np.exp(step * diagonal), (np.exp(step * diagonal) - 1) / diagonal
    else:
        decay, drive = (1 + step / 2 * diagonal) / (1 - step / 2 * diagonal), step / (1 - step / 2 * diagonal)

    def states(tokens):
        state, found = np.zeros((2, STATE)), []
        for token in tokens:
            state = decay * state + (token @ B.T) * drive
            found.append(state)
        return np.stack(found, 1)

    tokens = x.swapaxes(0, 1)
    y = states(tokens) @ C[0].T + x * layer.skip[...]
    if not is_causal:
        y = y + states(tokens[::-1])[:, ::-1] @ C[1].T
    assert np.abs(y.imag).max() < 1e-9
    np.testing.assert_allclose(linear_part(layer, jnp.asarray(x)), y.real, atol=1e-5)


def test_gates():
    x, layers = normal(2, 7, FEATURES), {gate: build(gate=gate) for gate in ("half", "only", None)}
    y = linear_part(layers["half"], jnp.asarray(x))
    hidden = jax.nn.gelu(y, approximate=False)
    gate = jax.nn.sigmoid(hidden @ layers["half"].out.kernel[...])
    for name, want in (("half", hidden * gate), ("only", y * gate), (None, hidden @ layers["half"].out.kernel[...])):
        np.testing.assert_allclose(layers[name](x), want, atol=1e-5)
    full = build(gate="full", out_features=3)
    np.testing.assert_allclose(full(x), jax.nn.glu(hidden @ full.out.kernel[...] + full.out.bias[...]), atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_as_alone(is_causal):
    layer, x = build(is_causal=is_causal), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-6)


def test_the_state_is_that_after_the_last_real_token():
    layer, x = build(is_causal=True), normal(2, 7, FEATURES)
    extend = jax.jit(lambda x, cache, mask=None: layer.extend(x, cache, mask=mask))
    _, before = extend(x[:, :2], layer.init_cache(2, 7))
    mask = jnp.arange(5) < jnp.array([[[[0]]], [[[3]]]])
    _, after = extend(x[:, 2:], before, mask)
    np.testing.assert_array_equal(after.state[0], before.state[0])
    np.testing.assert_allclose(after.state[1], extend(x[:, 2:5], before)[1].state[1], atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    (dict(state_size=6, num_blocks=2), "state_size must be a multiple of 2 num_blocks = 4, got 6"),
    (dict(num_blocks=0), "num_blocks must be a positive integer"), (dict(init="legt"), "init must be a known name"),
    (dict(output_init="normal"), "output_init"), (dict(discretization="euler"), "discretization"),
    (dict(dt_min=0.2), r"dt_min must be a number in \(0, 0.1\]"), (dict(gate="glu"), "gate must be a known name"),
    (dict(out_features=3), "out_features must be in_features = 4 with gate='half', got 3. Use gate='full'."),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"S5: {words}"):
        build(**options)


# Other implementations. One mode of each pair in the authors' "conj" files; all modes, and no factor 2, in the others, which
# our pairs are of twice the size with half of C. What they train is Re Lambda, which is -exp(log_decay) here.


def filled(layer, real, imag, B, C, log_step, skip, halved):
    layer = nnx.merge(*nnx.split(layer))
    layer.log_decay, layer.frequency = nnx.Param(jnp.log(-real)), nnx.Param(imag)
    layer.input_matrix, layer.output_matrix = nnx.Param(B), nnx.Param(C / 2 if halved else C)
    layer.log_step, layer.skip = nnx.Param(log_step), nnx.Param(skip)
    return layer


@pytest.mark.parametrize(("name", "options"), [
    ("s5_zoh_conj", dict(is_causal=True)), ("s5_bilinear_conj", dict(is_causal=True, discretization="bilinear")),
    ("s5_zoh_conj_bidir", {}), ("s5_zoh_full_bidir", dict(state_size=2 * STATE)),
])  # fmt: skip
def test_oracle_of_the_authors(name, options):
    peer, layer = oracle.load(name), build(**options)

    def run(inputs, w):
        C = jnp.stack([w["C"]] if "C" in w else [w["C1"], w["C2"]])
        ours = filled(layer, w["Lambda_re"], w["Lambda_im"], w["B"], C, w["log_step"][:, 0], w["D"], "full" in name)
        return {"y": linear_part(ours, inputs["x"][None])[0]}

    oracle.compare("s5", peer, run, of="mechanism")


@pytest.mark.parametrize(("name", "options"), [("s5_torch_zoh", dict(is_causal=True)), ("s5_torch_bidir", {})])
def test_oracle_of_s5_pytorch(name, options):
    peer, layer = oracle.load(name), build(state_size=2 * STATE, **options)

    def run(inputs, w):
        w = {key.removeprefix("seq."): value for key, value in w.items()}
        C = jnp.stack(jnp.split(w["C"], 1 if layer.is_causal else 2, axis=1))
        ours = filled(layer, *w["Lambda"].T, w["B"], C, w["log_step"], w["D"], True)
        return {"y": linear_part(ours, inputs["x"])}

    oracle.compare("s5", peer, run, of="mechanism")
