"""Operations on a mesh of 8 simulated devices under plain `jax.jit`: an eighth of the work on each, and the same numbers."""

import csv
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# A convolution transforms its taps on every device that has some of the batch.
MOST = {"convolution.convolve": 0.2}


def on_8_devices(*words):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    # What has a part for a mesh is compiled anew in every process: JAX's cache would only grow.
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("words", [["--brief"], pytest.param([], marks=pytest.mark.full)], ids=["brief", "all"])
def test_an_eighth_of_the_work_and_no_gathering(words, tmp_path):
    """Forward and backward, with batch, heads, features or queries sharded; brief: batch and heads together."""
    out = tmp_path / "mesh.csv"
    on_8_devices(ROOT / "scripts" / "bench_mesh.py", "--length", 512, "--out", out, *words)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["operation"] for row in rows}) >= 18
    for row in rows:
        assert float(row["share"]) <= (MOST.get(row["operation"], 0.15) if row["sharded"] == "batch" else 0.15), row
        assert not any(int(row[name]) for name in ("all-gather", "all-to-all", "collective-permute")), row
        assert float(row["error"]) < 2e-6, row
        if row["sharded"] != "queries":  # keys and values stay whole there
            assert int(row["temporary_kib"]) < max(2, int(row["temporary_kib_alone"])), row


def test_kernels_are_launched_for_a_share():
    """Each device launches an eighth of the programs: no GPU is needed to see what would be launched."""
    pytest.importorskip("triton")
    on_8_devices("-c", "from tests.kernels import test_mesh; test_mesh.check_launches()")


def check_launches():
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from subquad.kernels import launch, linear, lsh, relative, scan, softmax, ssm

    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    x = jnp.ones((8, 64, 8, 16))
    bias = jnp.ones((1, 8, 64, 64))

    def biased(x, bias):
        return softmax.attention(x, x, x, bias=bias, is_causal=True, implementation="triton")

    def by_distance(x, table):
        return relative.attention(x, x, x, table, table[0], table[1], implementation="triton")

    def recurrence(x):
        return scan.first_order(jax.nn.sigmoid(x[:, :, 0]), x[:, :, 1], implementation="triton")

    def state_space(x):
        modes = jnp.ones((16, 4), jnp.complex64)
        return ssm.diagonal_scan(x[:, :, 0], -modes, modes, modes, implementation="triton")

    def by_buckets(x):
        rotations = jnp.ones((8, 16, 2, 2))
        buckets = lsh.hash_buckets(x, rotations, implementation="triton")
        return lsh.attention(x, x, buckets, num_buckets=4, chunk_size=16, implementation="triton")

    def features(x):
        return linear.attention(x, x, x, is_causal=True, implementation="triton")

    def programs(attend, spec, *more):
        """The number of programs of each launch of a forward and backward pass."""
        arrays = jax.device_put(x, NamedSharding(mesh, spec)), *more
        loss = lambda *arrays: sum(jnp.sum(y) for y in jax.tree.leaves(attend(*arrays)))
        with launch.recording() as launches:
            jax.jit(jax.grad(loss, tuple(range(len(arrays))))).lower(*arrays).compile()
        counts = {}
        for one in launches:  # what is traced again for a part comes last
            counts[one.name] = one.grid
        return counts

    by_batch, by_head, by_feature = PartitionSpec("x"), PartitionSpec(None, None, "x"), PartitionSpec(None, None, None, "x")
    for attend, kernels, specs, *more in (
        (biased, 4, (by_batch, by_head), bias), (by_distance, 3, (by_batch, by_head), jnp.ones((64, 8, 16))),
        (features, 2, (by_batch, by_head)), (by_buckets, 4, (by_batch, by_head)), (recurrence, 1, (by_batch,)),
        (state_space, 1, (by_feature,)),  # whose programs have 16 samples each
    ):  # fmt: skip
        whole = programs(attend, PartitionSpec(), *more)
        assert len(whole) == kernels, whole
        for spec in specs:
            for name, count in programs(attend, spec, *more).items():
                # The sum over samples of the gradient of a bias is one program for each of its blocks.
                share = 1 if name == "flash_backward_bias" and spec[0] == "x" else 8
                assert count * share == whole[name], (name, count, whole[name])


def test_every_kind_of_mesh():
    on_8_devices("-m", "tests.kernels.test_mesh")


