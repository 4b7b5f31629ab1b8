"""The two sets of rules that a number can be made by.

"lra-2020": those of the arena's released code as far as they can be defended. A token of its own is pooled, or the mean;
a pixel is one of 256 symbols; two sequences are concatenated; the last checkpoint is tested; IMDb validates on its test
set, which decides nothing then. Mended: black pixels are no padding, means are of real tokens only.

"modern": the best checkpoint on validation is tested, which is never the test set, so IMDb holds a tenth of its training
reviews out; a pair's head sees [a, b, a * b, a - b]; pixels may be numbers instead of symbols, which is a field of the run.
"""

from collections.abc import Mapping
from typing import Any

from subquad.lra import layers
from subquad.lra.files import refuse
from subquad.lra.run import Run
from subquad.lra.tasks import Kind, Task

# The configuration of a task whose usual one has other rules.
CONFIGS = {("modern", "text"): "modern"}
# Values of a run that mean nothing to a kind of task.
MEANINGLESS: dict[Kind, tuple[str, ...]] = {
    "classification": ("interaction", "documents", "carry_state"),
    "pair": ("documents", "carry_state"),
    "language_model": ("pooling", "head", "interaction", "inputs"),
    "tagging": ("pooling", "interaction", "inputs", "documents", "carry_state"),
}
# What reads the first token alone, which in a causal layer has seen nothing else.
FIRST = ("first", "cls")
_OTHER = {"lra-2020": "modern", "modern": "lra-2020"}


def defaults(protocol: str, kind: Kind) -> dict[str, Any]:
    """What a protocol sets where neither a recipe nor the caller does."""
    if protocol != "lra-2020":
        return {}
    pooled = {
        "classification": dict(pooling="cls", head="mlp"),
        # The released code has no token of its own in front of either sequence, and reads their first bytes.
        "pair": dict(pooling="first", head="mlp", interaction="concat"),
        "language_model": {},
        "tagging": {},
    }
    return {"selection": "last", **pooled[kind]}


def _allowed(protocol: str, task: Task) -> dict[str, tuple[str, ...]]:
    """The values that are not contradictory, for each name that a protocol has a say in."""
    if protocol == "modern":
        allowed: dict[str, tuple[str, ...]] = {"selection": ("best",)}
        if task.kind == "pair":
            allowed["interaction"] = ("nli",)
        return allowed | ({"config": ("modern",)} if _is_imdb(task) else {})
    allowed = {"selection": ("last",), "inputs": ("tokens",)}
    if task.kind == "classification":
        allowed["pooling"] = ("cls", "mean")
    elif task.kind == "pair":
        allowed |= {"pooling": ("first", "cls", "mean"), "interaction": ("concat",)}
    return allowed | ({"config": ("lra",)} if _is_imdb(task) else {})


def _is_imdb(task: Task) -> bool:
    return task.dataset.startswith("lra_text/")


def check_protocol(run: Run, task: Task, given: Mapping[str, Any]) -> None:
    """Refuses what contradicts a run's protocol, and what the caller gave that means nothing to the kind of task.

    Raises: ValueError: naming the value and the cure.
    """
    for name, allowed in _allowed(run.protocol, task).items():
        value = getattr(run, name)
        if value not in allowed:
            why = " (there IMDb is validated on its test set)" if _is_imdb(task) and value == "lra" else ""
            refuse(name, f"be {' or '.join(map(repr, allowed))} under protocol {run.protocol!r}", f"{value!r}{why}",
                   f"Pass {name}={allowed[0]!r}, or protocol={_OTHER[run.protocol]!r}.")
    for name in MEANINGLESS[task.kind]:
        if name in given:
            refuse(name, f"be left out for {task.name!r}, a task of kind {task.kind}", repr(given[name]),
                   "It would change nothing.")
    if run.pooling in FIRST and task.kind != "language_model" and layers.is_causal(run.layer, run.layer_options):
        refuse("pooling", f"be 'mean' for a causal {run.layer!r}, whose first token sees no other", repr(run.pooling),
               "Pass pooling='mean'.")
    if run.inputs == "continuous" and task.image_shape is None:
        refuse("inputs", f"be 'tokens' for {task.name!r}, which has no pixels", "'continuous'", "Pass inputs='tokens'.")
    if run.head == "mlp" and run.mlp_features < 2 and task.kind != "language_model":
        refuse("head", f"be 'linear' with mlp_features = {run.mlp_features}", "'mlp'",
               "Pass head='linear', or mlp_features=...")
