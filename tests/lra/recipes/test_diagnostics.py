"""Which layers run which diagnostic task, and what the papers' settings are."""

import dataclasses

import jax.numpy as jnp
import pytest
from flax import nnx

from subquad.lra import models, tasks
from subquad.lra.data.diagnostics.configs import CONFIGS
from subquad.lra.plan import plan
from subquad.lra.report import cells, verdicts
from subquad.zoo import LAYERS


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.filterwarnings("ignore:layer '(reformer|routing)' chooses")
def test_every_layer_has_a_run_or_a_reason(layer):
    for task, configs in CONFIGS.items():
        for name, one in configs.items():
            if one.causal and not LAYERS[layer].supports.causal:
                with pytest.raises(ValueError, match=f"for a task with the answers in its inputs, got '{layer}'"):
                    plan("diagnostics", layer, task=task, config=name)
            else:
                run = plan("diagnostics", layer, task=task, config=name)
                able = LAYERS[layer].supports.causal and LAYERS[layer].supports.bidirectional
                assert (run.in_features, run.num_layers) == (64, 2) and run.layer_options.get("is_causal", False) == able


def test_the_papers_have_their_own_configurations():
    copy, recall = plan("mamba", "s4", task="selective_copy"), plan("zoology", "softmax", task="mqar")
    assert (copy.config, copy.steps * copy.batch_size, copy.positions) == ("mamba", 25_600_000, None)
    assert copy.steps * copy.batch_size == tasks.find_task("selective_copy", "mamba").splits["train"]
    assert (recall.config, recall.batch_size, recall.positions) == ("64_4", 512, "learned")
    assert plan("zoology", "softmax", task="mqar", config="512_64").batch_size == 128
    assert plan("mad", "softmax", task="mad", config="memorisation").steps == 400


def test_negative_eigenvalues_are_a_cell_of_their_own():
    found = {cell.row: verdicts.run_of(cell) for cell in cells.cells_of_table("state-tracking", "3") if not cell.cannot}
    one, other = found["DeltaNet [0, 1]"], found["DeltaNet [-1, 1]"]
    assert one == dataclasses.replace(other, layer_options=one.layer_options)
    assert (one.config, one.positions, found["Transformer"].positions) == ("xlstm", None, "sinusoidal")
    assert not one.layer_options.get("negative_eigenvalues") and other.layer_options["negative_eigenvalues"]


def test_compression_is_read_from_the_last_token_alone():
    """A layer that sees one neighbour: what is further from the last token than that is nowhere."""
    words = dict(in_features=16, num_layers=1, layer_options=dict(window_size=1, num_heads=2))
    task = tasks.find_task("mad", "compression")
    model = nnx.jit(models.build(plan("diagnostics", "local", task="mad", config="compression", **words), task))
    tokens, mask = jnp.arange(1, 9)[None], jnp.ones((1, 8), bool)
    before = model(tokens, mask)
    assert before.shape == (1, 8, 16) and jnp.abs(before[0, 0] - before[0, 1]).max() > 1e-4
    assert (model(tokens.at[0, 3].set(9), mask) == before).all()
    assert (jnp.abs(model(tokens.at[0, 6].set(9), mask) - before).max((0, 2)) > 1e-5).all()
