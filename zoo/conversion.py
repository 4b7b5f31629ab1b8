"""A trained model's attention changed for another mechanism, its projections kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from subquad.zoo import registry
from subquad.zoo.base import Attention
from subquad.zoo.checks import refuse

PROJECTIONS = ("query", "key", "value", "out")


class Change(NamedTuple):
    """What became of one attention layer.

    Args:
        path: where it stands in the model, such as "blocks/0/attention".
        before, after: the layers.
        kept: variables of the new layer that hold what the old one held, such as "query/kernel".
        new: variables that are drawn anew.
        lost: what the old layer had and the new one has not, in words.
    """

    path: str
    before: nnx.Module
    after: nnx.Module
    kept: tuple[str, ...]
    new: tuple[str, ...]
    lost: tuple[str, ...]

    def __str__(self) -> str:
        names = f"{self.path}: {type(self.before).__name__} -> {type(self.after).__name__}"
        parts = ("keeps", self.kept or ["nothing"]), ("draws", self.new), ("loses", self.lost)
        return "; ".join([names, *(f"{word} {', '.join(what)}" for word, what in parts if what)])


class Converted(NamedTuple):
    """A converted model, and what changed in it."""

    model: Any
    changes: tuple[Change, ...]


def convert(
    model: nnx.Module, name: str, *, rngs: nnx.Rngs, only: Callable[[str], bool] | None = None, **given
) -> Converted:
    """A copy of a model in which every attention layer is the layer of this name, with the projections it had.

    It converts `nnx.MultiHeadAttention` and the attention layers of this library. Sizes, biases, dtypes, and the direction and
    rotation of a layer of this library stay; heads that shared keys and values have copies of them where the new layer does
    not share. So do the axes of layers that `nnx.vmap` built, to be run by `nnx.scan`, and the annotations of variables, such
    as their sharding. A model converted to a mechanism that says something else wants further training.

    A layer of Flax is told in each call, by a mask, what is causal; ours is built so: pass is_causal=True here, and no causal
    mask in the call.

    Args:
        model: stays as it is.
        name: a key of `zoo.LAYERS`.
        rngs: draws what is new.
        only: of the path of a layer, such as "blocks/0/mixer": whether to convert it. None: all.
        given: options of the new layers; they outrank what the old ones had.
    Returns: the new model and its changes; a layer that stands in two places is one change, and one layer.
    Raises:
        ValueError: an unknown name; a model without attention, or that is an attention layer by itself; an option that the
            layer refuses; layers stacked along an axis that is not the first; sizes of which no projection is left.
        TypeError: an option that it does not have, or one missing.
    Example:
        >>> softmax = nnx.Sequential(nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0)))
        >>> linear = convert(softmax, "performer", num_features=16, rngs=nnx.Rngs(1))
        >>> print(linear.changes[0])
        layers/0: MultiHeadAttention -> PerformerAttention; keeps key/bias, key/kernel, out/bias, out/kernel, query/bias, \
