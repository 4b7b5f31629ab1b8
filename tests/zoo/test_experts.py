"""Mixture of experts: routing by brute force, capacity, padding, losses, and peers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import experts
from subquad.zoo.block import FeedForward
from subquad.zoo.experts import Experts
from tests import oracle
from tests.assertions import assert_close

FEATURES, INNER = 8, 12
EVERY_ROUTE = pytest.mark.parametrize(
    "options", [dict(), dict(top_k=2), dict(capacity_factor=1.25), dict(top_k=2, capacity_factor=0.6)], ids=str
)


def build(num_experts=4, **options):
    return Experts(FEATURES, INNER, num_experts=num_experts, **options, rngs=nnx.Rngs(0))


def normal(*shape, seed=0):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


@nnx.jit
def dense(layer, x, kept=None):
    """Every expert of every token, times its gate; `kept` [B, T, k], of the choices."""
    logits = x @ layer.router.kernel[...]
    chosen, gates = experts.choose(logits, layer.top_k)
    gates = gates if kept is None else jnp.where(kept, gates, 0)
    weights = (jax.nn.one_hot(chosen, layer.num_experts) * gates[..., None]).sum(-2)
    hidden = layer.activation(jnp.einsum("btd,edf->btef", x, layer.inner.kernel[...]) + layer.inner.bias[...])
    given = jnp.einsum("btef,efd->bted", hidden, layer.outer.kernel[...]) + layer.outer.bias[...]
    return jnp.einsum("bted,bte->btd", given, weights)


def with_biases(layer):
    for linear in (layer.inner, layer.outer):
        linear.bias[...] = jnp.asarray(normal(*linear.bias.shape, seed=5))
    return layer


def kept_by_hand(chosen, real, factor, num_experts):
    """Which choices find a place: first choices first, in the order of tokens."""
    kept = np.zeros(chosen.shape, bool)
    for b in range(len(chosen)):
        limit = int(np.ceil(factor * chosen.shape[-1] * real[b].sum() / num_experts))
        taken = np.zeros(num_experts, int)
        for choice in range(chosen.shape[-1]):
            for t in np.flatnonzero(real[b]):
                expert = chosen[b, t, choice]
                kept[b, t, choice] = taken[expert] < limit
                taken[expert] += 1
    return kept


def values_and_gradients(function, layer, x):
    graph, state = nnx.split(layer)
    loss = lambda state, x: ((y := function(nnx.merge(graph, state), x)) * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [None, 0.75, 1.0, 10.0])
def test_each_token_gets_its_experts_and_no_other(top_k, factor):
    layer, x = with_biases(build(top_k=top_k, capacity_factor=factor)), normal(2, 11, FEATURES)
    chosen, _ = experts.choose(x @ layer.router.kernel[...], top_k)
    real = np.ones((2, 11), bool)
    kept = None if factor is None else kept_by_hand(np.asarray(chosen), real, factor, 4)
    assert factor != 0.75 or not kept.all()
    found = values_and_gradients(lambda layer, x: layer(x), layer, x)
    assert_close(found, values_and_gradients(functools.partial(dense, kept=kept), layer, x), 1e-5)


def test_gates_are_a_probability_or_shares_of_those_chosen():
    logits = normal(3, 5, 4)
    p = np.sort(np.asarray(jax.nn.softmax(logits)), -1)[..., ::-1]
    np.testing.assert_allclose(experts.choose(logits, 1)[1][..., 0], p[..., 0], rtol=1e-6)
    np.testing.assert_allclose(experts.choose(logits, 2)[1], p[..., :2] / p[..., :2].sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("factor", [None, 1.0])
def test_one_expert_is_a_plain_network(factor):
    layer, plain, x = build(1, capacity_factor=factor), FeedForward(FEATURES, INNER, rngs=nnx.Rngs(1)), normal(2, 5, FEATURES)
    for name in ("inner", "outer"):
        getattr(layer, name).kernel[...] = getattr(plain, name).kernel[...][None]
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-6)
    drawn = nnx.state(build(64).inner)["kernel"][...]  # and is drawn as one
    assert np.std(drawn) == pytest.approx(FEATURES**-0.5, rel=0.05)


@EVERY_ROUTE
def test_the_order_of_experts_means_nothing(options):
    layer, x, order = with_biases(build(**options)), normal(2, 9, FEATURES), np.array([2, 0, 3, 1])
    other = nnx.clone(layer)
    other.router.kernel[...] = layer.router.kernel[...][:, order]
    for name in ("inner", "outer"):
        for leaf in ("kernel", "bias"):
            getattr(getattr(other, name), leaf)[...] = getattr(getattr(layer, name), leaf)[...][order]
    (found, losses), (wanted, others) = other.with_losses(x), layer.with_losses(x)
    assert_close((found, losses), (wanted, others), 1e-5)


@EVERY_ROUTE
def test_padding_takes_no_place_moves_no_loss_and_gives_nothing(options):
    layer, x = with_biases(build(**options)), normal(2, 7, FEATURES)
    mask = np.zeros((2, 16), bool)
    mask[0, 3:10], mask[1, [0, 2, 3, 7, 11, 12, 15]] = True, True
    padded = np.full((2, 16, FEATURES), np.nan, np.float32)
    padded[mask] = x.reshape(-1, FEATURES)
    found, losses = layer.with_losses(padded, mask=mask)
    wanted, others = layer.with_losses(x)
    np.testing.assert_allclose(found[mask], wanted.reshape(-1, FEATURES), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[~mask], 0)
    assert_close(losses, others, 1e-5)
    total = lambda x: sum(map(jnp.sum, jax.tree.leaves(layer.with_losses(x, mask=mask))))
    slopes = jax.jit(jax.grad(total))(padded)
    assert np.isfinite(slopes).all() and not slopes[~mask].any()
    nothing, losses = layer.with_losses(padded, mask=mask & False)
    assert not nothing.any() and not jax.tree.reduce(np.maximum, losses).any()


def test_samples_know_nothing_of_each_other():
    layer, x = build(top_k=2, capacity_factor=0.6), normal(3, 9, FEATURES)
    together, losses = layer.with_losses(x)
    apart = [layer.with_losses(sample) for sample in x]
    np.testing.assert_allclose(together, np.stack([y for y, _ in apart]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses["balance"], [loss["balance"] for _, loss in apart], rtol=1e-6)
    assert layer.with_losses(x[:, None])[1]["z"].shape == (3, 1)


def test_dropless_tokens_stand_alone():
    layer, x = build(top_k=2), normal(1, 9, FEATURES)
    np.testing.assert_allclose(layer(x)[:, 3:5], layer(x[:, 3:5]), rtol=1e-5, atol=1e-6)


def test_losses():
    layer, x = build(top_k=2), normal(2, 30, FEATURES)
    losses = layer.with_losses(x)[1]
    logits = np.asarray(x @ layer.router.kernel[...], np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    top = np.argsort(-logits, -1)[..., :2]
    for b in range(2):
        share = np.bincount(top[b].ravel(), minlength=4) / 60
        assert losses["balance"][b] == pytest.approx(4 * share @ p[b].mean(0), rel=1e-5)
        assert losses["z"][b] == pytest.approx((np.log(np.exp(logits[b]).sum(-1)) ** 2).mean(), rel=1e-5)
    layer.router.kernel[...] *= 0
    np.testing.assert_allclose(layer.with_losses(x)[1]["balance"], 1, rtol=1e-6)  # equal probabilities
    layer.router.kernel[...] = jnp.zeros((FEATURES, 4)).at[0, 2].set(1000.0)
    one = build(1)
    np.testing.assert_allclose(one.with_losses(x)[1]["balance"], 1, rtol=1e-6)
    layer.top_k = 1
    np.testing.assert_allclose(layer.with_losses(np.abs(x) + 1)[1]["balance"], 4, rtol=1e-5)  # all to one


def test_the_second_of_two_is_drawn_in_training_with_twice_its_gate():
    layer, x = with_biases(build(top_k=2, drop_second=True)), normal(1, 400, FEATURES)
    np.testing.assert_allclose(layer(x), dense(layer, x), rtol=1e-4, atol=1e-5)
    _, gates = experts.choose(x @ layer.router.kernel[...], 2)
    kept, second = 0, np.asarray(gates[..., 1])
    for seed in range(20):
        drawn = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=seed))
        both = np.abs(np.asarray(drawn - dense(layer, x))).max(-1) < 1e-4
        first = np.abs(np.asarray(drawn - dense(layer, x, jnp.arange(2) == 0))).max(-1) < 1e-4
        assert (both | first).all()
        kept = kept + both / 20
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.5)):
        among = (second > low) & (second <= high)
        assert kept[among].mean() == pytest.approx(np.minimum(2 * second[among], 1).mean(), abs=0.05)
    with pytest.raises(ValueError, match="Experts: rngs must be given where it draws, got None"):
        layer(x, deterministic=False)


@pytest.mark.parametrize("factor", [None, 1.5])
def test_half_precision_routes_in_float32(factor):
    layer, x = build(top_k=2, capacity_factor=factor), normal(2, 9, FEATURES)
    half = build(top_k=2, capacity_factor=factor, dtype=jnp.bfloat16)
    nnx.update(half, nnx.state(layer))
    (found, slopes), (wanted, exact) = (
        values_and_gradients(lambda layer, x: layer(x).astype(jnp.float32), one, x) for one in (half, layer)
    )
    assert half(x).dtype == jnp.bfloat16 and half.with_losses(x)[1]["z"].dtype == jnp.float32
    assert_close((found, slopes), (wanted, exact), 0.05)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(half, jax.ShapeDtypeStruct((2, 9, FEATURES), jnp.bfloat16))


def test_no_array_is_quadratic():
    """Nothing of [tokens, experts, places]: compiled memory of a step at twice the length is twice as much."""
    layer = build(num_experts=8, top_k=2, capacity_factor=1.25)

    def temporary(length):
        run = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum()))
        compiled = run.lower(jax.ShapeDtypeStruct((1, length, FEATURES), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4096) <= 2.2 * temporary(2048)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(num_experts=0), "num_experts must be a positive integer"),
        (dict(top_k=5), "top_k must be at most num_experts = 4"),
        (dict(top_k=0), "top_k must be a positive integer"), (dict(capacity_factor=0.0), "capacity_factor must be a number"),
        (dict(drop_second=True), "drop_second must be False with top_k = 1"), (dict(dropout_rate=2), "dropout_rate"),
    ],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"Experts: {message}"):
        build(**{"num_experts": 4, **options})


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"Experts: mask must be boolean of shape .* = \(2, 3\), got bool \(2, 1, 1, 3\)"):
        build()(normal(2, 3, FEATURES), mask=np.ones((2, 1, 1, 3), bool))


def test_switch():
    """transformers' top-1 layer, whose capacity is of each sample; it has no biases, and a ReLU."""
    peer = oracle.load("moe_switch_top1")
    sizes = peer.meta["cfg"]
    layer = Experts(8, 16, num_experts=sizes["E"], capacity_factor=sizes["capacity"] * sizes["E"] / 12, activation=nnx.relu,
                    rngs=nnx.Rngs(0))  # fmt: skip

    def run(inputs, weights):
        one = nnx.clone(layer)
        one.router.kernel[...] = weights["router.classifier.weight"].T
        for name, theirs in (("inner", "wi"), ("outer", "wo")):
            stacked = [weights[f"experts.expert_{i}.{theirs}.weight"].T for i in range(sizes["E"])]
            getattr(one, name).kernel[...] = jnp.stack(stacked)
        return one(inputs["x"])

    oracle.compare(None, peer, run)


