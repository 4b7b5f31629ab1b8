"""Linear attention against a float64 loop, against itself in pieces, and against peers."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from subquad.kernels import linear, specs
from subquad.lra.bench import measure
from tests import oracle

IMPLEMENTATIONS = ["xla", "reference"]
LENGTHS = [1, 7, 129, 300]

attention = jax.jit(linear.attention, static_argnames=("is_causal", "return_state", "eps", "implementation"))


def draw(length, *, keys=None, batch=2, heads=2, features=5, values=3, spread=4.0, seed=0):
    """query, key, value, key_log_scale, mask: positive features, log scales over a range of several `spread`s."""
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    query, key = (rng.uniform(0.05, 1, (batch, n, heads, features)).astype(np.float32) for n in (length, keys))
    value = rng.normal(size=(batch, keys, heads, values)).astype(np.float32)
    scale = (spread * rng.normal(size=(batch, keys, heads))).astype(np.float32)
    mask = rng.uniform(size=(batch, 1, 1, keys)) < 0.8
    return query, key, value, scale, mask


def loop(query, key, value, scale, mask, is_causal, eps=0.0):
    """The definition, one query at a time, in float64 (scales enter unstabilised)."""
    query, key, value, scale = (np.asarray(x, np.float64) for x in (query, key, value, scale))
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.broadcast_to(mask, (len(query), *mask.shape[1:]))[b, 0, 0].copy()
        if is_causal:
            seen[t + 1 :] = False
        if not seen.any():
            continue
        weights = np.exp(scale[b, seen, n] - scale[b, seen, n].max()) * (key[b, seen, n] @ query[b, t, n])
        out[b, t, n] = weights @ value[b, seen, n] / (weights.sum() + eps)
    return out


def exact_gradients(arguments, cotangent, **options):
    """Gradients of <cotangent, output> by the reference in float64."""
    *arrays, mask = arguments
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in arrays]
        run = lambda q, k, v, r: attention(q, k, v, key_log_scale=r, mask=mask, implementation="reference", **options)
        loss = lambda *arrays: jnp.sum(cotangent * run(*arrays))
        return [np.asarray(g) for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_are_the_definition(length, is_causal, implementation):
    query, key, value, scale, mask = draw(length)
    out = attention(
        query, key, value, key_log_scale=scale, mask=mask, is_causal=is_causal, implementation=implementation
    )
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, loop(query, key, value, scale, mask, is_causal), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keys", [1, 40])
def test_cross_attention(keys, implementation):
    query, key, value, scale, mask = draw(9, keys=keys)
    out = attention(query, key, value, key_log_scale=scale, mask=mask, implementation=implementation)
    np.testing.assert_allclose(out, loop(query, key, value, scale, mask, False), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_eps_is_in_units_of_the_largest_visible_key(is_causal, implementation):
    query, key, value, scale, mask = draw(20)
    options = dict(key_log_scale=scale, mask=mask, is_causal=is_causal, implementation=implementation)
    out = attention(query, key, value, eps=0.5, **options)
    np.testing.assert_allclose(out, loop(query, key, value, scale, mask, is_causal, eps=0.5), rtol=1e-4, atol=2e-6)
    assert np.abs(out - attention(query, key, value, **options)).max() > 0.01


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 300])
def test_gradients(length, is_causal):
    arguments = draw(length, spread=2.0)
    *arrays, mask = arguments
    cotangent = np.random.default_rng(1).normal(size=arrays[2].shape)
    exact = exact_gradients(arguments, cotangent, is_causal=is_causal)

    def loss(q, k, v, r):
        return jnp.sum(cotangent * attention(q, k, v, key_log_scale=r, mask=mask, is_causal=is_causal))

    for ours, theirs in zip(jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays), exact, strict=True):
        assert np.abs(theirs).max() > 0 or length == 1  # the mean of one value depends on no weight
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5 * max(1, np.abs(theirs).max()))


ALONE = """
import jax, numpy as np
from subquad.kernels import linear
rng = np.random.default_rng(0)
arrays = [rng.uniform(0.1, 1, (2, 63, 2, size)).astype(np.float32) for size in (20, 20, 24)]
cotangent = rng.normal(size=arrays[2].shape).astype(np.float32)
loss = lambda *arrays: (cotangent * linear.attention(*arrays, is_causal=True)).sum()
every = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
for place, want in enumerate(every):
    np.testing.assert_allclose(jax.jit(jax.grad(loss, place))(*arrays), want, rtol=1e-4, atol=1e-4)
