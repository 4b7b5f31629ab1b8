"""Strided attention: the tiled form against dense attention under its pattern; tiles, costs and refusals."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import softmax, strided
from subquad.kernels.softmax import plan, xla
from subquad.lra.bench import measure
from tests.kernels import dense
from tests.kernels.dense import TOLERANCES, draw

COLUMNS = np.array([[6, 7], [0, 3], [2, 7], [4, 5]])
CALLS = {
    "strided": (strided.attention, dict(stride=8, window_size=8)),
    "strided, far only": (strided.attention, dict(stride=5, window_size=None)),
    "strided, a wide window": (strided.attention, dict(stride=4, window_size=19)),
    "dilated": (strided.dilated, dict(dilation=3, window_size=(4, 2))),
    "fixed": (strided.fixed, dict(block_size=8, columns=COLUMNS)),
    "fixed, far only": (strided.fixed, dict(block_size=8, columns=COLUMNS[:1], own_block=False)),
}
by_call = pytest.mark.parametrize("name", CALLS)


def by_hand(
    length, *, dilation=None, stride=None, window_size=None, block_size=None, columns=None, own_block=True, is_causal=False
):
    """bool [1|N, T, T]: the formulas of the docstrings, pair by pair."""
    heads = 1 if columns is None else len(columns)
    seen = np.zeros((heads, length, length), bool)
    for n, t, s in np.ndindex(seen.shape):
        if dilation is not None:
            seen[n, t, s] = (s - t) % dilation == 0 and -window_size[0] <= (s - t) // dilation <= window_size[1]
        elif columns is None:
            seen[n, t, s] = (window_size is not None and abs(t - s) <= window_size) or (t - s) % stride == 0
        else:
            seen[n, t, s] = (own_block and t // block_size == s // block_size) or s % block_size in columns[n]
        seen[n, t, s] &= s <= t or not is_causal
    return seen


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short inputs take many steps, with ragged last tiles in every direction."""
    monkeypatch.setattr(plan, "tile_sizes", lambda rows, queries, keys, reach: (min(queries, 6), min(keys, 5)))


def check(name, length, dtype="float32", mask=None, is_causal=False, batch=2, **options):
    """Compares with dense attention in float64: out, lse and every gradient."""
    function, more = CALLS[name]
    arrays, cotangents = draw(length, batch=batch, dtype=dtype, **options)
    seen = jnp.asarray(by_hand(length, **more, is_causal=is_causal))[None]
    attend = lambda *arrays: function(*arrays, **more, mask=mask, is_causal=is_causal, return_lse=True, implementation="xla")
    seen = seen if mask is None else seen & mask
    dense.compare(dense.run(attend, arrays, cotangents), dense.formula(arrays, cotangents, mask=seen), dtype)


@pytest.mark.sample(2)
@by_call
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 8, 61])
def test_many_tiles(small_tiles, name, is_causal, length):
    check(name, length, is_causal=is_causal)


@by_call
def test_key_padding_and_other_value_features(small_tiles, name):
    mask = jnp.asarray(np.random.default_rng(2).random((3, 1, 1, 29)) < 0.6).at[0].set(False)
    check(name, 29, mask=mask, batch=3, values=5)
    check(name, 29, mask=mask[1:2], batch=3, is_causal=True)


@pytest.mark.sample(2)
@by_call
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_segments(small_tiles, name, is_causal, implementation):
    """Not only runs: a segment's tokens may lie anywhere. 29 is no multiple of a stride or block."""
    function, options = CALLS[name]
    arrays, cotangents = draw(29, batch=2)
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, 29)).cumsum(1) % 3)
    mask = jnp.asarray(np.random.default_rng(4).random((2, 1, 1, 29)) < 0.8)
    attend = lambda *arrays: function(
        *arrays, **options, mask=mask, segment_ids=ids, is_causal=is_causal, return_lse=True, implementation=implementation
    )
    seen = jnp.asarray(by_hand(29, **options, is_causal=is_causal))[None] & mask & (ids[:, None, :, None] == ids[:, None, None])
    dense.compare(dense.run(attend, arrays, cotangents), dense.formula(arrays, cotangents, mask=seen), "float32")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dtypes(dtype):
    check("strided", 100, dtype, is_causal=True)
    check("fixed", 100, dtype)


@by_call
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_reference_is_the_pattern_spelled_out(name, is_causal):
    function, options = CALLS[name]
    arrays, _ = draw(27)
    seen = jnp.asarray(by_hand(27, **options, is_causal=is_causal))[None]
    out = function(*arrays, **options, is_causal=is_causal, implementation="reference")
    np.testing.assert_allclose(out, softmax.attention(*arrays, mask=seen), atol=2e-6)


def test_a_key_in_both_sets_counts_once():
    """With equal logits the weights are 1 / (number of keys seen): a key counted twice would weigh double."""
    x = jnp.zeros((1, 40, 1, 4))
    value = jnp.eye(40)[None, :, None]
    for window in (0, 3, 4, 5, 9):
        weights = strided.attention(x, x, value, stride=4, window_size=window, is_causal=True)[0, :, 0]
        seen = by_hand(40, stride=4, window_size=window, is_causal=True)[0]
        np.testing.assert_allclose(weights, seen / seen.sum(1, keepdims=True), atol=1e-6)


def test_a_future_token_changes_no_past_output():
    (query, key, value), _ = draw(60)
    for function, options in CALLS.values():
        attend = lambda key, value: function(query, key, value, **options, is_causal=True)  # noqa: B023
        out, later = attend(key, value), attend(key.at[:, 46].mul(1e4), value.at[:, 46].mul(1e4))
        np.testing.assert_array_equal(out[:, :46], later[:, :46])
        assert not np.allclose(out[:, 46:], later[:, 46:])


