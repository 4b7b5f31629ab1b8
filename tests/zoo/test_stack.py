"""How an encoder stacks its layers: experts, weights that layers share, stochastic depth, what a backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra.bench import measure
from subquad.zoo.experts import add
from tests import oracle
from tests.assertions import assert_close

SIZES = dict(vocab_size=11, in_features=16, num_layers=2, mlp_features=24, max_length=20, mixer_options=dict(num_heads=2))
EXPERTS = dict(num_experts=3, top_k=2)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 12))
MASK = np.arange(12) < np.array([[12], [7], [10]])


def build(kind=zoo.Encoder, *arguments, **options):
    return kind(*arguments, **{**SIZES, **options}, rngs=nnx.Rngs(0))


def split(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params: nnx.merge(graph, params, rest)


def total(outputs, losses):
    """One number of all outputs and losses, whose every part has a weight of its own."""
    weigh = lambda x: (x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)).sum()
    return weigh(outputs) + weigh(losses["balance"]) + 0.3 * weigh(losses["z"])


def slopes(model, run):
    """(run's outputs and losses, gradients of both)."""
    params, merged = split(model)

    @jax.jit
    def at(params):
        def loss(params):
            found = run(merged(params))
            return total(*found), found

        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return found, gradients

    found, gradients = at(params)
    return found, nnx.to_pure_dict(gradients)


def by_hand(model, draws=None):
    """Embedding, blocks one after the other, norm."""
    hidden = model.embed(TOKENS) + model.positions.embedding[...][:12]
    hidden, losses = jnp.where(MASK[..., None], hidden, 0), zoo.experts.no_losses((3,))
    for block in model.layers:
        hidden, more = block.with_losses(hidden, mask=MASK[:, None, None], **(draws or {}))
        losses = add(losses, more)
    return model.norm(hidden), losses


@pytest.mark.parametrize("remat", [False, "dots"])
@pytest.mark.parametrize("experts", [EXPERTS, [None, dict(num_experts=4, capacity_factor=0.8)]], ids=["all", "every other"])
def test_losses_of_all_routers_and_their_gradients(experts, remat):
    model = build(experts=experts, remat=remat)
    kinds = [type(block.mlp).__name__ for block in model.blocks]
    assert kinds == (["Experts"] * 2 if experts is EXPERTS else ["FeedForward", "Experts"])
    found = slopes(model, lambda model: model.with_losses(TOKENS, mask=MASK))
    assert_close(found, slopes(model, by_hand), 1e-4)
    assert np.abs(found[1]["blocks"][1]["mlp"]["router"]["kernel"]).max() > 1e-3
    np.testing.assert_allclose(model(TOKENS, mask=MASK), found[0][0], rtol=1e-4, atol=1e-5)


def test_reversible_blocks_tell_their_routers_losses():
    """As two plain streams do, and their gradients are rebuilt; the draws of dropout are replayed."""
    model = build(experts=dict(EXPERTS, drop_second=True), reversible=True, drop_path_rate=0.5, dropout_rate=0.2)
    model.dropout.rate = 0.0  # of the embeddings, whose key is another

    def plain(model):
        rngs = nnx.Rngs(dropout=5)
        keys = [rngs.dropout() for _ in range(4)]
        hidden = model.embed(TOKENS) + model.positions.embedding[...][:12]
        first = second = jnp.where(MASK[..., None], hidden, 0)
        losses = zoo.experts.no_losses((3,))
        for at, block in enumerate(model.blocks):
            draws = [dict(deterministic=False, rngs=nnx.Rngs(dropout=key)) for key in keys[2 * at : 2 * at + 2]]
            first = first + block.mix(block.mixer_norm(second), draws[0], dict(mask=MASK[:, None, None]))
            added, more = block.feed(block.mlp_norm(first), draws[1], MASK)
            second, losses = second + added, add(losses, more)
        return model.norm((first + second) / 2), losses

    call = lambda model: model.with_losses(TOKENS, mask=MASK, deterministic=False, rngs=nnx.Rngs(dropout=5))
    assert_close(slopes(model, call), slopes(model, plain), 1e-4)


def test_models_tell_the_losses_of_their_encoders():
    options = dict(experts=EXPERTS)
    losses = build(**options).with_losses(TOKENS, mask=MASK)[1]
    assert losses["balance"].shape == (3,) and (losses["balance"] > 1).all()
    classifier = build(zoo.Classifier, 3, **options)
    logits, found = classifier.with_losses(TOKENS, mask=MASK)
    np.testing.assert_array_equal(logits, classifier(TOKENS, mask=MASK))
    assert_close(found, losses, 1e-5)
    dual = build(zoo.DualEncoder, 3, **options)
    other = dual.encoder.with_losses(TOKENS[:, :5])[1]
    found = dual.with_losses(TOKENS, TOKENS[:, :5], mask=MASK)[1]
    assert_close(found, jax.tree.map(lambda a, b: (a + b) / 2, losses, other), 1e-5)
    assert not jax.tree.reduce(np.maximum, build(zoo.Classifier, 3).with_losses(TOKENS)[1]).any()
    linen = nnx.bridge.to_linen(zoo.Classifier, 3, **SIZES, **options)
    variables = linen.init(jax.random.key(0), TOKENS)
    wanted = nnx.merge(*nnx.split(classifier)).encoder  # the same losses as a model of those weights tells
    found = linen.apply(variables, TOKENS, nnx_method=zoo.Classifier.with_losses)[1]
    assert found["z"].shape == wanted.with_losses(TOKENS)[1]["z"].shape and (found["z"] > 0).all()


def test_a_language_model_extends_with_experts_and_refuses_a_capacity():
    for options in (dict(), dict(reversible=True)):
        model = build(zoo.CausalLM, experts=EXPERTS, **options)
        cache, pieces = model.init_cache(3, 12), []
        for start, stop in ((0, 5), (5, 6), (6, 12)):
            logits, cache = model.extend(TOKENS[:, start:stop], cache, mask=MASK[:, start:stop])
            pieces.append(logits)
        wanted, losses = model.with_losses(TOKENS, mask=MASK)
        np.testing.assert_allclose(jnp.concatenate(pieces, 1)[MASK], wanted[MASK], rtol=1e-4, atol=1e-5)
        assert (losses["balance"] > 1).all()
    segments = np.repeat([[0, 1]], 6, axis=1).repeat(3, 0)
    packed = model(TOKENS, segment_ids=np.sort(segments))
    np.testing.assert_allclose(packed[:, 6:], model(TOKENS[:, 6:]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="CausalLM: experts must have no capacity_factor, got capacity_factor=1.25"):
        build(zoo.CausalLM, experts=dict(EXPERTS, capacity_factor=1.25))


def test_layers_that_share_weights_are_one_block_run_again():
    model = build(num_layers=4, layer_groups=2)
    plain = build(num_layers=4)
    for at, block in enumerate(plain.blocks):
        nnx.update(block, nnx.state(model.blocks[at // 2]))
    for name in ("embed", "positions", "norm"):
        nnx.update(getattr(plain, name), nnx.state(getattr(model, name)))
    run = lambda model: model.with_losses(TOKENS, mask=MASK)
    (found, gradients), (wanted, of_plain) = slopes(model, run), slopes(plain, run)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    parts = of_plain.pop("blocks")
    of_plain["blocks"] = {at: jax.tree.map(jnp.add, parts[2 * at], parts[2 * at + 1]) for at in (0, 1)}
    assert_close(gradients, of_plain, 1e-4)
    count = lambda model: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count(model) == count(build(num_layers=2)) < count(plain)
    flops = lambda model: measure.flops(split(model)[1], split(model)[0]) + measure.flops(model, TOKENS)
    assert flops(model) == flops(plain) > flops(build(num_layers=2))


def test_shared_layers_in_any_order_with_everything_else():
    assert build(num_layers=6, layer_groups=[0, 1, 0, 1, 2, 2]).order == (0, 1, 0, 1, 2, 2)
    assert build(num_layers=2, layer_groups=np.array([0, 0])).order == (0, 0)
    assert build(num_layers=6, layer_groups=2).order == (0, 0, 0, 1, 1, 1) and len(build(layer_groups=1).blocks) == 1
    mixed = build(num_layers=4, layer_groups=[0, 1, 0, 1], mixer=["softmax", "local"], experts=[None, EXPERTS])
    assert [type(block.mixer).__name__[:5] for block in mixed.layers] == ["Softm", "Local"] * 2
    again = build(num_layers=4, layer_groups=[0, 1, 0, 1], mixer=["softmax", "local"], experts=[None, EXPERTS], remat="nothing")
    run = lambda model: model.with_losses(TOKENS, mask=MASK)
    assert_close(slopes(again, run), slopes(mixed, run), 1e-4)
    assert np.asarray(run(mixed)[1]["balance"] > 2).all()  # two routers' calls
    streams = build(num_layers=4, layer_groups=1, reversible=True)
    plain = build(num_layers=4, reversible=True)
    for block in plain.blocks:
        nnx.update(block, nnx.state(streams.blocks[0]))
    for name in ("embed", "positions", "norm"):
        nnx.update(getattr(plain, name), nnx.state(getattr(streams, name)))
    np.testing.assert_allclose(streams(TOKENS), plain(TOKENS), rtol=1e-5, atol=1e-6)


def test_each_layer_keeps_a_cache_of_its_own():
    model = build(zoo.CausalLM, num_layers=3, layer_groups=1)
    first, cache = model.extend(TOKENS[:, :5], model.init_cache(3, 12))
    assert len(cache.layers) == 3
    second, _ = model.extend(TOKENS[:, 5:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), model(TOKENS), rtol=1e-4, atol=1e-5)
    assert model.generate(TOKENS, 2).shape == (3, 2)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(layer_groups=3), "layer_groups must be a positive integer that divides num_layers = 4, got 3"),
        (dict(layer_groups=0), "layer_groups must be a positive integer that divides num_layers = 4, got 0"),
        (dict(layer_groups=[0, 2, 2, 0]), "layer_groups must name the blocks 0, 1, ... of 4 layers, none left out"),
        (dict(layer_groups=[0, 0.5, 0, 0.5]), "layer_groups must name the blocks 0, 1, ... of 4 layers"),
        (dict(layer_groups=[False, True, 0, 1]), "layer_groups must name the blocks 0, 1, ... of 4 layers"),
        (dict(layer_groups=True), "layer_groups must be a positive integer that divides num_layers = 4, got True"),
        (dict(layer_groups=[0, 1]), "layer_groups must name the blocks 0, 1, ... of 4 layers"),
        (dict(layer_groups=2, drop_path_rate=0.1), "drop_path_rate must be 0 with layer_groups, got 0.1"),
        (dict(layer_groups=2, mixer=["softmax"] * 4), "mixer must have one entry for each layer, got 4 for 2 layers"),
        (dict(experts=[EXPERTS]), "experts must have one entry for each layer, got 1 for 4 layers"),
        (dict(remat="dot"), "remat must be a known name, got 'dot'. Did you mean 'dots'"),
        (dict(reversible=True, norm_order="macaron"), "norm_order must be 'pre' with reversible, got macaron"),
        (dict(reversible=True, remat="dots"), "remat must be False with reversible, got dots"),
    ],
    ids=str,
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"Encoder: {message}"):
        build(**{"num_layers": 4, **options})


def test_the_depth_is_as_random_as_deep():
    """Layer l of L is passed by with l / L of the rate."""
    rates = lambda **options: [block.drop_path.rate for block in build(num_layers=4, **options).blocks]
    assert rates(drop_path_rate=0.4) == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rates() == [0] * 4
    model = build(drop_path_rate=0.9)
    call = dict(deterministic=False, rngs=nnx.Rngs(dropout=0))
    wanted = by_hand(model, dict(deterministic=False, rngs=nnx.Rngs(dropout=0)))[0]
    np.testing.assert_allclose(model(TOKENS, mask=MASK, **call), wanted, rtol=1e-4, atol=1e-5)
    assert (model(TOKENS, deterministic=False, rngs=nnx.Rngs(dropout=1)) != model(TOKENS)).any()
    model.train()
    assert {block.drop_path.deterministic for block in model.blocks} == {False}


def test_what_a_policy_keeps_for_the_backward_pass():
    """By the outputs of the compiled forward pass; XLA on a CPU takes the saving back where it compiles both passes."""
    kept, found = {}, {}
    options = dict(mixer="softmax", mixer_options=dict(num_heads=2, implementation="reference"), max_length=64)
    tokens = np.random.default_rng(0).integers(0, 11, (1, 64))
    for remat in (False, "dots", "dots_with_no_batch_dims", "nothing", True):
        params, merged = split(build(**options, remat=remat))
        loss = lambda params, merged=merged: (merged(params)(tokens) ** 3).sum()
        forward = jax.jit(lambda params, loss=loss: jax.vjp(loss, params)[1])
        kept[remat] = forward.lower(params).compile().memory_analysis().output_size_in_bytes
        found[remat] = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    assert kept[True] == kept["nothing"] < kept["dots_with_no_batch_dims"] / 1.2
    assert kept["dots_with_no_batch_dims"] < kept["dots"] / 1.2 and kept["dots"] < kept[False] / 1.2
    # The scores of two layers and heads, and their product with the values, are what the last two differ in.
    assert kept["dots"] - kept["dots_with_no_batch_dims"] >= 4 * 2 * 2 * 64 * 64
    for gradients in found.values():
        assert_close(gradients, found[False], 1e-4)


@pytest.mark.parametrize("name", ["albert_shared", "albert_groups"])
def test_albert(name):
    """Norms after the sums, and an embedding of its own; with inner layers a group is several blocks, run in turn."""
    peer = oracle.load(name)
    sizes = peer.meta["cfg"]
    inner, groups = sizes["inner_group_num"], sizes["num_hidden_groups"]
    times = sizes["layers"] // groups
    order = [group * inner + at for group in range(groups) for _ in range(times) for at in range(inner)]
    model = zoo.Encoder(
        None, 16, num_layers=len(order), layer_groups=order, mlp_features=24, max_length=12, norm_order="post", positions=None,
        mixer_options=dict(num_heads=sizes["heads"]), embed=nnx.Linear(6, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0),
    )  # fmt: skip
    norm = nnx.LayerNorm(6, epsilon=1e-12, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.mixer_norm.epsilon = block.mlp_norm.epsilon = 1e-12
    names = {"attention.query": "mixer.query", "attention.key": "mixer.key", "attention.value": "mixer.value",
             "attention.dense": "mixer.out", "attention.LayerNorm": "mixer_norm", "full_layer_layer_norm": "mlp_norm",
             "ffn": "mlp.inner", "ffn_output": "mlp.outer"}  # fmt: skip
    scale = lambda weights: {name.replace("orm.weight", "orm.scale"): value for name, value in weights.items()}

    def run(inputs, weights):
        of = lambda prefix: {
            name.removeprefix(prefix): value for name, value in scale(weights).items() if name.startswith(prefix)
        }
        one, embeddings = nnx.clone(model), of("embeddings.")
        one.embed = oracle.holding(model.embed, of("encoder.embedding_hidden_mapping_in."), {"": ""})
        for at in range(len(model.blocks)):
            prefix = f"encoder.albert_layer_groups.{at // inner}.albert_layers.{at % inner}."
            one.blocks[at] = oracle.holding(model.blocks[at], of(prefix), names)
        words = embeddings["word_embeddings.weight"]
        words = jnp.concatenate([jax.lax.stop_gradient(words[:1]), words[1:]])  # PyTorch does not train padding's
        hidden = words[inputs["ids"]] + embeddings["position_embeddings.weight"][:6]
        hidden = hidden + embeddings["token_type_embeddings.weight"][0]
        hidden = one.embed(oracle.holding(norm, of("embeddings.LayerNorm."), {"": ""})(hidden))
        # Its padding asks, too, which only a mask of pairs says.
        call = dict(mask=jnp.broadcast_to((inputs["mask"] > 0)[:, None, None, :], (2, 1, 6, 6)))
        return one.run_blocks(hidden, call, True, None)[0]

    oracle.compare(None, peer, run)
