"""The calls of `block_sparse.attention` that tests and benchmarks share."""

import functools

import jax.numpy as jnp
import numpy as np

from subquad.kernels import block_sparse
from subquad.kernels.softmax.specs import bench, draw, grid_draw
from subquad.kernels.specs import Spec, over_heads


def bigbird(length: int, block_size: int, heads: int) -> np.ndarray:
    """Lists of the first block, the own one and its neighbours, and three at random; the first block sees all."""
    rows = -(-length // block_size)
    rng = np.random.default_rng(rows)
    blocks = np.full((heads, rows, rows if rows < 8 else max(7, rows)), -1)
    for n, i in np.ndindex(heads, rows):
        near = {0, i - 1, i, i + 1} & set(range(rows))
        seen = set(range(rows)) if i == 0 else near | set(rng.permutation(rows)[:3].tolist())
        blocks[n, i, : len(seen)] = sorted(seen)
    return blocks


def local(length: int, block_size: int) -> np.ndarray:
    """Lists of the block before and the own one."""
    rows = -(-length // block_size)
    blocks = np.arange(rows)[:, None] + np.arange(-1, 1)
    return np.where(blocks >= 0, blocks, -1)[None]


def padded(length, dtype, rng):
    return draw(length, dtype, rng, heads=4, kv_heads=2) | dict(mask=jnp.asarray(rng.random((2, 1, 1, length)) < 0.8))


def attend_bigbird(arrays, implementation):
    """Blocks of 64 where there are heads of 64 features, as in the benchmarks; small ones in the tests."""
    _, length, heads, features = arrays["query"].shape
    size = 64 if features == 64 else 16
    return block_sparse.attention(
        **arrays, blocks=bigbird(length, size, heads), block_size=size, return_lse=True, implementation=implementation
    )


def attend_local(arrays, implementation):
    length, features = arrays["query"].shape[1], arrays["query"].shape[3]
    size = 128 if features == 64 else 24
    return block_sparse.attention(
        **arrays,
        blocks=local(length, size),
        block_size=size,
        is_causal=True,
        return_lse=True,
        implementation=implementation,
    )


SPECS = [
    Spec("block_sparse.attention", "bigbird", padded, attend_bigbird, make_bench=bench),
    Spec("block_sparse.attention", "local-causal", draw, attend_local, make_bench=bench),
]


def over(kind, make_blocks, size, more, **options):
    """A kind of call at every size of a head."""

    def attend(arrays, implementation):
        blocks = make_blocks(arrays["query"].shape[1], size)
        return block_sparse.attention(
            **arrays, blocks=blocks, block_size=size, return_lse=True, implementation=implementation, **options
        )

    make = functools.partial(grid_draw, **more)
    return over_heads("block_sparse.attention", kind, make, attend, most=128)


MASK = dict(mask=lambda length, dtype, rng: jnp.asarray(rng.random((2, 1, 1, length)) < 0.8))
GRID = [
    *over("mask-grouped-causal", functools.partial(bigbird, heads=4), 64, dict(kv_heads=2, **MASK), is_causal=True),
    *over("plain", functools.partial(bigbird, heads=4), 64, {}),
    *over("local-causal", local, 128, {}, is_causal=True),
]
