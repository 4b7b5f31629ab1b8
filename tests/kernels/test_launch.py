"""The door to Triton: what it refuses, how the interpreter is guarded, what ahead-of-time compilation tells."""

import concurrent.futures
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import gpu, launch, machine_code, scan, specs, through_jax_triton, tuning

interpret = pytest.mark.interpret
aot = pytest.mark.aot


@pytest.fixture
def toys():
    from tests.kernels import toys

    return toys


def draw(*shape, dtype="float32", seed=0):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def recorded(function, *args):
    with launch.recording() as launches:
        jax.eval_shape(function, *args)
    return launches


@interpret
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_product_in_the_interpreter(toys, dtype):
    """The interpreter multiplies bfloat16 as integers: off by 1e8 where that is not mended."""
    x, y = draw(3, 50, 50, dtype=dtype), draw(3, 50, 50, dtype=dtype, seed=1)
    want = 0.5 * np.asarray(x, np.float64) @ np.asarray(y, np.float64)
    got = jax.jit(toys.multiply("interpret"))(x, y)
    assert got.dtype == x.dtype
    assert np.abs(np.asarray(got, np.float64) - want).max() < 4 * float(jnp.finfo(dtype).eps) * np.abs(want).max()


@interpret
def test_the_interpreter_rounds_to_bfloat16(toys):
    """Nearest, even on a tie, as a GPU: it cuts digits off where that is not mended, and makes infinity of some NaN."""
    ties = np.float32([1 + 1 / 256, 1 + 3 / 256, 1 + 1 / 256 + 1e-6, -1 - 3 / 256, 3.39e38, np.inf, -0.0, 1e-39])
    nan = np.uint32([0x7F800001]).view(np.float32)
    x = jnp.concatenate([draw(50), ties, nan])
    out = toys.shift("interpret", x, out=jax.ShapeDtypeStruct(x.shape, jnp.bfloat16))
    np.testing.assert_array_equal(out.astype(jnp.float32), x.astype(jnp.bfloat16).astype(jnp.float32))


@interpret
def test_a_mapped_axis_becomes_part_of_the_batch(toys):
    x, y = draw(3, 20, 20), draw(3, 20, 20, seed=1)
    multiply = toys.multiply("interpret")
    pairs = [
        (jnp.stack([x, 2 * x]), y, (0, None)),
        (x, jnp.stack([y, 2 * y]), (None, 0)),
        (jnp.stack([x[:1], 2 * x[:1]]), y, (0, None)),  # one sample for all, mapped: it is copied to each
        (x[:1], jnp.stack([y, 2 * y]), (None, 0)),  # one sample for all, not mapped: it stays one
        (jnp.stack([x, 2 * x], 2), jnp.stack([y, y], 1), (2, 1)),
    ]
    for x_of, y_of, axes in pairs:
        got = jax.jit(jax.vmap(multiply, axes))(x_of, y_of)
        assert got.shape == (2, 3, 20, 20)
        for i in range(2):
            one, other = (a if axis is None else jnp.take(a, i, axis) for a, axis in zip((x_of, y_of), axes, strict=True))
            np.testing.assert_allclose(got[i], 0.5 * one @ other, atol=1e-5)
    twice = jax.vmap(jax.vmap(multiply, (0, None)), (None, 0))(jnp.stack([x, 2 * x]), jnp.stack([y, 3 * y]))
    np.testing.assert_allclose(twice[1, 1], 3 * x @ y, atol=1e-4)


@interpret
def test_what_a_kernel_leaves_unwritten_is_not_a_number(toys):
    x = draw(10)
    out = toys.shift("interpret", x, out=jax.ShapeDtypeStruct((20,), x.dtype))
    np.testing.assert_array_equal(out[:10], x)
    assert np.isnan(out[10:]).all()
    indices = toys.shift("interpret", jnp.arange(10), out=jax.ShapeDtypeStruct((20,), jnp.int32))
    assert (np.asarray(indices[10:]) == -1).all()


@interpret
@pytest.mark.parametrize("by", [1, -1, 40])
def test_a_store_past_the_end_is_found(toys, by):
    with pytest.raises(Exception, match="copy wrote outside of out_ptr"):
        jax.block_until_ready(toys.shift("interpret", draw(10), by=by))


