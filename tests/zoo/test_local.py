"""LocalAttention: its window, exactly, at linear cost; peers' windows and how each counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding


def make(window_size, is_causal=False, heads=4, **options):
    return zoo.LocalAttention(heads, FEATURES, window_size=window_size, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


WINDOWS = [(0, False), (3, False), ((2, 5), False), ((4, 0), False), (0, True), (3, True), ((6, 0), True), (100, False)]


@pytest.mark.parametrize(("window_size", "is_causal"), WINDOWS)
def test_attends_to_the_window_and_nothing_else(window_size, is_causal):
    layer = make(window_size, is_causal)
    check_support(layer, 23)
    left, right = window_size if isinstance(window_size, tuple) else (window_size, window_size)
    row = layer.pattern(23)[0, 11]
    assert row.sum() == min(11, left) + 1 + (0 if is_causal else min(11, right))


@pytest.mark.sample(2)
@pytest.mark.parametrize(("window_size", "is_causal"), [(3, False), ((2, 5), False), (4, True)])
@pytest.mark.parametrize("length", [1, 29])
def test_is_softmax_attention_under_its_pattern(window_size, is_causal, length):
    check_dense(make(window_size, is_causal), length, padding(length))
    check_dense(make(window_size, is_causal, num_kv_heads=2), length)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_over_everything_is_softmax_attention(is_causal):
    layer = make(40, is_causal)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(40)), full(inputs(40)), atol=2e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_segments_are_separate_sequences(is_causal):
    layer, x = make(4, is_causal), inputs(30)
    packed = layer(x, segment_ids=jnp.array([0] * 13 + [7] * 17))
    np.testing.assert_allclose(packed[:, :13], layer(x[:, :13]), atol=2e-6)
    np.testing.assert_allclose(packed[:, 13:], layer(x[:, 13:]), atol=2e-6)


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [3, 17, 20], [25, 1, 14]], ids=str)
@pytest.mark.parametrize("window_size", [0, 1, 6, 100])
def test_extend_in_any_cutting(cuts, window_size):
    check_extend(make(window_size, True, num_kv_heads=2), 40, cuts, padding(40), max_length=1)


def test_the_cache_is_one_window():
    cache = make(6, True, num_kv_heads=2).init_cache(3, 100_000, dtype=jnp.bfloat16)
    assert cache.key.shape == cache.value.shape == (3, 6, 2, 4) and cache.key.dtype == jnp.bfloat16
    assert cache.seen.tolist() == [0, 0, 0]


def test_longformer():
    """Hugging Face's window w is w / 2 tokens on each side and the query itself: w + 1 keys."""
    peer = oracle.load("longformer_local")
    assert peer.meta["cfg"]["attention_window"] == 8 and not peer.inputs["attention_mask"].any()
    layer = zoo.LocalAttention(4, 32, window_size=4, rngs=nnx.Rngs(0))

    def before_the_output_projection(inputs, weights):
        x, local = inputs["x"], {name: w for name, w in weights.items() if "global" not in name}
        held = oracle.holding(layer, local)
        return held.attend(*held.project(x, x), None).reshape(x.shape)

    oracle.compare("local", peer, before_the_output_projection)


def test_local_attention_with_exact_window():
    """lucidrains' window is in blocks; trimmed to the exact one it is window_size tokens on each side."""
    peer = oracle.load("local_lucid_bidir_exact")
    oracle.compare_mechanism("local", zoo.LocalAttention(2, 16, window_size=8, rngs=nnx.Rngs(0)), peer, heads_first=True)


@pytest.mark.parametrize("is_causal", [False, True])
def test_fast_transformers(is_causal):
    """Its local_context c counts all keys: c / 2 before the query, the query, and c / 2 - 1 after it."""
    peer = oracle.load("ft_local16_causal" if is_causal else "ft_local16")
    assert peer.meta["cfg"]["local_context"] == 8
    layer = zoo.LocalAttention(2, 16, window_size=4 if is_causal else (4, 3), is_causal=is_causal, rngs=nnx.Rngs(0))
    oracle.compare_mechanism("local", layer, peer)


def test_sparse_transformer_local_mask():
    """OpenAI's local mask of ctx keys counts the query itself: ctx - 1 before it."""
    peer = oracle.load("sparse_openai_masks")
    layer = zoo.LocalAttention(2, 16, window_size=7, is_causal=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.pattern(32)[0], peer.outputs["local_n32_c8"].astype(bool))
    np.testing.assert_array_equal(layer.pattern(32)[0], peer.outputs["blocksparse_local_n32_c8_b4"].astype(bool))
    heads = layer.attend(*(jnp.asarray(peer.inputs[name]).swapaxes(1, 2) for name in "qkv"), None)
    oracle.check("local", peer, (heads.swapaxes(1, 2), peer.outputs["y_local_n32_c8"]), tolerance=2e-6, of="mechanism")


def test_the_window_is_never_a_square():
    layer = make(8, heads=2)
    text = str(jax.make_jaxpr(lambda x: layer(x))(inputs(512)))
    assert "512,512" not in text


@pytest.mark.parametrize("window_size", [-1, 2.5, (1, 2, 3), (3, -1), None, "8"])
def test_refused_windows(window_size):
    with pytest.raises(ValueError, match="LocalAttention: window_size must be a number"):
        make(window_size)


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(TypeError, match="LocalAttention: windw_size must be one of its options.* Did you mean 'window_size'"):
        zoo.LocalAttention(2, 16, windw_size=4, rngs=nnx.Rngs(0))


def test_refused_right_side_when_causal():
    with pytest.raises(ValueError, match=r"LocalAttention: window_size must be \(left, 0\) when causal"):
        make((3, 1), is_causal=True)
