"""What rows of results say of this machine."""

from subquad.lra import machine


def test_the_environment_names_commit_versions_and_hardware():
    found = machine.environment()
    assert len(found["commit"].removesuffix("+changes")) == 40 or found["commit"] == "unknown"
    assert {part.split()[0] for part in found["versions"].split(", ")} >= {"python", "jax", "flax", "optax"}
    assert "core" in found["hardware"] or " x " in found["hardware"]
