import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra import collapse, models, optim, tasks
from subquad.lra.plan import plan


def small_run(layer="softmax", **words):
    small = dict(config="tiny", in_features=16, num_layers=1, mlp_features=16)
    return plan("quickstart", layer, **{**small, **words})


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_schedules():
    at = lambda schedule, step, **words: float(optim.make_schedule(small_run(schedule=schedule, **words))(step))
    peaked = dict(steps=100, warmup_steps=10, learning_rate=1.0)
    for schedule in ("cosine", "linear", "constant", "plateau"):
        wanted = [0, 0.5, 1, 0.5, 0] if schedule in ("cosine", "linear") else [0, 0.5, 1, 1, 1]
        assert [at(schedule, step, **peaked) for step in (0, 5, 10, 55, 100)] == pytest.approx(wanted, abs=1e-6), schedule
    assert at("constant", 0, **{**peaked, "warmup_steps": 0}) == at("linear", 0, **{**peaked, "warmup_steps": 0}) == 1
    assert [small_run(steps=steps).warmup_steps for steps in (1, 10, 300)] == [0, 5, 25]
    assert at("linear", 32, **peaked) == pytest.approx(68 / 90) and at("cosine", 32, **peaked) > 0.8
    # The released ListOps configuration: 0.05 * min(1, t/1000) / sqrt(max(t, 1000)), 1.58e-3 at its peak.
    arena = dict(steps=5000, warmup_steps=1000, learning_rate=0.05)
    assert [at("rsqrt", step, **arena) for step in (0, 500, 1000, 5000)] == pytest.approx(
        [0, 0.79e-3, 1.58e-3, 0.707e-3], rel=0.01
    )


def test_onecycle_is_pytorchs():
    words = dict(schedule="onecycle", steps=50, warmup_steps=10, learning_rate=0.5, weight_decay=0.0, clip_norm=None)
    run = small_run(**words)
    schedule = optim.make_schedule(run)

    def torch(step, low, high, last, first_end=9, end=49):
        """OneCycleLR of PyTorch 2, anneal_strategy="linear", pct_start=0.2: two phases, whose ends are steps."""
        if step <= first_end:
            return low + (high - low) * step / first_end
        return high + (last - high) * (step - first_end) / (end - first_end)

    rates = [torch(step, 0.5 / 25, 0.5, 0.5 / 25 / 1e4) for step in range(50)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(50)], rates, rtol=1e-5, atol=1e-8)
    assert float(optim.make_schedule(small_run(**{**words, "warmup_steps": 0}))(0)) == 0.5
    # Adam by hand, with the b1 that PyTorch cycles against the rate, and corrects the bias by.
    optimiser, gradients = optim.make_optimiser(run), np.random.default_rng(0).normal(size=50)
    state, place, first, second = optim.initial_state(run, optimiser, {"kernel": jnp.zeros(())}), 0.0, 0.0, 0.0
    step = jax.jit(lambda state, gradient: optim.apply_gradient(run, optimiser, state, {"kernel": gradient}))
    for at, gradient in enumerate(gradients):
        b1 = torch(at, 0.95, 0.85, 0.95)
        first, second = b1 * first + (1 - b1) * gradient, run.b2 * second + (1 - run.b2) * gradient**2
        root = np.sqrt(second / (1 - run.b2 ** (at + 1))) + run.eps
        place -= rates[at] * first / (1 - b1 ** (at + 1)) / root
        state = step(state, gradient)
        assert float(state["parameters"]["kernel"]) == pytest.approx(place, rel=1e-4)
    with pytest.raises(ValueError, match="b1 must be left out under schedule 'onecycle'.*got 0.8"):
        small_run(**words, b1=0.8)


@pytest.fixture(scope="module")
def s4():
    words = dict(weight_decay=0.1, warmup_steps=0, schedule="constant", clip_norm=None)
    run = small_run("s4", state_learning_rate=1.0, **words)
    return run, nnx.state(models.build(run, tasks.find_task("listops", "tiny")), nnx.Param)


def test_weight_decay_spares_what_is_no_matrix(s4):
    run, parameters = s4
    moved = {}
    for decay in ("matrices", "all"):
        optimiser = optim.make_optimiser(dataclasses.replace(run, decay=decay))
        state, zeros = optimiser.init(parameters), jax.tree.map(jnp.zeros_like, parameters)
        for _ in range(2):
            updates, state = optimiser.update(zeros, state, parameters)
        moved[decay] = {path for path, update in leaves(updates).items() if jnp.any(update != 0)}
    assert moved["matrices"] == {path for path in leaves(parameters) if "'kernel'" in path or "'embedding'" in path}
    spared = {path for path in leaves(parameters) if any(f"'{name}'" in path for name in optim.STATE_SPACE)}
    assert spared and not moved["all"] & spared and any("output_matrix" in path for path in moved["all"])


