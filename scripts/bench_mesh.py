#!/usr/bin/env python
"""What one of 8 devices does of an operation under plain `jax.jit`, by the axis that is sharded: work, collectives, memory.

The devices are simulated on the CPU, so no time is measured. FLOPs are counted in the compiled program, every loop body as
often as it runs. A share of 0.125 is an eighth of the work of one device; the sums over the batch of the gradients of
parameters are the only all-reduces.

    scripts/bench_mesh.py                         all operations; writes kernels/results/mesh.csv
    scripts/bench_mesh.py --operation lsh         those whose names contain it
    scripts/bench_mesh.py --brief                 batch and heads only together, in a mesh of 4 x 2
"""

import argparse
import collections
import functools
import math
import os
import pathlib
import re

if __name__ == "__main__":  # before jax is imported
    from subquad.lra import interrupts

    interrupts.exit_during_startup("bench_mesh")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels import (
    block_sparse,
    convolution,
    depthwise,
    entmax,
    gather,
    linear,
    lsh,
    matrix,
    relative,
    scan,
    softmax,
    specs,
    ssm,
    strided,
)
from subquad.lra.cli import commands
from subquad.lra.report import csv_rows

RESULTS = pathlib.Path(__file__).parents[1] / "kernels" / "results" / "mesh.csv"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
FIELDS = ("operation", "sharded", "length", "share", *COLLECTIVES, "temporary_kib", "temporary_kib_alone", "error")
BATCH, HEADS, FEATURES, ROUNDS, BUCKETS = 8, 8, 16, 2, 4
# The axes of arrays that a column shards, over the axes "x" of 4 and "y" of 2 devices.
SHARDED = {"batch": dict(b="xy"), "heads": dict(n="xy"), "4 x 2": dict(b="x", n="y"), "features": dict(d="xy"),
           "queries": dict(t="xy")}  # fmt: skip
HEADED, FEATURED = ("batch", "heads", "4 x 2"), ("batch", "features")
QUERIES, KEYS, TOKENS = "b t n h", "b s n h", "b t d"
ATTENTION = dict(query=QUERIES, key=KEYS, value=KEYS)
SELF = dict(query=QUERIES, key=QUERIES, value=QUERIES)
RELATIVE = dict(**ATTENTION, relative_key="s n h", content_bias="n h", position_bias="n h")
PROJECTED = SELF | dict(projection="m h")
HASHED = dict(query_key=QUERIES, value=QUERIES, buckets="b r t n")
CONVOLVED = dict(inputs=TOKENS, kernel="d t")
SELECTIVE = dict(inputs=TOKENS, step=TOKENS, diagonal="d p", input_matrix="b t p", output_matrix="b t p")
SYSTEM = dict(inputs=TOKENS, log_decay="d p", input_matrix="d p", output_matrix="d p")
BLOCKS = np.arange(4)[None, :, None] - np.array([0, 1])  # each block of queries sees its own keys and those before


def operation(function, axes, sharded=HEADED, **options):
    return lambda arrays: function(**arrays, **options), axes, sharded


def positive(arrays, **options):
    query, key = (jnp.exp(arrays[name]) for name in ("query", "key"))
    return linear.attention(query, key, arrays["value"], **options)


def blocks(arrays):
    size = arrays["query"].shape[1] // 4
    return block_sparse.attention(**arrays, blocks=np.maximum(BLOCKS, -1), block_size=size)


