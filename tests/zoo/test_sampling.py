"""The rule by which a draft's tokens stand."""

import jax
import jax.numpy as jnp
import numpy as np

from subquad.zoo import sampling


def test_drafted_tokens_stand_as_often_as_they_may_and_leave_the_models_distribution():
    p, q = jnp.array([0.5, 0.3, 0.15, 0.05, 0.0]), jnp.array([0.1, 0.3, 0.0, 0.35, 0.25])
    count, (draws, verdicts) = 50_000, jax.random.split(jax.random.key(0))
    drafted = jax.random.categorical(draws, jnp.log(q), shape=(count, 1))
    many = lambda *rows: jnp.broadcast_to(jnp.stack(rows), (count, len(rows), 5))
    tokens, stood = jax.jit(sampling.judge)(verdicts, drafted, many(q), many(p, p[::-1]))
    np.testing.assert_allclose(stood.mean(), jnp.minimum(p, q).sum(), atol=0.01)
    np.testing.assert_allclose(jnp.bincount(tokens[:, 0], length=5) / count, p, atol=0.01)
    after = tokens[:, 1][stood == 1]
    np.testing.assert_allclose(jnp.bincount(after, length=5) / len(after), p[::-1], atol=0.015)


def test_the_first_drafted_token_that_falls_takes_those_after_it_along():
    one = lambda *tokens: jax.nn.one_hot(jnp.array([tokens]), 4)
    tokens, stood = sampling.judge(None, jnp.array([[1, 2, 3]]), one(1, 2, 3), one(1, 0, 3, 2))
    assert stood.tolist() == [1] and tokens[0, :2].tolist() == [1, 0]
    tokens, stood = sampling.judge(None, jnp.array([[1, 2, 3]]), one(1, 2, 3), one(1, 2, 3, 0))
    assert stood.tolist() == [3] and tokens.tolist() == [[1, 2, 3, 0]]
    tokens, stood = sampling.judge(None, jnp.array([[1, 2, 3]]), one(1, 2, 3), one(1, 2, 3, 0).at[0, 2].set(jnp.nan))
    assert stood.tolist() == [2] and tokens[0, :3].tolist() == [1, 2, sampling.INVALID]
