"""What a cell says of itself: what its run does otherwise than the paper, and which other values contradict it."""

import csv
import dataclasses
import io
import json

import pytest

from subquad.lra import recipes
from subquad.lra.recipes import shared
from subquad.lra.report import cells, comparison, ledger, verdicts

NOTHING = ledger.Ledger({}, [], {})
PERFORMER = "nystromformer.3.performer_256.listops"


def cell(name):
    paper, table, _ = name.split(".", 2)
    return next(one for one in cells.cells_of_table(paper, table) if one.id == name)


def rendered(form, *names):
    judged = [verdicts.judge(cell(name), NOTHING) for name in names]
    paper, table, _ = names[0].split(".", 2)
    return comparison.render(paper, table, judged, NOTHING, form)


@pytest.mark.parametrize("name", [name for name, one in recipes.RECIPES.items() if one.source != "subquad"])
def test_a_recipe_of_a_paper_says_what_it_does_otherwise(name):
    rules = recipes.RECIPES[name]
    every = [sentence for _, sentence in rules.deviations]
    assert every and all(one.endswith(".") and one[0].isupper() and len(one) < 130 for one in every)
    # No other word of the recipe: what is in `deviations` reaches the cell.
    assert not any(word in rules.source for word in (" here", "without", "left out", "there"))


def test_every_trained_cell_shows_what_its_recipe_says_of_its_run():
    for one in cells.all_cells():
        if one.recipe in (None, "bench"):
            assert one.deviations == ()
            continue
        run = verdicts.run_of(one)
        rules = recipes.RECIPES[one.recipe]
        assert one.deviations == rules.differences(run.task, run.config, run.layer)
    drawn = cell("lra.1.transformer.path_x").deviations
    assert any("drawn by our own generator" in one for one in drawn) and shared.BLACK in drawn
    listops, text = (cell(f"lra.1.performer.{task}").deviations for task in ("listops", "text"))
    assert any("drawn anew from the queries" in one for one in listops) and not any("ReLU" in one for one in listops)
    assert any("ReLU" in one for one in text)


def test_other_values_of_one_configuration_are_found_and_those_that_contradict():
    one = cell(PERFORMER)
    (other,) = cells.published_elsewhere(one)
    assert (one.value, other.id, other.value) == (18.8, "flashattention.3.performer.listops", 36.8)
    assert verdicts.run_of(one) == verdicts.run_of(other) and cells.contradict(one, other) and cells.contradict(other, one)
    # Two values that one result may reproduce are no contradiction; the same value is not told twice.
    softmax = cell("nystromformer.3.transformer_2_layer_d_64.listops")
    assert [round(other.value, 1) for other in cells.published_elsewhere(softmax)] == [36.0, 37.6]
    assert not any(cells.contradict(softmax, other) for other in cells.published_elsewhere(softmax))
    assert cells.published_elsewhere(cell("s4.10.s4_updated_s4_legs.listops")) == ()
    # 55.9 is 55.91 with fewer digits.
    assert cells.published_elsewhere(cell("nystromformer.3.linformer_256.text")) == ()
    # A cell that was reported as chance, and accuracies of train, are configurations of their own metric.
    train = cell("lra.3.transformer.image.train_accuracy")
    assert all(other.metric == "train_accuracy" for other in cells.published_elsewhere(train))
    for one in cells.all_cells():
        for other in cells.published_elsewhere(one):
            if one.recipe != "bench":
                assert verdicts.run_of(one) == verdicts.run_of(other)


def test_contradictions_keep_to_the_tolerances():
    one = cell(PERFORMER)
    at = lambda value, **words: dataclasses.replace(one, value=value, **words)
    assert not cells.contradict(at(40.0), at(44.0)) and cells.contradict(at(40.0), at(44.1))
    assert cells.contradict(at(None), at(54.1)) and not cells.contradict(at(None), at(53.9))  # chance is 50
    ratio = dict(unit="ratio", tolerance=1.25)
    assert not cells.contradict(at(1.0, **ratio), at(1.56, **ratio)) and cells.contradict(at(1.57, **ratio), at(1.0, **ratio))