query/kernel, value/bias, value/kernel; draws projection
    """
    if is_attention(model):
        refuse("convert", "model", f"a {type(model).__name__}", "be a module that holds its attention layers",
               "Wrap it: nnx.Sequential(layer).")
    changes = []

    def change(path, node):
        place = "/".join(map(str, path))
        if not is_attention(node) or only is not None and not only(place):
            return node
        changes.append(converted(place, node, name, rngs, given))
        return changes[-1].after

    model = nnx.recursive_map(change, nnx.clone(model), graph=True)
    if not changes:
        where = "hold an attention layer" if only is None else "hold an attention layer that `only` chooses"
        refuse("convert", "model", "none", where, "Pass a model with nnx.MultiHeadAttention, or with a layer of zoo.")
    return Converted(model, tuple(changes))


def is_attention(node) -> bool:
    return isinstance(node, nnx.MultiHeadAttention | Attention)


def converted(path: str, old, name: str, rngs: nnx.Rngs, given: dict[str, Any]) -> Change:
    supports, known, stacked = registry.find(name).supports, registry.options(name), stacked_axes(old)
    options = {word: value for word, value in inherited_options(old).items() if word in known}
    groups = old.num_heads // old.num_kv_heads
    if not supports.grouped:
        options.pop("num_kv_heads", None)
    if not supports.rotary:
        options.pop("rotary_base", None)
    new = build(stacked, rngs, lambda rngs: registry.make(name, in_features=old.in_features, rngs=rngs, **options | given))
    before = {"/".join(map(str, where)): variable for where, variable in nnx.to_flat_state(nnx.state(old, nnx.Param))}
    kept, fresh = [], []
    for where, variable in nnx.to_flat_state(nnx.variables(new, nnx.Not(nnx.RngState))):
        label = "/".join(map(str, where))
        value = before[label][...] if label in before and where[0] in PROJECTIONS else None
        if value is not None and where[0] in ("key", "value") and not supports.grouped:
            value = jnp.repeat(value, groups, axis=-2)
        if value is None or value.shape != variable.shape:
            fresh.append(label)
            continue
        variable.set_value(value)  # the array itself, where it lies on devices, too
        variable.set_metadata(before[label].get_metadata(exclude_required=True))  # such as its sharding
        kept.append(label)
    if isinstance(new, Attention) and not kept:  # other layers have other maps
        refuse("convert", "sizes of the new layer", "others in all", f"be those of a projection of {path!r}",
               "Leave options such as qkv_features out, or this layer by `only`.")
    if hasattr(new, "deterministic") and getattr(old, "deterministic", None) is not None:
        new.deterministic = old.deterministic
    lost = [label for label in before if label not in kept]
    return Change(path, old, new, tuple(kept), tuple(fresh), (*lost, *habits(old, new)))


def reference(old) -> tuple[str, Any]:
    """A projection that a layer has, by name: a layer whose scores are no products has no queries."""
    name = "query" if hasattr(old, "query") else "value"
    return name, getattr(old, name)


def stacked_axes(old) -> tuple[int, ...]:
    """The sizes of the axes in front that `nnx.vmap` gave the variables of a layer."""
    name, projection = reference(old)
    shape, of_one = projection.kernel.shape, (*projection.in_features, *projection.out_features)
    stacked = shape[: len(shape) - len(of_one)]
    if shape != (*stacked, *of_one):
        refuse("convert", f"{name}/kernel", shape, f"end in {of_one}", "Stack layers along the first axis, as nnx.vmap does.")
    return stacked


def build(stacked: tuple[int, ...], rngs: nnx.Rngs, make: Callable[[nnx.Rngs], Any]) -> Any:
    """A layer, or layers stacked along axes of these sizes."""
    if not stacked:
        return make(rngs)
    size, *rest = stacked
    return nnx.vmap(lambda rngs: build(tuple(rest), rngs, make))(rngs.split(size))


def inherited_options(old) -> dict[str, Any]:
    """What the constructor of a layer may be told of an old one."""
    words = (
        "num_heads", "num_kv_heads", "out_features", "in_kv_features", "dtype", "param_dtype", "dropout_rate",
        "broadcast_dropout", "is_causal", "rotary_base", "implementation",
    )  # fmt: skip
    options = {word: getattr(old, word) for word in words if hasattr(old, word)}
    _, projection = reference(old)
    features = old.num_heads * projection.out_features[-1]
    return options | dict(qkv_features=features, use_bias=projection.bias is not None, precision=projection.precision)


def habits(old, new) -> list[str]:
    """What an old layer did in a call that the new one does not."""
    of = lambda layer, word: getattr(layer, word, None)
    lost = {
        "dropout of attention weights": of(old, "dropout_rate") and not of(new, "dropout_rate"),
        "decode (use init_cache and extend)": of(old, "decode"),
        "its attention_fn": of(old, "attention_fn") not in (None, nnx.dot_product_attention),
        "rotary positions": of(old, "rotary_base") is not None and of(new, "rotary_base") is None,
        "its own stream of rngs (pass rngs in the call)": of(old, "rngs") is not None and of(new, "dropout_rate"),
    }
    return [habit for habit, is_lost in lost.items() if is_lost]
