"""The contract, for every layer: DESIGN's promises as tests over one table (cases.py).

The tests of a layer share its compiled programs (`jitted`, `gradients`, `stepped`), one for every shape: so they take the same
shapes where they can, `LENGTH` tokens and extensions by `WIDTHS`.

Every layer meets the core: shapes, gradients, causality, padding, batch-mates, extend, refusals. Of the rest (`sampled`, and
`halved` what takes longest) the first layer of a family meets all and its siblings a sample; -m full runs what is left out.
"""

import collections
import copy
import functools
import json
import math
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from subquad import zoo
from subquad.lra.bench import measure
from subquad.zoo.base import Attention

from . import cases
from .cases import (
    CASES,
    CAUSAL,
    CHOOSING,
    DIRECTIONS,
    EXTENDING,
    FEATURES,
    LONG,
    POISONS,
    SEGMENTED,
    Case,
    halved,
    inputs,
    label,
    sampled,
)

by_direction = pytest.mark.parametrize("name,is_causal", DIRECTIONS, ids=label)
by_one_direction = pytest.mark.parametrize("name,is_causal", cases.one_direction(DIRECTIONS), ids=label)
by_name = pytest.mark.parametrize("name", CASES)
causal_only = pytest.mark.parametrize("name", CAUSAL)
extending_only = pytest.mark.parametrize("name", EXTENDING)

LENGTH = 23
WIDTHS = [9, 1, 4, 9]
TRACES = collections.Counter()  # of `jitted`, by name and direction


@functools.cache
def layer_of(name: str, is_causal: bool) -> nnx.Module:
    return CASES[name].make(is_causal)


def variant(name: str, is_causal: bool, **options) -> nnx.Module:
    """`layer_of` with other options that decide no parameter: nothing is drawn again, which takes longer than most tests."""
    other = nnx.eval_shape(lambda: CASES[name].make(is_causal, **options))
    nnx.update(other, nnx.state(layer_of(name, is_causal)))
    return other


@functools.cache
def jitted(name: str, is_causal: bool):
    """The layer as a compiled function of inputs and mask."""
    layer = layer_of(name, is_causal)

    def call(x, mask=None):
        TRACES[name, is_causal] += 1
        return layer(x, mask=mask)

    return jax.jit(call)


@functools.cache
def gradients(name: str, is_causal: bool, implementation: str | None = None):
    """A compiled function of inputs, mask and the output's cotangent: (output, gradient of the inputs, of the parameters)."""
    layer = variant(name, is_causal, implementation=implementation) if implementation else layer_of(name, is_causal)
    graphdef, own, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(parameters, x, mask, cotangent):
        y, pull = jax.vjp(lambda x, parameters: nnx.merge(graphdef, parameters, rest)(x, mask=mask), x, parameters)
        return y, *pull(cotangent)

    return lambda x, mask, cotangent, parameters=own: run(parameters, x, mask, cotangent)


@functools.cache
def stepped(name: str):
    """`extend` as a compiled function of inputs, cache and mask."""
    layer = layer_of(name, True)
    return jax.jit(lambda x, cache, mask=None: layer.extend(x, cache, mask=mask))


def directions(name: str) -> list[bool]:
    return [is_causal for other, is_causal in DIRECTIONS if other == name]


def padding(valid) -> jax.Array:
    """[B, T] -> [B, 1, 1, T]."""
    return jnp.asarray(valid, bool)[:, None, None, :]


EVERYTHING = jnp.ones((2, 1, 1, LENGTH), bool)  # a mask that hides nothing
HOLES = np.ones((2, LENGTH), bool)  # and padding on either side
HOLES[0, [0, 1, 2, 9, 10, 20]] = HOLES[1, [2, 5, 6, 7, 21, 22]] = False


def close(actual, expected, name: str, scale: float = 1.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-4 * scale, atol=CASES[name].tolerance * scale)


# 1. Shapes and dtypes, at any length.


@by_direction
@pytest.mark.parametrize(
    "length", [1, pytest.param(63, marks=sampled), *(pytest.param(length, marks=pytest.mark.full) for length in (7, 100))]
)
def test_any_length(name, is_causal, length):
    y = jitted(name, is_causal)(inputs(length))
    assert y.shape == (2, length, FEATURES) and y.dtype == jnp.float32
    assert jnp.isfinite(y).all()


