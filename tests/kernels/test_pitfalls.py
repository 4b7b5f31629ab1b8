"""What fused kernels get wrong, for all operations at once; what only one of them can get wrong is tested beside it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import linear, scan, specs, ssm

SPECS = specs.load()
OPERATIONS = {spec.operation: name for name, spec in SPECS.items() if "triton" in spec.implementations}
IMPLEMENTATIONS = ["xla", pytest.param("interpret", marks=pytest.mark.interpret)]
# What is exponentiated, subtracted, or summed over the sequence.
DELICATE = re.compile("lse|row_lse|shift|delta|log_total|numerator(_out|_in)?|denominator(_out|_in)?|largest_out")
WITH_LSE = ["softmax.attention/window", "softmax.attention/few-keys", "block_sparse.attention/bigbird",
            "strided.attention/causal"]  # fmt: skip
KEEP_OUTPUTS = ["softmax.attention/window", "strided.attention/steps-only", "lsh.attention/full", "relative.attention/memory"]


def bfloat16(name, length=100):
    return specs.split(SPECS[name].draw(length, "bfloat16"))


@pytest.mark.parametrize("name", OPERATIONS.values())
def test_what_is_delicate_is_float32(name):
    """Log sums, sum(do * o), what sequences are summed into: bfloat16 has no digits to spare for them."""
    spec = SPECS[name]
    for launched in specs.launches(spec, "bfloat16", spec.lengths[len(spec.lengths) // 2], bench=False):
        for parameter, dtype in launched.dtypes:
            if DELICATE.fullmatch(parameter.lower()):
                assert dtype == "float32", f"{launched.name} has {parameter} in {dtype}"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", WITH_LSE)
def test_log_sums_have_the_digits_of_float32(name, implementation):
    """In bfloat16 as well: natural logarithms, of weights that are not rounded before they are summed."""
    spec = SPECS[name]
    inexact, rest = bfloat16(name)
    with jax.enable_x64(True):
        (_, want) = jax.jit(specs.forward(spec, "reference", rest))(specs.widen(inexact))
    _, got = jax.jit(specs.forward(spec, implementation, rest))(inexact)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=0, atol=3e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", KEEP_OUTPUTS)
def test_the_backward_pass_reads_the_outputs_that_were_returned(name, implementation):
    """sum(do * o) must be that of the rounded outputs: others would be another array among those that are kept."""
    inexact, rest = bfloat16(name, 63)
    outputs, pull = jax.vjp(specs.forward(SPECS[name], implementation, rest), inexact)
    numbers = lambda x: np.sort(np.asarray(x, np.float32)[np.asarray(x) != 0])  # in any layout, without padding
    kept = [numbers(x) for x in jax.tree.leaves(pull) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert any(np.array_equal(x, numbers(jax.tree.leaves(outputs)[0])) for x in kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_denominators_count_beyond_256(is_causal, implementation):
    """A sum of 600 ones stops at 256 in bfloat16, and the mean of 600 values would be twice what it is."""
    ones = jnp.ones((1, 600, 1, 16), jnp.bfloat16)
    value = jnp.broadcast_to(jnp.arange(600) % 2, (1, 1, 16, 600)).transpose(0, 3, 1, 2).astype(jnp.bfloat16)
    run = functools.partial(linear.attention, is_causal=is_causal, return_state=True, implementation=implementation)
    out, (_, denominator, _) = jax.jit(run)(ones, ones, value)
    np.testing.assert_array_equal(denominator, 600)
    np.testing.assert_allclose(out[:, -1].astype(jnp.float32), 0.5, rtol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_features_of_any_size(is_causal, implementation):
    """Positive features overflow, or are nothing at all, where their logarithms are exponentiated as they are."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    query, key, value = (draw(1, 70, 2, 16) for _ in range(3))
    projection = draw(32, 16)

    def run(query, key, value):
        return linear.random_feature_attention(
            query, key, value, projection, kernel="softmax", is_causal=is_causal, implementation=implementation
        )

    for factor in (1e-3, 30.0):
        out, pull = jax.vjp(jax.jit(run), factor * query, factor * key, value)
        # Averages of the values, with gradients that are numbers.
        assert (np.abs(out) <= np.abs(value).max() * (1 + 1e-4)).all()
        assert all(np.isfinite(x).all() for x in (out, *pull(jnp.ones_like(out))))
        assert np.abs(out).max() > 0.05


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [-5e3, 5e3])
@pytest.mark.parametrize("is_causal", [False, True])
def test_log_scales_of_thousands(scale, is_causal, implementation):
    """Only differences of log scales count; a key that is alone counts whatever its own."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.uniform(0.1, 1, (1, 40, 1, 16)), jnp.float32) for _ in range(2))
    value = jnp.asarray(rng.normal(size=(1, 40, 1, 16)), jnp.float32)
    log_scale = jnp.asarray(rng.normal(size=(1, 40, 1)), jnp.float32).at[:, 0].set(scale)

    def run(log_scale, implementation):
        options = dict(is_causal=is_causal, eps=0.0, implementation=implementation)
        return linear.attention(query, key, value, key_log_scale=log_scale, **options)

    out, pull = jax.vjp(jax.jit(functools.partial(run, implementation=implementation)), log_scale)
    np.testing.assert_allclose(out, run(log_scale, "reference"), rtol=1e-4, atol=1e-5)
    assert np.isfinite(pull(jnp.ones_like(out))[0]).all()
    if is_causal:
        np.testing.assert_allclose(out[:, 0], value[:, 0], rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_that_forget_at_once(implementation):
    """Divided by the product of the decays so far, which is 0 in float32, every number would be infinite or none."""
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(1, 40, 16)), jnp.float32)
    for modulus in (0.0, 1e-12):
        decay = jnp.full((1, 40, 16), modulus)
        states, pull = jax.vjp(lambda a, b: scan.first_order(a, b, implementation=implementation)[0], decay, inputs)
        np.testing.assert_allclose(states, inputs, rtol=1e-6)
        assert all(np.isfinite(x).all() for x in pull(jnp.ones_like(states)))
    ones = jnp.ones((16, 4))

    def run(inputs, log_decay):
        return ssm.diagonal_scan(inputs, log_decay, ones, ones, implementation=implementation)

    outputs, pull = jax.vjp(run, inputs, -60 * ones)
    np.testing.assert_allclose(outputs, 4 * inputs, rtol=1e-4, atol=1e-4)
    assert all(np.isfinite(x).all() for x in pull(jnp.ones_like(outputs)))
