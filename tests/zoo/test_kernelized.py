"""Kernelized attention: the Gaussian sum by hand, its relation to softmax, large norms, and what it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.dense.kernelized import KernelizedAttention, gaussian_sums

FEATURES, HEADS = 16, 2


def build(is_causal=False, **options):
    return KernelizedAttention(HEADS, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


def dense(query, key, value, seen=True):
    """[B, T, N, H], every distance stored."""
    distance = jnp.sum((query[:, :, None] - key[:, None]) ** 2, -1)  # [B, T, S, N]
    return jnp.einsum("btsn,bsnv->btnv", jnp.exp(-0.5 * distance / query.shape[-1] ** 0.5) * seen, value)


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_formula(is_causal):
    """Outputs and gradients, also of the norms, which a softmax would not see."""
    layer, arrays = build(is_causal), [normal(2, 11, HEADS, 8, seed=seed) for seed in range(3)]
    seen = jnp.tri(11)[None, :, :, None] if is_causal else 1.0
    functions = (lambda *qkv: layer.attend(*qkv, None)), (lambda *qkv: dense(*qkv, seen))
    (y, pull), (wanted, wanted_pull) = (jax.jit(lambda *qkv, f=f: jax.vjp(f, *qkv))(*arrays) for f in functions)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(pull(jnp.cos(y)), wanted_pull(jnp.cos(y)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_divided_by_their_sums_are_softmax_of_keys_of_one_norm():
    query, key, value = (normal(1, 9, HEADS, 8, seed=seed) for seed in range(3))
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    layer, ones = build(), jnp.ones_like(value)
    normalised = layer.attend(query, key, value, None) / layer.attend(query, key, ones, None)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, rngs=nnx.Rngs(0)).attend(query, key, value, None)
    np.testing.assert_allclose(normalised, softmax, rtol=1e-4, atol=1e-5)


def test_a_key_at_its_query_weighs_one_whatever_their_norm():
    query, value = normal(1, 5, HEADS, 8, scale=30.0), normal(1, 5, HEADS, 8, seed=2)
    np.testing.assert_allclose(gaussian_sums(query, query, value), value, rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda query: gaussian_sums(query, -query, value).sum())(query)
    assert jnp.isfinite(gradient).all()


def test_masks_and_segments():
    layer, x = build(), normal(2, 9, FEATURES)
    mask = jax.random.bernoulli(jax.random.key(3), 0.6, (2, HEADS, 9, 9))
    query, key, value = layer.project(x)
    heads = dense(query, key, value, jnp.moveaxis(mask, 1, 3))
    np.testing.assert_allclose(layer(x, mask=mask), layer.out(heads), rtol=1e-4, atol=1e-5)
    packed = layer(x, segment_ids=jnp.asarray([3] * 4 + [1] * 5))
    for start, end in ((0, 4), (4, 9)):
        np.testing.assert_allclose(packed[:, start:end], layer(x[:, start:end]), rtol=1e-4, atol=1e-5)


def test_rotation_makes_the_kernel_relative():
    layer, x = build(rotary_base=20.0), jnp.broadcast_to(normal(1, 1, FEATURES), (1, 9, FEATURES))
    query, key, _ = layer.project(x)
    value = jnp.broadcast_to(jnp.eye(9)[None, :, None], (1, 9, HEADS, 9))
    weights = layer.attend(*layer.rotate(query, key), value, None)[0, :, 0]  # of equal tokens: of distances alone
    for shift in range(-8, 9):
        diagonal = jnp.diagonal(weights, shift)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-6)