def test_a_stride_over_everything_is_the_window():
    arrays, _ = draw(30)
    out = strided.attention(*arrays, stride=1000, window_size=7)
    np.testing.assert_allclose(out, softmax.attention(*arrays, window_size=7), atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("size", [30, 2**31 - 1, 2**31, sys.maxsize])
def test_a_window_or_a_block_over_everything_is_full_attention(size, implementation):
    """However large it is: a position plus such a number is no int32."""
    arrays, _ = draw(30)
    want = softmax.attention(*arrays)
    attend = functools.partial(strided.attention, *arrays, stride=3, implementation=implementation)
    np.testing.assert_allclose(attend(window_size=size), want, atol=2e-6)
    attend = functools.partial(strided.fixed, *arrays, columns=np.array([[7, 29]]), implementation=implementation)
    np.testing.assert_allclose(attend(block_size=size), want, atol=2e-6)
    np.testing.assert_array_equal(attend(block_size=size, own_block=False), attend(block_size=30, own_block=False))


def test_steps_visit_what_is_visible_and_little_else(monkeypatch):
    """The pairs of positions in all tiles, against those that are visible."""
    planned = []
    monkeypatch.setattr(xla, "plan_of", lambda *arrays: planned.append(plan.plan_of(*arrays)) or planned[-1])
    for length, stride in ((4096, 64), (16384, 128)):
        x = jax.ShapeDtypeStruct((1, length, 4, 8), "float32")
        for name, options in (("attention", dict(stride=stride, window_size=stride)),
                              ("fixed", dict(block_size=stride, columns=np.array([[stride - 2, stride - 1]])))):  # fmt: skip
            planned.clear()
            jax.eval_shape(lambda *a: getattr(strided, name)(*a, **options, is_causal=True, implementation="xla"), x, x, x)  # noqa: B023
            pairs = sum(one.columns * one.shape[1] * one.tiles[0] * one.tiles[1] * one.shape[2] - 1 for one in planned)
            # What a row sees on average: its near keys, and its far ones, of which a row in the middle has half.
            far = length / stride / 2 * (1 if name == "attention" else 2)
            assert len(planned) == 2 and pairs / length <= 4 * (stride + far)


def test_memory_grows_linearly_and_stays_near_that_of_dense_attention():
    def memory(length, function, **options):
        arrays, _ = draw(length, batch=1, features=64, values=64)
        loss = lambda *arrays: function(*arrays, is_causal=True, implementation="xla", **options).sum()
        return measure.memory(jax.grad(loss, (0, 1, 2)), *arrays).temporary

    for function, options in ((strided.attention, dict(stride=64, window_size=64)),
                              (strided.fixed, dict(block_size=64, columns=np.array([[62, 63]])))):  # fmt: skip
        once, twice = memory(2048, function, **options), memory(4096, function, **options)
        assert twice <= 2.2 * once
        assert twice <= 1.8 * memory(4096, softmax.attention)


def test_no_array_is_gathered_or_square():
    arrays, _ = draw(512, batch=1)
    grad = jax.grad(lambda *a: strided.attention(*a, stride=32, window_size=32, implementation="xla").sum(), (0, 1, 2))
    text = str(jax.make_jaxpr(grad)(*arrays))
    assert "512,512" not in text and "gather" not in text and "scatter" not in text


SHORT = jnp.ones((2, 5, 2, 8))
REFUSALS = [
    (ValueError, "attention: stride must be an integer of at least 1", strided.attention, {"stride": 0}),
    (ValueError, "attention: window_size must be None", strided.attention, {"window_size": -1}),
    (ValueError, "attention: window_size must be None", strided.attention, {"window_size": 2.5}),
    (TypeError, "attention: mask must be boolean", strided.attention, {"mask": np.ones((1, 1, 1, 5))}),
    (ValueError, "attention: mask must be key padding", strided.attention, {"mask": np.ones((1, 1, 5, 5), bool)}),
    (ValueError, "attention: key must have the query's shape", strided.attention, {"key": SHORT, "value": SHORT}),
    (ValueError, "fixed: block_size must be an integer of at least 1", strided.fixed, {"block_size": 2.0}),
    (TypeError, "fixed: columns must be a NumPy array", strided.fixed, {"columns": jnp.zeros((1, 1), int)}),
    (TypeError, "fixed: columns must be a NumPy array", strided.fixed, {"columns": np.zeros((1, 1))}),
    (ValueError, "fixed: columns must have shape", strided.fixed, {"columns": np.zeros((3, 1), int)}),
    (ValueError, "fixed: columns must lie in 0 .. 3", strided.fixed, {"columns": np.array([[4]])}),
    (ValueError, "fixed: columns must list nothing twice", strided.fixed, {"columns": np.array([[1, 1]])}),
    (NotImplementedError, "attention: implementation='cudnn' does not exist", strided.attention, {"implementation": "cudnn"}),
]


@pytest.mark.parametrize(("error", "message", "function", "options"), REFUSALS)
def test_refusals(error, message, function, options):
    arrays = dict(zip(("query", "key", "value"), draw(5)[0], strict=True))
    good = {"stride": 2, "window_size": 1} if function is strided.attention else {"block_size": 4, "columns": np.array([[3]])}
    with pytest.raises(error, match=f"strided.{message}"):
        function(**{**arrays, **good, **options})
