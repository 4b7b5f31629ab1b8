"""The contract of every layer with its Triton kernels, in the interpreter: the same numbers and gradients as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from .cases import CASES, CAUSAL, CHOOSING, DIRECTIONS, EXTENDING, SEGMENTED, SIBLINGS, inputs, label, one_direction, sampled

pytestmark = pytest.mark.interpret
LENGTH = 23


# Long convolutions, of DPLR systems and of packed sequences, sums over a run of tokens both ways, and attention to listed keys
# are XLA's alone.
OPTIONS = {
    "s4": dict(mode="diagonal"), "clustered": dict(num_top=0), "routing": dict(selection="last", window_size=4),
}  # fmt: skip
SEGMENTS_DECLINED = {(name, is_causal) for name in ("s4", "dss") for is_causal in (True, False)}

# Fourier transforms, long and short convolutions, entmax, sticks, gated units and lists of keys are XLA's alone.
WITHOUT = {
    "fnet", "entmax", "stickbreaking", "moba", "nsa", "memorizing", "lightconv", "dynamicconv", "h_transformer", "gau",
    "flash", "hyena",
}  # fmt: skip
DIRECTIONS, SEGMENTED = ([pair for pair in pairs if pair[0] not in WITHOUT] for pairs in (DIRECTIONS, SEGMENTED))
DIRECTIONS = [pair for pair in DIRECTIONS if pair != ("routing", False)]  # its lists are of keys
CAUSAL, EXTENDING = ([name for name in names if name not in WITHOUT] for names in (CAUSAL, EXTENDING))


def pair(name, is_causal, **options):
    """The same layer on XLA and in the interpreter."""
    options = OPTIONS.get(name, {}) | options
    return [CASES[name].make(is_causal, implementation=implementation, **options) for implementation in ("xla", "interpret")]


def close(actual, expected, name, scale=1.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-4 * scale, atol=2 * CASES[name].tolerance * scale)


def outputs_and_gradients(layer, x, cotangent, **words):
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, x, cotangent):
        outputs, pull = jax.vjp(lambda params, x: nnx.merge(graph, params, rest)(x, **words), params, x)
        return outputs, pull(cotangent)

    return run(params, x, cotangent)


@pytest.mark.sample(3, of=SIBLINGS)
@pytest.mark.parametrize("name,is_causal", one_direction(DIRECTIONS), ids=label)
def test_outputs_and_every_gradient(name, is_causal):
    x, cotangent = inputs(LENGTH), inputs(LENGTH, seed=1)
    mask = jnp.asarray(np.arange(LENGTH) < np.array([[LENGTH], [14]]))[:, None, None]
    want, got = (outputs_and_gradients(layer, x, cotangent, mask=mask) for layer in pair(name, is_causal))
    close(got[0], want[0], name)
    paths = jax.tree_util.tree_flatten_with_path(want[1])[0]
    assert len(paths) > 2
    for (path, expected), actual in zip(paths, jax.tree.leaves(got[1]), strict=True):
        scale = max(1.0, float(jnp.abs(expected).max()))
        assert jnp.abs(actual - expected).max() <= 2e-4 * scale, jax.tree_util.keystr(path)


@sampled
@pytest.mark.parametrize("name,is_causal", one_direction(DIRECTIONS), ids=label)
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.full), 50])
def test_other_lengths_in_bfloat16(name, is_causal, length):
    x = inputs(length, dtype=jnp.bfloat16)
    want, got = (jax.jit(lambda x, layer=layer: layer(x))(x) for layer in pair(name, is_causal, dtype=jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    assert jnp.quantile(error, CHOOSING.get(name, 1.0)) < 0.03 * jnp.abs(want.astype(jnp.float32)).max()


@sampled
@pytest.mark.parametrize("name", CAUSAL)
def test_under_vmap_and_scan(name):
    layer, x = pair(name, True)[1], inputs(LENGTH)
    once = jax.jit(lambda x: layer(x))(x)
    close(jax.jit(jax.vmap(lambda x: layer(x)))(x[:, None])[:, 0], once, name)
    close(jax.jit(lambda x: jax.lax.scan(lambda carry, x: (carry, layer(x)), 0, x[:, None])[1])(x)[:, 0], once, name)


@sampled
@pytest.mark.parametrize("name", EXTENDING)
def test_extend(name):
    x = inputs(12)
    mask = jnp.asarray(np.arange(12) != 3)[None, None, None].repeat(2, 0)
    both = []
    for layer in pair(name, True):
        extend = jax.jit(lambda x, cache, mask, layer=layer: layer.extend(x, cache, mask=mask))
        cache, parts = layer.init_cache(2, 12), []
        for start, stop in ((0, 7), (7, 8), (8, 12)):
            out, cache = extend(x[:, start:stop], cache, mask[..., start:stop])
            parts.append(out)
        both.append(jnp.concatenate(parts, 1))
    close(both[1], both[0], name)


@sampled
@pytest.mark.parametrize("name,is_causal", SEGMENTED, ids=label)
def test_segments(name, is_causal):
    ids = jnp.asarray(np.arange(LENGTH) // 9)
    if (name, is_causal) in SEGMENTS_DECLINED:
        with pytest.raises(NotImplementedError, match="interpret"):
            pair(name, is_causal)[1](inputs(LENGTH), segment_ids=ids)
        return
    want, got = (jax.jit(lambda x, layer=layer: layer(x, segment_ids=ids))(inputs(LENGTH)) for layer in pair(name, is_causal))
    close(got, want, name)
