"""`jax.vmap` over one operand alone, of one sample: an ensemble that shares all the rest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import block_sparse, linear, lsh, matrix, relative, scan, softmax, specs, ssm, strided

T, N, H, D, P = 20, 2, 16, 4, 3
HEADS, BLOCKS = (1, T, N, H), np.arange(4)[None, :, None]


def draw(rng, kind):
    """Numbers by shape, or by what else they are."""
    normal = lambda *shape: rng.normal(size=shape)
    complex_ = lambda *shape: normal(*shape) + 1j * normal(*shape)
    special = dict(
        mask=lambda: rng.random((1, 1, 1, T)) < 0.7,
        buckets=lambda: rng.integers(0, 3, (1, 2, T, N)),
        positive=lambda: rng.uniform(0.1, 1, HEADS),
        decay=lambda: rng.uniform(0.5, 1, (1, T, D)),
        constant=lambda: rng.uniform(0.5, 1, (1, 1, D)),
        modes=lambda: complex_(D, P) - 4,
        low_rank=lambda: complex_(1, D, P),
        system=lambda: complex_(D, P),
        rates=lambda: -rng.uniform(0.3, 3, (D, P)),
        step=lambda: rng.uniform(0.05, 0.1, D),
        matrix=lambda: 2 * np.eye(8) + 0.3 * normal(1, N, 8, 8),
    )
    values = special[kind]() if isinstance(kind, str) else normal(*kind)
    dtype = {"f": jnp.float32, "c": jnp.complex64, "i": jnp.int32, "b": jnp.bool_}[values.dtype.kind]
    return jnp.asarray(values, dtype)


def named(function, *names, **options):
    """A function of positional arrays, the last ones of which are keywords."""

    def call(implementation, *arrays):
        first = len(arrays) - len(names)
        keywords = dict(zip(names, arrays[first:], strict=True))
        return function(*arrays[:first], **keywords, **options, implementation=implementation)

    return call


OPERATIONS = {
    "softmax": (named(softmax.attention, "mask", "bias"), 3 * [HEADS] + ["mask", (1, N, T, T)]),
    "block_sparse": (named(block_sparse.attention, "mask", blocks=BLOCKS, block_size=5), 3 * [HEADS] + ["mask"]),
    "strided": (named(strided.attention, "mask", stride=4, window_size=3, is_causal=True), 3 * [HEADS] + ["mask"]),
    "fixed": (named(strided.fixed, "mask", block_size=5, columns=np.array([[4]])), 3 * [HEADS] + ["mask"]),
    "linear": (
        named(linear.attention, "mask", "key_log_scale", is_causal=True), ["positive", "positive", HEADS, "mask", (1, T, N)]
    ),
    "random_features": (
        named(linear.random_feature_attention, "mask", kernel="softmax"), 3 * [HEADS] + [(24, H), "mask"]
    ),
    "lsh": (named(lsh.attention, "mask", num_buckets=3, chunk_size=8), [HEADS, HEADS, "buckets", "mask"]),
    "extend": (named(lsh.extend, start=0), [HEADS, HEADS, HEADS, "buckets", "buckets"]),
    "relative": (
        named(relative.attention, "mask"), [*3 * [HEADS], (T, N, H), (N, H), (N, H), "mask"]
    ),
    "scan": (named(scan.first_order), ["decay", (1, T, D), (1, D)]),
    "scan-constant": (named(scan.first_order, reverse=True), ["constant", (1, T, D), (1, D)]),
    "diagonal_scan": (
        named(ssm.diagonal_scan, "initial_state", return_state=True), [(1, T, D), *3 * ["modes"], (1, D, 2 * P)]
    ),
    "dplr_recurrence": (
        named(ssm.dplr_recurrence, "state"), [(1, T, D), "modes", "low_rank", "system", "system", "step", (1, D, 2 * P)]
    ),
    "selective_scan": (
        named(ssm.selective_scan, "initial_state", return_state=True), [*2 * ["decay"], "rates", *2 * [(1, T, P)], (1, D, P)]
    ),
    "pseudo_inverse": (named(matrix.pseudo_inverse, iterations=2), ["matrix"]),
    "sinkhorn": (named(matrix.sinkhorn, iterations=2), ["matrix"]),
}  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize(("name", "which"), [(name, i) for name, (_, kinds) in OPERATIONS.items() for i in range(len(kinds))])
def test_one_operand_mapped(name, which):
    """Outputs and all gradients are those of one call after the other."""
    call, kinds = OPERATIONS[name]
    rng = np.random.default_rng(0)
    arrays = [draw(rng, kind) for kind in kinds]
    many = jnp.stack([arrays[which], draw(rng, kinds[which])])
    inexact = [i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def both(implementation, one):
        def outputs(*some):
            given = dict(enumerate([*arrays[:which], one, *arrays[which + 1 :]])) | dict(zip(inexact, some, strict=True))
            return call(implementation, *given.values())

        got, pull = jax.vjp(outputs, *(one if i == which else arrays[i] for i in inexact))
        return got, pull(jax.tree.map(jnp.ones_like, got))

    mapped = jax.jit(jax.vmap(functools.partial(both, "interpret")))(many)
    alone = jax.jit(functools.partial(both, "xla"))
    for place, one in enumerate(many):
        wants = alone(one)
        for leaf, got, want in zip(specs.names_of(wants), *map(jax.tree.leaves, (mapped, wants)), strict=True):
            assert specs.error(got[place], want, 1e-2) < 2e-4, leaf
