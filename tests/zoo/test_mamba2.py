"""Mamba-2 against its dual form, its limits, where it starts, and the layer of a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.mamba2 import Mamba2
from tests import oracle

FEATURES, HEADS, WIDTH, STATE, GROUPS = 5, 4, 3, 6, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    options = dict(hidden_features=HEADS * WIDTH, head_features=WIDTH, state_size=STATE, num_groups=GROUPS) | options
    layer = Mamba2(FEATURES, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    nnx.update(layer, tree.unflatten([x + 0.3 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]))
    return layer


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_dual_form():
    """Equation by equation in float64, with the sequence as one masked matrix: y = (L * C B^T) v, L_ts = a_{s+1} ... a_t."""
    layer, x = build(), np.float64(normal(2, 11, FEATURES))
    read = lambda variable: np.float64(variable[...])
    u = np.pad(x @ read(layer.input.kernel), [(0, 0), (3, 0), (0, 0)])
    taps = read(layer.convolution.taps)
    u = silu(sum(taps[j] * u[:, 3 - j : 14 - j] for j in range(4)) + read(layer.convolution.bias))
    value, key, query = np.split(u, [HEADS * WIDTH, HEADS * WIDTH + GROUPS * STATE], axis=-1)
    value = value.reshape(2, 11, HEADS, WIDTH)
    key, query = (np.repeat(part.reshape(2, 11, GROUPS, STATE), HEADS // GROUPS, 2) for part in (key, query))
    step = np.log1p(np.exp(x @ read(layer.step.kernel) + read(layer.step_bias)))
    log_decay = -step * np.exp(read(layer.log_rate))
    y = read(layer.direct)[:, None] * value
    for b, n, t in np.ndindex(2, HEADS, 11):
        for s in range(t + 1):
            weight = np.exp(log_decay[b, s + 1 : t + 1, n].sum()) * query[b, t, n] @ key[b, s, n]
            y[b, t, n] += weight * step[b, s, n] * value[b, s, n]
    y = (y.reshape(2, 11, -1) * silu(x @ read(layer.gate.kernel))).reshape(2, 11, GROUPS, -1)
    y = read(layer.norm.scale) * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(x.astype(np.float32)), y.reshape(2, 11, -1) @ read(layer.out.kernel), atol=2e-5)


def test_a_step_of_nothing_keeps_the_state():
    """And outputs the skip alone; where a step is large, what came before is forgotten."""
    layer, x = build(conv_width=1), normal(1, 9, FEATURES)
    cache = layer.state(1)._replace(state=jnp.asarray(normal(1, HEADS, STATE, WIDTH)))
    layer.step_bias[...] = jnp.full(HEADS, -200.0)
    _, after = layer._recur(x, cache=cache)
    np.testing.assert_array_equal(after.state, cache.state)
    np.testing.assert_allclose(layer._recur(x)[0].reshape(9, HEADS, WIDTH), layer.direct[...][:, None] * layer.values(
        layer.convolution(layer.input(x))[0][0]), rtol=1e-5)  # fmt: skip
    layer.step_bias[...], layer.log_rate[...] = jnp.full(HEADS, 5.0), jnp.full(HEADS, 4.0)
    np.testing.assert_allclose(layer._recur(x)[0][:, 4:], layer._recur(x[:, 4:])[0], rtol=1e-5, atol=1e-6)


def test_where_it_starts():
    """Steps are log-uniform, rates uniform."""
    layer = Mamba2(8, hidden_features=4096, head_features=1, state_size=1, rngs=nnx.Rngs(0))
    shares = np.linspace(0.05, 0.95, 7)
    step = np.log1p(np.exp(np.float64(layer.step_bias[...])))
    np.testing.assert_allclose(np.quantile(np.log10(step), shares), -3 + 2 * shares, atol=0.06)
    np.testing.assert_allclose(np.quantile(np.exp(layer.log_rate[...]), shares), 1 + 15 * shares, atol=0.5)


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(head_features=5), "head_features must divide hidden_features = 12"), (dict(num_groups=3), "num_groups must divide"),
    (dict(dt_min=0.2), r"dt_min must be a number in \(0, 0.1\]"), (dict(conv_width=0), "conv_width must be a posi"),
    (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"Mamba2:? {words}"):
        build(**options)


def test_oracle():
    """Transformers' layer: its one map is our three, its taps count from the oldest token."""
    peer = oracle.load("mamba2_layer")
    cfg = peer.meta["cfg"]
    hidden, state = cfg["expand"] * cfg["hidden_size"], cfg["state_size"]
    layer = Mamba2(cfg["hidden_size"], head_features=cfg["head_dim"], state_size=state, rngs=nnx.Rngs(0))

    def run(inputs, w):
        ours = nnx.clone(layer)
        parts = jnp.split(w["in_proj.weight"].T, [hidden, 2 * hidden + 2 * state], axis=1)
        for module, kernel in zip((ours.gate, ours.input, ours.step), parts, strict=True):
            module.kernel[...] = kernel
        ours.convolution.taps[...], ours.convolution.bias[...] = w["conv1d.weight"][:, 0, ::-1].T, w["conv1d.bias"]
        ours.log_rate[...], ours.step_bias[...], ours.direct[...] = w["A_log"], w["dt_bias"], w["D"]
        ours.norm.scale[...], ours.out.kernel[...] = w["norm.weight"][None], w["out_proj.weight"].T
        return ours(inputs["x"])

    oracle.compare("mamba2", peer, run)
