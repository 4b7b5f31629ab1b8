"""Reformer against two peers, against the paper's identities, and what is its own: rotations, buckets, cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import lsh
from subquad.zoo.buckets.reformer import ReformerAttention
from subquad.zoo.features import RandomFeature
from tests import oracle

TOLERANCE = 1e-4


def inputs(length, features=16, batch=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, features))


def small(**options):
    return ReformerAttention(2, 16, **{"num_hashes": 2, "chunk_size": 8, "rngs": nnx.Rngs(0), **options})


def run(layer, x):
    return jax.jit(lambda x: layer(x))(x)


# Peers. Hugging Face's departs from the paper in three ways, each an option with a name here: a chunk sees everything
# in reach whatever its bucket, with the chunks of all rounds in one ring (reach="ring"); keys found in several rounds
# count several times (correct_duplicates=False); logits are not divided by sqrt(H) (scale=1).


@pytest.mark.parametrize("name", ["bidir_h1", "causal_h2", "bidir_factored"])
def test_hugging_face(name):
    """It has no output projection, so ours is the identity."""
    peer = oracle.load(f"reformer_lsh_{name}")
    cfg = peer.meta["cfg"]
    heads, features = cfg["H"], cfg["d"]
    layer = ReformerAttention(
        heads, heads * features, is_causal=cfg["causal"], num_hashes=cfg["num_hashes"], num_buckets=cfg["num_buckets"],
        chunk_size=cfg["chunk"], chunks_before=cfg["before"], chunks_after=cfg["after"], scale=1.0, reach="ring",
        correct_duplicates=False, use_bias=False, rngs=nnx.Rngs(0),
    )
    layer.rotations[...] = jnp.asarray(peer.constants["rotations"], jnp.float32)
    layer.out.kernel[...] = jnp.eye(heads * features).reshape(heads, features, -1)
    filled = lambda weights: oracle.holding(layer, weights, {"query_key": "query"})
    query = filled(peer.weights).query(jnp.asarray(peer.inputs["hidden_states"], jnp.float32))
    buckets = np.moveaxis(np.asarray(layer.hash(query, query.shape[1])), 3, 1)  # [B, N, R, T], as the peer's
    offset = np.arange(layer.num_hashes)[:, None] * np.prod(layer.factors)
    np.testing.assert_array_equal(buckets + offset, peer.outputs["buckets"])
    call = lambda inputs, weights: filled(weights)(inputs["hidden_states"])
    oracle.compare("reformer", peer, call, tolerance=3e-5)


def lucidrains(name):
    """The peer's run, buckets and options for our kernel: 3 sequences of one head, one set of rotations."""
    peer = oracle.load(f"lucid_lsh_{name}")
    query_key = jnp.asarray(peer.inputs["qk"], jnp.float32)[:, :, None]
    rotations = jnp.asarray(peer.constants["rotations"], jnp.float32)
    buckets = lsh.hash_buckets(query_key, rotations)
    num_buckets = 2 * rotations.shape[-1]
    offset = np.arange(buckets.shape[1])[:, None] * num_buckets
    np.testing.assert_array_equal(buckets[..., 0] + offset, peer.outputs["buckets"])
    options = dict(num_buckets=num_buckets, chunk_size=peer.meta["cfg"]["bucket_size"],
                   is_causal=peer.meta["cfg"].get("causal", False))
    return peer, buckets, options


def compare(peer, attention):
    """`attention` of shared queries and keys and of values, [B, T, 1, H], against the peer's."""
    heads = lambda inputs, _: attention(inputs["qk"][:, :, None], inputs["v"][:, :, None])[:, :, 0]
    oracle.compare("reformer", peer, heads, of="mechanism")


# lucidrains' default departs as Hugging Face's does, but divides by sqrt(H). With attend_across_buckets=False only the
# duplicates remain: a key of the round before has another bucket, so its ring is none (with more than one round).
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name,reach", [("bidir", "ring"), ("causal", "ring"), ("causal_within", "bucket")])
def test_lucidrains(name, reach, implementation):
    peer, buckets, options = lucidrains(name)
    compare(peer, lambda query_key, value: lsh.attention(
        query_key, value, buckets, **options, reach=reach, correct_duplicates=False, implementation=implementation))


