"""The residual block around a mixer: norms, dropout, stochastic depth, feed-forward networks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Bool, Float

from subquad.kernels import precision
from subquad.zoo.checks import (
    check_activation,
    check_dtypes,
    check_flags,
    check_rate,
    check_rngs,
    check_sizes,
    check_word,
    refuse,
    unsupported,
)
from subquad.zoo.dropout import Dropout
from subquad.zoo.experts import Experts, RouterLosses, add, no_losses
from subquad.zoo.linen import call_rngs
from subquad.zoo.options import check_complete, check_options, options_of

# As torch's BatchNorm1d has it, where it is called 0.1: how much of a running average stays at a batch.
MOMENTUM = 0.9
Norm = Literal["layer", "rms", "batch", "scale"]
Order = Literal["pre", "post", "macaron"]


class ScaleNorm(nnx.Module):
    """Features of one length, which is learned, at every position: g x / max(|x|, 1e-5), g = sqrt(D) at the start.

    Source: Nguyen and Salazar, Transformers without Tears, 2019, arXiv 1910.05895, section 2.2.
    """

    def __init__(self, num_features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.full((), num_features**0.5, param_dtype))
        self.dtype = dtype

    def __call__(self, inputs: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        inputs, scale = promote_dtype((inputs, self.scale[...]), dtype=self.dtype)
        wide = precision.wide(inputs)
        # The bound inside of the root: the slope of |x| at 0 is none.
        over = jax.lax.rsqrt(jnp.maximum(jnp.sum(wide**2, -1, keepdims=True), 1e-10))
        return (wide * over).astype(inputs.dtype) * scale


NORMS: dict[str, Callable[..., Any]] = {
    "layer": nnx.LayerNorm,
    "rms": nnx.RMSNorm,
    # In two passes: the difference of two means is wrong where the mean is large.
    "batch": functools.partial(nnx.BatchNorm, use_running_average=True, momentum=MOMENTUM, use_fast_variance=False),
    "scale": ScaleNorm,
}
ORDERS = ("pre", "post", "macaron")


def real_tokens(inputs: Float[Array, "*B T D"], mask: Bool[Array, "..."] | None) -> Bool[Array, "*B T"] | None:
    """The tokens that a mixer's mask leaves; where it is no key padding [*B, 1, 1, T], None: all of them."""
    if mask is None or mask.shape[-3:-1] != (1, 1):
        return None
    return jnp.broadcast_to(mask[..., 0, 0, :], inputs.shape[:-1])


def normalise(
    norm, inputs: Float[Array, "*B T D"], real: Bool[Array, "*B T"] | None, deterministic: bool | None
) -> Float[Array, "*B T D"]:
    """The norm of features; a batch norm's statistics are running ones where deterministic, else of the `real` tokens."""
    if not isinstance(norm, nnx.BatchNorm):
        return norm(inputs)
    # Of none there is no mean.
    mask = None if real is None else real[..., None] | ~real.any()
    return norm(inputs, use_running_average=deterministic, mask=mask)