def test_every_form_shows_deviations_and_contradictions():
    shown = {form: rendered(form, PERFORMER, "nystromformer.3.linformer_256.text") for form in comparison.FORMS}
    said = f"{PERFORMER} (18.80) contradicted by 36.80 % of Dao et al., FlashAttention, NeurIPS 2022"
    cycle = "Activations are float32; theirs are in half precision, but for attention."
    for form in ("text", "markdown"):
        assert "18.80† / -" in shown[form] and "† Another paper has a value of the same configuration" in shown[form]
        assert f"[1] {cycle}" in shown[form] and f"[5†] {said}" in shown[form]
    assert "  1 2 3 4 5†  " in shown["text"] and shown["text"].count(cycle) == 1
    assert cycle in shown["latex"] and "contradicted by 36.80" in shown["latex"]
    (row, text), (listed, _) = list(csv.DictReader(io.StringIO(shown["csv"]))), json.loads(shown["json"])
    assert listed["deviations"] == list(cell(PERFORMER).deviations) and listed["theirs"] == 18.8
    assert listed["contradicted_by"] == listed["published_elsewhere"] == ["flashattention.3.performer.listops: 36.80"]
    assert row["deviations"] == "; ".join(listed["deviations"]) and row["contradicted_by"] == listed["contradicted_by"][0]
    assert text["contradicted_by"] == "" and text["published_elsewhere"] == ""


@pytest.mark.parametrize(("name", "recipe", "layer"), [
    ("lra.1.linear_transformer.listops", "lra-2020", "linear"),
    ("lra.1.longformer.text", "lra-2020", "longformer"),
    ("lra.3.longformer.image.train_accuracy", "lra-2020", "longformer"),
    ("lra.1.bigbird.retrieval", "lra-2020", "bigbird"),
    ("lra.2.bigbird.text.3000.speed_ratio", "bench", "bigbird"),
    ("skyformer.1.bigbird.image", "skyformer", "bigbird"),
    ("lra.2.linear_transformer.text.4000.speed_ratio", "bench", "linear"),
    ("s4.3.linear_transformer.text.4096.memory_ratio", "bench", "linear"),
    ("flashattention.3.linear_attention.text", "nystromformer", "linear"),
    ("nystromformer.3.nystromformer_64.listops", "nystromformer", "nystrom"),
    ("flashattention.3.smyrf.text", "nystromformer", "smyrf"),
    ("skyformer.1.informer.text", "skyformer", "informer"),
    ("lra.1.sinkhorn_transformer.text", "lra-2020", "sinkhorn"),
    ("skyformer.1.nystromformer.text", "skyformer", "nystrom"),
    ("skyformer.1.skyformer.listops", "skyformer", "skyformer"),
    ("skyformer.1.kernelized_attention.image", "skyformer", "kernelized"),
    ("xformers.1.nystromformer_128.image", "xformers", "nystrom"),
    ("s4.10.nystromformer.retrieval", "nystromformer", "nystrom"),
    ("lra.1.synthesizer.text", "lra-2020", "synthesizer"),
    ("lra.2.synthesizer.text.4000.speed_ratio", "bench", "synthesizer"),
    ("mega.2.luna_256.text.4096.speed_ratio", "bench", "luna"),
    ("s5.1.s5.listops", "s5", "s5"), ("s5.inits.s5_lin_init.path_x", "s5", "s5"),
])
def test_rows_that_have_a_layer_are_answered(name, recipe, layer):
    one = cell(name)
    assert (one.recipe, one.layer, one.cannot) == (recipe, layer, "")


def test_what_cannot_be_run_has_no_notes():
    name = "s4.10.random.listops"
    assert cells.published_elsewhere(cell(name)) == () and "[1]" not in rendered("text", name)
