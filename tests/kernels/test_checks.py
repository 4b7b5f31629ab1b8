"""What every operation refuses, by the name of the argument: integers, axes of 0, options out of range."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import (
    block_sparse,
    checks,
    convolution,
    entmax,
    gather,
    linear,
    lsh,
    matrix,
    relative,
    scan,
    softmax,
    ssm,
    strided,
)

B, T, N, H = 1, 6, 2, 4
TOKENS = jnp.ones((B, T, N, H))
ATTENTION = dict(query=TOKENS, key=TOKENS, value=TOKENS)
BUCKETS = jnp.zeros((B, 1, T, N), jnp.int32)
LOGITS = jnp.ones((B, N, 3, 3))
# Two features of three modes.
REAL, COMPLEX = -jnp.ones((2, 3)), -jnp.ones((2, 3), jnp.complex64)
SERIES = jnp.ones((B, T, 2))
STATES, STEP = jnp.ones((B, T, 3)), jnp.full(2, 0.1)
SYSTEM = dict(diagonal=COMPLEX, low_rank=COMPLEX[None], input_matrix=COMPLEX, output_matrix=COMPLEX, step=STEP)

# By operation: the function with its options, and its arrays.
CALLS = {
    "softmax.attention": (softmax.attention, ATTENTION),
    "strided.attention": (functools.partial(strided.attention, stride=2, window_size=1), ATTENTION),
    "strided.fixed": (functools.partial(strided.fixed, block_size=3, columns=np.array([[2]])), ATTENTION),
    "block_sparse.attention": (
        functools.partial(block_sparse.attention, blocks=np.array([[[0], [1]]]), block_size=3), ATTENTION,
    ),
    "linear.attention": (linear.attention, dict(ATTENTION, key_log_scale=jnp.zeros((B, T, N)))),
    "linear.gated": (linear.gated, dict(ATTENTION, log_decay=jnp.zeros((B, T, N)), beta=jnp.ones((B, T, N)))),
    "linear.random_feature_attention": (linear.random_feature_attention, dict(ATTENTION, projection=jnp.ones((5, H)))),
    "lsh.hash_buckets": (lsh.hash_buckets, dict(vectors=TOKENS, rotations=jnp.ones((N, H, 1, 2)))),
    "lsh.attention": (
        functools.partial(lsh.attention, buckets=BUCKETS, num_buckets=2, chunk_size=3), dict(query_key=TOKENS, value=TOKENS),
    ),
    "lsh.extend": (functools.partial(lsh.extend, query_buckets=BUCKETS, key_buckets=BUCKETS, start=0), ATTENTION),
    "relative.attention": (
        relative.attention,
        dict(ATTENTION, relative_key=TOKENS[0], content_bias=TOKENS[0, 0], position_bias=TOKENS[0, 0]),
    ),
    "gather.attention": (functools.partial(gather.attention, indices=jnp.zeros((1, 1, T, 3), jnp.int32)), ATTENTION),
    "entmax.attention": (entmax.attention, dict(ATTENTION, alpha=jnp.ones(N))),
    "entmax.entmax": (entmax.entmax, dict(logits=LOGITS, alpha=LOGITS[..., :1])),
    "convolve": (convolution.convolve, dict(inputs=SERIES, kernel=STEP[:, None], anticausal=STEP[:, None])),
    "convolution.depthwise": (
        functools.partial(convolution.depthwise, is_causal=True),
        dict(inputs=SERIES, kernel=jnp.ones((3, 2)), initial_state=SERIES[:, :2]),
    ),
    "scan.first_order": (scan.first_order, dict(decay=SERIES, inputs=SERIES, initial_state=SERIES[:, 0])),
    "matrix.pseudo_inverse": (matrix.pseudo_inverse, dict(matrix=LOGITS)),
    "matrix.sinkhorn": (matrix.sinkhorn, dict(logits=LOGITS)),
    "discretize": (ssm.discretize, dict(diagonal=COMPLEX, step=STEP)),
    "diagonal_kernel": (functools.partial(ssm.diagonal_kernel, length=4), dict(log_decay=COMPLEX, coefficients=COMPLEX)),
    "dplr_kernel": (functools.partial(ssm.dplr_kernel, length=4), SYSTEM),
    "diagonal_scan": (
        ssm.diagonal_scan,
        dict(inputs=SERIES, log_decay=REAL, input_matrix=REAL, output_matrix=REAL, initial_state=REAL[None]),
    ),
    "ssm.selective_scan": (
        ssm.selective_scan,
        dict(inputs=SERIES, step=SERIES, diagonal=REAL, input_matrix=STATES, output_matrix=STATES, initial_state=REAL[None]),
    ),
    "dplr_recurrence": (ssm.dplr_recurrence, dict(SYSTEM, inputs=SERIES)),
}  # fmt: skip
ARGUMENTS = [(name, argument) for name, (_, arrays) in CALLS.items() for argument in arrays]


def call(name, **changes):
    """What is computed, traced only."""
    function, arrays = CALLS[name]
    return jax.eval_shape(lambda: function(**{**arrays, **changes}))


@pytest.mark.parametrize("name", CALLS)
def test_what_is_changed_below_is_served(name):
    assert all(x.size for x in jax.tree.leaves(call(name)))


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_integers_are_refused(name, argument):
    """Computed with, they would cut the outputs to integers."""
    whole = jnp.ones(CALLS[name][1][argument].shape, jnp.int32)
    said = argument.replace("initial_state", "(initial_)?state")
    with pytest.raises(TypeError, match=rf"^{re.escape(name)}: {said} must be floating.*, got int32\. "):
        call(name, **{argument: whole})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_axis_of_nothing_is_refused(name, argument):
    array = CALLS[name][1][argument]
    for axis in range(array.ndim):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: \w+( and \w+)* must "):
            call(name, **{argument: jnp.take(array, jnp.arange(0), axis)})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CALLS)
def test_a_batch_or_a_sequence_of_nothing_is_refused(name, axis):
    """In all arrays alike."""
    cut = lambda x: jnp.take(x, jnp.arange(0), axis) if x.shape[:2] == (B, T) else x
    arrays = jax.tree.map(cut, CALLS[name][1])
    if any(not x.size for x in arrays.values()):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: \w+( and \w+)* must "):
            call(name, **arrays)


SCALES = jnp.ones(T * N)
OPTIONS = [
    ("linear.attention", dict(eps=-1.0), ValueError, "eps must be finite and at least 0, got -1.0"),
    ("linear.attention", dict(eps=float("nan")), ValueError, "eps must be finite"),
    ("linear.attention", dict(eps=jnp.ones(())), TypeError, "eps must be a number"),
    ("linear.attention", dict(segment_ids=jnp.zeros((B, T))), TypeError, "segment_ids must be integers, got float32"),
    ("linear.attention", dict(segment_ids=jnp.zeros((T,), int)), ValueError, "segment_ids must have shape"),
    ("linear.gated", dict(scale=SCALES), TypeError, "scale must be a number"),
    ("linear.gated", dict(key=jnp.ones((B, T, 3, H))), ValueError, "query must have a number of heads that divides"),
    ("linear.gated", dict(erase=SCALES), ValueError, "erase must hold r and e"),
    ("linear.gated", dict(erase=(SCALES, SCALES)), ValueError, "erase must be None beside beta"),
    ("linear.gated", dict(erase=(SCALES, SCALES), beta=None), ValueError, r"erase\[0\] must have shape"),
    ("linear.gated", dict(log_decay=jnp.zeros((B, T, N, 3))), ValueError, "log_decay must have shape"),
    ("linear.gated", dict(initial_state=jnp.zeros((B, N, H, 3))), ValueError, "initial_state must have shape"),
    ("linear.gated", dict(initial_state=jnp.zeros((B, N, H, H)), normalize=True), ValueError, "initial_state must hold S"),
    ("linear.gated", dict(initial_state=(SCALES, SCALES)), ValueError, "initial_state must hold .* S alone if not, got tuple"),
    ("lsh.attention", dict(scale=SCALES), ValueError, "scale must be a number or a scalar array, got shape"),
    ("lsh.attention", dict(scale="1"), TypeError, "scale must be"),
    ("lsh.extend", dict(scale=SCALES), ValueError, "scale must be a number or a scalar array, got shape"),
    ("gather.attention", dict(block_size=0), ValueError, "block_size must be an integer of at least 1, got 0"),
    ("gather.attention", dict(indices=jnp.zeros((1, 1, T, 0), int)), ValueError, "indices must have shape"),
    ("gather.attention", dict(indices=jnp.zeros((1, 3, T, 2), int)), ValueError, "indices must have shape"),
    ("gather.attention", dict(indices=jnp.zeros((1, 1, T, 2))), TypeError, "indices must be integers, got float32"),
    ("gather.attention", dict(mask=jnp.ones((1, 1, T, T), bool)), ValueError, "mask must be key padding"),
    ("gather.attention", dict(key_positions=jnp.zeros((1, T), int)), ValueError, "key_positions must be None where is_causal"),
    ("relative.attention", dict(scale=jnp.ones(H)), TypeError, "scale must be a number"),
    ("relative.attention", dict(scale="1"), TypeError, "scale must be a number"),
    ("matrix.sinkhorn", dict(iterations=2.5), ValueError, "iterations must be an integer of at least 1, got 2.5"),
    ("matrix.pseudo_inverse", dict(iterations=0), ValueError, "iterations must be an integer of at least 1, got 0"),
    ("diagonal_kernel", dict(length=4.5), ValueError, "length must be an integer of at least 1, got 4.5"),
    ("dplr_kernel", dict(length=4.5), ValueError, "length must be an integer of at least 1, got 4.5"),
    # Shapes that would be broadcast, or read as something else.
    ("discretize", dict(step=STEP[:1]), ValueError, "step must have shape"),
    ("discretize", dict(step=0.1), ValueError, "step must have shape"),
    ("discretize", dict(diagonal=COMPLEX[None]), ValueError, "diagonal must have shape"),
    ("diagonal_kernel", dict(log_decay=COMPLEX[None]), ValueError, "log_decay must have shape"),
    ("diagonal_scan", dict(input_matrix=REAL[None]), ValueError, "input_matrix must have shape"),
    ("diagonal_scan", dict(output_matrix=REAL[None]), ValueError, "output_matrix must have shape"),
    ("diagonal_scan", dict(output_matrix=COMPLEX), TypeError, "output_matrix must be real"),
    *(
        (name, change, ValueError, f"{next(iter(change))} must have shape")
        for name in ("dplr_kernel", "dplr_recurrence")
        for change in (
            dict(low_rank=COMPLEX), dict(low_rank=COMPLEX[None, None]), dict(input_matrix=COMPLEX[None]),
            dict(step=STEP[:1]), dict(step=0.1), dict(diagonal=COMPLEX[None]),
        )
    ),
    ("dplr_recurrence", dict(output_matrix=COMPLEX[None]), ValueError, "output_matrix must have shape"),
    ("dplr_recurrence", dict(diagonal=REAL), TypeError, "diagonal must be complex"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "says"), OPTIONS)
def test_options_are_checked(name, change, error, says):
    with pytest.raises(error, match=rf"^{re.escape(name)}: {says}"):
        call(name, **change)


def test_an_eps_that_is_traced_is_refused():
    with pytest.raises(TypeError, match="linear.attention: eps must be a number"):
        jax.eval_shape(lambda eps: linear.attention(**ATTENTION, eps=eps), 0.1)


def test_a_scale_may_be_traced():
    """Of LSH attention, where it is an array of one number."""
    assert jax.eval_shape(lambda scale: call("lsh.attention", scale=scale), 0.5).shape == TOKENS.shape


def test_shapes():
    """A letter is one size, sizes may be several, and None is no array."""
    checks.shape("op", "x", None, "B T", "Fix it.")
    checks.shape("op", "x", jnp.ones((2, 3, 3)), "B M M", "Fix it.", B=(1, 2))
    said = r"^op: x must have shape \[B, M, M\] = \[1 or 2, M, M\].*, got \(2, 3, 4\)\. Fix it\.$"
    with pytest.raises(ValueError, match=said):
        checks.shape("op", "x", jnp.ones((2, 3, 4)), "B M M", "Fix it.", B=(1, 2))
    for wrong in (jnp.ones(2), jnp.ones((2, 0)), jnp.ones((3, 1))):
        with pytest.raises(ValueError, match="^op: x must have shape"):
            checks.shape("op", "x", wrong, "B T", "Fix it.", B=2)


def test_lists():
    checks.lists("op", "x", np.array([[0, -1, -1]]), "N L", -1, 2, "Fix it.")
    for wrong, error, says in (
        (np.array([[0, 0]]), ValueError, "must list nothing twice"),
        (np.array([[3]]), ValueError, "must lie in -1 .. 2, got 3 .. 3"),
        (np.array([0]), ValueError, "must have shape"),
        (np.array([[0.0]]), TypeError, "must be a NumPy array of integers, got ndarray of float64"),
        (jnp.array([[0]]), TypeError, "must be a NumPy array of integers"),
    ):
        with pytest.raises(error, match=f"^op: x {says}"):
            checks.lists("op", "x", wrong, "N L", -1, 2, "Fix it.")