@interpret
def test_a_store_into_an_input_is_found(toys):
    with pytest.raises(Exception, match="copy wrote into its input x_ptr"):
        jax.block_until_ready(toys.shift("interpret", draw(10), write_input=True))


@interpret
def test_a_load_past_the_end_reads_poison(toys):
    """T says 12 where there are 10: what lies behind is NaN, not the neighbour's numbers."""
    x = draw(10)
    (out,) = launch.call(
        toys.copy, dict(x_ptr=x), dict(out_ptr=jax.ShapeDtypeStruct((12,), x.dtype)), grid=1,
        constants=dict(T=12, SHIFT=0, WRITE_INPUT=False), config=tuning.Config({"BLOCK": 16}), mode="interpret",
    )  # fmt: skip
    assert np.isnan(out[10:]).all()


@interpret
def test_a_constant_may_be_a_function_or_a_tuple_in_the_interpreter(toys):
    np.testing.assert_array_equal(toys.follow("interpret", jnp.arange(16.0)), 2 * np.arange(16) + 5)


@aot
def test_a_constant_may_be_a_function_or_a_tuple(toys):
    """Compiled, lowered for JAX, and compiled again where the function's source has changed but not its name."""
    x = jnp.arange(16.0)
    (launched,) = recorded(lambda x: toys.follow("triton", x), x)
    assert launch.functions_in(*dict(launched.constants).values()) == [toys.twice]
    assert machine_code.compile(launched, "sm_90").registers > 0
    with gpu.lowering_for(90):
        lowered = jax.jit(lambda x: toys.follow("triton", x)).trace(x).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call" in lowered.as_text()
    with pytest.raises(TypeError, match="constants\\['RULE'\\] must be a number"):
        recorded(lambda x: toys.follow("triton", x, (0, np.float32(5))), x)
    key, source = machine_code._prepared(launched, "sm_90")[0].hash(), toys.twice.src
    try:
        toys.twice._unsafe_update_src(source.replace("* 2", "* 3"))
        assert machine_code._prepared(launched, "sm_90")[0].hash() != key
    finally:
        toys.twice._unsafe_update_src(source)


@interpret
def test_an_alias_starts_as_its_input(toys):
    x = jnp.arange(10.0)
    out = toys.shift("interpret", x[:4], out=jax.ShapeDtypeStruct((4,), x.dtype), by=0, aliases={"x_ptr": "out_ptr"})
    np.testing.assert_array_equal(out, x[:4])


@interpret
def test_an_absent_input_may_not_be_followed_but_may_be_there(toys):
    x = draw(1, 20, 20)
    bias = jnp.full((1,), 3.0)
    np.testing.assert_allclose(toys.multiply("interpret", bias=bias)(x, x) - toys.multiply("interpret")(x, x), 3.0, atol=1e-5)


def test_misspelt_operands_are_refused(toys):
    x = draw(10)
    with pytest.raises(TypeError, match=r"launch.call: .*parameters of copy.*'x_ptr', 'out_ptr'.*'x_prt'"):
        recorded(lambda x: toys.shift("triton", x, x_prt=x), x)
    for extra in (dict(SHIFTS=1), dict(T=None, SHIFT=0)):
        with pytest.raises(TypeError, match="launch.call"):
            recorded(
                lambda x, extra=extra: launch.call(
                    toys.copy,
                    dict(x_ptr=x),
                    dict(out_ptr=x),
                    grid=1,
                    constants=dict(T=10, SHIFT=0) | extra,
                    config=tuning.Config({"BLOCK": 16}),
                    mode="triton",
                ),  # fmt: skip
                x,
            )


