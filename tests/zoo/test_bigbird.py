"""BigBirdAttention: what it draws and what that depends on; two peers, and where each departs from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import softmax
from subquad.kernels.patterns import Blocks
from tests import oracle

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding

KINDS = [dict(), dict(num_global=2), dict(num_global=0, num_random=1)]


def make(is_causal=False, heads=4, max_length=40, block_size=4, **options):
    return zoo.BigBirdAttention(
        heads, FEATURES, max_length=max_length, block_size=block_size, is_causal=is_causal, rngs=nnx.Rngs(0), **options
    )


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attends_to_its_pattern_and_nothing_else(options, is_causal):
    for length in (5, 38):
        check_support(make(is_causal, **options), length)


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_is_softmax_attention_under_its_pattern(options, is_causal):
    check_dense(make(is_causal, **options), 29, padding(29))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [dict(num_random=10), dict(block_size=20), dict(num_random=0, num_global=40)], ids=str)
def test_where_it_sees_everything_it_is_softmax_attention(options, is_causal):
    layer = make(is_causal, **options)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(40)), full(inputs(40)), atol=2e-6)


def test_draws_are_the_constructors():
    """The same in training, in evaluation, at every length and in a restored layer; others by head and by seed."""
    layer = make(block_size=2)
    restored = nnx.merge(nnx.graphdef(make(block_size=2)), nnx.state(layer))
    x = inputs(40)
    np.testing.assert_array_equal(layer(x), restored(x))
    np.testing.assert_array_equal(layer(x), layer(x, deterministic=False, rngs=nnx.Rngs(0)))
    whole = layer.pattern(40)
    for length in (1, 17, 39):
        np.testing.assert_array_equal(layer.pattern(length), whole[:, :length, :length])
    assert (whole[0] != whole[1]).any() and (whole != make(block_size=2, random_seed=1).pattern(40)).any()
    assert layer.sees == make(block_size=2).sees and hash(layer.sees) == hash(make(block_size=2).sees)
    assert jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param))) == []


def test_causal_draws_do_not_know_the_longest_input():
    np.testing.assert_array_equal(make(True).pattern(40), make(True, max_length=400).pattern(40))


def test_layers_above_each_other_may_draw_apart():
    model = zoo.Encoder(
        vocab_size=8, in_features=FEATURES, num_layers=2, mlp_features=0, max_length=40, mixer="bigbird",
        mixer_options=[dict(num_heads=2, max_length=40, block_size=2, random_seed=seed) for seed in range(2)], rngs=nnx.Rngs(0),
    )  # fmt: skip
    one, other = (block.mixer.pattern(40) for block in model.blocks)
    assert (one != other).any()


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("cuts", [[1] * 12 + [25], [3, 17, 17]], ids=str)
def test_extend_in_any_cutting(options, cuts):
    check_extend(make(True, **options), 37, cuts, padding(37), max_length=40)


def test_a_token_reads_a_part_of_the_cache():
    layer = make(True, max_length=8192, block_size=32)
    cache = jax.eval_shape(lambda: layer.init_cache(1, 8192))
    token = jax.ShapeDtypeStruct((1, 1, FEATURES), jnp.float32)
    compiled = jax.jit(lambda x, cache: layer.extend(x, cache), donate_argnums=1).lower(token, cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.key.size


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_no_square_is_made(options):
    layer = make(max_length=512, block_size=16, **options)
    assert "512,512" not in str(jax.make_jaxpr(jax.grad(lambda x: layer(x).sum()))(inputs(512)))


def peer_layer(peer, lists):
    """A layer of the peer's sizes that sees the peer's blocks; `lists` are those drawn for blocks 1 .. n - 1, [N, n - 2, r]."""
    heads, inner, _ = lists.shape
    count, size = inner + 2, int(peer.meta["cfg"]["block_size"])
    layer = make(heads=heads, max_length=count * size, block_size=size, num_random=0)
    blocks = layer.pattern(count * size)[0, ::size, ::size] | np.zeros((heads, 1, 1), bool)
    for head, i in np.ndindex(heads, inner):
        assert not blocks[head, i + 1, lists[head, i]].any(), "drawn are blocks that are not seen anyway"
        blocks[head, i + 1, lists[head, i]] = True
    layer.sees = Blocks(size, blocks.shape, blocks.tobytes())
    return layer


def test_hugging_face():
    """In training it draws as the paper says; outputs, gradients of the inputs and of every weight."""
    peer = oracle.load("bigbird_train")
    assert peer.inputs["mask"].all() and peer.meta["cfg"]["training"]
    layer = peer_layer(peer, peer.constants["rand_attn"])

    def before_the_output_projection(inputs, weights):
        held = oracle.holding(layer, weights)
        return held.attend(*held.project(inputs["x"]), None).reshape(inputs["x"].shape)

    oracle.compare("bigbird", peer, before_the_output_projection)


def test_hugging_face_in_evaluation():
    """There all blocks it draws are the first one, which it then counts r more times: log(1 + r) on those logits."""
    peer = oracle.load("bigbird_eval")
    draws = peer.constants["rand_attn"]
    assert not draws.any() and not peer.meta["cfg"]["training"]
    (_, inner, count), size = draws.shape, 4
    layer = peer_layer(peer, draws[..., :0])
    length = (inner + 2) * size
    is_first = np.arange(length) < size
    is_inner = (np.arange(length) >= size) & (np.arange(length) < length - size)
    again = jnp.asarray(np.where(is_inner[:, None] & is_first, np.log1p(count), 0.0)[None, None], jnp.float32)

    def evaluated(inputs, weights):
        held = oracle.holding(layer, weights)
        return softmax.attention(*held.project(inputs["x"]), pattern=layer.sees, bias=again).reshape(inputs["x"].shape)

    oracle.compare("bigbird", peer, evaluated, of="mechanism")


def test_long_range_arena():
    """It draws as the paper says, from NumPy's old generator, and pads by a whole block where nothing is to be padded: the last
    block, which is global, then holds nothing. The heads of padding are 0."""
    peer = oracle.load("lra_bigbird")
    cfg, generator = peer.meta["cfg"], np.random.RandomState(3)
    assert (cfg["connectivity_seed"], cfg["block_size"], cfg["num_rand_blocks"]) == ("3", "4", "2")
    count = 32 // 4 + 1
    others = lambda i: [j for j in range(1, count - 1) if abs(i - j) > 1]
    lists = np.array([[generator.permutation(others(i))[:2] for i in range(1, count - 1)] for _ in range(2)])
    layer = peer_layer(peer, lists)
    is_real = jnp.asarray(peer.inputs["padding_mask"] > 0)

    def padded(inputs, weights):
        held = oracle.holding(layer, weights)
        return jnp.where(is_real, held(inputs["x"], mask=is_real[:, None, None, :, 0]), held.out.bias[...])

    oracle.compare("bigbird", peer, padded)


def test_refusals():
    for word, options in (
        ("block_size", dict(block_size=0)), ("max_length", dict(max_length=0)), ("num_random", dict(num_random=-1)),
        ("num_global", dict(num_global=-1)), ("random_seed", dict(random_seed=-1)), ("random_seed", dict(random_seed=0.5)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"BigBirdAttention: {word} must"):
            make(**options)
    with pytest.raises(ValueError, match="BigBirdAttention: inputs_q must be at most the layer's max_length = 40 tokens"):
        make()(inputs(41))
    with pytest.raises(ValueError, match="BigBirdAttention: max_length must be at most the layer's max_length = 40 tokens"):
        make(True).init_cache(1, 41)
