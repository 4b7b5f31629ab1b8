import csv
import dataclasses
import io
import json
import statistics

import pytest

from subquad.lra import recipes, tasks
from subquad.lra.plan import plan
from subquad.lra.report import cells, comparison, costs, ledger, published, reproduce, results, verdicts
from subquad.lra.run import Run
from subquad.zoo import LAYERS
from tests.lra.report.test_results import row as made

TRANSFORMER = "lra.1.transformer"
IMAGE = "lra.3.transformer.image"


def cell(name, paper="lra", table="1"):
    return next(one for one in cells.cells_of_table(paper, table) if one.id == name)


def result(name, accuracy, seed=0, table="1", **other):
    """The row of a run that answers to a cell."""
    run = verdicts.run_of(cell(name, table=table), seed)
    configuration = json.dumps(dataclasses.asdict(run), sort_keys=True)
    named = ("layer", "task", "config", "recipe", "seed")
    return made(accuracy=accuracy, configuration=configuration, **{word: getattr(run, word) for word in named}, **other)


def known(tmp_path, *rows):
    for one in rows:
        results.append(one, tmp_path / "runs.csv")
    return ledger.read_ledger([tmp_path / "runs.csv"])


def test_cells_have_ids_of_their_own_and_a_run_or_a_reason():
    every = cells.all_cells()
    assert len({one.id for one in every}) == len(every) > 500
    for one in every:
        assert bool(one.cannot) == (one.recipe is None) == (one.layer is None)
        assert one.recipe in ("bench", None, *recipes.RECIPES) and one.layer in (None, *LAYERS)
        assert one.tolerance > 0 and one.source


def test_every_answer_names_a_row_that_is_printed():
    for (paper, table), answers in cells.ANSWERS.items():
        assert set(answers) <= {figure.row for figure in published.find_table(paper, table)[1]}
    assert set(cells.ANSWERS) == set(published.sources())


def test_every_trained_cell_can_be_planned():
    runs = [(one, verdicts.run_of(one)) for one in cells.all_cells() if one.recipe not in ("bench", None)]
    for one, run in runs:
        assert (run.layer, run.recipe) == (one.layer, one.recipe)
        wanted = cells.COLUMNS.get(one.task, (one.task, run.config))
        assert (run.task, run.config) == wanted
        assert costs.training_flops(run, tasks.find_task(run.task, run.config)) > 0
    assert len(runs) > 40


@pytest.mark.usefixtures("nothing_shipped")
def test_a_cell_is_reproduced_differs_or_was_not_run(tmp_path):
    listops, text = cell(f"{TRANSFORMER}.listops"), cell(f"{TRANSFORMER}.text")
    rows = [result(listops.id, 0.36, 0), result(listops.id, 0.38, 1), result(text.id, 0.60)]
    found = known(tmp_path, *rows)
    one = verdicts.judge(listops, found)
    assert (one.outcome, one.seeds) == ("reproduced within tolerance", 2)
    assert one.ours == pytest.approx(37) and one.spread == pytest.approx(statistics.stdev([36, 38]))
    assert one.difference == pytest.approx(37 - 36.37)
    one = verdicts.judge(text, found)
    assert one.outcome == "differs" and one.difference == pytest.approx(60 - 64.27)
    one = verdicts.judge(cell("lra.1.reformer.listops"), found)
    assert one.outcome == "not run" and one.cost.hours > 0 and one.cost.hardware == "one V100"
    assert one.cost.source.endswith("validation included; --probe measures this machine's")
    assert one.command == ("subquad table --paper lra --table 1 --only lra.1.reformer.listops --run")
    one = verdicts.judge(cell("lra.1.bigbird.average"), found)
    assert (one.outcome, one.reason) == ("cannot", "made of the other columns")


def test_what_differs_says_what_else_there_is_to_it(tmp_path):
    name = "lra.1.local_attention.listops"
    one = verdicts.judge(cell(name), known(tmp_path, result(name, 0.37, collapsed_step=40)))
    assert one.outcome == "differs" and one.reason == "seed 0 collapsed at step 40"
    assert any("groups of 50 distant positions" in sentence for sentence in one.cell.deviations)


