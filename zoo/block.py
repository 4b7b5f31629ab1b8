"""The residual block around a mixer: normalisation before it, dropout after it, then a feed-forward network."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from subquad.zoo.checks import check_rate, check_sizes, refuse
from subquad.zoo.linen import call_rngs


class FeedForward(nnx.Module):
    """Two linear maps with a GELU between, the same at every position.

        y_t = W_2 gelu(W_1 x_t + b_1) + b_2

    Args:
        in_features: features D of the input and output.
        mlp_features: features between.
    """

    def __init__(
        self, in_features: int, mlp_features: int, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.inner = nnx.Linear(in_features, mlp_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.outer = nnx.Linear(mlp_features, in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, inputs: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        return self.outer(nnx.gelu(self.inner(inputs)))


class Block(nnx.Module):
    """Pre-norm residual block.

        h = x + dropout(mixer(norm(x)));   y = h + dropout(ffn(norm(h)))

    Args:
        mixer: any layer of the zoo with D features in and out.
        in_features: features D.
        mlp_features: features inside the feed-forward network; 0 leaves the second half out.
        dropout_rate: probability of dropping an output feature of mixer or network; `train()` and `eval()` turn it on and
            off, off to begin with.
    Raises: ValueError: mlp_features or dropout_rate out of range; a mixer whose out_features are not in_features.
    """

    def __init__(
        self,
        mixer: nnx.Module,
        in_features: int,
        *,
        mlp_features: int,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes("Block", 0, mlp_features=mlp_features)
        check_rate("Block", dropout_rate)
        out_features = getattr(mixer, "out_features", in_features)
        if out_features != in_features:
            refuse("Block", "mixer", f"out_features = {out_features}", f"have out_features = in_features = {in_features}",
                   "Leave out_features out of its options.")
        self.mixer: Any = mixer  # of the user's, too, who need not write `extend`
        self.mixer_norm = nnx.LayerNorm(in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.has_mlp = mlp_features > 0
        if self.has_mlp:
            self.mlp_norm = nnx.LayerNorm(in_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            self.mlp = FeedForward(in_features, mlp_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # The caller's rngs, not a stored stream: a block holds no state that a call would change.
        self.dropout = nnx.Dropout(dropout_rate, deterministic=True)

    def __call__(
        self, inputs: Float[Array, "*B T D"], *, deterministic: bool | None = None, rngs: nnx.Rngs | None = None, **call
    ) -> Float[Array, "*B T D"]:
        """`call` holds the mixer's mask, positions and segment_ids.

        Without dropout where `deterministic`; None takes what `train()` or `eval()` set. With it, `rngs.dropout()` draws;
        inside a Linen module its "dropout" collection does where `rngs` is None.
        """
        rngs = call_rngs(rngs)
        if deterministic is None:  # a mixer of the user's may know True and False only
            deterministic = self.dropout.deterministic
        mixed = self.mixer(self.mixer_norm(inputs), deterministic=deterministic, rngs=rngs, **call)
        hidden = inputs + self.dropout(mixed, deterministic=deterministic, rngs=rngs)
        if not self.has_mlp:
            return hidden
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)), deterministic=deterministic, rngs=rngs)

    def extend(self, inputs: Float[Array, "B T D"], cache, *, mask=None):
        """T more tokens after those in the mixer's `cache` -> (outputs, cache); without dropout."""
        mixed, cache = self.mixer.extend(self.mixer_norm(inputs), cache, mask=mask)
        hidden = inputs + mixed
        return (hidden + self.mlp(self.mlp_norm(hidden)) if self.has_mlp else hidden), cache
