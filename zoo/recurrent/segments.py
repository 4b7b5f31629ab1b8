"""Attention segment after segment, each to what is before it, by content and distance."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from subquad.kernels import relative
from subquad.zoo import padding
from subquad.zoo.positions import sinusoidal


def add_relative(layer, shell, rngs: nnx.Rngs) -> None:
    """Gives an attention layer what relative positions need: the map of their encodings, and the biases u and v."""
    layer.position_features = layer.in_features + layer.in_features % 2
    layer.relative = nnx.LinearGeneral(
        layer.position_features, (layer.num_heads, layer.head_features), use_bias=False, dtype=layer.dtype,
        param_dtype=layer.param_dtype, precision=shell.get("precision"),
        kernel_init=shell.get("kernel_init", default_kernel_init), rngs=rngs,
    )  # fmt: skip
    bias, shape = nnx.initializers.normal(0.02), (layer.num_heads, layer.head_features)
    layer.content_bias = nnx.Param(bias(rngs.params(), shape, layer.param_dtype))
    layer.position_bias = nnx.Param(bias(rngs.params(), shape, layer.param_dtype))


def encodings(layer, count: int):
    """Projected encodings of the distances below `count`."""
    return layer.relative(sinusoidal(jnp.arange(count), layer.position_features))


def attend(layer, query, key, value, distances, mask, **ids):
    """`relative.attention` with a layer's biases and implementation; the queries are the last of the keys."""
    return relative.attention(
        query, key, value, distances, layer.content_bias[...], layer.position_bias[...], mask=mask,
        implementation=layer.implementation, **ids,
    )


def gated(near, far, gate, positions: Int[Array, "#B T"], segment_length: int):
    """sigmoid(gate) far + (1 - sigmoid(gate)) near of each head; `near` of the first segment, before which nothing is."""
    gate = nnx.sigmoid(gate[...].astype(jnp.float32))[None, None, :, None]
    gate = jnp.where(positions[..., None, None] >= segment_length, gate, 0)
    return (gate * far.astype(jnp.float32) + (1 - gate) * near.astype(jnp.float32)).astype(near.dtype)


def usage(layer, query, key, distances, mask):
    """The weight of each key in all queries and heads together, [B, S].

    That is the gradient of values of one feature, so that no weights are stored.
    """
    query, key, distances, *biases = lax.stop_gradient(
        (query, key, distances, layer.content_bias[...], layer.position_bias[...])
    )

    def attention(value):
        return relative.attention(query, key, value, distances, *biases, mask=mask, implementation=layer.implementation)

    _, pull = jax.vjp(attention, jnp.zeros((*key.shape[:3], 1), query.dtype))
    return pull(jnp.ones((*query.shape[:3], 1), query.dtype))[0].astype(jnp.float32).sum((2, 3))


def most_used(used, valid, number: int):
    """Which of the valid tokens [B, T] are used most, in their order: places [B, number], and whether there is one.

    There are as many as the valid tokens have groups of T / number; the first places are none where that is fewer.
    """
    groups = valid.sum(1, keepdims=True) // (valid.shape[1] // number)
    best = lax.top_k(jnp.where(valid, used, -jnp.inf), number)[1]
    best = jnp.sort(jnp.where(jnp.arange(number)[None] < groups, best, -1), axis=1)
    return jnp.maximum(best, 0), best >= 0


