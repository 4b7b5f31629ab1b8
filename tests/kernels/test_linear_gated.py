"""Linear attention with decays and the delta rule: against peers, and where decays are extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import launch, linear, machine_code
from tests import oracle

FORMS = ["plain", "heads", "channels", "delta", "heads-delta", "channels-delta"]
gated = jax.jit(linear.gated, static_argnames=("normalize", "return_state", "scale", "implementation"))


def draw(form, length, *, batch=2, heads=2, features=8, values=6, seed=0):
    """Arrays by the names of the arguments; decays of -0.05 to -5 a token."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    key = normal(batch, length, heads, features)
    arrays = dict(
        query=normal(batch, length, heads, features), key=key / np.linalg.norm(key, axis=-1, keepdims=True),
        value=normal(batch, length, heads, values), initial_state=normal(batch, heads, features, values),
    )  # fmt: skip
    if "delta" in form:
        arrays["beta"] = rng.uniform(size=(batch, length, heads)).astype(np.float32)
    if "heads" in form or "channels" in form:
        shape = (batch, length, heads, features)[: 4 if "channels" in form else 3]
        arrays["log_decay"] = -np.exp(rng.uniform(-3, 1.6, shape)).astype(np.float32)
    return arrays


def call(arrays, **options):
    query, key, value, *rest = (arrays[x] for x in ("query", "key", "value"))
    rest = {name: x for name, x in arrays.items() if name not in ("query", "key", "value")}
    return gated(query, key, value, return_state=True, **rest, **options)


def outputs_and_gradients(arrays, mask=None, **options):
    @jax.jit
    def run(arrays):
        out, pull = jax.vjp(lambda x: call(x, mask=mask, **options), arrays)
        return out, pull(jax.tree.map(jnp.cos, out))[0]

    return run(arrays)


def assert_close(actual, expected, tolerance=1e-5):
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)
        assert oracle.relative_error(x, y) < tolerance, jax.tree_util.keystr(path)


# ---------------------------------------------------------------------------------------------------- against peers


HEADS_FIRST = ("retention", "delta_rule", "rwkv7")
ARGUMENTS = dict(
    q="query", k="key", v="value", g="log_decay", gk="log_decay", beta="beta", h0="initial_state", s0="initial_state",
    C="query", B="key", X="value", A="log_decay", w="log_decay", kappa="kappa", a="a",
)  # fmt: skip


def as_peer(name):
    """The peer's inputs -> its outputs, by our operation."""

    def run(inputs, implementation):
        arrays = {ARGUMENTS[x]: y for x, y in inputs.items() if x != "z0"}
        if name in HEADS_FIRST:
            arrays = {x: y if x == "initial_state" else y.swapaxes(1, 2) for x, y in arrays.items()}
        scale = arrays["query"].shape[-1] ** -0.5
        if name == "rwkv7":
            kappa, rate = arrays.pop("kappa"), arrays.pop("a")
            arrays["erase"] = kappa, rate * kappa
        if name == "retention":
            log_gamma = jnp.log1p(-(2.0 ** (-5 - jnp.arange(2.0))))
            arrays["log_decay"] = jnp.broadcast_to(log_gamma, arrays["query"].shape[:3])
        if name == "mamba2_ssd":
            arrays["initial_state"] = arrays["initial_state"][:, 0].mT
            out, state = call(arrays, scale=1.0, implementation=implementation)
            return dict(y=out, h=state.mT)
        if name == "linear_attn_norm":
            arrays["initial_state"] = arrays["initial_state"], inputs["z0"][:, 0]
            out, (state, z) = call(arrays, scale=scale, normalize=True, implementation=implementation)
            return dict(o=out, s=state, z=z[:, None])
        out, state = call(arrays, scale=scale, implementation=implementation)
        out = dict(o=out.swapaxes(1, 2) if name in HEADS_FIRST else out, h=state)
        return dict(o=out["o"]) if name == "retention" else out

    return run


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "name",
    ["retention", "mamba2_ssd", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda", "linear_attn_norm", "rwkv7"],
)
def test_outputs_and_gradients_are_those_of_the_peer(name, implementation):
    data = oracle.load(name)
    run = functools.partial(as_peer(name), implementation=implementation)
    oracle.compare(None, data, lambda inputs, _: run(inputs))


# ----------------------------------------------------------------------------------------------------- the definition


