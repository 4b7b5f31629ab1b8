"""Every operation in every implementation, against the float64 reference: values, gradients, transformations.

An implementation other than "xla" may be wrong by twice what the XLA path is wrong in the same dtype, plus a few units in
the last place: the rule adapts itself to dtype and length.

By default the first call of every operation meets every test. Its other calls have their values and gradients compared at
lengths of several blocks, and a sample of the rest; -m full runs what is left out.
"""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, launch, softmax, specs
from tests.assertions import products

SPECS = specs.load()
# The largest relative error of the XLA path, of outputs and of gradients; half of that in the root mean square.
TOLERANCES = {"float32": (1e-5, 2e-5), "bfloat16": (2e-2, 3e-2), "float16": (3e-3, 5e-3)}
ULPS = 8
# Of the largest number of all leaves: what a leaf that is smaller is relative to, since what cancels to little or nothing, as
# the gradient of a query with one key, still has the rounding of its terms.
LEAST = {"float32": 2e-2, "bfloat16": 1e-1, "float16": 1e-1}
# In half precision: the lengths, and one in how many of the calls runs by default, of XLA's and of others.
HALF = {"bfloat16": ((63, 129), {"xla": 3, "others": 5}), "float16": ((63,), {"xla": 4, "others": 8})}
# Of the lengths of a call that has more than three: 7 and 100 are, like 63, less than a block of any operation.
LIKE_63, SHORT = (7, 100), (1, 63)
# The first call of each operation.
FIRST = set({spec.operation: name for name, spec in reversed(SPECS.items())}.values())
SIBLINGS = [name for name in SPECS if name not in FIRST]
sampled = pytest.mark.sample(3, of=SIBLINGS)

IMPLEMENTATIONS = ("xla", "interpret", "triton")
LEGS = {"interpret": [pytest.mark.interpret], "triton": [pytest.mark.gpu]}


def case(name, implementation, *more, marks=()):
    """A call of an implementation, in the leg that has it."""
    label = "-".join(map(str, (name, *more, implementation)))
    return pytest.param(name, *more, implementation, marks=[*LEGS.get(implementation, ()), *marks], id=label)


def serves(spec, implementation):
    return implementation == "xla" or implementation in spec.implementations


def short(spec):
    """A length of less than a block."""
    return min((length for length in spec.lengths if length >= 16), default=spec.lengths[-1])


def several_blocks(spec):
    return 129 if 129 in spec.lengths else max(spec.lengths)


@functools.lru_cache(maxsize=8)
def reference(name, length):
    """The reference under `jax.jit`: in float64 it is the same program for every dtype."""
    spec = SPECS[name]
    return jax.jit(specs.forward_backward(spec, "reference", specs.split(spec.draw(length))[1]))


@functools.lru_cache(maxsize=64)
def problem(name, length, dtype):
    """The arrays, cotangents and what is expected, computed once for the implementations that are compared."""
    spec = SPECS[name]
    arrays = spec.draw(length, dtype)
    cotangents = specs.cotangents(spec, "xla", arrays)
    with jax.enable_x64(True):
        wide = specs.widen(specs.split(arrays)[0]), specs.widen(cotangents)
        return arrays, cotangents, jax.tree.map(np.asarray, reference(name, length)(*wide))


@functools.lru_cache(maxsize=32)
def compiled(name, length, dtype, implementation):
    """(the forward and backward pass under `jax.jit`, its arrays and cotangents): what tests of one call share."""
    arrays, cotangents, _ = problem(name, length, dtype)
    inexact, rest = specs.split(arrays)
    return jax.jit(specs.forward_backward(SPECS[name], implementation, rest)), (inexact, cotangents)


