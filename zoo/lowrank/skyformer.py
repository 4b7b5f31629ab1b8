"""Skyformer: a Gaussian kernel of queries and keys by way of sampled landmarks, in linear time."""

from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.kernels import matrix, precision
from subquad.zoo.base import Attention, Shell, Support
from subquad.zoo.checks import check_number, check_sizes
from subquad.zoo.dense.kernelized import gaussian_sums
from subquad.zoo.features import RandomFeature
from subquad.zoo.lowrank.nystrom import mix


class SkyformerAttention(Attention):
    """Kernelized attention, its matrix approximated by M of its landmarks: a Nystrom method for a positive definite kernel.

        y = K(q, l) (K(l, l) + gamma I)^-1 K(l, k) v,   K(x, y)_ts = exp(-|x_t - y_s|^2 / (2 sqrt(H)))
        l = M of the queries and keys of the sample: half of them queries, half of them keys                    (section 4.3)

    K(q, k) is a block of the kernel of all queries and keys, which is positive definite, and that block of its Nystrom
    approximation is y. The inverse is found by `num_iterations` of Newton and Schulz's method on the matrix whose rows and
    columns are divided by the roots of the row sums.

    Cost: time O(T M N H + M^3 N), memory O(T M); no extension: landmarks are of the whole sequence.
    Differs from the paper: landmarks are drawn once, as places relative to the length, and again where the caller says
        (`redraw`); the code draws them in every call. They are real tokens, and each matrix is inverted from its own norms; in
        the code all samples share a start, and one changes another. The kernel's width is H^1/4; the code's is 32^1/4, whatever
        H. Rotary positions (`rotary_base`) are not the paper's.

    Args:
        num_heads: query heads N; must divide qkv_features.
        in_features: features D of the inputs.
        num_landmarks: M, the code's features.
        gamma: added to the landmarks' kernel; smaller is nearer to its inverse and takes more iterations.
        num_iterations: of the inverse.
        is_causal: must be False: landmarks are drawn from the whole sequence.
        shell: see `Attention`.
    Call:
        inputs_q: [*B, T, D].  mask: True = attend; key padding only, [*B, 1, 1, T].
    Returns: [*B, T, F] in the promoted dtype of inputs and parameters; fully masked rows hold that of 0.
    Raises: ValueError: sizes that do not divide; is_causal; a pairwise mask; a gamma that is not positive.
    Numerics: kernels, sums and the inverse in float32; agrees with the reference to 1e-5 (float32), 2e-2 (bfloat16).
    Example:
        >>> layer = SkyformerAttention(4, 64, num_landmarks=16, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 100, 64))).shape
        (2, 100, 64)
        >>> layer.landmarks[...] = layer.redraw(nnx.Rngs(1))

    Source: Chen et al., Skyformer: Remodel Self-Attention with Gaussian Kernel and Nystrom Method, NeurIPS 2021,
        arXiv 2111.00035; code: pkuzengqi/Skyformer.
    """

    supports = Support(
        cost="T", causal=False, extend=False, rotary=True, attention_fn=True,
        mixes_all="its landmarks are tokens of the whole sequence",
    )

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_landmarks: int = 128,
        gamma: float = 0.1,
        num_iterations: int = 6,
        is_causal: bool = False,
        rngs: nnx.Rngs,
        **shell: Unpack[Shell],
    ):
        super().__init__(num_heads, in_features, is_causal=is_causal, rngs=rngs, **shell)
        check_sizes("SkyformerAttention", num_landmarks=num_landmarks, num_iterations=num_iterations)
        check_number("SkyformerAttention", "gamma", gamma, "(0, inf)", "0.1 is the code's.")
        self.num_landmarks, self.gamma, self.num_iterations = num_landmarks, gamma, num_iterations
        self.landmarks = RandomFeature(self.redraw(rngs))

    def redraw(self, rngs: nnx.Rngs) -> Float[Array, "M"]:
        """New places of landmarks in [0, 1), of the length, from `rngs.params()`: the first half among queries, the rest among
        keys. The layer is unchanged until the caller writes them into it: `layer.landmarks[...] = layer.redraw(rngs)`."""
        return rngs.params.uniform((self.num_landmarks,), jnp.float32)

    def attend(self, query, key, value, mask):
        count = jnp.full((1,), key.shape[1]) if mask is None else mask.sum((1, 2, 3))  # real tokens, the first ones
        places, half = self.landmarks[...], self.num_landmarks // 2
        landmarks = jnp.concatenate([take(query, places[:half], count), take(key, places[half:], count)], axis=1)
        gathered = gaussian_sums(landmarks, key, value, mask=mask, implementation=self.implementation)
        inverse = regular_inverse(landmarks, self.gamma, self.num_iterations, self.implementation)
        return gaussian_sums(query, landmarks, mix(inverse, gathered), implementation=self.implementation)


@precision.promoting
def take(tokens: Float[Array, "B T N H"], places: Float[Array, "M"], count: Int[Array, "_"]) -> Float[Array, "B M N H"]:
    """The tokens at places in [0, 1) of the first `count` of each sample."""
    at = jnp.minimum((places * count[:, None]).astype(jnp.int32), jnp.maximum(count[:, None] - 1, 0))
    at = jnp.broadcast_to(at, (tokens.shape[0], places.shape[0]))
    return jnp.take_along_axis(tokens, at[..., None, None], axis=1, mode="promise_in_bounds")


@precision.promoting
@precision.full
def regular_inverse(
    landmarks: Float[Array, "B M N H"], gamma: float, iterations: int, implementation
) -> Float[Array, "B N M M"]:
    """(K + gamma I)^-1 = R (R (K + gamma I) R)^-1 R, with R the roots of the inverse row sums: entries of one size."""
    wide = precision.wide(landmarks).swapaxes(1, 2)
    wide = wide * wide.shape[3] ** -0.25
    half_norm = 0.5 * jnp.sum(jnp.square(wide), axis=-1)
    kernel = jnp.exp(wide @ wide.mT - half_norm[..., :, None] - half_norm[..., None, :])
    kernel = kernel + gamma * jnp.eye(wide.shape[2], dtype=wide.dtype)
    root = kernel.sum(-1) ** -0.5
    both = lambda x: root[..., :, None] * x * root[..., None, :]
    return both(matrix.pseudo_inverse(both(kernel), iterations=iterations, implementation=implementation))
