"""The contract, for every layer: DESIGN's promises as tests over one table (cases.py)."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra.bench import measure

from .cases import CASES, CAUSAL, DIRECTIONS, EXTENDING, FEATURES, LONG, SEGMENTED, inputs, label

by_direction = pytest.mark.parametrize("name,is_causal", DIRECTIONS, ids=label)
by_name = pytest.mark.parametrize("name", CASES)
causal_only = pytest.mark.parametrize("name", CAUSAL)
extending_only = pytest.mark.parametrize("name", EXTENDING)

LENGTH = 23


@functools.cache
def layer_of(name: str, is_causal: bool) -> nnx.Module:
    return CASES[name].make(is_causal)


@functools.cache
def jitted(name: str, is_causal: bool):
    """The layer as a compiled function of inputs and mask, shared by the tests of one process."""
    layer = layer_of(name, is_causal)
    return jax.jit(lambda x, mask=None: layer(x, mask=mask))


def directions(name: str) -> list[bool]:
    return [is_causal for other, is_causal in DIRECTIONS if other == name]


def padding(valid) -> jax.Array:
    """[B, T] -> [B, 1, 1, T]."""
    return jnp.asarray(valid, bool)[:, None, None, :]


def close(actual, expected, name: str, scale: float = 1.0):
    np.testing.assert_allclose(actual, expected, rtol=1e-4 * scale, atol=CASES[name].tolerance * scale)


# 1. Shapes and dtypes, at any length.


@by_direction
@pytest.mark.parametrize("length", [1, 7, 63, 100])
def test_any_length(name, is_causal, length):
    y = jitted(name, is_causal)(inputs(length))
    assert y.shape == (2, length, FEATURES) and y.dtype == jnp.float32
    assert jnp.isfinite(y).all()


@by_direction
def test_bfloat16(name, is_causal):
    case = CASES[name]
    layer = case.make(is_causal, dtype=jnp.bfloat16)
    x = inputs(LENGTH)
    y = jax.jit(lambda x: layer(x))(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    exact = jitted(name, is_causal)(x.astype(jnp.bfloat16).astype(jnp.float32))
    error = jnp.abs(y.astype(jnp.float32) - exact)
    # Rounding may move a token to another of Reformer's buckets, which is no small change; most tokens stay.
    assert jnp.quantile(error, 0.9 if name == "reformer" else 1.0) < 0.03 * jnp.abs(exact).max()


@by_direction
def test_batch_axes(name, is_causal):
    x = inputs(LENGTH, batch=6)
    y = jitted(name, is_causal)(x)
    close(jitted(name, is_causal)(x.reshape(2, 3, LENGTH, FEATURES)), y.reshape(2, 3, LENGTH, FEATURES), name)
    close(jitted(name, is_causal)(x[0]), y[0], name)


@by_name
def test_out_features_and_param_dtype(name):
    is_causal = directions(name)[0]
    layer = CASES[name].make(is_causal, out_features=24, param_dtype=jnp.bfloat16, dtype=jnp.float32)
    assert layer(inputs(5)).shape == (2, 5, 24)
    assert {a.dtype for a in jax.tree.leaves(nnx.state(layer, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}


# 2. Every parameter learns.


@by_direction
def test_every_parameter_gets_a_gradient(name, is_causal):
    layer = layer_of(name, is_causal)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    # Off their initial values: zero biases and unit gains may hide a term.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([p + 0.1 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])
    weights = inputs(LENGTH, seed=2)
    loss = lambda params: jnp.sum(nnx.merge(graphdef, params, rest)(inputs(LENGTH)) * weights)
    gradients = jax.jit(jax.grad(loss))(params)
    largest = {"/".join(map(str, path)): jnp.abs(v[...]).max() for path, v in nnx.to_flat_state(gradients)}
    assert all(jnp.isfinite(size) for size in largest.values())
    dead = {path for path, size in largest.items() if size < 1e-5 * max(largest.values())}
    assert dead == set(CASES[name].dead)


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


@by_direction
def test_jacobian_stays_inside_the_pattern(name, is_causal):
    length = 13
    layer = layer_of(name, is_causal)
    x = inputs(length, batch=1)[0]
    jacobian = jax.jit(jax.jacrev(lambda x: layer(x).sum(-1)))(x)
    reached = np.asarray(jnp.abs(jacobian).sum(-1) > 1e-7)
    allowed = layer.pattern(length).any(0)
    assert allowed.shape == (length, length) and allowed.dtype == bool
    assert not (reached & ~allowed).any()
    assert reached.any(1).all()
    if is_causal:
        assert not np.triu(allowed, 1).any()


# 4. Padding.


@by_direction
def test_padding_changes_nothing(name, is_causal):
    real, length = 40, 63
    x = inputs(length)
    mask = jnp.arange(length) < real
    masks = padding(jnp.stack([mask, mask]))
    y = jitted(name, is_causal)(x, masks)
    assert jnp.isfinite(y).all()
    other = jnp.where(mask[:, None], x, 30 * inputs(length, seed=3))
    close(jitted(name, is_causal)(other, masks)[:, :real], y[:, :real], name)
    close(jitted(name, is_causal)(x[:, :real]), y[:, :real], name)
    longer = jnp.concatenate([x, inputs(37, seed=4)], axis=1)
    longer_masks = jnp.concatenate([masks, jnp.zeros((2, 1, 1, 37), bool)], axis=-1)
    close(jitted(name, is_causal)(longer, longer_masks)[:, :real], y[:, :real], name)


@by_direction
def test_padding_gets_no_gradient(name, is_causal):
    mask = jnp.arange(LENGTH) < 15
    layer = layer_of(name, is_causal)
    loss = lambda x: jnp.sum(jnp.where(mask[:, None], layer(x, mask=padding(mask[None])), 0) ** 2)
    gradient = jax.jit(jax.grad(loss))(inputs(LENGTH, batch=1))
    assert jnp.isfinite(gradient).all()
    assert jnp.abs(gradient[:, 15:]).max() < 1e-6 < jnp.abs(gradient[:, :15]).max()


@by_direction
def test_all_padding_is_finite(name, is_causal):
    mask = jnp.zeros((2, 1, 1, LENGTH), bool).at[0].set(True)
    layer = layer_of(name, is_causal)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: jnp.sum(layer(x, mask=mask) ** 2)))(inputs(LENGTH))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


# 5. Batch-mates.


@by_direction
def test_a_sample_is_its_own(name, is_causal):
    x = inputs(LENGTH, batch=3)
    y = jitted(name, is_causal)(x)
    close(jitted(name, is_causal)(x.at[1:].multiply(30.0))[:1], y[:1], name)
    close(jitted(name, is_causal)(x[:1]), y[:1], name)


# 6. Extend.


def extend_all(layer, x, cuts, mask=None, **cache_options):
    cache = layer.init_cache(x.shape[0], x.shape[1], **cache_options)
    step = jax.jit(lambda x, cache, mask: layer.extend(x, cache, mask=mask))
    outputs, start = [], 0
    for width in cuts:
        stop = start + width
        y, cache = step(x[:, start:stop], cache, None if mask is None else mask[..., start:stop])
        outputs.append(y)
        start = stop
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1)


@extending_only
@pytest.mark.parametrize("cuts", [[LENGTH], [1] * LENGTH, [9, 1, 6, 7], [2, 17, 4]], ids=str)
def test_extend_equals_one_call(name, cuts):
    if not CASES[name].extend_equals_call:
        pytest.skip("the docstring says how extend differs; the layer's own tests show it")
    x = inputs(LENGTH)
    close(extend_all(layer_of(name, True), x, cuts), jitted(name, True)(x), name)


@extending_only
def test_extend_honours_padding(name):
    layer = layer_of(name, True)
    x = inputs(LENGTH)
    valid = jnp.ones((2, LENGTH), bool).at[0, :5].set(False).at[1, 9:12].set(False)
    y = extend_all(layer, x, [4, 7, 12], padding(valid))
    noisy = jnp.where(valid[..., None], x, 30 * inputs(LENGTH, seed=5))
    other = extend_all(layer, noisy, [4, 7, 12], padding(valid))
    close(jnp.where(valid[..., None], other, 0), jnp.where(valid[..., None], y, 0), name)
    if CASES[name].extend_equals_call:
        full = jitted(name, True)(x, padding(valid))
        close(jnp.where(valid[..., None], y, 0), jnp.where(valid[..., None], full, 0), name)


@extending_only
def test_extend_takes_a_mask_that_broadcasts(name):
    layer = layer_of(name, True)
    valid = jnp.array([True, False, True])
    full, _ = layer.extend(inputs(3), layer.init_cache(2, 3), mask=padding(jnp.stack([valid, valid])))
    y, _ = layer.extend(inputs(3), layer.init_cache(2, 3), mask=valid[None, None, None])
    np.testing.assert_array_equal(y, full)


@extending_only
def test_extend_in_a_scan(name):
    layer = layer_of(name, True)
    x = inputs(9)

    @jax.jit
    def decode(x):
        def step(cache, token):
            y, cache = layer.extend(token[:, None], cache)
            return cache, y[:, 0]

        return jax.lax.scan(step, layer.init_cache(2, 9), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    close(decode(x), extend_all(layer, x, [1] * 9), name)


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
def test_extend_takes_a_cache_that_is_donated(name):
    layer, x = layer_of(name, True), inputs(5)
    step = jax.jit(lambda x, cache: layer.extend(x, cache), donate_argnums=1)
    first, cache = step(x[:, :3], layer.init_cache(2, 5))
    second, _ = step(x[:, 3:], cache)
    close(jnp.concatenate([first, second], axis=1), extend_all(layer, x, [3, 2]), name)


@extending_only
@pytest.mark.parametrize("dtypes", [(jnp.bfloat16, None), (jnp.float32, jnp.bfloat16)], ids=["param", "both"])
def test_extend_computes_in_the_dtype_of_the_call(name, dtypes):
    param_dtype, dtype = dtypes
    layer, x = CASES[name].make(True, param_dtype=param_dtype, dtype=dtype), inputs(LENGTH)
    y, extended = layer(x), extend_all(layer, x, [9, 1, 13])
    assert extended.dtype == y.dtype == (dtype or jnp.float32)
    if dtype is None and CASES[name].extend_equals_call:
        close(extended, y, name)


# 7. Transformations.


@by_direction
def test_transformations(name, is_causal):
    layer = layer_of(name, is_causal)
    x = inputs(LENGTH)
    y = jitted(name, is_causal)(x)
    close(layer(x), y, name)
    close(nnx.jit(lambda layer, x: layer(x))(layer, x), y, name)
    close(jax.jit(jax.vmap(lambda x: layer(x)))(x), y, name)
    loss = lambda x: jnp.sum(layer(x) ** 2)
    close(jax.jit(jax.grad(jax.checkpoint(loss)))(x), jax.jit(jax.grad(loss))(x), name, scale=10)


@by_direction
def test_forward_derivatives_of_the_reference(name, is_causal):
    layer, x = CASES[name].make(is_causal, implementation="reference"), inputs(LENGTH)
    loss = lambda x: jnp.sum(layer(x) ** 2)
    gradient, curvature = jax.jit(lambda x: jax.jvp(jax.grad(loss), (x,), (x,)))(x)
    forward = jax.jit(lambda x: jax.jvp(loss, (x,), (x,))[1])(x)
    np.testing.assert_allclose(forward, jnp.vdot(gradient, x), rtol=1e-3, atol=1e-3)
    assert jnp.isfinite(curvature).all()


@by_direction
def test_shard_map(name, is_causal):
    """Without its check of what varies over the mesh, which loops of the kernels do not pass."""
    layer, x = layer_of(name, is_causal), inputs(LENGTH)
    mesh, batch = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("data")
    shared = jax.shard_map(lambda x: layer(x), mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)

    def both(x):
        y, backward = jax.vjp(shared, x)
        return y, backward(y)[0]

    y, gradient = jax.jit(both)(x)
    close(y, jitted(name, is_causal)(x), name)
    close(gradient, jax.jit(jax.grad(lambda x: jnp.sum(layer(x) ** 2) / 2))(x), name, scale=10)


@by_direction
def test_x64_changes_nothing_for_float32(name, is_causal):
    """A layer built and called where JAX has 64 bits is, for float32 inputs, the layer that it is elsewhere."""
    x, expected = inputs(LENGTH), jitted(name, is_causal)(inputs(LENGTH))
    with jax.enable_x64(True):
        layer = CASES[name].make(is_causal)
        assert {a.dtype for a in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.float32)}
        y, gradient = jax.jit(lambda x: (layer(x), jax.grad(lambda x: jnp.sum(layer(x) ** 2))(x)))(x)
        assert y.dtype == gradient.dtype == jnp.float32 and jnp.isfinite(gradient).all()
        close(y, expected, name)
        if name in EXTENDING and is_causal and CASES[name].extend_equals_call:
            close(extend_all(layer, x, [9, 1, 13]), expected, name)


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
    expected = x
    for depth in range(3):
        expected = expected + nnx.merge(graphdef, jax.tree.map(lambda a: a[depth], state))(expected)  # noqa: B023
    close(deep(stack, x), expected, name, scale=10)


# 8. Compilation.


@by_direction
def test_second_call_compiles_nothing(name, is_causal):
    layer = layer_of(name, is_causal)
    traces = []

    @jax.jit
    def run(x, mask):
        traces.append(1)
        return layer(x, mask=mask)

    mask = jnp.ones((2, 1, 1, 7), bool)
    run(inputs(7), mask)
    run(inputs(7, seed=1), mask.at[0, ..., 3:].set(False))
    assert len(traces) == 1


@by_direction
def test_a_call_changes_nothing_in_the_layer(name, is_causal):
    layer = CASES[name].make(is_causal)
    before, attributes = jax.tree.map(jnp.copy, nnx.state(layer)), set(vars(layer))
    layer(inputs(7), mask=padding(np.ones((2, 7))), deterministic=False, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer))
    assert set(vars(layer)) == attributes


# 9. Linen.


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


# 11. Segments.


@pytest.mark.parametrize("name,is_causal", SEGMENTED, ids=label)
def test_segments_do_not_reach_each_other(name, is_causal):
    """Other tokens in one segment change nothing in the others, forward or backward; one segment is as none."""
    layer = layer_of(name, is_causal)
    ids = jnp.asarray([[2] * 6 + [0] * 10 + [1] * 7, [5] * 9 + [3] * 9 + [3] * 5])
    other = inputs(LENGTH, seed=1)
    run = jax.jit(lambda x, ids: layer(x, segment_ids=ids))
    pull = jax.jit(jax.grad(lambda x, kept, ids: (jnp.where(kept, layer(x, segment_ids=ids), 0) * other).sum()))
    x, is_middle = inputs(LENGTH), (ids == jnp.asarray([[0], [3]]))[..., None]
    changed = jnp.where(is_middle, other, x)
    before, after = run(x, ids), run(changed, ids)
    close(jnp.where(is_middle, 0, after), jnp.where(is_middle, 0, before), name)
    assert jnp.abs(jnp.where(is_middle, after - before, 0)).max() > 0.01
    assert (jnp.where(is_middle, pull(x, ~is_middle, ids), 0) == 0).all()
    close(run(x, jnp.zeros((2, LENGTH), int)), jitted(name, is_causal)(x), name)


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
    if isinstance(layer, zoo.base.Attention) and not supports.weights:
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
    if "num_heads" in case.options and not supports.grouped:
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
    if "num_heads" in case.options:
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
            CASES[name].make(is_causal, implementation=implementation)(inputs(7))


@by_direction
def test_reference_and_xla_agree(name, is_causal):
    x = inputs(LENGTH)
    mask = padding(jnp.arange(LENGTH)[None] < jnp.array([[LENGTH], [17]]))
    results = [
        jax.jit(jax.value_and_grad(lambda x, layer=layer: jnp.sum(layer(x, mask=mask) ** 2)))(x)
        for layer in (CASES[name].make(is_causal, implementation=i) for i in ("reference", "xla"))
    ]
    jax.tree.map(lambda a, b: close(a, b, name, scale=10), *results)


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


@by_direction
def test_cost_grows_as_claimed(name, is_causal):
    limit = {"T": 2.2, "T log T": 3.0, "T^1.5": 3.0, "T^2": None}[CASES[name].supports.cost]
    if limit is None:
        pytest.skip("the layer claims nothing: its time is quadratic")
    options = CASES[name].cost_options
    case = CASES[name]
    layer = nnx.eval_shape(
        lambda: zoo.make(name, in_features=64, rngs=nnx.Rngs(0), **{**(options or case.options), "is_causal": is_causal})
    )
    graphdef, state = nnx.split(layer)

    def gradient(state, x):
        return jax.grad(lambda state, x: jnp.sum(nnx.merge(graphdef, state)(x)), argnums=1)(state, x)

    shapes = [jax.ShapeDtypeStruct((1, length, 64), jnp.float32) for length in (LONG // 2, LONG)]
    flops = [measure.flops(gradient, state, x) for x in shapes]
    assert flops[1] <= limit * flops[0], f"{flops[1] / flops[0]:.2f} times the FLOPs at twice the length"
    temporary = [measure.memory(gradient, state, x).temporary for x in shapes]
    assert temporary[1] <= limit * temporary[0], f"{temporary[1] / temporary[0]:.2f} times the memory at twice the length"


@by_name
def test_every_layer_of_the_table_has_its_docstring(name):
    text = zoo.LAYERS[name].__doc__
    for part in ("Cost:", "Differs from the paper:", "Args:", "Returns:", "Raises:", "Numerics:", "Example:", "Source:"):
        assert part in text, f"{name} says nothing under {part!r}"


def test_every_layer_has_a_row():
    assert set(CASES) == set(zoo.LAYERS)


if __name__ == "__main__":
    PATHS.write_text(json.dumps(variable_paths(), indent=1, sort_keys=True) + "\n")
