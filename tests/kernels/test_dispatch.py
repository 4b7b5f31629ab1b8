"""The rule that chooses an implementation, and what it says of its choice."""

import jax.numpy as jnp
import pytest

from subquad.kernels import dispatch


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