@functools.lru_cache(maxsize=64)
def errors(name, length, dtype, implementation):
    """(name of the leaf, relative error, that in the root mean square) of every output and gradient."""
    want = problem(name, length, dtype)[2]
    run, arguments = compiled(name, length, dtype, implementation)
    got = run(*arguments)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    shape_of = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape_of, got[1]) == jax.tree.map(shape_of, arguments[0])
    sizes = [np.abs(np.where(np.isfinite(x), x, 0)) for x in jax.tree.leaves(want)]
    least = LEAST[dtype] * max(x.max(initial=0) for x in sizes), LEAST[dtype] * max(map(root_mean_square, sizes))
    leaves = zip(specs.names_of(got), *map(jax.tree.leaves, (got, want)), strict=True)
    return [(leaf, specs.error(x, y, max(least[0], 1e-30)), mean_error(x, y, max(least[1], 1e-30))) for leaf, x, y in leaves]


def root_mean_square(x):
    return np.sqrt(np.mean(np.abs(x) ** 2))


def mean_error(got, want, least):
    """As `specs.error`, of the root mean squares."""
    seen = np.isfinite(want)
    difference = np.where(seen, np.asarray(got).astype(want.dtype), 0) - np.where(seen, want, 0)
    return float(root_mean_square(difference) / max(root_mean_square(np.where(seen, want, 0)), least))


def marks_of(spec, implementation, length):
    """What of the lengths runs by default: of an operation's first call all, in XLA, and else a sample."""
    if len(spec.lengths) <= 3 or (spec.name in FIRST and implementation == "xla"):
        return []
    if length in LIKE_63:
        return [pytest.mark.full]
    return [pytest.mark.sample(4 if length in SHORT else 2)] if spec.name in SIBLINGS else []


def cases():
    for name, spec in SPECS.items():
        for implementation in filter(functools.partial(serves, spec), IMPLEMENTATIONS):
            for length in spec.lengths:
                yield case(name, implementation, length, "float32", marks=marks_of(spec, implementation, length))
            for dtype, (lengths, shares) in HALF.items():
                every = shares.get(implementation, shares["others"])
                for length in filter(spec.lengths.__contains__, lengths):
                    yield case(name, implementation, length, dtype, marks=[pytest.mark.sample(every)])


@pytest.mark.parametrize(("name", "length", "dtype", "implementation"), list(cases()))
def test_values_and_gradients(name, length, dtype, implementation):
    spec = SPECS[name]
    plain = errors(name, length, dtype, "xla")
    if implementation == "xla":
        for leaf, error, mean in plain:
            tolerance = TOLERANCES[dtype][leaf.startswith("[1]")] * spec.slack
            assert error <= tolerance, f"{leaf} is wrong by {error:.1e}"
            assert mean <= tolerance / 2, f"{leaf} is wrong by {mean:.1e} on average"
        return
    for (leaf, *found), (_, *others) in zip(errors(name, length, dtype, implementation), plain, strict=True):
        # Twice what XLA's path is wrong by, or half of what it may be.
        floor = max(ULPS * float(jnp.finfo(dtype).eps), TOLERANCES[dtype][leaf.startswith("[1]")] / 2) * spec.slack
        for error, allowed, least, word in zip(found, others, (floor, floor / 2), ("the most", "on average"), strict=True):
            assert error <= max(2 * allowed, least), f"{leaf} is wrong by {error:.1e} ({word}), XLA's by {allowed:.1e}"


def transformed():
    for name, spec in SPECS.items():
        for implementation in filter(functools.partial(serves, spec), IMPLEMENTATIONS):
            # The interpreter takes seconds for what is one rule of the operation, whatever the call.
            is_left_out = implementation == "interpret" and name in SIBLINGS
            yield case(name, implementation, marks=[pytest.mark.full] if is_left_out else ())


