"""Synthesizer: every form against its formula, the identities between forms, mixtures, and the arena's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.dense.synthesizer import SynthesizerAttention
from subquad.zoo.features import RandomFeature
from tests import oracle

FEATURES, HEADS, LENGTH, LONGEST = 16, 2, 11, 15
FORMS = ("dense", "factorized_dense", "random", "factorized_random", "dot_product")


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def build(*forms, **options):
    options = dict(max_length=LONGEST, rank=3, factor=4) | options
    return SynthesizerAttention(HEADS, FEATURES, synthesis=forms, rngs=nnx.Rngs(0), **options)


def run(layer, *arguments, **words):
    return jax.jit(lambda *arguments: layer(*arguments, **words))(*arguments)


def columns(module, x):
    """w . relu(W x + b) + c of every column, of one head after the other: [B, N, T, S]."""
    (W, b), w, c = (module.hidden.kernel[...], module.hidden.bias[...]), module.columns[...], module.bias[...]
    heads = [np.maximum(x @ W[:, n] + b[n], 0) @ w[n] + c[n] for n in range(HEADS)]
    return np.stack(heads, 1)


def logits_of(layer, form, x):
    """The paper's, spelt out: [B|1, N, T, S]."""
    if form == "dense":
        return columns(layer.dense, x)[..., :LENGTH]
    if form == "factorized_dense":
        outer, inner = columns(layer.outer, x), columns(layer.inner, x)
        return np.stack([outer[..., s // 4] * inner[..., s % 4] for s in range(LENGTH)], -1)
    if form == "random":
        return layer.random[...][None, :, :LENGTH, :LENGTH]
    if form == "factorized_random":
        return np.einsum("ntr,nsr->nts", layer.rows[...], layer.columns[...])[None, :, :LENGTH, :LENGTH]
    query, key = (np.einsum("btd,dnh->bnth", x, module.kernel[...]) for module in (layer.query, layer.key))
    return query @ key.swapaxes(2, 3) / np.sqrt(FEATURES / HEADS)


def attended(layer, logits, x, is_causal):
    """The output map of softmax(logits) v."""
    if is_causal:
        logits = np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bnts,bsd,dnh->btnh", np.broadcast_to(weights, (2, HEADS, LENGTH, LENGTH)), x, layer.value.kernel[...])
    return np.einsum("btnh,nhd->btd", heads, layer.out.kernel[...])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("forms", [*((form,) for form in FORMS), FORMS, ("random", "dot_product")], ids="+".join)
def test_the_formula(forms, is_causal):
    """All biases but those of columns are 0 at the start, so it leaves them out."""
    layer, x = build(*forms, is_causal=is_causal), np.asarray(normal(2, LENGTH, FEATURES))
    if len(forms) > 1:
        layer.mixture[...] = normal(len(forms), seed=1)
        shares = np.exp(layer.mixture[...]) / np.exp(layer.mixture[...]).sum()
    else:
        shares = [1.0]
    for module in [module for _, module in nnx.iter_graph(layer) if hasattr(module, "hidden")]:
        module.bias[...], module.hidden.bias[...] = (normal(*x[...].shape, seed=2) for x in (module.bias, module.hidden.bias))
    logits = sum(share * logits_of(layer, form, x) for share, form in zip(shares, forms, strict=True))
    np.testing.assert_allclose(run(layer, x), attended(layer, logits, x, is_causal), rtol=1e-4, atol=1e-5)


def test_forms_that_are_others():
    x = normal(2, LENGTH, FEATURES)
    softmax = zoo.SoftmaxAttention(HEADS, FEATURES, rngs=nnx.Rngs(1))
    compared = build("dot_product")
    nnx.update(softmax, nnx.state(compared))
    np.testing.assert_allclose(run(compared, x), run(softmax, x), atol=1e-6)
    # Factors of full rank, one of which is 1.
    free, factored = build("random"), build("factorized_random", rank=LONGEST)
    factored.rows[...] = free.random[...]
    factored.columns[...] = jnp.broadcast_to(jnp.eye(LONGEST), (HEADS, LONGEST, LONGEST))
    nnx.update(factored, {name: nnx.state(getattr(free, name)) for name in ("value", "out")})
    np.testing.assert_allclose(run(factored, x), run(free, x), atol=1e-6)
    # One column of 1 repeated, times all of a dense form; and the other way round.
    dense = build("dense")
    for factor, one, all_of in ((LONGEST, "outer", "inner"), (1, "inner", "outer")):
        factored = build("factorized_dense", factor=factor)
        nnx.update(factored, {name: nnx.state(getattr(dense, name)) for name in ("value", "out")})
        nnx.update(getattr(factored, all_of), nnx.state(dense.dense))
        ones = getattr(factored, one)
        ones.columns[...], ones.bias[...] = jnp.zeros_like(ones.columns[...]), jnp.ones((HEADS, 1))
        np.testing.assert_allclose(run(factored, x), run(dense, x), atol=1e-6)


def test_a_mixture_begins_as_the_mean_and_may_end_as_one_form():
    layer, x = build("random", "dense"), normal(2, LENGTH, FEATURES)
    assert {form: float(share) for form, share in layer.mixture_weights().items()} == {"random": 0.5, "dense": 0.5}
    layer.mixture[...] = jnp.array([0.0, 40.0])
    alone = build("dense")
    nnx.update(alone, {name: nnx.state(getattr(layer, name)) for name in ("value", "out", "dense")})
    np.testing.assert_allclose(run(layer, x), run(alone, x), atol=1e-5)


def test_extend_knows_the_positions_of_each_sample():
    layer, x = build(*FORMS, is_causal=True), normal(2, LENGTH, FEATURES)
    mask = jnp.arange(LENGTH) >= jnp.array([[[[0]]], [[[3]]]])
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    first, cache = step(x[:, :6], layer.init_cache(2, LONGEST), mask[..., :6])
    second, _ = step(x[:, 6:], cache, mask[..., 6:])
    got, want = jnp.concatenate([first, second], 1), run(layer, x, mask=mask)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, 3:], want[1, 3:], atol=1e-5)


def test_fixed_numbers_are_not_learned():
    learned, fixed = (build("random", "factorized_random", is_fixed=is_fixed) for is_fixed in (False, True))
    for name in ("random", "rows", "columns"):
        assert type(getattr(learned, name)) is nnx.Param and type(getattr(fixed, name)) is RandomFeature
        np.testing.assert_array_equal(getattr(learned, name)[...], getattr(fixed, name)[...])
    x = normal(2, LENGTH, FEATURES)
    np.testing.assert_array_equal(run(learned, x), run(fixed, x))


def test_logits_start_with_variance_1():
    """Of inputs of variance 1, in every form but the product of queries and keys, which is Flax's."""
    layer = SynthesizerAttention(8, 256, max_length=128, synthesis=FORMS[:4], rngs=nnx.Rngs(0))
    x = normal(4, 128, 256)
    one = {form: SynthesizerAttention(8, 256, max_length=128, synthesis=form, rngs=nnx.Rngs(0)) for form in layer.forms}
    for form, layer in one.items():
        assert jnp.var(layer.synthesize(x, None, 128)) == pytest.approx(1, abs=0.1), form


@pytest.mark.parametrize(("change", "words"), [
    (dict(max_length=None), "max_length must be the largest"), (dict(max_length=0), "max_length"), (dict(rank=0), "rank"),
    (dict(factor=0), "factor"), (dict(synthesis="densest"), "synthesis"), (dict(synthesis=()), "synthesis"),
    (dict(synthesis=("dense", "dense")), "synthesis must be a form, or some that are all different"),
])  # fmt: skip
def test_refusals(change, words):
    with pytest.raises(ValueError, match=f"SynthesizerAttention: {words}"):
        SynthesizerAttention(HEADS, FEATURES, **(dict(max_length=9) | change), rngs=nnx.Rngs(0))


def test_more_tokens_than_rows_or_columns():
    for count in ((LONGEST + 1,), (LONGEST + 1, 3), (3, LONGEST + 1)):
        with pytest.raises(ValueError, match="SynthesizerAttention: inputs_.* must be at most the layer's max_length = 15"):
            build("random")(*(normal(2, size, FEATURES) for size in count))
    with pytest.raises(ValueError, match="max_length must be at most the layer's max_length = 15"):
        build("random", is_causal=True).init_cache(2, LONGEST + 1)


# The arena's layer: it adds logits where the paper averages them, has one second dense map for all heads, and takes
# [B, T, N, L] for [B, N, T, L] without a transpose.


def arena(layer, x):
    """Their dense form of our layer's parameters."""
    batch, length, _ = x.shape
    shares = layer.mixture_weights()
    z = jnp.moveaxis(layer.dense(x, layer.max_length), 1, 2)
    logits = shares["dense"] * z.reshape(batch, HEADS, length, -1)[..., :length]
    if "random" in shares:
        logits += shares["random"] * layer.random[...][None, :, :length, :length]
    return layer.out(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), layer.value(x)))


