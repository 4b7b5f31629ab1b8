"""The words that a constructor takes: which they are, which it needs, and what is refused."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from subquad.kernels import dispatch
from subquad.zoo.checks import check_flags


def options_of(layer: type[Any]) -> set[str]:
    """The words that the constructor of a layer knows, those of its shell among them."""
    parameters = inspect.signature(layer.__init__).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD} - {"self"}
    return known | (set(layer.shell.__annotations__) if hasattr(layer, "shell") else set())


@functools.cache
def flags_of(layer: Any) -> frozenset[str]:
    """The words of the constructor of a layer, those of its shell among them, that are true or false."""
    constructors = [inspect.signature(vars(one)["__init__"]) for one in layer.__mro__ if "__init__" in vars(one)]
    words = (one for constructor in constructors for one in constructor.parameters.values())
    return frozenset(one.name for one in words if isinstance(one.default, bool))


def check_flags_of(owner: str, layer: Any, given: Mapping[str, Any]) -> None:
    """Refuses options of a layer that must be true or false, and are not."""
    check_flags(owner, **{word: given[word] for word in flags_of(layer) if word in given})


def needs(layer: type[Any]) -> list[str]:
    """The words that the constructor of a layer has no default for."""
    parameters = list(inspect.signature(layer.__init__).parameters.values())[1:]
    return [one.name for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]


def check_complete(owner: str, layer: type[Any], given: Iterable[str]) -> None:
    """Refuses to leave out a word that the layer has no default for."""
    for word in needs(layer):
        if word not in given:
            raise TypeError(f"{owner}: {word} must be given, got nothing. Pass {word}=...")


def check_options(owner: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Refuses a word that is not known, with the nearest that is."""
    for word, value in given.items():
        if word not in known:
            nearest = dispatch.nearest(word, known)
            raise TypeError(f"{owner}: {word} must be one of its options, got {word}={value!r}. {nearest}")
