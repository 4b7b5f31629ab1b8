"""Luna: both attentions by hand, the causal form as means of prefixes, its sums in a cache, and the authors' code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo import masks
from subquad.zoo.lowrank.luna import LunaAttention, gate
from tests import oracle

FEATURES, HEADS, SLOTS = 16, 2, 5


def build(is_causal=False, **options):
    return LunaAttention(HEADS, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **{"num_slots": SLOTS, **options})


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def attend(query, key, value):
    """Softmax attention of [B, T, N, H] to [B, S, N, H], all weights stored."""
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5, -1)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def heads_of(projection, x):
    return jnp.einsum("btd,dnh->btnh", x, projection.kernel[...]) + projection.bias[...]


def dense(layer, x, context):
    """Section 3: y_P = Attn(p, context), y = Attn(x, y_P)."""
    value, unpack_value = (layer.key, layer.unpack_key) if layer.share_key_value else (layer.value, layer.unpack_value)
    slots = jnp.broadcast_to(layer.slots[...], (len(x), SLOTS, FEATURES))
    packed = attend(heads_of(layer.pack_query, slots), heads_of(layer.key, context), heads_of(value, context))
    packed = packed.reshape(len(x), SLOTS, -1)
    heads = attend(heads_of(layer.query, x), heads_of(layer.unpack_key, packed), heads_of(unpack_value, packed))
    return jnp.einsum("btnh,nhd->btd", heads, layer.out.kernel[...]) + layer.out.bias[...]


@pytest.mark.parametrize("share_key_value", [False, True])
def test_the_formula(share_key_value):
    layer, x, context = build(share_key_value=share_key_value), normal(2, 13, FEATURES), normal(2, 9, FEATURES, seed=1)
    np.testing.assert_allclose(layer(x), dense(layer, x, x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer(x, context), dense(layer, x, context), rtol=1e-4, atol=1e-6)


def test_a_gate_far_below_zero_keeps_its_digits():
    """elu(z) + 1 as a sum is 0 from -17 on."""
    found = gate(jnp.full((1, 1, 1), -20.0), jnp.ones((1, 1, 1)), "elu")
    np.testing.assert_allclose(found, np.exp(-20.0), rtol=1e-5)


@pytest.mark.parametrize("activation", ["softplus", "elu"])
@pytest.mark.parametrize("share_key_value", [False, True])
def test_a_causal_token_has_the_means_of_its_prefix(share_key_value, activation):
    """Outputs and every gradient, token by token."""
    layer, x = build(True, share_key_value=share_key_value, activation=activation), normal(2, 13, FEATURES)
    omega = {"softplus": lambda z: jnp.log2(1 + 2**z), "elu": lambda z: jnp.where(z > 0, z + 1, jnp.exp(z))}[activation]
    graph, params = nnx.split(layer)

    def by_hand(params, x):
        layer = nnx.merge(graph, params)
        slots = heads_of(layer.pack_query, layer.slots[...][None])[0]
        gates = omega(jnp.einsum("btnh,lnh->btnl", heads_of(layer.key, x), slots) * 8**-0.5)
        query, key = heads_of(layer.query, x), heads_of(layer.unpack_key, x)
        value = key if share_key_value else heads_of(layer.unpack_value, x)
        rows = []
        for t in range(x.shape[1]):
            keys, values = (jnp.einsum("bsnl,bsnh->blnh", gates[:, : t + 1], y[:, : t + 1]) / (t + 1) for y in (key, value))
            rows.append(attend(query[:, t : t + 1], keys, values))
        return jnp.einsum("btnh,nhd->btd", jnp.concatenate(rows, 1), layer.out.kernel[...]) + layer.out.bias[...]

    def loss(run, params, x):
        y = run(params, x)
        return jnp.sum(jnp.sin(y)), y

    runs = by_hand, lambda params, x: nnx.merge(graph, params)(x)
    wanted, found = (jax.jit(jax.grad(functools.partial(loss, run), (0, 1), has_aux=True))(params, x) for run in runs)
    assert oracle.relative_error(found, wanted) < 1e-5


def test_slots_of_zero_are_the_mean_of_all_tokens():
    """All weights of the packing are equal, and so are all slots: every token gets the same."""
    layer, x = build(share_key_value=False), normal(2, 13, FEATURES)
    layer.slots[...] = jnp.zeros((SLOTS, FEATURES))
    mean = layer.value(x).mean(1, keepdims=True).reshape(2, 1, -1)
    wanted = layer.out(layer.unpack_value(mean))
    np.testing.assert_allclose(layer(x), jnp.broadcast_to(wanted, x.shape), rtol=1e-4, atol=1e-6)


def test_the_order_of_tokens_is_nothing_to_the_slots():
    layer, x = build(), normal(2, 13, FEATURES)
    order = jax.random.permutation(jax.random.key(1), 13)
    np.testing.assert_allclose(layer(x[:, order]), layer(x)[:, order], rtol=1e-4, atol=1e-6)


def test_values_of_their_own_go_through_the_projection_of_the_keys():
    layer, x = build(), normal(2, 7, FEATURES)
    context, values = normal(2, 9, FEATURES, seed=1), normal(2, 9, FEATURES, seed=2)
    query, key, value = layer.project(x, context, values)
    np.testing.assert_array_equal(value, layer.key(values))
    wanted = layer.out(layer.attend(query, key, value, None))
    np.testing.assert_allclose(layer(x, context, values), wanted, rtol=1e-5, atol=1e-6)


def test_rows_without_keys_are_the_projection_of_nothing():
    layer, x = build(), normal(2, 7, FEATURES)
    layer.unpack_key.bias[...] = jnp.ones((HEADS, 8))
    y = layer(x, normal(2, 9, FEATURES, seed=1), mask=masks.padding_mask(jnp.array([9, 0]), 9))
    np.testing.assert_allclose(y[1], jnp.broadcast_to(layer.out.bias[...], (7, FEATURES)), atol=1e-6)


def test_the_cache_is_the_sums_over_the_tokens():
    layer, x = build(True), normal(2, 12, FEATURES)
    cache = layer.init_cache(2, 12)
    for piece in (x[:, :5], x[:, 5:6], x[:, 6:]):
        _, cache = layer.extend(piece, cache)
    slots = layer.pack_query(layer.slots[...][None])[0]
    gates = jnp.log2(1 + 2 ** (jnp.einsum("btnh,lnh->btnl", layer.key(x), slots) * 8**-0.5))
    key = layer.unpack_key(x)
    np.testing.assert_allclose(cache.keys, jnp.einsum("btnh,btnl->bnhl", key, gates), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cache.values, jnp.einsum("btnh,btnl->bnlh", key, gates), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cache.seen, 12)


@pytest.mark.parametrize("change,argument", [
    (dict(num_slots=0), "num_slots"), (dict(activation="relu", is_causal=True), "activation"),
    (dict(activation="softplus"), "activation"),
])
def test_refusals(change, argument):
    with pytest.raises(ValueError, match=rf"LunaAttention: {argument} must"):
        build(**change)


# The authors' code. Its p is another for each sample, as it comes from the layer before; it puts time first.

NAMES = {
    "pq_proj": "pack_query", "q_proj": "query", "pc_proj": "key", "c_proj": "unpack_key", "out_proj": "out",
    "pk_proj": "key", "pv_proj": "value", "k_proj": "unpack_key", "v_proj": "unpack_value",
}  # fmt: skip


@pytest.mark.parametrize("name", ["self", "self_pad", "self_untied", "causal_par", "causal_seq"])
def test_oracle(name):
    peer, is_causal = oracle.load(f"luna_{name}"), name.startswith("causal")
    empty = build(is_causal, num_slots=6, share_key_value=not name.endswith("untied"))

    def run(inputs, weights):
        pad = inputs.get("context_padding_mask", jnp.zeros((2, 20), bool))

        def sample(x, slots, pad):
            layer, mask = oracle.holding(empty, weights, NAMES), ~pad[None, None]
            layer.slots[...] = slots
            if is_causal:
                return {"y": layer(x)}
            # Queries at padding have outputs there, as if they were others than the keys.
            _, key, value = layer.project(x[None])
            packed = layer.pack(layer.pack_query(slots[None]), key, value, mask[None])
            return {"y": layer(x, 1 * x, mask=mask), "pcontext": packed[0]}

        return jax.vmap(sample, in_axes=(1, 1, 0), out_axes=1)(inputs["query"], inputs["pquery"], pad)

    oracle.compare("luna", peer, run)
