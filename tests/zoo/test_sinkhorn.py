"""Sinkhorn attention against two peers, and against the paper's equations, spelt out block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import matrix, softmax
from subquad.lra.bench import measure
from subquad.zoo.buckets.sinkhorn import SinkhornAttention, attend_to_blocks, balance_strictly, mix_blocks
from subquad.zoo.padding import in_blocks
from tests import oracle

SIZE, LENGTH = 5, 23


def small(**options):
    options = {"max_length": 40, "block_size": SIZE, "num_iterations": 3, "rngs": nnx.Rngs(0), **options}
    return SinkhornAttention(2, 16, **options)


def inputs(length=LENGTH, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, length, 16))


# Peers. lucidrains' sorting networks are not the paper's: the matrix S is made here as the peer makes it, and handed to what
# sorts and attends.


def blocks_of(tokens, size):
    """The peer's [B, N, T, H] as [B, I, C, N, H]."""
    return in_blocks(jnp.swapaxes(tokens, 1, 2), size)


def flat(blocks):
    """[B, I, C, N, H] as [B, T, N, H]."""
    return blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])


def compare(name, function):
    """A function of the peer's inputs and weights, with its constants and cfg, against its outputs and all its gradients."""
    peer = oracle.load(name)
    constants = {key: jnp.asarray(array, jnp.float32) for key, array in peer.constants.items()}
    run = lambda given, weights: function(given, weights, constants, peer.meta["cfg"])
    oracle.compare("sinkhorn", peer, run, of="mechanism")


def test_lucidrains_balances():
    """Scores are relu(W [sum of queries; sum of keys]) and their logarithm is balanced; keys are sorted ones, then own."""

    def run(given, weights, constants, cfg):
        query, key, value = (blocks_of(given[name], cfg["bucket_size"]) for name in "qkv")
        sums = jnp.concatenate([query.sum(2), key.sum(2)], -1)
        scores = jax.nn.relu(jnp.einsum("binh,nhj->bnij", sums, weights["sort_net.linear"][0]))
        logits = jnp.log(scores + 1e-6) + constants["gumbel"].reshape(scores.shape)
        sorting = matrix.sinkhorn(logits / cfg["temperature"], iterations=cfg["sinkhorn_iter"])
        keys, values = ((own, mix_blocks(sorting, own)) for own in (key, value))
        seen = jnp.ones((1, 1, cfg["bucket_size"]), bool)
        return jnp.swapaxes(attend_to_blocks(query, keys, values, (seen, seen), False, None), 1, 2)

    compare("sinkhorn_simple_sort_fixed", run)


def largest_in_turn(scores, count):
    """Its sorting by default: the largest of a softmax, then of one without it, and so on, as rows [.., I, count, J]."""
    rows = []
    for _ in range(count):
        weights = jax.nn.softmax(scores, axis=-1)
        is_largest = jax.nn.one_hot(weights.argmax(-1), scores.shape[-1], dtype=bool)
        rows.append(jnp.where(is_largest, weights, 0))
        scores = jnp.where(is_largest, -1e30, scores)
    return jnp.stack(rows, -2)


