"""Tokens in pieces: the same results and gradients as at once, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.zoo import compilation, projection
from subquad.zoo.projection import head_by_head, in_pieces, in_turn

from .cases import CASES, inputs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_give_what_the_whole_gives(monkeypatch, dtype):
    # 150 tokens in pieces of 64: the last piece begins early, and its first tokens count once.
    rng = np.random.default_rng(0)
    first, second, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 150, 4), (2, 150, 2, 3), (4, 6)))

    def loss(weight, first, second):
        def function(x, y):
            return (jnp.tanh(x) @ weight).reshape(-1, 2, 3) * y

        found = in_pieces(function, first, second)
        return jnp.sum(jnp.sin(found.astype(jnp.float32))), found

    # A function of its own each time, so that nothing compiled before is taken.
    run = lambda: jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays), (0, 1, 2), has_aux=True))(weight, first, second)
    whole = run()
    monkeypatch.setattr(projection, "LARGE_BYTES", 1)
    monkeypatch.setattr(projection, "PIECE_BYTES", 1)
    assert "while" in jax.jit(lambda *arrays: loss(*arrays)).lower(weight, first, second).as_text()
    for ours, theirs in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(ours - theirs).max() <= (1e-5 if dtype == "float32" else 0.02) * np.abs(theirs).max()


@pytest.fixture
def in_small_pieces(monkeypatch):
    """Called, it has everything cut from then on."""

    def cut():
        monkeypatch.setattr(projection, "LARGE_BYTES", 1)
        monkeypatch.setattr(projection, "PIECE_BYTES", 1)
        compilation._program.cache_clear()  # what is compiled is whole

    yield cut
    compilation._program.cache_clear()


def test_heads_one_by_one_are_heads_together(in_small_pieces):
    rng = np.random.default_rng(0)
    heads = [jnp.asarray(rng.normal(size=(3, 7, 2, 4)), jnp.float32) for _ in range(2)]
    mask = jnp.asarray(rng.uniform(size=(3, 1, 1, 7)) < 0.7)

    def function(x, y, nothing, mask):
        assert nothing is None
        return jnp.cumsum(jnp.where(mask[:, 0, 0, :, None, None], x, 0), axis=1) * y

    run = lambda: jax.value_and_grad(
        lambda *heads: jnp.sum(jnp.sin(head_by_head(function, *heads, by_sample=(None, mask)))), (0, 1))(*heads)
    whole = run()
    in_small_pieces()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), run(), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recurrences_in_turn_are_whole_ones(monkeypatch, dtype):
    # 150 tokens in pieces of 64 and a ragged one; two responses, and the gradients of the state and of what is closed over.
    rng = np.random.default_rng(0)
    tokens, state, weight = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 150, 4), (2, 4), (4,)))
    state = state.astype(jnp.float32)

    def loss(weight, tokens, state):
        def function(tokens, state):
            sums = state[:, None] + jnp.cumsum((weight * tokens).astype(jnp.float32), axis=1)
            return (sums.astype(tokens.dtype), jnp.tanh(tokens)), sums[:, -1]

        (sums, tanh), last = in_turn(function, tokens, state)
        return jnp.sum(jnp.sin(sums.astype(jnp.float32)) * tanh) + jnp.sum(last**2), (sums, last)

    run = lambda: jax.jit(jax.value_and_grad(lambda *arrays: loss(*arrays), (0, 1, 2), has_aux=True))(weight, tokens, state)
    whole = run()
    monkeypatch.setattr(projection, "LARGE_BYTES", 1)
    monkeypatch.setattr(projection, "PIECE_BYTES", 4 * 2 * 4 * 64)
    assert "while" in jax.jit(lambda *arrays: loss(*arrays)).lower(weight, tokens, state).as_text()
    for ours, theirs in zip(jax.tree.leaves(run()), jax.tree.leaves(whole), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(ours - theirs).max() <= (2e-5 if dtype == "float32" else 0.02) * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name, is_causal",
    [("smyrf", False), ("clustered", False), ("routing", False), ("routing", True), ("sinkhorn", True), ("efficient", True),
     ("h_transformer", False), ("h_transformer", True), ("mamba", True), ("hgrn", True), ("h3", True), ("hyena", True)],
)
def test_long_layers_are_short_ones(name, is_causal, in_small_pieces):
    layer, x, cotangent = CASES[name].make(is_causal), inputs(23), inputs(23, seed=1)
    mask = (jnp.arange(23) < jnp.array([[23], [17]]))[:, None, None]

    def run():
        @jax.jit
        def both(x):
            y, pull = jax.vjp(lambda x: layer(x, mask=mask), x)
            return y, pull(cotangent)[0]

        return both.trace(x).jaxpr, both(x)

    jaxpr, whole = run()
    in_small_pieces()
    other, pieces = run()
    assert str(other).count("while[") + str(other).count("scan[") > str(jaxpr).count("while[") + str(jaxpr).count("scan[")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), pieces, whole)
