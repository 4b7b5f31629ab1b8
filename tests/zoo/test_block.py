"""The residual block: where norms and dropout act, and that no two draws are one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.model import INTERACTIONS


class Ones(nnx.Module):
    """A mixer whose every output is 1."""

    def __init__(self, in_features, rngs):
        pass

    def __call__(self, inputs, **call):
        return jnp.ones_like(inputs)


def block_of_ones(rate, mlp_features=4):
    block = zoo.Block(Ones(8, nnx.Rngs(0)), 8, mlp_features=mlp_features, dropout_rate=rate, rngs=nnx.Rngs(0))
    if mlp_features:
        block.mlp.outer.kernel[...] *= 0
        block.mlp.outer.bias[...] += 10
    return block


def test_dropout_acts_after_the_mixer_and_after_the_network_with_a_draw_of_its_own():
    x = jnp.zeros((4, 50, 8))
    added = np.asarray(block_of_ones(0.5)(x, deterministic=False, rngs=nnx.Rngs(0)))
    assert set(np.unique(added)) == {0, 2, 20, 22}
    for value in (0, 2, 20, 22):  # a quarter each: the two draws know nothing of each other
        assert abs((added == value).mean() - 0.25) < 0.05
    np.testing.assert_array_equal(block_of_ones(0.5)(x, rngs=nnx.Rngs(0)), 11 + x)
    np.testing.assert_array_equal(block_of_ones(1.0)(x + 3, deterministic=False, rngs=nnx.Rngs(0)), x + 3)
    np.testing.assert_array_equal(block_of_ones(1.0, mlp_features=0)(x + 3, deterministic=False, rngs=nnx.Rngs(0)), x + 3)


def test_embeddings_are_dropped():
    options = dict(vocab_size=5, in_features=8, num_layers=1, mlp_features=0, max_length=50, positions=None, mixer=Ones)
    seen = []

    class Seen(Ones):
        def __call__(self, inputs, **call):
            seen.append(inputs)
            return 0 * inputs

    model = zoo.Encoder(**{**options, "mixer": Seen}, dropout_rate=0.5, rngs=nnx.Rngs(0))
    model.blocks[0].mixer_norm = lambda hidden: hidden
    model.embed.embedding[...] = jnp.ones((5, 8))
    model(jnp.zeros((4, 50), jnp.int32), deterministic=False, rngs=nnx.Rngs(0))
    assert set(np.unique(seen[0])) == {0, 2} and abs((seen[0] == 0).mean() - 0.5) < 0.05


def test_layers_and_sequences_draw_apart():
    options = dict(vocab_size=5, in_features=8, num_layers=2, mlp_features=0, max_length=50, positions=None, mixer=Ones)
    model = zoo.Encoder(**options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    model.embed.embedding[...] *= 0
    model.norm = lambda hidden: hidden
    added = np.asarray(model(jnp.zeros((4, 50), jnp.int32), deterministic=False, rngs=nnx.Rngs(0)))
    assert set(np.unique(added)) == {0, 2, 4} and abs((added == 2).mean() - 0.5) < 0.05
    dual = zoo.DualEncoder(2, interaction="concat", **options, dropout_rate=0.5, rngs=nnx.Rngs(0))
    pooled = []
    dual.head = lambda both: pooled.append(both) or both
    x = jnp.zeros((4, 50), jnp.int32)
    dual(x, x, deterministic=False, rngs=nnx.Rngs(0))
    a, b = jnp.split(pooled[0], 2, axis=-1)
    assert (a != b).any() and set(INTERACTIONS) == {"nli", "concat"}


def test_features_inside_the_network_are_dropped():
    network = zoo.block.FeedForward(4, 1000, dropout_rate=0.5, rngs=nnx.Rngs(0))
    network.inner.kernel[...] *= 0
    network.inner.bias[...] += 3
    network.outer = lambda hidden: hidden
    inside = np.asarray(network(jnp.ones((2, 4)), deterministic=False, rngs=nnx.Rngs(0)))
    kept = float(nnx.gelu(3.0))
    np.testing.assert_allclose(np.unique(inside), [0, 2 * kept], rtol=1e-6)
    assert abs((inside == 0).mean() - 0.5) < 0.05
    np.testing.assert_allclose(network(jnp.ones((2, 4))), kept, rtol=1e-6)


def normalised(x, over):
    return (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + 1e-5)


def test_norms_and_their_order():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 8)).astype(np.float32)
    make = lambda **words: zoo.Block(lambda inputs, **call: inputs, 8, mlp_features=0, **words, rngs=nnx.Rngs(0))
    root = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    for norm, wanted in (("layer", normalised(x, -1)), ("rms", x / root), ("batch", normalised(x, (0, 1)))):
        np.testing.assert_allclose(make(norm=norm)(x, deterministic=False), x + wanted, rtol=1e-4, atol=1e-4)
    post = make(norm="batch", norm_order="post")(x, deterministic=False)
    np.testing.assert_allclose(post, normalised(2 * x, (0, 1)), rtol=1e-4, atol=1e-4)
    network = zoo.Block(lambda inputs, **call: inputs, 8, mlp_features=4, norm_order="post", rngs=nnx.Rngs(0))
    after = normalised(2 * x, -1)
    np.testing.assert_allclose(network(x), normalised(after + np.asarray(network.mlp(after)), -1), rtol=1e-4, atol=1e-4)


def test_batch_statistics_are_of_real_tokens_and_eval_uses_the_running_ones():
    rng = np.random.default_rng(0)
    x, real = rng.normal(3, 2, (3, 6, 8)).astype(np.float32), rng.random((3, 6)) < 0.6
    block = zoo.Block(lambda inputs, **call: 0 * inputs, 8, mlp_features=0, norm="batch", norm_order="post", rngs=nnx.Rngs(0))
    mask, seen = jnp.asarray(real)[:, None, None, :], x[real]
    for padding in (0.0, 1e6):
        one = nnx.clone(block)
        filled = np.where(real[..., None], x, padding)
        found = np.asarray(one(filled, mask=mask, deterministic=False))
        np.testing.assert_allclose(found[real], normalised(seen, 0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(one.mixer_norm.mean[...], 0.1 * seen.mean(0), rtol=1e-4)
        np.testing.assert_allclose(one.mixer_norm.var[...], 0.9 + 0.1 * seen.var(0), rtol=1e-3)
    before = one.mixer_norm.mean[...], one.mixer_norm.var[...]
    one.eval()
    running = (x - np.asarray(one.mixer_norm.mean[...])) / np.sqrt(np.asarray(one.mixer_norm.var[...]) + 1e-5)
    np.testing.assert_allclose(one(x, mask=mask), running, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(before, (one.mixer_norm.mean[...], one.mixer_norm.var[...]))
    one.train()
    assert not np.allclose(one(x, mask=mask), running)
    # Without a real token there is no mean: the statistics stay numbers.
    one(0 * x, mask=mask & False)
    assert np.isfinite(one.mixer_norm.mean[...]).all()


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_an_encoder_with_batch_norm_learns_its_statistics_with_and_without_remat(norm_order):
    options = dict(vocab_size=7, in_features=8, num_layers=2, mlp_features=8, max_length=6, mixer_options=dict(num_heads=2))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (4, 6)))
    mask, found = jnp.arange(6) < jnp.array([[6], [3], [5], [1]]), []
    for remat in (False, True):
        model = zoo.Encoder(**options, norm="batch", norm_order=norm_order, remat=remat, rngs=nnx.Rngs(0))
        model.train()
        assert (model.norm is None) == (norm_order == "post")

        @nnx.jit
        def slopes(model):
            return nnx.grad(lambda model: (model(tokens, mask=mask) ** 3).sum(where=mask[..., None]))(model)

        found.append(jax.tree.leaves((slopes(model), nnx.state(model, nnx.BatchStat))))
    norms = 5 if norm_order == "pre" else 4
    assert len(jax.tree.leaves(nnx.state(model, nnx.BatchStat))) == 2 * norms
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    model.eval()
    np.testing.assert_allclose(model(tokens[:1], mask=mask[:1])[0], model(tokens, mask=mask)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm,norm_order", [("batch", "pre"), ("rms", "post"), ("scale", "macaron")])
def test_extension_uses_the_same_norms(norm, norm_order):
    options = dict(vocab_size=7, in_features=8, num_layers=2, mlp_features=8, max_length=8, mixer_options=dict(num_heads=2))
    model = zoo.CausalLM(**options, norm=norm, norm_order=norm_order, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 7, (2, 5)))
    model(tokens, deterministic=False)
    wanted, (first, cache) = model(tokens), model.extend(tokens[:, :3], model.init_cache(2, 8))
    second, _ = model.extend(tokens[:, 3:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_block_cannot_be_is_refused():
    for options, word in (
        (dict(mlp_features=-1), "mlp_features"), (dict(mlp_features=1, dropout_rate=2), "dropout_rate"),
        (dict(mlp_features=1, norm="group"), "norm"), (dict(mlp_features=1, norm_order="before"), "norm_order"),
        (dict(mlp_features=1, drop_path_rate=-1), "drop_path_rate"),
        (dict(mlp_features=0, norm_order="macaron"), "mlp_features"),
        (dict(mlp_features=0, experts=dict(num_experts=2)), "mlp_features"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Block: {word} must"):
            zoo.Block(Ones(8, nnx.Rngs(0)), 8, **options, rngs=nnx.Rngs(0))


def test_scale_norm():
    norm = zoo.block.ScaleNorm(8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 8)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(norm(x), np.sqrt(8) * unit, rtol=1e-5)
    norm.scale[...] = jnp.asarray(3.0)
    np.testing.assert_allclose(norm(1e-3 * x), 3 * unit, rtol=1e-5)
    slopes = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 8)))  # features of padding are 0
    assert np.isfinite(slopes).all() and not norm(jnp.zeros((1, 8))).any()
    half = zoo.block.ScaleNorm(8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(1e3 * x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), np.sqrt(8) * unit, atol=0.02)
    block = zoo.Block(lambda inputs, **call: inputs, 8, mlp_features=0, norm="scale", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(block(x), x + np.sqrt(8) * unit, rtol=1e-5)


def test_a_macaron_is_a_mixer_between_two_half_networks():
    x = np.random.default_rng(0).normal(2, 3, (2, 5, 8)).astype(np.float32)
    block = zoo.Block(lambda inputs, **call: 3 * inputs, 8, mlp_features=4, norm_order="macaron", rngs=nnx.Rngs(0))
    assert (block.first_mlp.inner.kernel[...] != block.mlp.inner.kernel[...]).any()
    first = x + np.asarray(block.first_mlp(normalised(x, -1))) / 2
    mixed = first + 3 * normalised(first, -1)
    np.testing.assert_allclose(block(x), mixed + np.asarray(block.mlp(normalised(mixed, -1))) / 2, rtol=1e-4, atol=1e-4)


def test_a_sample_goes_past_each_half_as_a_whole_and_the_mean_stays():
    block = zoo.Block(Ones(8, nnx.Rngs(0)), 8, mlp_features=4, drop_path_rate=0.5, rngs=nnx.Rngs(0))
    block.mlp = Ones(8, nnx.Rngs(0))
    draw = lambda seed: block(jnp.zeros((800, 3, 8)), deterministic=False, rngs=nnx.Rngs(dropout=seed))
    added = np.asarray(draw(0))
    assert (added == added[:, :1, :1]).all()
    shares = [(added[:, 0, 0] == value).mean() for value in (0, 2, 4)]  # mixer and network by draws of their own
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.06)
    np.testing.assert_allclose(block(jnp.zeros((2, 3, 8))), 2)
    assert (draw(1) != added).any()
    gone = zoo.Block(Ones(8, nnx.Rngs(0)), 8, mlp_features=4, drop_path_rate=1.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(gone(jnp.ones((2, 3, 8)), deterministic=False, rngs=nnx.Rngs(0)), 1)


def test_experts_are_the_networks_of_a_block():
    options = dict(mlp_features=4, experts=dict(num_experts=3, top_k=2, capacity_factor=0.8))
    x, mask = np.random.default_rng(0).normal(2, 3, (2, 9, 8)).astype(np.float32), np.arange(9) < np.array([[9], [6]])
    block = zoo.Block(Ones(8, nnx.Rngs(0)), 8, **options, rngs=nnx.Rngs(0))
    hidden = 1 + x
    fed, wanted = block.mlp.with_losses(block.mlp_norm(hidden), mask=mask)
    found, losses = block.with_losses(x, mask=mask[:, None, None])
    np.testing.assert_allclose(found, hidden + fed, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses["balance"], wanted["balance"], rtol=1e-5)
    twice = zoo.Block(Ones(8, nnx.Rngs(0)), 8, **options, norm_order="macaron", rngs=nnx.Rngs(0))
    first = twice.first_mlp.with_losses(twice.first_norm(x))
    second = twice.mlp.with_losses(twice.mlp_norm(x + first[0] / 2 + 1))
    np.testing.assert_allclose(twice.with_losses(x)[1]["z"], first[1]["z"] + second[1]["z"], rtol=1e-4)
    with pytest.raises(ValueError, match="Block does not support segment_ids: .* capacity_factor = 0.8 is of the whole sample"):
        block(x, segment_ids=np.zeros((2, 9), int))
    with pytest.raises(ValueError, match="Block does not support extend: .* Use experts with capacity_factor=None"):
        block.extend(x, None)


@pytest.mark.parametrize("norm_order", ["pre", "post", "macaron"])
def test_a_mixer_of_another_dtype_leaves_the_streams_as_it_is(norm_order):
    mixer = zoo.SoftmaxAttention(2, 8, is_causal=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block = zoo.Block(mixer, 8, mlp_features=4, norm_order=norm_order, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3, 8), jnp.bfloat16)
    assert block(x).dtype == jnp.bfloat16
    assert block.extend(x, mixer.init_cache(2, 3))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "options,error,word",
    [
        (dict(rngs=0), TypeError, "rngs must be an nnx.Rngs, got int"),
        (dict(dtype="bf16"), ValueError, "dtype must be a floating-point dtype, got 'bf16'"),
        (dict(in_features=0), ValueError, "in_features must be a positive integer, got 0"),
        (dict(mlp_features=None), ValueError, "mlp_features must be .* integer.*, got None"),
        (dict(dropout_rate=2.0), ValueError, "dropout_rate must be a number in"),
    ],
    ids=str,
)
def test_blocks_and_networks_check_what_they_are_built_of(options, error, word):
    words = {**dict(in_features=8, mlp_features=4, rngs=nnx.Rngs(0)), **options}
    with pytest.raises(error, match=f"FeedForward: {word}"):
        zoo.FeedForward(**words)
    with pytest.raises(error, match=f"Block: {word}"):
        zoo.Block(Ones(8, nnx.Rngs(0)), **words)


@pytest.mark.parametrize("options", [{}, dict(num_experts=2)], ids=str)
def test_an_activation_that_is_no_function_is_refused(options):
    kind = zoo.Experts if options else zoo.FeedForward
    with pytest.raises(ValueError, match="activation must be a function, got 'relu3'"):
        kind(8, 16, **options, activation="relu3", rngs=nnx.Rngs(0))
