"""Heads that attend in different ways, each group by its own function."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
Group = tuple[slice | np.ndarray, Callable]  # heads, and what they do


def in_groups(groups: Sequence[Group], *arrays: Float[Array, "B T N _"]) -> Float[Array, "B T N _"]:
    """`function(*arrays)` of each group, of its own heads of the arrays; heads in their order again."""
    outputs = [function(*(x[:, :, heads] for x in arrays)) for heads, function in groups]
    if len(groups) == 1:
        return outputs[0]
    order = np.concatenate([np.arange(arrays[0].shape[2])[heads] for heads, _ in groups])
    return jnp.concatenate(outputs, axis=2)[:, :, np.argsort(order)]
