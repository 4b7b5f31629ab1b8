"""Mega against its formulas, its chunks, its functions, and the authors' and Hugging Face's layers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.lra.bench import measure
from subquad.zoo.statespace.mega import Mega, laplace
from tests import oracle

FEATURES, SHARED, VALUES, AVERAGES, LENGTH = 12, 8, 20, 4, 11
SIZES = dict(state_size=AVERAGES, shared_features=SHARED, value_features=VALUES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    layer = Mega(FEATURES, **SIZES | options, rngs=nnx.Rngs(0))
    state = nnx.state(layer, nnx.Param)  # off their small values
    nnx.update(layer, jax.tree.map(lambda x: x + 0.3 * normal(*x.shape, seed=x.size), state))
    return layer


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def averaged(layer, x):
    """sum_n gamma_n h_tn / sqrt(n) step by step, in both directions."""
    total = np.zeros_like(x, dtype=np.float64)
    read = lambda param, which: np.float64(param[...][which])
    for which in range(1 if layer.is_causal else 2):
        p, r = (sigmoid(read(param, which)) for param in (layer.damping, layer.decay))
        state = np.zeros((len(x), FEATURES, AVERAGES))
        for t in range(x.shape[1])[:: -1 if which else 1]:
            state = p * read(layer.expansion, which) * x[:, t, :, None] + (1 - p * r) * state
            total[:, t] += (read(layer.reduction, which) * state).sum(-1) / np.sqrt(AVERAGES)
    return total


def spelt_out(layer, x):
    """The equations, query by query."""
    apply = lambda linear, x: x @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])
    smooth = silu(averaged(layer, x) + np.float64(layer.skip[...]) * x)
    phi, z, g, rest = np.split(apply(layer.mixed, smooth), np.cumsum([FEATURES, SHARED, VALUES]), -1)
    scale, shift = np.float64(layer.query_key_scale[...]), np.float64(layer.query_key_shift[...])
    query, key = (silu(z) * scale[i] + shift[i] for i in (0, 1))
    value, attended = silu(apply(layer.value, x)), np.zeros((*x.shape[:2], VALUES))
    size = layer.chunk_size or x.shape[1]
    for t in range(x.shape[1]):
        first = t // size * size
        last = t + 1 if layer.is_causal else min(first + size, x.shape[1])
        at = np.arange(first, last)
        if hasattr(layer, "distances"):
            table = np.float64(layer.distances[...])
            bias = table[at - t + (len(table) - 1) // 2]
        else:
            left, right = np.float64(layer.rotated[...])
            waves = 10_000.0 ** (-np.arange(SHARED // 2) / (SHARED // 2))
            a, b = left[: SHARED // 2] + 1j * left[SHARED // 2 :], right[: SHARED // 2] + 1j * right[SHARED // 2 :]
            bias = (a * b.conj() * np.exp(1j * np.outer(t - at, waves))).sum(-1).real
        products = np.einsum("bz,bsz->bs", query[:, t], key[:, at])
        if layer.function == "softmax":
            logits = products / np.sqrt(SHARED) + bias
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        else:
            logits = products / len(at) + bias
            below = 0.5 * (1 + np.vectorize(math.erf)((logits - np.sqrt(0.5)) / np.sqrt(2 / (4 * np.pi))))
            weights = np.maximum(logits, 0) ** 2 if layer.function == "relu2" else below
        attended[:, t] = np.einsum("bs,bsv->bv", weights, value[:, at])
    phi, hidden = sigmoid(phi), silu(rest + apply(layer.hidden, silu(g) * attended))
    return phi * hidden + (1 - phi) * x


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [
    dict(), dict(bias="simple", max_length=15), dict(chunk_size=4), dict(chunk_size=4, bias="simple", function="relu2"),
    dict(function="laplace"), dict(chunk_size=40, function="laplace"),
], ids=str)
def test_the_formula(options, is_causal):
    layer, x = build(is_causal=is_causal, **options), normal(2, LENGTH, FEATURES)
    want = spelt_out(layer, x)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("options", [
    dict(), dict(bias="simple", max_length=15, function="relu2"), dict(chunk_size=4, function="laplace"),
], ids=str)
def test_extend(options):
    """Across the borders of chunks, and with padding, which no chunk counts."""
    layer, x = build(is_causal=True, **options), normal(2, LENGTH, FEATURES)
    mask = jnp.asarray(np.arange(LENGTH) != np.array([[0], [6]]))[:, None, None]
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    want, cache, parts = layer(x, mask=mask), layer.init_cache(2, LENGTH), []
    for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
        y, cache = step(x[:, start:stop], cache, mask[..., start:stop])
        parts.append(y)
    is_real = np.asarray(mask)[:, 0, 0, :, None]
    np.testing.assert_allclose(np.where(is_real, jnp.concatenate(parts, 1), 0), np.where(is_real, want, 0), atol=1e-5)


def test_whole_damping_and_decay_leave_no_memory():
    """p = r = 1: x'_t is of x_t alone."""
    layer, x = build(is_causal=True), normal(2, LENGTH, FEATURES)
    layer.damping[...], layer.decay[...] = (jnp.full_like(layer.damping[...], 40.0) for _ in range(2))
    factor = (layer.expansion[...] * layer.reduction[...])[0].sum(-1) / AVERAGES**0.5 + layer.skip[...]
    np.testing.assert_allclose(layer.smoothed(jnp.asarray(x))[0], silu(x * np.asarray(factor)), atol=1e-5)


