"""Angular hashing: the fast form against argmax, and what a hash is for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import lsh
from subquad.kernels.lsh import xla


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Blocks of a few tokens, so that short sequences run many steps."""
    monkeypatch.setattr(xla, "CPU_TILE_BYTES", 2048)


by_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])


@pytest.mark.parametrize("factors,heads", [(None, 1), ((4, 6), 3), ((2, 2, 6), 1)])
def test_hashes_agree(factors, heads):
    columns = 5 if factors is None else sum(factors) // 2
    vectors = jax.random.normal(jax.random.key(0), (2, 53, 3, 8)).at[0, :2].set(0)  # ties
    rotations = jax.random.normal(jax.random.key(1), (heads, 8, 4, columns))
    rotations = rotations.at[..., -1].set(rotations[..., 0])
    both = [lsh.hash_buckets(vectors, rotations, factors=factors, implementation=i) for i in ("xla", "reference")]
    np.testing.assert_array_equal(*both)
    total = 10 if factors is None else math.prod(factors)
    assert both[0].shape == (2, 4, 53, 3) and both[0].dtype == jnp.int32
    assert both[0].min() == 0 and total // 2 < both[0].max() < total
    # Only the direction counts, and the opposite direction has the opposite bucket in every digit.
    np.testing.assert_array_equal(lsh.hash_buckets(2 * vectors, rotations, factors=factors), both[0])
    if factors is None:
        opposite = lsh.hash_buckets(-vectors, rotations)[:, :, 2:]
        np.testing.assert_array_equal((opposite + 5) % 10, both[0][:, :, 2:])


def test_near_vectors_collide_more_often():
    x = jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
    away = jax.random.normal(jax.random.key(1), (1, 3, 1, 16)) * jnp.array([0.1, 0.5, 2.0])[:, None, None]
    rotations = jax.random.normal(jax.random.key(2), (1, 16, 400, 4))
    buckets = lsh.hash_buckets(jnp.concatenate([x, x + away], axis=1), rotations)[0, :, :, 0]
    same = (buckets[:, 1:] == buckets[:, :1]).mean(0)
    assert same[0] > 0.85 > 0.7 > same[1] > same[2] > 1 / 8


@by_implementation
def test_samples_and_tokens_may_use_fewer_rotations(implementation):
    vectors = jax.random.normal(jax.random.key(0), (2, 40, 2, 8))
    rotations = jax.random.normal(jax.random.key(1), (2, 8, 3, 6))
    both = lsh.hash_buckets(vectors, rotations, num_rotations=jnp.array([6, 2]), implementation=implementation)
    np.testing.assert_array_equal(both[0], lsh.hash_buckets(vectors, rotations)[0])
    fewer = lsh.hash_buckets(vectors, rotations[..., :2])[1]
    np.testing.assert_array_equal(both[1], jnp.where(fewer < 2, fewer, fewer - 2 + 6))
    used = jnp.where(jnp.arange(40) < 17, 6, 2)[None].repeat(2, 0)
    each = lsh.hash_buckets(vectors, rotations, num_rotations=used, implementation=implementation)
    np.testing.assert_array_equal(each[1, :, 17:], both[1, :, 17:])
    np.testing.assert_array_equal(each[0, :, :17], both[0, :, :17])


def test_no_gradient_passes_through_a_hash():
    vectors = jnp.ones((1, 4, 1, 8))
    gradient = jax.grad(lambda v: lsh.hash_buckets(v, jnp.ones((1, 8, 1, 2))).astype(float).sum())(vectors)
    assert jnp.abs(gradient).max() == 0


@pytest.mark.parametrize(
    "changes,argument",
    [
        (dict(vectors=jnp.ones((2, 9, 8))), "vectors"),
        (dict(rotations=jnp.ones((3, 8, 1, 4))), "rotations"),
        (dict(rotations=jnp.ones((1, 7, 1, 4))), "rotations"),
        (dict(factors=(3, 5)), "factors"),
        (dict(factors=(2, 4)), "factors"),
        (dict(num_rotations=jnp.ones(3, int)), "num_rotations"),
        (dict(num_rotations=jnp.ones((2, 8), int)), "num_rotations"),
        (dict(num_rotations=jnp.ones(2, int), factors=(4, 4)), "num_rotations"),
    ],
)
def test_bad_hashing_is_named(changes, argument):
    with pytest.raises(ValueError, match=rf"lsh\.hash_buckets: {argument}"):
        lsh.hash_buckets(**{**dict(vectors=jnp.ones((2, 9, 2, 8)), rotations=jnp.ones((1, 8, 1, 4))), **changes})
