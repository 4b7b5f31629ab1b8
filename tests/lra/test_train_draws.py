"""Where a run's draws act, and of which data and which parameters each of its numbers is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subquad.lra import evaluation, models, optim, tasks, train
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.plan import plan
from subquad.lra.step import batch_gradient, train_step

SIZES = {"train": 60, "validation": 20, "test": 24}
TASK = tasks.Task(
    "bits", "own", "drawn bits", vocabulary_size=3, length=12, num_classes=2, splits=SIZES,
    floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip


def small_run(**words):
    small = dict(in_features=8, num_layers=1, mlp_features=8, batch_size=8, steps=30, evaluate_every=10)
    return plan("quickstart", "softmax", task=TASK, **{**small, **words})


class Weights(nnx.Module):
    def __init__(self):
        self.values = nnx.Param(jnp.ones(4))


class Drawing:
    """An objective whose loss is a draw from the dropout stream times the weight that the part of the batch picks.

    So the loss is the draw, and the gradient has the draw of every part in a place of its own.
    """

    def loss(self, model, batch, *, rngs):
        return jax.random.uniform(rngs.dropout()) * (batch["pick"] @ model.values.get_value()).sum(), jnp.ones(())


GRAPH, WEIGHTS, FIXED = nnx.split(Weights(), nnx.Param, ...)


def test_every_part_of_a_batch_has_draws_of_its_own():
    gradient = functools.partial(batch_gradient, small_run(accumulate=4), Drawing(), GRAPH, WEIGHTS, FIXED)
    batch = {"pick": jnp.eye(4)}
    ((total, (count, _)), slopes), _ = gradient(jax.random.key(0), batch)
    (draws,) = jax.tree.leaves(slopes)
    assert count == 4 and total == pytest.approx(float(draws.sum())) and 0 < draws.min() and draws.max() < 1
    assert len(set(draws.tolist())) == 4
    np.testing.assert_array_equal(*(jax.tree.leaves(gradient(jax.random.key(0), batch)[0][1]) for _ in range(2)))


def test_every_step_and_every_seed_has_draws_of_its_own_and_repeats_them():
    def losses(seed):
        run, optimiser = small_run(seed=seed), optax.sgd(0.0)
        state = optim.initial_state(run, optimiser, WEIGHTS)
        step = jax.jit(functools.partial(train_step, run, Drawing(), GRAPH, optimiser))
        found = []
        for _ in range(4):
            state, loss = step(state, FIXED, {"pick": jnp.eye(4)[:1]})
            found.append(float(loss))
        return found

    one, again, other = losses(0), losses(0), losses(1)
    assert one == again and len({*one, *other}) == 8


def examples(length, count):
    rng = np.random.default_rng(length)
    return [{"inputs": rng.integers(1, 3, length), "label": int(rng.integers(2))} for _ in range(count)]


@pytest.mark.parametrize("selection", ["best", "last"])
def test_every_number_is_of_its_split_and_of_its_parameters(selection, monkeypatch, tmp_path):
    """Validation sees validation alone; test, once, the last parameters and those that were best on validation."""
    lengths = {5: "train", 7: "validation", 9: "test"}
    splits = {name: examples(length, SIZES[name]) for length, name in lengths.items()}
    validations, seen, reported = iter([0.0, 0.2, 0.9, 0.5]), [], {}

    def evaluate(step, mesh, fixed, parameters, batches, carried):
        batches = list(batches)
        (split,) = {lengths[int(length)] for one in batches for length in one["mask"].sum(1)[one["weights"] > 0]}
        mark = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(parameters))
        seen.append((split, mark, sum(int(one["weights"].sum()) for one in batches)))
        if split == "validation":
            return evaluation.Scores(next(validations), 1.0, 0.0, np.ones(2))
        return evaluation.Scores(reported.setdefault((split, mark), 0.01 * (1 + len(reported))), 1.0, 0.0, np.ones(2))

    monkeypatch.setattr(evaluation, "mean_score", evaluate)
    run = dataclasses.replace(small_run(learning_rate=0.01, warmup_steps=0), selection=selection)
    result = train.train(run, out=tmp_path, task=TASK, splits=splits, quiet=True)
    _, (_, first, _), (_, best, _), (_, last, _), *after = seen  # the one before the first step is for its compilation
    assert len({first, best, last}) == 3 and [split for split, *_ in seen[:4]] == ["validation"] * 4
    assert [count for _, _, count in seen[1:4]] == [20] * 3
    assert after == [("test", last, 24), ("test", best, 24), ("train", {"best": best, "last": last}[selection], 24)]
    assert (result.accuracy_best, result.accuracy_last) == (reported["test", best], reported["test", last])
    assert result.accuracy == {"best": result.accuracy_best, "last": result.accuracy_last}[selection]
    assert result.accuracy_train == reported["train", {"best": best, "last": last}[selection]]
    assert (result.best_step, result.validation_accuracy_best, result.validation_accuracy_last) == (20, 0.9, 0.5)


def test_statistics_of_batch_norms_are_the_mean_over_the_parts_of_a_batch_and_are_evaluated():
    task = dataclasses.replace(TASK, kind="classification")
    drawn = np.random.default_rng(0)
    batch = dict(inputs=drawn.integers(1, 3, (8, 12)), mask=drawn.random((8, 12)) < 0.8, targets=drawn.integers(0, 2, 8))
    found = {}
    for accumulate in (1, 2):
        run = small_run(accumulate=accumulate, norm="batch", positions=None)
        graph, parameters, statistics, fixed = models.split(models.build(run, task))
        optimiser = optax.sgd(0.0)
        state = optim.initial_state(run, optimiser, parameters, statistics)
        step = jax.jit(functools.partial(train_step, run, OBJECTIVES["classification"], graph, optimiser))
        found[accumulate] = step(state, fixed, batch)[0]
    # The embeddings are those of two tokens: the means of the first norm can be counted.
    first = lambda state: state["statistics"]["classifier"]["encoder"]["blocks"][0]["mixer_norm"]["mean"][...]
    table = parameters["classifier"]["encoder"]["embed"]["embedding"][...]
    mean = lambda rows: table[batch["inputs"][rows]][batch["mask"][rows]].mean(0)
    np.testing.assert_allclose(first(found[1]), 0.1 * mean(slice(8)), rtol=1e-4, atol=1e-6)
    halves = (mean(slice(4)) + mean(slice(4, 8))) / 2
    np.testing.assert_allclose(first(found[2]), 0.1 * halves, rtol=1e-4, atol=1e-6)
    seen = optim.evaluated(run, found[1])
    model = nnx.merge(graph, seen, fixed)
    np.testing.assert_array_equal(model.classifier.encoder.blocks[0].mixer_norm.mean[...], first(found[1]))
    other = models.build(small_run(reversible=True), task).classifier.encoder
    assert other.reversible and not model.classifier.encoder.reversible
    assert len(jax.tree.leaves(seen)) == len(jax.tree.leaves(parameters)) + len(jax.tree.leaves(statistics))


def test_centroids_move_in_training_alone():
    batch = dict(inputs=np.ones((4, 12), int), mask=np.ones((4, 12), bool), targets=np.zeros(4, int))
    run = dataclasses.replace(small_run(positions=None), layer="routing", layer_options=dict(num_heads=2, num_clusters=3))
    graph, parameters, statistics, fixed = models.split(models.build(run, dataclasses.replace(TASK, kind="classification")))
    optimiser = optax.sgd(0.0)
    state = optim.initial_state(run, optimiser, parameters, statistics)
    moved = train_step(run, OBJECTIVES["classification"], graph, optimiser, state, fixed, batch)[0]["statistics"]
    layer = nnx.merge(graph, parameters, statistics, fixed).classifier.encoder.blocks[0]
    tokens = nnx.merge(graph, parameters, statistics, fixed).classifier.encoder.embed(batch["inputs"])
    want = layer.mixer.updated_centroids(layer.mixer_norm(tokens))
    found = moved["classifier"]["encoder"]["blocks"][0]["mixer"]["centroids"][...]
    np.testing.assert_allclose(found, want, atol=1e-6)
    assert np.abs(found - layer.mixer.centroids[...]).max() > 1e-4
    assert not layer.mixer.moves_centroids
