"""LongformerAttention: a window, and global tokens with projections of their own; two peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from tests import oracle

from .patterned import FEATURES, check_definition, check_extend, inputs, padding

MAPS = ("query", "key", "value")


def make(window_size=3, num_global=2, is_causal=False, heads=4, **options):
    """A layer whose global projections are not the local ones."""
    layer = zoo.LongformerAttention(
        heads, FEATURES, window_size=window_size, num_global=num_global, is_causal=is_causal, rngs=nnx.Rngs(0), **options
    )
    if num_global:
        other = zoo.SoftmaxAttention(heads, FEATURES, rngs=nnx.Rngs(1), **options)
        for name in MAPS:
            nnx.update(getattr(layer, f"{name}_global"), nnx.state(getattr(other, name)))
            getattr(layer, f"{name}_global").bias[...] += 0.1
    return layer


def dense(layer, x, is_global, is_real, is_causal=False):
    """The heads [B, T, N, H] of the definition, with global and real tokens anywhere: every logit at once."""
    at = np.arange(x.shape[1])
    left, right = layer.window_size
    near = (at >= at[:, None] - left) & (at <= at[:, None] + right) | is_global[:, None]
    past = np.tri(len(at), dtype=bool) | (not is_causal)

    def attend(maps, allowed):
        query, key, value = (getattr(layer, name)(x) for name in maps)
        key, value = (jnp.repeat(heads, layer.num_heads // layer.num_kv_heads, 2) for heads in (key, value))
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / layer.head_features**0.5
        logits = jnp.where((allowed & past & is_real[:, None])[:, None], logits, -1e30)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)

    local = attend(MAPS, near)
    rows = attend([f"{name}_global" for name in MAPS], np.ones_like(near))
    return jnp.where(is_global[..., None, None], rows, local)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window_size", "num_global", "kv_heads"), [(3, 2, 4), ((4, 1), 5, 2), (2, 40, 4)])
def test_the_definition(window_size, num_global, kv_heads, is_causal):
    """Outputs and every gradient, among the real tokens of each sample."""
    window_size = window_size[0] if is_causal and isinstance(window_size, tuple) else window_size

    def definition(layer, x):
        tokens = x.shape[1]
        is_global, every = np.arange(tokens)[None] < num_global, np.ones((1, tokens), bool)
        return layer.out(dense(layer, x, is_global, every, is_causal))

    check_definition(make(window_size, num_global, is_causal, num_kv_heads=kv_heads), definition)


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_global_tokens_it_is_local_attention(is_causal):
    layer = make(3, 0, is_causal)
    local = zoo.LocalAttention(4, FEATURES, window_size=3, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(local, nnx.state(layer))
    np.testing.assert_array_equal(layer(inputs(30)), local(inputs(30)))
    assert not hasattr(layer, "query_global")


@pytest.mark.parametrize("is_causal", [False, True])
def test_of_global_tokens_alone_it_is_softmax_attention_with_their_projections(is_causal):
    layer = make(3, 30, is_causal)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    for name in MAPS:
        nnx.update(getattr(full, name), nnx.state(getattr(layer, f"{name}_global")))
    nnx.update(full.out, nnx.state(layer.out))
    np.testing.assert_allclose(layer(inputs(30)), full(inputs(30)), atol=2e-6)


def test_it_starts_as_attention_under_its_pattern():
    """The global projections start as the local ones."""
    layer = zoo.LongformerAttention(4, FEATURES, window_size=3, num_global=2, rngs=nnx.Rngs(0))
    full = zoo.SoftmaxAttention(4, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(full, {name: nnx.state(getattr(layer, name)) for name in (*MAPS, "out")})
    want = full(inputs(30), mask=jnp.asarray(layer.pattern(30))[None])
    np.testing.assert_allclose(layer(inputs(30)), want, atol=2e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [3, 17, 20], [25, 1, 14]], ids=str)
@pytest.mark.parametrize(("window_size", "num_global"), [(6, 0), (6, 1), (1, 5), (100, 30)])
def test_extend_in_any_cutting(window_size, num_global, cuts):
    check_extend(make(window_size, num_global, True, num_kv_heads=2, rotary_base=50.0), 40, cuts, padding(40), max_length=40)


def test_a_token_reads_a_part_of_the_cache():
    layer = make(64, 8, True)
    cache = jax.eval_shape(lambda: layer.init_cache(1, 8192))
    token = jax.ShapeDtypeStruct((1, 1, FEATURES), jnp.float32)
    compiled = jax.jit(lambda x, cache: layer.extend(x, cache), donate_argnums=1).lower(token, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key.size


@pytest.mark.parametrize("is_causal", [False, True])
def test_no_square_is_made(is_causal):
    layer = make(16, 4, is_causal)
    text = str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))
    assert "512,512" not in text


def test_hugging_face():
    """Its window w is w / 2 tokens on each side. Its second sample has a global token in the middle, which is no prefix: there
    the definition stands for the layer, so that all gradients of weights can be compared."""
    peer = oracle.load("longformer_global")
    assert peer.meta["cfg"]["attention_window"] == 8 and peer.meta["cfg"]["global_idx"] == [[0], [0, 13]]
    layer = zoo.LongformerAttention(4, 32, window_size=4, num_global=1, rngs=nnx.Rngs(0))

    def before_the_output_projection(inputs, weights):
        held, x = oracle.holding(layer, weights), inputs["x"]
        first = held.attend(*held.project(x[:1]), None)
        second = dense(held, x[1:], peer.inputs["attention_mask"][1:] > 0, np.ones((1, 32), bool))
        return jnp.concatenate([first, second]).reshape(x.shape)

    oracle.compare("longformer", peer, before_the_output_projection)


def test_long_range_arena():
    """Its window counts all keys, 9 of them four on each side; an even one has one more after the query than before it."""
    peer = oracle.load("lra_longformer")
    assert peer.inputs["global_mask"].sum(1).tolist() == [1, 1] and peer.inputs["global_mask"][:, 0].all()
    layer = zoo.LongformerAttention(2, 16, window_size=4, num_global=1, rngs=nnx.Rngs(0))
    names = {f"{name}_sliding_window": name for name in MAPS}
    oracle.compare("longformer", peer, lambda inputs, weights: oracle.holding(layer, weights, names)(inputs["x"]))


def test_refusals():
    with pytest.raises(ValueError, match="LongformerAttention: num_global must be an integer of at least 0, got -1"):
        make(num_global=-1)
    with pytest.raises(ValueError, match="LongformerAttention: window_size must be a number"):
        make(-1)
    with pytest.raises(ValueError, match=r"LongformerAttention: window_size must be \(left, 0\) when causal"):
        make((3, 1), is_causal=True)
    with pytest.raises(ValueError, match="would share the global tokens of the first"):
        make()(inputs(5), segment_ids=jnp.zeros((2, 5), int))
