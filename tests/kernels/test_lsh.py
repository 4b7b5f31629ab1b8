"""LSH attention: against loops over the paper's sets, against the dense reference, and what it costs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import lsh
from subquad.kernels.lsh import xla
from subquad.lra.bench import measure

STATIC = ("num_buckets", "chunk_size", "chunks_before", "chunks_after", "is_causal", "reach", "correct_duplicates",
          "implementation")
attention = jax.jit(lsh.attention, static_argnames=STATIC)
by_implementation = pytest.mark.parametrize("implementation", ["xla", "reference"])
LENGTH = 41


@functools.partial(jax.jit, static_argnames=STATIC)
def gradients(query_key, value, buckets, mask=None, segment_ids=None, num_buckets=6, chunk_size=8, **options):
    """Output and gradients of sum(out * fixed numbers). Calls of one shape and one set of options compile once."""
    run = lambda query_key, value: lsh.attention(
        query_key, value, buckets, num_buckets=num_buckets, chunk_size=chunk_size, mask=mask, segment_ids=segment_ids,
        **options)
    out, pull = jax.vjp(run, query_key, value)
    return out, *pull(jax.random.normal(jax.random.key(9), out.shape).astype(out.dtype))


def draw(length=LENGTH, batch=2, heads=2, features=8, value_features=6, rounds=3, buckets=6, seed=0):
    """query_key, value, buckets."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (batch, length, heads, features)),
        jax.random.normal(keys[1], (batch, length, heads, value_features)),
        jax.random.randint(keys[2], (batch, rounds, length, heads), 0, buckets),
    )


