"""What generation costs: the cache by its shapes, rows and a picture."""

import csv

import pytest

from scripts import bench_generation

from .calling import call


def test_keys_grow_with_the_context_and_states_do_not():
    size = bench_generation.cache_bytes
    keys = lambda context: 2 * context * bench_generation.FEATURES * 4
    assert size("softmax", 4096) - size("softmax", 1024) == keys(4096) - keys(1024)
    assert size("linear", 2**20) == size("linear", 1024)


@pytest.mark.parametrize("name", bench_generation.CAUSAL)
def test_every_layer_has_a_cache_of_a_known_size(name):
    assert bench_generation.cache_bytes(name, 256) > 0


def test_rows_and_a_picture(tmp_path):
    words = ("--layers", "linear", "longformer", "--contexts", "32,64", "--seconds", "0.01", "--out", tmp_path / "found.csv")
    done = call("bench_generation", *words)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["context"], row["status"]) for row in rows] == [
        (layer, context, "ok") for context in ("32", "64") for layer in ("linear", "longformer")
    ]
    assert all(float(row["time_ratio"]) > 0 and int(row["cache_bytes"]) > 0 for row in rows)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("layer, named", [("fnet", "layers must be causal"), ("sotfmax", "softmax")])
def test_names_what_is_wrong(layer, named, tmp_path):
    done = call("bench_generation", "--layers", layer, "--out", tmp_path / "found.csv")
    assert done.returncode == 2 and named in done.stderr, (done.returncode, done.stderr)
    assert not list(tmp_path.iterdir())