def test_lucidrains_sort_cut():
    """Sorts for all queries at once, by means of queries and keys, and sees its own block, too."""

    def run(given, weights, constants, cfg):
        query, key, value = (blocks_of(given[name], cfg["bucket_size"]) for name in "qkv")
        scores = jnp.einsum("bnh,bjnh->bnj", query.mean((1, 2)), key.mean(2)) * query.shape[-1] ** -0.5
        sorting = largest_in_turn(scores[:, :, None], cfg["n_sortcut"])[:, :, 0]
        parts = [softmax.attention(flat(query), *(flat(mix_blocks(sorting, x)) for x in (key, value)), return_lse=True)]
        ids = (jnp.arange(given["q"].shape[2]) // cfg["bucket_size"])[None]
        own = dict(query_segment_ids=ids, key_segment_ids=ids, return_lse=True)
        parts.append(softmax.attention(*map(flat, (query, key, value)), **own))
        return jnp.swapaxes(softmax.merge(*zip(*parts, strict=True))[0], 1, 2)

    compare("sinkhorn_sortcut", run)


def test_lucidrains_causal():
    """Balances nothing: running means of queries, at the first of a block, score sums of running means of keys, and the two
    best of the earlier blocks and of two learned ones are seen. Half of the heads see blocks that begin one token later, the
    last of which goes around the end: there the first token alone sees what is sorted, and the others not the first."""

    def run(given, weights, constants, cfg):
        size, top, length = cfg["bucket_size"], cfg["n_top_buckets"], given["q"].shape[2]
        half = lambda x, shift: jnp.concatenate([x[:, :1], jnp.roll(x[:, 1:], shift, axis=2)], axis=1)
        rolled = [half(given[name], 1 - size) for name in "qkv"]
        query, key, value = (blocks_of(x, size) for x in rolled)
        count = jnp.arange(1, length + 1)[:, None]
        mean_query, mean_key = (blocks_of(jnp.cumsum(x, axis=2) / count, size) for x in rolled[:2])
        scores = jnp.einsum("binh,bjnh->bnij", mean_query[:, :, 0], mean_key.sum(2)) * query.shape[-1] ** -0.5
        scores = jnp.where(jnp.tri(scores.shape[2], k=-1, dtype=bool), scores, -1e30)
        scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (top, 0)))
        sorting = largest_in_turn(scores, top)  # [B, N, I, top, J]
        rows = sorting.reshape(*sorting.shape[:2], -1, sorting.shape[-1])
        learned = lambda x: jnp.broadcast_to(jnp.swapaxes(x, 0, 1)[None, None], (len(query), top, size, *x.shape[::2]))
        keys, values = [], []
        for into, own, null in ((keys, key, "null_keys"), (values, value, "null_values")):
            mixed = mix_blocks(rows, jnp.concatenate([learned(weights[null]), own], axis=1))
            mixed = mixed.reshape(*own.shape[:2], top * size, *own.shape[3:])
            into.append(jnp.concatenate([mixed, own], axis=2).reshape(-1, (top + 1) * size, *own.shape[3:]))
        shift = top * size
        mask = np.concatenate([np.ones((size, shift), bool), np.tri(size, dtype=bool)], axis=1)
        mask = np.tile(mask, (*query.shape[:2], 2, 1, 1))
        mask[:, -1, 1, 1:, : shift + 1] = False
        heads = softmax.attention(query.reshape(-1, *query.shape[2:]), *keys, *values, mask=mask.reshape(-1, *mask.shape[2:]))
        return half(jnp.swapaxes(heads.reshape(len(query), length, *heads.shape[2:]), 1, 2), size - 1)

    compare("sinkhorn_causal", run)


def test_the_arenas_layer():
    """Its blocks are strides, and every matrix S is all ones (ERRATA.md, 7); it adds two attentions, to own and to sorted."""

    def run(given, weights, constants, cfg):
        heads, size = int(cfg["num_heads"]), int(cfg["block_size"])
        x = given["x"].reshape(2, size, -1, 16).swapaxes(1, 2)  # [B, I, C, D]
        maps = {name: lambda x, name=name: jnp.einsum("bicd,dnh->bicnh", x, weights[f"{name}.kernel"]) + weights[f"{name}.bias"]
                for name in ("query", "key", "value")}  # fmt: skip
        query, key, value = (maps[name](x) for name in maps)
        ones = jnp.ones((2, heads, x.shape[1], x.shape[1]))
        fold = lambda x: x.reshape(-1, *x.shape[2:])
        y = softmax.attention(*map(fold, (query, key, value)))
        y += softmax.attention(fold(query), *(fold(mix_blocks(ones, x)) for x in (key, value)))
        # The peer's reshape back takes blocks for strides once more: it does not put tokens where they stood.
        y = y.reshape(2, x.shape[1], size, heads, -1).swapaxes(1, 2).reshape(2, -1, heads, y.shape[-1])
        return jnp.einsum("btnh,nhd->btd", y, weights["out.kernel"]) + weights["out.bias"]

    compare("lra_sinkhorn", run)


# The paper's equations.


