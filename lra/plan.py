"""From a recipe to a run: the stages of `STAGES`, each of which replaces values of those before it."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from subquad.kernels.dispatch import nearest
from subquad.lra import layers, models, protocols, tasks
from subquad.lra.files import refuse
from subquad.lra.recipes import RECIPES, Recipe
from subquad.lra.run import Run, check_values, checked


def plan(recipe: str = "quickstart", layer: str = "softmax", **overrides) -> Run:
    """The run of a layer under a recipe: defaults < protocol < recipe < `overrides`, then what follows from these.

    Args:
        recipe: a key of `recipes.RECIPES`.
        layer: a key of `zoo.LAYERS`, or "package.module:ClassName", a layer of your own, see `layers.find_layer`; one that the
            recipe does not list is built with its own defaults.
        overrides: values of `Run`; layer_options are merged into the recipe's; task may be a `tasks.Task` of your own, which
            `train` is then given, too.
    Raises:
        ValueError: unknown recipe, layer, task or configuration, a value out of its range or against its protocol, a layer
            that cannot be causal for a task that needs it.
        TypeError: an override that is no attribute of `Run`, or has the wrong type.
    Example:
        >>> plan("quickstart", "softmax", steps=10).steps
        10
    """
    return _settle(recipe, layer, overrides).run()


def explain(recipe: str = "quickstart", layer: str = "softmax", **overrides) -> dict[str, tuple[Any, str]]:
    """Each value of the run that `plan` makes, and the level that it came from; layer options by "layer_options.NAME".

    Example:
        >>> explain("lra-2020", "softmax", task="text", steps=10)["batch_size"]
        (32, 'recipe lra-2020, "*"')
    """
    return _settle(recipe, layer, overrides).explained()


@dataclass
class Draft:
    """What a caller asked for, the values that are settled so far, and the level that each came from."""

    recipe: Recipe
    layer: str
    task: tasks.Task
    overrides: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def put(self, level: str, values: Mapping[str, Any]) -> None:
        """Replaces values; layer_options are merged into those that are there."""
        for name, value in values.items():
            if name == "layer_options":
                value = {**self.values.get(name, {}), **value}
                self.levels |= {f"{name}.{option}": level for option in values[name]}
            self.values[name], self.levels[name] = value, level

    def run(self) -> Run:
        return Run(**self.values)

    def explained(self) -> dict[str, tuple[Any, str]]:
        plain = {name: value for name, value in self.values.items() if name != "layer_options"}
        plain |= {f"layer_options.{name}": value for name, value in self.values["layer_options"].items()}
        return {name: (value, self.levels[name]) for name, value in plain.items()}


Level = tuple[str, Mapping[str, Any]]


def defaults(draft: Draft) -> Iterator[Level]:
    """Those of `Run`."""
    yield "default", dataclasses.asdict(Run())


def protocol(draft: Draft) -> Iterator[Level]:
    """What the protocol sets; which one it is, recipe and caller say."""
    name = _protocol(draft.recipe, draft.task.name, draft.task.config, draft.layer, draft.overrides)
    yield f"protocol {name}", protocols.defaults(name, draft.task.kind)


def recipe(draft: Draft) -> Iterator[Level]:
    """The layer's options, then the rows of the page that apply, from its top to its end."""
    page = draft.recipe
    yield f"recipe {page.id}, layers", {"layer_options": page.layers.get(draft.layer, {})}
    for scope, values in page.rows(draft.task.name, draft.task.config, draft.layer):
        yield f'recipe {page.id}, "{scope}"', values


def caller(draft: Draft) -> Iterator[Level]:
    """What the caller gave."""
    yield "given", draft.overrides
    yield "given", dict(recipe=draft.recipe.id, layer=draft.layer, task=draft.task.name)
    if draft["config"] != draft.task.config:
        yield "usual for the task", dict(config=draft.task.config)


def task_kind(draft: Draft) -> Iterator[Level]:
    """Values that mean nothing to the kind of task keep their defaults."""
    kind = draft.task.kind
    usual = {name: getattr(Run, name) for name in protocols.MEANINGLESS[kind]}
    yield f"means nothing to a {kind}", {name: value for name, value in usual.items() if draft[name] != value}


def endless_positions(draft: Draft) -> Iterator[Level]:
    """A text that goes on from sequence to sequence has more positions than are learned."""
    if draft["carry_state"] and draft["positions"] == "learned" and "positions" not in draft.overrides:
        yield "state is carried", dict(positions=None)


def not_drawn(draft: Draft) -> Iterator[Level]:
    """Positions that are not learned are not drawn, nor are embeddings where pixels are numbers."""
    idle = {"position_std": draft["positions"] != "learned", "embedding_std": draft["inputs"] != "tokens"}
    for name, is_idle in idle.items():
        if is_idle and draft[name] is not None and name not in draft.overrides:
            yield "there are none to be drawn", {name: None}


