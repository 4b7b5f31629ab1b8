"""The facts of lra/ERRATA.md, each by the number that it has there."""

import dataclasses
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra import models, optim, protocols, tasks
from subquad.lra.data import catalogue, encodings, pipeline
from subquad.lra.data.listops import expressions
from subquad.lra.objectives import OBJECTIVES
from subquad.lra.plan import plan
from subquad.lra.report import cells, published
from subquad.zoo import LAYERS

ROOT = pathlib.Path(__file__).parents[2]


def published_accuracies(paper, table, task):
    _, figures = published.find_table(paper, table)
    return {one.row: one.value for one in figures if one.task == task and one.metric == "accuracy"}


def test_every_fact_has_a_test_that_exists():
    text = (ROOT / "lra" / "ERRATA.md").read_text()
    facts = re.split(r"^## (?=\d+\.)", text, flags=re.MULTILINE)[1:]
    assert len(facts) == 12
    for number, fact in enumerate(facts, 1):
        assert fact.startswith(f"{number}. ") and "- Here: " in fact
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", fact)
        assert named, f"fact {number}"
        for path, name in named:
            assert f"def {name}(" in (ROOT / path).read_text(), (path, name)


def test_what_the_released_code_imports_is_gone():  # 1
    assert importlib.util.find_spec("flax.optim") is None and importlib.util.find_spec("flax.deprecated") is None
    for module, name in ((jax, "custom_transforms"), (jax.lax, "tie_in"), (jax, "tree_map")):
        assert not hasattr(module, name)


def test_both_documents_of_a_pair_reach_the_answer():  # 2
    task = dataclasses.replace(tasks.find_task("retrieval", "lra"), length=12)
    small = dict(in_features=8, num_layers=1, mlp_features=8, layer_options={"num_heads": 2})
    run = plan("lra-2020", task="retrieval", **small)
    model, draw = models.build(run, task), np.random.default_rng(0)
    batch = {"mask1": np.ones((3, 12), bool), "mask2": np.ones((3, 12), bool)}
    batch |= {name: draw.integers(1, 257, (3, 12)) for name in ("inputs1", "inputs2")}
    answer = lambda batch: np.asarray(model(*(batch[name] for name in OBJECTIVES[task.kind].inputs)))
    for name in ("inputs1", "inputs2"):
        changed = batch[name].copy()
        changed[1, -1] = 1 + changed[1, -1] % 256
        moved = np.abs(answer({**batch, name: changed}) - answer(batch)).max(1) > 1e-6
        assert moved.tolist() == [False, True, False], name


def test_published_listops_scores_are_at_the_two_floors():  # 3
    scores = sorted(published_accuracies("lra", "1", "listops").values())
    low, high = [score for score in scores if score < 25], [score for score in scores if score > 25]
    majority, root = 17.0, 36.2  # of 96,000 trees
    error = 100 * (root / 100 * (1 - root / 100) / 2000) ** 0.5  # of a test split
    assert (len(low), len(high)) == (4, 7)
    assert all(abs(score - majority) < 2 * error for score in low) and max(high) < root + 2 * error


def test_token_ids_do_not_depend_on_the_process():  # 4
    words = ("[MIN", "[MAX", "[MED", "[SM", "X", *"0123456789")
    code = "import runpy, sys; print(list(set(sys.argv[2:]))); print(runpy.run_path(sys.argv[1])['tokenise']('[SM 9 1 ]'))"
    runs = [
        subprocess.run(
            [sys.executable, "-S", "-c", code, expressions.__file__, *words], env={"PYTHONHASHSEED": seed}, capture_output=True,
            text=True, check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0][0] != runs[1][0]  # the order of a set, which the released ids follow
    assert runs[0][1] == runs[1][1] == str(expressions.tokenise("[SM 9 1 ]"))


def test_black_pixels_are_attended_to():  # 5
    picture = np.zeros((4, 4, 1), np.uint8)
    picture[0, 0] = 255
    example = encodings.pixels({"image": picture, "label": 1})
    assert example["inputs"].tolist() == [256] + [1] * 15
    assert pipeline.pad(example, 16)["mask"].all()


def test_local_attention_is_local():  # 6
    length, block = 1000, 50
    released = np.arange(length).reshape(block, length // block).T  # what its reshape makes of a sequence
    assert released[0].tolist() == list(range(0, 1000, 20))
    layer = zoo.LocalAttention(1, 8, window_size=block // 2, rngs=nnx.Rngs(0))
    seen = np.asarray(layer.pattern(length)).reshape(-1, length, length)[0]
    far = np.abs(np.arange(length)[:, None] - np.arange(length))[seen]
    assert far.max() == block // 2 and np.ptp(released[0]) == 980


def test_sinkhorn_sorts():  # 7
    run = plan("lra-2020", "sinkhorn", task="listops")
    assert run.layer_options["block_size"] == 50
    found = [cell for cell in cells.cells_of_table("lra", "1") if "sinkhorn" in cell.row.lower() and cell.task != "average"]
    assert len(found) == 6 and all(not cell.cannot and any("sorted" in one for one in cell.deviations) for cell in found)


def test_performer_estimates_softmax_and_reformer_divides():  # 8
    defaults = {name: inspect.signature(LAYERS[name].__init__).parameters for name in ("performer", "reformer")}
    assert defaults["performer"]["kernel"].default == "softmax" and defaults["performer"]["num_features"].default == 256
    assert defaults["reformer"]["scale"].default is None  # 1 / sqrt(H), see test_one_bucket_and_one_chunk_is_softmax
    released = plan("lra-2020", "performer").layer_options
    assert released["num_features"] == 2 and "kernel" not in released
    assert plan("lra-2020", "performer", task="image").layer_options["kernel"] == "relu"


def test_imdb_validates_on_test_in_one_protocol_only():  # 9
    released, modern = (catalogue.find_dataset(f"lra_text/{config}").slices for config in ("lra", "modern"))
    assert released["validation"] == released["test"] == "test"
    assert modern["validation"] == "train[90%:]" and modern["train"] == "train[:90%]"
    run = plan("lra-2020", task="text")
    assert (run.config, run.selection) == ("lra", "last")
    with pytest.raises(ValueError, match="validated on its test set"):
        plan("quickstart", task="text", config="lra", protocol="modern")
    assert protocols.CONFIGS["modern", "text"] == "modern"


def test_retrieval_of_the_arena_never_leaves_its_warm_up():  # 11
    run = plan("lra-2020", task="retrieval")
    assert run.steps == 5000 < run.warmup_steps == 8000 and run.pooling == "first"
    rates = optim.make_schedule(run)(jnp.arange(1, run.steps + 1))
    assert (np.diff(rates) > 0).all() and float(rates[-1]) == pytest.approx(3.5e-4, rel=0.01)


def test_later_papers_all_have_retrieval_near_80():  # 11
    rows = {
        ("nystromformer", "3"): "Transformer (2-layer, d=64)", ("skyformer", "1"): "Self-Attention",
        ("xformers", "1"): "Standard", ("flashattention", "3"): "Transformer", ("mega", "2"): "Transformer (re-implemented)",
    }  # fmt: skip
    later = [published_accuracies(*table, "retrieval")[row] for table, row in rows.items()]
    assert published_accuracies("lra", "1", "retrieval")["Transformer"] == 57.46 and 79 < min(later) and max(later) < 82
