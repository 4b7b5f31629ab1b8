"""Gated DeltaNet, Kimi Delta Attention and DeltaProduct against their formulas, token by token, where one becomes another, and
the authors' recurrences."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .delta import applied, bare, cache_of, convolved, normed, perturbed, read, sigmoid, silu, softplus, unit

FEATURES = 6
NAMES = {"gated_deltanet": "gated_delta_rule", "kda": "kda", "delta_product": "gated_delta_product"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(name, **options):
    return zoo.make(name, num_heads=2, in_features=FEATURES, rngs=nnx.Rngs(0), **options)


def log_decay(layer, logits):
    rate = np.exp(np.float64(layer.decay.log_rate[...])).reshape(-1, *(1,) * (logits.ndim - 3))
    return -rate * softplus(logits + np.float64(layer.decay.step_bias[...]))


def in_steps(heads, steps):
    """[B, T, n K, ...] as [B, T n, K, ...]."""
    return heads.reshape(heads.shape[0], heads.shape[1] * steps, -1, *heads.shape[3:])


@pytest.mark.parametrize("name", NAMES)
def test_the_formula_token_by_token(name):
    layer, x = perturbed(build(name, value_features=10, num_kv_heads=1)), normal(2, 9, FEATURES)
    steps = layer.rule.num_steps
    query, key, value = (
        convolved(getattr(layer.rule, part), applied(getattr(layer, part), x)) for part in ("query", "key", "value")
    )
    key, value = (np.repeat(in_steps(heads, steps), 2, 2) for heads in (unit(key), value))
    beta = (2 if layer.negative_eigenvalues else 1) * in_steps(sigmoid(applied(layer.rate, x)), steps)
    plain = lambda module, x: np.tensordot(np.float64(x), np.float64(module.kernel[...]), 1)
    if name == "kda":
        decay = log_decay(layer, plain(layer.decay_up, plain(layer.decay_down, x)))
        gate = sigmoid(applied(layer.gate_up, plain(layer.gate_down, x)))
    else:
        decay, gate = log_decay(layer, plain(layer.decay_logits, x)), silu(applied(layer.gate, x))
    outputs = normed(layer.rule.norm, read(unit(query), key, value, beta, np.exp(decay), steps)) * gate
    np.testing.assert_allclose(layer(x), applied(layer.out, outputs), atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_oracle(name):
    """The recurrence of the authors' library, which multiplies queries by M^-1/2, from a state to the state after it."""
    peer, layer = oracle.load(NAMES[name]), bare(build(name))

    def run(inputs, _):
        steps = layer.rule.num_steps
        by_token = lambda x: x.reshape(x.shape[0], x.shape[1] // steps, -1, *x.shape[3:])
        query, log_decay = inputs["q"] * inputs["q"].shape[-1] ** -0.5, inputs["g"]
        key, value, beta = (by_token(inputs[name]) for name in ("k", "v", "beta"))
        o, cache = layer.rule(query, key, value, beta, log_decay, None, None, cache=cache_of(inputs["h0"]))
        return {"o": o, "h": cache.state}

    oracle.compare(name, peer, run, of="mechanism")


def test_with_one_step_delta_product_is_gated_deltanet():
    one, other = build("gated_deltanet", negative_eigenvalues=True), build("delta_product", num_steps=1)
    nnx.update(other, nnx.state(one))
    np.testing.assert_allclose(other(normal(1, 9, FEATURES)), one(normal(1, 9, FEATURES)), atol=1e-6)


def test_with_one_decay_for_all_channels_kda_is_gated_deltanet():
    given = [jnp.asarray(normal(1, 9, 2, 3, seed=seed)) for seed in range(3)]
    beta, decay = (jnp.asarray(sigmoid(normal(1, 9, 2, seed=seed)), jnp.float32) for seed in (3, 4))
    channels = jnp.broadcast_to(jnp.log(decay)[..., None], (1, 9, 2, 3))
    one = bare(build("gated_deltanet")).rule(*given, beta, jnp.log(decay), None, None)[0]
    np.testing.assert_allclose(bare(build("kda")).rule(*given, beta, channels, None, None)[0], one, atol=1e-5)


def test_two_steps_of_a_token_permute_three_things():
    """A reflection exchanges two values in the state; two reflections rotate three, which no single one does."""
    layer, first = bare(build("delta_product", use_decay=False)), np.float32([1, 0, 0])
    swap = lambda i, j: (np.eye(3, dtype=np.float32)[i] - np.eye(3, dtype=np.float32)[j]) / np.float32(2**0.5)
    key = jnp.broadcast_to(jnp.stack([swap(0, 1), swap(1, 2)])[None, None, :, None], (1, 4, 2, 2, 3)).reshape(1, 4, 4, 3)
    query, rates = jnp.broadcast_to(jnp.asarray(first), (1, 4, 2, 3)), jnp.full((1, 4, 4), 2.0)
    state = jnp.broadcast_to(jnp.diag(jnp.asarray([1.0, 2.0, 3.0])), (1, 2, 3, 3))
    heads, _ = layer.rule(query, key, jnp.zeros_like(key), rates, None, None, None, cache=cache_of(state))
    np.testing.assert_allclose(heads[0, :, 0].sum(-1), [2.0, 3.0, 1.0, 2.0], atol=1e-5)


def test_starting_values():
    layer = zoo.make("gated_deltanet", num_heads=512, in_features=512, rngs=nnx.Rngs(0))
    step, shares = np.log(softplus(layer.decay.step_bias[...])), np.linspace(0.1, 0.9, 5)
    np.testing.assert_allclose(np.quantile(step, shares), np.log(1e-3) + shares * np.log(100), atol=0.4)
    np.testing.assert_allclose(np.quantile(np.exp(layer.decay.log_rate[...]), shares), 16 * shares, atol=1.2)


@pytest.mark.parametrize(("name", "options", "words"), [
    ("kda", dict(rank=0), "KimiDeltaAttention: rank must be a positive integer"),
    ("delta_product", dict(num_steps=0), "DeltaProduct: num_steps must be a positive integer"),
    ("gated_deltanet", dict(rotary_base=100.0), "GatedDeltaNet does not support rotary_base"),
])  # fmt: skip
def test_refusals(name, options, words):
    with pytest.raises(ValueError, match=words):
        build(name, **options)