@sampled
@pytest.mark.parametrize(("name", "implementation"), list(transformed()))
def test_determinism_jit_and_vmap(name, implementation):
    """The same bits every time; a mapped axis as a loop over it, outside of `scan` and inside."""
    spec = SPECS[name]
    run, arguments = compiled(name, short(spec), "float32", implementation)
    once, again = run(*arguments), run(*arguments)
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)

    twice = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arguments)
    mapped = jax.jit(jax.vmap(run.__wrapped__))(*twice)  # not of what is traced already
    half = run(*jax.tree.map(lambda x: x[1], twice))
    for leaf, got, *want in zip(specs.names_of(once), *map(jax.tree.leaves, (mapped, once, half)), strict=True):
        for place, one in enumerate(want):
            assert specs.error(got[place], one) < 1e-5 * spec.slack, leaf

    def step(carry, x):
        return carry, run(*x)

    looped = jax.jit(lambda x: jax.lax.scan(step, None, x)[1])(twice)
    for leaf, got, want in zip(specs.names_of(once), *map(jax.tree.leaves, (looped, mapped)), strict=True):
        assert specs.error(got, want) < 1e-5 * spec.slack, leaf


@sampled
@pytest.mark.parametrize("name", SPECS)
def test_triton_declines_with_a_reason_where_there_is_no_gpu(name):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    spec = SPECS[name]
    arrays = spec.draw(spec.lengths[0])
    with pytest.raises(dispatch.Declined, match="GPU|interpreter|not installed|does not exist"):
        spec.call(arrays, "triton")


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@sampled
@pytest.mark.parametrize("name", SPECS)
def test_64_bits_for_others_change_nothing_here(name, implementation):
    """With JAX's 64 bits on, for another part of a program, float32 arrays stay what they are."""
    spec = SPECS[name]
    arrays = spec.draw(spec.lengths[-1 if implementation == "xla" else 0])  # several tiles
    inexact, rest = specs.split(arrays)
    cotangents = specs.cotangents(spec, implementation, arrays)
    with jax.enable_x64(True):
        got = jax.eval_shape(specs.forward_backward(spec, implementation, rest), inexact, cotangents)
    shape_of = lambda x: (x.shape, x.dtype)
    assert jax.tree.map(shape_of, got) == jax.tree.map(shape_of, (cotangents, inexact))


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if serves(spec, "triton")])
def test_64_bits_for_others_change_no_launch(name):
    """A pointer to float64 has another stride than the kernel's, and no float32 output can lie in its memory."""
    spec = SPECS[name]
    inexact, rest = specs.split(spec.draw(spec.lengths[len(spec.lengths) // 2]))
    seen = []
    for wide in (False, True):
        with jax.enable_x64(wide), launch.recording() as launches:
            outputs = jax.eval_shape(specs.forward(spec, "triton", rest), inexact)
            jax.eval_shape(specs.forward_backward(spec, "triton", rest), inexact, outputs)
        seen.append(launches)
    assert seen[0] and seen[0] == seen[1]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, implementation)
        for name, spec in SPECS.items()
        for implementation in ("xla", "reference", "triton")
        if implementation == "reference" or serves(spec, implementation)
    ],
)
def test_products_of_float32_have_all_digits(name, implementation):
    """The default is TF32 on a GPU and bfloat16 on a TPU, and no test on a CPU would see that."""
    run, arguments = compiled(name, several_blocks(SPECS[name]), "float32", implementation)
    with launch.recording() if implementation == "triton" else contextlib.nullcontext():
        traced = run.trace(*arguments)
    assert set(products(traced.jaxpr)) <= {(jax.lax.Precision.HIGHEST,) * 2}


def test_names_need_no_quotes():
    assert [name for name in SPECS if not re.fullmatch(r"[a-z_0-9.]+/[a-z0-9-]+", name)] == []


@sampled
@pytest.mark.parametrize("name", SPECS)
def test_lowers_for_tpu(name):
    run, arguments = compiled(name, several_blocks(SPECS[name]), "float32", "xla")
    assert run.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_one_array_of_16_bits_makes_no_product_shorter(implementation):
    query = jnp.ones((1, 65, 2, 8))
    bias = jnp.zeros((1, 2, 65, 65), jnp.bfloat16)
    run = lambda x, bias: softmax.attention(x, x, x, bias=bias, implementation=implementation).sum()
    found = set(products(jax.make_jaxpr(jax.grad(run, (0, 1)))(query, bias).jaxpr))
    assert found == {(jax.lax.Precision.HIGHEST,) * 2}
