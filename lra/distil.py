"""Attention transfer: what a converted model has anew learns to do what the attention before did, layer by layer."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subquad import zoo
from subquad.lra import progress
from subquad.lra.files import RunError, refuse
from subquad.zoo.block import real_tokens
from subquad.zoo.conversion import Converted

# Steps between two looks at the losses. Each look waits for the device.
LOSS_EVERY = 10


class MixerCall(NamedTuple):
    """A call of a mixer: which block's, what it was given, what it returned."""

    block: int
    inputs: jax.Array
    words: dict[str, Any]
    outputs: jax.Array


def distil(
    teacher: nnx.Module, converted: Converted, batches: Iterator[dict], *, steps: int, learning_rate: float,
    quiet: bool = False,
) -> list[float]:  # fmt: skip
    """Trains, in place, what `zoo.convert` drew anew, each layer on the inputs that the teacher's layer there has.

    The loss is the mean over layers of `layer_loss`. By Adam, whose learning rate falls to 0 by a cosine. Projections and
    all else stay. Nothing is done where nothing was drawn that can be trained.

    Args:
        teacher: a `models.LanguageModel`; stays as it is.
        converted: of the teacher.
        batches: of `pipeline.training_batches`.
        learning_rate: at first.
        quiet: no progress on stderr.
    Returns: the losses of all steps.
    Raises: ValueError: a reversible model, whose layers cannot be looked at.  RunError: the loss is no number any more.
    """
    if teacher.model.encoder.reversible:
        refuse("distil: model", "not be reversible, whose layers' inputs are not at hand", "a reversible one",
               "Leave distillation out: 0 steps.")
    new = {f"{change.path}/{name}" for change in converted.changes for name in change.new}
    is_new = lambda path, value: isinstance(value, nnx.Param) and "/".join(map(str, path)) in new
    graph, learned, others = nnx.split(converted.model, is_new, ...)
    if not jax.tree.leaves(learned):
        return []
    teacher_graph, teacher_state = nnx.split(teacher)
    befores = [block.mixer for block in teacher.model.encoder.blocks]
    optimiser = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(learned, memory, others, teacher_state, batch):
        calls = mixer_calls(nnx.merge(teacher_graph, teacher_state), batch)

        def loss(learned):
            blocks = nnx.merge(graph, learned, others, copy=True).model.encoder.blocks
            return sum(layer_loss(befores[call.block], blocks[call.block].mixer, call) for call in calls) / len(calls)

        value, gradient = jax.value_and_grad(loss)(learned)
        updates, memory = optimiser.update(gradient, memory)
        return optax.apply_updates(learned, updates), memory, value

    memory, losses, began = optimiser.init(learned), [], time.perf_counter()
    with progress.Progress("distillation", steps, quiet=quiet) as shown:
        while len(losses) < steps:
            now = []
            for batch in itertools.islice(batches, min(LOSS_EVERY, steps - len(losses))):
                batch = {name: batch[name] for name in ("inputs", "mask")}
                learned, memory, value = step(learned, memory, others, teacher_state, batch)
                now.append(value)
            losses += map(float, now)  # waits for the device
            if not math.isfinite(losses[-1]):
                raise RunError(
                    f"distil: loss must be finite, got {losses[-1]} by step {len(losses)}. Use a smaller learning rate."
                )
            shown.update(len(losses), losses[-1], len(losses) / (time.perf_counter() - began))
    nnx.update(converted.model, learned)
    return losses


def mixer_calls(model: nnx.Module, batch: dict) -> list[MixerCall]:
    """The calls of all mixers in a forward pass without dropout. The model's mixers are wrapped: pass a copy."""
    calls: list[MixerCall] = []

    def recording(block: int, mixer: nnx.Module):
        def call(inputs, *, deterministic, rngs, **words):
            outputs = mixer(inputs, deterministic=deterministic, rngs=rngs, **words)
            calls.append(MixerCall(block, inputs, words, outputs))
            return outputs

        return call

    encoder = model.model.encoder
    encoder.remat = False  # nothing is computed again: there is no gradient here
    for at, block in enumerate(encoder.blocks):
        block.mixer = recording(at, block.mixer)
    model(batch["inputs"], batch["mask"], deterministic=True)
    return calls


def layer_loss(before: nnx.Module, after: nnx.Module, call: MixerCall) -> jax.Array:
    """How far a layer is from the one before it, on the inputs of that.

    From softmax to a layer that has a `distillation_loss`, as Hedgehog's, and the same projections, it is this: the
    cross-entropy of the weights. Else it is the mean square error of the outputs of real tokens, as a part of the outputs'
    mean square: 0 of the same outputs, 1 of none.
    """
    if can_compare_weights(before, after):
        return after.distillation_loss(call.inputs, **call.words)
    outputs = after(call.inputs, deterministic=True, rngs=None, **call.words)
    real = real_tokens(call.inputs, call.words.get("mask"))
    weights = 1.0 if real is None else real[..., None].astype(jnp.float32)
    error, whole = ((weights * x.astype(jnp.float32) ** 2).sum() for x in (outputs - call.outputs, call.outputs))
    return error / jnp.maximum(whole, 1e-30)


def can_compare_weights(before: nnx.Module, after: Any) -> bool:
    if not isinstance(before, zoo.SoftmaxAttention) or not hasattr(after, "distillation_loss"):
        return False
    made = lambda layer: (layer.query.kernel.shape, layer.key.kernel.shape, layer.rotary_base)
    return made(before) == made(after)
