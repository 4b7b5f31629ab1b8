"""The models that runs train, one for each kind of task, and how many parameters they have."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from subquad import zoo
from subquad.lra import layers, optim
from subquad.lra.files import one_line, refuse
from subquad.lra.run import Run
from subquad.lra.tasks import Task
from subquad.zoo import positions
from subquad.zoo.model import Head, LMCache, pool

# Tokens that caches of one size are made for: more than any window that they keep.
ENDLESS = 2**30


class PixelEmbed(nnx.Module):
    """Pixels as numbers: the token v + 1 of the value v becomes W (2 v / most - 1) + b, most the largest value.

    Args:
        vocabulary_size: of the task: padding and the values 0..most.
        in_features: features D.
        first: the token that stands in front of the pixels and has a vector of its own; None: there is none.
    """

    def __init__(self, vocabulary_size: int, in_features: int, *, first: int | None, dtype, rngs: nnx.Rngs):
        self.most, self.first, self.dtype = vocabulary_size - 2, first, dtype
        self.linear = nnx.Linear(1, in_features, dtype=dtype, rngs=rngs)
        if first is not None:
            self.vector = nnx.Param(jnp.zeros(in_features))

    def __call__(self, tokens):
        values = (2 * (tokens - 1) / self.most - 1).astype(self.dtype)
        hidden = self.linear(values[..., None])
        if self.first is None:
            return hidden
        return jnp.where((tokens == self.first)[..., None], self.vector.get_value().astype(hidden.dtype), hidden)


class Model(nnx.Module):
    """A classifier of sequences or of pairs; with pooling "cls", a token of its own in front, and the head reads that.

    Call:
        inputs: [B, T] token ids.  mask: [B, T], True = a real token.  For a pair the same again for the other sequence.
    Returns: logits [B, num_classes], float32.
    """

    def __init__(self, run: Run, task: Task, *, rngs: nnx.Rngs):
        extra = int(run.pooling == "cls")
        self.first_token = task.vocabulary_size if extra else None
        self.is_pair = task.kind == "pair"
        dtype, embed = jnp.dtype(run.dtype), None
        if run.inputs == "continuous":
            embed = PixelEmbed(task.vocabulary_size, run.in_features, first=self.first_token, dtype=dtype, rngs=rngs)
        words = dict(
            _encoder(run, task, extra), embed=embed, pooling="first" if extra else run.pooling, rngs=rngs,
            head_features=_head_features(run, task),
        )  # fmt: skip
        if self.is_pair:
            self.classifier = zoo.DualEncoder(task.num_classes, interaction=run.interaction, **words)
        else:
            self.classifier = zoo.Classifier(task.num_classes, **words)

    def __call__(self, inputs, mask, *other, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        return self.with_losses(inputs, mask, *other, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(self, inputs, mask, *other, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        """(logits, `zoo.RouterLosses` of each sample), 0 without experts."""
        inputs, mask = self._with_first(inputs, mask)
        words = dict(mask=mask, deterministic=deterministic, rngs=rngs)
        if self.is_pair:
            second, words["other_mask"] = self._with_first(*other)
            logits, losses = self.classifier.with_losses(inputs, second, **words)
        else:
            logits, losses = self.classifier.with_losses(inputs, **words)
        return logits.astype(jnp.float32), losses

    def _with_first(self, inputs, mask):
        if self.first_token is None:
            return inputs, mask
        front = ((0, 0), (1, 0))
        return jnp.pad(inputs, front, constant_values=self.first_token), jnp.pad(mask, front, constant_values=True)


class LanguageModel(nnx.Module):
    """`zoo.CausalLM` for a task: inputs [B, T] and mask [B, T] -> logits of the next token [B, T, vocabulary], float32."""

    def __init__(self, run: Run, task: Task, *, rngs: nnx.Rngs):
        self.model = zoo.CausalLM(**_encoder(run, task, 0), rngs=rngs)
        self.end_of_document = task.end_of_document if run.documents == "apart" else None

    def __call__(self, inputs, mask, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        return self.with_losses(inputs, mask, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(self, inputs, mask, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        """(logits, `zoo.RouterLosses` of each sample), 0 without experts."""
        segments = None
        if self.end_of_document is not None:  # a document's last token is the one that ends it
            ends = inputs == self.end_of_document
            segments = jnp.cumsum(ends, axis=1) - ends
        draws = dict(deterministic=deterministic, rngs=rngs)
        logits, losses = self.model.with_losses(inputs, mask=mask, segment_ids=segments, **draws)
        return logits.astype(jnp.float32), losses

    def empty_state(self, batch_size: int) -> LMCache:
        """What `extend` begins with, of layers whose caches do not grow."""
        return self.model.init_cache(batch_size, ENDLESS)

    def extend(self, inputs, mask, state: LMCache, begins, **draws):
        """The same after the tokens that a state has seen, or, of rows that `begins` [B] says, none -> (logits, state)."""
        of_row = lambda empty, old: jnp.where(begins.reshape(-1, *(1,) * (old.ndim - 1)), empty, old)
        state = jax.tree.map(of_row, self.empty_state(len(inputs)), state)
        logits, state = self.model.extend(inputs, state, mask=mask, **draws)
        return logits.astype(jnp.float32), state


class Carrying:
    """A language model that goes on from the state in a batch: called as the model itself; `carried` is the state then."""

    def __init__(self, model: LanguageModel, batch: dict):
        self.model, self.carried, self.begins = model, batch["carried"], batch["begins"]

    def __call__(self, inputs, mask, **draws):
        logits, self.carried = self.model.extend(inputs, mask, self.carried, self.begins, **draws)
        return logits


def carrying(model: nnx.Module, batch: dict) -> Any:
    """The model, or where a state is carried one that goes on from it."""
    return model if batch.get("carried") is None else Carrying(model, batch)


class Tagger(nnx.Module):
    """An encoder and a head for each token: inputs [B, T] and mask [B, T] -> logits [B, T, num_classes], float32.

    With a bottleneck the head sees, in place of each token's features, those of the last token and where the token stands:
    sinusoidal positions are added, and the head has two hidden layers of in_features.
    """

    def __init__(self, run: Run, task: Task, *, rngs: nnx.Rngs):
        self.encoder, self.bottleneck = zoo.Encoder(**_encoder(run, task, 0), rngs=rngs), task.bottleneck
        hidden = (run.in_features, run.in_features) if task.bottleneck else _head_features(run, task)
        self.head = Head(
            run.in_features, hidden, task.num_classes, dtype=jnp.dtype(run.dtype), param_dtype=jnp.float32, rngs=rngs
        )

    def __call__(self, inputs, mask, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        return self.with_losses(inputs, mask, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(self, inputs, mask, *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None):
        """(logits, `zoo.RouterLosses` of each sample), 0 without experts."""
        hidden, losses = self.encoder.with_losses(inputs, mask=mask, deterministic=deterministic, rngs=rngs)
        if self.bottleneck:
            at = positions.sinusoidal(jnp.arange(inputs.shape[1])[None], hidden.shape[-1])
            hidden = pool(hidden, mask, "last")[:, None] + at.astype(hidden.dtype)
        return self.head(hidden).astype(jnp.float32), losses


def _encoder(run: Run, task: Task, extra: int) -> dict:
    """The options of `zoo.Encoder`, for `extra` tokens beside the task's."""
    causal = bool(task.needs_causal)
    drawn = {}
    if run.embedding_std is not None:
        drawn["embedding_init"] = functools.partial(_embedding_init, run.embedding_std, extra)
    if run.position_std is not None:
        drawn["position_init"] = nnx.initializers.normal(run.position_std)
    experts = None
    if run.num_experts:
        experts = dict(num_experts=run.num_experts, top_k=run.experts_per_token, capacity_factor=run.capacity_factor)
    return dict(
        vocab_size=task.vocabulary_size + extra, in_features=run.in_features, num_layers=run.num_layers,
        mlp_features=run.mlp_features, max_length=task.length + extra,
        mixer=layers.make(
            run.layer, run.layer_options, dtype=jnp.dtype(run.dtype), is_causal=causal, dropout_rate=run.attention_dropout_rate
        ),
        positions=run.positions, dropout_rate=run.dropout_rate, norm=run.norm, norm_order=run.norm_order,
        drop_path_rate=run.drop_path_rate, experts=experts, layer_groups=run.layer_groups,
        remat=run.remat and run.remat_policy, reversible=run.reversible, dtype=jnp.dtype(run.dtype), **drawn,
    )  # fmt: skip


