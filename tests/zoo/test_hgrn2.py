"""HGRN2 against its formula, its limits, and a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.gla import GatedLinearAttention
from subquad.zoo.gated.hgrn2 import HGRN2, log_gate
from tests import oracle

FEATURES, HEADS = 16, 2


def build(**options):
    return HGRN2(HEADS, FEATURES, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


@pytest.mark.parametrize("bound", [0.0, 0.75])
def test_the_formula_step_by_step(bound):
    layer, x = build(lower_bound=bound), normal(2, 11, FEATURES)
    layer.norm.scale[...] = normal(HEADS, 8, seed=1)
    query, logits, value = (np.asarray(heads, np.float64) for heads in layer.project(x))
    heads, state = np.zeros((2, 11, HEADS, 8)), np.zeros((2, HEADS, 8, 8))
    for t in range(11):
        forget = (bound + (1 - bound) * sigmoid(logits[:, t]))[..., None]
        state = forget * state + (1 - forget) * value[:, t, :, None]
        heads[:, t] = np.einsum("bnh,bnhv->bnv", query[:, t] * sigmoid(query[:, t]), state)
    heads /= np.sqrt(np.mean(heads**2, (-2, -1), keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads * layer.norm.scale[...], jnp.float32)), atol=1e-5)


def test_it_is_gated_linear_attention_with_one_projection_for_gate_and_key():
    layer, x = build(), normal(1, 9, FEATURES)
    query, logits, value = layer.project(x)
    other = GatedLinearAttention(HEADS, FEATURES, qkv_features=16, temperature=1.0, rngs=nnx.Rngs(0))
    heads, state = layer.recur(query, logits, value, None)
    want = other.recur(nnx.silu(query) * 8**0.5, nnx.sigmoid(-logits), value, other.log_decay(logits), None)
    np.testing.assert_allclose(heads, want[0], atol=1e-5)
    np.testing.assert_allclose(state, want[1], atol=1e-5)


@pytest.mark.parametrize("bound", [0.0, 1e-6, 0.999])
def test_gates_near_their_ends_keep_their_digits_and_gradients(bound):
    logits = np.array([[[-90.0, -30.0, -5.0, 0.0, 5.0, 20.0, 90.0]]])
    exact = np.log(bound + (1 - bound) * sigmoid(logits)) if bound else -np.logaddexp(0, -logits)
    np.testing.assert_allclose(log_gate(jnp.asarray(logits, jnp.float32), bound), exact, rtol=1e-5, atol=1e-8)
    slopes = jax.grad(lambda x: log_gate(x, bound).sum())(jnp.asarray(logits, jnp.float32))
    with np.errstate(divide="ignore"):
        want = (1 - bound) * sigmoid(logits) * sigmoid(-logits) / (bound + (1 - bound) * sigmoid(logits))
    np.testing.assert_allclose(slopes, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("options", "words"), [
    (dict(lower_bound=1.0), r"lower_bound must be a number in \[0, 1\)"),
    (dict(lower_bound=-0.1), r"lower_bound must be a number in \[0, 1\)"),
    (dict(is_causal=False), "does not support is_causal=False"), (dict(rotary_base=10.0), "does not support rotary_base"),
    (dict(num_kv_heads=1), "does not support num_kv_heads"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"HGRN2:? {words}"):
        build(**options)


def test_oracle():
    """Of fla, which multiplies queries by K^-1/2, and has a lower bound of each channel."""
    peer = oracle.load("hgrn2")
    layer = HGRN2(2, 16, rngs=nnx.Rngs(0))

    def run(inputs, weights):
        ours = nnx.clone(layer)
        ours.lower_bound = nnx.data(weights["lower_bound"])
        heads, state = ours.recur(*(inputs[name] for name in "qfv"), None)
        return {"o": heads * 8**-0.5, "h": state}

    oracle.compare("hgrn2", peer, run, of="mechanism")
