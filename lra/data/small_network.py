"""A small convolutional network that looks at a few thousand pictures: can anything be learnt from them at all?"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from flax import nnx

# Pictures that it learns from, and that it is judged on; both in memory, as bytes.
TRAIN, TEST = 8_000, 2_000
BATCH = 64


class Network(nnx.Module):
    """Convolutions of stride 2 and two linear maps: [B, R, C, 1] -> [B, classes]. Sees where things are."""

    def __init__(self, shape: tuple[int, int], num_classes: int, *, rngs: nnx.Rngs):
        widths, layers, (rows, columns) = 1, [], shape
        while max(rows, columns) > 4:
            wider = min(64, max(16, 2 * widths))
            layers.append(nnx.Conv(widths, wider, (3, 3), strides=(2, 2), rngs=rngs))
            widths, rows, columns = wider, -(-rows // 2), -(-columns // 2)
        self.layers = nnx.List(layers)
        self.inner = nnx.Linear(widths * rows * columns, 64, rngs=rngs)
        self.head = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, pictures):
        hidden = pictures
        for layer in self.layers:
            hidden = nnx.relu(layer(hidden))
        return self.head(nnx.relu(self.inner(hidden.reshape(len(hidden), -1))))


def accuracy(
    splits: Mapping[str, Sequence], shape: tuple[int, int], num_classes: int, levels: int, *, steps: int = 400, seed: int = 0
) -> tuple[float, int]:
    """Trains the network for `steps` batches of 64 and tests it.

    Args:
        splits: "train" and "test", sequences of {"inputs": token ids, the pixel plus 1, "label"}.
        shape: rows and columns of a picture. levels: number of different pixels.
    Returns: (accuracy between 0 and 1, pictures that it was tested on).
    """
    (pictures, labels), (unseen, answers) = (
        read_pictures(splits[split], most, shape) for split, most in (("train", TRAIN), ("test", TEST))
    )
    graph, parameters = nnx.split(Network(shape, num_classes, rngs=nnx.Rngs(seed)))
    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def step(parameters, memory, batch, wanted):
        def loss(parameters):
            logits = nnx.merge(graph, parameters)(batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

        updates, memory = optimiser.update(jax.grad(loss)(parameters), memory)
        return optax.apply_updates(parameters, updates), memory

    draw, memory = np.random.default_rng(seed), optimiser.init(parameters)
    for _ in range(steps):
        rows = draw.integers(0, len(pictures), BATCH)
        parameters, memory = step(parameters, memory, scaled(pictures[rows], levels), labels[rows])
    predict = jax.jit(lambda batch: nnx.merge(graph, parameters)(batch).argmax(-1))
    blocks = range(0, len(unseen), 250)
    predicted = np.concatenate([predict(scaled(unseen[start : start + 250], levels)) for start in blocks])
    return float((predicted == answers).mean()), len(answers)


def read_pictures(examples: Sequence, most: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` examples, evenly spread: (pixels [N, R, C, 1], one byte each, labels)."""
    chosen = np.linspace(0, len(examples) - 1, min(most, len(examples))).round().astype(int)
    pictures, labels = np.empty((len(chosen), *shape, 1), np.uint8), np.empty(len(chosen), int)
    for row, index in enumerate(chosen):
        one = examples[int(index)]
        pictures[row], labels[row] = one["inputs"].reshape(*shape, 1) - 1, one["label"]
    return pictures, labels


def scaled(pictures: np.ndarray, levels: int) -> np.ndarray:
    """Pixels 0..levels - 1 as numbers in -1..1."""
    return pictures.astype(np.float32) * (2 / (levels - 1)) - 1
