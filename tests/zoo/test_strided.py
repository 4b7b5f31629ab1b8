"""StridedAttention: the index sets of the Sparse Transformer, from small pieces that never make a T x T array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding


def make(stride=5, is_causal=False, num_heads=4, **options):
    return zoo.StridedAttention(num_heads, FEATURES, stride=stride, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


KINDS = [
    dict(pattern="strided", heads="merged"),
    dict(pattern="strided", heads="separate"),
    dict(pattern="fixed", heads="merged", num_summary=2),
    dict(pattern="fixed", heads="separate", num_summary=1),
    dict(pattern="fixed", heads="merged", num_summary=2, distinct_summary=True),
    dict(pattern="fixed", heads="separate", num_summary=3, distinct_summary=True, stride=6),
]


def index_sets(pattern, stride, summary, t, last, is_causal):
    """A1 and A2 of position t as the paper writes them (section 4.3), with their mirror if not causal."""
    if pattern == "strided":
        near = {s for s in range(last) if abs(t - s) <= stride}
        far = {s for s in range(last) if (t - s) % stride == 0}
    else:
        near = {s for s in range(last) if s // stride == t // stride}
        far = {s for s in range(last) if s % stride in range(stride - summary, stride)}
    return [{s for s in chosen if s <= t or not is_causal} for chosen in (near, far)]


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_index_sets_of_the_paper(pattern, is_causal):
    length, options = 23, dict(pattern=pattern, num_summary=2 if pattern == "fixed" else None, is_causal=is_causal)
    merged, separate = make(heads="merged", **options).pattern(length), make(heads="separate", **options).pattern(length)
    for t in range(length):
        near, far = index_sets(pattern, 5, 2, t, length, is_causal)
        assert set(np.flatnonzero(merged[0, t])) == near | far
        for head in range(4):
            assert set(np.flatnonzero(separate[head, t])) == (far if head % 2 else near)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("is_causal", [False, True])
def test_attends_to_its_pattern_and_nothing_else(options, is_causal):
    for length in (1, 4, 5, 28):
        check_support(make(is_causal=is_causal, **options), length)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_softmax_attention_under_its_pattern(options, is_causal):
    check_dense(make(is_causal=is_causal, **options), 28, padding(28))


@pytest.mark.parametrize("pattern", ["strided", "fixed"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_stride_over_everything_is_softmax_attention(pattern, is_causal):
    layer = make(stride=40, pattern=pattern, is_causal=is_causal)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(33)), full(inputs(33)), atol=2e-6)


def test_two_steps_reach_every_earlier_token():
    """The factorisation is valid (section 4.2): a path of two steps leads to every earlier token."""
    sets = {}
    for pattern in ("strided", "fixed"):
        layer = make(pattern=pattern, heads="separate", is_causal=True, num_heads=2)
        sets[pattern] = layer.pattern(23).astype(int)
    near, far = sets["strided"]
    np.testing.assert_array_equal(near @ far > 0, np.tri(23, dtype=bool))
    near, far = sets["fixed"]
    np.testing.assert_array_equal(near + far @ near > 0, np.tri(23, dtype=bool))


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("cuts", [[1] * 12 + [25], [3, 17, 17]], ids=str)
def test_extend_in_any_cutting(options, cuts):
    check_extend(make(is_causal=True, **options), 37, cuts, padding(37), max_length=41)


def test_no_square_is_made():
    for options, is_causal in itertools.product(KINDS, (False, True)):
        layer = make(**{**options, "stride": 32}, is_causal=is_causal)
        assert "512,512" not in str(jax.make_jaxpr(lambda x, layer=layer: layer(x))(inputs(512)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("dtypes", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)], ids=str)
def test_a_token_reads_a_part_of_the_cache(options, dtypes):
    """One extended token holds nothing as large as the cache, in whatever dtype that is."""
    cached, dtype = dtypes
    layer = make(**{**options, "stride": 64}, is_causal=True, dtype=dtype)
    cache = jax.eval_shape(lambda: layer.init_cache(1, 8192, cached))
    token = jax.ShapeDtypeStruct((1, 1, FEATURES), dtype)
    compiled = jax.jit(lambda x, cache: layer.extend(x, cache), donate_argnums=1).lower(token, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key.size * cache.key.dtype.itemsize


def test_lra_strided():
    """The copy in LRA is dense attention under the union of both sets: here the same, without the square."""
    peer = oracle.load("lra_sparse_strided")
    layer = zoo.StridedAttention(2, 16, stride=8, is_causal=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.pattern(32)[0], peer.constants["mask"])
    oracle.compare("strided", peer, lambda inputs, weights: oracle.holding(layer, weights)(inputs["x"]))


def test_lra_fixed_has_one_more_column():
    """LRA takes the formula's range t..l of s mod l at its word, so that the first column of a block is one as well."""
    peer = oracle.load("lra_sparse_fixed")
    layer = zoo.StridedAttention(2, 16, pattern="fixed", stride=8, num_summary=2, is_causal=True, rngs=nnx.Rngs(0))
    first = np.tril(np.broadcast_to(np.arange(32) % 8 == 0, (32, 32)))
    np.testing.assert_array_equal(layer.pattern(32)[0] | first, peer.constants["mask"])


