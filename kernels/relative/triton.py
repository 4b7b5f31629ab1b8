"""Relative attention is softmax attention with a bias by distance, on softmax's kernels.

The position scores of a strip of queries are one product, a row of the table of relative keys for each distance:

    by_distance[a, c] = position_a . table_c,      c = rows - 1 - a + s  for query a of the strip and key s

In memory the score of (a, s) is at a * (columns - 1) + rows - 1 + s. So the bias of a strip is its products, read in rows that
are shorter by one; and the gradient of the bias, written in such rows, is that of the products.

A strip is small beside the scores, so that memory is linear in the length; most calls have one. Backward, each strip's bias is
computed again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subquad.kernels import launch, precision
from subquad.kernels.flash.triton import LARGEST_HEAD
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to
from subquad.kernels.patterns import CAUSAL
from subquad.kernels.relative.reference import SAVED
from subquad.kernels.softmax import online
from subquad.kernels.softmax.plan import balance
from subquad.kernels.softmax.sets import Visible
from subquad.kernels.softmax.triton import Static, run_backward, run_forward

# Of the position scores of a strip, over all samples and heads: they should stay in the L2 cache between the product and the
# kernel. And the fewest queries of a strip, which keep a GPU busy.
STRIP_BYTES, FEWEST_ROWS = 1 << 25, 256


def attention(query, key, value, relative_key, content_bias, position_bias, visible: Visible, scale: float, *, mode):
    """Arguments as checked by `subquad.kernels.relative.attention`."""
    dtype = jnp.promote_types(query.dtype, value.dtype)
    launch.require_floats(dtype)
    launch.require_at_most(LARGEST_HEAD, max(query.shape[3], value.shape[3]), "features in a head")
    content, position = (((query.astype(jnp.float32) + x) * scale).astype(dtype) for x in (content_bias, position_bias))
    rest = (x.astype(dtype) for x in (key, value, relative_key[None, : key.shape[1]]))
    return attend(mode, content, position, *rest, visible).astype(value.dtype)


class Strips(NamedTuple):
    """How queries are cut: `count` strips of `rows`, the first query `offset` after the first key."""

    count: int
    rows: int
    offset: int
    queries: int
    keys: int

    @property
    def columns(self) -> int:
        """Of the products: all distances, and one more than a multiple of what softmax's kernels align rows to."""
        return -(-(self.offset + self.count * self.rows) // 8) * 8 + 1

    def cut(self, array, axis: int = 1, fill: float = 0):
        """[..., T, ...] -> [count, ..., rows, ...]."""
        if array is None:
            return None
        array = pad_to(array, axis, self.count * self.rows, constant_values=fill)
        return jnp.moveaxis(array.reshape(*array.shape[:axis], self.count, self.rows, *array.shape[axis + 1 :]), axis, 0)

    def join(self, strips, axis: int = 1):
        """The inverse of `cut`."""
        strips = jnp.moveaxis(strips, 0, axis)
        array = strips.reshape(*strips.shape[:axis], -1, *strips.shape[axis + 2 :])
        return jax.lax.slice_in_dim(array, 0, self.queries, axis=axis)

    def table(self, relative):
        """Relative keys [B|1, S, N, H] by falling distance, from the last query's largest on; 0 for what is no distance."""
        before = (self.count - 1) * self.rows  # columns that other strips are further on
        far = self.offset + self.count * self.rows - self.keys
        near = before + self.columns - far - self.keys
        return jnp.pad(jnp.flip(relative, axis=1), ((0, 0), (far, near), (0, 0), (0, 0)))

    def bias(self, i, table, position):
        """The position scores of strip i, float32 [B, N, rows, S], from its queries [B|1, rows, N, H]."""
        table = jax.lax.dynamic_slice_in_dim(table, (self.count - 1 - i) * self.rows, self.columns, axis=1)
        dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        if len(table) == 1:  # for all samples
            by_distance = dot("btnh,rnh->bntr", position, table[0])
        else:
            by_distance = dot("btnh,brnh->bntr", position, table)
        lead, width = by_distance.shape[:2], self.columns - 1
        flat = by_distance.reshape(*lead, -1)[..., self.rows - 1 : self.rows - 1 + self.rows * width]
        return flat.reshape(*lead, self.rows, width)[..., : self.keys]

    def sweep(self, step, carry, arrays):
        """`step(carry, i, arrays of strip i)` -> (carry, results), one strip after another: the carry, and all results."""
        if self.count == 1:  # no loop around a single step
            carry, results = step(carry, 0, jax.tree.map(lambda x: x[0], arrays))
            return carry, jax.tree.map(lambda x: x[None], results)
        return jax.lax.scan(lambda carry, xs: step(carry, *xs), carry, (jnp.arange(self.count, dtype=jnp.int32), arrays))

    def call(self, mode, i, visible: Visible) -> tuple[Static, Visible]:
        """What softmax's kernels are asked for strip i."""
        if self.count == 1:
            return Static(CAUSAL, self.offset, 0, 1.0, mode), visible
        positions = self.offset + i * self.rows + jnp.arange(self.rows, dtype=jnp.int32)[None]
        return Static(CAUSAL, None, 0, 1.0, mode), visible._replace(query_positions=positions)


def strips_of(batch: int, content, key) -> Strips:
    (_, queries, heads, _), keys = content.shape, key.shape[1]
    rows = max(FEWEST_ROWS, STRIP_BYTES // (4 * batch * heads * keys))
    rows = balance(queries, rows)
    return Strips(-(-queries // rows), rows, keys - queries, queries, keys)


def by_strip(strips: Strips, visible: Visible) -> tuple[Visible, Visible]:
    """What all strips share, and what each has of the rest."""
    mask, segments = visible.mask, visible.query_segment_ids
    own = mask is not None and mask.shape[2] > 1
    parts = Visible(None, None, strips.cut(segments), None, strips.cut(mask, 2) if own else None)
    return visible._replace(query_segment_ids=None, mask=None if own else mask), parts


def merged(shared: Visible, part: Visible) -> Visible:
    return Visible(*(one if other is None else other for one, other in zip(shared, part, strict=True)))


def batch_of(*arrays) -> int:
    return max(len(x) for x in jax.tree.leaves(arrays))


@precision.full
def forward(mode, content, position, key, value, relative, visible: Visible):
    strips = strips_of(batch_of(content, key, value, visible), content, key)
    table, (shared, parts) = strips.table(relative), by_strip(strips, visible)

    def step(_, i, arrays):
        content, position, part = arrays
        static, seen = strips.call(mode, i, merged(shared, part))
        return None, run_forward(static, content, key, value, strips.bias(i, table, position), seen)

    _, (out, lse) = strips.sweep(step, None, (strips.cut(content), strips.cut(position), parts))
    out, lse = strips.join(out), strips.join(lse, 2)
    return out, (content, position, key, value, relative, visible, out, lse)


@precision.full
def backward(mode, residuals, grad_out):
    content, position, key, value, relative, visible, out, lse = residuals
    batch = batch_of(residuals, grad_out)
    strips = strips_of(batch, content, key)
    sums, no_lse = (lse.swapaxes(1, 2),), jnp.zeros((), lse.dtype)
    lse, delta, *queries = online.backward_rows(out, sums, grad_out, no_lse, visible.is_masked, content, position)
    (table, pull_table), (shared, parts) = jax.vjp(strips.table, relative), by_strip(strips, visible)

    def step(sums, i, arrays):
        content, position, lse, delta, grad_out, part = arrays
        static, seen = strips.call(mode, i, merged(shared, part))
        bias, pull = jax.vjp(functools.partial(strips.bias, i), table, position)
        grad_content, *grads, grad_bias = run_backward(static, content, key, value, bias, lse, delta, grad_out, seen)
        grad_table, grad_position = pull(grad_bias.astype(bias.dtype))
        grads = *grads, grad_table
        if strips.count > 1:
            grads = tuple(x + y.astype(x.dtype) for x, y in zip(sums, grads, strict=True))
        return grads, (grad_content, grad_position)

    shapes = (batch, *key.shape[1:]), (batch, *value.shape[1:]), table.shape
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    rows = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    lse, delta = (strips.cut(x, 2, fill) for x, fill in zip(rows, (jnp.inf, 0), strict=True))
    arrays = *map(strips.cut, queries), lse, delta, strips.cut(grad_out), parts
    sums, grads = strips.sweep(step, zeros, arrays)
    grad_key, grad_value, grad_table = (x.astype(like.dtype) for x, like in zip(sums, (key, value, table), strict=True))
    return *map(strips.join, grads), grad_key, grad_value, *pull_table(grad_table), jax.tree.map(lambda _: None, visible)


attend = operation(
    forward,
    backward,
    arrays=("b t n h", "b t n h", "b s n h", "b s n v", "b r n h", Visible(None, None, "b t", "b s", "b n t s")),
    outputs="b t n v",
    saved=("b n t",),
    name=SAVED,
)
