"""Archives and files that hold more, or other things, than a data set can: refused before anything of them is written."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from subquad.lra.data import sources
from subquad.lra.data.image import cifar10
from subquad.lra.data.listops import expressions, released_files
from subquad.lra.data.pathfinder import released_folders
from subquad.lra.data.retrieval import paper_pairs
from subquad.lra.data.text import imdb
from tests.lra.data import archives

FILE = "basic_train.tsv"


def link(name, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def packed(tmp_path, *members):
    """An archive under the release's name, of (name, data) and of members without data."""
    with tarfile.open(tmp_path / sources.RELEASE_FILES[0], "w:gz") as archive:
        for one in members:
            member, data = (one, b"") if isinstance(one, tarfile.TarInfo) else (tarfile.TarInfo(one[0]), one[1])
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (tmp_path / "scratch").mkdir()
    return tmp_path, tmp_path / "scratch"


SOURCE = sources.Release((FILE,), 100, 200)


def refused(tmp_path, members, match, source=SOURCE):
    manual, scratch = packed(tmp_path, *members)
    with pytest.raises(sources.DatasetError, match=f"archive: {manual}/lra_release.gz must {match}.* Fetch it again") as caught:
        source.fetch("a", manual, scratch)
    assert "\n" not in str(caught.value)
    return [path for path in scratch.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("member", "match"),
    [
        ((f"a/{FILE}", b"x" * 101), r"hold files such as this one of at most 100 bytes, got a/basic_train.tsv of 101"),
        ((f"../{FILE}", b"x"), r"hold paths inside it, got '\.\./basic_train.tsv'"),
        (("a/../../b", b"x"), r"hold paths inside it, got 'a/\.\./\.\./b'"),
        ((f"/tmp/{FILE}", b"x"), "hold paths inside it, got '/tmp/basic_train.tsv'"),
        (link(FILE), "hold basic_train.tsv as a plain file, got a link"),
        (link(FILE, tarfile.LNKTYPE), "hold basic_train.tsv as a plain file, got a link"),
        (link(FILE, tarfile.FIFOTYPE), "hold basic_train.tsv as a plain file, got a link or a device"),
    ],
    ids=["large", "outside", "outside and back", "absolute", "link", "hard link", "pipe"],
)
def test_a_member_that_cannot_be_the_releases_is_refused_and_nothing_is_written(member, match, tmp_path):
    assert refused(tmp_path, [member], match) == []


def test_all_files_together_are_bounded(tmp_path):
    members = [(f"{'deeper/' * depth}{FILE}", b"x" * 90) for depth in range(1, 4)]
    written = refused(tmp_path, members, "hold files of this data set of at most 200 bytes, got more")
    assert [path.stat().st_size for path in written] == [90, 90]


def test_links_and_large_files_that_nobody_asks_for_are_passed_over(tmp_path):
    manual, scratch = packed(tmp_path, link("a/latest"), ("a/other.tsv", b"x" * 1000), (f"./a/{'n' * 200}/{FILE}", b"yes"))
    found = sources.Release((FILE,), 100, 200).fetch("a", manual, scratch)
    assert found[FILE].read_bytes() == b"yes" and len(list(scratch.iterdir())) == 1


def test_a_folder_of_pictures_is_no_larger_than_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(released_folders, "IMAGES", 1)
    source = released_folders.release(32, "easy")
    members = [(f"{source.paths[0]}/imgs/1/sample_0.png", np.random.default_rng(0).bytes(2 * (32 * 32 + 4_096) + 1))]
    assert refused(tmp_path, members, "hold files of this data set of at most 10,240 bytes, got more", source) == []


def test_reviews_and_images_are_no_larger_than_they_can_be(tmp_path):
    incompressible = np.random.default_rng(0).bytes
    review = archives.pack(tmp_path / "reviews.tar.gz", {"aclImdb/test/pos/0_9.txt": incompressible(imdb.LARGEST + 1)})
    with pytest.raises(sources.DatasetError, match="of at most 100,000 bytes, got aclImdb/test/pos/0_9.txt of 100,001"):
        list(imdb.read_reviews(review, "test"))
    file = {"cifar-10-batches-bin/test_batch.bin": incompressible(2 * 3073)}
    batch = archives.pack(tmp_path / "images.tar.gz", file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "_IMAGES", 1)
        with pytest.raises(sources.DatasetError, match="of at most 3,073 bytes, got .*/test_batch.bin of 6,146"):
            list(cifar10.read_images(batch, "test"))


def test_a_small_file_with_a_huge_picture_is_not_unpacked(tmp_path, monkeypatch):
    Image.new("1", (9_000, 9_000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(sources.DatasetError, match="must be an image of 32 x 32, got an image of 9000 x 9000. Unpack"):
        list(released_folders.read_images([released_folders.Sample(tmp_path / "huge.png", 0)], 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)  # at twice as many Pillow itself refuses
    with pytest.raises(sources.DatasetError, match="must be an image of 32 x 32, got Image size"):
        list(released_folders.read_images([released_folders.Sample(tmp_path / "huge.png", 0)], 32))


def npy(shape, data=b""):
    header = f"{{'descr': '<U8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


@pytest.mark.parametrize("content", [npy("(1000000000000000, 9)"), npy("(2, 9)"), npy("(x, 9)"), b"\xff\xfe", b"\x93NUMPY"])
def test_metadata_that_are_no_list_are_told_by_name(content, tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "1.npy").write_bytes(content)
    with pytest.raises(sources.DatasetError, match=f"release: {tmp_path}/metadata/1.npy must list images") as caught:
        released_folders.read_samples(tmp_path)
    assert "\n" not in str(caught.value)


def test_lines_that_are_no_rows_are_told_by_number(tmp_path, monkeypatch):
    path = tmp_path / "pairs.tsv"
    monkeypatch.setattr(paper_pairs, "LONGEST", 20)
    path.write_bytes(b"1.0\ta\tb\tc\td\n" + b"x" * 30)
    with pytest.raises(sources.DatasetError, match="pairs.tsv:2 must be shorter than 20 bytes"):
        list(paper_pairs.read_pairs(path))
    good = b"Source\tTarget\r\n( ( ( [MAX 4 ) 3 ) ] )\t4\r\n"
    for bad in (b"\xff\xfe\t1\r\n", b"x" * 200_000 + b"\t1\r\n"):
        path.write_bytes(good + bad)
        rows = released_files.read_examples(path)
        assert isinstance(next(rows), expressions.Example)
        with pytest.raises(sources.DatasetError, match="pairs.tsv:[23] must hold an expression and its value, got "):
            next(rows)
