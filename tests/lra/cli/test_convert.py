"""A trained language model's attention changed for another layer's: distilled, fine-tuned, loaded."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra import distil, models, tasks, train, trained
from subquad.lra.cli import convert
from subquad.lra.data import pipeline
from subquad.lra.files import RunError
from subquad.lra.plan import plan

LENGTH = 8
TINY = dict(in_features=8, num_layers=1, mlp_features=8, batch_size=4, warmup_steps=2, learning_rate=2e-2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("To be, or not to be: that is the question. " * 10)
    return str(file)


@pytest.fixture(scope="module")
def before(text, tmp_path_factory):
    task, splits = tasks.own_text([text], LENGTH)
    run = plan("quickstart", "softmax", task=task, layer_options=dict(num_heads=2), steps=20, evaluate_every=20, **TINY)
    out = tmp_path_factory.mktemp("softmax")
    train.train(run, out=out, task=task, splits=splits, quiet=True)
    return str(out)


def words(before, text, out, *more):
    steps = ("--steps", 20, "--distil-steps", 20, "--distil-learning-rate", 0.1, "--evaluate-every", 20)
    return [before, "--text", text, "--out", str(out), *map(str, (*steps, *more))]


@pytest.fixture(scope="module")
def converted(before, text, tmp_path_factory):
    """(what was given as --out, the new run's folder, what the command said)."""
    out, said = tmp_path_factory.mktemp("converted"), io.StringIO()
    with contextlib.redirect_stdout(said):
        assert convert.main(words(before, text, out)) == 0
    (folder,) = (out / "runs").iterdir()
    return out, folder, said.getvalue()


def test_distillation_and_fine_tuning_make_it_better(before, converted):
    _, folder, said = converted
    record, result = (json.loads((folder / name).read_text()) for name in (convert.FILE, "result.json"))
    losses = record["distil_losses"]
    assert len(losses) == 20 and np.mean(losses[-5:]) < np.mean(losses[:5])
    scores = record["bits_per_byte"]
    assert scores["distilled"] != scores["converted"] and result["bits_per_byte"] < scores["converted"]
    with open(f"{before}/result.json") as file:
        assert scores["trained"] == pytest.approx(json.load(file)["bits_per_byte"], abs=1e-5)
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    assert rows["trained"][0] == "softmax" and rows["fine-tuned"][:2] == ["hedgehog", f"{result['bits_per_byte']:.3f}"]
    caches = [int(cell.replace(",", "")) for cell in rows["trained"][3:] + rows["distilled"][3:]]
    assert caches[2] - caches[1] == 2 * (16384 - 2048) * 8 * 4 and len(set(caches[3:])) == 1


def test_the_folder_is_a_run_of_the_new_layer(converted):
    model, run, _ = trained.load(converted[1])
    assert run.layer == "hedgehog" and isinstance(model.model.encoder.blocks[0].mixer, zoo.HedgehogAttention)
    assert not np.allclose(model.model.encoder.blocks[0].mixer.query_map[...], np.eye(4), atol=1e-3)


def test_a_finished_conversion_is_shown_again_and_no_other_takes_its_place(before, text, converted, capsys):
    out, _, said = converted
    assert convert.main(words(before, text, out, "--resume")) == 0
    assert capsys.readouterr().out == said
    with pytest.raises(RunError, match="Pass --resume"):
        convert.main(words(before, text, out))
    with pytest.raises(RunError, match="this conversion or none, got one with distil_steps=20 instead of 3"):
        convert.main(words(before, text, out, "--resume", "--distil-steps", 3))


@pytest.mark.parametrize("content, got", [("{", "Expecting property name"), ("{}", "got no model")])
def test_a_damaged_record_is_one_line(content, got, before, text, converted, monkeypatch):
    out, folder, _ = converted
    kept = (folder / convert.FILE).read_text()
    try:
        (folder / convert.FILE).write_text(content)
        with pytest.raises(RunError, match=f"conversion.json must be a whole one .*{got}.* Delete the folder"):
            convert.main(words(before, text, out, "--resume"))
    finally:
        (folder / convert.FILE).write_text(kept)


def test_outputs_are_distilled_by_what_is_new_alone(before, text):
    teacher, run, task = trained.load(before)
    found = zoo.convert(teacher, "gla", rngs=nnx.Rngs(0))
    new = {f"{found.changes[0].path}/{name}" for name in found.changes[0].new}
    flat = lambda: {"/".join(map(str, path)): np.array(x[...]) for path, x in nnx.to_flat_state(nnx.state(found.model))}
    first, splits = flat(), tasks.own_text([text], LENGTH)[1]
    batches = pipeline.training_batches(splits["train"], batch_size=4, length=LENGTH, seed=0)
    losses = distil.distil(teacher, found, batches, steps=20, learning_rate=3e-2, quiet=True)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    moved = {name for name, value in flat().items() if (value != first[name]).any()}
    assert moved and moved <= new and any("decay_up" in name for name in moved)


def test_a_layer_that_draws_nothing_has_nothing_to_distil(before):
    teacher = trained.load(before)[0]
    found = zoo.convert(teacher, "linear", rngs=nnx.Rngs(0))
    assert distil.distil(teacher, found, iter(()), steps=3, learning_rate=1.0) == []


def test_a_model_of_other_variables_is_no_beginning(before):
    model, run, task = trained.load(before)
    other = plan("quickstart", "gla", task=task, layer_options=dict(num_heads=2), **TINY)
    with pytest.raises(ValueError, match="model must have the variables of layer 'gla' with .*decay"):
        models.split_as(other, task, model)
    copy = models.split_as(run, task, model)
    jax.tree.map(np.testing.assert_array_equal, copy[1], models.split(model)[1])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--layer", "hedgehgo"], "Did you mean 'hedgehog'"),
        (["--layer", "fnet"], "layer must be causal"),
        (["--layer", "linear", "--layer-options", "fetures=3"], "fetures"),
        (["--layer-options", "num_heads=3"], "num_heads must divide"),
        (["--batch-size", "4000"], "batch_size must be in 1.."),
    ],
)
def test_names_what_is_wrong(more, message, before, text, tmp_path):
    with pytest.raises((ValueError, TypeError), match=message):
        convert.main(words(before, text, tmp_path, *more))


def test_refuses_what_cannot_be_converted(before, tmp_path, capsys):
    with pytest.raises(ValueError, match="text must be given for a run on text of yours"):
        convert.main([before, "--out", str(tmp_path)])
    model, run, task = trained.load(before)
    with pytest.raises(ValueError, match="run must be of a language model, got one on listops"):
        convert.check(model, run, tasks.find_task("listops", "small"))
    with pytest.raises(SystemExit):
        convert.main([before, "--distil-steps", "-1"])
    assert "distil-steps" in capsys.readouterr().err
    without = models.build(plan("quickstart", "lru", task=task, **TINY), task)
    with pytest.raises(ValueError, match="run must have attention layers of the zoo"):
        convert.check(without, run, task)