def float64_loop(query, key, value, initial_state, log_decay=None, beta=None, bonus=None):
    """The docstring's lines in NumPy."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    state, out = np.array(initial_state, np.float64), np.zeros(value.shape)
    for t in range(query.shape[1]):
        if bonus is not None:
            own = (np.float64(bonus) * key[:, t])[..., None] * value[:, t, :, None]
            out[:, t] = np.einsum("bnm,bnmv->bnv", query[:, t], state + own)
        if log_decay is not None:
            decay = np.exp(np.asarray(log_decay[:, t], np.float64))
            state *= decay[..., None] if decay.ndim == 3 else decay[..., None, None]
        write = value[:, t]
        if beta is not None:
            write = np.asarray(beta[:, t], np.float64)[..., None] * (write - np.einsum("bnm,bnmv->bnv", key[:, t], state))
        state += key[:, t, :, :, None] * write[:, :, None]
        if bonus is None:
            out[:, t] = np.einsum("bnm,bnmv->bnv", query[:, t], state)
    return out, state


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("form", FORMS)
def test_values_are_the_definition(form, implementation):
    arrays = draw(form, 75)
    assert_close(call(arrays, implementation=implementation), float64_loop(**arrays))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("form", ["channels", "heads-delta"])
def test_with_a_bonus_a_token_reads_the_state_before_it(form, implementation):
    arrays = draw(form, 75) | dict(bonus=np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32))
    want = float64_loop(**arrays)
    assert_close(call(arrays, implementation=implementation), want)
    pieces, state = [], arrays["initial_state"]
    for cut in (slice(0, 70), slice(70, 71), slice(71, 75)):
        part = {name: x if name == "bonus" else x[:, cut] for name, x in arrays.items()} | dict(initial_state=state)
        out, state = call(part, implementation=implementation)
        pieces.append(out)
    assert_close((jnp.concatenate(pieces, 1), state), want)


@pytest.mark.parametrize("form", ["heads", "channels"])
def test_what_is_erased_is_read_before_the_decay(form):
    """Over a border of chunks, under a mask, as the reference, with the same gradients."""
    rng, arrays = np.random.default_rng(1), draw(form, 75)
    reader = rng.normal(size=arrays["key"].shape)
    reader = (reader / np.linalg.norm(reader, axis=-1, keepdims=True)).astype(np.float32)
    arrays["erase"] = reader, rng.uniform(size=reader.shape).astype(np.float32) * reader
    mask = rng.uniform(size=(2, 1, 1, 75)) < 0.8
    want, got = (outputs_and_gradients(arrays, mask, implementation=x) for x in ("reference", "xla"))
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_to_erase_what_the_key_reads_is_the_delta_rule(implementation):
    delta = draw("delta", 75)
    beta, key = delta["beta"][..., None], delta["key"]
    erasing = {name: x for name, x in delta.items() if name != "beta"}
    erasing |= dict(value=beta * delta["value"])
    got = call(erasing | dict(erase=(key, beta * key)), implementation=implementation)
    assert_close(got, float64_loop(**delta))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_a_floor_is_the_least_that_is_divided_by(implementation):
    """Where the normaliser is larger, of either sign, nothing but its size counts."""
    arrays = draw("heads", 75)
    ones = np.ones_like(arrays["value"][..., :1])
    state, sums = arrays["initial_state"], arrays["initial_state"][..., 0]
    widened = arrays | dict(value=np.concatenate([arrays["value"], ones], -1), initial_state=np.concatenate(
        [state, sums[..., None]], -1))  # fmt: skip
    both, _ = float64_loop(**widened)
    floor = np.random.default_rng(1).uniform(0.1, 2, both.shape[:3]).astype(np.float32)
    size = np.abs(both[..., -1])
    assert (size < floor).sum() > 20 < (size > floor).sum()
    out, _ = call(arrays | dict(initial_state=(state, sums), floor=floor), normalize=True, implementation=implementation)
    assert_close(out, both[..., :-1] / np.maximum(size, floor)[..., None])
    with pytest.raises(ValueError, match="floor must be None without normalize"):
        call(arrays | dict(floor=floor))


@pytest.mark.parametrize("form", ["heads", "channels-delta"])
def test_gradients_over_many_chunks_are_those_of_the_reference(form):
    """Several segments of several chunks, and a length that no chunk divides."""
    arrays = draw(form, 275, batch=1)
    got, want = (outputs_and_gradients(arrays, implementation=i) for i in ("xla", "reference"))
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("form", ["heads", "channels-delta"])
def test_decays_of_any_size_are_exact(form):
    """A state reset costs the tokens after it no digits, however often, and no gradient is lost or not a number."""
    arrays = draw(form, 130)
    rng = np.random.default_rng(1)
    pick = rng.uniform(size=arrays["log_decay"].shape)
    decay = np.select([pick < 0.1, pick < 0.2, pick < 0.3], [-np.inf, -1e30, -70.0], arrays["log_decay"] / 10)
    arrays["log_decay"] = np.where(pick > 0.9, 0, decay).astype(np.float32)
    want = outputs_and_gradients(arrays, implementation="reference")
    assert_close(outputs_and_gradients(arrays, implementation="xla"), want, 2e-5)
    assert_close(want[0], float64_loop(**arrays))


@pytest.mark.parametrize("form", ["channels", "channels-delta"])
@pytest.mark.parametrize("largest", [0.01, 0.3, 3.0], ids=["in one product", "in halves", "in pairs"])
def test_channels_that_decay_slowly_are_scored_as_exactly(form, largest):
    arrays = draw(form, 130, batch=1)
    arrays["log_decay"] *= largest / 5
    got, want = (outputs_and_gradients(arrays, implementation=i) for i in ("xla", "reference"))
    assert_close(got, want, 2e-5)


def test_a_slow_and_a_fast_sample_mapped_together_are_as_alone():
    """Under `vmap` a choice computes both ways: the one that is not for a sample must add nothing to its gradients."""
    slow, fast = draw("channels", 70, batch=1), draw("channels", 70, batch=1, seed=1)
    slow["log_decay"] = slow["log_decay"] / 1000
    fast["log_decay"] = np.where(fast["log_decay"] < -1, -np.inf, fast["log_decay"]).astype(np.float32)
    alone = [outputs_and_gradients(arrays) for arrays in (slow, fast)]
    both = jax.vmap(outputs_and_gradients)(jax.tree.map(lambda *x: np.stack(x), slow, fast))
    for i, want in enumerate(alone):
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), want)


def test_equal_keys_that_replace_everything_are_exact():
    """The delta rule with one key all along: every value replaces the one before, and the inverse's powers are binomials."""
    arrays = draw("delta", 64, batch=1)
    arrays |= dict(key=np.repeat(arrays["key"][:, :1], 64, 1), beta=np.ones_like(arrays["beta"]))
    assert_close(call(arrays), float64_loop(**arrays))