def dense(query_key, value, weights):
    """Attention over keys that weigh `weights` [B, T, T]; nothing visible: the own value."""
    query, value = query_key[:, :, 0], value[:, :, 0]
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    logits = jnp.einsum("bth,bsh->bts", query, key) * query.shape[-1] ** -0.5
    total = weights.sum(-1, keepdims=True)
    share = weights * jnp.exp(logits)
    y = jnp.einsum("bts,bsv->btv", share, value) / jnp.where(total > 0, share.sum(-1, keepdims=True), 1)
    return jnp.where(total > 0, y, value)[:, :, None]


def test_lucidrains_without_duplicates():
    """Its count of duplicates forgets the ring: the first chunk of a round sees the last chunk of the round before, and a
    key seen only there has the count 0, so that it weighs 1 / (0 + 1e-9), a thousand million times a key in reach. That
    is no option here. So the peer is explained by a dense formula that weighs as it does, and our kernel by the same
    formula without what is seen through the ring.
    """
    peer, buckets, options = lucidrains("nodup")
    rounds, length = buckets.shape[1:3]
    named, buckets = buckets, np.asarray(buckets[..., 0])
    chunks = np.argsort(np.argsort(buckets, axis=-1, kind="stable"), axis=-1) // options["chunk_size"]
    chunks += (chunks.max() + 1) * np.arange(rounds)[:, None]  # in the ring of all rounds
    ring = chunks.max() + 1
    behind = (chunks[:, :, :, None, None] - chunks.transpose(0, 2, 1)[:, None, None]) % ring  # [B, R, T, S, R]
    behind = np.moveaxis(behind, 4, 2)  # [B, query's round, key's round, T, S]
    count = sum(behind[:, r, r] <= 1 for r in range(rounds))
    visits = (behind <= 1).sum((1, 2))
    earlier = np.tri(length, k=-1, dtype=bool)

    theirs = jnp.asarray(np.where(earlier, visits / (count + 1e-9), 0), jnp.float32)
    compare(peer, lambda query_key, value: dense(query_key, value, theirs))

    query_key, value = (jnp.asarray(peer.inputs[key], jnp.float32)[:, :, None] for key in ("qk", "v"))
    ours = jnp.asarray((count > 0) & earlier, jnp.float32)
    kernel = lambda q, v: lsh.attention(q, v, named, **options, reach="chunk")
    cotangent = jnp.asarray(peer.cotangents["y"], jnp.float32)[:, :, None]
    y, pull = jax.vjp(jax.jit(kernel), query_key, value)
    expected, expected_pull = jax.vjp(lambda q, v: dense(q, v, ours), query_key, value)
    for actual, wanted in zip((y, *pull(cotangent)), (expected, *expected_pull(cotangent)), strict=True):
        assert oracle.relative_error(actual, wanted) < TOLERANCE

    clean = ~((visits != count) & earlier).any(-1)  # rows that see nothing through the ring
    assert 0.1 < clean.mean() < 1
    assert oracle.relative_error(np.asarray(y[:, :, 0])[clean], peer.outputs["y"][clean]) < TOLERANCE


# Identities of the paper.


def softmax_of_shared_keys(layer, x):
    """Dense attention with the layer's projections: normalised keys, no look at oneself unless alone."""
    query, value = layer.query(x), layer.value(x)
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    length = x.shape[1]
    seen = jnp.tri(length, k=-1, dtype=bool) if layer.is_causal else ~jnp.eye(length, dtype=bool)
    seen |= jnp.eye(length, dtype=bool) & ~seen.any(-1, keepdims=True)
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return layer.out(jnp.einsum("bnts,bsnh->btnh", weights, value))


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_bucket_and_one_chunk_is_softmax(is_causal):
    """One bucket cannot be asked for (a direction has an opposite), but parallel queries share one."""
    layer = small(is_causal=is_causal, chunk_size=64)
    layer.query.kernel[...] = layer.query.kernel[...] * 1e-3
    layer.query.bias[...] = jnp.ones_like(layer.query.bias[...])
    x = inputs(50)
    assert len(np.unique(layer.hash(layer.query(x), 50)[0, 0, :, 0])) == 1
    np.testing.assert_allclose(run(layer, x), softmax_of_shared_keys(layer, x), atol=2e-6)


def test_error_falls_with_rounds():
    x = 4 * inputs(128)
    errors = []
    for rounds in (1, 2, 4, 8):
        layer = small(num_hashes=rounds, num_buckets=4, chunk_size=64, chunks_after=1)
        errors.append(float(jnp.abs(run(layer, x) - softmax_of_shared_keys(layer, x)).mean()))
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2] > 1.5**3 * errors[3], errors


