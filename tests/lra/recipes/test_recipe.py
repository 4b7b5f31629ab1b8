"""The record of a recipe, and what holds for every page."""

import pytest

from subquad.lra import recipes, tasks
from subquad.lra.recipes.recipe import EveryLayer, Recipe, covers
from subquad.zoo import LAYERS

PAGE = Recipe(
    "x", "nowhere", layers={"s4": dict(state_size=2)},
    settings={
        "*": dict(config="a", steps=1), "*/b": dict(steps=2), "t": dict(seed=4), "t/b|c": dict(seed=5),
        "t s4|local": dict(batch_size=6), "t/c local": dict(config="d"),
    },
    deviations=(("*", "All."), ("* s4", "Layer."), ("t/b", "Data.")),
)  # fmt: skip


def scopes(*words):
    return [scope for scope, _ in PAGE.rows(*words)]


def test_rows_apply_from_the_top_to_the_end():
    assert scopes("t", "b", "s4") == ["*", "*/b", "t", "t/b|c", "t s4|local"]
    assert scopes("t", "c", "softmax") == ["*", "t", "t/b|c"]
    assert scopes("u", "x", "local") == ["*"]


def test_the_configuration_is_named_by_rows_of_all_configurations():
    assert PAGE.config("t", "local") == "a" and Recipe("y", "", {}, {}).config("t", "s4") is None
    assert scopes("t", None, "softmax") == scopes("t", "a", "softmax") == ["*", "t"]


def test_deviations_are_those_of_the_run():
    assert PAGE.differences("t", "b", "s4") == ("All.", "Layer.", "Data.")
    assert PAGE.differences("t", "a", "local") == ("All.",)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_scope_of_a_page_covers_something(name):
    """A misspelt scope would apply to nothing, and say nothing."""
    page = recipes.RECIPES[name]
    every = [(task, config) for task, configs in tasks.TASKS.items() for config in configs]
    for scope in (*page.settings, *(scope for scope, _ in page.deviations)):
        parts = scope.split(" ")[0].split("/")[0].split("|"), (scope.split(" ") + ["*"])[1].split("|")
        for task_name in parts[0]:
            assert task_name in ("*", *tasks.TASKS), scope
        for layer in parts[1]:
            assert layer in ("*", "+num_heads", "+is_causal", *LAYERS), scope
        layers = [(layer, page.layers.get(layer, {})) for layer in LAYERS]
        assert any(covers(scope, *words, *layer) for words in every for layer in layers), scope


def test_a_layer_of_the_zoo_has_options_without_a_row_of_its_own():
    layers = EveryLayer({"s4": dict(state_size=2)}, heads=dict(num_heads=4, use_bias=False), is_causal=True)
    assert list(layers) == list(LAYERS)
    assert layers["cosformer"] == dict(num_heads=4, use_bias=False, is_causal=True, max_length="{length}")
    assert layers["s4"] == dict(is_causal=True, state_size=2)
    assert layers["gla"] == dict(num_heads=4, use_bias=False)  # is always causal
    assert layers["nystrom"] == dict(num_heads=4, use_bias=False)  # never is