@sampled
@by_one_direction
def test_bfloat16(name, is_causal):
    layer = variant(name, is_causal, dtype=jnp.bfloat16)
    x = inputs(LENGTH)
    y = jax.jit(lambda x: layer(x))(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = jitted(name, is_causal)(x.astype(jnp.bfloat16).astype(jnp.float32))
    error = jnp.abs(y.astype(jnp.float32) - exact)
    assert jnp.quantile(error, CHOOSING.get(name, 1.0)) < 0.03 * jnp.abs(exact).max()


@halved
@by_one_direction
def test_batch_axes(name, is_causal):
    """Called eagerly, as in a notebook, a layer is compiled for a number of sequences, whatever axes they come in."""
    layer, x = layer_of(name, is_causal), inputs(LENGTH, batch=6)
    y = layer(x)
    close(layer(x.reshape(2, 3, LENGTH, FEATURES)), y.reshape(2, 3, LENGTH, FEATURES), name)
    close(layer(x[0]), y[0], name)


@sampled
@by_name
def test_out_features_and_param_dtype(name):
    is_causal = directions(name)[0]
    layer = CASES[name].make(is_causal, out_features=24, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    assert jax.eval_shape(layer, inputs(5)).shape == (2, 5, 24)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}


# 2. Every parameter learns.


@by_one_direction
def test_every_parameter_gets_a_gradient(name, is_causal):
    rng = np.random.default_rng(1)
    # Off their initial values: zero biases and unit gains may hide a term. NumPy has nothing to compile for each shape.
    moved = lambda p: (np.asarray(p) + 0.1 * rng.normal(size=p.shape)).astype(p.dtype)
    params = jax.tree.map(moved, nnx.state(layer_of(name, is_causal), nnx.Param))
    *_, found = gradients(name, is_causal)(inputs(LENGTH), EVERYTHING, inputs(LENGTH, seed=2), params)
    largest = {"/".join(map(str, path)): np.abs(v[...]).max() for path, v in nnx.to_flat_state(found)}
    assert np.isfinite(list(largest.values())).all()
    dead = {path for path, size in largest.items() if size < 1e-5 * max(largest.values())}
    case = CASES[name]
    assert dead == set(case.dead_if_causal if is_causal and case.dead_if_causal is not None else case.dead)


# 3. Causality.


@causal_only
@pytest.mark.parametrize("at", [1, 11, LENGTH - 1])
def test_a_loud_future_changes_no_past(name, at):
    if CASES[name].supports.causal == "mask":
        assert "leak" in zoo.LAYERS[name].__doc__, "a layer that looks ahead for its buckets says what leaks"
        pytest.skip("buckets are chosen over all positions; the docstring says what leaks")
    x = inputs(LENGTH)
    y = jitted(name, True)(x)
    loud = jitted(name, True)(x.at[:, at].multiply(30.0))
    close(loud[:, :at], y[:, :at], name)
    assert jnp.abs(loud[:, at:] - y[:, at:]).max() > 1e-3


@causal_only
def test_the_first_tokens_do_not_know_how_many_follow(name):
    """Stronger than the test above: no size of the call, its length least of all, moves what the first tokens say."""
    if CASES[name].supports.causal == "mask":
        pytest.skip("buckets are chosen over all positions; the docstring says what leaks")
    longest = inputs(63)
    expected = jitted(name, True)(longest)
    for length in (1, 15, LENGTH):
        close(jitted(name, True)(longest[:, :length]), expected[:, :length], name)


@halved
@by_one_direction
def test_jacobian_stays_inside_the_pattern(name, is_causal):
    length = 13
    layer = layer_of(name, is_causal)
    x = inputs(length, batch=1)[0]
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x).sum(-1)))(x)
    least = 1e-7 * CASES[name].tolerance / Case.tolerance  # of rounding that mixes tokens
    reached = np.asarray(jnp.abs(jacobian).sum(-1) > least)
    allowed = layer.pattern(length).any(0)
    assert allowed.shape == (length, length) and allowed.dtype == bool
    own = np.eye(length, dtype=bool)  # an output follows its query, whether that sees its own key or not
    assert not (reached & ~(allowed | own)).any()
    assert reached.any(1)[allowed.any(1)].all()
    if is_causal:
        assert not np.triu(allowed, 1).any()


# 4. Padding.