def _embedding_init(std: float, extra: int, key, shape, dtype, **_):
    """Normal, but 0 for the `extra` tokens at the end, which are the model's own."""
    count, features = shape
    drawn = std * jax.random.normal(key, (count - extra, features), dtype)
    return jnp.concatenate([drawn, jnp.zeros((extra, features), dtype)])


def _head_features(run: Run, task: Task) -> tuple[int, ...]:
    """Features of the head's hidden layers."""
    if run.head == "linear":
        return (run.in_features,) if task.kind == "pair" else ()
    return (run.mlp_features, run.mlp_features // 2) if task.kind == "pair" else (run.mlp_features,)


def build(run: Run, task: Task) -> Model | LanguageModel | Tagger:
    """The model with its first parameters, drawn from run.seed."""
    kind = {"language_model": LanguageModel, "tagging": Tagger}.get(task.kind, Model)
    return kind(run, task, rngs=nnx.Rngs(run.seed))


def split(model: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """(graph, parameters, statistics of batch norms and centroids, what is fixed) of a model; the last three may be empty."""
    return nnx.split(model, nnx.Param, nnx.BatchStat, ...)


def split_as(run: Run, task: Task, model: nnx.Module) -> tuple[Any, nnx.State, nnx.State, nnx.State]:
    """`split` of the model that a run builds, with copies of the arrays of another model of the same variables.

    Raises: ValueError: it has other variables, or of other shapes.
    """
    graph, *wanted = split(nnx.eval_shape(lambda: build(run, task)))
    name = lambda path: jax.tree_util.keystr(path[1:], simple=True, separator="/")  # the first says which of the three
    flat = lambda states: {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(list(states))}
    needed, arrays = flat(wanted), flat(split(model)[1:])
    for place in needed | arrays:
        need, got = (found[place].shape if place in found else None for found in (needed, arrays))
        if need != got:
            refuse("model", f"have the variables of layer {run.layer!r} with {dict(run.layer_options)}, so {place} of {need}",
                   got, "Pass the options that it was built with.")
    filled = jax.tree.unflatten(jax.tree.structure(wanted), [jnp.copy(arrays[place]) for place in needed])
    return graph, *filled


def empty_carried(run: Run, graph, *states: nnx.State) -> LMCache | None:
    """The state before the first sequence of a split model, for each row of a batch; None where the run carries none."""
    if not run.carry_state:
        return None
    # Copies, since a step takes each buffer for itself.
    return jax.tree.map(jnp.copy, nnx.merge(graph, *states).empty_state(run.batch_size))


def check_carries(run: Run, task: Task) -> None:
    """Refuses a layer whose cache grows with the text, or ends, and one that drops weights. Raises: ValueError."""
    if rate := run.layer_options.get("dropout_rate"):
        refuse("layer_options", "have dropout_rate 0 with carry_state, as nothing inside of a layer is dropped", rate,
               "Use the run's dropout_rate.")
    small = dataclasses.replace(run, num_layers=1, layer_groups=None)
    model = nnx.eval_shape(lambda: build(small, task)).model
    shapes = lambda room: jax.tree.map(jnp.shape, jax.eval_shape(lambda: model.init_cache(1, room)))
    try:
        ends = "" if shapes(ENDLESS // 2) == shapes(ENDLESS) else "a cache that grows with the text"
    except (AttributeError, NotImplementedError, ValueError) as error:
        ends = one_line(error)
    if ends:
        refuse("carry_state", f"be left out for layer {run.layer!r}", ends,
               "Use transformer_xl, compressive, infini, local, or a layer whose state has one size, as linear, gla or mamba2.")


def count_parameters(run: Run, task: Task) -> int:
    """Trainable numbers of a run's model, those that layers share once; nothing is allocated.

    All blocks have as many, so two of them are counted.
    """
    blocks = run.layer_groups or run.num_layers
    if blocks > 2 or run.layer_groups:
        one, two = (_count(dataclasses.replace(run, num_layers=number, layer_groups=None), task) for number in (1, 2))
        return one + (blocks - 1) * (two - one)
    return _count(run, task)


def _count(run: Run, task: Task) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_abstract(run, task)))


def has_state_space(run: Run, task: Task) -> bool:
    """Whether a run's model has parameters that run.state_learning_rate is of."""
    small = dataclasses.replace(run, num_layers=1, layer_groups=None)
    paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(_abstract(small, task)))
    return any(optim.group(path, run) in ("state_space", "step") for path in paths)


def _abstract(run: Run, task: Task) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: build(run, task)), nnx.Param)


def equal_mlp_features(run: Run, reference: Run, task: Task) -> int:
    """The mlp_features, a multiple of 8, that bring a run's model closest to the parameters of `reference`'s.

    Raises: ValueError: the layer alone has more parameters than the whole reference.
    """
    target = count_parameters(reference, task)
    at = functools.cache(lambda k: count_parameters(dataclasses.replace(run, mlp_features=8 * k), task))
    best, before = 2, 1
    for _ in range(4):  # linear in the width, but for the head of a pair, which is quadratic
        slope = (at(best) - at(before)) / (best - before)
        best, before = max(1, round(best + (target - at(best)) / slope)), best
        if best == before:
            break
    if abs(at(best) - target) > 0.1 * target:
        refuse(f"layer {run.layer!r}", f"fit into {target:,} parameters to be compared", f"{at(best):,}",
               "Make it smaller by layer_options, or pass mlp_features.")
    return 8 * best
