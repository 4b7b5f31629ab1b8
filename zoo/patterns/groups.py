"""Heads that attend in different ways, each group by its own function."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EVEN, ODD = slice(0, None, 2), slice(1, None, 2)
Group = tuple[slice | np.ndarray, Callable]  # heads, and what they do


def in_groups(groups: Sequence[Group], *arrays: Float[Array, "B T N _"]) -> Float[Array, "B T N _"]:
    """`function(*arrays)` of each group, of its own heads of the arrays; heads in their order again."""
    # Heads are split and joined, never indexed: of a head that is indexed the gradient is as large as that of all.
    lists = [np.arange(arrays[0].shape[2])[heads] for heads, _ in groups]
    heads_of = [jnp.split(x, x.shape[2], axis=2) for x in arrays]
    join = lambda heads, wanted: jnp.concatenate([heads[i] for i in wanted], axis=2)
    outputs = [function(*(join(x, wanted) for x in heads_of)) for wanted, (_, function) in zip(lists, groups, strict=True)]
    heads = [head for x in outputs for head in jnp.split(x, x.shape[2], axis=2)]
    return join(heads, np.argsort(np.concatenate(lists)))