@by_direction
def test_padding_changes_nothing(name, is_causal):
    real = 15
    x, is_real = inputs(LENGTH), jnp.arange(LENGTH) < real
    masks = padding(jnp.stack([is_real, is_real]))
    y = jitted(name, is_causal)(x, masks)
    assert jnp.isfinite(y).all()
    other = jnp.where(is_real[:, None], x, 30 * inputs(LENGTH, seed=3))
    close(jitted(name, is_causal)(other, masks)[:, :real], y[:, :real], name)
    close(jitted(name, is_causal)(x[:, :real]), y[:, :real], name)
    longer = jnp.concatenate([x, inputs(40, seed=4)], axis=1)
    longer_masks = jnp.concatenate([masks, jnp.zeros((2, 1, 1, 40), bool)], axis=-1)
    close(jitted(name, is_causal)(longer, longer_masks)[:, :real], y[:, :real], name)


@by_direction
def test_a_mask_that_hides_nothing_is_none(name, is_causal):
    x = inputs(LENGTH)
    close(jitted(name, is_causal)(x, EVERYTHING), jitted(name, is_causal)(x), name)


@by_direction
def test_what_padding_holds_reaches_nothing_that_is_kept(name, is_causal):
    """Bit by bit, on the left, in holes, on the right; and no kept output gives it a gradient."""
    x, cotangent = (jnp.where(HOLES[..., None], inputs(LENGTH, seed=seed), 0) for seed in (0, 2))

    def kept(value):
        y, *grads = gradients(name, is_causal)(jnp.where(HOLES[..., None], x, value), padding(HOLES), cotangent)
        return jnp.where(HOLES[..., None], y, 0), *grads

    expected = kept(0.0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    of_padding, of_tokens = jnp.where(HOLES[..., None], 0, expected[1]), jnp.where(HOLES[..., None], expected[1], 0)
    assert jnp.abs(of_padding).max() < 1e-6 < jnp.abs(of_tokens).max()
    for value in POISONS:
        for actual, wanted in zip(*map(jax.tree.leaves, (kept(value), expected)), strict=True):
            np.testing.assert_array_equal(actual, wanted, err_msg=f"padding of {value}")


@by_direction
def test_all_padding_is_finite(name, is_causal):
    mask = EVERYTHING.at[1].set(False)
    found = gradients(name, is_causal)(inputs(LENGTH), mask, inputs(LENGTH, seed=2))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


# 5. Batch-mates.


@by_direction
def test_a_sample_is_its_own(name, is_causal):
    layer, x = layer_of(name, is_causal), inputs(LENGTH, batch=6)  # compiled by `test_batch_axes`
    close(layer(x.at[1:].multiply(30.0))[:1], layer(x)[:1], name)


# 6. Extend.


def extend_all(step, cache, x, cuts, mask=None):
    """The outputs of `step` for the pieces of x, one after the other."""
    outputs, start = [], 0
    for width in cuts:
        stop = start + width
        y, cache = step(x[:, start:stop], cache, None if mask is None else mask[..., start:stop])
        outputs.append(y)
        start = stop
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1)


def extended(name: str, x, cuts, mask=None):
    """`extend_all` of the layer of the table; its cache has room for `LENGTH` tokens, whatever comes."""
    return extend_all(stepped(name), layer_of(name, True).init_cache(x.shape[0], LENGTH), x, cuts, mask)


@extending_only
@pytest.mark.parametrize(
    "cuts", [[1] * LENGTH, WIDTHS, *(pytest.param(cuts, marks=sampled) for cuts in ([LENGTH], [4, 9, 1, 9]))], ids=str
)
def test_extend_equals_one_call(name, cuts):
    if not CASES[name].extend_equals_call:
        pytest.skip("the docstring says how extend differs; the layer's own tests show it")
    x = inputs(LENGTH)
    mask = None if len(cuts) == 1 else EVERYTHING  # the pieces share what `test_extend_honours_padding` compiles
    close(extended(name, x, cuts, mask), jitted(name, True)(x), name)


@extending_only
def test_extend_honours_padding(name):
    x = inputs(LENGTH)
    valid = jnp.ones((2, LENGTH), bool).at[0, :5].set(False).at[1, 9:12].set(False)
    cuts = [4, 9, 1, 9]
    y = extended(name, x, cuts, padding(valid))
    noisy = jnp.where(valid[..., None], x, 30 * inputs(LENGTH, seed=5))
    other = extended(name, noisy, cuts, padding(valid))
    close(jnp.where(valid[..., None], other, 0), jnp.where(valid[..., None], y, 0), name)
    if CASES[name].extend_equals_call:
        full = jitted(name, True)(x, padding(valid))
        close(jnp.where(valid[..., None], y, 0), jnp.where(valid[..., None], full, 0), name)