def test_losses_of_peers():
    """transformers' losses of Switch, and of Mixtral: of all its tokens together, and k times ours, 2 at balance."""
    peer = oracle.load("moe_losses")

    def losses(logits, top_k, mask=None):
        logits = jnp.asarray(logits, jnp.float32)
        chosen, _ = experts.choose(logits, top_k)
        return experts.router_losses(logits, chosen, jnp.ones(logits.shape[:2], bool) if mask is None else mask)

    switch, mixtral = peer.inputs["switch_logits"], peer.inputs["mixtral_logits"].reshape(1, -1, 4)
    mask = jnp.asarray(np.tile(peer.inputs["mask"].reshape(1, -1), 2), bool)
    functions = dict(
        switch_balance=(lambda x: losses(x, 1)["balance"].mean(), switch),
        switch_z=(lambda x: losses(x, 1)["z"].mean(), switch),
        mixtral_balance=(lambda x: 2 * losses(x, 2)["balance"][0], mixtral),
        mixtral_balance_masked=(lambda x: 2 * losses(x, 2, mask)["balance"][0], mixtral),
    )
    assert set(functions) == set(peer.outputs)
    values = {name: jax.jit(function)(x) for name, (function, x) in functions.items()}
    slopes = {name: jax.jit(jax.grad(functions[name][0]))(jnp.asarray(functions[name][1], jnp.float32)).reshape(wanted.shape)
              for name, wanted in peer.grad_inputs.items()}  # fmt: skip
    oracle.check(None, peer, (values, peer.outputs), (slopes, peer.grad_inputs))


@pytest.mark.parametrize("factor", [None, 1.25])
def test_a_batch_of_any_size_is_exported_once(factor):
    layer, x = build(top_k=2, capacity_factor=factor), normal(3, 5, FEATURES)
    (batch,) = jax.export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 5, FEATURES), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: layer.with_losses(x)))(spec)
    found, wanted = exported.call(x), layer.with_losses(x)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1]["balance"], wanted[1]["balance"], rtol=1e-5)
