"""Language models: documents kept apart, trained models from their folders, and what the command says."""

import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subquad.lra import models, tasks, train, trained
from subquad.lra.files import RunError
from subquad.lra.plan import plan

TINY = dict(in_features=16, num_layers=1, mlp_features=16, batch_size=4, steps=4, evaluate_every=2, warmup_steps=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("To be, or not to be: that is the question. " * 20)
    return file


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    task, splits = tasks.own_text([text], 24)
    run = plan("quickstart", "linear", task=task, layer_options=dict(num_heads=2), **TINY)
    out = tmp_path_factory.mktemp("run")
    train.train(run, out=out, task=task, splits=splits, quiet=True)
    return out


def test_the_loaded_model_is_the_one_that_was_tested(folder, text):
    model, run, task = trained.load(folder)
    assert task == tasks.own_text([text], 24)[0] or not task.splits
    rows = tasks.own_text([text], 24)[1]["test"]
    inputs, targets = (np.stack([row[name] for row in rows]).astype(np.int32) for name in ("inputs", "targets"))
    logits = model(jnp.asarray(inputs), jnp.ones(inputs.shape, bool))
    bits = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean() / np.log(2)
    result = json.loads((folder / "result.json").read_text())
    assert bits == pytest.approx(result["bits_per_byte"], abs=1e-5)


def test_a_folder_without_a_run_or_a_checkpoint_is_told(folder, tmp_path):
    with pytest.raises(RunError, match="must hold run.json, got none. Name one in runs/"):
        trained.load(tmp_path)
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    with pytest.raises(RunError, match="must hold a checkpoint, got none"):
        trained.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"layer": "linear"', "draft: file .*run.json must be a whole one that was written here, got .* Name another run"),
        ('{"layer": "linear", "later": 1}', "draft: file .*run.json must hold the values of a run .* got later=1. Take"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_told_by_a_command_that_only_reads(content, said, folder, tmp_path):
    from subquad.lra.cli import generate

    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=said) as caught:
        generate.main([str(folder), "--draft", str(tmp_path)])
    assert "--resume" not in str(caught.value) and "--out" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_documents_apart_begin_anew():
    task, words = tasks.find_task("pylib_lm", "offline"), dict(task="pylib_lm", positions=None, **TINY)
    apart, joined = (models.build(plan("quickstart", "linear", documents=x, **words), task) for x in ("apart", "joined"))
    first, second = jnp.array([[5, 6, 7, 1]]), jnp.array([[8, 9, 5, 6, 3]])
    real = lambda x: jnp.ones(x.shape, bool)
    packed = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(apart(packed, real(packed))[:, 4:], apart(second, real(second)), atol=2e-6)
    assert jnp.abs(joined(packed, real(packed))[:, 4:] - joined(second, real(second))).max() > 1e-3


def test_what_cannot_keep_documents_apart_is_refused():
    with pytest.raises(ValueError, match="documents must be 'joined' for layer 'h_transformer', .*use softmax"):
        plan("quickstart", "h_transformer", task="pylib_lm", documents="apart", mlp_features=8)
    with pytest.raises(ValueError, match="documents must be left out for 'listops'"):
        plan("quickstart", "softmax", documents="apart")


@pytest.mark.parametrize(
    "words,message",
    [
        (["--text-length", "64"], "text-length must be left out without --text"),
        (["--text", "{file}", "--text-length", "0"], "text-length must be at least 2 bytes, got 0"),
        (["--text", "{file}", "--task", "listops"], "task must be left out beside --text, got 'listops'"),
    ],
)
def test_the_words_on_text_are_honoured_or_refused(words, message, text):
    from subquad.lra.cli import train as command

    with pytest.raises(ValueError, match=message):
        command.main([word.format(file=text) for word in words])


def command(*words):
    script = pathlib.Path(__file__).parents[2] / "scripts" / "generate.py"
    return subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True)


def test_the_command_goes_on_from_a_prompt(folder):
    done = command(folder, "--prompt", "To é", "--tokens", 12, "--temperature", 0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("To é".encode()) and len(done.stdout.strip(b"\n")) >= len("To é".encode())
    assert b"bytes of linear" in done.stderr


def test_the_command_takes_a_draft(folder, capfdbinary):
    from subquad.lra.cli import generate

    words, texts = [str(folder), "--prompt", "To", "--tokens", "12", "--temperature", "0"], []
    for more in ([], ["--draft", str(folder), "--draft-tokens", "3"]):
        generate.main([*words, *more])
        texts.append(capfdbinary.readouterr())
    assert texts[0].out == texts[1].out
    assert b"100% of the bytes of the draft stood" in texts[1].err and b"draft" not in texts[0].err


@pytest.mark.parametrize(
    "words,message",
    [
        (["nowhere"], "run: folder .*nowhere must hold run.json"),
        (["--prompt", ""], "prompt must have at least one byte"),
        (["--top-p", "2"], "top_p must be"),
        (["--draft", "nowhere"], "draft: folder .*nowhere must hold run.json"),
        (["--draft", "{folder}", "--draft-tokens", "0"], "draft_tokens must be"),
        (["--top-k", "1000"], "top_k must be in 1..257"),
        (["--prompt", 20 * "x", "--tokens", "6"], "num_tokens must be at most 5 after 20 tokens, of a model for 24, got 6"),
        (["--prompt", 25 * "x"], "prompt must have at most 24 bytes, .*got 25. Shorten it, or train with --positions none"),
        (["--top-k", "3", "--temperature", "0"], "top_k must be None when temperature is 0"),
    ],
)
def test_the_command_names_what_is_wrong(words, message, folder, capfdbinary):
    from subquad.lra.cli import generate

    with pytest.raises((ValueError, RunError), match=message):
        words = [word.format(folder=folder) for word in words]
        generate.main(words if words[0] == "nowhere" else [str(folder), *words])
    assert not capfdbinary.readouterr().out, "an error comes before the text"


def test_the_command_adds_by_itself_what_the_model_takes(folder, capfdbinary):
    from subquad.lra.cli import generate

    assert generate.main([str(folder), "--prompt", "To \udcff", "--temperature", "0"]) == 0
    out, told = capfdbinary.readouterr()
    assert out.startswith(b"To \xff") and 0 < int(told.split()[0]) <= 24 - 4 + 1