@sampled
@extending_only
def test_extend_takes_a_mask_that_broadcasts(name):
    x, valid = inputs(4), jnp.array([True, False, True, True])
    full = extended(name, x, [4], padding(jnp.stack([valid, valid])))
    np.testing.assert_array_equal(extended(name, x, [4], valid[None, None, None]), full)


@sampled
@extending_only
def test_extend_in_a_scan(name):
    layer = layer_of(name, True)
    x = inputs(9)

    @jax.jit
    def decode(x):
        def step(cache, token):
            y, cache = layer.extend(token[:, None], cache)
            return cache, y[:, 0]

        return jax.lax.scan(step, layer.init_cache(2, LENGTH), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    close(decode(x), extended(name, x, [1] * 9, EVERYTHING), name)


@sampled
@extending_only
def test_extend_leaves_its_cache_alone(name):
    layer = layer_of(name, True)
    cache = layer.init_cache(2, 8)
    before = jax.tree.map(np.array, cache)
    first, _ = layer.extend(inputs(3), cache)
    again, _ = layer.extend(inputs(3), cache)
    np.testing.assert_array_equal(first, again)
    jax.tree.map(np.testing.assert_array_equal, before, cache)


@extending_only
def test_a_new_cache_has_a_buffer_for_every_array(name):
    """Else it could not be donated."""
    leaves = [x for x in jax.tree.leaves(layer_of(name, True).init_cache(2, LENGTH)) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@sampled
@extending_only
def test_extend_takes_a_cache_that_is_donated(name):
    layer, x = layer_of(name, True), inputs(13)
    step = jax.jit(lambda x, cache: layer.extend(x, cache), donate_argnums=1)
    first, cache = step(x[:, :4], layer.init_cache(2, LENGTH))
    second, _ = stepped(name)(x[:, 4:], cache, EVERYTHING[..., 4:13])
    close(jnp.concatenate([first, second], axis=1), extended(name, x, [4, 9], EVERYTHING), name)


@sampled
@extending_only
@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16)], ids=["param", "both"])
def test_extend_computes_in_the_dtype_of_the_call(name, dtypes):
    param_dtype, dtype = dtypes
    layer, x = CASES[name].make(True, param_dtype=param_dtype, dtype=dtype), inputs(LENGTH)
    y = jax.jit(lambda x: layer(x))(x)
    step = jax.jit(lambda x, cache, _: layer.extend(x, cache))
    pieces = extend_all(step, layer.init_cache(2, LENGTH), x, [19, 4])
    assert pieces.dtype == y.dtype == (dtype or jnp.float32)
    if dtype is None and CASES[name].extend_equals_call:
        close(pieces, y, name)


# 7. Transformations.


@sampled
@by_name
def test_transformations(name):
    is_causal = directions(name)[-1]
    layer = layer_of(name, is_causal)
    x = inputs(LENGTH)
    y = jitted(name, is_causal)(x)
    close(layer(x), y, name)
    close(nnx.jit(lambda layer, x: layer(x))(layer, x), y, name)
    close(jax.jit(jax.vmap(lambda x: layer(x)))(x), y, name)
    loss = lambda x: jnp.sum(layer(x) ** 2)
    gradient = jax.jit(jax.grad(jax.checkpoint(loss)))(x)
    close(gradient, gradients(name, is_causal)(x, EVERYTHING, 2 * y)[1], name, scale=10)


@sampled
@by_one_direction
def test_forward_derivatives_of_the_reference(name, is_causal):
    layer = variant(name, is_causal, implementation="reference")
    loss = lambda x: jnp.sum(layer(x) ** 2)

    @jax.jit
    def derivatives(x):
        return *jax.jvp(jax.grad(loss), (x,), (x,)), jax.jvp(loss, (x,), (x,))[1]

    x = inputs(LENGTH)
    gradient, curvature, forward = derivatives(x)
    np.testing.assert_allclose(forward, jnp.vdot(gradient, x), rtol=1e-3, atol=1e-3)
    assert jnp.isfinite(curvature).all()