def balanced(logits, iterations, is_strict):
    """Rows, then columns, one entry at a time; strict: below the diagonal, and columns up to the row."""
    x, count = np.array(logits, np.float64), len(logits)
    allowed = np.tri(count, k=-1, dtype=bool) if is_strict else np.ones((count, count), bool)
    weights = np.where(allowed, np.exp(x), 0)
    for _ in range(iterations):
        rows = weights.sum(1, keepdims=True)
        weights = weights / np.where(rows > 0, rows, 1)
        columns = np.array([[weights[: i + 1 if is_strict else count, j].sum() for j in range(count)] for i in range(count)])
        weights = weights / np.where(columns > 0, columns, 1)
    return weights


@pytest.mark.parametrize("is_strict", [True, False])
def test_balance(is_strict):
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 3, 6, 6))
    function = balance_strictly if is_strict else lambda logits, iterations: matrix.sinkhorn(logits, iterations=iterations)
    found = jax.jit(function, static_argnums=1)(logits, 4)
    for at in np.ndindex(2, 3):
        np.testing.assert_allclose(found[at], balanced(logits[at], 4, is_strict), rtol=1e-4, atol=1e-6)


def test_what_strict_balance_approaches():
    """A balanced matrix below the diagonal holds ones beside it, and zeros: the only one whose rows and columns sum to 1."""
    logits = jax.random.normal(jax.random.key(0), (1, 1, 6, 6))
    far = [np.abs(np.asarray(balance_strictly(logits, n))[0, 0] - np.eye(6, k=-1)).max() for n in (1, 8, 64)]
    assert far[0] > 2 * far[1] > 4 * far[2]