def test_accuracies_of_train_are_answered_by_the_run_of_test(tmp_path):
    of_test, of_train = (cell(name, table="3") for name in (IMAGE, f"{IMAGE}.train_accuracy"))
    assert verdicts.run_of(of_test) == verdicts.run_of(of_train)
    one = verdicts.judge(of_train, known(tmp_path, made("local")))
    assert one.outcome == "not run" and f"--only {IMAGE} --run" in one.command
    run = result(IMAGE, 0.42, table="3")
    one = verdicts.judge(of_train, known(tmp_path, run))
    assert (one.outcome, one.reason) == ("cannot", "its run is of a version that did not score train")
    found = known(tmp_path, dataclasses.replace(run, accuracy_train=0.70))
    assert [verdicts.judge(one, found).ours for one in (of_test, of_train)] == [pytest.approx(42), pytest.approx(70)]
    assert verdicts.judge(of_train, found).outcome == "reproduced within tolerance"


@pytest.mark.usefixtures("nothing_shipped")
def test_accuracies_at_other_lengths_are_answered_by_the_run_that_was_tested_there(tmp_path):
    at = {length: cell(f"mamba.11.h3.induction.{length}", "mamba", "11") for length in (256, 512, 1024, 2048, 65536)}
    run = verdicts.run_of(at[256])
    assert all(verdicts.run_of(at[length]) == run for length in (512, 1024, 2048))
    assert verdicts.judge(at[512], known(tmp_path)).outcome == "not run"
    named = {word: getattr(run, word) for word in ("layer", "task", "config", "recipe", "seed")}
    scores = json.dumps({"512": 0.8, "1024": "no memory"})
    row = made(accuracy=1.0, configuration=json.dumps(dataclasses.asdict(run)), scores_by_length=scores, **named)
    judged = {length: verdicts.judge(one, known(tmp_path, row)) for length, one in at.items()}
    assert [judged[length].ours for length in (256, 512)] == [100, pytest.approx(80)]
    assert judged[512].outcome == "reproduced within tolerance"
    reasons = [judged[length].reason for length in (1024, 2048)]
    assert reasons == ["no memory", "its run was not tested at this length"]
    assert judged[65536].reason == "tested up to 32,768 tokens; subquad train --resume --test-lengths 65536 goes on"
    quadratic = cell("mamba.11.mha_abs.induction.4096", "mamba", "11")
    assert quadratic.cannot == "tested up to 2,048 tokens; subquad train --resume --test-lengths 4096 goes on"


def test_what_answers_may_have_more_values_of_a_run():
    ids = (f"mamba.11.{row}.induction.512" for row in ("mha_abs", "mha_rope"))
    absolute, rotated = (verdicts.run_of(cell(name, "mamba", "11")) for name in ids)
    assert (absolute.positions, rotated.positions) == ("sinusoidal", None)
    assert rotated.layer_options == {**absolute.layer_options, "rotary_base": 10_000}


def test_a_failure_is_a_row(tmp_path):
    name = f"{TRANSFORMER}.listops"
    one = verdicts.judge(cell(name), known(tmp_path, result(name, None, status="failed: non-finite loss by step 30")))
    assert (one.outcome, one.reason, one.ours) == ("differs", "failed: non-finite loss by step 30", None)


def test_a_seed_that_failed_is_told_beside_those_that_did_not(tmp_path):
    name = f"{TRANSFORMER}.listops"
    rows = [result(name, None, 0, status="failed: no memory"), result(name, 0.36, 1), result(name, 0.37, 2)]
    one = verdicts.judge(cell(name), known(tmp_path, *rows))
    assert (one.outcome, one.seeds, one.reason) == ("reproduced within tolerance", 2, "seed 0 failed: no memory")


