"""The record of a recipe: pages of data, which `plan.plan` turns into runs."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from subquad.zoo import registry
from subquad.zoo.base import needs


@dataclass(frozen=True)
class Recipe:
    """What a paper, or a released configuration, sets.

    A row applies to a *scope*, "TASK/CONFIG LAYER": patterns as of a shell, "|" between alternatives; a part that is left
    out matches everything. "text" is a task with all its configurations and layers, "pathfinder/*64_* performer|local" two
    layers on some pictures, "* local" a layer on all tasks. Rows are read from the top of the page to its end: a later one
    replaces the values of those before it, but merges its layer_options into theirs.

    Attributes:
        id: what `plan.plan` takes.
        source: paper or reason.
        settings: values of `Run` by scope.
        layers: options of each layer's constructor, which layer_options of the settings are merged into. "{length}" stands for
            the length of the task's sequences.
        deviations: what its runs do otherwise than the source: pairs of a scope and a sentence.
        equal_parameters: choose mlp_features per layer such that all have the parameters of the softmax model.
    """

    id: str
    source: str
    settings: Mapping[str, Mapping[str, Any]]
    layers: Mapping[str, Mapping[str, Any]]
    deviations: tuple[tuple[str, str], ...] = ()
    equal_parameters: bool = False

    def rows(self, task: str, config: str | None, layer: str) -> list[tuple[str, Mapping[str, Any]]]:
        """The scopes and values that apply, in order; without a config, those of the configuration that the page names."""
        config = (self.config(task, layer) or "") if config is None else config
        return [(scope, values) for scope, values in self.settings.items() if covers(scope, task, config, layer)]

    def config(self, task: str, layer: str) -> str | None:
        """The task's configuration that the page names, or None."""
        named = [values["config"] for _, values in self.rows(task, "", layer) if "config" in values]
        return named[-1] if named else None

    def differences(self, task: str, config: str, layer: str) -> tuple[str, ...]:
        """The deviations of one run."""
        return tuple(sentence for scope, sentence in self.deviations if covers(scope, task, config, layer))


def every_layer(
    own: Mapping[str, Mapping[str, Any]], heads: Mapping[str, Any], is_causal: bool = False
) -> dict[str, dict[str, Any]]:
    """The options of all layers of the zoo.

    Args:
        own: what layers have beside, or instead of, what follows.
        heads: of layers that need num_heads.
        is_causal: whether layers that can be causal, and otherwise, are so.
    Layers that need a max_length have "{length}".

    Example:
        >>> every_layer({"local": dict(window_size=8)}, heads=dict(num_heads=4))["local"]
        {'num_heads': 4, 'window_size': 8}
    """
    options = {}
    for name, layer in registry.LAYERS.items():
        needed = needs(layer)
        options[name] = {
            **(heads if "num_heads" in needed else {}),
            **(dict(is_causal=True) if is_causal and layer.supports.causal and layer.supports.bidirectional else {}),
            **(dict(max_length="{length}") if "max_length" in needed else {}),
            **own.get(name, {}),
        }
    return options


def layers_with(layers: Mapping[str, Mapping[str, Any]], *options: str) -> str:
    """The layers that have all these options, as the part of a scope.

    Example:
        >>> layers_with({"local": dict(num_heads=4), "performer": dict(num_heads=4), "s4": {}}, "num_heads")
        'local|performer'
    """
    return "|".join(name for name, own in layers.items() if set(options) <= set(own))


def revised(
    settings: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Mapping[str, Any]]:
    """The settings of another page, with some values of their rows changed and new rows at the end."""
    return {**settings, **{scope: {**settings.get(scope, {}), **values} for scope, values in changes.items()}}


def covers(scope: str, task: str, config: str, layer: str) -> bool:
    """Whether a scope applies to a layer on a task.

    Example:
        >>> covers("text|image local", "image", "lra", "local"), covers("pathfinder/*64_*", "pathfinder", "32_hard", "local")
        (True, False)
    """
    data, _, layers = scope.partition(" ")
    tasks, _, configs = data.partition("/")
    pairs = ((task, tasks), (config, configs or "*"), (layer, layers or "*"))
    return all(any(fnmatch.fnmatchcase(name, one) for one in patterns.split("|")) for name, patterns in pairs)
