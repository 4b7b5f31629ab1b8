"""The Triton kernels of LSH attention, interpreted: what the suite's random calls would not meet."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, launch, lsh, tuning

pytestmark = pytest.mark.interpret
STATIC = ("num_buckets", "chunk_size", "chunks_before", "chunks_after", "is_causal", "reach", "correct_duplicates",
          "implementation")


@functools.partial(jax.jit, static_argnames=STATIC)
def gradients(query_key, value, buckets, mask=None, scale=0.7, segment_ids=None, num_buckets=4, chunk_size=8, **options):
    """Output and gradients with respect to query_key, value and scale."""
    run = lambda query_key, value, scale: lsh.attention(
        query_key, value, buckets, num_buckets=num_buckets, chunk_size=chunk_size, mask=mask, segment_ids=segment_ids,
        scale=scale, **options)
    out, pull = jax.vjp(run, query_key, value, scale)
    return out, *pull(jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype))


def draw(length=21, batch=1, heads=1, features=8, value_features=6, rounds=2, buckets=4, seed=0):
    """query_key, value, buckets."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, length, heads, features)),
        jax.random.normal(keys[1], (batch, length, heads, value_features)),
        jax.random.randint(keys[2], (batch, rounds, length, heads), 0, buckets),
    )


def close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def small_tiles(monkeypatch, own=16, other=16):
    """Tiles much smaller than the sequence, with chunks that begin and end inside them."""
    from subquad.kernels.lsh import triton

    monkeypatch.setattr(triton, "config_of", lambda *sizes: tuning.Config(dict(BLOCK_Q=own, BLOCK_K=other)))
    monkeypatch.setattr(triton, "hash_config", lambda *sizes: tuning.Config(dict(BLOCK_T=own, BLOCK_F=other)))


@pytest.fixture
def interpreter():
    """A process that compiles kernels cannot interpret them, and says so."""
    try:
        launch.require("interpret")
    except dispatch.Declined as reason:
        pytest.skip(str(reason))


# Attention. Chunks of one token, shorter than a tile, as long, longer, with a last one that is short; rings that a reach
# goes around more than once.
CALLS = [
    dict(length=1, chunk_size=4, is_causal=True),
    dict(length=18, chunk_size=1, chunks_before=2, chunks_after=1, rounds=1),
    dict(length=21, chunk_size=7, chunks_after=1, is_causal=True, masked=True, rounds=3),
    dict(length=33, chunk_size=16, is_causal=True, correct_duplicates=False),
    dict(length=50, chunk_size=7, chunks_after=1, segmented=True, masked=True, rounds=3),
    dict(length=50, chunk_size=20, is_causal=True, segmented=True, reach="chunk"),
    dict(length=21, chunk_size=32, chunks_before=0, chunks_after=1, reach="chunk", masked=True),
    dict(length=21, chunk_size=8, chunks_before=0, chunks_after=1, reach="ring", correct_duplicates=False, masked=True),
    dict(length=9, chunk_size=4, chunks_before=2, chunks_after=3, reach="ring", correct_duplicates=False, rounds=1),
]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_values_and_gradients(call, monkeypatch):
    small_tiles(monkeypatch)
    options = dict(call)
    length, masked, segmented = options.pop("length"), options.pop("masked", False), options.pop("segmented", False)
    arrays = draw(length, rounds=options.pop("rounds", 2))
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (1, 1, 1, length)) if masked else None
    options["segment_ids"] = jax.random.randint(jax.random.key(6), (1, length), 0, 3) if segmented else None
    close(*(gradients(*arrays, mask, **options, implementation=i) for i in ("interpret", "reference")))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("own,other", [(16, 32), (32, 16)])
def test_tiles_of_unequal_sizes(own, other, monkeypatch):
    small_tiles(monkeypatch, own, other)
    close(*(gradients(*draw(40, rounds=1), chunk_size=24, implementation=i) for i in ("interpret", "reference")))


@pytest.mark.usefixtures("interpreter")
def test_heads_are_kept_apart():
    arrays = draw(9, batch=2, heads=3, features=20, value_features=33)
    close(*(gradients(*arrays, implementation=i) for i in ("interpret", "reference")))


@pytest.mark.usefixtures("interpreter")
def test_padding_may_hold_anything():
    query_key, value, buckets = draw()
    mask = (jnp.arange(21) % 5 > 0)[None, None, None]
    rows = mask[:, 0, 0, :, None, None]
    clean = gradients(query_key, value, buckets, mask, implementation="interpret")
    query_key, value = (jnp.where(rows, x, jnp.nan) for x in (query_key, value))
    dirty = gradients(query_key, value, jnp.where(mask[:, 0, :, :, None], buckets, 77), mask, implementation="interpret")
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(jnp.abs(jnp.where(rows, 0, x)).max() == 0 for x in dirty[:3])


@pytest.mark.usefixtures("interpreter")
def test_all_padding_is_zero():
    mask = jnp.zeros((2, 1, 1, 9), bool).at[0].set(True)
    for array in gradients(*draw(9, batch=2), mask, implementation="interpret")[:3]:
        assert jnp.isfinite(array).all() and jnp.abs(array[1]).max() == 0 < jnp.abs(array[0]).max()


@pytest.mark.usefixtures("interpreter")
def test_a_lonely_token_sees_itself():
    query_key, value, buckets = draw()
    alone = jnp.broadcast_to(jnp.arange(21)[:, None], buckets.shape)
    out, grad_query, grad_value, grad_scale = gradients(query_key, value, alone, num_buckets=21, implementation="interpret")
    np.testing.assert_array_equal(out, value)
    assert jnp.abs(grad_query).max() == 0 == grad_scale
    np.testing.assert_allclose(grad_value, jax.random.normal(jax.random.key(9), value.shape), rtol=1e-6)


