import statistics

import pytest

from subquad.lra.report import published

FIVE = ("listops", "text", "retrieval", "image", "pathfinder")
# What papers print that their own rows do not give.
MISPRINTED = {("lra", "Sinkhorn Transformer")}


@pytest.mark.parametrize(("paper", "table"), list(published.sources()))
def test_every_table_has_figures_and_a_source(paper, table):
    source, found = published.find_table(paper, table)
    assert source.work and source.where and source.title
    assert all(figure.value is not None or figure.note for figure in found)
    keys = [(one.row, one.task, one.length, one.metric, one.note) for one in found]
    assert len(set(keys)) == len(keys)


def test_printed_averages_are_those_of_the_rows():
    """A slip of the pen in the data would show here."""
    checked = set()
    for paper, table in published.sources():
        _, found = published.find_table(paper, table)
        scores = {(one.row, one.task): one for one in found if one.metric == "accuracy"}
        for (row, task), average in scores.items():
            if task != "average" or (paper, row) in MISPRINTED or (row, "listops") not in scores:
                continue
            # S4's table counts Path-X for all its rows.
            six = paper in ("s4", "s5") or "six" in average.note
            values = [scores[row, name].value for name in FIVE] + ([scores[row, "path_x"].value or 50.0] if six else [])
            # These print one decimal, and FlashAttention averaged before it rounded.
            close = {"flashattention": 0.11, "xformers": 0.051}.get(paper, 0.0151)
            assert statistics.mean(values) == pytest.approx(average.value, abs=close), (paper, table, row)
            checked.add((paper, table))
    assert len(checked) >= 8


def test_figures_as_printed():
    value = lambda paper, row, task, metric="accuracy", length=None: next(
        one.value for one in published.read_figures(paper)
        if (one.row, one.task, one.metric, one.length) == (row, task, metric, length)
    )
    assert value("lra", "Reformer", "listops") == 37.27
    assert value("lra", "Performer", "text", "speed_ratio", 4000) == 5.7
    assert value("lra", "Transformer", "path_x") is None
    assert value("s4", "S4 (updated, = S4-LegS)", "path_x") == 96.35
    assert value("nystromformer", "Transformer (2-layer, d=64)", "text") == 65.02
    assert value("flashattention", "FlashAttention", "path_x") == 61.4


def test_unknown_names_are_told_with_the_nearest():
    with pytest.raises(ValueError, match="paper must be a known name, got 'lara'. Did you mean 'lra'"):
        published.find_table("lara", "1")
    with pytest.raises(ValueError, match="table must be one of lra, got '9'"):
        published.find_table("lra", "9")