@sampled
@by_name
def test_shard_map(name):
    """Without its check of what varies over the mesh, which loops of the kernels do not pass."""
    is_causal, x = directions(name)[-1], inputs(LENGTH)
    layer = layer_of(name, is_causal)
    mesh, batch = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    shared = jax.shard_map(lambda x: layer(x), mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)

    def both(x):
        y, backward = jax.vjp(shared, x)
        return y, backward(y)[0]

    y, gradient = jax.jit(both)(x)
    close(y, jitted(name, is_causal)(x), name)
    close(gradient, gradients(name, is_causal)(x, EVERYTHING, y)[1], name, scale=10)


@sampled
@by_name
def test_x64_changes_nothing_for_float32(name):
    """A layer built and called where JAX has 64 bits is, for float32 inputs, the layer that it is elsewhere."""
    is_causal, x = directions(name)[-1], inputs(LENGTH)
    expected = jitted(name, is_causal)(x)
    with jax.enable_x64(True):
        layer = CASES[name].make(is_causal)
        assert {a.dtype for a in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float32)}

        @jax.jit
        def both(x):
            y, pull = jax.vjp(lambda x: layer(x), x)
            return y, pull(y)[0]

        y, gradient = both(x)
        assert y.dtype == gradient.dtype == jnp.float32 and jnp.isfinite(gradient).all()
        close(y, expected, name)
        if name in EXTENDING and is_causal and CASES[name].extend_equals_call:
            step = jax.jit(lambda x, cache, _: layer.extend(x, cache))
            close(extend_all(step, layer.init_cache(2, LENGTH), x, [19, 4]), expected, name)


@sampled
@by_name
def test_scan_over_depth(name):
    is_causal = directions(name)[-1]
    build = nnx.vmap(lambda rngs: zoo.make(
        name, in_features=FEATURES, rngs=rngs, **CASES[name].options, is_causal=is_causal))
    stack = build(nnx.Rngs(0).split(3))
    x = inputs(LENGTH)

    @nnx.jit
    def deep(stack, x):
        return nnx.scan(lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack)

    graphdef, state = nnx.split(stack)
    one = jax.jit(lambda state, x: x + nnx.merge(graphdef, state)(x))
    expected = x
    for depth in range(3):
        expected = one(jax.tree.map(lambda a: a[depth], state), expected)  # noqa: B023
    close(deep(stack, x), expected, name, scale=10)


# 8. Compilation.


@by_one_direction
def test_second_call_compiles_nothing(name, is_causal):
    run = jitted(name, is_causal)
    run(inputs(LENGTH), EVERYTHING)
    before = TRACES[name, is_causal]
    run(inputs(LENGTH, seed=1), EVERYTHING.at[0, ..., 3:].set(False))
    assert TRACES[name, is_causal] == before > 0


@halved
@by_name
def test_a_call_changes_nothing_in_the_layer(name):
    layer = CASES[name].make(directions(name)[-1])
    before, attributes = jax.tree.map(jnp.copy, nnx.state(layer)), set(vars(layer))
    layer(inputs(7), mask=padding(np.ones((2, 7))), deterministic=False, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer))
    assert set(vars(layer)) == attributes


# 9. Linen.


@sampled
@by_name
def test_to_linen_gives_the_same_numbers(name):
    is_causal = directions(name)[-1]
    layer = layer_of(name, is_causal)
    options = {**CASES[name].options, "is_causal": is_causal}
    linen = nnx.bridge.to_linen(zoo.LAYERS[name], in_features=FEATURES, **options)
    x = inputs(LENGTH)
    variables = linen.init(jax.random.key(0), x)
    ours = dict(nnx.to_flat_state(nnx.state(layer)))

    def ported(tree, path=()):
        if isinstance(tree, dict):
            return {key: ported(child, (*path, key)) for key, child in tree.items()}
        value = ours.pop(tuple(int(k) if k.isdigit() else k for k in path))[...]
        return tree.replace_boxed(value) if hasattr(tree, "replace_boxed") else value

    variables = {collection: ported(tree) for collection, tree in variables.items()}
    assert not ours, "every variable of the layer has a place in Linen"
    close(linen.apply(variables, x), jitted(name, is_causal)(x), name)
    if name in EXTENDING:
        cache = layer.init_cache(2, LENGTH)
        y, ported_cache = linen.apply(variables, x[:, :9], cache, nnx_method="extend")
        expected, expected_cache = layer.extend(x[:, :9], cache)
        close(y, expected, name)
        jax.tree.map(lambda a, b: close(a, b, name), ported_cache, expected_cache)


