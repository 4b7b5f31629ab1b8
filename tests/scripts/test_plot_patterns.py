"""The picture of patterns."""

import pytest

from subquad import zoo
from subquad.lra.recipes.diagnostics import LAYERS

from .calling import call


def test_draws_the_layers_that_were_asked_for(tmp_path):
    done = call("plot_patterns", "--layers", "local", "linformer", "--length", "32", "--out", tmp_path / "patterns.png")
    assert done.returncode == 0 and "Wrote" in done.stdout, done.stderr
    assert (tmp_path / "patterns.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, named", [(("--layers", "locl"), "local"), (("--length", "0"), "length must be")])
def test_names_what_is_wrong(words, named, tmp_path):
    done = call("plot_patterns", *words, "--out", tmp_path / "patterns.png")
    assert done.returncode == 2 and named in done.stderr, (done.returncode, done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    done = call("plot_patterns", "--layers", "local", "--length", "8", "--out", tmp_path / "none" / "patterns.png")
    assert done.returncode == 1 and "none/patterns.png must be writable, got" in done.stderr


def test_every_layer_has_options_to_be_drawn_with():
    assert set(zoo.LAYERS) <= set(LAYERS)
