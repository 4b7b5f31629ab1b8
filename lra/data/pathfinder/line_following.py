"""Pathfinder by a rule instead of a network: follow the lines from one disc to the other. Can its labels be seen at all?

    d(p) = the least sum of 1 / (brightness + eps) over the pixels of a path from a disc to p

Where the discs are the ends of one contour they are near each other, and most of the other contour is far from both;
else every contour is near one of them. A ridge regression on d between the discs and on quantiles of d over the bright
pixels, for several eps, and on their products tells the two apart. Small networks need far more pictures for that.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from subquad.lra.data import small_network

# Larger pictures are shrunk to this side.
SIDE = 64
RADII = {32: 1.5, 64: 2.5, 128: 3.0, 256: 5.0}  # of the discs, in pixels
DARKNESS = (0.02, 0.1, 0.3)  # eps: the less, the dearer the gaps
BRIGHT, QUANTILES, RIDGE, BATCH = 0.25, (0.25, 0.5, 0.75, 0.95), 300.0, 250


def accuracy(splits: Mapping[str, Sequence], side: int) -> tuple[float, int]:
    """Fits the rule to up to 8,000 pictures of train and tests it on up to 2,000.

    Args:
        splits: "train" and "test", sequences of {"inputs": token ids, the pixel plus 1, "label": 0 or 1}.
        side: of the square pictures, a key of `RADII`.
    Returns: (accuracy between 0 and 1, pictures that it was tested on).
    """
    shrink = max(1, side // SIDE)
    (seen, labels), (unseen, answers) = (
        _described(splits[split], most, side, shrink)
        for split, most in (("train", small_network.TRAIN), ("test", small_network.TEST))
    )
    mean, scale = seen.mean(0), seen.std(0) + 1e-6
    inputs, others = (_products((features - mean) / scale) for features in (seen, unseen))
    weights = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1]), inputs.T @ (2.0 * labels - 1))
    return float(((others @ weights > 0) == answers).mean()), len(answers)


def _described(examples: Sequence, most: int, side: int, shrink: int) -> tuple[np.ndarray, np.ndarray]:
    pictures, labels = small_network.read_pictures(examples, most, (side, side))
    pictures = pictures.reshape(-1, side // shrink, shrink, side // shrink, shrink).max((2, 4))
    blocks = (pictures[start : start + BATCH] / np.float32(255) for start in range(0, len(pictures), BATCH))
    return np.concatenate([_features(block, RADII[side] / shrink) for block in blocks]).astype(float), labels


def _products(features: np.ndarray) -> np.ndarray:
    """1, the features, and the products of two."""
    one, two = np.triu_indices(features.shape[1])
    return np.concatenate([np.ones((len(features), 1)), features, features[:, one] * features[:, two]], 1)


@jax.jit(static_argnums=1)
def _features(pictures, radius: float):
    """[B, S, S] in 0..1 -> [B, features]."""
    count, side, _ = pictures.shape
    discs, rows = _discs(pictures, radius), jnp.arange(count)
    bright = pictures.reshape(count, -1) > BRIGHT
    found = [jnp.log(jnp.hypot(*((discs[0] - discs[1]).T))), bright.sum(1) / side]
    places = [disc[:, 0] * side + disc[:, 1] for disc in discs]
    for darkness in DARKNESS:
        cost = 1 / (pictures + darkness)
        one, two = (_distances(cost, place).reshape(count, -1) for place in places)
        found.append(jnp.log(one[rows, places[1]]))
        for far in (jnp.minimum(one, two), jnp.maximum(one, two), one + two):
            found += list(jnp.nanquantile(jnp.where(bright, jnp.log(far + 1), jnp.nan), jnp.array(QUANTILES), axis=1))
    return jnp.nan_to_num(jnp.stack(found, 1))


def _discs(pictures, radius: float):
    """The brightest disc and the brightest that does not touch it: (row, column), two arrays [B, 2]."""
    count, side, _ = pictures.shape
    reach = int(np.ceil(radius))
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = jnp.asarray(rows**2 + columns**2 <= radius**2, jnp.float32)[None, None]
    light = jax.lax.conv_general_dilated(pictures[:, None], disc, (1, 1), "SAME").reshape(count, -1)
    place = lambda light: jnp.stack(jnp.divmod(light.argmax(1), side), 1)
    one = place(light)
    every = jnp.stack(jnp.divmod(jnp.arange(side**2), side), 1)
    apart = ((every - one[:, None]) ** 2).sum(-1) > (2 * radius + 1) ** 2
    return one, place(jnp.where(apart, light, -1.0))


def _distances(cost, start):
    """[B, S, S]: of every pixel from pixel `start`, along the cheapest path of steps to one of eight neighbours."""
    count, side, _ = cost.shape
    begun = jnp.full((count, side**2), 1e9).at[jnp.arange(count), start].set(0.0).reshape(cost.shape)
    steps = [(down, right) for down in range(3) for right in range(3) if (down, right) != (1, 1)]

    def relax(state):
        known, _ = state
        padded, better = jnp.pad(known, ((0, 0), (1, 1), (1, 1)), constant_values=1e9), known
        for down, right in steps:
            before = padded[:, down : down + side, right : right + side]
            better = jnp.minimum(better, before + cost * float(np.hypot(down - 1, right - 1)))
        return better, (better < known).any()

    return jax.lax.while_loop(lambda state: state[1], relax, (begun, jnp.array(True)))[0]
