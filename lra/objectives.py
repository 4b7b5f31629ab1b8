"""What a run minimises and what it is judged by, for each kind of task. Batches are those of `data.pipeline`."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subquad.lra.tasks import Kind


@dataclass(frozen=True)
class Objective:
    """The loss and the score of one kind of task.

    Attributes:
        column: the score's name, and its column in `results.Result`.
        inputs: the arrays of a batch that the model is called with, in order.
        per_token: a sequence has a target for each token, and those that are -1 are asked of nobody: neither loss nor score
            counts them.
        score: (logits, targets, losses) -> what is averaged into the score, one per target.
        sign: 1 where a larger score is better, -1 where a smaller one is.
        describe: a score in words.
    """

    column: str
    inputs: tuple[str, ...]
    per_token: bool
    score: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    sign: int
    describe: Callable[[float], str]

    def loss(
        self, model: nnx.Module, batch: dict, *, rngs: nnx.Rngs, balance: float = 0.0, z: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """(sum of the cross-entropies in nats, number of targets), with dropout: sums, so that parts of a batch add up.

        To each target's is added `balance` and `z` times its sample's `zoo.RouterLosses`, of a model that tells them.
        """
        call, words = [batch[name] for name in self.inputs], dict(deterministic=False, rngs=rngs)
        logits, router = model.with_losses(*call, **words) if balance or z else (model(*call, **words), None)
        losses, _, counts = self._each(logits, batch["targets"])
        total = (losses * counts).sum()
        if router is not None:
            total += ((balance * router["balance"] + z * router["z"]) * counts.reshape(len(counts), -1).sum(1)).sum()
        return total, counts.sum()

    def rows(self, model: nnx.Module, batch: dict) -> jax.Array:
        """[B, 3] float32: for each row the sums of its scores and losses, and the number of its targets."""
        losses, scores, counts = self._each(model(*(batch[name] for name in self.inputs)), batch["targets"])
        return jnp.stack([(x * counts).reshape(len(counts), -1).sum(1) for x in (scores, losses, jnp.ones_like(counts))], 1)

    def rank(self, score: float, loss: float) -> list[float]:
        """What compares two validations: the larger is the better, of equal scores that of the smaller loss."""
        return [self.sign * score, -loss]

    def columns(self, **scores: float | None) -> dict[str, float | None]:
        """The columns of a result: {"accuracy_best": 0.5} of best=0.5; `selected` is the column without an ending."""
        return {self.column if name == "selected" else f"{self.column}_{name}": value for name, value in scores.items()}

    def _each(self, logits, targets):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
        return losses, self.score(logits, targets, losses), (targets >= 0).astype(jnp.float32)


def _accuracy(inputs: tuple[str, ...], per_token: bool = False) -> Objective:
    right = lambda logits, targets, losses: logits.argmax(-1) == targets
    return Objective("accuracy", inputs, per_token, right, 1, lambda score: f"{100 * score:.1f} %")


OBJECTIVES: dict[Kind, Objective] = {
    "classification": _accuracy(("inputs", "mask")),
    "pair": _accuracy(("inputs1", "mask1", "inputs2", "mask2")),
    "tagging": _accuracy(("inputs", "mask"), per_token=True),
    # A token is a byte.
    "language_model": Objective(
        "bits_per_byte", ("inputs", "mask"), True, lambda logits, targets, losses: losses / math.log(2), -1,
        lambda score: f"{score:.3f} bits per byte",
    ),
}  # fmt: skip
