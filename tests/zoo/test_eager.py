"""A layer called eagerly compiles once per shape: the second call, gradient and step compile nothing."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from subquad import zoo
from tests.zoo.cases import CASES, DIRECTIONS, EXTENDING, inputs, label, one_direction, sampled


@contextlib.contextmanager
def compilations():
    """The names of the programs that are compiled inside."""
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            if (message := record.getMessage()).startswith("Compiling "):
                names.append(message)

    loggers = [logging.getLogger(f"jax._src.{module}") for module in ("interpreters.pxla", "compiler", "dispatch")]
    listener = Listener()
    with jax.log_compiles():
        for logger in loggers:
            logger.addHandler(listener)
        try:
            yield names
        finally:
            for logger in loggers:
                logger.removeHandler(listener)


def test_compilations_are_counted():
    with compilations() as compiled:
        jax.jit(lambda x: x * 3 + 2)(jnp.ones(5))
    assert compiled


@sampled
@pytest.mark.parametrize(("name", "is_causal"), one_direction(DIRECTIONS), ids=label)
def test_second_eager_call_compiles_nothing(name, is_causal):
    layer, mask = CASES[name].make(is_causal), jnp.ones((2, 1, 1, 9), bool)

    def call(seed):
        gradients = nnx.grad(lambda layer, x: jnp.sum(layer(x, mask=mask)), argnums=0)(layer, inputs(9, seed=seed))
        return layer(inputs(9, seed=seed), mask=mask), gradients

    call(0)
    with compilations() as compiled:
        call(1)
    assert not compiled


@sampled
@pytest.mark.parametrize("name", EXTENDING)
def test_second_eager_step_compiles_nothing(name):
    layer = CASES[name].make(True)
    _, cache = layer.extend(inputs(1), layer.init_cache(2, 5))
    with compilations() as compiled:
        layer.extend(inputs(1, seed=1), cache)
    assert not compiled


def test_second_generation_compiles_nothing():
    model = zoo.CausalLM(vocab_size=7, in_features=8, num_layers=1, mlp_features=8, max_length=9, mixer="performer",
                         mixer_options=dict(num_heads=2, num_features=4), rngs=nnx.Rngs(0))
    model.generate(jnp.ones((1, 3), jnp.int32), 4)
    with compilations() as compiled:
        model.generate(jnp.full((1, 3), 2, jnp.int32), 4)
    assert not [name for name in compiled if "generate" in name or "scan" in name]