def test_a_reset_separates_two_segments_to_the_last_bit():
    arrays = draw("heads", 40)
    arrays["log_decay"][:, 17] = -np.inf
    louder = {x: y * np.float32(1e6) if x == "initial_state" else y.copy() for x, y in arrays.items()}
    louder["value"][:, :17] *= 1e6
    for implementation in ("xla", "reference"):
        (out, state), (other, last) = (call(x, implementation=implementation) for x in (arrays, louder))
        np.testing.assert_array_equal(out[:, 17:], other[:, 17:])
        np.testing.assert_array_equal(state, last)


# ------------------------------------------------------------------------------------------------- states and padding


@pytest.mark.parametrize("form", ["plain", "channels-delta"])
def test_a_sequence_in_pieces_gives_the_same(form):
    arrays = draw(form, 100)
    whole, last = call(arrays)
    state, pieces, start = arrays.pop("initial_state"), [], 0
    for width in (1, 63, 36):
        piece = {name: x[:, start : start + width] for name, x in arrays.items()}
        out, state = call({**piece, "initial_state": state})
        pieces, start = [*pieces, out], start + width
    assert_close((jnp.concatenate(pieces, 1), state), (whole, last))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_leaves_the_state_alone(implementation):
    """As if the padded tokens were not there, though they hold NaN; their gradients are 0."""
    arrays = draw("channels-delta", 20, batch=1)
    keep = np.random.default_rng(2).uniform(size=20) < 0.6
    kept = {name: x if name == "initial_state" else x[:, keep] for name, x in arrays.items()}
    padded = {name: x.copy() for name, x in arrays.items()}
    for name in set(padded) - {"initial_state"}:
        padded[name][:, ~keep] = np.nan

    def loss(arrays, mask, rows):
        out, state = call(arrays, mask=mask, implementation=implementation)
        return jnp.sum(jnp.sin(out[:, rows])) + jnp.sum(state**2), (out[:, rows], state)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=())
    (_, got), gradients = run(padded, keep[None, None, None], np.flatnonzero(keep))
    (_, want), expected = run(kept, None, np.arange(keep.sum()))
    assert_close(got, want)
    for name, gradient in gradients.items():
        if name != "initial_state":
            assert (gradient[:, ~keep] == 0).all(), name
            gradient = gradient[:, keep]
        assert_close(gradient, expected[name], 2e-5)