"""


def test_one_gradient_alone_of_one_chunk_reads_no_stray_memory():
    """With what malloc hands out filled by glibc: stray memory is seldom anything but zero else, and then not a number."""
    environment = {**os.environ, "MALLOC_PERTURB_": "128"}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_gradients_are_those_of_finite_differences():
    query, key, value, scale, _ = draw(6, batch=1, heads=1, spread=1.0)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x, jnp.float64) for x in (query, key, value, scale)]
        loss = lambda q, k, v, r: jnp.sum(
            jnp.sin(attention(q, k, v, key_log_scale=r, is_causal=True, implementation="reference"))
        )
        # The derivative takes the running maximum for a constant; it cancels, so nothing of that may show.
        check_grads(jax.jit(loss), arrays, order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("factor", [30.0, 1e4])
def test_a_huge_future_key_changes_no_past(factor, implementation):
    query, key, value, scale, _ = draw(260)
    run = lambda key, value, scale: attention(
        query, key, value, key_log_scale=scale, is_causal=True, implementation=implementation
    )
    out = run(key, value, scale)
    for at in (1, 127, 130, 259):
        loud_key, loud_value, loud_scale = key.copy(), value.copy(), scale.copy()
        loud_key[:, at] *= factor
        loud_value[:, at] *= factor
        loud_scale[:, at] = factor
        loud = run(loud_key, loud_value, loud_scale)
        np.testing.assert_array_equal(loud[:, :at], out[:, :at])
        assert np.isfinite(loud).all() and np.abs(loud[:, at] - out[:, at]).max() > 1


def test_a_key_as_small_as_can_be_is_still_the_only_one():
    """The first row sees one key, whatever its scale: its output is that key's value."""
    query, key, value, scale, _ = draw(140)
    scale[:, 0] = -5e3
    out = attention(query, key, value, key_log_scale=scale, is_causal=True)
    np.testing.assert_allclose(out[:, 0], value[:, 0], rtol=1e-6)
    everything = np.ones((1, 1, 1, 140), bool)
    np.testing.assert_allclose(out, loop(query, key, value, scale, everything, True), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("cuts", [[300], [1, 299], [128, 172], [63, 1, 100, 136]], ids=str)
def test_state_continues_where_it_stopped(cuts, implementation):
    query, key, value, scale, mask = draw(300)
    mask[0, ..., :70] = False  # one sample has no key at all in the first pieces
    options = dict(is_causal=True, return_state=True, implementation=implementation)
    whole, last = attention(query, key, value, key_log_scale=scale, mask=mask, **options)
    state, pieces, start = linear.empty_state(2, 2, 5, 3), [], 0
    for width in cuts:
        at = slice(start, start + width)
        out, state = attention(
            query[:, at], key[:, at], value[:, at], key_log_scale=scale[:, at], mask=mask[..., at],
            initial_state=state, **options,
        )
        pieces.append(out)
        start += width
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), whole, rtol=1e-4, atol=2e-6)
    for ours, theirs in zip(state, last, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bidirectional_state_adds_keys_that_all_see(implementation):
    query, key, value, scale, mask = draw(8, keys=50)

    def part(at, **options):
        return attention(
            query, key[:, at], value[:, at], key_log_scale=scale[:, at], mask=mask[..., at],
            implementation=implementation, **options,
        )

    _, state = part(slice(0, 30), return_state=True)
    out = part(slice(30, 50), initial_state=state)
    np.testing.assert_allclose(out, loop(query, key, value, scale, mask, False), rtol=1e-4, atol=2e-6)


PACKED = np.array([[3] * 20 + [1] * 30 + [3] * 50 + [7] * 10 + [2] * 40, [0] + [5] * 99 + [9] * 50])


@functools.partial(jax.jit, static_argnums=0)
def alone(is_causal, mask, *arrays):
    """The reference's output and gradients for a sequence by itself."""
    options = dict(mask=mask, is_causal=is_causal, implementation="reference")
    out, pull = jax.vjp(lambda *x: linear.attention(*x[:3], key_log_scale=x[3], **options), *arrays)
    return out, pull(jnp.cos(out))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_separate_ones(is_causal, implementation):
    """Runs of equal ids; one segment is padding as a whole, another begins with it."""
    arguments = draw(150)
    arguments[-1][0, ..., 90:110] = False
    query, key, value, scale, mask = arguments
    options = dict(is_causal=is_causal, implementation=implementation)
    run = jax.jit(lambda *x: linear.attention(*x[:3], key_log_scale=x[3], mask=mask, segment_ids=PACKED, **options))
    out, pull = jax.vjp(run, query, key, value, scale)
    gradients = pull(jnp.cos(out))
    for b, ids in enumerate(PACKED):
        for segment in np.split(np.arange(150), np.flatnonzero(np.diff(ids)) + 1):
            at = slice(b, b + 1), slice(segment[0], segment[-1] + 1)
            want, expected_gradients = alone(is_causal, mask[at[0], ..., at[1]], query[at], key[at], value[at], scale[at])
            np.testing.assert_allclose(out[at], want, rtol=1e-4, atol=1e-5)
            for got, expected in zip(gradients, expected_gradients, strict=True):
                np.testing.assert_allclose(got[at], expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_state_belongs_to_the_first_segment_and_the_last_one_is_returned(implementation):
    query, key, value, scale, _ = draw(100)
    ids = np.repeat([0, 1, 2], [30, 50, 20])[None]
    options = dict(is_causal=True, return_state=True, implementation=implementation)
    part = lambda start, end, **more: attention(
        *(x[:, start:end] for x in (query, key, value)), key_log_scale=scale[:, start:end], **options, **more
    )
    _, state = part(0, 10)
    out, last = part(10, 100, segment_ids=ids[:, 10:], initial_state=state)
    first, _ = part(0, 30)
    np.testing.assert_allclose(out[:, :20], first[:, 10:], rtol=1e-4, atol=1e-5)
    alone, state = part(80, 100)
    np.testing.assert_allclose(out[:, 70:], alone, rtol=1e-4, atol=1e-5)
    for got, want in zip(last, state, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_leaks_between_segments_to_the_last_bit(is_causal):
    query, key, value, scale, _ = draw(150)
    loud = [x.copy() for x in (key, value, scale)]
    for x in loud:
        x[0, 50:100] = 1e4 * np.abs(x[0, 50:100]) + 1
    run = lambda key, value, scale: attention(
        query, key, value, key_log_scale=scale, segment_ids=PACKED[:1], is_causal=is_causal
    )
    out, other = run(key, value, scale), run(*loud)
    for at in (slice(0, 50), slice(100, 150)):
        np.testing.assert_array_equal(out[0, at], other[0, at])
    assert np.abs(out[0, 50:100] - other[0, 50:100]).max() > 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_flows_through_the_state(is_causal):
    query, key, value, scale, _ = draw(160)

    def loss(implementation, cut):
        def run(q, k, v, r):
            options = dict(is_causal=is_causal, return_state=True, implementation=implementation)
            _, state = attention(q[:, :cut], k[:, :cut], v[:, :cut], key_log_scale=r[:, :cut], **options)
            out, state = attention(
                q[:, cut:], k[:, cut:], v[:, cut:], key_log_scale=r[:, cut:], initial_state=state, **options
            )
            return jnp.sum(out**2) + jnp.sum(state[0] ** 2) + jnp.sum(state[1] ** 2)

        return jax.jit(jax.grad(run, argnums=(0, 1, 2, 3)))(query, key, value, scale)

    for ours, theirs in zip(loss("xla", 90), loss("reference", 90), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("is_causal", [False, True])
def test_the_empty_state_has_a_gradient_of_zero(is_causal):
    """However small all log scales are: relative to no key at all, the state before them counts for nothing."""
    query, key, value, scale, _ = draw(9)

    def loss(state):
        out = attention(query, key, value, key_log_scale=scale - 200, is_causal=is_causal, initial_state=state)
        return jnp.sum(out**2)

    gradients = jax.jit(jax.grad(loss))(linear.empty_state(2, 2, 5, 3))
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_that_see_nothing_are_zero(is_causal, implementation):
    query, key, value, scale, _ = draw(140)
    mask = np.ones((2, 1, 1, 140), bool)
    mask[0] = False
    mask[1, ..., :3] = False
    key[1, 5:] = np.nan  # what padding holds is nobody's business
    mask[1, ..., 5:] = False

    def loss(q, k, v, r):
        out = attention(q, k, v, key_log_scale=r, mask=mask, is_causal=is_causal, implementation=implementation)
        return jnp.sum(out**2), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(query, key, value, scale)
    assert (out[0] == 0).all() and np.isfinite(out).all()
    if is_causal:
        assert (out[1, :3] == 0).all()
    assert np.abs(out[1, 3:]).min() > 0
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (gradient[0] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_features_that_do_not_meet_give_zero(implementation):
    query, key, value, *_ = draw(4)
    query[..., 2:], key[..., :2] = 0, 0

    def run(q, k):
        return attention(q, k, value, is_causal=True, implementation=implementation)

    assert (run(query, key) == 0).all()
    for gradient in jax.grad(lambda q, k: run(q, k).sum(), argnums=(0, 1))(query, key):
        assert (gradient == 0).all()


SECOND = [(is_causal, eps, with_state) for is_causal in (False, True) for eps, with_state in ((0.0, False), (0.5, True))]


@pytest.mark.parametrize(("is_causal", "eps", "with_state"), SECOND)
def test_second_derivatives_are_those_of_the_definition(is_causal, eps, with_state):
    """Where the maximum does not cancel, in the state and beside eps, it is a constant to every derivative."""
    query, key, value, scale, mask = draw(9, spread=1.0)
    batch, _, heads, features = query.shape
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    arrays = query, key, value, scale
    if with_state:
        arrays += jnp.abs(normal(batch, heads, features, value.shape[3])), 1 + jnp.abs(normal(batch, heads, features))
        arrays += (normal(batch, heads),)
    weights = normal(*value.shape[:1], query.shape[1], *value.shape[2:]), normal(batch, heads, features, value.shape[3])

    def loss(arrays, implementation):
        query, key, value, scale, *state = arrays
        out, (numerator, *_) = linear.attention(
            query, key, value, key_log_scale=scale, mask=mask, is_causal=is_causal, initial_state=tuple(state) or None,
            return_state=True, eps=eps, implementation=implementation,
        )  # fmt: skip
        return jnp.vdot(out, weights[0]) + with_state * jnp.vdot(numerator, weights[1])

    def slopes(arrays, implementation):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(loss)(arrays, implementation)))

    second = jax.jit(jax.grad(slopes), static_argnums=1)
    for got, want in zip(second(arrays, "xla"), second(arrays, "reference"), strict=True):
        assert oracle.relative_error(got, want) < 1e-4


@pytest.mark.parametrize("is_causal", [False, True])
def test_bfloat16(is_causal):
    query, key, value, scale, mask = draw(200)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    out = attention(*rounded, key_log_scale=scale, mask=mask, is_causal=is_causal)
    assert out.dtype == jnp.bfloat16
    exact = loop(*(x.astype(jnp.float32) for x in rounded), scale, mask, is_causal)
    # All sums are float32: only the last rounding shows, half a unit of 2^-8.
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5)


def test_without_scales_and_masks():
    query, key, value, scale, _ = draw(30)
    out = attention(query, key, value, is_causal=True)
    exact = loop(query, key, value, 0 * scale, np.ones((1, 1, 1, 30), bool), True)
    np.testing.assert_allclose(out, exact, rtol=1e-4, atol=2e-6)


def test_a_mask_for_the_whole_batch():
    query, key, value, scale, mask = draw(30)
    one = attention(query, key, value, key_log_scale=scale, mask=mask[:1], is_causal=True)
    both = attention(query, key, value, key_log_scale=scale, mask=np.repeat(mask[:1], 2, 0), is_causal=True)
    np.testing.assert_array_equal(one, both)


@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_and_work_are_linear(is_causal):
    """Forward and backward, and nowhere near the T x T weights, which would be 64 MiB a head at T = 4096."""

    loss = lambda q, k, v, r: jnp.sum(attention(q, k, v, key_log_scale=r, is_causal=is_causal))
    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))

    def shapes(length):
        of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        return of(1, length, 2, 64), of(1, length, 2, 64), of(1, length, 2, 64), of(1, length, 2)

    short, long = (measure.memory(gradient, *shapes(n)).temporary for n in (2048, 4096))
    assert long <= 2.1 * short and long < 32 * 2**20
    short, long = (measure.flops(gradient, *shapes(n)) for n in (2048, 4096))
    assert long <= 2.1 * short


