import dataclasses

import pytest

from subquad.lra import bench
from subquad.lra.checkpoints import RunError

ROW = bench.Measurement(
    status="ok", model="small", layer="local", layer_options='{"num_heads": 2, "window_size": 50}', length=1024, batch_size=1,
    mode="train", dtype="float32", implementation=None, threads=2, hardware="a machine", median_ms=1.5, calls=7,
    flops=10**12, speed_ratio=2.0, protocol="in turn, warm",
)  # fmt: skip


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "rows.csv"
    other = dataclasses.replace(ROW, length=2048, status='failed: "memory", all of it')
    bench.write([ROW, other], path)
    assert bench.read(path) == [ROW, other]
    later = dataclasses.replace(ROW, median_ms=1.25)
    bench.write([later], path)
    assert bench.read(path) == [later, other]
    assert bench.read(tmp_path / "absent.csv") == []


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="bench: file .* must have the columns of this version"):
        bench.read(path)
    bench.write([ROW], tmp_path / "own.csv")
    text = (tmp_path / "own.csv").read_text().replace(",1024,", ",many,")
    path.write_text(text)
    with pytest.raises(RunError, match="many"):
        bench.read(path)