@pytest.mark.parametrize(("length", "stride"), [(32, 8), (24, 4), (64, 16)])
def test_openai_masks(length, stride):
    """OpenAI's strided mask is A2. Its local mask counts the query among the ctx keys, where A1 reaches back l."""
    peer = oracle.load("sparse_openai_masks")
    near, far = make(stride, is_causal=True, heads="separate", num_heads=2).pattern(length)
    np.testing.assert_array_equal(far, peer.outputs[f"strided_n{length}_c{stride}"].astype(bool))
    local = peer.outputs[f"local_n{length}_c{stride}"].astype(bool)
    np.testing.assert_array_equal(near, local | np.eye(length, k=-stride, dtype=bool))
    # The difference is in A2, so the union is the same.
    np.testing.assert_array_equal(make(stride, is_causal=True).pattern(length)[0], local | far)


def test_openai_fixed_layouts():
    peer = oracle.load("sparse_openai_masks")
    for heads, distinct in ((4, True), (2, False)):
        layer = make(8, True, heads, pattern="fixed", num_summary=2, distinct_summary=distinct)
        name = f"blocksparse_fixed_n32_c8_b2_h{heads}_verts{4 if distinct else 1}x1"
        layout = peer.outputs[name].astype(bool)
        np.testing.assert_array_equal(np.broadcast_to(layer.pattern(32), layout.shape), layout)


def test_openai_outputs():
    peer = oracle.load("sparse_openai_masks")
    layer = zoo.StridedAttention(2, 16, stride=8, heads="separate", is_causal=True, rngs=nnx.Rngs(0))
    heads = layer.attend(*(jnp.asarray(peer.inputs[name]).swapaxes(1, 2) for name in "qkv"), None)
    theirs = peer.outputs["y_strided_n32_c8"][:, 1]
    oracle.check("strided", peer, (heads[:, :, 1], theirs), tolerance=2e-6, of="mechanism")


def test_refusals():
    for word, options in (
        ("pattern", dict(pattern="stride")),
        ("heads", dict(heads="merge")),
        ("stride", dict(stride=0)),
        ("stride", dict(stride="4")),
        ("num_summary", dict(num_summary=6, pattern="fixed")),
        ("num_summary", dict(num_summary=0, pattern="fixed")),
        ("num_summary", dict(num_summary=2)),  # "strided" has no summary columns
        ("distinct_summary", dict(distinct_summary=True)),
        ("num_heads", dict(heads="separate", num_heads=1)),
    ):
        with pytest.raises(ValueError, match=f"StridedAttention: {word} must"):
            make(**options)
    with pytest.raises(ValueError, match="Did you mean 'strided'"):
        make(pattern="stride")
