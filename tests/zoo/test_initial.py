"""What a layer starts from: the variances that papers and docstrings state, and draws that are all apart."""

import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.lowrank.linformer import LinformerProjection

from .cases import CASES

FEATURES = 64  # as many numbers in each array as tell a variance to a few percent


def build(name, **options):
    options = {**CASES[name].options, **options}
    return zoo.make(name, in_features=FEATURES, rngs=nnx.Rngs(3), **options)


def variables(layer) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(layer))}


def check_moments(values, variance: float, kurtosis: float = 3.0):
    """Mean 0 and this variance, each within 4.5 standard errors of independent draws."""
    values = np.asarray(values, np.float64).ravel()
    assert abs(values.mean()) < 4.5 * (variance / values.size) ** 0.5
    error = variance * ((kurtosis - 1) / values.size) ** 0.5
    assert abs(values.var() - variance) < 4.5 * error, f"variance {values.var():.3g}, not {variance:.3g}"


@pytest.mark.parametrize("name", CASES)
def test_projections_start_with_one_over_their_inputs(name):
    """LeCun's normal, as Flax's layers; biases 0. But Mamba's steps and LongT5's queries, whose tests are their own."""
    others = {"mamba": "step/", "longt5": "query/"}
    found = variables(build(name, out_features=96))
    found = {path: leaf for path, leaf in found.items() if not path.startswith(others.get(name, "/"))}
    kernels = {path: leaf for path, leaf in found.items() if path.endswith("/kernel")}
    for path, kernel in kernels.items():
        is_last = path.endswith(("out/kernel", "inner/kernel")) or path == "compressor/kernel"
        inputs = kernel.shape[:-1] if is_last else kernel.shape[:1]
        # The normal is cut at two deviations, and scaled back: flatter than a whole one.
        check_moments(kernel, 1 / np.prod(inputs), kurtosis=2.4)
    assert all((leaf == 0).all() for path, leaf in found.items() if path.endswith("/bias"))
    assert kernels


