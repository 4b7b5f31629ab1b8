"""The record of a run: everything that decides its numbers. `plan.plan` makes one from a recipe."""

import hashlib
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from subquad.kernels.dispatch import nearest

Pooling = Literal["mean", "max", "first", "last", "cls"]
Schedule = Literal["cosine", "rsqrt", "linear", "onecycle", "constant", "plateau"]
Norm = Literal["layer", "rms", "batch", "scale"]
Selection = Literal["best", "last"]
Dtype = Literal["float32", "bfloat16"]
USUAL = "Leave it out for the recipe's."  # the cure of a value that is none


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's numbers. `plan.plan` makes one.

    Attributes:
        recipe: a key of `recipes.RECIPES`, which it was planned from.
        task: a key of `tasks.TASKS`.
        config: which of the task's data sets.
        layer: a key of `zoo.LAYERS`, or "package.module:ClassName".
        seed: of the first parameters, the order of the data and dropout; below 2**32.
        layer_options: of the layer's constructor.
        in_features: features D.
        num_layers: number of blocks.
        mlp_features: features inside the feed-forward networks.
        pooling: of the real tokens; "cls" prepends a token of its own and reads that.
        positions: "learned", "sinusoidal" or None.
        dropout_rate: of embeddings, of what mixers and feed-forward networks put out, and inside the latter.
        attention_dropout_rate: of attention weights, for layers that make them, where each sample and head drops its own; or of
            the taps of a short convolution.
        drop_path_rate: probability that a sample goes past the halves of the last block; layer l of L has l / L of it.
        norm: "layer", "rms", "scale" (ScaleNorm), or "batch", whose statistics are of real tokens and kept in the checkpoint.
        norm_order: "pre", before mixer and network, and once more at the end; "post", after each residual sum; or "macaron", a
            mixer between two halves of feed-forward networks, with norms as "pre".
        num_experts: feed-forward networks of each block, of which a router gives each token a few; 0: one for all tokens.
        experts_per_token: how many: 1 as Switch, 2 as GShard.
        capacity_factor: an expert takes at most this times its even share of a sample's tokens; None: no token is left out.
        balance_loss: what the loss gets of the routers' balance, 1 for each router where it is balanced, summed over them.
        z_loss: what the loss gets of the mean square of the routers' log-sums of exponentials, summed over them.
        layer_groups: so many groups of consecutive layers share their weights; None: every layer has its own.
        steps: optimiser steps.
        batch_size: examples per step.
        accumulate: in how many equal parts a batch is computed.
        learning_rate: at the peak; for the schedule "rsqrt" the factor of min(1, t / warmup) / sqrt(max(t, warmup)).
        schedule: after the warm-up, "cosine" or "linear" to 0 at the last step, "rsqrt", "constant", or "plateau": times
            0.2 whenever the validation loss has had no new minimum in `patience` validations. "onecycle" is PyTorch's, linear:
            from a 25th of the peak up in the warm-up, down to a 250,000th at the last step.
        warmup_steps: linear warm-up, in steps; a recipe's is at most half of `steps`, but for "rsqrt".
        weight_decay: decoupled, times the learning rate.
        decay: "matrices" spares biases, norms and the layers' other parameters; "all" spares none but those of state spaces.
        b1: of Adam, of the gradients' average; "onecycle" has its own, 0.95 at both ends and 0.85 at the peak.
        b2: of Adam, of their squares' average.
        eps: of Adam, added to the root of the squares' average.
        clip_norm: largest global norm of the gradient; None: no limit.
        dtype: of activations; parameters are float32.
        evaluate_every: steps between validations, each of which also saves a checkpoint.
        selection: which parameters the reported test accuracy is of: "best" on validation, or the "last".
        ema: decay of a moving average of the parameters, which is then what is validated, tested and kept; None: no average.
        remat: compute each block again in the backward pass: less memory, more time, the same numbers.
        remat_policy: what remat keeps all the same: "nothing", "dots" (products of matrices), or "dots_with_no_batch_dims"
            (those with weights).
        reversible: two residual streams, which the backward pass rebuilds: less memory, another model; see `zoo.Encoder`.
        state_learning_rate: as learning_rate, of the parameters of state spaces, `optim.STATE_SPACE`; None: as the others'.
        step_learning_rate: as learning_rate, of their step sizes; None: as the parameters of state spaces.
        embedding_std: deviation of the token embeddings at the start, and "cls" starts as 0; None: 1 / sqrt(in_features).
        position_std: deviation of the learned positions at the start; None: 1 / sqrt(in_features).
        patience: validations that a plateau waits for a new minimum.
        early_stopping: validations without a better one after which a run ends; None: it does all steps.
        protocol: the rules that a number was made by: "lra-2020", those of the arena's code, or "modern", see `protocols`.
        head: between pooled features and logits: "linear", after one hidden layer of in_features for a pair, or "mlp", the
            arena's hidden layer of mlp_features, and a second of half as many for a pair.
        interaction: of a pair a, b: "nli", [a, b, a * b, a - b], or "concat", [a, b].
        inputs: "tokens", or "continuous": a pixel is one number in -1..1 through a linear map.
        documents: of a language model whose sequences hold several documents: "joined", a token may see those before, or
            "apart", each begins with an empty state.
        carry_state: of a language model, truncated back-propagation through time, or Transformer-XL's recurrence: the text is
            read in order, in batch_size streams, and a sequence goes on from the state or memory that the one before it left,
            through which no gradient flows; validation and test, too. Else sequences are shuffled, and each begins empty.
    """

    recipe: str = "quickstart"
    task: str = "listops"
    config: str = "small"
    layer: str = "softmax"
    seed: int = 0
    layer_options: Mapping[str, Any] = field(default_factory=dict)
    in_features: int = 64
    num_layers: int = 2
    mlp_features: int = 128
    pooling: Pooling = "mean"
    positions: Literal["learned", "sinusoidal"] | None = "learned"
    dropout_rate: float = 0.0
    attention_dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    norm: Norm = "layer"
    norm_order: Literal["pre", "post", "macaron"] = "pre"
    num_experts: int = 0
    experts_per_token: int = 1
    capacity_factor: float | None = None
    balance_loss: float = 0.01
    z_loss: float = 0.001
    layer_groups: int | None = None
    steps: int = 300
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 4e-3
    schedule: Schedule = "cosine"
    warmup_steps: int = 25
    weight_decay: float = 0.05
    decay: Literal["matrices", "all"] = "matrices"
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    dtype: Dtype = "float32"
    evaluate_every: int = 50
    selection: Selection = "best"
    ema: float | None = None
    remat: bool = False
    remat_policy: Literal["nothing", "dots", "dots_with_no_batch_dims"] = "nothing"
    reversible: bool = False
    state_learning_rate: float | None = None
    step_learning_rate: float | None = None
    embedding_std: float | None = None
    position_std: float | None = None
    patience: int = 10
    early_stopping: int | None = None
    protocol: Literal["lra-2020", "modern"] = "modern"
    head: Literal["linear", "mlp"] = "linear"
    interaction: Literal["concat", "nli"] = "nli"
    inputs: Literal["tokens", "continuous"] = "tokens"
    documents: Literal["joined", "apart"] = "joined"
    carry_state: bool = False

    @property
    def id(self) -> str:
        """Names the run by layer, seed and a hash of all its values."""
        return run_id(vars(self))


def run_id(values: Mapping[str, Any]) -> str:
    """The `Run.id` of a configuration, also of one that another version wrote."""
    hashed = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]
    return f"{values['layer'].replace(':', '.')}-seed{values['seed']}-{hashed}"


def words_of(kind: Any) -> list[str]:
    """The words that an annotation admits.

    Example:
        >>> words_of(Literal["learned", "sinusoidal"] | None), words_of(int)
        (['learned', 'sinusoidal'], [])
    """
    parts = get_args(kind)
    return list(parts) if get_origin(kind) is Literal else [word for part in parts for word in words_of(part)]


def known_words(kind: Any) -> list[str]:
    """As `words_of`, with the "none" that stands for None where an annotation admits it; [] without words.

    Example:
        >>> known_words(Literal["learned", "sinusoidal"] | None), known_words(int | None)
        (['learned', 'sinusoidal', 'none'], [])
    """
    words = words_of(kind)
    return [*words, "none"] if words and type(None) in get_args(kind) else words


def checked(name: str, value: Any) -> Any:
    """A value for an attribute of `Run`; an int is a float where that is the attribute's type, so that equal runs look equal.

    Raises: TypeError, ValueError: another type than the attribute's, or another word than it knows.
    """
    kind = get_type_hints(Run)[name]
    parts = get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)
    if float in parts and type(value) is int:
        value = float(value)
    words = words_of(kind)
    allowed = tuple(str if get_origin(part) is Literal else get_origin(part) or part for part in parts)
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        wanted = f"one of {', '.join(known_words(kind))}" if words else " or ".join(one.__name__ for one in allowed)
        raise TypeError(f"{name} must be {wanted}, got {value!r}. {USUAL}")
    if words and value is not None and value not in words:
        raise ValueError(f"{name} must be a known word, got {value!r}. {nearest(value, known_words(kind))}")
    return value


def check_values(run: Run) -> None:
    """Refuses a run with a value out of its range, or with two that contradict each other.

    Raises: ValueError.
    """
    _check_ranges(run)
    _check_idle(run)
    _check_carried(run)
    _check_counts(run)


def _check_ranges(run: Run) -> None:
    positive = (
        "in_features", "num_layers", "steps", "batch_size", "accumulate", "learning_rate", "evaluate_every", "patience", "eps",
        "clip_norm", "state_learning_rate", "step_learning_rate", "embedding_std", "position_std", "early_stopping",
        "experts_per_token", "capacity_factor", "layer_groups",
    )  # fmt: skip
    not_negative = ("mlp_features", "warmup_steps", "weight_decay", "num_experts", "balance_loss", "z_loss")
    rates = ("b1", "b2", "dropout_rate", "attention_dropout_rate", "drop_path_rate")
    ranges: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(positive, (lambda value: 0 < value < math.inf, "> 0 and finite")),
        **dict.fromkeys(not_negative, (lambda value: 0 <= value < math.inf, ">= 0 and finite")),
        **dict.fromkeys(rates, (lambda value: 0 <= value < 1, "in [0, 1)")),
        "seed": (lambda value: 0 <= value < 2**32, "in [0, 2**32)"),
        "ema": (lambda value: 0 < value < 1, "in (0, 1)"),
    }
    for name, (is_within, words) in ranges.items():
        value = getattr(run, name)
        if value is not None and not is_within(value):
            raise ValueError(f"{name} must be {words}, got {value}. {USUAL}")


def _check_idle(run: Run) -> None:
    """Refuses values that would change nothing, because of another."""
    for name, word, needed in (("position_std", "positions", "learned"), ("embedding_std", "inputs", "tokens")):
        if getattr(run, name) is not None and getattr(run, word) != needed:
            raise ValueError(f"{name} must be none with {word}={getattr(run, word)!r}, got {getattr(run, name)}.")
    of_experts = ("experts_per_token", "capacity_factor", "balance_loss", "z_loss")
    for asker, names in (("num_experts", of_experts), ("remat", ("remat_policy",))):
        for name in names:
            usual, value = getattr(Run, name), getattr(run, name)
            if value != usual and not getattr(run, asker):
                raise ValueError(f"{name} must be {usual} without {asker}, got {value}. Pass {asker}, or leave {name} out.")


def _check_carried(run: Run) -> None:
    # The state goes on through `extend`, without end, which drops no weights, moves no statistics and knows no documents.
    carrying = dict(
        positions=(None, "sinusoidal"), attention_dropout_rate=(0,), num_experts=(0,), norm=("layer", "rms", "scale"),
        remat=(False,), reversible=(False,), documents=("joined",),
    )  # fmt: skip
    for name, able in carrying.items() if run.carry_state else ():
        if (value := getattr(run, name)) not in able:
            raise ValueError(
                f"{name} must be {' or '.join(map(str, able))} with carry_state, got {value}. Change it, or leave "
                "carry_state out."
            )


def _check_counts(run: Run) -> None:
    """Refuses numbers that do not divide each other, and a warm-up that leaves no steps."""
    if run.layer_groups is not None and run.num_layers % run.layer_groups:
        raise ValueError(f"layer_groups must divide num_layers = {run.num_layers}, got {run.layer_groups}.")
    if run.schedule != "rsqrt" and run.warmup_steps > run.steps:
        raise ValueError(
            f"warmup_steps must be at most steps = {run.steps} under schedule {run.schedule!r}, got {run.warmup_steps}."
        )
    if run.schedule == "cosine" and run.warmup_steps == run.steps:
        raise ValueError(
            f"warmup_steps must be below steps = {run.steps} under schedule 'cosine', got {run.warmup_steps}. Choose fewer, "
            "or schedule='linear'."
        )
    if run.batch_size % run.accumulate:
        raise ValueError(
            f"accumulate must divide batch_size = {run.batch_size}, got {run.accumulate}. Choose one of "
            f"{[k for k in range(1, run.batch_size + 1) if run.batch_size % k == 0]}."
        )