# Buckets and rotations.


def test_the_number_of_buckets_follows_the_samples_own_length():
    layer = small()
    query = layer.query(inputs(64))
    half = sum(layer.factors) // 2
    both = layer.hash(query, jnp.array([64, 20]))
    long, short = layer.hash(query, 64), layer.hash(query, 20)
    assert long.max() == 15 and short.max() == 3
    # Numbered otherwise where the length is known while tracing, in the same order.
    np.testing.assert_array_equal(both[0], jnp.where(long[0] < 8, long[0], long[0] - 8 + half))
    np.testing.assert_array_equal(both[1], jnp.where(short[1] < 2, short[1], short[1] - 2 + half))
    assert layer.hash(query, 10**6).max() < 128


def test_rotations_are_kept_and_not_trained():
    layer = small()
    assert type(layer.rotations) is RandomFeature and layer.rotations.shape == (2, 8, 2, 64)
    assert "rotations" not in nnx.state(layer, nnx.Param)
    other = small(rngs=nnx.Rngs(1))
    x = inputs(40)
    nnx.update(other, nnx.state(layer))
    before = run(layer, x)
    np.testing.assert_array_equal(run(other, x), before)
    layer.rotations[...] = layer.redraw(nnx.Rngs(2))
    assert jnp.abs(run(layer, x) - before).max() > 1e-3


def test_there_is_no_key_projection():
    assert {path[0] for path in nnx.to_flat_state(nnx.state(small(), nnx.Param)).paths} == {"query", "value", "out"}


# Causality: the mask is strict, the chunks leak, and the docstring says so.


def test_the_future_moves_chunks_and_nothing_else():
    x, at = inputs(64, batch=1), 60
    loud = x.at[:, at].multiply(-1.0)
    leaking, one_chunk = small(is_causal=True), small(is_causal=True, chunk_size=64)
    leaked = (run(leaking, loud) - run(leaking, x))[:, :at]
    assert jnp.abs(leaked).max() > 1e-4, "if this never happens, causal='mask' and the docstring are wrong"
    jacobian = jax.jit(jax.jacrev(lambda x: leaking(x)[0].sum(-1)))(x)[:, 0]
    assert jnp.abs(jnp.triu(jnp.abs(jacobian).sum(-1), 1)).max() == 0
    np.testing.assert_allclose(run(one_chunk, loud)[:, :at], run(one_chunk, x)[:, :at], atol=1e-6)


# Extend.


def extend_all(layer, x, cuts, mask=None):
    cache, outputs, start = layer.init_cache(x.shape[0], x.shape[1]), [], 0
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    for width in cuts:
        stop = start + width
        y, cache = step(x[:, start:stop], cache, None if mask is None else mask[..., start:stop])
        outputs.append(y)
        start = stop
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("cuts", [[1] * 40, [9, 1, 23, 7]], ids=["tokens", "parts"])
def test_extend_does_not_depend_on_the_cutting(cuts):
    layer, x = small(is_causal=True), inputs(40)
    whole, cache = extend_all(layer, x, [40])
    parts, other = extend_all(layer, x, cuts)
    np.testing.assert_allclose(parts, whole, atol=2e-6)
    np.testing.assert_array_equal(cache.buckets, other.buckets)
    assert other.length.tolist() == [40, 40]


def test_extend_equals_the_call_where_no_chunk_cuts_a_bucket():
    x = inputs(40)
    mask = jnp.ones((2, 1, 1, 40), bool).at[0, ..., 5].set(False).at[1, ..., :3].set(False)
    layer = small(is_causal=True, chunk_size=40, num_buckets=6)
    is_real = mask[:, 0, 0, :, None]
    expected = jax.jit(lambda x: layer(x, mask=mask))(x) * is_real
    np.testing.assert_allclose(extend_all(layer, x, [17, 1, 22], mask)[0] * is_real, expected, atol=2e-6)
    cutting = small(is_causal=True, chunk_size=4, num_buckets=2)
    assert jnp.abs(extend_all(cutting, x, [40])[0] - run(cutting, x)).max() > 1e-3, "as the docstring says"