class FeedForward(nnx.Module):
    """Two linear maps with an activation between, the same at every position.

        y_t = W_2 dropout(f(W_1 x_t + b_1)) + b_2,    with a gate    W_2 dropout(f(W_1 x_t + b_1) * (W_3 x_t + b_3)) + b_2

    Args:
        in_features: features D of the input and output.
        mlp_features: features between.
        activation: f.
        is_gated: there is a W_3.
        use_bias: there are biases.
        dropout_rate: of the features between.
    """

    def __init__(
        self, in_features: int, mlp_features: int, *, activation: Callable[[Any], Any] = nnx.gelu, is_gated: bool = False,
        use_bias: bool = True, dropout_rate: float = 0.0, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_rngs("FeedForward", rngs)
        check_dtypes("FeedForward", dtype=dtype, param_dtype=param_dtype)
        check_sizes("FeedForward", in_features=in_features, mlp_features=mlp_features)
        check_rate("FeedForward", dropout_rate)
        check_activation("FeedForward", activation)
        check_flags("FeedForward", is_gated=is_gated, use_bias=use_bias)
        options: dict[str, Any] = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.activation = activation
        self.inner = nnx.Linear(in_features, mlp_features, **options)
        self.gate = nnx.Linear(in_features, mlp_features, **options) if is_gated else None
        self.outer = nnx.Linear(mlp_features, in_features, **options)
        self.dropout = Dropout("FeedForward", dropout_rate)

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*B T D"]:
        hidden = self.activation(self.inner(inputs))
        hidden = hidden if self.gate is None else hidden * self.gate(inputs)
        return self.outer(self.dropout(hidden, deterministic=deterministic, rngs=call_rngs(rngs, "FeedForward")))


def check_experts(options: Any) -> None:
    """Refuses what are no options of `Experts`."""
    if not isinstance(options, Mapping):
        raise TypeError(f"Block: experts must be a mapping or None, got {options!r}. Pass dict(num_experts=8).")
    check_options("Experts", options, options_of(Experts))
    check_complete("Experts", Experts, {"in_features", "mlp_features", "rngs", *options})


class Block(nnx.Module):
    """Residual block, with the norm before mixer and network, or after the sums.

        h = x + d(mixer(norm(x)))           y = h + d(ffn(norm(h)))                                    norm_order "pre"
        h = norm(x + d(mixer(x)))           y = norm(h + d(ffn(h)))                                    norm_order "post"
        g = x + d(ffn_1(norm(x))) / 2       h = g + d(mixer(norm(g)))    y = h + d(ffn(norm(h))) / 2   norm_order "macaron"

    d is dropout of features, then of the whole of what is added (stochastic depth), a sample at a time.

    Args:
        mixer: any layer of the zoo with D features in and out.
        in_features: features D.
        mlp_features: features inside the feed-forward networks; 0 leaves them out.
        dropout_rate: probability of dropping an output feature of mixer or network, or a feature inside the latter; `train()`
            and `eval()` turn it on and off, off to begin with.
        drop_path_rate: probability p that a sample goes past the mixer, and past each network; what is added is divided by
            1 - p in training, where the paper multiplies by it in evaluation.
        norm: "layer", "rms", "batch" or "scale" (`ScaleNorm`). A batch norm takes mean and variance over samples and real
            tokens, padding left out, and moves its running ones a tenth of the way; where deterministic it uses these. They are
            `nnx.BatchStat`.
        norm_order: "pre", "post" or "macaron".
        experts: options of `Experts`, which then are the networks: dict(num_experts=8, top_k=2). None: one for all tokens.
    Raises: ValueError: mlp_features or a rate out of range; no networks in a macaron, or with experts; an unknown norm or
        order; a mixer whose out_features are not in_features.
    Source: stochastic depth: Huang et al., 2016, arXiv 1603.09382. Macaron: Lu et al., 2019, arXiv 1906.02762, whose norms
        stand after the sums; Gulati et al., Conformer, 2020, arXiv 2005.08100, has them before, as here.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        in_features: int,
        *,
        mlp_features: int,
        dropout_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm: Norm = "layer",
        norm_order: Order = "pre",
        experts: Mapping[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rngs("Block", rngs)
        check_dtypes("Block", dtype=dtype, param_dtype=param_dtype)
        check_sizes("Block", in_features=in_features)
        check_sizes("Block", 0, mlp_features=mlp_features)
        check_rate("Block", dropout_rate)
        check_rate("Block", drop_path_rate, "drop_path_rate")
        check_word("Block", "norm", norm, NORMS)
        check_word("Block", "norm_order", norm_order, ORDERS)
        if experts is not None:
            check_experts(experts)
        for name, asked in (("norm_order='macaron'", norm_order == "macaron"), ("experts", experts is not None)):
            if asked and not mlp_features:
                refuse("Block", "mlp_features", 0, f"be positive with {name}", "It is the width of the feed-forward networks.")
        out_features = getattr(mixer, "out_features", in_features)
        if out_features != in_features:
            refuse("Block", "mixer", f"out_features = {out_features}", f"have out_features = in_features = {in_features}",
                   "Leave out_features out of its options.")
        self.mixer: Any = mixer  # of the user's, too, who need not write `extend`
        self.norm_order, dtypes = norm_order, dict[str, Any](dtype=dtype, param_dtype=param_dtype)
        kind = FeedForward if experts is None else functools.partial(Experts, **experts)
        network = functools.partial(kind, in_features, mlp_features, dropout_rate=dropout_rate, **dtypes, rngs=rngs)
        self.mixer_norm = NORMS[norm](in_features, **dtypes, rngs=rngs)
        self.has_mlp = mlp_features > 0
        if self.has_mlp:
            self.mlp_norm = NORMS[norm](in_features, **dtypes, rngs=rngs)
            self.mlp = network()
        if norm_order == "macaron":
            self.first_norm = NORMS[norm](in_features, **dtypes, rngs=rngs)
            self.first_mlp = network()
        # The caller's rngs, not a stored stream: a block holds no state that a call would change.
        self.dropout = Dropout("Block", dropout_rate)
        self.drop_path = Dropout("Block", drop_path_rate, broadcast_dims=(-2, -1))

    @property
    def capacity_factor(self) -> float | None:
        """That of its experts; None where every token is treated as if it were alone."""
        return getattr(self.mlp, "capacity_factor", None) if self.has_mlp else None

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **call
    ) -> Float[Array, "*B T D"]:
        """`call` holds the mixer's mask, positions and segment_ids; padding that the mask hides is in no batch's statistics.

        Without dropout where `deterministic`; None takes what `train()` or `eval()` set. With it, `rngs.dropout()` draws;
        inside a Linen module its "dropout" collection does where `rngs` is None.
        """
        return self.with_losses(inputs, deterministic=deterministic, rngs=rngs, **call)[0]

    def with_losses(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **call
    ) -> tuple[Float[Array, "*B T D"], RouterLosses]:
        """What a call returns, and the losses of its experts' routers, 0 without experts.

        Raises: ValueError: segment_ids where experts have a capacity, which the sequences of a sample would share.
        """
        if self.capacity_factor is not None and call.get("segment_ids") is not None:
            unsupported("Block", "segment_ids", f"its experts' capacity_factor = {self.capacity_factor} is of the whole sample",
                        "Use experts with capacity_factor=None.")
        rngs = call_rngs(rngs, "Block")
        if deterministic is None:  # a mixer of the user's may know True and False only
            deterministic = self.dropout.deterministic
        draws: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        real, losses = real_tokens(inputs, call.get("mask")), no_losses(inputs.shape[:-2])

        def feed(network, hidden):
            nonlocal losses
            added, more = self._fed(network, hidden, draws, real)
            losses = add(losses, more)
            return added

        return self._sums(inputs, lambda hidden: self.mix(hidden, draws, call), feed, real, deterministic), losses

    def mix(self, hidden, draws: dict[str, Any], call: dict[str, Any]):
        """What the mixer adds, in the stream's dtype, whatever it computes in; `draws` holds deterministic and rngs."""
        return self.dropped(self.mixer(hidden, **draws, **call).astype(hidden.dtype), draws)

    def feed(self, hidden, draws: dict[str, Any], real: Bool[Array, "*B T"] | None = None):
        """(what the feed-forward network after the mixer adds, losses of its router)."""
        return self._fed(self.mlp, hidden, draws, real)

    def _fed(self, network, hidden, draws: dict[str, Any], real: Bool[Array, "*B T"] | None):
        if isinstance(network, Experts):
            added, losses = network.with_losses(hidden, mask=real, **draws)
        else:
            added, losses = network(hidden, **draws), no_losses(hidden.shape[:-2])
        return self.dropped(added, draws), losses

    def dropped(self, added, draws: dict[str, Any]):
        """What a mixer or network adds, after dropout of features and of samples."""
        return self.drop_path(self.dropout(added, **draws), **draws)

    def _sums(self, hidden, mix, feed, real, deterministic):
        """The residual sums; mix(hidden) and feed(network, hidden) are what is added."""
        norms, half = dict(real=real, deterministic=deterministic), self.norm_order == "macaron"

        def residual(norm, function, inputs):
            if self.norm_order == "post":
                return normalise(norm, inputs + function(inputs), **norms)
            return inputs + function(normalise(norm, inputs, **norms))

        if half:
            hidden = residual(self.first_norm, lambda hidden: feed(self.first_mlp, hidden) / 2, hidden)
        hidden = residual(self.mixer_norm, mix, hidden)
        if not self.has_mlp:
            return hidden
        return residual(self.mlp_norm, lambda hidden: feed(self.mlp, hidden) / (2 if half else 1), hidden)

    def extend(
        self, inputs: Float[Array, "B T D"], cache, *, mask=None, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ):
        """T more tokens after those in the mixer's `cache` -> (outputs, cache); the mixer drops nothing itself.

        Raises: ValueError: experts with a capacity, which depends on the length of the whole.
        """
        if self.capacity_factor is not None:
            unsupported("Block", "extend", f"its experts' capacity_factor = {self.capacity_factor} is of the whole sample",
                        "Use experts with capacity_factor=None.")
        draws, real = dict[str, Any](deterministic=deterministic, rngs=call_rngs(rngs, "Block")), real_tokens(inputs, mask)

        def mix(hidden):
            nonlocal cache
            mixed, cache = self.mixer.extend(hidden, cache, mask=mask)
            return self.dropped(mixed.astype(hidden.dtype), draws)

        feed = lambda network, hidden: self._fed(network, hidden, draws, real)[0]
        return self._sums(inputs, mix, feed, None, True), cache