# The operation of (arrays by name), the axes of the arrays, and what is sharded.
OPERATIONS = {
    "softmax.attention": operation(softmax.attention, ATTENTION, (*HEADED, "queries")),
    "softmax.attention causal": operation(softmax.attention, SELF, is_causal=True),
    "softmax.attention window": operation(softmax.attention, SELF, window_size=16),
    "block_sparse.attention": (blocks, SELF, HEADED),
    "strided.attention": operation(strided.attention, SELF, stride=16, window_size=16, is_causal=True),
    "strided.fixed": operation(strided.fixed, SELF, block_size=16, columns=np.array([[15]]), is_causal=True),
    "relative.attention": operation(relative.attention, RELATIVE),
    "lsh.attention": operation(lsh.attention, HASHED, num_buckets=BUCKETS, chunk_size=16),
    "lsh.hash_buckets": operation(lsh.hash_buckets, dict(vectors=QUERIES, rotations="n h r f")),
    "lsh.extend": operation(lsh.extend, dict(**SELF, query_buckets="b r t n", key_buckets="b r t n"), start=0),
    "linear.attention": (positive, ATTENTION, HEADED),
    "linear.attention causal": (functools.partial(positive, is_causal=True), SELF, HEADED),
    "linear.random_feature_attention": operation(linear.random_feature_attention, PROJECTED, is_causal=True),
    "linear.gated": operation(linear.gated, dict(**SELF, log_decay="b t n")),
    "gather.attention": operation(gather.attention, dict(**SELF, indices="b n t l")),
    "entmax.attention": operation(entmax.attention, SELF),
    "depthwise.depthwise": operation(depthwise.depthwise, dict(inputs=TOKENS, kernel="l d"), FEATURED),
    "matrix.pseudo_inverse": operation(matrix.pseudo_inverse, dict(matrix="b n m m")),
    "matrix.sinkhorn": operation(matrix.sinkhorn, dict(logits="b n m m")),
    "scan.first_order": operation(scan.first_order, dict(decay=TOKENS, inputs=TOKENS), FEATURED),
    "convolution.convolve": operation(convolution.convolve, CONVOLVED, FEATURED),
    "convolution.convolve segments": operation(convolution.convolve, CONVOLVED | dict(segment_ids="b t"), FEATURED),
    "ssm.diagonal_scan": operation(ssm.diagonal_scan, SYSTEM, FEATURED),
    "ssm.selective_scan": operation(ssm.selective_scan, SELECTIVE, FEATURED),
}