@pytest.mark.parametrize("mode", ["dplr", "diagonal"])
def test_s4(mode):
    layer = build("s4", mode=mode, state_size=32)
    found = variables(layer)
    output = found["system/output_matrix"]  # complex normal of variance 1: its parts share it
    assert output.shape == (2, FEATURES, 16, 2)
    for direction, part in itertools.product(range(2), range(2)):
        check_moments(output[direction, ..., part], 0.5)
    check_moments(found["skip"], 1.0)
    log_step, (low, high) = found["system/log_step"], np.log([0.001, 0.1])  # log-uniform
    assert low <= log_step.min() and log_step.max() <= high
    check_moments(log_step - (low + high) / 2, (high - low) ** 2 / 12, kurtosis=1.8)
    # A and B are no draws: LegS in the basis where B is positive, the same in each feature.
    assert (found["system/log_decay"] == np.float32(np.log(0.5))).all()
    drive = found["system/input_matrix"]
    assert (drive == drive[0]).all() and (drive[..., 0] > 0).all() and (drive[..., 1] == 0).all()
    # Both of a pair hold |B|^2 = sum of 2n + 1 = P^2; the diagonal system has half of B.
    assert 2 * (drive[0] ** 2).sum() == pytest.approx(32**2 / (1 if mode == "dplr" else 4), rel=1e-5)
    if mode == "dplr":
        np.testing.assert_allclose(found["system/low_rank"], drive / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize("heads,shared", [(None, True), (None, False), (4, False)])
def test_linformer(heads, shared):
    projection = LinformerProjection(200, 24, num_heads=heads, share_key_value=shared, rngs=nnx.Rngs(0))
    for matrix in [projection.key] if shared else [projection.key, projection.value]:
        check_moments(matrix[...], 1 / 200)
    check_moments(build("linformer", max_length=100, num_landmarks=30).projection.key[...], 1 / 100)


def test_h3():
    """k' = shift(k) + D k: the first tap holds D, normal, beside its own part."""
    taps = variables(build("h3", state_size=16, conv_width=99))["shift/taps"]
    check_moments(taps[1:], 1 / (3 * 99), kurtosis=1.8)  # uniform
    check_moments(taps[0], 1.0)


@pytest.mark.parametrize(("name", "steps"), [("mamba", "step/bias"), ("mamba2", "step_bias")])
def test_no_step_starts_below_the_floor(name, steps):
    found = variables(build(name, dt_min=1e-6, dt_max=1e-3))[steps]
    assert np.log1p(np.exp(np.float64(found))).min() == pytest.approx(1e-4, rel=1e-3)


def test_what_is_learned_of_latents():
    check_moments(build("luna", num_slots=100).slots[...], 1.0)
    check_moments(build("isab", num_inducing=100).inducing[...], 1.0)
    check_moments(build("perceiver", num_latents=100).latents[...], 0.02**2)


def test_performer():
    rows = np.asarray(build("performer", num_features=4000).projection[...])
    size = FEATURES // 2
    assert rows.shape == (4000, size)
    squares = (rows**2).sum(-1)  # chi squared: mean H, variance 2 H
    check_moments(squares - size, 2 * size, kurtosis=3 + 12 / size)
    check_moments(rows, 1.0)
    np.testing.assert_allclose(rows[:size] @ rows[:size].T, np.diag(squares[:size]), atol=1e-3)
    loose = np.asarray(build("performer", num_features=4000, orthogonal=False).projection[...])
    products = (loose[0::2] * loose[1::2]).sum(-1)  # of independent Gaussian vectors
    check_moments(products, size, kurtosis=3 + 6 / size)
    fixed = build("performer", num_features=40, row_norm="sqrt").projection[...]
    np.testing.assert_allclose((fixed**2).sum(-1), size, rtol=1e-5)


def test_nystrom():
    taps = build("nystrom", num_heads=8, qkv_features=64, conv_width=99).taps[...]
    check_moments(taps, 1 / (3 * 99), kurtosis=1.8)  # uniform
    assert np.abs(taps).max() <= 99**-0.5


def test_transformer_xl():
    found = variables(build("transformer_xl", qkv_features=2048))
    for name in ("content_bias", "position_bias"):
        check_moments(found[name], 0.02**2)


def test_longformer():
    """Section 3.1: the global projections start as the local ones; they are not shared."""
    layer = build("longformer")
    for name in ("query", "key", "value"):
        own, of_globals = getattr(layer, name), getattr(layer, f"{name}_global")
        np.testing.assert_array_equal(own.kernel[...], of_globals.kernel[...])
        own.kernel[...] += 1
        assert (own.kernel[...] != of_globals.kernel[...]).all()


def test_reformer():
    check_moments(build("reformer").rotations[...], 1.0)


# Draws.

EXTRA = {"linformer": dict(sharing="none"), "performer": dict(num_features=80)}
# The same numbers on purpose: HiPPO's matrices are no draws, all forms of a mixture start with one weight, and scales with 1.
FIXED = {
    "bonus",
    "decay_bias",
    "decay_down",
    "direct",
    "erased",
    "forget_bias",
    "frequency",
    "gate",
    "gate_down",
    "gates",
    "global_scale",
    "key_map",
    "key_shift",
    "log_decay",
    "log_rates",
    "log_step",
    "mix",
    "mix_down",
    "mix_of_mix",
    "mixture",
    "phase",
    "query_key_shift",
    "query_map",
    "query_shift",
    "rate_bias",
    "rate_down",
    "scale",
    "sigma",
    "skip",
    "system/frequency",
    "system/input_matrix",
    "system/log_decay",
    "system/low_rank",
    "taps_bias",
    "written",
}


def drawn_parts(layer):
    """Each drawn array, and its parts along every axis (a row, a head, a round, a direction), by name."""
    for path, leaf in variables(layer).items():
        if path in FIXED or path.endswith(("/bias", "norm/scale")) or re.search("_(global|to_long)/", path):  # copies
            continue
        yield path, leaf
        for axis in range(leaf.ndim if leaf.ndim > 1 else 0):
            parts = np.moveaxis(leaf, axis, 0)[1:]  # the first begins as the whole does
            yield from ((f"{path}, {i} of axis {axis}", part) for i, part in enumerate(parts, 1))


@pytest.mark.parametrize("name", CASES)
def test_no_number_is_drawn_twice(name):
    """Equal arrays, or equal beginnings, in two places of two layers of one model mean a key used twice."""
    rngs = nnx.Rngs(0)
    options = {**CASES[name].options, **EXTRA.get(name, {})}
    layers = [zoo.make(name, in_features=FEATURES, rngs=rngs, **options) for _ in range(2)]
    seen = {}
    for i, layer in enumerate(layers):
        for where, part in drawn_parts(layer):
            # Scaled by another variance a draw remains the same draw.
            start = np.ravel(part)[:4]
            known = seen.setdefault(tuple((start / np.linalg.norm(start)).round(4)), f"{where} of layer {i}")
            assert start.size < 4 or known == f"{where} of layer {i}", f"{known} is {where} of layer {i}"


@pytest.mark.parametrize("name,variable", [("performer", "projection"), ("reformer", "rotations")])
def test_redraw_follows_its_key_alone(name, variable):
    layer = build(name)
    before = np.asarray(getattr(layer, variable)[...])
    first, second, again = (np.asarray(layer.redraw(nnx.Rngs(seed))) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first, again)
    assert first.shape == before.shape
    for one, other in itertools.combinations((before, first, second), 2):
        assert np.abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.2 and (one != other).all()
    rngs = nnx.Rngs(5)
    assert (layer.redraw(rngs) != layer.redraw(rngs)).all()


def test_one_seed_is_one_model():
    for name in CASES:
        one, other = (variables(CASES[name].make(CASES[name].supports.causal is True, seed=4)) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, other)
        third = variables(CASES[name].make(CASES[name].supports.causal is True, seed=5))
        assert any((one[path] != third[path]).any() for path in one)
