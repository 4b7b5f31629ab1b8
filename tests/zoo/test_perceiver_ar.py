"""Perceiver AR: a causal Transformer where all tokens are latents, and its layers by hand where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.lra.bench import measure

OPTIONS = dict(
    vocab_size=11, in_features=16, num_layers=3, mlp_features=8, max_length=32, mixer="softmax",
    mixer_options=dict(num_heads=4, num_kv_heads=2, rotary_base=100.0),
)  # fmt: skip
TOKENS = jax.random.randint(jax.random.key(0), (2, 13), 0, 11)


def both(num_latents, **options):
    """The model and a causal Transformer with the same parameters, away from their initial values."""
    options = OPTIONS | options
    model, other = zoo.PerceiverAR(num_latents, **options, rngs=nnx.Rngs(0)), zoo.CausalLM(**options, rngs=nnx.Rngs(1))
    state = nnx.state(other)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    state = tree.unflatten([x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])
    nnx.update(model, state)
    nnx.update(other, state)
    return model, other


def by_hand(other, tokens, mask, count):
    """The first block of all tokens, of which the last go on alone."""
    encoder = other.encoder
    keys = None if mask is None else mask[:, None, None]
    hidden = encoder.embed_at(tokens, zoo.positions.positions_of_real(tokens, mask), mask)
    hidden = encoder.layers[0](hidden, mask=keys)[:, -count:]
    for block in encoder.layers[1:]:
        hidden = block(hidden, mask=None if keys is None else keys[..., -count:])
    return other.project(encoder.norm(hidden))


def check(model, other, want, tokens, mask=None):
    """Logits and all gradients."""
    weight = jax.random.normal(jax.random.key(2), jax.eval_shape(want, other).shape)
    if mask is not None:
        weight *= mask[:, -weight.shape[1] :, None]

    def loss(model, call):
        logits = call(model)
        return jnp.sum(logits * weight), logits * (weight != 0)

    found, wanted = (
        nnx.jit(nnx.grad(lambda model, call=call: loss(model, call), has_aux=True))(one)
        for one, call in ((model, lambda model: model(tokens, mask=mask)), (other, want))
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)
    jax.tree.map(close, *(jax.tree.leaves(x) for x in (found, wanted)))


@pytest.mark.parametrize("num_latents", [13, 20])
def test_all_tokens_as_latents_are_a_causal_transformer(num_latents):
    model, other = both(num_latents)
    check(model, other, lambda other: other(TOKENS), TOKENS)


def test_the_definition():
    """Padding on the left of one sample reaches its latents."""
    model, other = both(5)
    mask = jnp.ones((2, 13), bool).at[0, :10].set(False).at[1, :3].set(False)
    check(model, other, lambda other: by_hand(other, TOKENS, mask, 5), TOKENS, mask)


def test_one_layer_is_that_of_the_last_tokens():
    model, other = both(4, num_layers=1)
    np.testing.assert_allclose(model(TOKENS), other(TOKENS)[:, -4:], atol=1e-5)


def test_padding_on_the_left_changes_nothing():
    model, _ = both(5)
    padded = jnp.concatenate([jnp.full((2, 6), 3), TOKENS], axis=1)
    mask = jnp.broadcast_to(jnp.arange(19) >= 6, (2, 19))
    np.testing.assert_allclose(model(padded, mask=mask), model(TOKENS), atol=1e-5)


def test_depth_costs_by_latents():
    """A further layer adds as much at 512 tokens as at 256."""

    def flops(length, layers):
        options = OPTIONS | dict(max_length=length, num_layers=layers)
        model = nnx.eval_shape(lambda: zoo.PerceiverAR(8, **options, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((1, length), int)
        return measure.flops(jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state, tokens)

    more = [flops(length, 2) - flops(length, 1) for length in (256, 512)]
    assert more[0] == more[1] > 0


@pytest.mark.parametrize(("word", "options"), [
    ("num_latents", dict(num_latents=0)), ("mixer", dict(mixer="linear")), ("norm_order", dict(norm_order="post")),
    ("reversible", dict(reversible=True)), ("remat", dict(remat=True)), ("norm", dict(norm="batch")),
])  # fmt: skip
def test_another_model_is_refused(word, options):
    with pytest.raises(ValueError, match=f"PerceiverAR: {word} must"):
        zoo.PerceiverAR(**{"num_latents": 4, **OPTIONS, **options}, rngs=nnx.Rngs(0))


def test_what_it_does_not_do_is_refused():
    model, _ = both(4)
    with pytest.raises(ValueError, match="PerceiverAR does not support segment_ids"):
        model(TOKENS, segment_ids=jnp.zeros((2, 13), int))
    with pytest.raises(ValueError, match="PerceiverAR does not support extend"):
        model.generate(TOKENS, 3)
