"""Named calls of LSH attention."""

import functools

import jax.numpy as jnp
import numpy as np

from subquad.kernels import lsh
from subquad.kernels.specs import LENGTHS, Spec, over_heads

# A token alone sees itself, whatever the query: a gradient of 0, of which no error is a fraction.
SEVERAL = LENGTHS[1:]
CHUNK, ROUNDS = 64, 4


def make(length, dtype, rng, *, batch=1, heads=2, rounds=3, buckets=4, masked=False, segmented=False):
    """A shared query and key, values, and buckets that are no function of them: a hash would depend on rounding."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    arrays = dict(
        query_key=normal(batch, length, heads, 20),
        value=normal(batch, length, heads, 24),
        buckets=jnp.asarray(rng.integers(0, buckets, (batch, rounds, length, heads)), jnp.int32),
    )
    if masked:
        mask = rng.uniform(size=(batch, 1, 1, length)) < 0.7
        arrays["mask"] = jnp.asarray(mask)
    if segmented:
        arrays["segment_ids"] = jnp.asarray(rng.integers(0, 3, (batch, length)), jnp.int32)
    return arrays


def make_bench(length, dtype, rng):
    """Buckets of vectors that are hashed: half a chunk in each, on average."""
    arrays = make_hashed_bench(length, dtype, rng)
    buckets = lsh.hash_buckets(arrays["query_key"], arrays.pop("rotations"), implementation="xla")
    return arrays | dict(buckets=buckets)


def _columns(length):
    return int(np.clip(length // CHUNK, 1, 64))


def call(arrays, implementation, *, num_buckets=4, **options):
    return lsh.attention(**arrays, num_buckets=num_buckets, implementation=implementation, **options)


def call_bench(arrays, implementation, *, chunk_size, **options):
    """With the sizes of a layer where the arrays are those of `make_bench`."""
    length, features = arrays["query_key"].shape[1::2]
    sizes = dict(chunk_size=CHUNK, num_buckets=2 * _columns(length)) if features == 64 else dict(chunk_size=chunk_size)
    return call(arrays, implementation, **sizes, **options)


def make_hashed(length, dtype, rng):
    """Vectors whose components differ enough in size, and rotations that pick some: no rounding changes a bucket."""
    sizes = rng.permuted(np.broadcast_to(np.arange(1, 21) / 8, (2, length, 1, 20)), axis=-1)
    axes = np.stack([rng.permutation(20)[:6] for _ in range(2)])
    return dict(
        query_key=jnp.asarray(sizes * rng.choice([-1, 1], sizes.shape), dtype),
        value=jnp.asarray(rng.normal(size=(2, length, 1, 24)), dtype),
        rotations=jnp.asarray(np.moveaxis(np.eye(20)[axes], -1, 0)[None], jnp.float32),
    )


def make_hashed_bench(length, dtype, rng):
    query_key, value = (jnp.asarray(rng.normal(size=(1, length, 4, 64)), dtype) for _ in range(2))
    rotations = jnp.asarray(rng.normal(size=(4, 64, ROUNDS, _columns(length))), jnp.float32)
    return dict(query_key=query_key, value=value, rotations=rotations)


def call_hashed(arrays, implementation):
    query_key, columns = arrays["query_key"], arrays["rotations"].shape[-1]
    buckets = lsh.hash_buckets(query_key, arrays["rotations"], implementation=implementation)
    return lsh.attention(
        query_key, arrays["value"], buckets, num_buckets=2 * columns, chunk_size=16 if columns == 6 else CHUNK,
        implementation=implementation,
    )  # fmt: skip


def make_extend(length, dtype, rng):
    """The second half of a cache, whose end is empty, is new."""
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    new, room = (length + 1) // 2, length + 5
    buckets = jnp.asarray(rng.integers(0, 3, (2, 2, room, 2)), jnp.int32)
    return dict(
        query=normal(2, new, 2, 20),
        key=normal(2, room, 2, 20),
        value=normal(2, room, 2, 24),
        query_buckets=buckets[:, :, length - new : length],
        key_buckets=buckets,
        start=jnp.int32(length - new),
        mask=jnp.asarray(np.arange(room) < length)[None, None, None],
    )


def call_extend(arrays, implementation, *, correct_duplicates):
    return lsh.extend(**arrays, correct_duplicates=correct_duplicates, implementation=implementation)


def spec(variant, make=make, lengths=SEVERAL, make_bench=None, **options):
    benches = {} if make_bench else dict(bench_lengths=())
    run = functools.partial(call_bench if make_bench else call, **options)
    return Spec("lsh.attention", variant, make, run, make_bench, lengths, **benches)


def spec_extend(variant, lengths, correct_duplicates):
    run = functools.partial(call_extend, correct_duplicates=correct_duplicates)
    return Spec("lsh.extend", variant, make_extend, run, lengths=lengths, bench_lengths=())


def one_head(*args, **options):
    return make(*args, batch=2, heads=1, masked=True, **options)


SPECS = [
    spec("full", make_bench=make_bench, chunk_size=16),
    spec("causal", make_bench=make_bench, chunk_size=16, is_causal=True),
    spec("masked", one_head, (63, 129), chunk_size=7, chunks_after=1),
    spec("segments", functools.partial(one_head, segmented=True), (63, 129), chunk_size=7, chunks_after=1),
    spec("chunk", lengths=(63, 129), chunk_size=32, reach="chunk"),
    spec("ring", lengths=(63, 129), chunk_size=24, reach="ring", correct_duplicates=False),
    Spec("lsh.attention", "hashed", make_hashed, call_hashed, make_hashed_bench, (63, 129), bench_lengths=()),
    spec_extend("once", (7, 63, 129), True),
    spec_extend("counted", (63,), False),
]


def over(kind, masked=False, segmented=False, **options):
    """A kind of call at every size of a head."""

    def draw(head, length, dtype, rng):
        arrays = make(length, dtype, rng, batch=2, masked=masked, segmented=segmented)
        wide = lambda: jnp.asarray(rng.normal(size=(2, length, 2, head)), dtype)
        return arrays | dict(query_key=wide(), value=wide())

    return over_heads("lsh.attention", kind, draw, functools.partial(call, **options), most=128)


def over_extend(kind, correct_duplicates):
    def draw(head, length, dtype, rng):
        arrays = make_extend(length, dtype, rng)
        wide = lambda x: jnp.asarray(rng.normal(size=(*x.shape[:3], head)), dtype)
        return arrays | {name: wide(arrays[name]) for name in ("query", "key", "value")}

    run = functools.partial(call_extend, correct_duplicates=correct_duplicates)
    return over_heads("lsh.extend", kind, draw, run, most=128)


def over_hashed(kind):
    def draw(head, length, dtype, rng):
        wide = lambda: jnp.asarray(rng.normal(size=(2, length, 2, head)), dtype)
        rotations = jnp.asarray(rng.normal(size=(2, head, ROUNDS, 64)), jnp.float32)
        return dict(query_key=wide(), value=wide(), rotations=rotations)

    return over_heads("lsh.attention", kind, draw, call_hashed, most=128)


GRID = [
    *over("mask", True, chunk_size=CHUNK, chunks_after=1),
    *over("causal", chunk_size=CHUNK, is_causal=True),
    *over("segments", True, True, chunk_size=20, chunks_after=1),
    *over("chunk", chunk_size=CHUNK, reach="chunk"),
    *over("ring-counted", True, chunk_size=CHUNK, reach="ring", correct_duplicates=False),
    *over_hashed("hashed"),
    *over_extend("once", True),
    *over_extend("counted", False),
]