def test_run_time_numbers_are_refused(toys):
    """A Python float would be a float64 in jax-triton 0.3; NumPy's and JAX's numbers are no constants."""
    for scale in (np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        with pytest.raises(TypeError, match="constants\\['SCALE'\\] must be a number"):
            recorded(toys.multiply("triton", scale=scale), draw(1, 20, 20), draw(1, 20, 20))


def test_a_grid_has_one_axis_of_sane_length(toys):
    x = draw(10)
    for grid in (0, 2**31):
        with pytest.raises(ValueError, match="launch.call: grid must lie in"):
            recorded(
                lambda x, grid=grid: launch.call(
                    toys.copy,
                    dict(x_ptr=x),
                    dict(out_ptr=x),
                    grid=grid,
                    config=tuning.Config({"BLOCK": 16}),
                    mode="triton",
                    constants=dict(T=10, SHIFT=0, WRITE_INPUT=False),
                ),  # fmt: skip
                x,
            )


def test_a_tuned_configuration_comes_before_the_heuristic(tmp_path, monkeypatch):
    (tmp_path / "sm_90.json").write_text(
        '{"rows": [{"kernel": "k", "sizes": {"features": 64}, "blocks": {"BLOCK": 32}, "num_warps": 8, "num_stages": 3}]}'
    )
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.tuned.cache_clear()
    heuristic = tuning.Config({"BLOCK": 64})
    with gpu.lowering_for(90):
        assert tuning.config("k", heuristic, features=64) == tuning.Config({"BLOCK": 32}, 8, 3)
        assert tuning.config("k", heuristic, features=32) == heuristic
    with gpu.lowering_for(80):
        assert tuning.config("k", heuristic, features=64) == heuristic
    tuning.tuned.cache_clear()


def test_no_load_is_lifted_over_a_barrier(tmp_path, monkeypatch):
    """Threads read what others wrote to global memory: a second stage would load it before, whoever asks for that stage."""
    guarded = {
        "linear.attention/causal": set(),
        "matrix.pseudo_inverse/six-iterations": {"inverse_forward_kernel", "inverse_backward_kernel"},
        "matrix.sinkhorn/plain": set(),
        "softmax.attention/causal": set(),
    }
    for name, kernels in guarded.items():
        launches = specs.launches(specs.find(name))
        assert {one.name for one in launches if launch.guards_memory(one.kernel)} == kernels
        assert all(one.config.num_stages == 1 for one in launches if one.name in kernels)

    spec = specs.find("matrix.pseudo_inverse/six-iterations")
    with tuning.trying({}) as asked:
        specs.launches(spec)
        request, heuristic = next(iter(asked.items()))
    two = dataclasses.replace(heuristic, num_stages=2)
    with tuning.trying({request: two}), pytest.raises(ValueError, match="must be 1 for inverse_forward_kernel, got 2"):
        specs.launches(spec)
    row = dict(kernel=request.kernel, sizes=dict(request.sizes), blocks=dict(two.blocks), num_warps=4, num_stages=2)
    (tmp_path / "sm_90.json").write_text(json.dumps(dict(rows=[row])))
    monkeypatch.setattr(tuning, "TUNED", tmp_path)
    tuning.tuned.cache_clear()
    with pytest.raises(ValueError, match="got 2. It reads back what it wrote"):
        specs.launches(spec)
    tuning.tuned.cache_clear()


TUNED = [spec for spec in specs.load().values() if "interpret" in spec.implementations]
OPERATIONS = {spec.operation: spec for spec in TUNED if not spec.operation.startswith("matrix.")}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_neighbouring_sizes_share_what_was_tuned(operation):
    """A row of the table for the very sizes that were tuned would serve nobody else."""
    spec, requests = OPERATIONS[operation], []
    for length in (500, 512):
        with tuning.trying({}) as asked:
            specs.launches(spec, length=length, bench=False)
            requests.append(set(asked))
    assert requests[0] and requests[0] == requests[1]


def test_batches_and_features_of_scans_share_what_was_tuned():
    requests = []
    for batch, length, features in ((30, 1000, 250), (32, 1024, 256)):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (2 * [(batch, length, features)] + [(batch, features)])]
        with tuning.trying({}) as asked:
            recorded(lambda *x: scan.first_order(*x, implementation="triton"), *shapes)
            requests.append(set(asked))
    assert requests[0] and requests[0] == requests[1]