@pytest.mark.usefixtures("interpreter")
def test_zero_and_huge_queries():
    query_key, value, buckets = draw()
    query_key = query_key.at[:, 4].set(0).at[:, 5:9].multiply(1e6)
    close(*(gradients(query_key, value, buckets, implementation=i)[:1] for i in ("interpret", "reference")), 1e-4)
    assert all(jnp.isfinite(x).all() for x in gradients(query_key, value, buckets, implementation="interpret"))


@pytest.mark.usefixtures("interpreter")
def test_queries_and_values_of_two_dtypes():
    query_key, value, buckets = draw()
    arrays = query_key, value.astype(jnp.bfloat16), buckets
    results = gradients(*arrays, implementation="interpret")
    assert [x.dtype.name for x in results[:3]] == ["bfloat16", "float32", "bfloat16"]
    close([x.astype(jnp.float32) for x in results],
          [x.astype(jnp.float32) for x in gradients(*arrays, implementation="xla")], 3e-2)


@pytest.mark.usefixtures("interpreter")
def test_buckets_too_many_for_one_integer(monkeypatch):
    """The sort goes by pairs and the codes by runs."""
    arrays = draw(9)
    usual = gradients(*arrays, implementation="interpret")
    jax.tree.map(np.testing.assert_array_equal, gradients(*arrays, num_buckets=2**30, implementation="interpret"), usual)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("axes", [(0, 0, None), (None, None, 0)], ids=str)
def test_vmap(axes):
    query_key, value, buckets = draw(9, batch=6)
    stack = lambda x, axis: x.reshape(3, 2, *x.shape[1:]) if axis == 0 else x[:2]
    arrays = [stack(x, axis) for x, axis in zip((query_key, value, buckets), axes, strict=True)]
    run = lambda implementation: jax.vmap(
        functools.partial(gradients, chunk_size=4, implementation=implementation), in_axes=axes)(*arrays)
    close(run("interpret"), run("reference"))


@pytest.mark.usefixtures("interpreter")
def test_one_head_in_the_batch_axis_of_a_vmap_shares_its_arrays():
    """Arrays [1, ...] that are not mapped are read with a stride of 0, in both directions."""
    query_key, value, buckets = draw(9, batch=3)
    run = lambda implementation: jax.vmap(lambda value, scale: gradients(
        query_key[:1], value[None], buckets[:1], None, scale, chunk_size=4, implementation=implementation,
    ))(value, jnp.array([0.5, 1.0, 2.0]))
    close(run("interpret"), run("reference"))


# Hashing.


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("factors,heads", [(None, 1), ((4, 6), 3), ((2, 2, 6), 1)])
def test_hashes_agree(factors, heads, monkeypatch):
    small_tiles(monkeypatch)
    columns = 37 if factors is None else sum(factors) // 2
    vectors = jax.random.normal(jax.random.key(0), (2, 21, 3, 8)).at[0, :2].set(0)  # ties
    rotations = jax.random.normal(jax.random.key(1), (heads, 8, 4, columns))
    # Ties within a tile of columns, and between a direction in the last tile and an opposite in the first.
    rotations = rotations.at[..., -1].set(rotations[..., 0]).at[..., -2].set(-rotations[..., 1])
    both = [lsh.hash_buckets(vectors, rotations, factors=factors, implementation=i) for i in ("interpret", "reference")]
    np.testing.assert_array_equal(*both)
    total = 2 * columns if factors is None else math.prod(factors)
    assert both[0].min() == 0 and total // 2 < both[0].max() < total


@pytest.mark.usefixtures("interpreter")
def test_samples_and_tokens_may_use_fewer_rotations():
    vectors = jax.random.normal(jax.random.key(0), (2, 21, 2, 8))
    rotations = jax.random.normal(jax.random.key(1), (2, 8, 3, 6))
    for used in (jnp.array([6, 2]), jnp.arange(42).reshape(2, 21) % 6 + 1):
        run = lambda implementation, used=used: lsh.hash_buckets(
            vectors, rotations, num_rotations=used, implementation=implementation)
        np.testing.assert_array_equal(run("interpret"), run("reference"))


# Extend.


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("start,length,correct", [(0, 20, False), (7, 9, True), (19, 1, True)])
def test_extend(start, length, correct, monkeypatch):
    small_tiles(monkeypatch)
    query, value, buckets = draw(20)
    mask = jax.random.bernoulli(jax.random.key(5), 0.8, (1, 1, 1, 20)).at[..., -1].set(True)
    new = slice(start, start + length)

    @functools.partial(jax.jit, static_argnums=3)
    def run(query, value, start, implementation):
        out, pull = jax.vjp(lambda query, key, value: lsh.extend(
            query, key, value, buckets[:, :, new], buckets, start=start, mask=mask, correct_duplicates=correct,
            implementation=implementation,
        ), query[:, new], lsh.normalize(query)[0], value)
        return out, *pull(jnp.cos(out))

    close(*(run(query, value, start, implementation) for implementation in ("interpret", "reference")))


# Refusals.


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("features,reason", [(129, "at most 128"), (8, "is float64")])
def test_what_the_kernels_decline(features, reason):
    with jax.enable_x64("64" in reason):
        query_key = jnp.ones((1, 8, 1, features), "float64" if "64" in reason else "float32")
        buckets = jnp.zeros((1, 1, 8, 1), jnp.int32)
        with pytest.raises(dispatch.Declined, match=rf"lsh\.attention: .*{reason}"):
            lsh.attention(query_key, query_key, buckets, num_buckets=1, chunk_size=4, implementation="interpret")
        assert lsh.attention(query_key, query_key, buckets, num_buckets=1, chunk_size=4).dtype == query_key.dtype