def test_normalized_weights_sum_to_one():
    arrays = draw("heads", 70)
    del arrays["initial_state"]
    arrays |= dict(query=np.abs(arrays["query"]), key=np.abs(arrays["key"]), value=np.ones_like(arrays["value"]))
    out, (state, normalizer) = call(arrays, normalize=True)
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    np.testing.assert_allclose(state, np.broadcast_to(normalizer[..., None], state.shape), rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_neighbouring_heads_share_keys(implementation):
    arrays = draw("heads-delta", 9, heads=4)
    arrays |= dict(query=arrays["query"][:, :, :2], key=arrays["key"][:, :, :1])
    share = lambda x: x | {name: jnp.repeat(x[name], 4 // x[name].shape[2], 2) for name in ("query", "key", "value")}
    run = lambda x, prepare: sum(jnp.cos(y).sum() for y in call(prepare(x), implementation=implementation))
    got, want = (jax.jit(jax.value_and_grad(functools.partial(run, prepare=p)))(arrays) for p in (lambda x: x, share))
    run = jax.value_and_grad(lambda x: sum(jnp.cos(y).sum() for y in call(x, implementation=implementation)))
    repeated = jax.value_and_grad(lambda x: sum(jnp.cos(y).sum() for y in call(share(x))))
    got, want = jax.jit(run)(arrays), jax.jit(repeated)(arrays)
    assert_close(got, want)


def test_float16_and_bfloat16_differ_by_their_last_rounding():
    for dtype in ("bfloat16", "float16"):
        arrays = draw("channels", 70)
        arrays |= {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value")}
        out, state = call(arrays)
        want, last = float64_loop(**{name: np.asarray(x, np.float32) for name, x in arrays.items()})
        assert out.dtype == dtype and state.dtype == jnp.float32
        assert oracle.relative_error(out.astype(jnp.float32), want) < float(jnp.finfo(dtype).eps)
        assert oracle.relative_error(state, last) < 1e-5


@pytest.mark.parametrize("by", [-np.inf, -1e4])
def test_decays_before_a_token_that_forgets_have_no_gradient_from_what_follows(by):
    """Their sum over what follows would be 0 to rounding only."""
    arrays = draw("heads", 150)
    arrays["log_decay"][:, 100] = by

    def later(log_decay, implementation):
        return jnp.sum(jnp.sin(linear.gated(**arrays | dict(log_decay=log_decay), implementation=implementation)[:, 100:]))

    got, want = (jax.jit(jax.grad(later), static_argnums=1)(arrays["log_decay"], i) for i in (None, "reference"))
    assert (got[:, :101] == 0).all()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_head_too_wide_for_the_delta_rule_is_declined_with_the_reason():
    arrays = draw("delta", 20, features=200)
    with launch.recording(), pytest.raises(launch.Declined, match="heads of at most 128 features"):
        jax.eval_shape(lambda x: linear.gated(**x, implementation="triton"), arrays)


@pytest.mark.aot
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_the_widest_heads_with_the_delta_rule(dtype):
    """Those that float32 declines, and so the grid lacks."""
    arrays = draw("channels-delta", 20, batch=1, heads=1, features=256, values=256)
    arrays |= {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value")}

    def run(arrays):
        out, pull = jax.vjp(lambda x: linear.gated(**x, implementation="triton"), arrays)
        return pull(out)

    with launch.recording() as launches:
        jax.eval_shape(run, arrays)
    kinds = [one for one in dict.fromkeys(launches) if one.name == "linear_states"]
    assert len(kinds) == 2
    for one in kinds:
        compiled = machine_code.compile(one, "sm_90")
        assert compiled.spills == 0 and compiled.shared <= machine_code.SHARED_LIMIT["sm_90"], compiled


@pytest.mark.interpret
@pytest.mark.parametrize("form", ["channels", "heads-delta"])
def test_a_normaliser_is_that_of_the_decays_and_the_delta_rule(form):
    arrays = draw(form, 20, batch=1)
    arrays |= {name: np.abs(arrays[name]) for name in ("query", "key", "initial_state")}
    arrays["initial_state"] = arrays["initial_state"], 1 + arrays["initial_state"][..., 0]
    got, want = (outputs_and_gradients(arrays, normalize=True, implementation=i) for i in ("interpret", "reference"))
    assert_close(got, want, 2e-5)
