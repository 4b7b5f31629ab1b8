import dataclasses
import pathlib
import signal
import subprocess
import sys

import pytest

from subquad.lra import checkpoints, files, interrupts, progress
from subquad.lra.cli import commands, generate
from subquad.lra.data.sources import DatasetError
from subquad.lra.run import Run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (files.RunError("out: folder x must be writable."), 1),
        (DatasetError("data set: folder x must hold a whole data set."), 1),
        (checkpoints.Interrupted("Stopped at step 3 of 10."), 130),
        (KeyboardInterrupt(), 130),
        (checkpoints.Interrupted("Stopped at step 3 of 10.", signal.SIGTERM), 143),
        (interrupts.Terminated(), 143),
        (ValueError("layer must be a known name,\n got 'x'."), 2),
        (ValueError("train: devices must divide batch_size = 16, got 3."), 2),
        (TypeError("stps must be a value of a run."), 2),
        (NotImplementedError("S4: no such kernel."), 2),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), 1),
        (MemoryError(), 1),
        (ModuleNotFoundError("No module named 'grain'", name="grain"), 1),
    ],
)
def test_what_a_user_can_cure_is_one_line_and_an_exit_code(error, code, capsys):
    def main():
        raise error

    assert commands.exit_code_of("train", main) == code
    said = capsys.readouterr().err
    assert said.startswith("train: ") and said.count("\n") == 1 and said.count("train:") == 1
    assert commands.exit_code_of("subquad train", main) == code and capsys.readouterr().err == f"subquad {said}"


def test_other_errors_keep_their_trace():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        commands.exit_code_of("train", main)


def test_exit_codes_of_main_pass():
    assert commands.exit_code_of("train", lambda: None) == 0
    assert commands.exit_code_of("train", lambda: 1) == 1


@pytest.mark.parametrize("given", [["a,b"], ["a", "b"], ["a,", "b", "a"]])
def test_words_stand_between_spaces_or_commas(given, capsys):
    parser = commands.Parser(prog="bench")
    parser.add_argument("--layers", nargs="+", action=commands.Words)
    assert parser.parse_args(["--layers", *given]).layers == ["a", "b"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--layers", ","])
    assert "--layers must name at least one, got ','" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_a_command_without_a_word():
    code = "import sys\nfrom subquad.lra.cli import commands\ncommands.run('train', lambda: print(1, flush=True))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # before the command has loaded
        assert process.stderr.read() == b"" and process.wait() == commands.BROKEN_PIPE


SCRIPT = """
import os, signal, sys
if sys.argv[1] != "at work":
    from subquad.lra import interrupts
    interrupts.exit_during_startup("train")
    if sys.argv[1] == "loading":
        os.kill(os.getpid(), int(sys.argv[2]))
from subquad.lra.cli import commands
def main():
    import atexit
    atexit.register(os._exit, 9)  # the interpreter's own end goes wrong, as it does while a compiler is at work
    print("a row")
    os.kill(os.getpid(), int(sys.argv[2]))
commands.run("train", main)
"""


@pytest.mark.parametrize(
    ("when", "number"),
    [("loading", signal.SIGINT), ("running", signal.SIGINT), ("at work", signal.SIGINT), ("loading", signal.SIGTERM),
     ("running", signal.SIGTERM)],
)  # fmt: skip
def test_ctrl_c_and_sigterm_are_one_line_and_their_code_at_any_time(when, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
    done = subprocess.run([sys.executable, "-c", SCRIPT, when, str(int(number))], capture_output=True, text=True)
    signal.signal(signal.SIGINT, before)
    assert done.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], done.stderr
    assert done.stderr.startswith("train: Interrupted") and done.stderr.count("\n") == 1
    assert done.stdout == ("" if when == "loading" else "a row\n")  # what was printed is there, though the end is sudden


def test_ctrl_c_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.exit_during_startup("train")
    interrupts.startup_done()
    assert signal.signal(signal.SIGINT, before) is signal.SIG_IGN


def test_every_script_ends_by_run():
    for path in (pathlib.Path(__file__).parents[3] / "scripts").glob("*.py"):
        text = path.read_text()
        of_subquad = f'None, "{path.stem}")' in text and "from subquad.lra.cli.__main__ import run" in text
        assert of_subquad or f'commands.run("{path.stem}", main)' in text, path


def parser():
    made = commands.Parser(prog="train")
    commands.add_options(made, Run, leave_out=("layer_options",), task="explain me")
    return made


def test_every_value_of_a_run_is_an_option_with_its_type():
    words = "--steps 7 --learning-rate 1e-2 --clip-norm none --positions none --dtype bfloat16 --remat"
    given = commands.given_fields(Run, parser().parse_args(words.split()))
    assert given == dict(steps=7, learning_rate=0.01, clip_norm=None, positions=None, dtype="bfloat16", remat=True)


def test_every_value_of_a_run_is_explained():
    helps = commands.field_descriptions(Run)
    assert set(helps) == {one.name for one in dataclasses.fields(Run)} and all(map(str.strip, helps.values()))
    assert helps["clip_norm"] == "largest global norm of the gradient; None: no limit."
    assert "0.2 whenever the validation loss" in helps["schedule"] and "\n" not in helps["schedule"]
    shown = commands.Parser.format_help(parser())
    assert "explain me" in shown and "--positions learned|sinusoidal|none" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stesp", "7"], "option must be a known one, got '--stesp'. Did you mean '--steps'?"),
        (["--stesp=7"], "option must be a known one, got '--stesp=7'. Did you mean '--steps'?"),
        (["--step", "7"], "option must be a known one, got '--step'. Did you mean '--steps'?"),
        (["--steps"], "--steps: expected one argument"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith(f"train: {said}") and error.count("\n") == 1


@pytest.mark.parametrize("given", ["-1", "4294967296", "99999999999999999999"])
def test_a_seed_of_samples_is_a_word_of_32_bits(given, capsys):
    with pytest.raises(SystemExit):
        generate.parse(["run", "--seed", given], "generate")
    assert f"--seed: must be >= 0 and < 4294967296, got {given}" in capsys.readouterr().err


def test_layer_options_are_read_as_values():
    assert commands.assignments(["a=1", "b=0.5", "c=none", "d=None", "e=(1, 2)"]) == dict(
        a=1, b=0.5, c="none", d=None, e=(1, 2)
    )
    with pytest.raises(ValueError, match="layer_options must be written name=value, got 'a'"):
        commands.assignments(["a"])
    with pytest.raises(ValueError, match="--override must be written name=value, got 'a'. For example in_features=512."):
        commands.assignments(["a"], "--override", "in_features=512")


def test_plain_progress_says_loss_speed_and_time_left(capsys):
    with progress.Progress("s4", 100) as shown:
        for step in range(1, 101):
            shown.update(step, 2.0, 4.0, "validation 30.0 %")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11  # the first, every tenth of the way, the last
    assert lines[5] == "s4: step 50/100  loss 2.000  4.0 steps/s  0:12 left  validation 30.0 %"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress("s4", 100) as shown:
        assert shown.on_terminal
        shown.update(50, 2.0, 4.0)
    said = capsys.readouterr().err
    assert "50/100" in said and "loss 2.000" in said and "4.0 steps/s" in said and "0:12 left" in said


def test_quiet_is_quiet(capsys):
    with progress.Progress("s4", 10, quiet=True) as shown:
        shown.update(10, 1.0, 1.0)
        shown.say("nothing")
    assert capsys.readouterr() == ("", "")