def test_state_spaces_learn_at_a_rate_of_their_own(s4):
    run, parameters = s4
    run = dataclasses.replace(run, weight_decay=0.0, learning_rate=0.1, state_learning_rate=0.001)
    optimiser = optim.make_optimiser(run)
    state, ones = optimiser.init(parameters), jax.tree.map(jnp.ones_like, parameters)
    for _ in range(2):
        updates, state = optimiser.update(ones, state, parameters)
    for path, update in leaves(updates).items():
        # The first steps of Adam along a constant gradient are as long as the learning rate.
        slow = any(f"'{name}'" in path for name in optim.STATE_SPACE)
        np.testing.assert_allclose(update, -0.001 if slow else -0.1, rtol=1e-4, err_msg=path)
    optimiser = optim.make_optimiser(dataclasses.replace(run, step_learning_rate=0.01))
    updates, _ = optimiser.update(ones, optimiser.init(parameters), parameters)
    for path, update in leaves(updates).items():
        slow = -0.001 if any(f"'{name}'" in path for name in optim.STATE_SPACE) else -0.1
        np.testing.assert_allclose(update, -0.01 if "log_step" in path else slow, rtol=1e-4, err_msg=path)
    # A parameter that zoo.statespace gains is named here, in one group or the other.
    names = set(re.findall(r"'system'\]\['(\w+)'", " ".join(leaves(parameters))))
    others = dict(s5={}, lru={}, dss=dict(normalization="softmax", max_length=9))
    for name, options in others.items():
        names |= set(nnx.state(zoo.make(name, in_features=4, state_size=4, rngs=nnx.Rngs(0), **options))) - {"skip", "out"}
    assert names == optim.STATE_SPACE | {"output_matrix"}


def test_a_plateau_cuts_the_steps_and_an_average_follows_them():
    words = dict(schedule="plateau", patience=2, warmup_steps=0, ema=0.5, weight_decay=0.0, clip_norm=None)
    run = small_run(learning_rate=1.0, **words)
    optimiser = optim.make_optimiser(run)
    state, places = optim.initial_state(run, optimiser, {"kernel": jnp.zeros(())}), []
    for loss in (2.0, 1.0, 1.5, 1.0, 0.9):
        state = optim.apply_gradient(run, optimiser, state, {"kernel": jnp.ones(())})
        places.append(float(state["parameters"]["kernel"]))
        weights = 0.5 ** np.arange(len(places))[::-1]
        assert float(optim.evaluated(run, state)["kernel"]) == pytest.approx(np.average(places, weights=weights), rel=1e-5)
        state = optim.after_validation(run, state, loss)
    # The third and the fourth loss are no new minimum.
    np.testing.assert_allclose(np.diff([0.0, *places]), [-1, -1, -1, -1, -optim.PLATEAU_FACTOR], rtol=1e-4)
    assert optim.learning_rate(run, state) == pytest.approx(optim.PLATEAU_FACTOR)


@pytest.mark.parametrize(
    "words,said",
    [
        (dict(ema=1.0), "ema must be in"),
        (dict(b1=2.0), r"b1 must be in \[0, 1\), got 2.0"),
        (dict(eps=-1.0), "eps must be > 0 and finite"),
        (dict(weight_decay=float("nan")), "weight_decay must be >= 0 and finite, got nan"),
        (dict(learning_rate=float("inf")), "learning_rate must be > 0 and finite, got inf"),
        (dict(seed=2**32), "seed must be in"),
        (dict(steps=10, warmup_steps=11), "warmup_steps must be at most steps = 10"),
        (dict(positions="sinusoidal", position_std=0.1), "position_std must be none with positions='sinusoidal'"),
        (dict(patience=0), "patience must be > 0"),
        (dict(state_learning_rate=1e-3), "state_learning_rate must be none for layer 'softmax', which has no parameters"),
    ],
)
def test_values_out_of_their_range_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        small_run(**words)
    with pytest.raises(TypeError, match="remat must be bool, got 1"):
        small_run(remat=1)


def test_a_collapse_is_a_fall_from_clearly_above_chance_to_chance():
    step = lambda *scores, **words: collapse.collapsed_step([[k, s, 0.0] for k, s in enumerate(scores)], 0.2, 0.01, **words)
    assert step(0.2, 0.3, 0.29, 0.21, 0.2) == 3
    assert step(0.2, 0.3, 0.205, 0.4) == 2  # a recovery does not hide it
    assert step(0.2, 0.23, 0.2) is None  # noise around chance is no knowledge
    assert step(0.2, 0.3, 0.25) is None and step() is None
    assert collapse.collapsed_step([[1, 3.0, 0], [2, 4.0, 0]], -4.0, 0.04, -1) == 2


def test_chance_by_hand():
    batches = [
        dict(targets=np.array([1, 1, 3]), weights=np.ones(3)),
        dict(targets=np.array([1, 0, 0]), weights=np.array([1.0, 1.0, 0.0])),
    ]
    assert collapse.chance(batches, "accuracy") == pytest.approx((0.6, np.sqrt(0.6 * 0.4 / 5)))
    tokens = [dict(targets=np.array([[5, 6, 5, 6], [-1, -1, -1, -1]]), weights=np.ones(2))]  # -1: nothing is asked
    assert collapse.chance(tokens, "bits_per_byte") == pytest.approx((-1.0, 0.01))