@pytest.mark.parametrize(
    "change,error,argument",
    [
        (dict(key=np.ones((2, 6, 2, 4))), ValueError, "key"),
        (dict(query=np.ones((6, 2, 5))), ValueError, "query"),
        (dict(value=np.ones((2, 5, 2, 3))), ValueError, "value"),
        (dict(key_log_scale=np.ones((2, 6))), ValueError, "key_log_scale"),
        (dict(query=np.ones((2, 4, 2, 5)), is_causal=True), ValueError, "is_causal"),
        (dict(mask=np.ones((2, 1, 6, 6), bool)), ValueError, "mask"),
        (dict(mask=np.ones((2, 1, 1, 6))), TypeError, "mask"),
        (dict(initial_state=(1, 2)), ValueError, "initial_state"),
        (dict(initial_state=linear.empty_state(2, 2, 4, 3)), ValueError, "initial_state"),
        (dict(implementation="fast"), ValueError, "implementation"),
        (dict(implementation="triton"), NotImplementedError, "triton"),
    ],
)
def test_refusals(change, error, argument):
    query, key, value, scale, mask = draw(6)
    arguments = dict(query=query, key=key, value=value, key_log_scale=scale, mask=mask) | change
    with pytest.raises(error, match=f"(?s)linear.attention.*{argument}"):
        attention(**arguments)