def close(actual, expected, tolerance=2e-5):
    for a, b in zip(actual, expected, strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of a few chunks, so that short sequences run many steps."""
    monkeypatch.setattr(xla, "CPU_TILE_BYTES", 2048)


# The definition, in loops.


def by_sets(query_key, value, buckets, chunk, before, after, is_causal, scale, reach="bucket", real=None):
    """Equations 2 to 12 for one head: the union over rounds of what is in the bucket and in reach, each key once."""
    length = len(query_key)
    real = np.ones(length, bool) if real is None else real
    out = np.zeros_like(value)
    places = []
    for row in buckets:
        order = sorted((j for j in range(length) if real[j]), key=lambda j: (row[j], j))  # noqa: B023
        places.append({j: s for s, j in enumerate(order)})
    for i in np.flatnonzero(real):
        seen = set()
        for row, place in zip(buckets, places, strict=True):
            for j in place:
                near = -before <= place[j] // chunk - place[i] // chunk <= after
                if near and j != i and (j < i or not is_causal) and (row[i] == row[j] or reach == "chunk"):
                    seen.add(j)
        seen = sorted(seen)
        if not seen:
            out[i] = value[i]
            continue
        logits = [scale * query_key[i] @ query_key[j] / np.linalg.norm(query_key[j]) for j in seen]
        weights = np.exp(np.array(logits) - max(logits))
        out[i] = weights @ value[seen] / weights.sum()
    return out


@by_implementation
@pytest.mark.parametrize(
    "is_causal,before,after,reach", [(False, 1, 0, "bucket"), (True, 1, 1, "bucket"), (False, 0, 1, "chunk")]
)
def test_equals_the_paper_in_loops(implementation, is_causal, before, after, reach):
    query_key, value, buckets = draw(19, batch=2, heads=1, buckets=4)
    real = np.ones((2, 19), bool)
    real[1, [0, 7, 18]] = False
    out = attention(
        query_key, value, buckets, num_buckets=4, chunk_size=3, chunks_before=before, chunks_after=after,
        mask=jnp.asarray(real)[:, None, None], is_causal=is_causal, scale=0.7, reach=reach, implementation=implementation,
    )
    for b in range(2):
        expected = by_sets(
            *(np.asarray(x[b, ..., 0, :], float) for x in (query_key, value)), np.asarray(buckets[b, ..., 0]), 3,
            before, after, is_causal, 0.7, reach, real[b],
        )
        np.testing.assert_allclose(out[b, :, 0], expected, atol=1e-5)


@by_implementation
def test_duplicates_count_once(implementation):
    """Two equal rounds and a third: the equal ones count once, or twice where the caller says so."""
    query_key, value, buckets = draw(24, rounds=2, buckets=3)
    doubled = buckets[:, [0, 0, 1]]
    options = dict(num_buckets=3, chunk_size=24, implementation=implementation)
    once = attention(query_key, value, buckets, **options)
    np.testing.assert_allclose(attention(query_key, value, doubled, **options), once, atol=1e-6)
    several = attention(query_key, value, doubled, **options, correct_duplicates=False)
    assert jnp.abs(several - once).max() > 0.01


# Against the reference.


@pytest.mark.parametrize(
    "length,chunk,before,after,is_causal,masked,reach,correct",
    [
        (1, 4, 1, 0, True, False, "bucket", True),
        (7, 16, 1, 1, False, True, "bucket", True),
        (63, 8, 1, 0, False, False, "bucket", True),
        (63, 8, 1, 0, True, True, "bucket", False),
        (63, 8, 0, 2, False, True, "chunk", True),
        (63, 8, 1, 1, True, True, "ring", False),
        (100, 7, 2, 1, True, True, "bucket", True),
        (100, 64, 1, 0, False, True, "chunk", False),
    ],
)
def test_values_and_gradients(length, chunk, before, after, is_causal, masked, reach, correct):
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (2, 1, 1, length)) if masked else None
    options = dict(chunk_size=chunk, chunks_before=before, chunks_after=after, is_causal=is_causal, reach=reach,
                   correct_duplicates=correct)
    close(*(gradients(*draw(length), mask, **options, implementation=i) for i in ("xla", "reference")))


def test_long_chunks_are_cut(monkeypatch):
    monkeypatch.setattr(xla, "CHUNK_BYTES", 4 * 40 * 7)  # 40 keys, 7 queries
    options = dict(chunk_size=20, is_causal=True)
    close(gradients(*draw(70), **options), gradients(*draw(70), **options, implementation="reference"))


def test_scale_is_differentiable():
    """Logits are proportional to the scale and to the lengths of the queries, so the two derivatives agree."""
    query_key, value, buckets = draw()
    run = lambda query_key, scale: jnp.sum(
        lsh.attention(query_key, value, buckets, num_buckets=6, chunk_size=8, scale=scale) ** 2)
    grad_query, grad_scale = jax.jit(jax.grad(run, argnums=(0, 1)))(query_key, 0.6)
    np.testing.assert_allclose(0.6 * grad_scale, jnp.sum(grad_query * query_key), rtol=1e-4)
    assert abs(grad_scale) > 0.1


@by_implementation
def test_bfloat16(implementation):
    query_key, value, buckets = draw()
    query_key, value = query_key.astype(jnp.bfloat16), value.astype(jnp.bfloat16)
    results = gradients(query_key, value, buckets, implementation=implementation)
    assert {x.dtype for x in results} == {jnp.dtype(jnp.bfloat16)}
    exact = gradients(query_key.astype(jnp.float32), value.astype(jnp.float32), buckets)
    for actual, wanted in zip(results, exact, strict=True):
        assert jnp.abs(actual.astype(jnp.float32) - wanted).max() < 2e-2 * jnp.abs(wanted).max()


def test_huge_logits_stay_finite():
    query_key, value, buckets = draw()
    results = gradients(1e6 * query_key, value, buckets)
    assert all(jnp.isfinite(x).all() for x in results)
    assert jnp.abs(results[0]).max() <= jnp.abs(value).max() + 1e-6


# Identities.


@by_implementation
@pytest.mark.parametrize("is_causal", [False, True])
def test_one_bucket_and_one_chunk_is_softmax(implementation, is_causal):
    query_key, value, buckets = draw(37)
    key = query_key / jnp.linalg.norm(query_key, axis=-1, keepdims=True)
    logits = jnp.einsum("btnh,bsnh->bnts", query_key, key) / math.sqrt(8)
    seen = np.tri(37, k=-1, dtype=bool) if is_causal else ~np.eye(37, dtype=bool)
    seen[0, 0] |= is_causal  # the first token has no other
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    out = attention(
        query_key, value, jnp.zeros_like(buckets), num_buckets=1, chunk_size=64, is_causal=is_causal,
        implementation=implementation,
    )
    np.testing.assert_allclose(out, jnp.einsum("bnts,bsnv->btnv", weights, value), atol=2e-6)


@by_implementation
def test_a_lonely_token_sees_itself(implementation):
    query_key, value, buckets = draw()
    alone = jnp.broadcast_to(jnp.arange(LENGTH)[:, None], buckets.shape)
    out, grad_query, grad_value = gradients(query_key, value, alone, num_buckets=LENGTH, implementation=implementation)
    np.testing.assert_array_equal(out, value)
    assert jnp.abs(grad_query).max() == 0 < jnp.abs(grad_value).min()


@by_implementation
def test_nothing_wraps_around(implementation):
    query_key, value, buckets = draw(12)
    run = lambda value: attention(
        query_key, value, 0 * buckets, num_buckets=1, chunk_size=4, chunks_before=1, chunks_after=1,
        implementation=implementation,
    )
    moved = jnp.abs(run(value.at[:, 8:].add(1.0)) - run(value)).max((0, 2, 3))
    assert moved[:4].max() == 0 and moved[4:].min() > 0
    moved = jnp.abs(run(value.at[:, :4].add(1.0)) - run(value)).max((0, 2, 3))
    assert moved[8:].max() == 0 and moved[:8].min() > 0


# Masks.


@by_implementation
def test_the_future_is_not_seen(implementation):
    query_key, value, buckets = draw()
    run = lambda q, v: gradients(q, v, buckets, is_causal=True, implementation=implementation)[0]
    loud = run(query_key.at[:, 20:].multiply(30.0), value.at[:, 20:].multiply(30.0))
    np.testing.assert_allclose(loud[:, :20], run(query_key, value)[:, :20], atol=1e-6)
    assert jnp.abs(loud[:, 20:] - run(query_key, value)[:, 20:]).max() > 1


@pytest.mark.parametrize("implementation,is_causal", [("xla", False), ("xla", True), ("reference", False)])
def test_padding_and_its_length_change_nothing(implementation, is_causal):
    """Padding in the middle and at the end, full of NaN, against the real tokens alone: chunk borders stay."""
    query_key, value, buckets = draw()
    padded = 59
    at = np.sort(np.random.default_rng(0).choice(padded, LENGTH, replace=False))
    mask = jnp.zeros((1, 1, 1, padded), bool).at[..., at].set(True)

    @jax.jit
    def run(query_key, value, buckets, mask=None):
        function = lambda query_key, value: lsh.attention(
            query_key, value, buckets, num_buckets=6, chunk_size=8, mask=mask, is_causal=is_causal,
            implementation=implementation,
        )
        out, pull = jax.vjp(function, query_key, value)
        return out, *pull(jnp.ones_like(out))

    spread = lambda x, fill: jnp.full((2, padded, *x.shape[2:]), fill, x.dtype).at[:, at].set(x)
    apart = jnp.moveaxis(spread(jnp.moveaxis(buckets, 2, 1), 3), 1, 2)
    alone = run(query_key, value, buckets)
    results = run(spread(query_key, jnp.nan), spread(value, jnp.nan), apart, mask)
    for actual, expected in zip(results, alone, strict=True):
        np.testing.assert_allclose(actual[:, at], expected, atol=2e-6)
        assert np.abs(np.delete(actual, at, axis=1)).max() == 0


@by_implementation
def test_all_padding_is_zero(implementation):
    mask = jnp.zeros((2, 1, 1, LENGTH), bool).at[0].set(True)
    for array in gradients(*draw(), mask, implementation=implementation):
        assert jnp.isfinite(array).all() and jnp.abs(array[1]).max() == 0 < jnp.abs(array[0]).max()


@by_implementation
def test_a_zero_query_has_a_zero_key(implementation):
    query_key, value, buckets = draw()
    results = gradients(query_key.at[:, 4].set(0), value, buckets, implementation=implementation)
    assert all(jnp.isfinite(x).all() for x in results)


# Segments.


@by_implementation
@pytest.mark.parametrize("reach,is_causal", [("bucket", False), ("bucket", True), ("chunk", False)])
def test_packed_segments_give_what_each_gives_alone(implementation, reach, is_causal):
    """Interleaved, with padding among them and in the most extreme names; values and gradients."""
    query_key, value, buckets = draw(47)
    names = np.array([7, -(2**31), 2**31 - 1])
    which = np.random.default_rng(0).integers(0, 3, 47)
    real = np.arange(47) % 9 > 0
    options = dict(chunk_size=5, reach=reach, is_causal=is_causal, implementation=implementation)
    mask, segment_ids = jnp.asarray(real)[None, None, None], jnp.asarray(names[which], jnp.int32)[None]
    packed = gradients(query_key, value, buckets, mask, segment_ids=segment_ids, **options)
    assert all(jnp.abs(x[:, ~real]).max() == 0 for x in packed)
    for i in range(3):
        # The cotangents stand at their places, so that each alone is the whole with all others hidden.
        own = jnp.asarray(real & (which == i))
        alone = gradients(query_key, value, buckets, own[None, None, None], **options)
        for a, b in zip(packed, alone, strict=True):
            np.testing.assert_allclose(a[:, own], b[:, own], atol=1e-5)


# Sorting.


def test_two_ways_to_sort():
    """A bucket and a position that do not fit one int32 are sorted as a pair, with the same result."""
    query_key, value, buckets = draw(33)
    usual = attention(query_key, value, buckets, num_buckets=6, chunk_size=8)
    np.testing.assert_array_equal(attention(query_key, value, buckets, num_buckets=2**30, chunk_size=8), usual)
    pairs = lambda num_buckets: str(jax.make_jaxpr(lambda b: lsh.attention(
        query_key, value, b, num_buckets=num_buckets, chunk_size=8))(buckets)).count("num_keys=2")
    most = 2**31 // 33 - 1
    assert (pairs(6), pairs(most), pairs(most + 1), pairs(2**30)) == (0, 0, 1, 1)
    far = jnp.where(buckets == 5, most - 1, buckets)  # the largest keys that fit
    np.testing.assert_array_equal(attention(query_key, value, far, num_buckets=most, chunk_size=8), usual)


def test_the_same_twice():
    jax.tree.map(np.testing.assert_array_equal, gradients(*draw()), gradients(*draw()))


# Extend.


@pytest.mark.parametrize("start,length,correct", [(0, 30, False), (11, 9, True), (29, 1, True)])
def test_extend(start, length, correct):
    query, value, buckets = draw(30)
    mask = jax.random.bernoulli(jax.random.key(5), 0.8, (2, 1, 1, 30)).at[0].set(True)
    new = slice(start, start + length)

    @functools.partial(jax.jit, static_argnums=2)
    def run(query, value, implementation):
        out, pull = jax.vjp(lambda query, value: lsh.extend(
            query[:, new], lsh.normalize(query)[0], value, buckets[:, :, new], buckets, start=start, mask=mask,
            correct_duplicates=correct, implementation=implementation,
        ), query, value)
        return out, *pull(jnp.cos(out))

    fast = run(query, value, "xla")
    close(fast, run(query, value, "reference"))
    whole = gradients(query, value, buckets, mask, chunk_size=30, is_causal=True, correct_duplicates=correct)[0]
    np.testing.assert_allclose(fast[0], whole[:, new], atol=2e-6)


# Cost.


def cost(length, rounds=4, chunk=64):
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)] * 2
    buckets = jax.ShapeDtypeStruct((1, rounds, length, 2), jnp.int32)

    def gradient(query_key, value, buckets):
        run = lambda q, v: jnp.sum(attention(q, v, buckets, num_buckets=2 * length // chunk, chunk_size=chunk))
        return jax.grad(run, argnums=(0, 1))(query_key, value)

    return measure.flops(gradient, *shapes, buckets), measure.memory(gradient, *shapes, buckets).temporary


def test_time_and_memory_are_linear(monkeypatch):
    monkeypatch.undo()  # tiles of their true size
    flops, memory = cost(4096)
    twice_flops, twice_memory = cost(8192)
    assert twice_flops < 2.1 * flops and twice_memory < 2.2 * memory
    # The inputs take 4 MiB; weights kept for the backward pass would take 4 x 2 x 4096 x 128 x 4 bytes = 16 MiB more.
    assert memory < 18 * 2**20
    # More rounds cost indices (10 integers per token and round here), not rows.
    assert cost(4096, rounds=8)[1] - memory < 4 * 2 * 4096 * 16 * 4


# Refusals.


@pytest.mark.parametrize(
    "changes,argument,kind",
    [
        (dict(num_buckets=0), "num_buckets", ValueError),
        (dict(chunk_size=0), "chunk_size", ValueError),
        (dict(chunk_size=2.0), "chunk_size", ValueError),
        (dict(chunks_before=-1), "chunks_before", ValueError),
        (dict(chunks_after=-1), "chunks_after", ValueError),
        (dict(reach="bin"), "reach", ValueError),
        (dict(reach="ring"), "correct_duplicates", ValueError),
        (dict(mask=jnp.ones((2, 1, 9, 9), bool)), "mask", ValueError),
        (dict(segment_ids=jnp.ones((2, 8), int)), "segment_ids", ValueError),
        (dict(segment_ids=jnp.ones((2, 9))), "segment_ids", TypeError),
        (dict(segment_ids=jnp.ones((2, 9), int), reach="ring", correct_duplicates=False), "segment_ids", ValueError),
        (dict(mask=jnp.ones((2, 1, 1, 9))), "mask", TypeError),
        (dict(value=jnp.ones((2, 8, 2, 6))), "value", ValueError),
        (dict(value=jnp.ones((2, 9, 2))), "value", ValueError),
        (dict(buckets=jnp.ones((2, 3, 9, 2))), "buckets", TypeError),
        (dict(buckets=jnp.ones((2, 3, 9, 1), int)), "buckets", ValueError),
        (dict(implementation="fast"), "implementation", ValueError),
        (dict(implementation="triton"), "implementation", NotImplementedError),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(changes, argument, kind):
    query_key, value, buckets = draw(9)
    arguments = {**dict(query_key=query_key, value=value, buckets=buckets, num_buckets=6, chunk_size=4), **changes}
    with pytest.raises(kind, match=rf"lsh\.attention: {argument}"):
        lsh.attention(**arguments)


def test_bad_extension_is_named():
    query, value, buckets = draw(9)
    with pytest.raises(ValueError, match=r"lsh\.extend: query"):
        lsh.extend(query[:, 8:, :1], query, value, buckets[:, :, 8:], buckets, start=8)
    with pytest.raises(ValueError, match=r"lsh\.extend: query"):
        lsh.extend(query[:, 8:], query, value, buckets, buckets, start=8)
    with pytest.raises(ValueError, match=r"lsh\.extend: key_buckets"):
        lsh.extend(query[:, 8:], query, value, buckets[:, :, 8:], buckets[:, :, 8:], start=8)