def check_meshes():
    """With a small attention: grouped heads, queries cut along the sequence, what cannot be cut, `shard_map`, export."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from subquad.kernels import softmax, specs
    from subquad.kernels.operation import operation
    from tests.kernels import toy_attention

    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    length, heads, key_heads = 8, 8, 4

    def draw(batch, key_heads=key_heads):
        shapes = dict(
            query=(batch, length, heads, 3), key=(batch, length, key_heads, 3), value=(batch, length, key_heads, 3),
            bias=(1, 1, length, length), positions=(length,),
        )  # fmt: skip
        arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
        return arrays | dict(positions=jnp.arange(length))

    def loss(positions, attend=toy_attention.attention, **arrays):
        out, log_total = attend(0.5, *(arrays[name] for name in ("query", "key", "value", "bias")), positions)
        return jnp.sum(out**2) + jnp.sum(jnp.sin(log_total))

    def run(positions, attend=toy_attention.attention, **arrays):
        return jax.value_and_grad(lambda arrays: loss(positions, attend, **arrays))(arrays)

    plain = lambda *words: toy_attention.forward(*words)[0]

    def place(arrays, mesh=mesh, **specs):
        sharding = lambda name: NamedSharding(mesh, specs.get(name, P()))
        return {name: jax.device_put(x, sharding(name)) for name, x in arrays.items()}

    def check(arrays, placed, function=run, collectives=("all-reduce",)):
        program = jax.jit(function).lower(**placed).compile()
        text = program.as_text()
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
            assert (f" {name}(" not in text) or name in collectives, (name, text)
        got, want = program(**placed), jax.jit(lambda **arrays: run(attend=plain, **arrays))(**arrays)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert specs.error(one, other) < 2e-6

    anything = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    arrays = draw(8)
    over = lambda *names: {name: P(*names) for name in ("query", "key", "value")}
    check(arrays, place(arrays, **over(("x", "y"))))
    check(arrays, place(arrays, **over("y", None, "x")))  # 4 key heads over 4 devices
    # Each group of query heads stays whole: 4 key heads over 8 devices are gathered from 2.
    check(arrays, place(arrays, **over(None, None, "x") | dict(query=P(None, None, ("x", "y")))), collectives=anything)
    check(arrays, place(arrays, query=P(None, "x"), bias=P(None, None, "x"), positions=P("x")))  # queries by their place
    # The sequence of keys is gathered wherever it was cut, and so are features.
    check(arrays, place(arrays, **over("y", "x")), collectives=anything)
    check(arrays, place(arrays, query=P("y"), key=P(None, None, None), value=P(None, "x")), collectives=anything)
    few = draw(12, key_heads=1)
    check(few, place(few, **over("x")))

    # Under `jax.vmap` the mapped axis, the batch, or both may be cut.
    def mapped(positions, bias, **arrays):
        both = lambda arrays: jax.vmap(lambda arrays: loss(positions, **arrays, bias=bias))(arrays).sum()
        return jax.value_and_grad(both)(arrays)

    for names in (("x", "y"), (("x", "y"),), (None, "x")):
        many = {name: jnp.stack([x] * 8) for name, x in draw(4).items() if name != "positions" and name != "bias"}
        rest = dict(positions=jnp.arange(length), bias=arrays["bias"])
        placed = place(many, **over(*names)) | rest
        text = jax.jit(mapped).lower(**placed).compile().as_text()
        assert " all-gather(" not in text and " all-to-all(" not in text, text

    # A part of the mesh by hand: the batch over "x", heads over "y" are left to XLA.
    def inside(function, names):
        specs = {name: P("x") if name in over() else P() for name in arrays}
        gradient = {name: spec for name, spec in specs.items() if name != "positions"}

        def part(words):
            loss, grads = function(**words)
            grads["bias"] = jax.lax.psum(grads["bias"], "x")
            return jax.lax.psum(loss, "x"), grads

        mapped = jax.shard_map(part, mesh=mesh, in_specs=(specs,), out_specs=(P(), gradient), axis_names=names, check_vma=False)
        return lambda **words: mapped(words)

    placed = place(arrays, **over("x", None, "y"))
    check(arrays, placed, inside(run, {"x"}))
    check(arrays, placed, inside(run, {"x", "y"}), collectives=("all-reduce", "all-gather"))

    # JAX forgets the host callbacks of a part, such as Triton's interpreter, and would call nothing.
    def doubled(_, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda x: np.asarray(x) * 2, shape, x, vmap_method="sequential"), ()

    double = operation(doubled, lambda *_: (None,), arrays=("b t n h",), outputs="b t n h")
    np.testing.assert_array_equal(jax.jit(lambda x: double(None, x))(placed["query"]), 2 * arrays["query"])

    # What is exported knows no partitioner: right, and as XLA cuts it.
    exported = jax.export.export(jax.jit(run))(**placed)
    got, want = exported.call(**placed), run(attend=plain, **arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert specs.error(one, other) < 2e-6

    # Positions of each sample that are known while tracing: a device has those of its samples.
    known = np.stack([rng.permutation(length) for _ in range(8)])
    causal = lambda x: softmax.attention(x, x, x, is_causal=True, query_positions=known, key_positions=known)
    np.testing.assert_allclose(jax.jit(causal)(placed["query"]), causal(arrays["query"]), atol=2e-6)


if __name__ == "__main__":
    check_meshes()
