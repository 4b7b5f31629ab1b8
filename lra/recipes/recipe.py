"""The record of a recipe: pages of data, which `plan.plan` turns into runs."""

import fnmatch
import functools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What a paper, or a released configuration, sets.

    A row applies to a *scope*, "TASK/CONFIG LAYER": patterns as of a shell, "|" between alternatives; a part that is left
    out matches everything. "text" is a task with all its configurations and layers, "pathfinder/*64_* performer|local" two
    layers on some pictures, "* local" a layer on all tasks, "text +num_heads" all layers with that option in `layers`. Rows
    are read from the top of the page to its end: a later one replaces the values of those before it, but merges its
    layer_options into theirs.

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
        return [(scope, values) for scope, values in self.settings.items() if self._covers(scope, task, config, layer)]

    def config(self, task: str, layer: str) -> str | None:
        """The task's configuration that the page names, or None."""
        named = [values["config"] for _, values in self.rows(task, "", layer) if "config" in values]
        return named[-1] if named else None

    def differences(self, task: str, config: str, layer: str) -> tuple[str, ...]:
        """The deviations of one run."""
        return tuple(sentence for scope, sentence in self.deviations if self._covers(scope, task, config, layer))

    def _covers(self, scope: str, task: str, config: str, layer: str) -> bool:
        return covers(scope, task, config, layer, self.layers.get(layer, {}))


class EveryLayer(Mapping):
    """The options of all layers of the zoo, found when they are asked for: loading the zoo takes a second.

    Args:
        own: what layers have beside, or instead of, what follows.
        heads: of layers that need num_heads.
        is_causal: whether layers that can be causal, and otherwise, are so.
    Layers that need a max_length have "{length}".

    Example:
        >>> EveryLayer({"local": dict(window_size=8)}, heads=dict(num_heads=4))["local"]
        {'num_heads': 4, 'window_size': 8}
    """

    def __init__(self, own: Mapping[str, Mapping[str, Any]], heads: Mapping[str, Any], is_causal: bool = False):
        self.own, self.heads, self.is_causal = own, heads, is_causal

    def but(self, **own: Mapping[str, Any]) -> "EveryLayer":
        """The same, but for what some layers have of their own."""
        return EveryLayer({**self.own, **own}, self.heads, self.is_causal)

    @functools.cached_property
    def found(self) -> dict[str, dict[str, Any]]:
        from subquad.zoo import LAYERS

        return {name: self._of(name, layer) for name, layer in LAYERS.items()}

    def _of(self, name: str, layer) -> dict[str, Any]:
        from subquad.zoo.options import needs

        options = dict(self.heads) if "num_heads" in needs(layer) else {}
        if self.is_causal and layer.supports.causal and layer.supports.bidirectional:
            options["is_causal"] = True
        if "max_length" in needs(layer):
            options["max_length"] = "{length}"
        return {**options, **self.own.get(name, {})}

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def revised(
    settings: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Mapping[str, Any]]:
    """The settings of another page, with some values of their rows changed and new rows at the end."""
    return {**settings, **{scope: {**settings.get(scope, {}), **values} for scope, values in changes.items()}}


def covers(scope: str, task: str, config: str, layer: str, options: Collection[str] = ()) -> bool:
    """Whether a scope applies to a layer, of which `options` are given, on a task.

    Example:
        >>> covers("text|image local", "image", "lra", "local"), covers("pathfinder/*64_*", "pathfinder", "32_hard", "local")
        (True, False)
        >>> covers("text +num_heads", "text", "lra", "local", {"num_heads": 4})
        True
    """
    data, _, layers = scope.partition(" ")
    tasks, _, configs = data.partition("/")
    matches = lambda name, patterns: any(fnmatch.fnmatchcase(name, one) for one in patterns.split("|"))
    is_layer = layers[1:] in options if layers.startswith("+") else matches(layer, layers or "*")
    return is_layer and matches(task, tasks) and matches(config, configs or "*")