def causal_pooling(draft: Draft) -> Iterator[Level]:
    """A causal layer is not pooled at its first token, which sees no other."""
    causal = layers.is_causal(draft.layer, draft["layer_options"])
    if causal and draft["pooling"] in protocols.FIRST and "pooling" not in draft.overrides:
        yield "the layer is causal", dict(pooling="mean")


def sequence_length(draft: Draft) -> Iterator[Level]:
    """Options that ask for the length of the sequences get it, with the token of its own that "cls" prepends."""
    length = draft.task.length + (draft["pooling"] == "cls")
    asked = [name for name, value in draft["layer_options"].items() if value == "{length}"]
    yield "length of the sequences", {"layer_options": dict.fromkeys(asked, length)}


def short_warm_up(draft: Draft) -> Iterator[Level]:
    """A recipe's warm-up is at most half of the steps."""
    if draft["schedule"] != "rsqrt" and "warmup_steps" not in draft.overrides and draft["warmup_steps"] > draft["steps"] // 2:
        yield "half of the steps", dict(warmup_steps=draft["steps"] // 2)


def equal_parameters(draft: Draft) -> Iterator[Level]:
    """Feed-forward networks as wide as brings the model to the parameters of the softmax model."""
    if draft.recipe.equal_parameters and "mlp_features" not in draft.overrides:
        run = draft.run()
        softmax = dataclasses.replace(run, layer="softmax", layer_options=draft.recipe.layers["softmax"])
        equal = models.equal_mlp_features(run, softmax, draft.task)
        yield "as many parameters as softmax", dict(mlp_features=equal)


# By rising precedence. The last one builds models, so what they are built of is checked before.
STAGES = (
    defaults, protocol, recipe, caller, task_kind, endless_positions, not_drawn, causal_pooling, sequence_length, short_warm_up,
)  # fmt: skip


def _settle(recipe: str, layer: str, overrides: Mapping[str, Any]) -> Draft:
    draft = _begun(recipe, layer, overrides)
    for stage in STAGES:
        for level, values in stage(draft):
            draft.put(level, values)
    _check(draft.run(), draft)
    for level, values in equal_parameters(draft):
        draft.put(level, values)
    return draft


def _begun(recipe: str, layer: str, overrides: Mapping[str, Any]) -> Draft:
    """Refuses what is unknown or of a wrong type, and finds the task."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be a known name, got {recipe!r}. {nearest(recipe, RECIPES)}")
    layers.find_layer(layer)
    own = overrides["task"] if isinstance(overrides.get("task"), tasks.Task) else None
    if own is not None:
        if overrides.get("config", own.config) != own.config:
            raise ValueError(f"config must be the task's, {own.config!r}, got {overrides['config']!r}. Leave it out.")
        overrides = {**overrides, "task": own.name, "config": own.config}
    page, name = RECIPES[recipe], overrides.get("task", Run.task)
    known = [one.name for one in dataclasses.fields(Run)]
    for value in overrides:
        if value not in known:
            raise TypeError(f"{value} must be a value of a run, got {value}={overrides[value]!r}. {nearest(value, known)}")
    config = overrides["config"] if "config" in overrides else _usual_config(page, name, layer, overrides)
    task = own or tasks.find_task(name, config)
    overrides = {value: checked(value, given) for value, given in overrides.items()}
    if task.needs_causal:
        layers.check_causal(layer, task.needs_causal)
    return Draft(page, layer, task, overrides)


def _usual_config(page: Recipe, task: str, layer: str, overrides: Mapping[str, Any]) -> str:
    """The configuration of a task that the recipe names, or that suits the protocol, or the task's usual one."""
    known = tasks.TASKS.get(task, {})
    suited = protocols.CONFIGS.get((_protocol(page, task, None, layer, overrides), task))
    wanted = (page.config(task, layer), suited, Run.config, *known)
    return next((config for config in wanted if config in known), Run.config)


def _protocol(page: Recipe, task: str, config: str | None, layer: str, overrides: Mapping[str, Any]) -> str:
    named = [values["protocol"] for _, values in page.rows(task, config, layer) if "protocol" in values]
    return overrides.get("protocol", [Run.protocol, *named][-1])


def _check(run: Run, draft: Draft) -> None:
    check_values(run)
    protocols.check_protocol(run, draft.task, draft.overrides)
    layers.check_dropout(run.layer, run.attention_dropout_rate)
    if run.documents == "apart":
        if draft.task.end_of_document is None:
            refuse("documents", f"be 'joined' for {draft.task.name!r}", "'apart'", "Its sequences hold no token that ends one.")
        layers.check_segments(run.layer)
    if run.carry_state:
        models.check_carries(run, draft.task)
    if run.schedule == "onecycle" and "b1" in draft.overrides:
        refuse("b1", "be left out under schedule 'onecycle', which cycles it", run.b1, "Use schedule='linear'.")
    for name in ("state_learning_rate", "step_learning_rate"):
        given = draft.overrides.get(name)
        if given is not None and not models.has_state_space(run, draft.task):
            refuse(name, f"be none for layer {run.layer!r}, which has no parameters of state spaces", given,
                   "Use learning_rate.")
