"""Tokens in pieces: the same results and gradients as at once, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo import projection
from subquad.zoo.projection import in_pieces


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


@pytest.mark.parametrize(
    "name, options", [("blockwise", dict(max_length=65536)), ("performer", dict(is_causal=True)), ("reformer", {})]
)
def test_64k_tokens_train_within_a_gibibyte(name, options):
    """One sample of 65536 tokens, 8 heads of 64, bfloat16: memory beside arguments and results, by the compiler."""
    shape = dict(num_heads=8, in_features=512, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    make = lambda: zoo.make(name, **shape, **options, rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    tokens = jax.ShapeDtypeStruct((1, 65536, 512), jnp.bfloat16)

    def train(parameters, tokens, rest, cotangent):
        outputs, backward = jax.vjp(lambda *given: nnx.merge(graph, given[0], rest)(given[1]), parameters, tokens)
        return outputs, backward(cotangent)

    compiled = jax.jit(train).lower(parameters, tokens, rest, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30