def test_what_was_traced_for_another_target_is_not_reused(toys):
    """JAX keeps what a jitted function traced to: zeros while recording, Triton kernels where there is no GPU."""
    seen = []

    @jax.jit
    def function(x):
        seen.append(gpu.capability())
        return 2 * x

    function(draw(3))
    for capability in (90, 80):
        with gpu.lowering_for(capability):
            jax.eval_shape(lambda x: function(x), draw(3))
    function(draw(3))
    assert seen == [None, 90, 80]
    with tuning.trying({}):
        function(draw(3))
    assert seen == [None, 90, 80, None]
    multiply = jax.jit(toys.multiply("triton"))
    x = draw(1, 20, 20)
    assert len(recorded(multiply, x, x)) == len(recorded(multiply, x, x)) == 1


def test_a_gpu_beside_the_default_device_is_not_traced_for(monkeypatch):
    """`jax.default_device` on a machine with a GPU: what runs on the CPU must not be lowered to its kernels."""
    fake, cpus = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200"), jax.devices("cpu")
    monkeypatch.setattr(jax, "devices", lambda backend=None: cpus if backend == "cpu" else [fake])
    assert gpu.capability() == 90 and gpu.device_kind() == "nvidia-h200"
    seen = []
    function = jax.jit(lambda x: seen.append(gpu.capability()) or 2 * x)
    jax.eval_shape(function, draw(3))
    for device in ("cpu", cpus[0]):
        with jax.default_device(device):
            jax.eval_shape(function, draw(3))
            with pytest.raises(launch.Declined, match="no NVIDIA GPU|interpreter"):
                launch.require("triton")
    assert seen[0] == 90 and set(seen[1:]) == {None}


@pytest.mark.parametrize("compute_capability", [70, 75, 86, 89, 120])
def test_a_gpu_that_the_kernels_are_not_made_for(compute_capability):
    """They would not compile for it, or ask for more shared memory than it has, and that only when they run."""
    with gpu.lowering_for(compute_capability), pytest.raises(launch.Declined, match="8.0, 9.0 and 10.0|interpreter"):
        launch.require("triton")


def test_the_kernels_of_another_gpu():
    """What is recorded for an A100 is what an A100 launches: its attention has smaller tiles than Hopper's."""
    spec = specs.find("softmax.attention/full")
    hopper, ampere = (specs.launches(spec, target=target) for target in ("sm_90", "sm_80"))
    assert [x.name for x in hopper] == [x.name for x in ampere]
    assert hopper[0].config.blocks["BLOCK_K"] > ampere[0].config.blocks["BLOCK_K"]


def test_neither_triton_nor_a_gpu_is_touched_by_importing():
    import subprocess
    import sys

    code = "import subquad.kernels, subquad.zoo, sys; print([m for m in ('triton', 'jax_triton', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@interpret
def test_an_interpreting_process_does_not_compile(toys):
    with pytest.raises(launch.Declined, match="interpreter"):
        launch.require("triton")
    (launched,) = recorded(toys.multiply("triton"), draw(1, 20, 20), draw(1, 20, 20))
    with pytest.raises(RuntimeError, match="Unset TRITON_INTERPRET"):
        machine_code.compile(launched, "sm_90")


@aot
def test_a_compiling_process_does_not_interpret(toys):
    with pytest.raises(launch.Declined, match="TRITON_INTERPRET=1"):
        launch.require("interpret")


@aot
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_machine_code_tells_registers_and_tensor_cores(toys, dtype):
    x = draw(2, 50, 50, dtype=dtype)
    (launched,) = recorded(toys.multiply("triton"), x, x)
    assert launched.name == "matmul" and launched.grid == 2
    for target in machine_code.TARGETS:
        compiled = machine_code.compile(launched, target)
        assert compiled.tensor_core > 0 and compiled.registers > 16, target
        assert compiled.spills == compiled.stack == 0, target
        assert 0 < compiled.shared <= machine_code.SHARED_LIMIT[target], target


@aot
def test_spills_are_counted(toys):
    x = draw(1, 64, 64)
    (launched,) = recorded(toys.multiply("triton"), x, x)
    one_warp = dataclasses.replace(launched, config=tuning.Config({"BLOCK": 64}, num_warps=1))
    compiled = machine_code.compile(one_warp, "sm_90")
    assert compiled.spills > 0 and compiled.stack > 0


