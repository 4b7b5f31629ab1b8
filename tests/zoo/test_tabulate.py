"""`nnx.tabulate` compiles every public method that a call goes through, and one that fails spoils the tables after it."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .cases import CASES, DIRECTIONS, FEATURES, SIBLINGS, inputs

MODEL = dict(vocab_size=16, in_features=FEATURES, mlp_features=32, max_length=20)


@pytest.mark.parametrize("left_out", [SIBLINGS, pytest.param([], marks=pytest.mark.full)], ids=["families", "all"])
def test_layers_and_models_one_after_the_other(left_out):
    strided = dict(num_heads=4, in_features=FEATURES, stride=4)
    layers = [CASES[name].make(is_causal) for name, is_causal in DIRECTIONS if name not in left_out]
    layers += [
        zoo.StridedAttention(**strided, heads="separate", rngs=nnx.Rngs(0)),
        zoo.StridedAttention(**strided, heads="separate", pattern="fixed", distinct_summary=True, rngs=nnx.Rngs(0)),
    ]
    mask = jnp.ones((2, 1, 1, 7), bool).at[0, ..., :2].set(False)
    for layer in layers:
        size = sum(np.size(leaf[...]) for _, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param)))
        assert f"{size:,}" in nnx.tabulate(layer, inputs(7), mask=mask), type(layer).__name__

    tokens = jnp.ones((2, 7), jnp.int32)
    two = dict(num_layers=2, mixer=["blockwise", "s4"], mixer_options=[CASES["blockwise"].options, None])
    one = dict(MODEL, num_layers=1, mixer="local", mixer_options=dict(num_heads=2))
    for model, arguments in (
        (zoo.Encoder(**MODEL, **two, rngs=nnx.Rngs(0)), (tokens,)),
        (zoo.Classifier(3, **one, rngs=nnx.Rngs(0)), (tokens,)),
        (zoo.DualEncoder(3, **one, rngs=nnx.Rngs(0)), (tokens, tokens)),
        (zoo.CausalLM(**one, rngs=nnx.Rngs(0)), (tokens,)),
    ):
        assert type(model).__name__ in nnx.tabulate(model, *arguments)
