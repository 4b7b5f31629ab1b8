import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from subquad.lra.cli import prepare

from .calling import call

ROOT = pathlib.Path(__file__).parents[2]


def command(*words):
    return [sys.executable, str(ROOT / "scripts" / "prepare_lra.py"), *map(str, words)]


def test_list_prepare_check(tmp_path):
    prepared = call("prepare_lra", "prepare", "listops/tiny", "--data-dir", tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    assert prepared.stdout.startswith(f"listops/tiny: in {tmp_path}/lra_listops/tiny/")
    listed = call("prepare_lra", "list", "--data-dir", tmp_path)
    assert listed.returncode == 0, listed.stderr
    lines = {line.split()[0]: line.split() for line in listed.stdout.splitlines()}
    assert lines["listops/tiny"][-1] == "yes" and lines["listops/small"][-1] == "no"
    assert {"text/lra", "retrieval/lra", "image/lra", "pathfinder/128_hard", "pylib_lm/offline"} <= set(lines)
    assert f"Data sets in {tmp_path}; files fetched by hand are looked for in {tmp_path}/downloads/manual." in listed.stdout
    checked = call("prepare_lra", "check", "listops/tiny", "--data-dir", tmp_path)
    assert checked.returncode == 0 and checked.stdout.endswith("  ok\n"), checked.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("prepare", "txt"), 2, "task must be a known name, got 'txt'. Did you mean 'text'?"),
        (("chek", "text"), 2, "action must be a known one, got 'chek'. Did you mean 'check'?"),
        ((), 2, "action must be one of list, prepare, check, got none."),
        (("check",), 2, "check must be given a task, got none."),
        (("check", "image"), 1, "image: data set must be prepared first, got no folder"),
        (("list", "--data-dri", "x"), 2, "option must be a known one, got '--data-dri'. Did you mean '--data-dir'?"),
    ],
)
def test_wrong_words_are_one_line(words, code, said, tmp_path):
    words = [*words, *([] if words[:1] == ("list",) else ["--data-dir", str(tmp_path)])]
    done = call("prepare_lra", *words)
    assert done.returncode == code
    assert done.stderr.startswith(f"prepare_lra: {said}") and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_wrong_file_and_a_missing_one_are_a_line_each(tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    (manual / "aclImdb_v1.tar.gz").write_bytes(b"an error page")
    words = ("prepare", "text", "retrieval", "--data-dir", tmp_path / "data", "--manual-dir", manual)
    done = call("prepare_lra", *words)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Preparing ")]
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"lra_text/lra: file {manual}/aclImdb_v1.tar.gz must have 84,125,825 bytes")
    assert lines[1].startswith(f"lra_retrieval/lra: new_aan_pairs.train.tsv must be under {manual}")


def test_ctrl_c_is_one_line_and_leaves_no_data_set(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and its children ignore Ctrl-C
    words = command("prepare", "listops", "--data-dir", tmp_path)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    parent = tmp_path / "lra_listops" / "lra"
    # It is at work, and shows it.
    said = [process.stderr.readline()]
    while not re.match(r"lra_listops/lra: train: [1-9][\d,]*/96,000  \d:\d\d  about .* left$", said[-1]):
        assert said[-1], said
        said.append(process.stderr.readline())
    os.kill(process.pid, signal.SIGINT)
    said += process.communicate(timeout=600)[1].splitlines()
    assert process.returncode == 130
    assert said[0] == f"Generating lra_listops/lra into {parent / '1.0.0'}\n"
    assert said[-1] == "prepare_lra: Interrupted; what was saved before is kept."
    assert all(line.startswith("lra_listops/lra: ") for line in said[1:-1])
    assert not list(parent.iterdir())


def test_every_option_reaches_what_is_done(monkeypatch, tmp_path):
    asked = []

    def check(word, data_dir, *, cnn_steps):
        asked.append((word, data_dir, cnn_steps))
        return prepare.Report(["a line"], ["wrong"])

    monkeypatch.setattr(prepare, "check", check)
    monkeypatch.setattr(prepare, "prepare", lambda *words: asked.append(words) or 0)
    assert call("prepare_lra", "check", "text", "image", "--data-dir", "there", "--cnn-steps", "7").returncode == 1
    assert call("prepare_lra", "prepare", "text", "--data-dir", "there", "--manual-dir", "here").returncode == 0
    assert asked == [("text", "there", 7), ("image", "there", 7), (["text"], "there", "here")]
    refused = call("prepare_lra", "check", "text", "--cnn-steps", "-1")
    listed = call("prepare_lra", "list", "--data-dir", tmp_path)
    assert refused.returncode == 2 and "--cnn-steps: must be >= 0, got -1." in refused.stderr
    assert listed.returncode == 0 and "Hours are those of two cores" in listed.stdout
