"""The classifier that a run trains, and how many parameters it has."""

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from subquad import zoo
from subquad.lra.tasks import Task

if TYPE_CHECKING:
    from subquad.lra.recipes import Run


class Model(nnx.Module):
    """`zoo.Classifier` for a task; with pooling "cls", a token of its own in front, and the head reads that.

    Call:
        inputs: [B, T] token ids.  mask: [B, T], True = a real token.
    Returns: logits [B, num_classes], float32.
    """

    def __init__(self, run: "Run", task: Task, *, rngs: nnx.Rngs):
        extra = int(run.pooling == "cls")
        self.first_token = task.vocabulary_size if extra else None
        self.classifier = zoo.Classifier(
            task.num_classes,
            vocab_size=task.vocabulary_size + extra,
            in_features=run.in_features,
            num_layers=run.num_layers,
            mlp_features=run.mlp_features,
            max_length=task.length + extra,
            mixer=run.layer,
            mixer_options=dict(run.layer_options),
            pooling="first" if extra else run.pooling,
            positions=run.positions,
            dropout_rate=run.dropout_rate,
            remat=run.remat,
            dtype=jnp.dtype(run.dtype),
            rngs=rngs,
        )

    def __call__(self, inputs, mask, *, deterministic: bool = True, rngs: nnx.Rngs | None = None):
        if self.first_token is not None:
            inputs = jnp.pad(inputs, ((0, 0), (1, 0)), constant_values=self.first_token)
            mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
        logits = self.classifier(inputs, mask=mask, deterministic=deterministic, rngs=rngs)
        return logits.astype(jnp.float32)


def build(run: "Run", task: Task) -> Model:
    """The model with its first parameters, drawn from run.seed."""
    return Model(run, task, rngs=nnx.Rngs(run.seed))


def count_parameters(run: "Run", task: Task) -> int:
    """Trainable numbers of a run's model; nothing is allocated."""
    abstract = nnx.eval_shape(lambda: build(run, task))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract, nnx.Param)))


def equal_mlp_features(run: "Run", reference: "Run", task: Task) -> int:
    """The mlp_features, a multiple of 8, that bring a run's model closest to the parameters of `reference`'s.

    Raises: ValueError: the layer alone has more parameters than the whole reference.
    """
    target = count_parameters(reference, task)
    narrow, wide = (count_parameters(dataclasses.replace(run, mlp_features=width), task) for width in (8, 16))
    width = 8 * max(1, round(1 + (target - narrow) / (wide - narrow)))
    reached = narrow + (wide - narrow) * (width // 8 - 1)
    if abs(reached - target) > 0.1 * target:
        raise ValueError(
            f"layer {run.layer!r} must fit into {target:,} parameters to be compared, got {reached:,}. "
            "Make it smaller by layer_options, or pass mlp_features."
        )
    return width