def test_a_failure_never_takes_the_place_of_a_number(tmp_path):
    name = f"{TRANSFORMER}.listops"
    for file, rows in {"a.csv": [result(name, 0.36)], "b.csv": [result(name, None, status="failed: no memory")]}.items():
        results.append(rows[0], tmp_path / file)
    for files in (("a.csv", "b.csv"), ("b.csv", "a.csv")):
        one = verdicts.judge(cell(name), ledger.read_ledger([tmp_path / file for file in files]))
        assert (one.outcome, one.reason, one.ours) == ("reproduced within tolerance", "", pytest.approx(36))


def test_another_value_of_the_run_is_no_answer(tmp_path):
    name = f"{TRANSFORMER}.listops"
    row = result(name, 0.36)
    other = dataclasses.replace(row, configuration=json.dumps({**json.loads(row.configuration), "steps": 7}))
    assert verdicts.judge(cell(name), known(tmp_path, other)).outcome == "not run"


def test_how_often_one_looks_is_not_what_was_run(tmp_path):
    best = cell("nystromformer.3.linformer_256.listops", "nystromformer", "3")
    run = verdicts.run_of(best)

    def row(every, accuracy, **other):
        configuration = json.dumps({**dataclasses.asdict(dataclasses.replace(run, evaluate_every=every)), **other})
        named = {word: getattr(run, word) for word in ("layer", "task", "config", "recipe", "seed")}
        return made(accuracy=accuracy, configuration=configuration, **named)

    found = known(tmp_path, row(500, 0.37))
    one = verdicts.judge(best, found)
    assert (one.outcome, one.seeds, one.ours) == ("reproduced within tolerance", 1, pytest.approx(37))
    assert one.reason == "seed 0 validated every 500 steps, theirs every 50"
    assert found.has(run) and not reproduce.missing([best], found, 1)
    # The run itself counts before one that looked at other times.
    for rows in ((row(50, 0.38), row(500, 0.37)), (row(500, 0.37), row(50, 0.38))):
        one = verdicts.judge(best, known(tmp_path, *rows))
        assert one.ours == pytest.approx(38) and one.reason == ""
    # The last step is the same, whenever one looked.
    last = cell(f"{TRANSFORMER}.listops")
    arena = result(last.id, 0.36)
    seldom = json.dumps({**json.loads(arena.configuration), "evaluate_every": 999})
    one = verdicts.judge(last, known(tmp_path, dataclasses.replace(arena, configuration=seldom)))
    assert one.outcome == "reproduced within tolerance" and one.reason == ""
    # What waits for a number of validations is another run.
    waits = row(500, 0.37, early_stopping=3)
    assert not ledger.Ledger({ledger.hash_without_seed(waits.configuration): [waits]}, [], {}).has(run)
    plateau = dict(schedule="plateau")
    assert ledger.hash_without_seed(plateau) != ledger.hash_without_seed({**plateau, "evaluate_every": 7})


def test_missing_runs_can_be_validated_seldom():
    nothing = ledger.Ledger({}, [], {})
    wanted = [cell("nystromformer.3.linformer_256.listops", "nystromformer", "3")]
    ((run, _),) = reproduce.missing(wanted, nothing, 1, evaluate_every=500)
    assert (run.evaluate_every, verdicts.run_of(wanted[0]).evaluate_every) == (500, 50)
    plateau = [cell("s4.10.s4_original_v1.listops", "s4", "10")]
    ((run, _),) = reproduce.missing(plateau, nothing, 1, evaluate_every=500)
    assert run.evaluate_every == 960


def test_rows_of_earlier_versions_still_answer(tmp_path):
    """A value of Run that a row does not know had its default."""
    name = f"{TRANSFORMER}.listops"
    row = result(name, 0.36)
    configuration = json.loads(row.configuration)
    assert configuration.pop("dtype") == Run.dtype
    older = dataclasses.replace(row, configuration=json.dumps(configuration))
    assert verdicts.judge(cell(name), known(tmp_path, older)).outcome == "reproduced within tolerance"


