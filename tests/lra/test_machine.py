"""What rows of results say of this machine."""

import os

import pytest

from subquad.lra import machine


def test_the_environment_names_commit_versions_and_hardware():
    found = machine.environment()
    assert len(found["commit"].removesuffix("+changes")) == 40 or found["commit"] == "unknown"
    assert {part.split()[0] for part in found["versions"].split(", ")} >= {"python", "jax", "flax", "optax"}
    assert "core" in found["hardware"] or " x " in found["hardware"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs processor affinity")
def test_the_cores_are_those_allowed():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
