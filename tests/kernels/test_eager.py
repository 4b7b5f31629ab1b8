"""An operation that is called eagerly, as in a notebook, compiles once per shape: values and gradients."""

import jax
import pytest

from subquad.kernels import specs

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)
OPERATIONS = {spec.operation: spec for spec in reversed(specs.load().values())}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_second_call_compiles_nothing(operation):
    spec = OPERATIONS[operation]
    length = 150 if operation.startswith("linear") else 13  # several chunks
    inexact, rest = specs.split(spec.draw(length))

    def call():
        outputs, pull = jax.vjp(specs.forward(spec, "xla", rest), inexact)
        spec.call({**rest, **inexact}, "xla")
        pull(outputs)
        return COMPILED.copy()

    assert call()
    before = len(COMPILED)
    call()
    assert len(COMPILED) == before