# 10. Checkpoints.

PATHS = pathlib.Path(__file__).with_name("variable_paths.json")


def variable_paths() -> dict[str, dict[str, str]]:
    return {
        name: {
            "/".join(map(str, path)): f"{type(v).__name__} {v[...].dtype}[{','.join(map(str, v[...].shape))}]"
            for path, v in nnx.to_flat_state(nnx.state(layer_of(name, directions(name)[-1])))
        }
        for name in CASES
    }


def test_variable_paths_are_those_of_old_checkpoints():
    stored = json.loads(PATHS.read_text())
    assert variable_paths() == stored, (
        "A changed path or shape breaks users' checkpoints. If it is meant: python -m tests.zoo.test_contract"
    )


@by_one_direction
def test_a_layer_is_pickled_and_copied(name, is_causal):
    """The same configuration, for which nothing is compiled anew, and the same numbers: so the same outputs."""
    layer = layer_of(name, is_causal)
    graphdef, state = nnx.split(layer)
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        other_graphdef, other_state = nnx.split(other)
        assert other_graphdef == graphdef and hash(other_graphdef) == hash(graphdef)
        jax.tree.map(np.testing.assert_array_equal, other_state, state)


# 11. Segments.


@pytest.mark.parametrize("name,is_causal", cases.one_direction(SEGMENTED), ids=label)
def test_segments_do_not_reach_each_other(name, is_causal):
    """Other tokens in one segment change nothing in the others, forward or backward; one segment is as none."""
    layer = layer_of(name, is_causal)
    ids = jnp.asarray([[2] * 6 + [0] * 10 + [1] * 7, [5] * 9 + [3] * 9 + [3] * 5])
    other = inputs(LENGTH, seed=1)

    @jax.jit
    def run(x, ids, cotangent):
        y, pull = jax.vjp(lambda x: layer(x, segment_ids=ids), x)
        return y, pull(cotangent)[0]

    x, is_middle = inputs(LENGTH), (ids == jnp.asarray([[0], [3]]))[..., None]
    before, gradient = run(x, ids, jnp.where(is_middle, 0, other))
    after, _ = run(jnp.where(is_middle, other, x), ids, other)
    close(jnp.where(is_middle, 0, after), jnp.where(is_middle, 0, before), name)
    assert jnp.abs(jnp.where(is_middle, after - before, 0)).max() > 0.01
    assert (jnp.where(is_middle, gradient, 0) == 0).all() and jnp.abs(gradient).max() > 0.01
    close(run(x, jnp.zeros((2, LENGTH), int), other)[0], jitted(name, is_causal)(x), name)


# 12. Refusals.


def refused(name, argument, kind=ValueError):
    return pytest.raises(kind, match=rf"(?s){zoo.LAYERS[name].__name__}.*{argument}")


