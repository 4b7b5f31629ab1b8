"""LSH attention on the kernels of `subquad.kernels.flash`: rows are gathered by pointer inside the kernels.

A launch is one round. Its rows are the tokens in the order of bucket and position, PLACES looks up where each lies, and
results are written at the tokens' own positions, each by one program. Rounds run one after another: forward their results
are merged by their normalisers, backward their gradients are added up. So there is one float32 row per token whatever the
number of rounds.

A key counts in the first round in which it is in reach, rather than 1 / N_ij in each of N_ij rounds: the same sum.

`extend` has neither order nor chunks: its keys are all tokens before a query.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from subquad.kernels import launch, tuning
from subquad.kernels.flash import triton as flash
from subquad.kernels.flash.triton import LARGEST_HEAD, dense, padded
from subquad.kernels.lsh import xla
from subquad.kernels.lsh.reference import AXES
from subquad.kernels.operation import operation
from subquad.kernels.softmax import online

# Sums of three bfloat16 parts: the six products that float32 can tell apart, so that buckets are decided in float32.
HASH_PRECISION = "bf16x6"


# ------------------------------------------------------------------------------------------------------------- hashing


@triton.jit
def lsh_hash(
    vectors, rotations, num_rotations, words, buckets,
    ROTATIONS_STRIDE: tl.constexpr, HEADS: tl.constexpr, ROTATION_HEADS: tl.constexpr, FEATURES: tl.constexpr,
    ROUNDS: tl.constexpr, ALL_COLUMNS: tl.constexpr, FIRST_COLUMN: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_USED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """argmax([x R; -x R]) over COLUMNS columns, for a block of tokens of one head, in every round."""
    T = tl.load(words)
    blocks = tl.cdiv(T, BLOCK_T)
    block, group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    b, n = group // HEADS, group % HEADS
    token, feature = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    x_at = vectors + ((b * T + token)[:, None] * HEADS + n) * FEATURES + feature[None, :]
    x = tl.load(x_at, mask=(token < T)[:, None] & (feature < FEATURES)[None, :], other=0).to(tl.float32)
    if HAS_USED:
        used = tl.load(num_rotations + b * T + token, mask=token < T, other=COLUMNS)
    rotations += b * ROTATIONS_STRIDE + (n % ROTATION_HEADS) * FEATURES * ROUNDS * ALL_COLUMNS + FIRST_COLUMN
    for r in range(ROUNDS):
        best = tl.full([BLOCK_T], -1.0, tl.float32)
        name = tl.full([BLOCK_T], 2 * COLUMNS - 1, tl.int32)
        for start in range(0, COLUMNS, BLOCK_F):
            column = start + tl.arange(0, BLOCK_F)
            r_at = rotations + feature[:, None] * (ROUNDS * ALL_COLUMNS) + r * ALL_COLUMNS + column[None, :]
            rotation = tl.load(r_at, mask=(feature < FEATURES)[:, None] & (column < COLUMNS)[None, :], other=0)
            rotated = tl.dot(x, rotation, input_precision=PRECISION)
            if HAS_USED:
                rotated = tl.where(column[None, :] < used[:, None], rotated, 0.0)
            size = tl.where((column < COLUMNS)[None, :], tl.abs(rotated), -1.0)
            largest = tl.max(size, axis=1)
            side = tl.where(rotated >= 0, column[None, :], COLUMNS + column[None, :])
            nearest = tl.min(tl.where(size == largest[:, None], side, 2 * COLUMNS - 1), axis=1)
            # The first of equals, and a direction comes before all opposites.
            name = tl.where(largest > best, nearest, tl.where(largest == best, tl.minimum(name, nearest), name))
            best = tl.maximum(best, largest)
        tl.store(buckets + ((b * ROUNDS + r) * T + token) * HEADS + n, name, mask=token < T)


def hash_buckets(vectors, rotations, factors, num_rotations, *, mode):
    """See `lsh.hash_buckets`; `num_rotations` [B, T]."""
    check(vectors)
    return hash_all((factors, mode), vectors, rotations.astype(jnp.float32)[None], num_rotations)


def _hash(static, vectors, rotations, used):
    (factors, mode), (batch, length, heads, features) = static, vectors.shape
    _, rotation_heads, _, rounds, columns = rotations.shape
    bucket, unit, first = 0, 1, 0
    for factor in factors:
        config = hash_config(mode, length, features, factor // 2)
        constants = dict(
            ROTATIONS_STRIDE=0 if len(rotations) == 1 else math.prod(rotations.shape[1:]), HEADS=heads,
            ROTATION_HEADS=rotation_heads, FEATURES=features, ROUNDS=rounds, ALL_COLUMNS=columns, FIRST_COLUMN=first,
            COLUMNS=factor // 2, HAS_USED=used is not None, PRECISION=HASH_PRECISION if mode == "triton" else "ieee",
            BLOCK_H=padded(features),
        )  # fmt: skip
        (digit,) = launch.call(
            lsh_hash,
            dict(vectors=vectors, rotations=rotations, num_rotations=used, words=launch.words(length)),
            dict(buckets=jax.ShapeDtypeStruct((batch, rounds, length, heads), jnp.int32)),
            grid=batch * heads * triton.cdiv(length, config.blocks["BLOCK_T"]),
            constants=constants, config=config, mode=mode,
        )  # fmt: skip
        bucket += unit * digit
        unit, first = unit * factor, first + factor // 2
    return bucket, ()


hash_all = operation(
    _hash, lambda *_: (None,) * 3, arrays=("b t n h", "b n h r f", "b t"), outputs="b r t n", shared=[[1]]
)


def hash_config(mode, length, features, columns):
    if mode == "interpret":
        return tuning.Config(dict(BLOCK_T=padded(min(length, 256)), BLOCK_F=padded(min(columns, 64))))
    # The three parts of an operand live beside the operand itself.
    heuristic = tuning.Config(dict(BLOCK_T=64, BLOCK_F=padded(min(columns, 32))), num_warps=4, num_stages=1)
    return tuning.config("lsh.hash", heuristic, features=features, columns=columns)


# ---------------------------------------------------------------------------------------------- functions of the instances


class Options(NamedTuple):
    """What the functions below do."""

    HEADS: int
    ROUNDS: int
    ONCE: bool = False  # of extend: whether a key counts once, in however many rounds it is seen
    # Of attention, as in `reference.Layout`.
    CHUNK: int = 0
    BEFORE: int = 0
    AFTER: int = 0
    IS_CAUSAL: bool = True
    RING: bool = False
    HAS_SEGMENTS: bool = False
    # Of a kernel: what a block is that a program computes, and one that it visits.
    OWN: int = 0
    OTHER: int = 0
    TRANSPOSED: bool = False


@triton.jit
def block_after(first, i, PARTIAL: tl.constexpr, operands, OPTIONS: tl.constexpr):
    """BLOCK of work that is one range."""
    return first + i


@triton.jit
def work_in_reach(rank, b, n, operands, OPTIONS: tl.constexpr):
    """WORK: the blocks from BEFORE chunks below the row's first chunk to AFTER chunks above its last."""
    BELOW: tl.constexpr = (OPTIONS.AFTER if OPTIONS.TRANSPOSED else OPTIONS.BEFORE) + OPTIONS.HAS_SEGMENTS
    ABOVE: tl.constexpr = (OPTIONS.BEFORE if OPTIONS.TRANSPOSED else OPTIONS.AFTER) + OPTIONS.HAS_SEGMENTS
    start = rank * OPTIONS.OWN
    first = (start // OPTIONS.CHUNK - BELOW) * OPTIONS.CHUNK
    last = ((tl.minimum(start + OPTIONS.OWN, operands.T) - 1) // OPTIONS.CHUNK + ABOVE + 1) * OPTIONS.CHUNK
    if OPTIONS.RING:  # from a multiple of OTHER below, so that no number is negative
        below = tl.cdiv(BELOW * OPTIONS.CHUNK, OPTIONS.OTHER)
        first = (first + below * OPTIONS.OTHER) // OPTIONS.OTHER - below
    else:
        first, last = tl.maximum(first, 0) // OPTIONS.OTHER, tl.minimum(last, operands.T)
    return rank, tl.cdiv(last, OPTIONS.OTHER) - first, 0, first


@triton.jit
def token_at(index, b, n, operands, OTHER_ROUNDS: tl.constexpr, OPTIONS: tl.constexpr):
    """The positions of the tokens at these indices of the round, and which exist.

    OTHER_ROUNDS: in a ring those below 0 and past the last chunk belong to the rounds before and after.
    """
    T = operands.T
    order = operands.order + (b * OPTIONS.HEADS + n) * OPTIONS.ROUNDS * T
    if OTHER_ROUNDS:
        length = tl.cdiv(T, OPTIONS.CHUNK) * OPTIONS.CHUNK
        place = (index + operands.round * length) % (OPTIONS.ROUNDS * length)
        place = (place + OPTIONS.ROUNDS * length) % (OPTIONS.ROUNDS * length)
        exists = place % length < T
        at = place // length * T + place % length
    else:
        exists = index < T
        at = index
        order += operands.round.to(tl.int64) * T
    return tl.load(order + at, mask=exists, other=0), exists


@triton.jit
def query_places(start, LENGTH, SIZE: tl.constexpr, b, n, operands, OPTIONS: tl.constexpr):
    """PLACES: where the tokens of a round lie."""
    OTHERS: tl.constexpr = OPTIONS.RING and OPTIONS.TRANSPOSED
    token, exists = token_at(start + tl.arange(0, SIZE), b, n, operands, OTHERS, OPTIONS)
    return 0, token.to(tl.int64), exists


@triton.jit
def key_places(start, LENGTH, SIZE: tl.constexpr, b, n, operands, OPTIONS: tl.constexpr):
    OTHERS: tl.constexpr = OPTIONS.RING and not OPTIONS.TRANSPOSED
    token, exists = token_at(start + tl.arange(0, SIZE), b, n, operands, OTHERS, OPTIONS)
    return 0, token.to(tl.int64), exists


@triton.jit
def plain_logits(products, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    return products


@triton.jit
def in_reach(codes, query, key, OPTIONS: tl.constexpr):
    """Whether keys at some positions are in reach of queries at others in the round of these codes."""
    distance = tl.load(codes + key * OPTIONS.ROUNDS) - tl.load(codes + query * OPTIONS.ROUNDS)
    return (distance >= -OPTIONS.BEFORE) & (distance <= OPTIONS.AFTER)


@triton.jit
def visible_in_reach(b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """VISIBLE: what is in reach in this round, and was in none before that counts."""
    query, _ = token_at(q, b, n, operands, OPTIONS.RING and OPTIONS.TRANSPOSED, OPTIONS)
    key, key_exists = token_at(k, b, n, operands, OPTIONS.RING and not OPTIONS.TRANSPOSED, OPTIONS)
    if OPTIONS.IS_CAUSAL:
        result = key_exists & (key < query)
    else:
        result = key_exists & (key != query)
    codes = operands.codes + (b * OPTIONS.HEADS + n) * operands.T * OPTIONS.ROUNDS
    result = result & in_reach(codes + operands.round, query, key, OPTIONS)
    for earlier in range(operands.since, operands.round):
        result = result & (in_reach(codes + earlier, query, key, OPTIONS) == 0)
    if OPTIONS.RING:
        # Chunks from which on no index is negative.
        LOW: tl.constexpr = (OPTIONS.BEFORE + OPTIONS.AFTER + OPTIONS.OTHER // OPTIONS.CHUNK + 1) * OPTIONS.CHUNK
        distance = (k + LOW) // OPTIONS.CHUNK - (q + LOW) // OPTIONS.CHUNK
        result = result & (distance >= -OPTIONS.BEFORE) & (distance <= OPTIONS.AFTER)
    return result


@triton.jit
def work_before(rank, b, n, operands, OPTIONS: tl.constexpr):
    """WORK of extend: the keys before a row's last query, or the queries after its first key."""
    begin = tl.load(operands.starts + b)
    start = rank * OPTIONS.OWN
    if OPTIONS.TRANSPOSED:
        first = tl.maximum(start + 1 - begin, 0) // OPTIONS.OTHER
        last = operands.T
    else:
        first = 0
        last = tl.minimum(begin + tl.minimum(start + OPTIONS.OWN, operands.T) - 1, operands.S)
    return rank, tl.cdiv(last, OPTIONS.OTHER) - first, 0, first


@triton.jit
def shared_logits(products, b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """LOGITS of extend: scale products + log(rounds in which both are in one bucket, 1 at most where keys count ONCE)."""
    T, S = operands.T, operands.S
    count = products * 0.0
    for r in range(OPTIONS.ROUNDS):
        first = b * OPTIONS.ROUNDS + r
        ours = tl.load(operands.codes + (first * T + q) * OPTIONS.HEADS + n, mask=q < T, other=-2)
        theirs = tl.load(operands.key_buckets + (first * S + k) * OPTIONS.HEADS + n, mask=k < S, other=-1)
        same = tl.where(ours == theirs, 1.0, 0.0)
        count = tl.maximum(count, same) if OPTIONS.ONCE else count + same
    return tl.where(count > 0, products * SHAPE.SCALE + tl.log(tl.maximum(count, 1.0)), float("-inf"))


@triton.jit
def visible_before(b, n, query_start, q, k, operands, SHAPE: tl.constexpr, OPTIONS: tl.constexpr):
    """VISIBLE of extend."""
    return (k < operands.S) & (k < tl.load(operands.starts + b) + q)


SORTED = flash.Functions(work_in_reach, block_after, query_places, key_places, plain_logits, visible_in_reach)
CACHED = flash.Functions(work_before, block_after, dense, dense, shared_logits, visible_before)


def run(functions, options: Options, scale, mode, arrays: dict, kernel, outputs: dict, round_=0, since=0, **more):
    """Launches a kernel. `arrays` and `more`: its pointers by name; `outputs`: shape and dtype of its results."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    (batch, queries, heads, features), keys, values = query.shape, key.shape[1], value.shape[-1]
    dtype, widths = jnp.promote_types(query.dtype, value.dtype), (padded(features), padded(values))
    name, cached = kernel.__name__.removeprefix("flash_"), functions is CACHED
    config = config_of(name, cached, mode, dtype, max(widths), options.CHUNK, queries, keys)
    sizes, lengths = (config.blocks["BLOCK_Q"], config.blocks["BLOCK_K"]), (queries, keys)
    transposed = name == "backward_key"
    rows = triton.cdiv(lengths[transposed], sizes[transposed])
    shape = flash.Shape(
        heads, heads, features, values, *widths, scale, 1.0, launch.dot_precision(dtype), False, False,
        False, False,
    )  # fmt: skip
    return flash.run(
        kernel,
        arrays | more,
        {name: jax.ShapeDtypeStruct(*like) for name, like in outputs.items()},
        words=(queries, keys, rows, rows, 0, 0, since, round_),
        grid=batch * heads * rows,
        functions=functions,
        shape=shape,
        options=options._replace(OWN=sizes[transposed], OTHER=sizes[not transposed], TRANSPOSED=transposed),
        config=config,
        mode=mode,
    )


# ----------------------------------------------------------------------------------------------------------- attention


def attention(layout, query_key, value, buckets, mask, segment_ids, scale, *, mode):
    """See `lsh.attention`."""
    check(query_key, value)
    layout, gain, buckets = xla.prepare(layout, query_key, buckets, mask, scale)
    return attend((layout, mode), query_key, gain.astype(jnp.float32), value, buckets, segment_ids)


def _rounds(static, query, gain, value, order, codes):
    """(kernel, outputs, r=round, **arrays) -> its results."""
    layout, mode = static
    options = Options(
        query.shape[2], order.shape[2], False, layout.chunk_size, layout.before, layout.after, layout.is_causal,
        layout.reach == "ring", layout.has_segments,
    )  # fmt: skip
    key = (query * gain[..., None]).astype(query.dtype)
    arrays = dict(query=query, key=key, value=value, order=order, codes=codes)
    call = functools.partial(run, SORTED, options, 1.0, mode, arrays)
    return lambda *words, r, **more: call(*words, r, 0 if layout.correct_duplicates else r, **more)


def _forward(static, query, gain, value, buckets, segment_ids):
    order, codes = xla.sort(static[0], buckets, segment_ids)
    codes = xla.at_their_places(order, codes)
    call = _rounds(static, query, gain, value, order, codes)
    batch, length, heads, _ = value.shape
    outputs = dict(out=(value.shape, jnp.float32), lse=((batch, heads, length), jnp.float32))
    start = jnp.zeros(value.shape, jnp.float32), jnp.full(gain.shape, -jnp.inf, jnp.float32), jnp.zeros(gain.shape, jnp.float32)

    def step(sums, r):
        out, lse = call(flash.flash_forward, outputs, r=r)
        return online.merge(*zip(sums, (out, lse.swapaxes(1, 2), start[2]), strict=True)), None

    (out, *sums), _ = jax.lax.scan(step, start, jnp.arange(order.shape[2], dtype=jnp.int32))
    lse = sum(sums)
    out = jnp.where(jnp.isneginf(lse)[..., None], value, out.astype(value.dtype))
    return out, (query, gain, value, order, codes, out, lse)


def _backward(static, saved, grad_out):
    query, gain, value, order, codes, out, lse = saved
    call = _rounds(static, query, gain, value, order, codes)
    alone = jnp.isneginf(lse)[..., None]
    lse, delta = (x.swapaxes(1, 2) for x in online.backward_rows(out, (lse,), grad_out, 0, False))
    arrays = dict(lse=lse, delta=delta, grad_out=grad_out)
    shapes = [(x.shape, jnp.float32) for x in (query, query, value)]

    def step(sums, r):
        grad_query, _ = call(flash.flash_backward_query, dict(grad_query=shapes[0]), r=r, **arrays)
        grad_key_value = call(flash.flash_backward_key, dict(grad_key=shapes[1], grad_value=shapes[2]), r=r, **arrays)
        return tuple(x + y for x, y in zip(sums, (grad_query, *grad_key_value), strict=True)), None

    start = tuple(jnp.zeros(*shape) for shape in shapes)
    (grad_query, grad_key, grad_value), _ = jax.lax.scan(step, start, jnp.arange(order.shape[2], dtype=jnp.int32))
    grad_query += gain[..., None] * grad_key
    grad_value += jnp.where(alone, grad_out, 0)
    return grad_query.astype(query.dtype), (grad_key * query).sum(-1), grad_value.astype(value.dtype), None, None


attend = operation(
    _forward,
    _backward,
    **AXES,
    saved=("b n r t", "b n t r", "b t n"),
)


# -------------------------------------------------------------------------------------------------------------- extend


def extend(query, key, value, query_buckets, key_buckets, start, mask, scale, correct_duplicates, *, mode):
    """See `lsh.extend`."""
    check(query, key, value)
    if isinstance(scale, jax.core.Tracer):
        raise launch.Declined("scale must be known while tracing.")
    if not query.dtype == key.dtype == value.dtype:
        raise launch.Declined("query, key and value must have one dtype.")
    batch, length = query.shape[:2]
    own = jnp.broadcast_to(jnp.reshape(start, (-1, 1)), (batch, 1)).astype(jnp.int32) + jnp.arange(length, dtype=jnp.int32)
    if mask is not None:  # what is no token is in a bucket of its own
        real = jnp.broadcast_to(mask[:, 0, 0], (batch, key.shape[1]))
        key_buckets = jnp.where(real[:, None, :, None], key_buckets, -1)
        real = jnp.take_along_axis(real, own, axis=1, mode="clip")
        query_buckets = jnp.where(real[:, None, :, None], query_buckets, -2)
    static = float(scale), bool(correct_duplicates), mode
    out, lse = attend_cache(static, query, key, value, query_buckets, key_buckets, own[:, 0])
    own_value = jnp.take_along_axis(value, own[..., None, None], axis=1, mode="clip")
    return jnp.where(jnp.isneginf(lse)[..., None], own_value, out)


def _cached(static, query, key, value, query_buckets, key_buckets, starts):
    scale, once, mode = static
    options = Options(query.shape[2], query_buckets.shape[1], once)
    arrays = dict(query=query, key=key, value=value, codes=query_buckets, key_buckets=key_buckets, starts=starts)
    return functools.partial(run, CACHED, options, scale, mode, arrays)


def _extend_forward(static, *arrays):
    (batch, length, heads, _), value = arrays[0].shape, arrays[2]
    shape = batch, heads, length
    outputs = dict(out=((batch, length, heads, value.shape[3]), value.dtype), lse=(shape, jnp.float32))
    out, lse = _cached(static, *arrays)(flash.flash_forward, outputs)
    lse = lse.swapaxes(1, 2)
    return (out, lse), (*arrays, out, lse)


def _extend_backward(static, saved, cotangents):
    *arrays, out, lse = saved
    lse, delta = (x.swapaxes(1, 2) for x in online.backward_rows(out, (lse,), *cotangents, False))
    call = functools.partial(_cached(static, *arrays), lse=lse, delta=delta, grad_out=cotangents[0])
    query, key, value = ((x.shape, x.dtype) for x in arrays[:3])
    grad_query, _ = call(flash.flash_backward_query, dict(grad_query=query))
    return grad_query, *call(flash.flash_backward_key, dict(grad_key=key, grad_value=value)), None, None, None


attend_cache = operation(
    _extend_forward,
    _extend_backward,
    arrays=("b t n h", "b s n h", "b s n v", "b r t n", "b r s n", "b"),
    outputs=("b t n v", "b t n"),
    shared=(),
)


# --------------------------------------------------------------------------------------------------- checks and sizes


def check(*arrays):
    for array in arrays:
        launch.require_floats(array.dtype)
        launch.require_at_most(LARGEST_HEAD, array.shape[-1], "features in a head")


def config_of(name, cached: bool, mode, dtype, features: int, chunk_size: int, queries: int, keys: int) -> tuning.Config:
    """The configuration of a kernel: the largest blocks with which it spills no registers on Hopper."""
    if mode == "interpret":
        return tuning.Config(dict(BLOCK_Q=padded(min(queries, 128)), BLOCK_K=padded(min(keys, 128))))
    query, key, warps = TILES[name][2 * (dtype == jnp.float32) + (features > 64)]
    if cached:
        query = min(query, padded(queries))
    heuristic = tuning.Config(dict(BLOCK_Q=query, BLOCK_K=key), warps, num_stages=1)
    sizes = dict(features=features, bits=8 * jnp.dtype(dtype).itemsize) | ({} if cached else dict(chunk_size=chunk_size))
    return tuning.config(f"lsh.extend.{name}" if cached else f"lsh.{name}", heuristic, **sizes)


# BLOCK_Q, BLOCK_K and warps, for 16 bits and for float32; each time of heads of up to 64 features, and of more.
TILES = dict(
    forward=((64, 64, 8), (64, 64, 8), (16, 32, 8), (16, 32, 8)),
    backward_query=((64, 32, 8), (64, 32, 8), (16, 32, 8), (16, 16, 8)),
    backward_key=((32, 64, 8), (32, 32, 4), (16, 16, 4), (16, 16, 8)),
)
