"""The rule that chooses an implementation, and what it says of its choice."""

import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest

from subquad import kernels
from subquad.kernels import dispatch, gpu, softmax, specs

OPERATIONS = {spec.operation: spec for spec in specs.load().values()}
ROOT = pathlib.Path(__file__).parents[2]


def answer(name):
    return lambda *args: name


def decline(reason):
    def run(*args):
        raise dispatch.Declined(reason)

    return run


def test_the_first_that_does_not_decline_runs():
    two = {"triton": decline("no."), "xla": answer("fast"), "reference": answer("slow")}
    assert dispatch.run("op", two, None) == "fast"
    assert dispatch.run("op", {"triton": answer("fused"), "xla": answer("fast")}, None) == "fused"


def test_the_reference_and_the_interpreter_run_by_name_only():
    names = {"interpret": answer("tested"), "reference": answer("slow"), "xla": decline("no.")}
    with pytest.raises(NotImplementedError, match="no."):
        dispatch.run("op", names, None)
    assert dispatch.run("op", names, "interpret") == "tested"
    assert dispatch.run("op", names, "reference") == "slow"
    assert dispatch.run("op", {"reference": answer("all there is")}, None) == "all there is"


def test_a_name_means_exactly_that_one():
    with pytest.raises(NotImplementedError, match="op: implementation='triton'.*xla"):
        dispatch.run("op", {"xla": answer("fast")}, "triton")
    with pytest.raises(NotImplementedError, match="op: implementation='triton' declines this call: too long."):
        dispatch.run("op", {"triton": decline("too long."), "xla": answer("fast")}, "triton")


def test_an_unknown_name_is_a_mistake():
    with pytest.raises(ValueError, match="'triton'"):
        dispatch.run("op", {"xla": answer("fast")}, "tritan")


def test_a_fault_is_not_taken_for_an_answer():
    def faulty():
        raise NotImplementedError("a fault of its own")

    with pytest.raises(NotImplementedError, match="fault"):
        dispatch.run("op", {"triton": faulty, "xla": answer("fast")}, None)


def test_explain_names_the_choice_and_the_reasons(capsys):
    def operation(x, implementation=None):
        names = {"cudnn": decline("no GPU."), "xla": lambda x: x, "interpret": lambda x: x, "reference": lambda x: x}
        return dispatch.run("op", names, implementation, x)

    dispatch.explain(operation, jnp.ones(3))
    dispatch.explain(operation, jnp.ones(3), implementation="reference")
    assert capsys.readouterr().out.splitlines() == [
        "op runs xla",
        "    cudnn     declines: no GPU.",
        "    xla       runs",
        "    interpret only by name",
        "    reference only by name",
        "op runs reference, asked for by name",
    ]


def test_explain_tells_of_what_is_compiled_already(capsys):
    """JAX has its trace in a cache, and would not choose again."""
    attend, query = jax.jit(lambda x: softmax.attention(x, x, x)), jnp.ones((1, 8, 2, 4))
    attend(query)
    for _ in range(2):
        dispatch.explain(attend, query)
        assert capsys.readouterr().out.startswith("softmax.attention runs ")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_none_always_runs_and_a_name_is_known_or_refused(operation):
    spec = OPERATIONS[operation]
    inexact, rest = specs.split(spec.draw(spec.lengths[len(spec.lengths) // 2]))
    plain, chosen = (jax.eval_shape(specs.forward(spec, name, rest), inexact) for name in ("xla", None))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(lambda x: (x.shape, x.dtype), chosen)
    with pytest.raises(ValueError, match="[a-z_.]+: implementation must be None or a known name, got 'tritan'.*'triton'"):
        jax.eval_shape(specs.forward(spec, "tritan", rest), inexact)
    if jax.default_backend() != "gpu":
        for name in ("triton", "cudnn"):
            with pytest.raises(NotImplementedError, match=f"[a-z_.]+: implementation='{name}' (declines|does not exist)"):
                jax.eval_shape(specs.forward(spec, name, rest), inexact)


@pytest.mark.aot
def test_the_choice_is_made_while_tracing(capsys):
    """For the GPU that is traced for, wherever that is."""
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU here")
    query = jnp.ones((1, 64, 2, 16))
    attend = jax.jit(lambda: softmax.attention(query, query, query))
    dispatch.explain(attend)
    with gpu.lowering_for(90):
        dispatch.explain(attend)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("softmax.attention runs")]
    assert said == ["softmax.attention runs xla", "softmax.attention runs triton"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_tile_sizes_are_no_arguments(operation):
    """They are a frozen configuration; and no implementation is chosen by position."""
    module, function = operation.split(".")
    parameters = inspect.signature(getattr(getattr(kernels, module), function)).parameters
    assert not {"config", "num_warps", "num_stages", "tile_size", "tiles", "block_q", "block_k"} & set(parameters)
    asked = parameters["implementation"]
    assert asked.kind is asked.KEYWORD_ONLY and asked.default is None


@pytest.mark.parametrize("part", ["kernels", "zoo"])
def test_no_environment_variable_decides(part):
    """But for those of other projects, in the files that talk to them."""
    for path in sorted((ROOT / part).rglob("*.py")):
        if path.name not in ("through_jax_triton.py", "interpreter.py"):
            assert "environ" not in path.read_text() and "getenv" not in path.read_text(), path


def test_an_error_lists_the_names_unless_they_are_very_many():
    few, many = ["causal", "plain"], [f"softmax.attention/window-{size}" for size in range(200)]
    assert dispatch.nearest("casual", few) == "Did you mean 'causal'? Known: causal, plain."
    said = dispatch.nearest("softmax.attention/windw-12", many)
    assert said.startswith("Did you mean 'softmax.attention/window-12'? 200 are known, such as ") and len(said) < 300
    assert dispatch.nearest("x", many).startswith("200 are known, such as softmax.attention/window-0, ")