# Peers. The features are computed as the peer computes them; sums, normalisation and gradients are ours.


def elu1(x):
    return jax.nn.elu(x) + 1


def heads_second(x):
    """[B, N, T, H] <-> [B, T, N, H]."""
    return jnp.swapaxes(x, 1, 2)


def peer(name):
    """name -> (q, k, v in the peer's layout -> y), the peer's formula around `linear.attention`."""
    data = oracle.load(name)
    tags, config, eps = name.split("_"), data.meta["cfg"], 0.0
    is_causal = "causal" in tags
    transpose = (lambda x: x) if data.inputs["q"].shape[2] == 2 else heads_second
    projection = data.constants.get("projection")
    mask = state = None
    if name.startswith("ft_linear"):
        features, eps = (lambda x, is_query: elu1(x)), 1e-6
        if config["lens"]:
            mask = (np.arange(config["T"]) < np.array(config["lens"])[:, None])[:, None, None]
    elif name.startswith("linattn"):
        # Shen et al. normalise keys over time, queries over features: the denominator is 1 by itself.
        features = lambda x, is_query: jax.nn.softmax(x, -1) if is_query else jax.nn.softmax(x, 1)
    elif "noproj" in tags:
        features = lambda x, is_query: (
            jax.nn.softmax(x, -1) if is_query else jnp.exp(x) if is_causal else jax.nn.softmax(x, 1)
        )
    elif "relu" in tags:
        # performer-pytorch scales by d^-1/4, google does not; the deterministic kernel has no projection.
        factor = 8**-0.25 if name.startswith("performer") else 1.0
        features = lambda x, _: jax.nn.relu(x if projection is None else factor * x @ projection.T) + 1e-3
    else:
        google = name.startswith("gperf")
        offset = config["stab"] if google else 1e-4
        stop = (lambda x: x) if google else jax.lax.stop_gradient  # google differentiates through the maximum

        def features(x, is_query):
            exponent = x * 8**-0.25 @ projection.T
            # Departure of both peers: the maximum over all keys, the future's included, and eps added after it.
            largest = exponent.max(-1, keepdims=True) if is_query else exponent.max((1, 3), keepdims=True)
            half_norm = jnp.sum(x**2, -1, keepdims=True) / 2 * 8**-0.5
            return 16**-0.5 * (jnp.exp(exponent - half_norm - stop(largest)) + offset)

    if name.startswith("performer") and is_causal:
        # performer-pytorch adds 1e-6 to every feature of the causal denominator: a state that has it already.
        numerator, denominator, largest = linear.empty_state(2, 2, 8 if "noproj" in tags else 16, 8)
        state = numerator, denominator + 1e-6, jnp.zeros_like(largest)

    def run(q, k, v):
        q, k, v = (transpose(x) for x in (q, k, v))
        y = attention(
            features(q, True), features(k, False), v, mask=mask, is_causal=is_causal, initial_state=state, eps=eps
        )
        return transpose(y) * (8**-0.5 if name == "linattn_bidir" else 1.0)  # d^-1/2 of the peer's query

    return data, run


