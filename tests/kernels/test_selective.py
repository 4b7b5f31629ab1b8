"""The selective scan: states step by step, chunks that end anywhere, memory, and the authors' code."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import dispatch, launch, specs, ssm, tuning
from subquad.kernels.selective import xla
from tests import oracle
from tests.zoo.test_contract import arrays_of

B, T, D, N = 2, 11, 3, 4
IDS = np.array([[0] * 3 + [1] * 8, [0] * 5 + [2] + [0] * 5])  # that change inside of chunks and tiles of 3 and 4
INTERPRETED = pytest.param("interpret", marks=pytest.mark.interpret)


def draw(length=T, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    step = np.exp(rng.uniform(-4, 1, (B, length, D))).astype(np.float32)
    diagonal = -np.exp(normal(D, N))
    return normal(B, length, D), step, diagonal, normal(B, length, N), normal(B, length, N), normal(B, D, N)


def outputs_and_gradients(arrays, **options):
    def loss(arrays):
        outputs, state = ssm.selective_scan(*arrays, return_state=True, **options)
        weights = jnp.arange(1.0, 1 + outputs.size).reshape(outputs.shape) / outputs.size
        return jnp.sum(weights * outputs) + jnp.sum(state**2), (outputs, state)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("implementation", ["xla", "reference", INTERPRETED])
def test_the_formula_step_by_step(implementation):
    u, step, a, into, out, state = (np.float64(x) for x in draw())
    expected, h = np.zeros((B, T, D)), state.copy()
    for b, t, d in np.ndindex(B, T, D):
        h[b, d] = np.exp(step[b, t, d] * a[d]) * h[b, d] + step[b, t, d] * u[b, t, d] * into[b, t]
        expected[b, t, d] = out[b, t] @ h[b, d]
    outputs, last = ssm.selective_scan(*draw(), return_state=True, implementation=implementation)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("walk", [xla.steps, xla.tree])
def test_chunks_end_anywhere(monkeypatch, walk):
    """With a ragged one in front, by steps and by the tree that accelerators take; segments begin inside of them."""
    want = outputs_and_gradients(draw(), segment_ids=IDS, implementation="reference")
    arrays = tuple(map(jnp.asarray, draw()))
    breaks = jnp.pad(IDS[:, 1:] != IDS[:, :-1], ((0, 0), (1, 0)))
    monkeypatch.setattr(ssm, "selective_scan", lambda *arrays, **_: xla.in_chunks((walk, 3, 3, 0), *arrays, breaks))
    got = outputs_and_gradients(arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("segments", "most", "tile", "groups", "parts"), [(True, 11, 4, 2, 1), (True, 6, 4, 1, 2), (False, 11, 2, 1, 3)]
)
def test_tiles_and_blocks_end_anywhere(monkeypatch, segments, most, tile, groups, parts):
    """Ragged tiles, blocks of features and groups of blocks, in one chunk and in two, in parts; 3 states in a block of 4."""
    from subquad.kernels.selective import triton

    u, step, a, into, out, state = draw()
    arrays = tuple(map(jnp.asarray, (u, step, a[:, :3], into[..., :3], out[..., :3], state[..., :3])))
    ids = dict(segment_ids=IDS if segments else None)
    want = outputs_and_gradients(arrays, implementation="reference", **ids)
    monkeypatch.setattr(triton, "MOST", most)
    blocks = dict(BLOCK_T=tile, BLOCK_D=2)
    monkeypatch.setattr(triton, "walk_config", lambda *sizes: tuning.Config(blocks))
    monkeypatch.setattr(triton, "gradients_config", lambda *sizes: tuning.Config(blocks | dict(GROUPS=groups)))
    monkeypatch.setattr(triton, "parts_of", lambda *sizes: parts)
    got = outputs_and_gradients(arrays, implementation="interpret", **ids)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


@pytest.mark.interpret
def test_what_the_kernels_decline():
    run = functools.partial(ssm.selective_scan, implementation="interpret")
    with pytest.raises(dispatch.Declined, match="there are 257 states in a feature, and the kernels hold at most 256"):
        run(*map(jnp.ones, ((1, 2, 1), (1, 2, 1), (1, 257), (1, 2, 257), (1, 2, 257))))
    with jax.enable_x64(True), pytest.raises(dispatch.Declined, match="float64, and"):
        run(*(jnp.asarray(x, jnp.float64) for x in draw()))


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED])
def test_a_step_of_nothing_holds_the_state(implementation):
    run = functools.partial(ssm.selective_scan, return_state=True, implementation=implementation)
    u, step, *rest = draw()
    last = run(u[:, :6], step[:, :6], rest[0], *(x[:, :6] for x in rest[1:3]), rest[3])[1]
    step[:, 6:] = 0
    np.testing.assert_allclose(run(u, step, *rest)[1], last, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", INTERPRETED])
def test_decays_of_0_and_1(implementation):
    """A step so long that a state is forgotten at once, beside steps of 0: nothing divides by a product of decays."""
    u, step, *rest = draw(70)
    step[:, ::2], step[:, 1::4] = 0, 1e4
    want = outputs_and_gradients((u, step, *rest), implementation="reference")
    got = outputs_and_gradients((u, step, *rest), implementation=implementation)
    for ours, theirs in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert specs.error(ours, theirs) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_states_are_never_all_in_memory(implementation):
    """Nothing is larger than the inputs: of these 16 states a token, one of every 8 tokens would be twice as large."""
    batch, length, features, states = 2, 1 << 16, 1536, 16
    shapes = [(batch, length, features)] * 2 + [(features, states)] + [(batch, length, states)] * 2
    loss = lambda *arrays: jnp.sum(ssm.selective_scan(*arrays, implementation=implementation) ** 2)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    with launch.recording() if implementation == "triton" else contextlib.nullcontext():
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(*arrays)
    largest = max(math.prod(aval.shape) for aval in arrays_of(jaxpr.jaxpr))
    assert largest <= batch * length * features


def test_oracle():
    """The authors' reference, the term D u and the gate of its layer around the scan."""
    peer = oracle.load("mamba_selective_scan")

    def run(inputs, w):
        u, delta, into, out, z = (inputs[name].swapaxes(1, 2) for name in ("u", "delta", "B", "C", "z"))
        step = jax.nn.softplus(delta + w["delta_bias"])
        outputs, state = ssm.selective_scan(u, step, w["A"], into, out, return_state=True, implementation="xla")
        return {"y": ((outputs + w["D"] * u) * jax.nn.silu(z)).swapaxes(1, 2), "last_state": state}

    oracle.compare(None, peer, run)