def test_extend_in_half_precision_cache():
    layer, x = small(is_causal=True, num_buckets=2), inputs(20)
    exact, _ = extend_all(layer, x, [20])
    y, cache = layer.extend(x, layer.init_cache(2, 20, dtype=jnp.bfloat16))
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    np.testing.assert_allclose(y, exact, atol=0.03)


def test_extend_has_a_gradient():
    layer, x = small(is_causal=True, chunk_size=24, num_buckets=4), inputs(24)
    through_cache = lambda x: jnp.sum(layer.extend(x, layer.init_cache(2, 24))[0] ** 2)
    at_once = lambda x: jnp.sum(layer(x) ** 2)
    np.testing.assert_allclose(jax.jit(jax.grad(through_cache))(x), jax.jit(jax.grad(at_once))(x), atol=1e-5)


# Refusals of its own.


@pytest.mark.parametrize(
    "options,argument",
    [
        (dict(num_buckets=7), "num_buckets"),
        (dict(num_buckets=(4, 3)), "num_buckets"),
        (dict(num_buckets=()), "num_buckets"),
        (dict(num_buckets=4.0), "num_buckets"),
        (dict(num_hashes=0), "num_hashes"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(chunks_before=-1), "chunks_before"),
        (dict(chunks_after=0.5), "chunks_after"),
        (dict(reach="rings"), "reach"),
        (dict(reach="ring"), "correct_duplicates"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, argument):
    with pytest.raises(ValueError, match=f"ReformerAttention: {argument} must"):
        small(**options)


def test_extend_needs_buckets():
    layer = small(is_causal=True, reach="chunk")
    with pytest.raises(ValueError, match="ReformerAttention: reach must be 'bucket'"):
        layer.init_cache(1, 8)


def test_attention_fn_is_refused_with_its_reason():
    assert not ReformerAttention.supports.attention_fn
    assert "no separate key" in zoo.LAYERS.get("reformer", ReformerAttention).__doc__


# Segments.


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_segments_are_sequences_of_their_own(is_causal):
    """Each with as many buckets as its own length asks for, borders of chunks from its own start, and no gradient across."""
    layer = small(is_causal=is_causal)
    x = inputs(60)
    segments = jnp.array([3] * 13 + [1] * 40 + [2] * 7)
    packed = jax.jit(lambda x: layer(x, segment_ids=segments))(x)
    for start, stop in ((0, 13), (13, 53), (53, 60)):
        np.testing.assert_allclose(packed[:, start:stop], run(layer, x[:, start:stop]), atol=1e-5)
    real = jnp.arange(60) % 4 > 0
    mask = jnp.broadcast_to(real, (2, 1, 1, 60))
    function = lambda x: layer(x, segment_ids=segments, mask=mask)[:, 13:53][:, real[13:53]]
    found, pull = jax.vjp(function, x)
    np.testing.assert_allclose(found, run(layer, x[:, 13:53][:, real[13:53]]), atol=1e-5)
    moved = jnp.abs(pull(jnp.ones_like(found))[0]).max((0, 2))
    assert moved[:13].max() == 0 == moved[53:].max() and moved[13:53].max() > 0


def test_a_ring_has_no_segments():
    layer = small(reach="ring", correct_duplicates=False)
    with pytest.raises(ValueError, match="ReformerAttention: segment_ids must be None with reach='ring'"):
        layer(inputs(9), segment_ids=jnp.zeros(9, int))


@pytest.mark.parametrize("given", [
    dict(chunks_before=0, chunks_after=2, scale=0.7, reach="chunk"),
    dict(chunks_before=2, chunks_after=0, scale=None, reach="bucket", correct_duplicates=False),
    dict(chunks_before=1, chunks_after=1, scale=1.0, reach="ring", correct_duplicates=False),
], ids=str)
def test_options_reach_the_kernel(given):
    layer = small(num_buckets=4, chunk_size=4, is_causal=True, **given)
    query, value = (jax.random.normal(jax.random.key(seed), (2, 24, 2, 8)) for seed in range(2))
    mask = jnp.ones((2, 1, 1, 24), bool).at[0, ..., 20:].set(False)
    buckets = lsh.hash_buckets(query, layer.rotations[...], factors=(4,))
    want = lsh.attention(query, value, buckets, num_buckets=4, chunk_size=4, mask=mask, is_causal=True, **given)
    np.testing.assert_allclose(layer.attend(query, query, value, mask), want, atol=1e-6)
