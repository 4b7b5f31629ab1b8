"""mLSTM against its equations, token by token, at gates of any size, and the memory of a peer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.gated.decay import running_largest
from subquad.zoo.gated.mlstm import MLSTM
from tests import oracle

FEATURES, HEADS, WIDTH = 5, 2, 6


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    options = dict(hidden_features=HEADS * WIDTH, num_heads=HEADS, block_size=3) | options
    layer = MLSTM(FEATURES, **options, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(nnx.state(layer))
    nnx.update(layer, tree.unflatten([x + 0.5 * normal(*x.shape, seed=i) for i, x in enumerate(leaves)]))
    return layer


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def memory(q, k, v, log_input, forget):
    """Eqs. 19-21 in float64, without a stabiliser: h, and |n . q|."""
    state, normalizer, heads, sizes = 0.0, 0.0, [], []
    for t in range(q.shape[1]):
        i, f = np.exp(np.float64(log_input[:, t]))[..., None], np.float64(forget[:, t])[..., None]
        state = f[..., None] * state + (i * k[:, t])[..., None] * v[:, t, :, None]
        normalizer = f * normalizer + i * k[:, t]
        sizes.append(np.abs((normalizer * q[:, t]).sum(-1)))
        heads.append(np.einsum("bnmv,bnm->bnv", state, q[:, t]) / np.maximum(sizes[-1], 1)[..., None])
    return np.stack(heads, 1), np.stack(sizes, 1)


def test_the_equations():
    """Also where |n . q| is less than 1."""
    layer, x = build(), np.float64(normal(2, 11, FEATURES))
    read = lambda variable: np.float64(variable[...])
    u = x @ read(layer.input.kernel)
    padded, taps = np.pad(u, [(0, 0), (3, 0), (0, 0)]), read(layer.convolution.taps)
    c = sum(taps[j] * padded[:, 3 - j : 14 - j] for j in range(4)) + read(layer.convolution.bias)
    c = c * sigmoid(c)
    blocks = lambda of, x: np.einsum("btjk,kjl->btjl", x.reshape(2, 11, -1, 3), read(of.kernel)).reshape(2, 11, -1)
    q, k, v = blocks(layer.query, c), blocks(layer.key, c), blocks(layer.value, u)
    logits = np.einsum("btr,grn->gbtn", np.concatenate([q, k, v], -1), read(layer.gates))
    q, k, v = (part.reshape(2, 11, HEADS, WIDTH) for part in (q, k / WIDTH**0.5, v))
    h, sizes = memory(q, k, v, logits[0] + read(layer.input_bias), sigmoid(logits[1] + read(layer.forget_bias)))
    assert (sizes < 1).sum() > 5 < (sizes > 1).sum()
    h = read(layer.norm.scale) * (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    z = x @ read(layer.gate.kernel)
    outputs = (h.reshape(2, 11, -1) + read(layer.direct) * c) * z * sigmoid(z)
    np.testing.assert_allclose(layer(x.astype(np.float32)), outputs @ read(layer.out.kernel), atol=5e-5)


@pytest.mark.parametrize("shift", [-300.0, -3.0, 300.0])
def test_gates_of_any_size(shift):
    """Input gates of exp(300) and of exp(-300): float32 holds neither, and float64 both."""
    layer, (q, k, v) = build(), (normal(1, 40, HEADS, WIDTH, seed=seed) for seed in range(3))
    log_input, forget = 3 * normal(1, 40, HEADS, seed=3) + shift, sigmoid(normal(1, 40, HEADS, seed=4) + 2)
    run = jax.value_and_grad(lambda *logs: jnp.sum(layer.recall(q, k, v, *logs)[0] ** 2), argnums=(0, 1))
    heads, (_, _, largest) = layer.recall(q, k, v, log_input, np.log(forget).astype(np.float32))
    want, _ = memory(np.float64(q), np.float64(k) / WIDTH**0.5, v, log_input, forget)
    np.testing.assert_allclose(heads, want, rtol=1e-3, atol=max(1e-5 * np.abs(want).max(), 1e-30))
    assert np.isfinite(largest).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(log_input, np.log(forget).astype(np.float32))))


def test_padding_at_the_start_of_a_memory_leaves_nothing():
    layer, (q, k, v) = build(), (normal(1, 5, HEADS, WIDTH, seed=seed) for seed in range(3))
    log_input, log_forget = normal(1, 5, HEADS, seed=3), -np.abs(normal(1, 5, HEADS, seed=4))
    _, nothing = layer.recall(q, k, v, log_input, log_forget, jnp.zeros((1, 1, 1, 5), bool))
    assert all((x == 0).all() for x in nothing[:2]) and np.isneginf(nothing[2]).all()
    again, after = layer.recall(q, k, v, log_input, log_forget, state=nothing)
    want, state = layer.recall(q, k, v, log_input, log_forget)
    jax.tree.map(np.testing.assert_array_equal, (again, after), (want, state))


def test_packed_sequences_are_as_alone():
    layer, x = build(), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)


def test_where_it_starts():
    """Gates that do not depend on the token, and remember."""
    layer = MLSTM(16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.gates[...], 0)
    np.testing.assert_allclose(layer.forget_bias[...], [3, 4, 5, 6])
    assert layer.heads == (4, 8) and layer.query.kernel.shape == (4, 8, 4)


@pytest.mark.parametrize(("options", "words"), [
    (dict(num_heads=5), "num_heads must divide hidden_features = 12"), (dict(block_size=5), "block_size must divide hidden"),
    (dict(is_causal=False), "does not support is_causal"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"MLSTM:? {words}"):
        build(**options)


def test_oracle():
    """NX-AI's memory: heads come first, and its states are not stabilised. It adds 1e-6 to what exp(-m) h is divided by."""
    peer, layer = oracle.load("mlstm"), build()

    def run(inputs, _):
        q, k, v, i, f = (inputs[name].swapaxes(1, 2) for name in "qkvif")
        log_input, log_forget = i[..., 0], jax.nn.log_sigmoid(f[..., 0])
        heads, (state, normalizer, largest) = layer.recall(q, k, v, log_input, log_forget)
        sums = jnp.cumsum(log_forget, 1)
        weights = jnp.tril(jnp.exp(sums[:, :, None] - sums[:, None] + log_input[:, None]).transpose(0, 3, 1, 2))
        size = jnp.abs((weights * jnp.einsum("btnm,bsnm->bnts", q, k)).sum(-1)).swapaxes(1, 2) / q.shape[-1] ** 0.5
        size, m = jnp.maximum(size, 1), running_largest(log_forget, log_input, jnp.full_like(largest, -jnp.inf))[:, 1:]
        heads *= (size / (size + 1e-6 * jnp.exp(jax.lax.stop_gradient(m))))[..., None]
        factor = jnp.exp(largest)[..., None] / q.shape[-1] ** 0.5
        return {"y": heads.swapaxes(1, 2), "C": factor[..., None] * state, "n": (factor * normalizer)[..., None]}

    oracle.compare("mlstm", peer, run, of="mechanism")