def draw(axes: dict[str, str], length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    sizes = dict(b=BATCH, t=length, s=length, n=HEADS, h=FEATURES, d=32, m=16, p=8, l=4, r=ROUNDS, f=BUCKETS // 2)

    def one(name, letters):
        shape = [sizes[letter] for letter in letters.split()]
        if "buckets" in name:
            return jnp.asarray(rng.integers(0, BUCKETS, shape), jnp.int32)
        if name in ("step", "diagonal"):
            return jnp.asarray(rng.uniform(0, 1, shape) * (1 if name == "step" else -1), jnp.float32)
        if letters == "d p":  # the eigenvalues of a slow decay, and complex matrices
            return jnp.asarray(rng.uniform(-0.5, -0.01, shape) + 1j * rng.normal(size=shape), jnp.complex64)
        if name == "segment_ids":
            return jnp.asarray(rng.integers(0, 4, shape).cumsum(1) // 100, jnp.int32)
        if name == "indices":
            return jnp.asarray(rng.integers(0, length, shape), jnp.int32)
        if letters == "b t n":  # a log decay
            return jnp.asarray(-rng.uniform(0, 0.5, shape), jnp.float32)
        if name == "decay":
            return jnp.asarray(rng.uniform(0.5, 1, shape), jnp.float32)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {name: one(name, letters) for name, letters in axes.items()}


def both(function, arrays):
    """Outputs, and the gradients of their sum of squares."""
    inexact, rest = specs.split(arrays)

    def loss(inexact):
        outputs = function({**inexact, **rest})
        squares = [jnp.sum(jnp.square(jnp.abs(x))) for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(squares, jnp.float32(0)), outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(inexact)
    return outputs, gradients


def rows_of(name: str, length: int, brief: bool = False):
    """A row for each axis that the operation's arrays have; `brief`: batch and heads only together."""
    function, axes, sharded = OPERATIONS[name]
    if brief and "4 x 2" in sharded:
        sharded = [column for column in sharded if column not in ("batch", "heads")]
    arrays = draw(axes, length)
    run = jax.jit(functools.partial(both, function))
    alone = run.lower(arrays).compile()
    want, whole = alone(arrays), flops(alone.as_text())
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=automatic)
    for column in sharded:
        letters = SHARDED[column]

        def shard(array, names, letters=letters):
            spec = [tuple(letters[letter]) if letter in letters else None for letter in names.split()]
            return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

        parts = {name: shard(array, axes[name]) for name, array in arrays.items()}
        program = run.lower(parts).compile()
        text = program.as_text()
        leaves = zip(jax.tree.leaves(program(parts)), jax.tree.leaves(want), strict=True)
        yield dict(
            operation=name, sharded=column, length=length, share=round(flops(text) / whole, 4),
            **{word: len(re.findall(rf" {word}(?:-start)?\(", text)) for word in COLLECTIVES},
            temporary_kib=round(program.memory_analysis().temp_size_in_bytes / 1024),
            temporary_kib_alone=round(alone.memory_analysis().temp_size_in_bytes / 1024),
            error=max(specs.error(got, wanted, 1e-6) for got, wanted in leaves),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ FLOPs of HLO in words

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
RESULT = re.compile(r"^(\w+)\[([\d,]*)\]\S* ([\w\-]+)\((.*)$")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%([\w.\-]+)")
ARITHMETIC = set(
    "add subtract multiply divide maximum minimum exponential exponential-minus-one log log-plus-one power rsqrt sqrt tanh "
    "negate abs logistic sine cosine".split()
)


def flops(text: str) -> float:
    """The floating-point operations of a compiled program: products, elementwise arithmetic, reductions and FFTs."""
    costs, calls, entry = collections.defaultdict(float), collections.defaultdict(list), None
    for line in text.splitlines():
        if header := HEADER.match(line):
            computation, shapes = header[2], {}
            entry = computation if header[1] else entry
        elif instruction := INSTRUCTION.match(line):
            name, words = instruction.groups()
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', words)
            if not re.search(r" (reduce|scatter|sort|map|all-reduce|reduce-window|select-and-scatter)\(", words):
                calls[computation] += [(called, int(trips[1]) if trips else 1) for called in CALLED.findall(words)]
            if result := RESULT.match(words):
                dtype, dims, kind, operands = result.groups()
                shapes[name] = [int(dim) for dim in dims.split(",") if dim]
                if dtype[0] in "fbc":
                    costs[computation] += _cost(dtype, shapes[name], kind, operands, shapes)

    @functools.cache
    def total(computation):
        return costs[computation] + sum(trips * total(called) for called, trips in calls[computation])

    return total(entry)


def _cost(dtype, shape, kind, operands, shapes):
    size, is_complex = math.prod(shape), dtype[0] == "c"
    first = shapes.get((re.findall(r"%([\w.\-]+)", operands) or [None])[0], [])
    if kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operands)[1]
        return 2 * size * math.prod(first[int(axis)] for axis in contracted.split(",") if axis) * (4 if is_complex else 1)
    if kind == "reduce":
        return math.prod(first)
    if kind == "fft":
        return 5 * size * math.log2(max(shape[-1], 2))
    return size * (2 if is_complex else 1) if kind in ARITHMETIC else 0


# -------------------------------------------------------------------------------------------------------------- command


def main() -> int:
    words = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = commands.Parser(prog="bench_mesh", **words)
    parser.add_argument("--operation", default="", help="a part of the name")
    parser.add_argument("--brief", action="store_true", help="batch and heads only together, in a mesh of 4 x 2")
    parser.add_argument("--length", type=commands.number(int, 1), default=512, help="default: 512")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="CSV; its other rows stay")
    options = parser.parse_args()
    chosen = [name for name in OPERATIONS if options.operation in name]
    if not chosen:
        raise ValueError(f"operation must be a part of a name, got {options.operation!r}. Known: {', '.join(OPERATIONS)}.")
    csv_rows.check_file(options.out, FIELDS)
    for name in chosen:
        for row in rows_of(name, options.length, options.brief):
            csv_rows.write_rows(options.out, FIELDS, [row], FIELDS[:3])
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    commands.run("bench_mesh", main)