def of_all(tmp_path, path_x=None):
    scores = dict(listops=0.36, text=0.64, retrieval=0.58, image=0.42, pathfinder=0.70)
    scores |= {} if path_x is None else dict(path_x=path_x)
    found = known(tmp_path, *(result(f"{TRANSFORMER}.{task}", score) for task, score in scores.items()))
    wanted = [one for one in cells.cells_of_table("lra", "1") if one.row == "Transformer"]
    return [verdicts.judge(one, found) for one in wanted], found


def test_both_averages_count_a_failed_path_x_as_50_and_mark_it(tmp_path):
    five, six = verdicts.averages(of_all(tmp_path)[0])
    assert (five.tasks, six.tasks) == (5, 6)
    assert five.theirs == pytest.approx(54.388) and not five.theirs_marked
    assert six.theirs == pytest.approx((5 * 54.388 + 50) / 6) and six.theirs_marked
    assert five.ours == pytest.approx(54) and six.ours is None  # Path-X was not run, which is no failure
    failed = (270 + 50) / 6
    # Within the tolerance of chance, 2 points, is chance, and no luckier seed makes a success of it.
    for path_x, ours, marked in (
        (0.497, failed, True), (0.515, failed, True), (0.5199, failed, True), (0.521, (270 + 52.1) / 6, False),
        (0.92, (270 + 92) / 6, False),
    ):  # fmt: skip
        folder = tmp_path / str(path_x)
        folder.mkdir()
        six = verdicts.averages(of_all(folder, path_x)[0])[1]
        assert six.ours == pytest.approx(ours) and six.ours_marked == marked


def test_a_printed_average_stands_where_its_tasks_do_not():
    judged = [verdicts.judge(one, ledger.Ledger({}, [], {})) for one in cells.cells_of_table("s4", "10")]
    assert verdicts.Average("Performer", 6, 51.18, True, None, False) in verdicts.averages(judged)
    heading, *body = comparison.matrix(judged)
    assert heading[-1] == "average of 6" and all("".join(row[1:]) for row in body)
    assert next(row for row in body if row[0] == "Performer")[-1] == "51.18* / -"


def test_the_numbers_of_the_paper_of_s4d_are_answered_by_its_recipe():
    for table, row in (("s4d", "S4-LegS"), ("10", "S4 (updated, = S4-LegS)")):
        runs = [one for one in cells.cells_of_table("s4", table) if one.row == row and not one.cannot]
        assert len(runs) == 6 and {one.recipe for one in runs} == {"s4d"}
    assert {one.recipe for one in cells.cells_of_table("s4", "repository")} == {"s4"}


def test_the_tolerance_is_what_is_said_of_it():
    found = [one for one in cells.all_cells() if one.unit == "%" and one.task != "average"]
    assert {one.tolerance for one in found if one.deviation is None} == {2.0}
    assert all(one.tolerance == max(1.0, 2 * one.deviation) for one in found if one.deviation is not None)
    judged = [verdicts.judge(one, ledger.Ledger({}, [], {})) for one in cells.cells_of_table("s4", "s4d")]
    assert "Tolerance: 2 points; twice the published deviation where there is one, 1 point at least." in comparison.render(
        "s4", "s4d", judged, ledger.Ledger({}, [], {})
    )


def test_compute_is_no_time_or_memory():
    reasons = {one.cannot for one in cells.cells_of_table("xformers", "1") if one.metric == "compute"}
    assert not any("absolute time" in reason for reason in reasons) and any("counted by a tool" in reason for reason in reasons)


