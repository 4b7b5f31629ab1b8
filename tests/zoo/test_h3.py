"""H3 against its formula with all sums spelt out, and the authors' code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.statespace.h3 import H3
from tests import oracle

FEATURES = 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    return H3(FEATURES, **dict(state_size=4, conv_width=3, dt_min=0.05, dt_max=0.5) | options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size", [1, 3])
def test_the_formula(size):
    """Of heads: the outer product of shifted keys and values, each entry through the head's kernel, read by the query."""
    layer, x = build(head_features=size), np.float64(normal(2, 9, FEATURES))
    linear = lambda module, x: x @ np.float64(module.kernel[...]) + np.float64(module.bias[...])
    query, key, value = (linear(module, x) for module in (layer.query, layer.key, layer.value))
    taps, kernel = np.float64(layer.shift.taps[...]), np.float64(layer.system.kernel(9)[0])
    kernel[:, 0] += layer.skip[...]
    shifted = np.stack([sum(taps[j] * key[:, t - j] for j in range(3) if t >= j) for t in range(9)], 1)
    expected = np.zeros((2, 9, FEATURES))
    for t in range(9):
        for n in range(FEATURES // size):
            part = slice(n * size, (n + 1) * size)
            memory = sum(kernel[n, t - s] * shifted[:, s, part, None] * value[:, s, None, part] for s in range(t + 1))
            expected[:, t, part] = np.einsum("bi,bij->bj", query[:, t, part], memory)
    np.testing.assert_allclose(layer(jnp.float32(x)), linear(layer.out, expected), atol=2e-5)


def test_packed_sequences_are_as_alone():
    layer, x = build(head_features=2), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(head_features=4), "head_features must divide in_features = 6"), (dict(state_size=5), "state_size must be even"),
    (dict(init="hippo"), "init must be a known name"), (dict(dt_min=1.0), r"dt_min must be a number in \(0, 0.5\]"),
    (dict(conv_width=0), "conv_width must be a positive"), (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"H3:? {words}"):
        build(**options)


def test_oracle():
    """The authors learn the shift system's input matrix too: with the output matrix it makes the taps. Theirs are complex64."""
    peer = oracle.load("h3")
    width = peer.meta["cfg"]["d_state"]
    layer = H3(peer.inputs["x"].shape[-1], state_size=width, rngs=nnx.Rngs(0))

    def run(inputs, w):
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "output_linear": "out"}
        maps = {name: x for name, x in w.items() if name.partition(".")[0] in names}
        ours = oracle.holding(layer, maps, names)
        into, out = w["ssm_k_kernel.kernel.B"], w["ssm_k_kernel.kernel.C"][0]
        taps = [(into[:, : width - lag] * out[:, lag:]).sum(-1) for lag in range(width)]
        taps[0] += w["ssm_k_D"]
        ours.shift.taps[...], ours.skip[...] = jnp.stack(taps), w["D"]
        system = {name.removeprefix("kernel.kernel."): x for name, x in w.items() if name.startswith("kernel.kernel.")}
        ours.system.log_decay[...], ours.system.frequency[...] = system["inv_A_real"], system["A_imag"]
        ours.system.input_matrix[...], ours.system.output_matrix[...] = system["B"], system["C"]
        ours.system.log_step[...] = system["log_dt"]
        return ours(inputs["x"])

    oracle.compare("h3", peer, run, tolerance=1e-4)  # of their kernels in single precision
