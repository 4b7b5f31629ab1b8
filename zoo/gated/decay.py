"""How fast the state of a gated layer fades."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from subquad.zoo.positions import run_starts

LEAST_STEP = 1e-4  # as in the code of Mamba, Mamba-2 and Gated DeltaNet
# Tokens of one associative scan. Over a whole sequence XLA recomputes the scan at every one of its log2(T) levels.
CHUNK = 128


def step_bias(rngs: nnx.Rngs, shape: tuple[int, ...], low: float, high: float) -> Float[Array, "*shape"]:
    """Float32 numbers whose softplus is log-uniform between `low` and `high`, and at least `LEAST_STEP`."""
    step = jnp.exp(jax.random.uniform(rngs.params(), shape, jnp.float32, math.log(low), math.log(high)))
    step = jnp.maximum(step, LEAST_STEP)
    return step + jnp.log(-jnp.expm1(-step))


def with_segments(
    log_decay: Float[Array, "B T *heads"], segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "B T *heads"]:
    """The logarithm of a decay, which forgets everything where another segment begins than that of the token before."""
    if segment_ids is None:
        return log_decay
    return jnp.where(run_starts(segment_ids).reshape(*segment_ids.shape, *(1,) * (log_decay.ndim - 2)), -jnp.inf, log_decay)


def running_largest(
    log_decay: Float[Array, "B T N"], log_weight: Float[Array, "B T N"], start: Float[Array, "B N"]
) -> Float[Array, "B T+1 N"]:
    """The largest log weight in a state, before the first token and after each: m_t = max(log_decay_t + m_{t-1}, log_weight_t).

    A state that is held as exp(-m) times itself has no weight above 1, however large exp(log_weight) is. m cancels in what is
    divided by such a sum, and is a constant to its derivatives.
    """
    dtype = jnp.result_type(log_decay, log_weight, start)  # a state may be float32 where the others are float64
    log_decay, log_weight, start = (x.astype(dtype) for x in (log_decay, log_weight, start))
    (batch, length, width), size = log_decay.shape, min(log_decay.shape[1], CHUNK)
    count = -(-length // size)

    def cut(x, fill):
        x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0)), constant_values=fill)
        return jnp.moveaxis(x.reshape(batch, count, size, width), 1, 0)

    def combine(one, other):
        return one[0] + other[0], jnp.maximum(one[1] + other[0], other[1])

    def step(before, chunk):
        decay, largest = jax.lax.associative_scan(combine, chunk, axis=1)
        largest = jnp.maximum(before[:, None] + decay, largest)
        return largest[:, -1], largest

    _, largest = jax.lax.scan(step, start, (cut(log_decay, 0.0), cut(log_weight, -jnp.inf)))
    return jnp.concatenate([start[:, None], jnp.moveaxis(largest, 0, 1).reshape(batch, -1, width)[:, :length]], 1)
