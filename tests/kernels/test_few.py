"""Few queries to many keys, as in generation: the formula in float64, and no copy of the keys."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import patterns, softmax, xla_cpu
from subquad.kernels.softmax import few
from tests.kernels import dense
from tests.kernels.dense import TOLERANCES, draw


@pytest.fixture
def only_few():
    with tiles_refused():
        yield


@contextlib.contextmanager
def tiles_refused():
    """Says so where tiles are taken."""

    def refuse(*_, **__):
        raise AssertionError("not taken for few")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax.xla, "attend", refuse)
        yield


def check(arrays, cotangents, dtype="float32", bias=None, **options):
    def attend(query, key, value, bias=None):
        return softmax.attention(query, key, value, bias=bias, return_lse=True, implementation="xla", **options)

    given = arrays if bias is None else [*arrays, bias]
    with tiles_refused():
        outputs = jax.jit(attend)(*given)
    _, gradients = dense.run(attend, given, cotangents)  # of tiles
    dense.compare((outputs, gradients), dense.formula(arrays, cotangents, bias, **options), dtype)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 3])
def test_formula(queries, kv_heads):
    check(*draw(queries, 50, kv_heads=kv_heads, values=5))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes(dtype):
    check(*draw(2, 129, dtype=dtype), dtype)


@pytest.mark.parametrize("shared", [False, True])
def test_masks_biases_segments_and_positions(shared):
    """And a row that sees nothing is 0, its gradients too."""
    rng = np.random.default_rng(0)
    size = lambda full: 1 if shared else full
    mask = rng.random((2, size(4), size(3), 40)) < 0.7
    mask[1, :, -1] = False
    bias = jnp.asarray(rng.normal(size=(size(2), 4, size(3), 40)), jnp.float32)
    positions = dict(query_positions=np.array([[20, 30, 31], [3, 4, 39]]), key_positions=np.arange(40)[None], is_causal=True)
    segments = dict(query_segment_ids=rng.integers(0, 2, (2, 3)), key_segment_ids=rng.integers(0, 2, (2, 40)))
    check(*draw(3, 40), bias=bias, mask=jnp.asarray(mask), **positions, **jax.tree.map(jnp.asarray, segments))


@pytest.mark.usefixtures("only_few")
def test_a_pattern_that_tells_heads_apart():
    (query, key, value), _ = draw(2, 64)
    positions = dict(query_positions=jnp.array([[40, 63]]), key_positions=jnp.arange(64)[None])
    attend = functools.partial(
        softmax.attention, query, key, value, pattern=patterns.Dilated(5, 0, (1, 2, 3, 4)), **positions
    )
    np.testing.assert_allclose(attend(implementation="xla"), attend(implementation="reference"), atol=1e-6)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_weights_of_gradients_add_up_to_1(size):
    """Logits of another product than those of the outputs would differ from them by hundreds."""
    query, key, value = (size * jax.random.normal(jax.random.key(n), (2, n, n // 2, 5)) for n in (2, 18, 18))
    query = jnp.broadcast_to(query, (2, 2, 9, 5))
    gradient = jax.grad(lambda value: softmax.attention(query, key, value).sum())(value)
    np.testing.assert_allclose(gradient.sum(1), 2, rtol=1e-5)


def test_a_nan_that_is_hidden_from_its_own_heads_reaches_no_other():
    (query, key, value), _ = draw(2, 40)
    mask = np.ones((1, 4, 1, 40), bool)
    mask[0, 2:, 0, 3] = False
    attend = functools.partial(softmax.attention, query, value=value, mask=mask)
    heads = key.shape[2]
    poisoned = key.at[:, 3, heads // 2 :].set(jnp.nan)
    np.testing.assert_array_equal(attend(key=poisoned), attend(key=key))
    assert mask[0, 2:, 0, 3].sum() == 0 and mask.sum() == 4 * 40 - 2  # the caller's mask stays as it is


def test_where_it_is_taken():
    assert few.are_few(queries=1, heads=64, keys=8) and few.are_few(queries=8, heads=8, keys=64)
    assert not few.are_few(queries=1, heads=4, keys=7) and not few.are_few(queries=8, heads=9, keys=64)


@pytest.mark.usefixtures("only_few")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_generation_copies_no_cache(batch, dtype):
    """A key and a value are written, and attended to: what the loop takes beside its cache is less than a seventh of that."""
    cached, query = (jax.ShapeDtypeStruct((batch, length, 4, 32), dtype) for length in (4096, 1))

    def step(carry, _):
        key, value, query, start = carry
        key, value = (xla_cpu.write_samples(x, query, start, axis=1) for x in (key, value))
        positions = dict(query_positions=start[:, None], key_positions=jnp.arange(4096)[None])
        return (key, value, softmax.attention(query, key, value, is_causal=True, **positions), start + 1), None

    loop = jax.jit(lambda *carry: jax.lax.scan(step, carry, None, 8)[0], donate_argnums=(0, 1))
    compiled = loop.lower(cached, cached, query, jax.ShapeDtypeStruct((batch,), jnp.int32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cached.size * cached.dtype.itemsize / 7
