"""What a recipe is: data, which `recipes.plan` turns into runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Settings that several layers share.

    Attributes:
        id: what `plan` takes.
        defaults: values of `Run`; configs: what replaces them in some of the tasks' configurations, whatever the task.
        tasks: what replaces both on a task; the key is a task, or "task/config" for one of its configurations.
        pairs: what replaces all of them for a task, or "task/config", and a layer.
        layers: the options of each layer's constructor; `{length}` stands for the length of the task's sequences. The
            layer_options of `tasks` and `pairs` are merged into them.
        equal_parameters: choose mlp_features per layer such that all have the parameters of the softmax model.
        source: paper or reason.
        deviations: what its runs do otherwise than the source, a sentence each; own_deviations: what some of them do besides,
            by layer, by task, by "task/config", or by (task, layer).
    """

    id: str
    defaults: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Any]]
    equal_parameters: bool
    source: str
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    deviations: tuple[str, ...] = ()
    own_deviations: Mapping[str | tuple[str, str], tuple[str, ...]] = field(default_factory=dict)


def settings(rules: Recipe, task: str, config: str | None, layer: str) -> dict[str, Any]:
    """The values of a recipe for a layer on a task: defaults < configs < layers < tasks < pairs.

    Args:
        rules: the recipe.
        config: of the task; None: the one that the recipe names, if it names one.
        layer: the layer's options are merged over the levels; the other values of a level replace those before it.
    Returns: values of `Run`, layer_options among them; "config" is there where it is given or named.
    Example:
        >>> rules = Recipe("x", {}, {"s4": {"state_size": 8}}, False, "", tasks={"image": {"steps": 3}})
        >>> settings(rules, "image", "lra", "s4")
        {'steps': 3, 'layer_options': {'state_size': 8}, 'config': 'lra'}
    """
    if config is None:
        config = {**rules.defaults, **rules.tasks.get(task, {}), **rules.pairs.get((task, layer), {})}.get("config")
    keys = (task, f"{task}/{config}")
    levels = [rules.defaults, rules.configs.get(config, {})]
    levels += [rules.tasks.get(key, {}) for key in keys] + [rules.pairs.get((key, layer), {}) for key in keys]
    values: dict[str, Any] = {}
    options = dict(rules.layers.get(layer, {}))
    for level in levels:
        values.update(level)
        options.update(level.get("layer_options", {}))
    named = {} if config is None else {"config": config}
    return {**values, "layer_options": options, **named}


def deviations(rules: Recipe, task: str, config: str, layer: str) -> tuple[str, ...]:
    """What a run of a recipe does otherwise than its source: that of all its runs, of the layer, of the task.

    Example:
        >>> rules = Recipe("x", {}, {}, False, "", deviations=("No dropout.",), own_deviations={"image": ("Grey.",)})
        >>> deviations(rules, "image", "lra", "s4")
        ('No dropout.', 'Grey.')
    """
    keys = (layer, (task, layer), task, f"{task}/{config}")
    return rules.deviations + tuple(sentence for key in keys for sentence in rules.own_deviations.get(key, ()))


# What is generated here where others read the arena's files.
_LEVELS = ("hard", "intermediate", "easy", "hard_all_directions", "hard_10k")
DRAWN: dict[str, tuple[str, ...]] = {
    "listops/lra": ("Trees are drawn anew by the arena's rules; its own files are listops/release.",),
} | {
    f"pathfinder/{side}_{level}": ("Pictures are drawn by our own generator; the arena's are pathfinder/release_*.",)
    for side in (32, 64, 128, 256)
    for level in _LEVELS
}
# Of papers that inherit the arena's reading of pictures.
BLACK = "Black is the id 1 and is attended to; theirs takes it for padding."
HELD_OUT = "Validation is a tenth of the training reviews, held out, and the rest trains; theirs validates on test."