def test_all_forms_show_theirs_ours_and_every_outcome(tmp_path):
    verdicts, found = of_all(tmp_path)
    shown = {form: comparison.render("lra", "1", verdicts, found, form) for form in comparison.FORMS}
    assert "36.37 / 36.00" in shown["text"] and "54.39 / 54.00" in shown["text"] and "53.66* / -" in shown["text"]
    assert "| Transformer | 36.37 / 36.00 |" in shown["markdown"] and "\n- Theirs: text of the paper" in shown["markdown"]
    assert r"Transformer & 36.37 / 36.00 &" in shown["latex"] and shown["latex"].count(r"\end{tabular}") == 3
    assert "lra.1.transformer.path\\_x" in shown["latex"]
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    of = {row["id"]: row for row in rows}
    assert float(of[f"{TRANSFORMER}.text"]["difference"]) == pytest.approx(-0.27)
    assert of[f"{TRANSFORMER}.path_x"]["outcome"] == "not run" and float(of[f"{TRANSFORMER}.path_x"]["hours"]) > 1
    row = of[f"{TRANSFORMER}.listops"]
    assert (row["protocol"], json.loads(row["configuration"])["steps"], row["tolerance"]) == ("lra-2020", 5000, "2.0")
    assert "Floors of listops/lra, %: chance 10" in shown["text"] and "given the root operator 36.0" in shown["text"]
    assert "5 reproduced within tolerance; 0 differs; 1 not run; 0 cannot." in shown["text"]


def test_estimates_grow_with_what_a_run_does():
    run, task = plan("lra-2020", "softmax"), tasks.find_task("listops", "lra")
    linear = plan("lra-2020", "performer")
    assert costs.training_flops(run, task) > 1.3 * costs.training_flops(linear, task)
    half = dataclasses.replace(run, steps=run.steps // 2)
    assert costs.training_flops(half, task) == costs.training_flops(run, task) / 2
    # 4.3 hours of a V100 are published for 50,000 steps of 16 texts.
    text = dataclasses.replace(
        run, task="text", config="modern", steps=50_000, batch_size=16, evaluate_every=500, num_layers=2, in_features=64,
        mlp_features=128, layer_options={},
    )  # fmt: skip
    assert 3 < costs.forecast(text, tasks.find_task("text", "modern"), ledger.Ledger({}, [], {})).hours < 6
    # A measured rate takes the place of the usual one.
    rows = [made(hardware="this", flops_per_step=10**9, steps_per_second=1.0)]
    here = costs.forecast(run, task, ledger.Ledger({"": rows}, [], {}), here=True, hardware="this")
    flops = costs.training_flops(run, task) + costs.evaluation_flops(run, task)
    assert here.hours == pytest.approx(flops / 1e9 / 3600) and "1 runs" in here.source


def test_the_quickstarts_rows_are_in_the_ledger():
    found = {row.layer for row in ledger.read_ledger().rows() if row.recipe == "quickstart"}
    assert "softmax" in found <= set(LAYERS)


def test_a_guess_stands_once_and_seeds_and_the_cells_notes_are_told():
    judged = []
    for seeds, name in ((1, "mamba.11.h3.induction.256"), (3, "mamba.11.mha_rope.induction.256")):
        one = cell(name, "mamba", "11")
        run = verdicts.run_of(one)
        rows = tuple(made(accuracy=0.5, task=run.task, config=run.config, floor_chance=0.067) for _ in range(seeds))
        one = dataclasses.replace(one, note="of a larger model." if seeds > 1 else "")
        judged.append(verdicts.Verdict(one, "differs", 50.0, seeds=seeds, results=rows))
    (line,) = comparison.floors(judged, ledger.Ledger({}, [], {}))
    assert "a guess 6.7" in line and "chance" not in line
    told = comparison.notes(published.sources()["mamba", "11"], judged, ledger.Ledger({}, [], {}))
    assert "Seeds of each of ours: 1 or 3." in told and "MHA-RoPE: of a larger model." in told


def test_the_floors_that_come_with_the_package_stand_below_the_tables():
    found = ledger.read_ledger()
    root = found.floors["listops", "lra"]["root"]
    assert 0.33 < root.value < 0.39 and root.examples == 2000
    judged = [verdicts.judge(cell(f"{TRANSFORMER}.listops"), found)]
    (line,) = comparison.floors(judged, found)
    said = "chance 10, the commonest answer 17.5, the commonest answer given the root operator 34.8"
    assert line.startswith(f"Floors of listops/lra, %: {said}")