def spelt_out(layer, x):
    """The layer for one sample, in NumPy, token by token."""
    x = np.asarray(x, np.float64)
    given = {name: np.asarray(leaf, np.float64) for name, leaf in (
        *((f"{name}.{part}", getattr(getattr(layer, name), part)[...])
          for name in ("query", "key", "value", "out") for part in ("kernel", "bias")),
        ("hidden", layer.sort_hidden[...]), ("scores", layer.sort_scores[...]),
    )}  # fmt: skip
    project = lambda name: np.einsum("td,dnh->tnh", x, given[f"{name}.kernel"]) + given[f"{name}.bias"]
    query, key, value = map(project, ("query", "key", "value"))
    length, count = len(x), -(-len(x) // SIZE)
    if layer.is_causal:
        sums = np.stack([x[: SIZE * i + 1].sum(0) for i in range(count)])
    else:
        sums = np.stack([x[SIZE * i : SIZE * (i + 1)].sum(0) for i in range(count)])
    out = np.zeros_like(query)
    for head in range(layer.num_heads):
        logits = np.maximum(sums @ given["hidden"][:, head], 0) @ given["scores"][head, :, :count] / layer.temperature
        sorting = balanced(logits, layer.num_iterations, layer.is_causal)

        def mixed(tokens, i, o, sorting=sorting):
            return sum(sorting[i, j] * tokens[SIZE * j + o] for j in range(count) if SIZE * j + o < length)

        for t in range(length):
            own = t // SIZE
            if layer.sort_cut is None:
                seen = [s for s in range(length) if s // SIZE == own and (s <= t or not layer.is_causal)]
                rows = [own] if own or not layer.is_causal else []
            else:
                seen, rows = [], range(min(layer.sort_cut, count))
            places = [(i, o) for i in rows for o in range(min(SIZE, length))]
            keys, values = (np.array([array[s, head] for s in seen] + [mixed(array[:, head], i, o) for i, o in places])
                            for array in (key, value))  # fmt: skip
            weights = np.exp(keys @ query[t, head] / layer.head_features**0.5)
            out[t, head] = weights @ values / weights.sum()
    return np.einsum("tnh,nhf->tf", out, given["out.kernel"]) + given["out.bias"]


@pytest.mark.parametrize(
    "options", [dict(), dict(is_causal=True), dict(sort_cut=2), dict(sort_cut=9, temperature=2.0)], ids=str
)
def test_layer(options):
    layer = small(**options)
    run = jax.jit(lambda x: layer(x))
    for length in (LENGTH, 3):
        x = inputs(length)
        for sample in range(2):
            np.testing.assert_allclose(run(x)[sample], spelt_out(layer, x[sample]), atol=2e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_one_block_is_softmax(is_causal):
    """The sorted block is the own one, whose keys count twice; the first causal block has none."""
    layer, x = small(is_causal=is_causal, block_size=40), inputs()
    plain = zoo.SoftmaxAttention(2, 16, is_causal=is_causal, rngs=nnx.Rngs(0))
    nnx.update(plain, nnx.filter_state(nnx.state(layer), lambda path, _: path[0] in {"query", "key", "value", "out"}))
    np.testing.assert_allclose(layer(x), plain(x), atol=1e-5)


def test_gumbel_noise_is_drawn_in_training_alone():
    layer, x = small(), inputs()
    y = layer(x)
    noisy = [layer(x, deterministic=False, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert jnp.abs(noisy[0] - noisy[2]).max() > 1e-3 and jnp.abs(noisy[0] - y).max() > 1e-3
    np.testing.assert_array_equal(layer(x, deterministic=True, rngs=nnx.Rngs(0)), y)
    np.testing.assert_array_equal(layer(x, deterministic=False), y)
    layer.train()
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=0)), noisy[0])
    key, zeros = jax.random.key(5), jnp.zeros((2, 4, 16))
    want = matrix.sinkhorn(jax.random.gumbel(key, (2, 2, 4, 4)) / 0.75, iterations=3)
    np.testing.assert_allclose(layer.sort(zeros, jnp.ones((1, 4), bool), key), want, atol=1e-6)


def test_blocks_of_padding_are_not_sorted():
    layer = small()
    sorting = layer.sort(inputs(4), jnp.array([[True, True, True, False]]))
    assert (sorting[:, :, 3] == 0).all() and (sorting[..., 3] == 0).all()
    np.testing.assert_allclose(sorting[:, :, :3, :3].sum(2), 1, atol=1e-5)


@pytest.mark.parametrize("options,match", [
    (dict(temperature=0.0), r"temperature must be a number in \(0, inf\)"),
    (dict(sort_cut=0), "sort_cut must be a positive integer"),
    (dict(sort_cut=2, is_causal=True), "sort_cut must be None with is_causal"),
    (dict(block_size=0), "block_size"), (dict(num_iterations=0), "num_iterations"), (dict(max_length=None), "max_length"),
], ids=str)
def test_refusals(options, match):
    with pytest.raises(ValueError, match=match):
        small(**options)


def test_longer_than_max_length_is_refused():
    with pytest.raises(ValueError, match="inputs_q must be at most the layer's max_length = 40 tokens, got 41"):
        small()(inputs(41))
    with pytest.raises(ValueError, match="max_length must be at most the layer's max_length = 40 tokens"):
        small(is_causal=True).init_cache(1, 41)


def test_extend_rotates():
    layer, x = small(is_causal=True, rotary_base=20.0), inputs()
    plain = small(is_causal=True)
    (first, cache), want = layer.extend(x[:, :7], layer.init_cache(2, LENGTH)), layer(x)
    rest, _ = layer.extend(x[:, 7:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), want, atol=2e-5)
    assert jnp.abs(want - plain(x)).max() > 1e-3


def test_a_step_of_generation_sorts_its_own_row_alone():
    """Its FLOPs grow as the cache does, not as the square of its blocks."""

    def flops(room):
        layer = small(is_causal=True, max_length=room)
        cache = jax.eval_shape(lambda: layer.init_cache(1, room))
        return measure.flops(layer.extend, jax.ShapeDtypeStruct((1, 1, 16), jnp.float32), cache)

    assert flops(40 * SIZE) < 2.2 * flops(20 * SIZE) < 2.2**2 * flops(10 * SIZE)


def test_noise_is_drawn_inside_linen():
    layer, x = nnx.bridge.to_linen(SinkhornAttention, num_heads=2, in_features=16, max_length=40, block_size=SIZE), inputs()
    variables = layer.init(jax.random.key(0), x)
    draw = lambda seed: layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_array_equal(draw(0), draw(0))
    assert jnp.abs(draw(0) - draw(1)).max() > 1e-3


def test_extend_in_bfloat16_over_many_blocks():
    layer, x = small(is_causal=True), inputs()
    cache, outputs = layer.init_cache(2, LENGTH, jnp.bfloat16), []
    for start, stop in ((0, 13), (13, 14), (14, LENGTH)):
        y, cache = layer.extend(x[:, start:stop], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), layer(x), atol=0.03)