@by_name
def test_unsupported_requests_are_refused(name):
    case, supports = CASES[name], CASES[name].supports
    is_causal = directions(name)[0]
    layer = layer_of(name, is_causal)
    x = inputs(7)
    if not supports.causal:
        with refused(name, "is_causal"):
            case.make(True)
    if not supports.bidirectional:
        with refused(name, "is_causal"):
            case.make(False)
    if not supports.cross:
        with refused(name, "does not support inputs_kv"):
            layer(x, inputs(5))
        with refused(name, "does not support inputs_kv"):
            layer(x, [1])
    if not supports.pairwise_mask:
        with refused(name, "mask"):
            layer(x, mask=jnp.ones((2, 1, 7, 7), bool))
    if not supports.segment_ids:
        with refused(name, "segment_ids"):
            layer(x, segment_ids=jnp.zeros((2, 7), int))
    if not supports.positions:
        with refused(name, "positions"):
            layer(x, positions=jnp.arange(7))
    if not supports.weights:
        with refused(name, "does not support sow_weights"):
            layer(x, sow_weights=True)
    if not supports.extend:
        with refused(name, "extend"):
            layer.init_cache(2, 7)
        with refused(name, "extend"):
            layer.extend(x, None)
    elif not is_causal:
        with refused(name, "is_causal"):
            layer.init_cache(2, 7)
        with refused(name, "is_causal"):
            layer.extend(x, None)
    if name in EXTENDING:
        for size in (0, -1, None, 7.0):
            with refused(name, f"max_length must be a positive integer, got {size}"):
                layer_of(name, True).init_cache(2, size)
            with refused(name, f"batch_size must be a positive integer, got {size}"):
                layer_of(name, True).init_cache(size, 7)
        with refused(name, "cache must be a .*Cache, got NoneType", TypeError):
            layer_of(name, True).extend(x, None)
        with refused(name, "cache must hold 2 sequences"):
            layer_of(name, True).extend(x, layer_of(name, True).init_cache(3, 7))
        kind = layer_of(name, True).init_cache(2, 7)[0].dtype
        if layer_of(name, True).init_cache(2, 7, jnp.bfloat16)[0].dtype != kind:
            with refused(name, "dtype must be a floating-point dtype"):
                layer_of(name, True).init_cache(2, 7, jnp.int8)
    if issubclass(zoo.LAYERS[name], Attention) and not supports.grouped:
        with refused(name, "num_kv_heads", TypeError):
            case.make(is_causal, num_kv_heads=1)
    if not supports.attention_fn:
        with pytest.raises(ValueError, match=f"attention_fn.*{name}"):
            zoo.attention_fn(name)


@by_name
def test_bad_input_is_named(name):
    case, is_causal = CASES[name], directions(name)[0]
    layer = layer_of(name, is_causal)
    x = inputs(7)
    with refused(name, "inputs_q"):
        layer(inputs(7)[..., :5])
    with refused(name, "inputs_q"):
        layer(x[0, 0])
    with refused(name, "inputs_q"):
        layer(x[:, :0])
    with refused(name, "inputs_q"):
        layer(x[:0])
    with refused(name, "inputs_q", TypeError):
        layer(jnp.ones((2, 7, FEATURES), int))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with refused(name, "inputs_q must lie on a mesh without explicit axes"):
        layer(jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))))
    for shape in ((2, 7), (2, 7, 7), (1, 2, 1, 1, 7)):
        with refused(name, "mask"):
            layer(x, mask=jnp.ones(shape, bool))
    with refused(name, "mask", TypeError):
        layer(x, mask=[[True] * 7])
    with refused(name, "mask"):
        layer(x, mask=jnp.ones((2, 1, 1, 6), bool))
    with refused(name, "mask", TypeError):
        layer(x, mask=jnp.ones((2, 1, 1, 7)))
    with refused(name, "implementation"):
        case.make(is_causal, implementation="fastest")
    with refused(name, "no_such_option", TypeError):
        case.make(is_causal, no_such_option=1)
    if issubclass(zoo.LAYERS[name], Attention):
        with refused(name, "no_such_option must be one of its options", TypeError):
            zoo.LAYERS[name](in_features=FEATURES, rngs=nnx.Rngs(0), **case.options, no_such_option=1)
        with refused(name, "num_heads"):
            case.make(is_causal, num_heads=3, num_kv_heads=3) if case.supports.grouped else case.make(is_causal, num_heads=3)
        with refused(name, "num_heads", TypeError):
            zoo.make(name, in_features=FEATURES, rngs=nnx.Rngs(0))


@by_name
def test_implementations_decline_by_name(name):
    is_causal = directions(name)[-1]
    for implementation in ("triton", "cudnn"):  # "interpret" has tests of its own, in a process of its own
        with pytest.raises(NotImplementedError, match=implementation):
            variant(name, is_causal, implementation=implementation)(inputs(7))


@by_one_direction
def test_reference_and_xla_agree(name, is_causal):
    mask = padding(jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [17]]))
    results = [gradients(name, is_causal, i)(inputs(LENGTH), mask, inputs(LENGTH, seed=2))[:2] for i in ("reference", None)]
    jax.tree.map(lambda a, b: close(a, b, name, scale=10), *results)


@sampled
@extending_only
def test_a_full_cache_is_refused_or_poisoned(name):
    layer = layer_of(name, True)
    cache = layer.init_cache(2, 4)
    if not hasattr(cache, "length"):
        pytest.skip("this cache never fills")
    with pytest.raises(ValueError, match="max_length"):
        layer.extend(inputs(5), cache)
    _, cache = layer.extend(inputs(3), cache)
    with pytest.raises(ValueError, match="max_length"):
        layer.extend(inputs(2), cache)
    y, _ = jax.jit(layer.extend)(inputs(2), cache)
    assert jnp.isnan(y).any(axis=(1, 2)).all(), "under jit an overflow must not look like an answer"


