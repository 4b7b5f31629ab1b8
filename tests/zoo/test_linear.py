"""The linear transformer: its weights, its state as a recurrent network's, grouped heads, and peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.kernelized.linear import LinearAttention
from tests import oracle

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return LinearAttention(HEADS, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def elu1(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula(is_causal):
    """Every weight, head by head and query by query."""
    layer, x = build(is_causal), normal(2, 11, FEATURES)
    query, key, value = (np.asarray(heads, np.float64) for heads in layer.project(x))
    heads = np.zeros_like(value)
    for b, t, n in np.ndindex(2, 11, HEADS):
        seen = t + 1 if is_causal else 11
        weights = [elu1(query[b, t, n]) @ elu1(key[b, s, n]) for s in range(seen)]
        heads[b, t, n] = np.dot(weights, value[b, :seen, n]) / np.sum(weights)
    np.testing.assert_allclose(layer(x), layer.out(jnp.asarray(heads, jnp.float32)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_sum_to_one(is_causal):
    """The output of equal values is that value, however small the features: keys of -60 have features of 1e-26."""
    layer = build(is_causal)
    for shift in (0.0, -20.0, -30.0):
        query, key = (normal(1, 9, HEADS, 8, seed=seed) + shift for seed in (1, 2))
        np.testing.assert_allclose(layer.attend(query, key, jnp.full_like(key, 3.0), None), 3.0, rtol=1e-5)


def test_the_state_is_the_two_sums():
    """Eqs. 18-20: whatever is fed, the cache holds the sums over the real tokens, and nothing else."""
    layer, x = build(True), normal(2, 12, FEATURES)
    mask = jnp.ones((2, 1, 1, 12), bool).at[1, ..., 3:5].set(False)
    cache = layer.init_cache(2, 12)
    for start in (0, 5, 6):
        end = {0: 5, 5: 6, 6: 12}[start]
        _, cache = layer.extend(x[:, start:end], cache, mask=mask[..., start:end])
    features = elu1(np.asarray(layer.key(x))) * np.asarray(mask[:, 0, 0, :, None, None])
    np.testing.assert_allclose(cache.numerator, np.einsum("bsnm,bsnv->bnmv", features, layer.value(x)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.denominator, features.sum(1), rtol=1e-5)
    np.testing.assert_array_equal(cache.seen, [12, 10])
    assert {leaf.shape[0] for leaf in cache} == {2} and cache.numerator.shape == (2, HEADS, 8, 8)


@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads_are_repeated_ones(is_causal):
    grouped = LinearAttention(4, FEATURES, num_kv_heads=2, is_causal=is_causal, rngs=nnx.Rngs(0))
    every = LinearAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(every, {name: nnx.state(getattr(grouped, name)) for name in ("query", "out")})
    for name in ("key", "value"):
        own, other = getattr(grouped, name), getattr(every, name)
        other.kernel[...] = jnp.repeat(own.kernel[...], 2, axis=1)
        other.bias[...] = jnp.repeat(own.bias[...], 2, axis=0)
    x = normal(2, 9, FEATURES)
    np.testing.assert_allclose(grouped(x), every(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_separate_ones(is_causal):
    layer, x = build(is_causal), normal(1, 20, FEATURES)
    packed = layer(x, segment_ids=jnp.asarray([4] * 7 + [0] * 13))
    for start, end in ((0, 7), (7, 20)):
        np.testing.assert_allclose(packed[:, start:end], layer(x[:, start:end]), rtol=1e-4, atol=1e-5)


def test_derivatives_at_features_far_below_zero():
    """In half precision, too: exp(x), where elu(x) + 1 would be 0."""
    from subquad.zoo.features import elu_plus_one

    x = jnp.asarray([-30.0, -9.0, 0.0, 2.0], jnp.bfloat16)
    value, pull = jax.vjp(elu_plus_one, x)
    exact = elu1(np.asarray(x, np.float64))
    np.testing.assert_allclose(value.astype(jnp.float32), exact, rtol=1e-2)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0].astype(jnp.float32), np.minimum(exact, 1), rtol=1e-2)


# Peers. They add 1e-6 to the denominator, which moves nothing that their files could show.


@pytest.mark.parametrize("name", ["ft_linear_bidir", "ft_linear_causal"])
def test_oracle_fast_transformers(name):
    oracle.compare_mechanism("linear", build("causal" in name), oracle.load(name))


def test_oracle_fast_transformers_with_padding():
    peer = oracle.load("ft_linear_bidir_pad")
    mask = jnp.arange(32) < jnp.asarray(peer.meta["cfg"]["lens"])[:, None, None, None]
    oracle.compare_mechanism("linear", build(), peer, mask)


@pytest.mark.parametrize("name", ["lra_linear", "lra_linear_pad"])
def test_oracle_arena(name):
    """The arena's layer. It builds an error for a padding mask, never raises it, and drops the mask: so none is given here."""
    layer = build()
    oracle.compare("linear", oracle.load(name), lambda inputs, weights: oracle.holding(layer, weights)(inputs["x"]))


def test_oracle_flash_linear_attention():
    """With a state in and out: the peer's arrays are features already, so the layer's sums take the place of its features'."""
    from subquad.kernels import linear

    def run(inputs, _):
        state = inputs["s0"], inputs["z0"][:, 0], jnp.zeros(inputs["s0"].shape[:2])
        heads = (inputs[name] for name in "qkv")
        y, (s, z, largest) = linear.attention(*heads, is_causal=True, initial_state=state, return_state=True)
        return {"o": y, "s": s * jnp.exp(largest)[..., None, None], "z": (z * jnp.exp(largest)[..., None])[:, None]}

    oracle.compare("linear", oracle.load("linear_attn_norm"), run, of="mechanism")
