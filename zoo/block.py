"""The residual block around a mixer: a norm before or after it, dropout, then a feed-forward network."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from subquad.zoo.checks import check_rate, check_sizes, check_word, refuse
from subquad.zoo.linen import call_rngs

# As torch's BatchNorm1d has it, where it is called 0.1: how much of a running average stays at a batch.
MOMENTUM = 0.9
Norm = Literal["layer", "rms", "batch"]
Order = Literal["pre", "post"]
NORMS: dict[str, Callable[..., Any]] = {
    "layer": nnx.LayerNorm,
    "rms": nnx.RMSNorm,
    # In two passes: the difference of two means is wrong where the mean is large.
    "batch": functools.partial(nnx.BatchNorm, use_running_average=True, momentum=MOMENTUM, use_fast_variance=False),
}
ORDERS = ("pre", "post")


def normalise(
    norm, inputs: Float[Array, "*B T D"], key_mask: Bool[Array, "..."] | None, deterministic: bool | None
) -> Float[Array, "*B T D"]:
    """The norm of features; a batch norm's statistics are running ones where deterministic, else of the real tokens.

    Args:
        key_mask: the mask that a mixer is called with; where it is no key padding [*B, 1, 1, T], all tokens are real.
    """
    if not isinstance(norm, nnx.BatchNorm):
        return norm(inputs)
    real = None
    if key_mask is not None and key_mask.shape[-3:-1] == (1, 1):
        real = key_mask[..., 0, 0, :, None]
        real = real | ~real.any()  # of none there is no mean
    return norm(inputs, use_running_average=deterministic, mask=real)


class FeedForward(nnx.Module):
    """Two linear maps with a GELU between, the same at every position.

        y_t = W_2 dropout(gelu(W_1 x_t + b_1)) + b_2

    Args:
        in_features: features D of the input and output.
        mlp_features: features between.
        dropout_rate: of the features between.
    """

    def __init__(
        self, in_features: int, mlp_features: int, *, dropout_rate: float = 0.0, dtype: Any = None,
        param_dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):
        self.inner = nnx.Linear(in_features, mlp_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.outer = nnx.Linear(mlp_features, in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True)

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "*B T D"]:
        return self.outer(self.dropout(nnx.gelu(self.inner(inputs)), deterministic=deterministic, rngs=rngs))


class Block(nnx.Module):
    """Residual block, with the norm before mixer and network, or after the sums.

        h = x + dropout(mixer(norm(x)));   y = h + dropout(ffn(norm(h)))            norm_order "pre"
        h = norm(x + dropout(mixer(x)));   y = norm(h + dropout(ffn(h)))            norm_order "post"

    Args:
        mixer: any layer of the zoo with D features in and out.
        in_features: features D.
        mlp_features: features inside the feed-forward network; 0 leaves the second half out.
        dropout_rate: probability of dropping an output feature of mixer or network, or a feature inside the latter; `train()`
            and `eval()` turn it on and off, off to begin with.
        norm: "layer", "rms" or "batch". A batch norm takes mean and variance over samples and real tokens, padding left out,
            and moves its running ones a tenth of the way; where deterministic it uses these. They are `nnx.BatchStat`.
        norm_order: "pre" or "post".
    Raises: ValueError: mlp_features or dropout_rate out of range; an unknown norm or order; a mixer whose out_features are not
        in_features.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        in_features: int,
        *,
        mlp_features: int,
        dropout_rate: float = 0.0,
        norm: Norm = "layer",
        norm_order: Order = "pre",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes("Block", 0, mlp_features=mlp_features)
        check_rate("Block", dropout_rate)
        check_word("Block", "norm", norm, NORMS)
        check_word("Block", "norm_order", norm_order, ORDERS)
        out_features = getattr(mixer, "out_features", in_features)
        if out_features != in_features:
            refuse("Block", "mixer", f"out_features = {out_features}", f"have out_features = in_features = {in_features}",
                   "Leave out_features out of its options.")
        self.mixer: Any = mixer  # of the user's, too, who need not write `extend`
        self.norm_order, dtypes = norm_order, dict[str, Any](dtype=dtype, param_dtype=param_dtype)
        self.mixer_norm = NORMS[norm](in_features, **dtypes, rngs=rngs)
        self.has_mlp = mlp_features > 0
        if self.has_mlp:
            self.mlp_norm = NORMS[norm](in_features, **dtypes, rngs=rngs)
            self.mlp = FeedForward(in_features, mlp_features, dropout_rate=dropout_rate, **dtypes, rngs=rngs)
        # The caller's rngs, not a stored stream: a block holds no state that a call would change.
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True)

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **call
    ) -> Float[Array, "*B T D"]:
        """`call` holds the mixer's mask, positions and segment_ids; padding that the mask hides is in no batch's statistics.

        Without dropout where `deterministic`; None takes what `train()` or `eval()` set. With it, `rngs.dropout()` draws;
        inside a Linen module its "dropout" collection does where `rngs` is None.
        """
        rngs = call_rngs(rngs)
        if deterministic is None:  # a mixer of the user's may know True and False only
            deterministic = self.dropout.deterministic
        draws: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        norms = dict(key_mask=call.get("mask"), deterministic=deterministic)
        hidden = self._residual(self.mixer_norm, lambda hidden: self.mix(hidden, draws, call), inputs, norms)
        if not self.has_mlp:
            return hidden
        return self._residual(self.mlp_norm, lambda hidden: self.feed(hidden, draws), hidden, norms)

    def mix(self, hidden, draws: dict[str, Any], call: dict[str, Any]):
        """What the mixer adds; `draws` holds deterministic and rngs."""
        return self.dropout(self.mixer(hidden, **draws, **call), **draws)

    def feed(self, hidden, draws: dict[str, Any]):
        """What the feed-forward network adds."""
        return self.dropout(self.mlp(hidden, **draws), **draws)

    def _residual(self, norm, function, inputs, norms):
        if self.norm_order == "post":
            return normalise(norm, inputs + function(inputs), **norms)
        return inputs + function(normalise(norm, inputs, **norms))

    def extend(self, inputs: Float[Array, "B T D"], cache, *, mask=None):
        """T more tokens after those in the mixer's `cache` -> (outputs, cache); without dropout."""

        def mix(hidden):
            nonlocal cache
            mixed, cache = self.mixer.extend(hidden, cache, mask=mask)
            return mixed

        norms = dict(key_mask=None, deterministic=True)
        hidden = self._residual(self.mixer_norm, mix, inputs, norms)
        return (self._residual(self.mlp_norm, self.mlp, hidden, norms) if self.has_mlp else hidden), cache