@pytest.mark.parametrize(
    "name",
    ["performer_softmax_bidir", "performer_relu_bidir", "performer_noproj_bidir", "performer_noproj_causal"]
    + ["gperf_softmax_bidir", "gperf_softmax_causal"]
    + ["gperf_relu_bidir", "gperf_relu_causal", "gperf_relu_deterministic"]
    + ["ft_linear_bidir", "ft_linear_bidir_pad", "ft_linear_causal", "linattn_bidir"],
)
def test_oracle(name):
    data, run = peer(name)
    oracle.compare(None, data, lambda inputs, _: run(*(inputs[x] for x in "qkv")))


def test_rounding_decides_on_no_side_of_a_relus_kink():
    """A derivative there is that of rounding: one feature of 8 million failed the benchmark by 4e-3."""
    arrays = specs.find("linear.random_feature_attention/relu-causal").draw(2048, "float32", bench=True)
    for name in ("query", "key"):
        logits = np.asarray(arrays[name], np.float64) @ np.asarray(arrays["projection"], np.float64).T
        assert abs(logits).min() > 5e-5, name


def test_a_new_length_compiles_nothing():
    """Lengths are run-time numbers: neither the constants of a kernel nor its blocks depend on them."""
    spec = specs.find("linear.attention/causal")
    found = [{(x.name, x.constants, x.config) for x in specs.launches(spec, length=n)} for n in (100, 500, 1000, 3001)]
    assert found[0] and all(launches == found[0] for launches in found)