# Cost.

QUADRATIC_TIME = {"longt5"}  # in linear memory
# Of the layers that claim less than quadratic cost; where there are two directions, the second is much as the first.
LONG_DIRECTIONS = [
    pytest.param(name, is_causal, marks=[pytest.mark.full] if is_causal and CASES[name].supports.bidirectional else [])
    for name, is_causal in DIRECTIONS
    if CASES[name].supports.cost != "T^2" or name in QUADRATIC_TIME
]


@halved
@by_one_direction
def test_cost_grows_as_claimed(name, is_causal):
    limit = {"T": 2.2, "T log T": 3.0, "T^1.5": 3.0, "T^2": None}[CASES[name].supports.cost]
    if limit is None and name not in QUADRATIC_TIME:
        pytest.skip("the layer claims nothing: its time is quadratic")
    options = CASES[name].cost_options
    case = CASES[name]
    layer = nnx.eval_shape(
        lambda: zoo.make(name, in_features=64, rngs=nnx.Rngs(0), **{**(options or case.options), "is_causal": is_causal})
    )
    graphdef, state = nnx.split(layer)

    def gradient(state, x):
        return jax.grad(lambda state, x: jnp.sum(nnx.merge(graphdef, state)(x)), argnums=1)(state, x)

    gradient = jax.jit(gradient)  # traced once for both measures
    shapes = [jax.ShapeDtypeStruct((1, length, 64), jnp.float32) for length in (LONG // 2, LONG)]
    flops = [measure.flops(gradient, state, x) for x in shapes]
    assert limit is None or flops[1] <= limit * flops[0], f"{flops[1] / flops[0]:.2f} times the FLOPs at twice the length"
    temporary = [measure.memory(gradient, state, x).temporary for x in shapes]
    times = temporary[1] / temporary[0]
    assert times <= (limit or 2.2), f"{times:.2f} times the memory at twice the length"


@halved
@pytest.mark.parametrize("name,is_causal", LONG_DIRECTIONS, ids=label)
def test_64k_tokens_train_within_a_gibibyte(name, is_causal):
    """One sample of 65,536 tokens, 8 heads of 64, bfloat16: memory beside arguments and results, by the compiler."""
    length, dtype = 65536, jnp.bfloat16
    options = dict(CASES[name].cost_options or CASES[name].options)
    options |= {word: size for word, size in (("max_length", length), ("num_heads", 8)) if word in options}
    options |= dict(in_features=512, out_features=512, dtype=dtype, param_dtype=dtype, is_causal=is_causal)
    layer = nnx.eval_shape(lambda: zoo.make(name, rngs=nnx.Rngs(0), **options))
    graphdef, parameters, rest = nnx.split(layer, nnx.Param, ...)
    tokens = jax.ShapeDtypeStruct((1, length, 512), dtype)

    def train(parameters, tokens, rest, cotangent):
        outputs, backward = jax.vjp(lambda *given: nnx.merge(graphdef, given[0], rest)(given[1]), parameters, tokens)
        return outputs, backward(cotangent)

    traced = jax.jit(train).trace(parameters, tokens, rest, tokens)
    largest = max(math.prod(aval.shape) for aval in arrays_of(traced.jaxpr.jaxpr))
    assert largest < length * length / 16, "an array of queries by keys"
    assert measure.memory_of(traced.lower().compile()).temporary < 2**30


def arrays_of(jaxpr):
    """The types of all arrays that a jaxpr makes or holds, inside its functions and loops too."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in (*equation.invars, *equation.outvars))
        for inner in jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


@by_name
def test_every_layer_of_the_table_has_its_docstring(name):
    text = zoo.LAYERS[name].__doc__
    for part in ("Cost:", "Differs from the paper:", "Args:", "Returns:", "Raises:", "Numerics:", "Example:", "Source:"):
        assert part in text, f"{name} says nothing under {part!r}"


def test_every_layer_has_a_row():
    assert set(CASES) == set(zoo.LAYERS)


if __name__ == "__main__":
    PATHS.write_text(json.dumps(variable_paths(), indent=1, sort_keys=True) + "\n")