def masked(layer, x):
    """A query of padding averages all values there, with the gradients of logits that were rounded away beside -1e10."""
    is_real = jnp.asarray(oracle.load("lra_synth_dot_random").inputs["padding_mask"][..., 0] > 0)
    logits = layer.synthesize(x, None, x.shape[1])
    logits += jnp.einsum("btnh,bsnh->bnts", layer.compared(x, x), layer.key(x)) / np.sqrt(FEATURES / HEADS)
    weights = jax.nn.softmax(logits - jax.lax.stop_gradient(logits))
    of_padding = layer.out(jnp.einsum("bnts,bsnh->btnh", weights, layer.value(x)))
    return jnp.where(is_real[..., None], layer(x, mask=is_real[:, None, None]), of_padding)


NAMES = {
    "dense_syn": "dense.hidden", "dense_syn_len.kernel": "dense.columns", "dense_syn_len.bias": "dense.bias",
    "random1": "rows", "random2": "columns",
}  # fmt: skip
DOUBLED = {"random", "dense_syn_len.kernel", "dense_syn_len.bias", "query.kernel", "query.bias"}


@pytest.mark.parametrize(("name", "forms", "call"), [
    ("random", ("random",), None), ("random_causal", ("random",), None),
    ("factorized_random", ("factorized_random",), None), ("dot_random", ("random", "dot_product"), masked),
    ("dense", ("dense",), arena), ("dense_random", ("dense", "random"), arena),
])  # fmt: skip
def test_oracle(name, forms, call):
    layer = SynthesizerAttention(
        HEADS, FEATURES, max_length=40, synthesis=forms, rank=4, is_causal="causal" in name, rngs=nnx.Rngs(0)
    )

    def run(inputs, weights):
        # The mean of twice their logits is their sum.
        own = {name: 2 * w if len(forms) > 1 and name in DOUBLED else w for name, w in weights.items()}
        own |= {name: jnp.stack([w] * HEADS) for name, w in own.items() if "dense_syn_len" in name}  # one for all heads there
        own |= {name: jnp.moveaxis(w, 1, 2) for name, w in own.items() if name == "random2"}
        held = oracle.holding(layer, own, NAMES)
        return call(held, inputs["x"]) if call else held(inputs["x"])

    oracle.compare("synthesizer", oracle.load(f"lra_synth_{name}"), run)