@aot
def test_a_transposed_product_is_found(toys):
    """dot(trans(dot(...)), ...): Triton 3.4 to 3.6 compute it wrongly on Hopper."""
    x = draw(64, 64, dtype="bfloat16")

    def run(x):
        return launch.call(
            toys.transpose_of_product, dict(x_ptr=x, y_ptr=x), dict(out_ptr=jax.ShapeDtypeStruct(x.shape, jnp.float32)),
            grid=1, constants={}, config=tuning.Config({"BLOCK": 64}), mode="triton",
        )  # fmt: skip

    (launched,) = recorded(run, x)
    assert machine_code.compile(launched, "sm_90").transposes > 0


@aot
@pytest.mark.filterwarnings("ignore:input_output_aliases is deprecated")
def test_a_gpu_is_told_everything(toys, monkeypatch):
    """The target, the PTX version, that products and sums may be fused, and which outputs lie where their inputs do."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs pip install --no-deps jax-cuda13-plugin, as scripts/test does")
    jax_triton = through_jax_triton.library()
    asked, original = [], jax_triton.triton_call

    def triton_call(*arrays, **options):
        asked.append(options)
        return original(*arrays, **options)

    monkeypatch.setattr(jax_triton, "triton_call", triton_call)
    run = jax.jit(jax.vmap(toys.multiply("triton")))
    alias = jax.jit(lambda x: toys.shift("triton", x, aliases={"x_ptr": "out_ptr"}))
    with gpu.lowering_for(90):
        lowered = run.trace(draw(2, 3, 50, 50), draw(2, 3, 50, 50)).lower(lowering_platforms=("cuda",))
        in_place = alias.trace(draw(10)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("triton_kernel_call") == 1
    for options in asked:
        backend = options.get("backend_options", options)
        assert backend["enable_fp_fusion"] is True and options["compute_capability"] == 90
        assert options["num_warps"] == 4 and options["num_stages"] == 2
    *without, aliased = (options["input_output_aliases"] for options in asked)
    assert without and set(without) == {None} and list(aliased.values()) == [0]
    assert "output_operand_alias" in in_place.as_text() and "output_operand_alias" not in lowered.as_text()
    if hasattr(jax_triton, "CUSTOM_CALL_TARGET_NAME"):
        assert all(options["backend_options"]["ptx_version"] == through_jax_triton.PTX_VERSION for options in asked)
    else:
        from jax_triton import triton_lib
        from triton.backends.compiler import GPUTarget

        backend = triton_lib.cb.CUDABackend(GPUTarget("cuda", 90, 32))
        assert backend.parse_options(dict(enable_fp_fusion=True)).ptx_version == through_jax_triton.PTX_VERSION


def test_repeated_calls_run_as_often_as_they_say():
    """A compiler that saw through them would compute once what never changes, or nothing that nobody uses."""
    calls = []

    def host(x):
        calls.append(1)
        return np.asarray(2 * x)

    double = lambda x: jax.pure_callback(host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    got = jax.jit(specs.repeated(lambda x, y: (double(x), y + 1), 5))(jnp.ones(3), jnp.zeros(2))
    np.testing.assert_array_equal(got[0], 2 * np.ones(3))
    np.testing.assert_array_equal(got[1], np.ones(2))
    assert len(calls) == 5
    ticks = iter([0.0, 0.004])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(specs.time, "perf_counter", lambda: next(ticks))
        assert specs.repeats_for(lambda: None) == 5


def test_other_threads_are_not_recorded():
    def other():
        return gpu.capability(), tuning.config("k", tuning.Config({"BLOCK": 1})), launch._recorded.get()

    tried = {tuning.Request("k", ()): tuning.Config({"BLOCK": 2})}
    with launch.recording(80), tuning.trying(tried) as asked, concurrent.futures.ThreadPoolExecutor() as threads:
        assert threads.submit(other).result() == (gpu.capability_of(gpu.device()), tuning.Config({"BLOCK": 1}), None)
        assert not asked
        assert other() == (80, tuning.Config({"BLOCK": 2}), []) and len(asked) == 1
