"""What a run says of its blocks: experts and the losses of their routers, shared layers, orders, depth, rematerialisation."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from subquad.lra import models, tasks, train
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.plan import plan
from subquad.lra.step import batch_gradient

SPLITS = {"train": 16, "validation": 8, "test": 8}
TASK = tasks.Task(
    "bits", "own", "drawn bits", vocabulary_size=3, length=12, num_classes=2, splits=SPLITS,
    floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip
LISTOPS = tasks.find_task("listops", "tiny")


def small_run(**words):
    small = dict(in_features=8, num_layers=2, mlp_features=8, batch_size=8, steps=10, evaluate_every=5)
    return plan("quickstart", "softmax", task=TASK, **{**small, **words})


def batch(rows=8):
    drawn = np.random.default_rng(0)
    mask = np.arange(12) < drawn.integers(3, 13, (rows, 1))
    return dict(inputs=drawn.integers(1, 3, (rows, 12)), mask=mask, targets=drawn.integers(0, 2, rows))


def test_the_loss_has_the_routers_losses_and_cutting_the_batch_changes_nothing():
    words = dict(num_experts=3, experts_per_token=2, capacity_factor=1.0, balance_loss=0.5, z_loss=0.2)
    found, objective, one = [], OBJECTIVES["classification"], batch()
    for accumulate in (1, 4):
        run = small_run(accumulate=accumulate, **words)
        graph, parameters, _, fixed = models.split(models.build(run, TASK))
        step = lambda parameters, run=run, graph=graph, fixed=fixed: batch_gradient(
            run, objective, graph, parameters, fixed, jax.random.key(0), one
        )
        found.append(jax.jit(step)(parameters)[0])
    ((value, (count, _)), slopes), ((again, _), of_parts) = found
    model = nnx.merge(graph, parameters, fixed)
    logits, router = model.with_losses(one["inputs"], one["mask"])
    entropy = -jax.nn.log_softmax(logits)[np.arange(8), one["targets"]].sum()
    assert count == 8 and float(router["balance"].sum()) > 8 * 2 * 0.9
    assert value == pytest.approx(float(entropy + 0.5 * router["balance"].sum() + 0.2 * router["z"].sum()), rel=1e-5)
    assert again == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(of_parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(objective.rows(model, one)[:, 1].sum(), entropy)  # validation has none of them


def test_a_pair_and_tags_tell_their_losses():
    one = batch()
    pair = tasks.Task("pairs", "own", "", vocabulary_size=3, length=12, num_classes=2, splits=SPLITS, kind="pair",
                      floors=TASK.floors, source="this test")  # fmt: skip
    tags = tasks.Task("tags", "own", "", vocabulary_size=3, length=12, num_classes=2, splits=SPLITS, kind="tagging",
                      floors=TASK.floors, source="this test")  # fmt: skip
    for task, objective in ((pair, "pair"), (tags, "tagging")):
        run = plan("quickstart", "softmax", task=task, in_features=8, num_layers=1, mlp_features=8, num_experts=2)
        model = models.build(run, task)
        part = dict(one, targets=np.where(one["mask"], one["inputs"] - 1, -1)) if task is tags else dict(
            inputs1=one["inputs"], mask1=one["mask"], inputs2=one["inputs"], mask2=one["mask"], targets=one["targets"]
        )  # fmt: skip
        loss = lambda part=part, model=model, objective=objective, **words: OBJECTIVES[objective].loss(
            model, part, rngs=nnx.Rngs(0), **words
        )
        inputs = [part[name] for name in OBJECTIVES[objective].inputs]
        router = model.with_losses(*inputs)[1]
        asked = (part["targets"] >= 0).reshape(8, -1).sum(1)
        (plain, count), (more, _) = loss(), loss(balance=2.0)
        assert count == asked.sum() and more - plain == pytest.approx(float(2 * (router["balance"] * asked).sum()), rel=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        dict(num_layers=4, layer_groups=2), dict(num_layers=3, num_experts=3), dict(num_layers=3, norm_order="macaron"),
        dict(num_layers=4, layer_groups=1, norm="scale"),
    ],
    ids=str,
)  # fmt: skip
def test_counted_parameters_are_those_of_the_model(words):
    run = plan("quickstart", "softmax", config="tiny", in_features=16, mlp_features=16, **words)
    shapes = nnx.state(nnx.eval_shape(lambda: models.build(run, LISTOPS)), nnx.Param)
    assert models.count_parameters(run, LISTOPS) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_every_option_reaches_the_blocks():
    run = small_run(num_layers=4, drop_path_rate=0.4, norm="scale", norm_order="macaron", remat=True, remat_policy="dots")
    encoder = models.build(run, TASK).classifier.encoder
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (encoder.blocks[0].norm_order, type(encoder.norm).__name__, encoder.remat) == ("macaron", "ScaleNorm", "dots")
    assert models.build(small_run(), TASK).classifier.encoder.remat is False
    shared = models.build(small_run(num_layers=4, layer_groups=2), TASK).classifier.encoder
    assert shared.order == (0, 0, 1, 1)
    experts = small_run(num_experts=4, experts_per_token=2, capacity_factor=1.5)
    mlp = models.build(experts, TASK).classifier.encoder.blocks[1].mlp
    assert (mlp.num_experts, mlp.top_k, mlp.capacity_factor) == (4, 2, 1.5)
    assert not models.has_state_space(small_run(num_layers=4, layer_groups=2), TASK)


def test_a_run_with_all_of_it_trains(tmp_path):
    rows = [dict(inputs=np.full(12, 1 + at % 2), label=at % 2) for at in range(16)]
    run = small_run(num_experts=2, drop_path_rate=0.2, norm="scale", norm_order="macaron", remat=True, remat_policy="dots",
                    dropout_rate=0.1)  # fmt: skip
    splits = dict(train=rows, validation=rows[:8], test=rows[8:])
    result = train.train(run, out=tmp_path, task=TASK, splits=splits, quiet=True)
    assert result.status == "ok" and result.parameters == models.count_parameters(run, TASK)


@pytest.mark.parametrize(
    "words,message",
    [
        (dict(experts_per_token=2), "experts_per_token must be 1 without num_experts, got 2. Pass num_experts"),
        (dict(z_loss=0.5), "z_loss must be 0.001 without num_experts, got 0.5"),
        (dict(remat_policy="dots"), "remat_policy must be nothing without remat, got dots"),
        (dict(num_layers=4, layer_groups=3), "layer_groups must divide num_layers = 4, got 3"),
        (dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\), got 1.0"),
        (dict(num_experts=-1), "num_experts must be >= 0 and finite, got -1"),
        (dict(num_experts=2, capacity_factor=0.0), "capacity_factor must be > 0 and finite, got 0.0"),
        (dict(norm_order="macron"), "norm_order must be a known word, got 'macron'. Did you mean 'macaron'"),
    ],
    ids=str,
)
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        small_run(**words)