def test_laplace_touches_relu2_at_sqrt_2():
    """As the paper chose its two numbers: value and slope of x^2 at sqrt(1/2)."""
    at = np.float32(np.sqrt(0.5))
    assert laplace(at) == pytest.approx(at**2) and jax.grad(laplace)(at) == pytest.approx(2 * at, rel=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_chunks_cost_in_proportion_to_the_length(is_causal):
    layer = nnx.eval_shape(lambda: Mega(32, shared_features=16, chunk_size=64, is_causal=is_causal, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)
    gradient = jax.jit(jax.grad(lambda x, state: jnp.sum(nnx.merge(graph, state)(x))))
    shapes = [jax.ShapeDtypeStruct((1, length, 32), jnp.float32) for length in (2048, 4096)]
    flops = [measure.flops(gradient, x, state) for x in shapes]
    memory = [measure.memory(gradient, x, state).temporary for x in shapes]
    assert flops[1] < 2.2 * flops[0] and memory[1] < 2.2 * memory[0]


def test_a_map_may_follow():
    layer, plain, x = Mega(FEATURES, out_features=5, rngs=nnx.Rngs(0)), Mega(FEATURES, rngs=nnx.Rngs(0)), normal(2, 7, FEATURES)
    np.testing.assert_allclose(layer(x), plain(x) @ layer.out.kernel[...] + layer.out.bias[...], atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(state_size=0), "state_size must be a positive integer"), (dict(function="relu"), "function must be a known name"),
    (dict(bias="t5"), "bias must be a known name"), (dict(shared_features=7), "shared_features must be even"),
    (dict(bias="simple"), "max_length must be given"), (dict(max_length=9), "max_length must be given"),
    (dict(chunk_size=0), "chunk_size must be a positive integer"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"Mega: {words}"):
        Mega(FEATURES, **options, rngs=nnx.Rngs(0))


def test_more_tokens_than_distances():
    layer = build(bias="simple", max_length=5, is_causal=True)
    with pytest.raises(ValueError, match="Mega: inputs_q must be at most the layer's max_length = 5 tokens, got 6"):
        layer(normal(2, 6, FEATURES))
    with pytest.raises(ValueError, match="Mega: max_length must be at most the layer's max_length = 5 tokens, got 6"):
        layer.init_cache(2, 6)


# Other implementations: time first, normed inside, and their residual is what is not normed.

AVERAGE = dict(damping="damping_factor", decay="decay_factor", expansion="ema_expansion_matrix",
               reduction="kernel_projection_matrix", skip="residual_weight")  # fmt: skip
AUTHORS = dict(damping="delta", decay="alpha", expansion="beta", reduction="gamma", skip="omega")


def with_average(layer, w, prefix, names):
    ours = nnx.clone(layer)
    for name, theirs in names.items():
        variable = getattr(ours, name)
        variable[...] = w[prefix + theirs].reshape(variable.shape)
    return ours


@pytest.mark.parametrize(("name", "options"), [
    ("mega_orig_softmax_bidir", dict(bias="simple", max_length=32)),
    ("mega_orig_softmax_causal", dict(bias="simple", max_length=32)),
    ("mega_orig_laplace_bidir", dict(bias="simple", max_length=32, function="laplace")),
    ("mega_orig_chunk8_bidir", dict(bias="simple", chunk_size=8)),
    ("mega_hf_softmax_causal", {}), ("mega_hf_relu2_bidir", dict(function="relu2")),
    ("mega_hf_laplace_causal", dict(function="laplace")), ("mega_hf_chunk_softmax_bidir", dict(chunk_size=8)),
])  # fmt: skip
def test_oracle(name, options):
    peer, is_authors = oracle.load(name), "orig" in name
    layer = Mega(FEATURES, **SIZES, **options, is_causal=not peer.meta["cfg"]["bidirectional"], rngs=nnx.Rngs(0))

    def run(inputs, w):
        ours = with_average(layer, w, "move." if is_authors else "ema_gate.", AUTHORS if is_authors else AVERAGE)
        for module, theirs in ((ours.value, "v_proj"), (ours.mixed, "mx_proj"), (ours.hidden, "h_proj")):
            module.kernel[...], module.bias[...] = w[f"{theirs}.weight"].T, w[f"{theirs}.bias"]
        ours.query_key_scale[...] = w["gamma" if is_authors else "qk_weight"]
        ours.query_key_shift[...] = w["beta" if is_authors else "qk_bias"]
        if hasattr(ours, "distances"):  # in a chunk theirs are the first of their table
            ours.distances[...] = w["rel_pos_bias.rel_pos_bias"][: len(ours.distances[...])]
        else:
            ours.rotated[...] = jnp.concatenate([w["rel_pos_bias.alpha"], w["rel_pos_bias.b_param"]])
        x = inputs["x"].swapaxes(0, 1)
        if "norm.norm.scalar" in w:
            normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * w["norm.norm.scalar"]
        else:
            centred = x - x.mean(-1, keepdims=True)
            normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
            normed = normed * w["norm.norm.weight"] + w["norm.norm.bias"]
        phi = ours.parts(normed, ours.smoothed(normed)[0])[4]
        return {"y": (ours(normed) + (1 - phi) * (x - normed)).swapaxes(0, 1)}

    oracle.compare("mega", peer, run)


def test_oracle_of_the_average():
    peer, layer = oracle.load("mega_hf_ema_bidir"), build()
    run = lambda inputs, w: {"y": with_average(layer, w, "", AVERAGE).smoothed(inputs["x"].swapaxes(0, 1))[0].swapaxes(0, 1)}
    oracle.compare("mega", peer, run, of="mechanism")
