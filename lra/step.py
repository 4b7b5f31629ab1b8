"""One step of training: the gradient of a batch, in parts and over devices, and the update."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from subquad.lra import models, parallel
from subquad.lra.objectives import Objective
from subquad.lra.optim import apply_gradient
from subquad.lra.run import Run


def train_step(run: Run, objective: Objective, graph, optimiser, state, fixed, batch, *, mesh=None):
    """One step of the optimiser: (state, fixed, batch) -> (state, loss). Its inputs' buffers may be reused."""
    key = jax.random.fold_in(jax.random.key(run.seed), state["step"])
    total = parallel.over_batch(functools.partial(batch_gradient, run, objective, graph), mesh)
    if "statistics" in state:
        fixed = nnx.merge_state(fixed, state["statistics"])
    batch = {**batch, "carried": state.get("carried")}
    ((value, (count, statistics)), gradient), carried = total(state["parameters"], fixed, key, batch)
    # Sums until here, because parts of a batch may have different numbers of targets.
    value, gradient = jax.tree.map(lambda a: a / jnp.maximum(count, 1), (value, gradient))
    if "statistics" in state:
        parts = run.accumulate * (1 if mesh is None else mesh.size)
        state = {**state, "statistics": jax.tree.map(lambda a: a / parts, statistics)}
    if carried is not None:
        state = {**state, "carried": carried}
    return apply_gradient(run, optimiser, state, gradient), value


def batch_gradient(run: Run, objective: Objective, graph, parameters, fixed, key, batch):
    """(((sum of losses, (number of targets, statistics)), gradient of the sum), carried) over a batch, in run.accumulate parts.

    Statistics are those of batch norms, and centroids, after the batch, summed over its parts. Each part moves them by itself.
    What is carried is of each row, from "carried" of the batch on; None where there is none.
    """

    router = dict(balance=run.balance_loss, z=run.z_loss) if run.num_experts else {}

    def loss(parameters, part, key):
        model = nnx.merge(graph, parameters, fixed, copy=True)  # statistics are written inside the gradient's trace
        model.set_attributes(moves_centroids=True, raise_if_not_found=False)
        called = models.carrying(model, part)
        value, count = objective.loss(called, part, rngs=nnx.Rngs(dropout=key), **router)
        return value, (count, nnx.state(model, nnx.BatchStat), getattr(called, "carried", None))

    def one(part, key):
        (value, (count, statistics, carried)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters, part, key)
        return ((value, (count, statistics)), gradient), carried

    def accumulate(total, part):
        part, index = part
        sums, carried = one(part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, sums), carried

    if run.accumulate == 1:
        return one(batch, key)
    parts = jax.tree.map(lambda a: a.reshape(run.accumulate, -1, *a.shape[1:]), batch)
    first = jax.tree.map(lambda a: a[0], parts)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, first, key)[0])
    sums, carried = jax.lax.scan(accumulate, zeros, (parts, jnp.arange(run.accumulate)))
    return sums, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), carried)
