"""The layer of a run: a name in `zoo.LAYERS`, or a class of the user's own as "package.module:ClassName"."""

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from subquad import zoo
from subquad.kernels.dispatch import nearest
from subquad.lra.files import refuse
from subquad.zoo import registry
from subquad.zoo.registry import LAYERS

# What a block calls its mixer with, beside the inputs.
_WORDS = ("mask", "segment_ids", "deterministic", "rngs")
_CONTRACT = (
    "__init__(self, in_features, ..., *, rngs) and __call__(self, inputs, *, mask=None) with inputs [B, T, in_features] and "
    "a boolean mask [B, 1, 1, T], True = a real token"
)


class Own(nnx.Module):
    """A user's layer as a block calls it: words that its call does not take are left out.

    Those can only be `deterministic` and `rngs`, for a layer that draws nothing: `check_segments` asks for `segment_ids`.
    """

    def __init__(self, layer: nnx.Module, is_causal: bool):
        self.layer, self.is_causal = layer, is_causal
        taken = inspect.signature(type(layer).__call__).parameters
        every = any(one.kind is one.VAR_KEYWORD for one in taken.values())
        self.words = tuple(word for word in _WORDS if every or word in taken)

    def __call__(self, inputs, **words):
        return self.layer(inputs, **{word: words[word] for word in self.words if word in words})


def find_layer(name: str) -> type[nnx.Module]:
    """The class of a layer.

    Raises: ValueError: an unknown name, a module that cannot be imported, a class that is not in it or does not meet
        the contract of a mixer.
    Example:
        >>> find_layer("subquad.zoo:SoftmaxAttention") is find_layer("softmax")
        True
    """
    if name in LAYERS:
        return LAYERS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        refuse("layer", "be a known name", repr(name), f"{nearest(name, LAYERS)} One of your own is package.module:ClassName.")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"layer must name a module that can be imported, got {module!r} ({reason}). Put its folder on PYTHONPATH."
        ) from error
    if not hasattr(found, attribute):
        classes = [key for key, value in vars(found).items() if isinstance(value, type)]
        raise ValueError(f"layer must name a class of {module}, got {attribute!r}. {nearest(attribute, classes)}")
    _check_contract(name, getattr(found, attribute))
    return getattr(found, attribute)


def _check_contract(name: str, layer: Any) -> None:
    def refuse(got: str):
        raise ValueError(f"layer {name} must have {_CONTRACT}, got {got}. See the README on layers of your own.")

    if not isinstance(layer, type) or not issubclass(layer, nnx.Module):
        refuse(f"{layer!r}, which is no subclass of flax.nnx.Module")
    built, called = _parameters(layer.__init__), _parameters(layer.__call__)
    for word in ("in_features", "rngs"):
        if not _takes(built, word):
            refuse(f"a constructor without {word}")
    if not _takes(called, "mask"):
        refuse("a __call__ without mask, which could not leave padding out")
    other = [word for word, one in called.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    if [word for word in other[1:] if word not in _WORDS]:
        refuse(f"a __call__ that also needs {', '.join(other[1:])}")


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    """Without self."""
    return dict(list(inspect.signature(function).parameters.items())[1:])


def _takes(parameters: Mapping[str, inspect.Parameter], word: str) -> bool:
    return word in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def check_causal(name: str, purpose: str) -> None:
    """Refuses a layer that cannot be causal, as `purpose` needs it; warns of one whose future leaks into buckets.

    Raises: ValueError: with what to use in its place.
    """
    layer = find_layer(name)
    supports = getattr(layer, "supports", None)
    able = supports.causal if supports is not None else _takes(_parameters(layer.__init__), "is_causal")
    if not able:
        usable = ", ".join(known for known, other in LAYERS.items() if other.supports.causal)
        reason = "" if supports is not None else " (its constructor takes no is_causal)"
        raise ValueError(f"layer must be causal for {purpose}, got {name!r}, which cannot be{reason}. Use {usable}.")
    if able == "mask":
        warnings.warn(
            f"layer {name!r} chooses its buckets by looking at all positions, so that the future decides which past keys "
            "are compared: its score may flatter it.",
            stacklevel=5,
        )


def is_causal(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a layer of these options is causal by itself, whatever the task."""
    supports = getattr(find_layer(name), "supports", None)
    return bool(options.get("is_causal", supports is not None and not supports.bidirectional))


def check_dropout(name: str, rate: float) -> None:
    """Refuses a rate of attention dropout for a layer that has no weights to drop.

    Raises: ValueError: with what to use in its place.
    """
    if rate and "dropout_rate" not in _words(name):
        usable = ", ".join(known for known in LAYERS if "dropout_rate" in _words(known))
        refuse("attention_dropout_rate", f"be 0 for layer {name!r}, which keeps no weights to be dropped", rate,
               f"Leave it out, or use {usable}; dropout_rate drops features in any layer.")


def check_segments(name: str) -> None:
    """Refuses a layer that cannot keep the documents of a sequence apart.

    Raises: ValueError: with the layers that can.
    """
    able = [known for known, layer in LAYERS.items() if layer.supports.segment_ids]
    if not (name in able if name in LAYERS else _takes(_parameters(find_layer(name).__call__), "segment_ids")):
        refuse("documents", f"be 'joined' for layer {name!r}, which cannot keep them apart", "'apart'",
               f"Leave it out, use {', '.join(able)}, or give your own layer's call segment_ids.")


def _words(name: str) -> Container[str]:
    return registry.options(name) if name in LAYERS else _parameters(find_layer(name).__init__)


def make(
    name: str, options: Mapping[str, Any], *, dtype: Any, is_causal: bool, dropout_rate: float = 0.0
) -> Callable[..., nnx.Module]:
    """A function (in_features, rngs) -> layer, as `zoo.Encoder` takes it.

    Args:
        dtype: of activations; parameters are float32. Options of the same names outrank it.
        is_causal: build causal layers.
        dropout_rate: of attention weights; see `check_dropout`. Options outrank it, too.
    Raises: TypeError: an option that the layer does not have, or one missing.
    """
    causal = {"is_causal": True} if is_causal else {}
    if dropout_rate:
        drops = {"dropout_rate": dropout_rate, "broadcast_dropout": False}
        options = {**{word: value for word, value in drops.items() if word in _words(name)}, **options}
    if name in LAYERS:
        return functools.partial(zoo.make, name, **{"dtype": dtype, "param_dtype": jnp.float32, **options, **causal})
    layer = find_layer(name)
    parameters = _parameters(layer.__init__)
    for word, value in options.items():
        if not _takes(parameters, word):
            raise TypeError(f"{name}: {word} must be an option of the layer, got {word}={value!r}. {nearest(word, parameters)}")
    types = {word: value for word, value in dict(dtype=dtype, param_dtype=jnp.float32).items() if word in parameters}
    words = {**types, **options, **causal}
    for word, one in parameters.items():
        plain = one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
        if plain and one.default is one.empty and word not in ("in_features", "rngs", *words):
            raise TypeError(f"{name}: {word} must be given, got nothing. Pass --layer-options {word}=...")
    return lambda in_features, rngs: Own(layer(in_features=in_features, rngs=rngs, **words), is_causal)
