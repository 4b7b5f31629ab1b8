"""What a user brings along: a task, a layer."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from subquad.lra import models, tasks, train
from subquad.lra.plan import plan

PARITY = tasks.Task(
    "bits", "own", "bits that I drew", vocabulary_size=3, length=12, num_classes=2,
    splits={"train": 64, "validation": 20, "test": 24}, floors=lambda splits: {"majority": 0.5}, source="this test",
)  # fmt: skip


def examples(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        bits = rng.integers(1, 3, rng.integers(4, 13))
        yield {"inputs": bits, "label": int(bits.sum() % 2)}


def splits():
    return {name: examples(count, seed) for seed, (name, count) in enumerate(PARITY.splits.items())}


def test_a_tagging_example_that_asks_no_token_is_refused():
    """Its sequence would count as one with all answers right."""
    tagging = dataclasses.replace(PARITY, kind="tagging", length=2)
    for targets in ([-1, -1], [-1, -1, 1]):  # the last one is cut off
        example = {"inputs": [1] * len(targets), "targets": targets}
        with pytest.raises(ValueError, match=r"\['train'\]\[0\]\['targets'\] must ask at least one of the first 2 tokens"):
            tasks.check_splits(tagging, dict.fromkeys(PARITY.splits, [example]))


def test_a_task_of_ones_own_is_asked_for_where_it_is_missing(tmp_path):
    run = plan("quickstart", "softmax", task=PARITY, mlp_features=16)
    with pytest.raises(ValueError, match="task must be a known name, got 'bits'"):
        train.train(run, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="task must be the run's, listops/small, got bits/own"):
        train.train(plan(), out=tmp_path / "other", task=PARITY, splits=splits())
    with pytest.raises(ValueError, match="config must be the task's, 'own', got 'small'. Leave it out"):
        plan(task=PARITY, config="small")
    namesake = dataclasses.replace(PARITY, name="text")  # the rules of IMDb are not its
    assert plan(task=namesake, mlp_features=8).config == "own"


@pytest.mark.parametrize(
    ("example", "match"),
    [
        ({"inputs": [1, 2], "target": 0}, r"splits\['test'\]\[0\] must have the fields \('inputs', 'label'\)"),
        ({"inputs": [0, 2], "label": 0}, r"\['inputs'\] must be in 1..2, got 0..2. Id 0 is padding"),
        ({"inputs": [1, 3], "label": 0}, r"\['inputs'\] must be in 1..2, got 1..3"),
        ({"inputs": [1, 2], "label": 2}, r"\['label'\] must be in 0..1, got 2..2"),
        ({"inputs": [1.0, 2.0], "label": 1}, r"\['inputs'\] must be a sequence of integers, got float64"),
        ({"inputs": [], "label": 1}, r"\['inputs'\] must be a sequence of integers"),
        ({"inputs": [1, 2], "label": [1]}, r"\['label'\] must be an integer, got int64 of shape \(1,\)"),
    ],
)
def test_examples_that_do_not_fit_the_task_are_refused(example, match):
    with pytest.raises(ValueError, match=match):
        tasks.check_splits(PARITY, {**splits(), "test": [example]})


def test_a_split_that_is_missing_or_empty_is_told():
    some = splits()
    with pytest.raises(ValueError, match="splits must have 'test', got"):
        tasks.check_splits(PARITY, {name: some[name] for name in ("train", "validation")})
    with pytest.raises(ValueError, match=r"splits\['validation'\] must have examples, got none"):
        tasks.check_splits(PARITY, {**splits(), "validation": []})


LAYERS = '''
import jax.numpy as jnp
from flax import nnx

class Mean(nnx.Module):
    """Mixes by the mean of the real tokens."""

    def __init__(self, in_features, *, width=8, is_causal=False, rngs):
        self.inner, self.is_causal = nnx.Linear(in_features, width, rngs=rngs), is_causal
        self.outer = nnx.Linear(width, in_features, rngs=rngs)

    def __call__(self, inputs, mask=None):
        real = jnp.ones(inputs.shape[:2], bool) if mask is None else mask[:, 0, 0]
        hidden = jnp.where(real[..., None], self.inner(inputs), 0)
        if self.is_causal:
            mean = hidden.cumsum(1) / jnp.maximum(real.cumsum(1), 1)[..., None]
        else:
            mean = hidden.sum(1, keepdims=True) / jnp.maximum(real.sum(1), 1)[:, None, None]
        return self.outer(jnp.broadcast_to(mean, hidden.shape))

class Segmented(Mean):
    """Knows documents: its outputs are their numbers."""

    def __call__(self, inputs, mask=None, segment_ids=None):
        return jnp.zeros_like(inputs) + segment_ids[..., None]

class Deaf(Mean):
    def __call__(self, inputs):
        return inputs

class Wide(nnx.Module):
    def __init__(self, features, rngs):
        pass

    def __call__(self, inputs, mask=None):
        return inputs

class Forward(nnx.Module):
    def __init__(self, in_features, depth, *, rngs):
        pass

    def __call__(self, inputs, other, mask=None):
        return inputs

class Bidirectional(nnx.Module):
    def __init__(self, in_features, depth, *, rngs):
        pass

    def __call__(self, inputs, mask=None):
        return inputs

class Plain:
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_mixers.py").write_text(LAYERS)
    (tmp_path / "my_broken.py").write_text("import nothing_like_it")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_task_and_a_layer_of_ones_own_are_trained_and_resumed(module, tmp_path):
    words = dict(in_features=16, num_layers=1, steps=6, evaluate_every=3, layer_options=dict(width=4))
    run = plan("quickstart", "my_mixers:Mean", task=PARITY, **words)
    assert run.layer == "my_mixers:Mean" and ":" not in run.id
    result = train.train(run, out=tmp_path / "out", task=PARITY, splits=splits(), quiet=True)
    assert (result.status, result.layer, result.task, result.test_examples) == ("ok", "my_mixers:Mean", "bits", 24)
    assert result.data.startswith("bits that I drew as passed to train") and result.floor_majority == 0.5
    assert result.accuracy * 24 == pytest.approx(round(result.accuracy * 24))
    assert train.train(run, out=tmp_path / "out", task=PARITY, splits=splits(), resume=True) == result
    # The recipe's equal budget holds for it, too.
    reference = plan("quickstart", "softmax", task=PARITY, in_features=16, num_layers=1)
    assert result.parameters == pytest.approx(models.count_parameters(reference, PARITY), rel=0.1)
    # Padding is masked for it as for the others.
    model, rows = nnx.jit(models.build(run, PARITY)), np.array([[1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(model(rows, rows > 0), model(np.where(rows > 0, rows, 1), rows > 0))
    spoken = plan("quickstart", "my_mixers:Mean", task="pylib_lm", mlp_features=16, **words)
    assert models.count_parameters(spoken, tasks.find_task("pylib_lm", "offline")) > 0


@pytest.mark.parametrize(
    ("layer", "words", "kind", "match"),
    [
        ("my_mixer:Mean", {}, ValueError, "must name a module that can be imported, got 'my_mixer'.*No module.*PYTHONPATH"),
        ("my_broken:Mean", {}, ValueError, "must name a module .*got 'my_broken' .*nothing_like_it"),
        ("my_mixers:Maen", {}, ValueError, "layer must name a class of my_mixers, got 'Maen'. Did you mean 'Mean'"),
        ("my_mixers:Plain", {}, ValueError, "got .*Plain'>, which is no subclass of flax.nnx.Module"),
        ("my_mixers:Deaf", {}, ValueError, "got a __call__ without mask, which could not leave padding out"),
        ("my_mixers:Wide", {}, ValueError, "got a constructor without in_features"),
        ("my_mixers:Forward", {}, ValueError, "got a __call__ that also needs other"),
        ("my_mixers:Mean", dict(widht=4), TypeError, "my_mixers:Mean: widht must be an option .* Did you mean 'width'"),
        ("my_mixers:Bidirectional", {}, TypeError, "depth must be given, got nothing. Pass --layer-options depth="),
    ],
)
def test_layers_that_do_not_meet_the_contract_are_told_why(module, layer, words, kind, match):
    with pytest.raises(kind, match=match):
        plan("quickstart", layer, task=PARITY, layer_options=words)


def test_documents_are_kept_apart_by_a_layer_that_takes_segment_ids_alone(module):
    words = dict(task="pylib_lm", documents="apart", mlp_features=16, layer_options=dict(is_causal=True))
    with pytest.raises(ValueError, match="documents must be 'joined' for layer 'my_mixers:Mean', .*or give your own"):
        plan("quickstart", "my_mixers:Mean", **words)
    run = plan("quickstart", "my_mixers:Segmented", in_features=16, num_layers=1, **words)
    mixer = models.build(run, tasks.find_task("pylib_lm", "offline")).model.encoder.layers[0].mixer
    np.testing.assert_array_equal(mixer(np.ones((1, 3, 16)), segment_ids=np.array([[0, 1, 1]]))[0, :, 0], [0, 1, 1])


def test_a_layer_without_is_causal_is_no_language_model(module):
    with pytest.raises(ValueError, match="got 'my_mixers:Bidirectional', which cannot be .its constructor takes no is_causal"):
        plan("lra-2020", "my_mixers:Bidirectional", task="pylib_lm", layer_options=dict(depth=1))
