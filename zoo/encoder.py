"""The encoder inside every model: token embedding, positions, blocks, final normalisation."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.linear import default_embed_init
from jaxtyping import Array, Bool, Float, Int

from subquad.zoo import positions as encodings
from subquad.zoo import registry, reversible
from subquad.zoo.block import NORMS, Block, Norm, Order, normalise, real_tokens
from subquad.zoo.checks import check_dtypes, check_flags, check_rngs, check_sizes, check_word, refuse
from subquad.zoo.dropout import Dropout
from subquad.zoo.experts import RouterLosses, add, no_losses
from subquad.zoo.linen import call_rngs

POSITIONS = ("learned", "sinusoidal", None)
Mixer = str | Callable[..., nnx.Module]
Remat = bool | Literal["nothing", "dots", "dots_with_no_batch_dims"]
# What a backward pass finds kept of each block.
POLICIES = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class EncoderOptions(TypedDict, total=False):
    """The options of `Encoder`, which every model takes."""

    vocab_size: int | None
    in_features: int
    num_layers: int
    mlp_features: int
    max_length: int
    mixer: Mixer | Sequence[Mixer]
    mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
    positions: Literal["learned", "sinusoidal"] | None
    dropout_rate: float
    drop_path_rate: float
    norm: Norm
    norm_order: Order
    experts: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
    layer_groups: int | Sequence[int] | None
    remat: Remat
    reversible: bool
    embed: nnx.Module | None
    embedding_init: nnx.Initializer
    position_init: nnx.Initializer
    dtype: Any
    param_dtype: Any


class Encoder(nnx.Module):
    """Token embedding, positions, blocks, final normalisation: tokens [B, T] -> features [B, T, D].

    Args:
        vocab_size: token ids are 0..vocab_size-1. None: what `embed` takes.
        in_features: features D.
        num_layers: number of layers, each of which runs a block.
        mlp_features: features inside the feed-forward networks; 0 leaves them out.
        max_length: longest sequence with learned positions; other positions have no bound.
        mixer: a name in `zoo.LAYERS`, or a function (in_features=..., rngs=...) -> layer; or a sequence of them, one for each
            layer: ["local", "local", "softmax"], or [choose(i) for i in range(num_layers)]. The layer is called with the words
            mask=, deterministic= and rngs=, and with segment_ids= where they are given.
        mixer_options: the named layer's options, for every layer alike; or a sequence, one mapping (None: no options) for each
            layer. A dtype among them is the layer's own. A function has none.
        positions: "learned" or "sinusoidal" encodings added to the embeddings, or None.
        dropout_rate: of embeddings and in blocks; `train()` and `eval()` turn it on and off, off to begin with.
        drop_path_rate: probability that a sample goes past the halves of the last block; layer l of L has l / L of it.
        norm, norm_order: see `Block`; with "pre" and "macaron" one more norm stands at the end.
        experts: options of `Experts`, which take the place of the feed-forward networks, for every layer alike:
            dict(num_experts=8, top_k=2); or a sequence, one mapping (None: one network for all tokens) for each layer.
        layer_groups: layers that share their weights: a number G of groups of consecutive layers, each of one block; or the
            number of each layer's block, [0, 1, 0, 1]. Parameters are counted once; FLOPs, activations and caches are those of
            num_layers. `mixer`, `mixer_options` and `experts` then have an entry for each block. Needs drop_path_rate 0, which
            grows by layers. Source: Lan et al., ALBERT, 2019, arXiv 1909.11942.
        remat: the backward pass computes each block anew and keeps only what is between blocks; same values, less memory, but
            on a CPU, where XLA takes it back. A name says what else is kept: "nothing" (as True), "dots" (products of
            matrices), "dots_with_no_batch_dims" (those with weights, not the scores of attention); see
            `jax.checkpoint_policies`. What a mixer of the user's writes into itself in a call (`sow`, counters) is then lost;
            statistics are kept.
        reversible: blocks are reversible residual layers of two streams, mixer and network the halves, whose mean goes on: the
            backward pass keeps no activations at all and rebuilds them from the outputs. Another function than that of
            plain blocks. Needs norm_order "pre", a norm that is no batch norm, and feed-forward networks. What a mixer writes
            into itself in a call is lost, but statistics (`nnx.BatchStat`).
        embed: takes the place of the token embedding: tokens [B, T] -> features [B, T, D]. Where it has `num_embeddings`,
            ids are below that; without vocab_size too, it decides itself what it takes. It sees padding's ids too: what it
            returns there counts for nothing, but a parameter that it multiplies with NaN there has a NaN gradient.
        embedding_init, position_init: initializers of the token embedding and of the learned positions.
    Call:
        tokens: [B, T] integers. An id out of range raises a ValueError where its value is known; under `jax.jit` it is not,
            and the token is NaN there, and so may be others of its sample: a wrong answer must not look like one. Padding may
            hold any id.
        mask: [B, T], True = a real token, False = padding, at any place: positions count real tokens, and features of
            padding are set to 0 before the blocks.
        segment_ids: [B, T] integers, for several sequences packed into one: tokens of different segments do not see each
            other, and positions count from 0 in each. The tokens of a segment follow each other. The mixers must support it.
        deterministic: without dropout, and with running statistics; None takes what `train()` or `eval()` set.
        rngs: `rngs.dropout()` draws the dropout; inside a Linen module its "dropout" collection does where this is None.
    Raises:
        ValueError: unknown mixer or positions; num_layers, mlp_features or a rate out of range; a mixer with other features out
            than in; not one mixer for each block; layer_groups that name no block, or leave one out; a token id out of range;
            with learned positions, a sequence longer than max_length; segment_ids that a mixer or experts cannot honour.
        TypeError: unknown mixer option; tokens, mask or segment_ids that are no arrays.
    """

    def __init__(
        self,
        vocab_size: int | None,
        in_features: int,
        *,
        num_layers: int,
        mlp_features: int,
        max_length: int,
        mixer: Mixer | Sequence[Mixer] = "softmax",
        mixer_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        positions: Literal["learned", "sinusoidal"] | None = "learned",
        dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm: Norm = "layer",
        norm_order: Order = "pre",
        experts: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        layer_groups: int | Sequence[int] | None = None,
        remat: Remat = False,
        reversible: bool = False,
        embed: nnx.Module | None = None,
        embedding_init: nnx.Initializer = default_embed_init,
        position_init: nnx.Initializer = default_embed_init,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs("Encoder", rngs)
        check_dtypes("Encoder", dtype=dtype, param_dtype=param_dtype)
        check_sizes("Encoder", in_features=in_features, num_layers=num_layers)
        check_sizes("Encoder", 0, mlp_features=mlp_features)
        if embed is None or vocab_size is not None:
            check_sizes("Encoder", vocab_size=vocab_size)
        embeddings: Any = getattr(embed, "num_embeddings", vocab_size)
        if vocab_size not in (None, embeddings):
            refuse("Encoder", "vocab_size", vocab_size, f"be None, or embed's num_embeddings = {embeddings}",
                   "Change one of the two.")
        if positions == "learned":
            check_sizes("Encoder", max_length=max_length)
        if positions not in POSITIONS:
            refuse("Encoder", "positions", repr(positions), f"be one of {POSITIONS}", "Use mixer_options for the mixer's own.")
        if positions == "sinusoidal" and in_features % 2:
            refuse("Encoder", "in_features", in_features, "be even with positions='sinusoidal'", "Use one feature more.")
        if (features := getattr(embed, "features", in_features)) != in_features:
            refuse("Encoder", "embed", f"{features} features", f"have in_features = {in_features}", "Change one of the two.")
        check_flags("Encoder", reversible=reversible)
        for name, given, is_idle, when in (
            ("embedding_init", embedding_init, embed is not None, "with embed"),
            ("position_init", position_init, positions != "learned", f"with positions={positions!r}"),
        ):
            if is_idle and given is not default_embed_init:
                refuse("Encoder", name, "an initializer", f"be left out {when}", "It would draw nothing.")
        if reversible:
            check_reversible(norm_order, norm, mlp_features, remat)
        dtypes = dict(dtype=dtype, param_dtype=param_dtype)

        def build(mixer, options):
            if callable(mixer):
                return mixer(in_features=in_features, rngs=rngs)
            return registry.make(mixer, in_features=in_features, rngs=rngs, **{**dtypes, **options})

        if not isinstance(remat, bool):
            check_word("Encoder", "remat", remat, POLICIES)
        self.order = blocks_of_layers(num_layers, layer_groups)
        if drop_path_rate and len(set(self.order)) < num_layers:
            refuse("Encoder", "drop_path_rate", drop_path_rate, "be 0 with layer_groups", "It is another one at each layer.")
        blocks = max(self.order) + 1
        mixers = mixers_of_layers(mixer, mixer_options, blocks)
        every = per_layer("experts", experts, lambda x: x is None or isinstance(x, Mapping), "a mapping or None", blocks)
        self.in_features, self.max_length, self.position_kind = in_features, max_length, positions
        self.remat, self.reversible = remat, reversible
        table = functools.partial(nnx.Embed, features=in_features, **dtypes, rngs=rngs)
        self.embed: Any = table(num_embeddings=embeddings, embedding_init=embedding_init) if embed is None else embed
        self.vocab_size: Any = embeddings
        if positions == "learned":
            self.positions = table(num_embeddings=max_length, embedding_init=position_init)
        self.dropout = Dropout("Encoder", dropout_rate)
        self.blocks = nnx.List(
            Block(
                build(*one), in_features, mlp_features=mlp_features, dropout_rate=dropout_rate, norm=norm,
                norm_order=norm_order, drop_path_rate=drop_path_rate * (at + 1) / blocks, experts=options, **dtypes, rngs=rngs,
            )
            for at, (one, options) in enumerate(zip(mixers, every, strict=True))
        )
        self.norm = NORMS[norm](in_features, **dtypes, rngs=rngs) if norm_order != "post" else None

    @property
    def layers(self) -> list[Block]:
        """The block of each layer, one after the other."""
        return [self.blocks[at] for at in self.order]

    def embed_at(self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"], mask) -> Float[Array, "B T D"]:
        """Embeddings of tokens at positions: 0 of padding, NaN of a token whose id or position is out of range."""
        hidden = self.embed(tokens)
        positions = jnp.maximum(positions, 0)  # padding in front stands at -1
        if self.position_kind == "learned":
            hidden = hidden + self.positions(positions)
            hidden = jnp.where((positions < self.max_length)[..., None], hidden, jnp.nan)
        elif self.position_kind == "sinusoidal":
            hidden = hidden + encodings.sinusoidal(positions, self.in_features).astype(hidden.dtype)
        if self.vocab_size is not None:
            hidden = jnp.where(is_within(tokens, self.vocab_size)[..., None], hidden, jnp.nan)
        return hidden if mask is None else jnp.where(mask[..., None], hidden, 0)

    def __call__(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        return self.with_losses(tokens, mask=mask, segment_ids=segment_ids, deterministic=deterministic, rngs=rngs)[0]

    def with_losses(
        self, tokens: Int[Array, "B T"], *, mask: Bool[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None, deterministic: bool | None = None, rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterLosses]:
        """What a call returns, and the losses of each sample, summed over all routers; 0 without experts."""
        self.check(tokens, mask, segment_ids)
        hidden = self.embed_at(tokens, encodings.positions_of_real(tokens, mask, segment_ids), mask)
        return self.transform(hidden, mask, segment_ids, deterministic, rngs)

    def transform(self, hidden: Float[Array, "B T D"], mask, segment_ids, deterministic, rngs):
        """What follows the embeddings, dropout, blocks and the last norm -> (features, losses of the experts' routers)."""
        rngs = call_rngs(rngs, "Encoder")
        hidden = self.dropout(hidden, deterministic=deterministic, rngs=rngs)
        is_deterministic = bool(self.dropout.deterministic if deterministic is None else deterministic)
        call = dict(mask=None if mask is None else mask[:, None, None, :])
        if segment_ids is not None:  # a mixer of the user's may not know the word
            call["segment_ids"] = segment_ids
        hidden, losses = self.run_blocks(hidden, call, is_deterministic, rngs)
        real = real_tokens(hidden, call["mask"])
        return self.last_norm(hidden, real, is_deterministic), losses

    def last_norm(self, hidden: Float[Array, "B T D"], real=None, deterministic: bool = True) -> Float[Array, "B T D"]:
        """The norm after all blocks, where there is one."""
        return hidden if self.norm is None else normalise(self.norm, hidden, real, deterministic)

    def run_blocks(self, hidden, call: dict[str, Any], deterministic: bool, rngs: nnx.Rngs | None, layers=None):
        """Features through some layers, or all -> (features before the last norm, losses of the experts' routers)."""
        layers = self.layers if layers is None else layers
        if self.reversible:
            return reversible.through(layers, hidden, call, deterministic, rngs)
        run = lambda block, hidden, rngs: block.with_losses(hidden, deterministic=deterministic, rngs=rngs, **call)
        if self.remat:
            run = nnx.remat(run, policy=POLICIES["nothing" if self.remat is True else self.remat])
        losses = no_losses(hidden.shape[:1])
        for block in layers:
            # nnx.remat writes every variable back, which those made outside of the caller's jax.grad do not allow: a copy.
            used = nnx.clone(block) if self.remat else block
            hidden, more = run(used, hidden, rngs)
            losses = add(losses, more)
            if self.remat and not deterministic:
                nnx.update(block, nnx.state(used, nnx.BatchStat))
        return hidden, losses

    def extend_blocks(
        self, hidden: Float[Array, "B T D"], caches: Sequence[Any], mask: Bool[Array, "B 1 1 T"] | None, *,
        deterministic: bool = True, rngs: nnx.Rngs | None = None,
    ):  # fmt: skip
        """T more tokens through all blocks and the last norm, after those in the mixers' caches -> (features, caches)."""
        run = reversible.extend if self.reversible else extend
        draws = dict[str, Any](deterministic=deterministic, rngs=call_rngs(rngs, "Encoder"))
        hidden, caches = run(self.layers, self.dropout(hidden, **draws), caches, mask, **draws)
        return self.last_norm(hidden), caches

    def check(self, tokens, mask=None, segment_ids=None, owner="Encoder", name="tokens", mask_name="mask") -> None:
        """Refuses what a call of the model cannot take."""
        check_tokens(owner, name, tokens, mask, segment_ids, vocab_size=self.vocab_size, mask_name=mask_name)
        if self.position_kind == "learned" and tokens.shape[1] > self.max_length:
            refuse(owner, name, tokens.shape[1], f"have length <= max_length = {self.max_length}",
                   "Truncate them, or construct the model with a larger max_length.")


def check_reversible(norm_order: str, norm: str, mlp_features: int, remat: Remat) -> None:
    """Refuses what reversible blocks cannot have."""
    cure = "Leave reversible out, or change it."
    if norm_order != "pre":
        refuse("Encoder", "norm_order", norm_order, "be 'pre' with reversible", cure)
    if norm == "batch":
        refuse("Encoder", "norm", norm, "be no batch norm with reversible", cure)
    if not mlp_features:
        refuse("Encoder", "mlp_features", mlp_features, "be positive with reversible", cure)
    if remat:
        refuse("Encoder", "remat", remat, "be False with reversible", cure)


def extend(blocks, hidden, caches, mask, **draws):
    """One block after the other; see `Block.extend`."""
    extended = []
    for block, cache in zip(blocks, caches, strict=True):
        hidden, cache = block.extend(hidden, cache, mask=mask, **draws)
        extended.append(cache)
    return hidden, tuple(extended)


def blocks_of_layers(num_layers: Any, layer_groups: int | Sequence[int] | np.ndarray | None) -> tuple[int, ...]:
    """The number of the block that each layer runs."""
    check_sizes("Encoder", num_layers=num_layers)
    if layer_groups is None:
        return tuple(range(num_layers))
    layer_groups = layer_groups.tolist() if isinstance(layer_groups, np.ndarray) else layer_groups
    is_integer = lambda at: isinstance(at, int | np.integer) and not isinstance(at, bool)
    if isinstance(layer_groups, Sequence):
        order = tuple(layer_groups)
        if len(order) != num_layers or not all(map(is_integer, order)) or set(order) != set(range(max(order) + 1)):
            refuse("Encoder", "layer_groups", list(order), f"name the blocks 0, 1, ... of {num_layers} layers, none left out",
                   "Number the blocks as they come: [0, 1, 0, 1].")
        return tuple(map(int, order))
    if not is_integer(layer_groups) or layer_groups < 1 or num_layers % layer_groups:
        refuse("Encoder", "layer_groups", repr(layer_groups), f"be a positive integer that divides num_layers = {num_layers}",
               "1 is one block for all; or name the block of each layer.")
    return tuple(at * layer_groups // num_layers for at in range(num_layers))


def per_layer(name: str, value, is_one: Callable[[Any], bool], kind: str, layers: int) -> list[Any]:
    """A value for each layer, of one for all or a sequence."""
    if is_one(value):
        return [value] * layers
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(map(is_one, value)):
        raise TypeError(f"Encoder: {name} must be {kind}, or a sequence of them, got {value!r}. Pass one for each layer.")
    if len(value) != layers:
        refuse("Encoder", name, f"{len(value)} for {layers} layers", "have one entry for each layer",
               "Repeat entries, or change num_layers; layers that share weights have one entry.")
    return list(value)


def mixers_of_layers(mixer, mixer_options, layers: int) -> list[tuple[Mixer, dict[str, Any]]]:
    """The mixer of each layer and its options."""
    mixers = per_layer("mixer", mixer, lambda x: isinstance(x, str) or callable(x), "a name or a function", layers)
    is_options = lambda x: x is None or isinstance(x, Mapping)
    every = per_layer("mixer_options", mixer_options, is_options, "a mapping or None", layers)
    for one, options in zip(mixers, every, strict=True):
        if isinstance(one, nnx.Module):
            refuse("Encoder", "mixer", f"a {type(one).__name__}", "be a name or a function that builds a layer, not a layer",
                   "Bind its options with functools.partial: each block builds its own.")
        for word in {"in_features", "rngs"} & set(options or {}):
            refuse("Encoder", "mixer_options", word, "leave in_features and rngs out", "The encoder passes its own.")
        if callable(one) and options:
            refuse("Encoder", "mixer_options", dict(options), "be empty when mixer is a function",
                   "Bind them with functools.partial.")
    return [(one, dict(options or {})) for one, options in zip(mixers, every, strict=True)]


def check_tokens(
    owner: str, name: str, tokens, mask=None, segment_ids=None, *, vocab_size: int | None, mask_name: str = "mask"
) -> None:
    """Refuses tokens that are not integers [B, T], ids out of range at real tokens, and a mask or segments of another shape."""
    for word, array in ((name, tokens), (mask_name, mask), ("segment_ids", segment_ids)):
        if array is not None and not hasattr(array, "shape"):
            raise TypeError(f"{owner}: {word} must be an array [B, T], got {type(array).__name__}. Use jnp.asarray({word}).")
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        refuse(owner, name, f"{tokens.dtype} {tokens.shape}", "be integers of shape [B, T]", "Pad and stack them.")
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != bool):
        refuse(owner, mask_name, f"{mask.dtype} {mask.shape}", f"be boolean of shape [B, T] = {tokens.shape}",
               "True = a real token.")
    if segment_ids is not None and (
        segment_ids.shape != tokens.shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        refuse(owner, "segment_ids", f"{segment_ids.dtype} {segment_ids.shape}",
               f"be integers of shape [B, T] = {tokens.shape}", "Broadcast them.")
    if vocab_size is not None and (wrong := first_outside(tokens, vocab_size, mask)) is not None:
        refuse(owner, name, wrong, f"be in 0..{vocab_size - 1}", "Padding may hold any id where mask is False.")


def is_known(array) -> bool:
    """Whether this process can look at the values: they are not traced, and none is on another process's devices."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def first_outside(values: Int[Array, "B T"], bound: int, mask: Bool[Array, "B T"] | None) -> int | None:
    """The first value of a real token outside 0..bound-1; None where there is none, or where values are not known."""
    if not is_known(values) or not is_known(mask):
        return None
    known = np.asarray(values)
    wrong = (known < 0) | (known >= bound)
    if mask is not None:
        wrong &= np.asarray(mask)
    return int(known[wrong][0]) if wrong.any() else None


def is_within(values: Int[Array, "B T"], bound: int) -> Bool[Array, "B T"]:
    """True where 0 <= value < bound."""
    if values.dtype.itemsize < 4:  # so that the bound fits
        values = values.astype(jnp.int32)
    return (values >= 0) & (values < bound)
