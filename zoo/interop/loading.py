"""A mapping of arrays by other people's names, into the variables of a model of ours."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from subquad.zoo.checks import refuse

OWNER = "from_huggingface"
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
MISSING = object()


class Source(NamedTuple):
    """Where a variable comes from.

    Args:
        keys: the first that exists is taken.
        convert: what is done to the array.
        together: all of them are taken, and `convert` is given the list.
    """

    keys: tuple[str, ...]
    convert: Callable[[Any], Any] = np.asarray
    together: bool = False


# By the path of a variable, or of a module with variables of the usual names: a name or a source. "*" is a layer's number.
Names = Mapping[str, str | Source]


def read(config: Mapping[str, Any], word: str, default: Any = MISSING, *, among: tuple | None = None) -> Any:
    """An entry of a config; refused where it is missing, or has a value that no layer here honours."""
    value = config.get(word, default)
    if value is MISSING:
        refuse(OWNER, f"config[{word!r}]", "none", "be there", "Pass the whole config.json of the checkpoint.")
    if among is not None and value not in among:
        refuse(OWNER, f"config[{word!r}]", repr(value), f"be {' or '.join(map(repr, among))}",
               "Such a checkpoint has another model, which is not written down here.")
    return value


def layer(kind: type[nnx.Module], ours: Mapping[str, Any], given: Mapping[str, Any]) -> Callable[..., nnx.Module]:
    """A mixer with these options, of which the user's outrank ours."""
    return functools.partial(kind, **{**ours, **given})


def load(model: nnx.Module, names: Names, state: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """Writes every parameter of the model -> the keys that were not used, but for copies of those that were.

    Args:
        names: of all parameters.
        state: arrays by name. A `weight` of a linear map is [out, in], as in PyTorch.
        prefix: what stands before all names but those of the head, or before none.
    """
    prefix = prefix if any(key.startswith(prefix) for key in state) else ""
    used: set[str] = set()
    for path, variable in nnx.to_flat_state(nnx.variables(model, nnx.Param)):
        *parts, leaf = map(str, path)
        source = source_of(names, parts, leaf, "" if parts[0] == "head" else prefix)
        keys = [key for key in source.keys if key in state]
        if len(keys) < (len(source.keys) if source.together else 1):
            refuse(OWNER, "state", f"{keys or 'none'} for {'.'.join([*parts, leaf])}",
                   f"have {(' and ' if source.together else ' or ').join(source.keys)}",
                   "Pass the whole state dict, and the config that belongs to it.")
        used.update(key for key in keys if source.together or is_copy(state[key], state[keys[0]]))
        keys = keys if source.together else keys[:1]
        given = [np.asarray(state[key]) for key in keys]
        array = np.asarray(source.convert(given if source.together else given[0]))
        wanted = flat_shape(model, parts, leaf, variable.shape)
        if array.shape != wanted:
            refuse(OWNER, f"state[{keys[0]!r}]", f"an array {given[0].shape}, which becomes {array.shape}",
                   f"become one of shape {wanted}, the {leaf} of {'.'.join(parts)}",
                   "Pass the config that belongs to these weights.")
        variable[...] = jnp.asarray(array.reshape(variable.shape), variable.dtype)
    # What was tied is often written twice.
    tied = {start_of(state[key]): state[key] for key in used if np.ndim(state[key]) > 1}
    left = (key for key in state if key not in used)
    return tuple(key for key in left if not is_copy(state[key], tied.get(start_of(state[key]))))


def source_of(names: Names, parts: list[str], leaf: str, prefix: str) -> Source:
    """Where the variable `leaf` of the module at this path comes from."""
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    source = names.get(f"{pattern}.{leaf}") or f"{names[pattern]}.{LEAVES[leaf]}"
    if isinstance(source, str):
        source = Source((source,), np.transpose if leaf == "kernel" else np.asarray)
    numbers = [part for part in parts if part.isdigit()]
    keys = tuple(prefix + key.replace("*", numbers[0]) if numbers else prefix + key for key in source.keys)
    return source._replace(keys=keys)


def flat_shape(model: nnx.Module, parts: list[str], leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a variable with the heads of a projection in one axis."""
    module: Any = model
    for part in parts:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    ends = tuple(math.prod(np.atleast_1d(getattr(module, f"{end}_features", 0)).tolist()) for end in ("in", "out"))
    if not isinstance(module, nnx.Linear | nnx.LinearGeneral):
        return shape
    return ends if leaf == "kernel" else ends[1:]


def start_of(array) -> tuple[tuple[int, ...], bytes]:
    """What equal arrays have in common, and hardly others."""
    array = np.asarray(array)
    return array.shape, array.reshape(-1)[:64].tobytes()


def is_copy(one, other) -> bool:
    return other is not None and np.array_equal(np.asarray(one), np.asarray(other))
