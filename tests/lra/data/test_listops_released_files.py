import pytest

from subquad.lra import tasks
from subquad.lra.data import sources, store
from subquad.lra.data.listops import expressions, released_files
from tests.lra.data import archives

NAME = "lra_listops/release"
NESTED = "( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )"


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_tokens_of_the_arenas_nested_form_are_golden(tmp_path):
    write(tmp_path / "manual" / "listops-1000", archives.listops_files(first=NESTED))
    store.prepare(NAME, tmp_path / "data", tmp_path / "manual")
    splits, _ = store.load(NAME, tmp_path / "data")
    for digit, split in enumerate(("train", "validation", "test")):
        first, second = splits[split]
        # [MAX 4 3 [MIN 2 3 ] ]: 0 is padding, digit d is d + 1, then MIN 11, MAX 12, MED 13, SM 14 and the bracket 15.
        assert first["inputs"].tolist() == [12, 5, 4, 11, 3, 4, 15, 15] and first["label"] == 4
        assert second["inputs"].tolist() == [14, 6, digit + 1, 2, 15] and second["label"] == 6 + digit
    task = tasks.find_task("listops", "release")
    assert task.length == 2000 and task.vocabulary_size == expressions.VOCABULARY_SIZE + 1  # the arena's unknown word


@pytest.mark.parametrize("form", ["unpacked", "archive", "archive, inner tree first"])
def test_of_two_copies_the_inner_one_counts(tmp_path, form):
    manual = tmp_path / "manual"
    outer = {f"lra_release/listops-1000/{name}": data for name, data in archives.listops_files().items()}
    inner = {f"lra_release/{name}": data for name, data in outer.items()}
    inner = dict(zip(inner, archives.listops_files(first=NESTED).values(), strict=True))
    files = {**inner, **outer} if form.endswith("first") else {**outer, **inner}
    if form == "unpacked":
        for name, data in files.items():
            write((manual / name).parent, {name.split("/")[-1]: data})
    else:
        archives.pack(manual / "lra_release.gz", files)
    store.prepare(NAME, tmp_path / "data", manual)
    assert len(store.load(NAME, tmp_path / "data")[0]["train"][0]["inputs"]) == 8


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("Source\tTarget\n( [MAX 1 ) ]\t1\n( ( [SM 9 ) 3 ) ]\t1\n", r"basic\.tsv:3 .* got value 1 where 2 is right"),
        ("Source\tTarget\n( [MEAN 1 ) ]\t1\n", r"basic\.tsv:2 .*symbol must be one of"),
        ("Source\tTarget\n( [MAX 1 ) ]\n", r"basic\.tsv:2 .*not enough values"),
        ("( [MAX 1 ) ]\t1\n", r"must begin with 'Source<TAB>Target'"),
        ("", r"must begin with 'Source<TAB>Target', got \[\]"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, content, said):
    (tmp_path / "basic.tsv").write_text(content)
    with pytest.raises(sources.DatasetError, match=said):
        list(released_files.read_examples(tmp_path / "basic.tsv"))


def test_missing_files_are_named(tmp_path):
    write(tmp_path / "manual", {"basic_train.tsv": b""})
    with pytest.raises(sources.MissingSource, match=r"basic_val.tsv must be under .*manual, got nothing of that name there"):
        store.prepare(NAME, tmp_path / "data", tmp_path / "manual")
