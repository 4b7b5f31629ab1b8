#!/usr/bin/env python
"""What one of 8 devices does of an operation under plain `jax.jit`, by the axis that is sharded: work, collectives, memory.

The devices are simulated on the CPU, so no time is measured. FLOPs are counted in the compiled program, every loop body as
often as it runs. A share of 0.125 is an eighth of the work of one device; the sums over the batch of the gradients of
parameters are the only all-reduces.

    scripts/bench_mesh.py                         all operations; writes kernels/results/mesh.csv
    scripts/bench_mesh.py --operation lsh         those whose names contain it
"""

import argparse
import collections
import csv
import functools
import math
import os
import pathlib
import re

if __name__ == "__main__":  # before jax is imported
    from subquad.lra import starting

    starting.begin("bench_mesh")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from subquad.kernels import lsh, matrix, relative, scan, specs
from subquad.lra.cli import commands

RESULTS = pathlib.Path(__file__).parents[1] / "kernels" / "results" / "mesh.csv"
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
BATCH, HEADS, FEATURES, ROUNDS, BUCKETS = 8, 8, 16, 2, 4
# The axes of arrays that a column shards, over the axes "x" of 4 and "y" of 2 devices.
SHARDED = {"batch": dict(b="xy"), "heads": dict(n="xy"), "4 x 2": dict(b="x", n="y"), "features": dict(d="xy")}
QUERIES, KEYS, TOKENS = "b t n h", "b s n h", "b t d"


def _relative(arrays):
    return relative.attention(**arrays)


def _lsh(arrays):
    return lsh.attention(**arrays, num_buckets=BUCKETS, chunk_size=16)


def _hash(arrays):
    return lsh.hash_buckets(**arrays)


def _extend(arrays):
    return lsh.extend(**arrays, start=0)


# The operation of (arrays by name), and the axes of the arrays.
OPERATIONS = {
    "relative.attention": (
        _relative,
        dict(query=QUERIES, key=KEYS, value=KEYS, relative_key="s n h", content_bias="n h", position_bias="n h"),
    ),
    "lsh.attention": (_lsh, dict(query_key=QUERIES, value=QUERIES, buckets="b r t n")),
    "lsh.hash_buckets": (_hash, dict(vectors=QUERIES, rotations="n h r f")),
    "lsh.extend": (
        _extend,
        dict(query=QUERIES, key=QUERIES, value=QUERIES, query_buckets="b r t n", key_buckets="b r t n"),
    ),
    "matrix.pseudo_inverse": (lambda arrays: matrix.pseudo_inverse(**arrays), dict(matrix="b n m m")),
    "matrix.sinkhorn": (lambda arrays: matrix.sinkhorn(**arrays), dict(logits="b n m m")),
    "scan.first_order": (lambda arrays: scan.first_order(**arrays), dict(decay=TOKENS, inputs=TOKENS)),
}


def draw(axes: dict[str, str], length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    sizes = dict(b=BATCH, t=length, s=length, n=HEADS, h=FEATURES, v=FEATURES, d=32, m=16, r=ROUNDS, f=BUCKETS // 2)

    def one(name, letters):
        shape = [sizes[letter] for letter in letters.split()]
        if "buckets" in name:
            return jnp.asarray(rng.integers(0, BUCKETS, shape), jnp.int32)
        if name == "decay":
            return jnp.asarray(rng.uniform(0.5, 1, shape), jnp.float32)
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {name: one(name, letters) for name, letters in axes.items()}


def both(function, arrays):
    """Outputs, and the gradients of their sum of squares."""
    inexact, rest = specs.split(arrays)

    def loss(inexact):
        outputs = function({**inexact, **rest})
        squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(squares, jnp.float32(0)), outputs

    gradients, outputs = jax.grad(loss, has_aux=True)(inexact)
    return outputs, gradients


def rows_of(name: str, length: int):
    """A row for each axis that the operation's arrays have."""
    function, axes = OPERATIONS[name]
    arrays = draw(axes, length)
    run = jax.jit(functools.partial(both, function))
    alone = run.lower(arrays).compile()
    want, whole = alone(arrays), flops(alone.as_text())
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=automatic)
    for column, letters in SHARDED.items():
        if not all(any(letter in names.split() for names in axes.values()) for letter in letters):
            continue

        def shard(array, names, letters=letters):
            spec = [tuple(letters[letter]) if letter in letters else None for letter in names.split()]
            return jax.device_put(array, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

        parts = {name: shard(array, axes[name]) for name, array in arrays.items()}
        program = run.lower(parts).compile()
        text = program.as_text()
        leaves = zip(jax.tree.leaves(program(parts)), jax.tree.leaves(want), strict=True)
        yield dict(
            operation=name,
            sharded=column,
            length=length,
            share=round(flops(text) / whole, 4),
            **{word: len(re.findall(rf" {word}(?:-start)?\(", text)) for word in COLLECTIVES},
            temporary_kib=round(program.memory_analysis().temp_size_in_bytes / 1024),
            temporary_kib_alone=round(alone.memory_analysis().temp_size_in_bytes / 1024),
            error=max(specs.error(got, wanted, 1e-6) for got, wanted in leaves),
        )


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", default="", help="a part of the name")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for name in OPERATIONS:
        if options.operation in name:
            for row in rows_of(name, options.length):
                rows.append(row)
                print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    commands.run("bench_mesh", main)
