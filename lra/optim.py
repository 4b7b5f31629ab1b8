"""How parameters are updated: schedules, groups of parameters, the plateau, the moving average.

A training state is a dict: parameters, optimiser, step, and where there are any plateau, average, the statistics of
batch norms, and the state that is carried from sequence to sequence. It is a pytree of arrays, so a checkpoint of it
resumes a run exactly.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subquad.lra.run import Run

# The parameters of `zoo.statespace` that decide a system's dynamics and its input; C is learned as any other map. A large
# step in them moves the time constants of every feature, which is why the papers learn them slowly and never decay them.
STATE_SPACE = frozenset(("log_decay", "log_phase", "log_scale", "growth", "frequency", "low_rank", "input_matrix", "log_step"))
# What a plateau multiplies the learning rate by.
PLATEAU_FACTOR = 0.2
# PyTorch's OneCycleLR at its defaults: the learning rate at first, at its peak and at last, and Adam's b1 then.
CYCLE, CYCLE_B1 = (1 / 25, 1.0, 1 / 25e4), (0.95, 0.85, 0.95)


def make_schedule(run: Run, peak: float | None = None) -> optax.Schedule:
    """Step -> learning rate.

    With w = warmup_steps of linear warm-up from 0 to the peak, then

        cosine: peak (1 + cos(pi (t - w) / (steps - w))) / 2        linear: peak (1 - (t - w) / (steps - w))
        constant, plateau: peak

    "rsqrt" is peak min(1, t / w) / sqrt(max(t, w)), the Long Range Arena's. "onecycle" is linear between peak / 25 at step 0,
    the peak at step w - 1 and peak / 250,000 at the last step. What a plateau takes off is in the training state
    (`after_validation`), not here.

    Args:
        run: its schedule, steps, warmup_steps.
        peak: None takes run.learning_rate.
    """
    peak = run.learning_rate if peak is None else peak
    warmup = run.warmup_steps
    if run.schedule == "onecycle":
        return one_cycle(run, [peak * part for part in CYCLE])
    if run.schedule == "rsqrt":
        warmup = max(warmup, 1)
        return lambda step: peak * jnp.minimum(1, step / warmup) / jnp.sqrt(jnp.maximum(step, warmup))
    if run.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, run.steps)
    after = optax.linear_schedule(peak, 0.0, run.steps - warmup) if run.schedule == "linear" else optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def one_cycle(run: Run, values: Sequence[float]) -> optax.Schedule:
    """Step -> a number on lines between three: at step 0, at the end of the warm-up, at the last step.

    Optax's own cycles have a third phase, or cosines.
    """
    at = jnp.array([0, max(run.warmup_steps - 1, 0), run.steps - 1])
    return lambda step: jnp.interp(step, at, jnp.array(values))


def group(path, run: Run) -> str:
    """The group of a parameter at a path of the model's state.

    "step" and "state_space" are of state spaces; of the others, "decayed" has weight decay and "spared" has none.
    """
    name = [part.key for part in path if hasattr(part, "key")][-1]
    if name == "log_step":
        return "step"
    if name in STATE_SPACE:
        return "state_space"
    return "decayed" if run.decay == "all" or name in ("kernel", "embedding") else "spared"


def make_optimiser(run: Run) -> optax.GradientTransformation:
    """AdamW with clipping, by groups of parameters.

    Decay spares what is no matrix of a linear map or embedding, unless run.decay is "all"; it always spares the
    parameters of state spaces, whose learning rates are run.state_learning_rate and step_learning_rate where given.
    """
    groups = lambda parameters: jax.tree_util.tree_map_with_path(lambda path, _: group(path, run), parameters)
    decays = lambda parameters: jax.tree.map(lambda name: name == "decayed", groups(parameters))
    rate_of = lambda peak: optax.scale_by_learning_rate(make_schedule(run, peak))
    rate = usual = rate_of(None)
    if (run.state_learning_rate, run.step_learning_rate) != (None, None):
        steps = run.step_learning_rate or run.state_learning_rate
        slow = {"state_space": rate_of(run.state_learning_rate), "step": rate_of(steps)}
        rate = optax.partition({**slow, "decayed": usual, "spared": usual}, groups)
    adam = optax.scale_by_adam(run.b1, run.b2, run.eps)
    if run.schedule == "onecycle":
        adam = optax.inject_hyperparams(lambda b1: optax.scale_by_adam(b1, run.b2, run.eps))(b1=one_cycle(run, CYCLE_B1))
    parts = [adam, optax.add_decayed_weights(run.weight_decay, decays), rate]
    return optax.chain(*([] if run.clip_norm is None else [optax.clip_by_global_norm(run.clip_norm)]), *parts)


def initial_state(run: Run, optimiser: optax.GradientTransformation, parameters, statistics=None, carried=None) -> dict:
    """The training state before the first step; `statistics` are those of batch norms, `carried` is of each row of a batch."""
    state = {"parameters": parameters, "optimiser": optimiser.init(parameters), "step": jnp.zeros((), jnp.int32)}
    if run.schedule == "plateau":
        state["plateau"] = _plateau(run).init(parameters)
    if jax.tree.leaves(statistics):
        state["statistics"] = statistics
    if carried is not None:
        state["carried"] = carried
    if run.ema is not None:
        state["average"] = optax.ema(run.ema).init(parameters)
    return state


def apply_gradient(run: Run, optimiser: optax.GradientTransformation, state: dict, gradient) -> dict:
    """The state after one step along a gradient."""
    updates, memory = optimiser.update(gradient, state["optimiser"], state["parameters"])
    if "plateau" in state:
        updates = jax.tree.map(lambda update: state["plateau"].scale * update, updates)
    parameters = optax.apply_updates(state["parameters"], updates)
    state = {**state, "parameters": parameters, "optimiser": memory, "step": state["step"] + 1}
    if "average" in state:
        state["average"] = optax.ema(run.ema).update(parameters, state["average"])[1]
    return state


def evaluated(run: Run, state: dict):
    """The parameters to evaluate: with run.ema their moving average, of weights (1 - ema) ema^(t - s) / (1 - ema^t).

    Statistics of batch norms, which are averages already, are beside them.
    """
    parameters = state["parameters"]
    if "average" in state:
        average = state["average"]
        parameters = optax.bias_correction(average.ema, run.ema, jnp.maximum(average.count, 1))
    return nnx.merge_state(parameters, state["statistics"]) if "statistics" in state else parameters


def after_validation(run: Run, state: dict, loss: float) -> dict:
    """The state after a validation: the plateau counts one more loss, whose minimum it waits for."""
    if "plateau" not in state:
        return state
    return {**state, "plateau": _plateau(run).update({}, state["plateau"], value=loss)[1]}


def learning_rate(run: Run, state: dict) -> float:
    """The learning rate of the next step, for the parameters that have no rate of their own."""
    rate = float(make_schedule(run)(int(state["step"])))
    return rate * float(state["plateau"].scale) if "plateau" in state else rate


def _plateau(run: Run) -> optax.GradientTransformationExtraArgs:
    return optax.contrib.reduce_on_plateau(PLATEAU_FACTOR, run.patience)
