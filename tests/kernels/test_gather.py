"""Attention to listed keys against one query at a time in float64, sums in a fixed order, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import gather, softmax
from subquad.kernels.gather import xla

B, T, S, N, K, H = 2, 11, 13, 4, 2, 8


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lists(heads, blocks, most, keys=S):
    return np.random.default_rng(4).integers(-1, keys + 1, (B, heads, blocks, most)).astype(np.int32)


def one_by_one(query, key, value, indices, block_size, is_causal, once):
    """(out, lse) by the definition."""
    out, lse = np.zeros((*query.shape[:3], value.shape[3])), np.full(query.shape[:3], -np.inf)
    groups, per_list = query.shape[2] // key.shape[2], query.shape[2] // indices.shape[1]
    for b, t, n in np.ndindex(query.shape[:3]):
        listed = [s for s in indices[b, n // per_list, t // block_size] if 0 <= s < key.shape[1] and (not is_causal or s <= t)]
        listed = sorted(set(listed)) if once else listed
        if listed:
            logits = key[b, listed, n // groups].astype(float) @ query[b, t, n].astype(float) / np.sqrt(query.shape[3])
            lse[b, t, n] = np.log(np.exp(logits).sum())
            out[b, t, n] = np.exp(logits - lse[b, t, n]) @ value[b, listed, n // groups].astype(float)
    return out, lse


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("heads", "block_size"), [(N, 1), (K, 1), (1, 3), (N, 4)])
def test_against_one_query_at_a_time(heads, block_size, implementation):
    """Lists with repetitions and without, in which most numbers of some rows are no key."""
    arrays = random(B, T, N, H), random(B, S, K, H, seed=1), random(B, S, K, 5, seed=2)
    indices = lists(heads, -(-T // block_size), 6)
    indices[1, 0, 0] = [-1, S, -7, 2**31 - 1, -(2**31), -1]
    for once in (True, False):
        run = functools.partial(
            gather.attention, indices=indices, block_size=block_size, is_causal=once, correct_duplicates=once, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        for got, want in zip(jax.jit(run)(*arrays), one_by_one(*arrays, indices, block_size, once, once), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_list_of_all_keys_is_softmax_and_lists_merge():
    arrays = random(B, T, N, H), random(B, T, K, H, seed=1), random(B, T, K, H, seed=2)
    everything = np.random.default_rng(0).permuted(np.broadcast_to(np.arange(T), (1, 1, T, T)), axis=-1)
    run = functools.partial(gather.attention, is_causal=True, return_lse=True)
    want = softmax.attention(*arrays, is_causal=True, return_lse=True)
    halves = [run(*arrays, everything[..., part]) for part in (slice(0, 4), slice(4, T))]
    for whole in (run(*arrays, everything), softmax.merge(*zip(*halves, strict=True))):
        for got, expected in zip(whole, want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_positions_decide_what_is_past():
    """New tokens after a cache see what they would see in the whole."""
    q, k, v = random(B, S, N, H), random(B, S, K, H, seed=1), random(B, S, K, H, seed=2)
    indices = lists(N, S, 6)
    whole = gather.attention(q, k, v, indices, is_causal=True)
    last = gather.attention(
        q[:, 9:], k, v, indices[:, :, 9:], is_causal=True, query_positions=np.arange(9, S)[None] + 70,
        key_positions=np.arange(S)[None] + 70,
    )  # fmt: skip
    np.testing.assert_allclose(last, whole[:, 9:], rtol=1e-6, atol=1e-6)


def test_what_is_in_no_list_is_not_read():
    q, k, v = random(B, T, N, H), random(B, S, N, H, seed=1), random(B, S, N, H, seed=2)
    k[:, 4] = v[:, 4] = np.nan
    indices = lists(N, T, 6)
    indices[indices == 4] = 5
    out, pull = jax.vjp(lambda *x: gather.attention(*x, indices), q, k, v)
    assert all(np.isfinite(x).all() for x in (out, *pull(jnp.ones_like(out))))


def gradients(*arrays, block_size=1, **options):
    out, pull = jax.vjp(lambda *x: gather.attention(*x, block_size=block_size, **options), *arrays)
    return pull(out)


@pytest.mark.parametrize("block_size", [1, 4])
def test_steps_and_sorted_sums_change_nothing(block_size, monkeypatch):
    """An accelerator sorts what it adds."""
    arrays = random(B, T, N, H), random(B, S, K, H, seed=1), random(B, S, K, H, seed=2)
    run = functools.partial(gradients, *arrays, indices=lists(N, -(-T // block_size), 9), block_size=block_size)
    want = run(implementation="reference")
    for most in (1, 3000):
        monkeypatch.setattr(xla, "CPU_BYTES", most)
        for got, expected in zip(run(), want, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for got, expected in zip(run(implementation="xla"), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_sorted_sums_add_every_row_once():
    places = jnp.asarray([[3, 0, 3, 9], [9, 3, 1, 0]])  # 9 is nobody's
    additions = [jnp.asarray(random(2, 4, width)) for width in (5, 2)]
    totals = tuple(jnp.asarray(random(7, width, seed=1)) for width in (5, 2))
    run = jax.jit(xla.add_rows, static_argnums=0)
    assert run.lower(True, totals, places, additions).as_text().count("unique_indices = true") >= 2
    for got, want in zip(*(run(by, totals, places, additions) for by in (True, False)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_tokens(dtype):
    """Keys and values of all lists would be L times those of the tokens."""
    length, most, heads = 2048, 64, 2
    tokens = jax.ShapeDtypeStruct((1, length, heads, 32), dtype)
    indices = jax.ShapeDtypeStruct((1, heads, length, most), "int32")
    run = lambda q, k, v, i: jax.grad(lambda *x: gather.attention(*x, i).sum(), (0, 1, 2))(q, k, v)
    of_tokens, of_lists = 4 * length * heads * 32, 4 * heads * length * most
    temporary = jax.jit(run).lower(tokens, tokens, tokens, indices).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 12 * of_tokens + 3 * of_lists + (4 << 20)


@pytest.mark.parametrize("of", ["query", "key", "cotangent"])
def test_lists_that_all_samples_share_may_be_mapped(of):
    """Of one sample, whose batch of 1 could stand for more: outputs and gradients are those of each alone."""
    indices = jnp.asarray(lists(1, 4, 6)[:1])
    arrays = dict(query=random(1, T, N, H), key=random(1, S, K, H, seed=1), cotangent=random(1, T, N, H, seed=2))
    arrays[of] = random(3, *arrays[of].shape, seed=3)

    def run(query, key, cotangent):
        attend = lambda query, key: gather.attention(query, key, key, indices, block_size=3)
        out, pull = jax.vjp(attend, query, key)
        return out, pull(cotangent)

    mapped = jax.jit(jax.vmap(run, [0 if name == of else None for name in arrays]))(*arrays.values())
    for i in range(3):
        alone = jax.jit(run)(*(x[i] if name == of else x for name, x in arrays.items()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), mapped, alone)  # noqa: B023