class Memory(NamedTuple):
    """Keys and values of slots, which of them hold something, and of which sequences; None: there is one."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]
    valid: Bool[Array, "B S"]
    ids: Int[Array, "B S"] | None = None


def slots(layer, hidden, valid, ids=None) -> Memory:
    """A memory of inputs [B, S, D]: it trains the projections, but not the inputs."""
    hidden = lax.stop_gradient(hidden)
    return Memory(layer.key(hidden), layer.value(hidden), valid, ids)


def joined(*memories: Memory | None) -> Memory:
    """One after the other."""
    return jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *(memory for memory in memories if memory is not None))


def pushed(memory: Memory, new: Memory) -> Memory:
    """The last slots of both, as many as the memory has."""
    return jax.tree.map(lambda x: x[:, new.valid.shape[1] :], joined(memory, new))


def leaving(memory: Memory, new: Memory, used, number: int) -> tuple[Memory, Int[Array, "B G"]]:
    """Of the tokens that leave the memory with a segment the `number` that are `used` most, and their places among them."""
    size = new.valid.shape[1]
    first = jax.tree.map(lambda x: x[:, :size], joined(memory, new))
    used = used[:, -size - memory.valid.shape[1] :][:, :size]
    kept, is_kept = checkpoint_name(most_used(used, first.valid, number), relative.SAVED)
    key, value = (jnp.take_along_axis(x, kept[..., None, None], axis=1) for x in first[:2])
    return Memory(key, value, is_kept), kept


def chunk(layer, distances, reaches, number, memories, tokens, entering):
    """The attention of a chunk to what is before it, and to itself -> ((older, memory) after it, (heads, kept)).

    Args:
        number: of tokens that become slots of `older` because the chunk used them most, or None.
        tokens: hidden [B, T, D], which of them are real [B, T], and their sequences or None.
        entering: (hidden, valid) of what `older` takes up after the chunk, or None.
    """
    (older, memory), (hidden, valid, ids) = memories, tokens
    query, own = layer.query(hidden), Memory(layer.key(hidden), layer.value(hidden), valid, ids)
    seen = joined(older, memory, own)
    mask = seen.valid[:, None, None]
    if reaches is not None:
        mask &= reaches(hidden.shape[1], memory.valid.shape[1])
    heads = attend(layer, query, seen.key, seen.value, distances, mask, query_segment_ids=ids, key_segment_ids=seen.ids)
    new, kept = slots(layer, hidden, valid, ids), None
    if number is not None and hidden.shape[1] == layer.segment_length:
        entered, kept = leaving(memory, new, usage(layer, query, seen.key, distances, mask), number)
        older = pushed(older, entered)
    elif entering is not None:
        older = pushed(older, slots(layer, *entering))
    return (older, pushed(memory, new)), (heads, kept)


def attend_in_segments(layer, inputs, past, known, mask, *, reaches=None, ids=None, older=None):
    """Attention of the inputs in chunks of segment_length, each to the `past` before it and to itself.

    Args:
        layer: has `segment_length`, projections, and what `add_relative` gives.
        inputs: [B, T, D] with key padding `mask` [B, 1, 1, T] or None.
        past: [B, P, D], the inputs just before, of which the last `known` [B] are some.
        reaches: (T, P) -> bool [B, 1, T, P + T], which keys tokens see beside causality. None: the chunks are the segments,
            and the past is their memory.
        ids: [B, T], of packed sequences; None: there is one.
        older: ((hidden [B, C, D], valid [B, C]), (hidden [B, G, D], valid [B, G])), what stands before the past of the first
            chunk, and what follows it there, an equal part of it after each chunk; in place of the latter a number: as many of
            the tokens that leave the past with a segment, those that it used most. None: nothing.
    Returns: the heads [B, T, N, H]; and of every whole segment the places of those it used most, [B, I, number], counted from
        the first token that leaves with it. None where they are not asked for.
    """
    length, room = inputs.shape[1], past.shape[1]
    size = min(layer.segment_length, length)
    past_valid = jnp.arange(room)[None] >= room - known[:, None]
    past_ids = None if ids is None else jnp.zeros(past_valid.shape, ids.dtype)  # nothing of a past that is not valid counts
    before, entering = (None, None) if older is None else older
    entering, number = (None, entering) if isinstance(entering, int) else (entering, None)
    distances = encodings(layer, size + room + (0 if before is None else before[0].shape[1]))
    memories = None if before is None else slots(layer, *before), slots(layer, past, past_valid, past_ids)
    tokens, outputs, kept = (inputs, padding.real(mask, inputs), ids), [], None
    step = functools.partial(chunk, layer, distances, reaches, number)
    whole = length // size * size if length > size else 0
    if whole:
        count = whole // size
        xs = jax.tree.map(lambda x: x[:, :whole], tokens), entering
        xs = jax.tree.map(lambda x: rearrange(x, "b (i c) ... -> i b c ...", i=count), xs)
        # The backward pass projects each chunk anew, but keeps what attention gave.
        keep = jax.checkpoint_policies.save_only_these_names(relative.SAVED)
        run = jax.checkpoint(lambda memories, xs: step(memories, *xs), policy=keep, prevent_cse=False)
        memories, (heads, kept) = lax.scan(run, memories, xs)
        outputs.append(rearrange(heads, "i b c n h -> b (i c) n h"))
        kept = None if kept is None else kept.swapaxes(0, 1)
    if whole < length:
        _, (heads, last) = step(memories, jax.tree.map(lambda x: x[:, whole:], tokens), None)
        outputs.append(heads)
        kept = kept if last is None else last[:, None]  # of the one segment that there is
    return jnp.concatenate(outputs, axis=1), kept
