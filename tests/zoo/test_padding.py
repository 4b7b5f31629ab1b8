"""Padding on either side and holes in every layer and every pattern: positions, blocks, windows and states count real tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .cases import FEATURES, inputs

LENGTH, PADDINGS = 9, (1, 2, 3, 4, 7)

# Blocks, strides and segments of 4 and a memory of 3, so that 9 tokens after 1 to 7 of padding meet every border.
STRIDED = dict(num_heads=2, stride=4)
LAYERS = {
    "softmax": ("softmax", dict(num_heads=2, rotary_base=100.0)),
    "blockwise": ("blockwise", dict(num_heads=3, max_length=20, block_size=4, qkv_features=18)),
    "local": ("local", dict(num_heads=2, window_size=3)),
    "strided": ("strided", STRIDED),
    "strided-separate": ("strided", dict(STRIDED, heads="separate")),
    "fixed": ("strided", dict(STRIDED, pattern="fixed", num_summary=2, distinct_summary=True)),
    "fixed-separate": ("strided", dict(STRIDED, num_heads=4, pattern="fixed", heads="separate")),
    "reformer": ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=4)),
    "performer": ("performer", dict(num_heads=2, num_features=24)),
    "transformer_xl": ("transformer_xl", dict(num_heads=2, segment_length=4, memory_length=3)),
    "s4": ("s4", dict(state_size=8)),
    "s4-diagonal": ("s4", dict(state_size=8, mode="diagonal")),
}
by_layer = pytest.mark.parametrize("label", LAYERS)


@functools.cache
def layer_of(label: str) -> nnx.Module:
    name, options = LAYERS[label]
    return zoo.make(name, in_features=FEATURES, is_causal=True, rngs=nnx.Rngs(0), **options)


def ragged() -> tuple[np.ndarray, list[np.ndarray]]:
    """Where the real tokens of each sample stand, [B, 16]: padding on the left, on the right and in between, and none."""
    rng = np.random.default_rng(0)
    left = [np.arange(16) >= padding for padding in PADDINGS]
    holes = [np.isin(np.arange(16), rng.choice(16, count, replace=False)) for count in (LENGTH, LENGTH, 5, 1)]
    return np.stack([*left, np.arange(16) < LENGTH, np.ones(16, bool), *holes])


def spread(real: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Each sample's tokens at its real places, and loud numbers elsewhere."""
    out = np.full((*real.shape, FEATURES), 100.0, np.float32)
    for sample, places in enumerate(real):
        out[sample, places] = x[sample, : places.sum()]
    return out


@functools.cache
def alone(label: str):
    """The outputs for the samples without any padding: those of a causal layer do not depend on what comes after."""
    x = np.asarray(inputs(16, batch=len(ragged())))
    return x, np.asarray(extend_all(label, x, np.ones(x.shape[:2], bool), [16]))


@functools.cache
def step(label: str):
    return jax.jit(lambda x, cache, mask: layer_of(label).extend(x, cache, mask=mask))


def extend_all(label, x, real, cuts):
    cache, outputs = layer_of(label).init_cache(len(x), x.shape[1]), []
    for part in np.split(np.arange(x.shape[1]), np.cumsum(cuts)[:-1]):
        y, cache = step(label)(x[:, part], cache, jnp.asarray(real[:, part])[:, None, None])
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def check(label, outputs, real, expected):
    outputs = np.asarray(outputs)
    assert np.isfinite(outputs).all()
    for sample, places in enumerate(real):
        count = places.sum()
        np.testing.assert_allclose(outputs[sample, places], expected[sample, :count], rtol=0, atol=2e-5 * np.abs(expected).max(),
                                   err_msg=f"{label}: sample {sample}")  # fmt: skip


@by_layer
@pytest.mark.parametrize("cuts", [[16], [3, 1, 12], [1] * 5 + [7, 4]], ids=str)
def test_extend(label, cuts):
    x, expected = alone(label)
    real = ragged()
    for part in np.split(np.arange(16), np.cumsum(cuts)[:-1]):
        real[:, part] = np.sort(real[:, part], axis=1)[:, ::-1]
    check(label, extend_all(label, spread(real, x), real, cuts), real, expected)
