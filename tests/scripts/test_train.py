"""The command, in this process, with runs that are made up."""

import dataclasses
import sys

import pytest

from subquad.lra import tasks, train
from subquad.lra.cli import commands
from subquad.lra.cli import train as train_command
from subquad.lra.report import results

TINY = ("--config", "tiny", "--steps", "5")


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, words)])
    return commands.exit_code_of("train", train_command.main)


def test_several_seeds_are_rows_of_one_table(monkeypatch, capsys, tmp_path):
    asked = []

    def made_up(run, *, out, **words):
        asked.append((run.seed, out, words))
        row = results.failure(run, tasks.find_task(run.task, run.config), "")
        return dataclasses.replace(
            row, status="ok", accuracy=0.3 + 0.02 * run.seed, collapsed_step=20 if run.seed == 2 else None,
            scores_by_length='{"60": 0.25, "120": "cannot: too long"}',
        )

    monkeypatch.setattr(train, "train", made_up)
    more = ("--tensorboard", "--resume", "--test-lengths", "60,120")
    assert call(monkeypatch, *TINY, "--seeds", 0, 2, 0, "--out", tmp_path, *more) == 0
    assert [seed for seed, *_ in asked] == [0, 2] and asked[0][1] != asked[1][1]
    shared = dict(data_dir=None, resume=True, devices=None, shard="batch", tensorboard=True, checkpoint_minutes=10)
    shared |= dict(task=None, splits=None)
    assert asked[0][2] == shared | dict(test_lengths=[60, 120])
    assert [row.seed for row in results.read_results(tmp_path / "results.csv")] == [0, 2]
    said = capsys.readouterr().out
    assert "32.0 % ± 2.8 (2 seeds), 1 collapsed" in said and "Seed 2 collapsed: by step 20" in said
    assert "Seed 0 by length: 60: 0.250; 120: cannot: too long." in said


@pytest.mark.parametrize(
    "words,said",
    [
        (("--devices", 3), "devices must be in 1..1, the cpu devices there are, got 3. On a CPU, XLA_FLAGS="),
        (("--shard", "zero"), "shard must be 'batch' on one device, got 'zero'. Pass devices, 2 or more."),
        (("--test-lengths", "59"), "listops: test lengths must be >= 60, twice the longest, got 59."),
        (("--seeds", 1, "--seed", 1), "seed must be left out beside --seeds, got 1. Add it to --seeds."),
        (("--seeds", -1), "seed must be in [0, 2**32), got -1."),
        (("--seeds", 0, -1, "--explain"), "seed must be in [0, 2**32), got -1."),
        (("--checkpoint-minutes", "nan"), "checkpoint_minutes must be >= 0, got nan. Leave it out for 10."),
        (("--layer-options", "=1"), "layer_options must be written name=value, got '=1'."),
        (("--schedule", "cosine", "--warmup-steps", 5), "warmup_steps must be below steps = 5 under schedule 'cosine', got 5."),
        (("--num-processes", 2), "start: coordinator must be given together with"),
        (("--ema", 2), "ema must be in (0, 1), got 2.0."),
        (("--steps", "x"), "steps must be int, got 'x'. Leave it out for the recipe's."),
        (("--batch-size", 0), "batch_size must be > 0 and finite, got 0. Leave it out for the recipe's."),
        (("--norm", "none"), "norm must be one of layer, rms, batch, scale, got None. Leave it out for the recipe's."),
        (("--positions", "rotary"), "positions must be a known word, got 'rotary'. Known: learned, none, sinusoidal."),
        (("--test-lengths", ""), "--test-lengths: must name at least one, got ''. Leave it out."),
        (("--schedule", "linaer"), "schedule must be a known word, got 'linaer'. Did you mean 'linear'?"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(words, said, monkeypatch, capsys, tmp_path):
    try:
        assert call(monkeypatch, *TINY, "--out", tmp_path / "out", *words) == 2
    except SystemExit as stopped:  # argparse's own
        assert stopped.code == 2
    assert capsys.readouterr().err.startswith(f"train: {said}") and not any(tmp_path.iterdir())


def test_what_resume_does_not_find_is_one_line_before_the_run(monkeypatch, capsys, tmp_path):
    made_up = lambda run, **words: results.failure(run, tasks.find_task(run.task, run.config), "")
    monkeypatch.setattr(train, "train", made_up)
    for words in ((), ("--seeds", 0, 1)):
        assert call(monkeypatch, *TINY, "--out", tmp_path, "--resume", *words) == commands.FAILED
        assert capsys.readouterr().err.startswith(f"Nothing to resume in {tmp_path}/runs; beginning anew.\n{{")


def test_a_table_that_could_not_take_the_row_is_refused_before_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "results.csv").write_text("mine\n1\n")
    assert call(monkeypatch, *TINY, "--out", tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"train: table: file {tmp_path}/results.csv must have the columns of this version in its first line")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--in-features", 10**9), "memory: run must fit into "),
        (("--batch-size", 257), "batches: batch_size must be in 1..256, the training examples of listops/tiny, got 257."),
    ],
)
def test_what_cannot_fit_makes_no_folder(words, said, monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, *TINY, "--recipe", "nystromformer", "--out", tmp_path / "out", *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"train: {said}") and not any(tmp_path.iterdir())


def test_explain_prints_each_value_and_its_level_and_trains_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("trained"))
    assert call(monkeypatch, *TINY, "--recipe", "nystromformer", "--out", tmp_path / "out", "--explain") == 0
    printed = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()}
    assert printed["steps"] == ["5", "given"] and printed["learning_rate"] == ["0.0001", 'recipe nystromformer, "*"']
    assert printed["layer_options.num_heads"] == ["2", "recipe nystromformer, layers"] and not any(tmp_path.iterdir())
