"""Published checkpoints: small random models of Hugging Face compute here what they compute there, and refusals."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad.zoo.interop import from_huggingface
from subquad.zoo.interop.bert import BigBirdOfEvaluation
from subquad.zoo.interop.reformer import AxialPositions
from tests import oracle
from tests.zoo import huggingface


def call(model, peer):
    given = {name: jnp.asarray(array) for name, array in peer.inputs.items() if name != "tokens"}
    tokens = jnp.asarray(peer.inputs["tokens"], jnp.int32)
    return nnx.jit(lambda model, tokens, given: model(tokens, **given))(model, tokens, given)


def loaded(peer):
    result = from_huggingface(peer.meta["config"], peer.weights, mixer_options=peer.meta["call"])
    for block in result.model.encoder.blocks:
        if hasattr(block.mixer, "rotations"):
            block.mixer.rotations[...] = jnp.asarray(peer.constants["rotations"])
    return result


def check(peer) -> None:
    model, unused = loaded(peer)
    known = "pooler", "_global.", "lm_head.bias", "_float_tensor"  # the third of a Reformer, beside one that is used
    assert not [key for key in unused if not any(word in key for word in known)], unused
    outputs = np.asarray(call(model, peer))
    mask = peer.inputs.get("mask", np.ones(outputs.shape[:2], bool))[..., None]
    oracle.check(None, peer, ({"y": np.where(mask, outputs, 0)}, peer.outputs))


@pytest.mark.parametrize("name", huggingface.MODELS)
def test_logits(name):
    check(oracle.load(f"huggingface/{name}"))


@pytest.mark.parametrize("name", huggingface.MODELS)
def test_logits_of_what_is_installed(name):
    pytest.importorskip("torch", reason="torch is not installed: pip install -e .[interop]")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[interop]")
    kind = huggingface.MODELS[name][0]
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    check(huggingface.run(name))


# What a user meets.


@pytest.fixture
def fnet():
    return oracle.load("huggingface/fnet")


def test_without_a_head_it_gives_features(fnet):
    """With the encoder's names as they are in a checkpoint of the bare model; the head's are then not there."""
    prefix = "fnet."
    bare = {key.removeprefix(prefix): array for key, array in fnet.weights.items() if key.startswith(prefix)}
    model, unused = from_huggingface(fnet.meta["config"], bare)
    whole, _ = loaded(fnet)
    tokens = jnp.asarray(fnet.inputs["tokens"], jnp.int32)
    assert model.head is None and unused == ("pooler.dense.weight", "pooler.dense.bias")
    np.testing.assert_array_equal(model(tokens), whole.encoder(tokens))


def test_says_what_it_did_not_use(fnet):
    extra = {"classifier.weight": np.ones((2, 16))}
    unused = from_huggingface(fnet.meta["config"], extra | fnet.weights).unused
    assert unused == ("classifier.weight", "fnet.pooler.dense.weight", "fnet.pooler.dense.bias")


def test_an_own_output_map():
    """Where embeddings are not tied; a tied checkpoint that holds a copy of them has no key left."""
    peer = oracle.load("huggingface/big_bird")
    own = {**peer.weights, "cls.predictions.decoder.weight": np.ones((40, 16), np.float32)}
    model, _ = from_huggingface({**peer.meta["config"], "tie_word_embeddings": False}, own)
    np.testing.assert_array_equal(model.head.out.kernel[...], 1)
    assert "cls.predictions.decoder.weight" in from_huggingface(peer.meta["config"], own).unused


def test_half_precision(fnet):
    model, _ = from_huggingface(fnet.meta["config"], fnet.weights, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    outputs = call(model, fnet)
    assert outputs.dtype == jnp.bfloat16 and oracle.relative_error(outputs, fnet.outputs["y"]) < 0.1


def test_it_trains(fnet):
    """Gradients of all parameters, and dropout."""
    model, _ = loaded(fnet)
    gradients = nnx.grad(lambda model: jnp.sum(call(model, fnet) ** 2))(model)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    tokens = jnp.asarray(fnet.inputs["tokens"], jnp.int32)
    still = model(tokens)
    model.train()
    assert np.abs(model(tokens, rngs=nnx.Rngs(dropout=0)) - still).max() > 0.01


@pytest.mark.parametrize(("change", "words"), [
    ({"model_type": "gpt2"}, r"config\['model_type'\] must be one of .*fnet.*, got 'gpt2'"),
    ({"is_decoder": True}, r"config\['is_decoder'\] must be False, got True"),
    ({"hidden_act": "gelu_10"}, "the activation must be a known name, got 'gelu_10'"),
    ({"vocab_size": 41}, r"state\['fnet.embeddings.word_embeddings.weight'\] must become one of shape \(41, 16\)"),
    ({"intermediate_size": 25}, r"state\['fnet.encoder.layer.0.*.dense.*'\] must become one of shape \(1?.?.?25"),
    ({"num_hidden_layers": 3}, r"state must have fnet.encoder.layer.2.*, got none for encoder.blocks.2"),
])
def test_refusals(fnet, change, words):
    with pytest.raises(ValueError, match=f"from_huggingface: {words}"):
        from_huggingface({**fnet.meta["config"], **change}, fnet.weights)


def test_a_config_that_lacks_an_entry(fnet):
    config = {word: value for word, value in fnet.meta["config"].items() if word != "hidden_size"}
    with pytest.raises(ValueError, match=r"config\['hidden_size'\] must be there, got none. Pass the whole config.json"):
        from_huggingface(config, fnet.weights)


def test_token_types_and_a_layer_s_own_options():
    peer = oracle.load("huggingface/big_bird")
    model, _ = from_huggingface(peer.meta["config"], peer.weights, mixer_options=dict(implementation="reference"))
    assert model.encoder.blocks[1].mixer.implementation == "reference"
    with pytest.raises(ValueError, match="PublishedEncoder: token_types must be in 0..1, got 2"):
        model(jnp.zeros((1, 5), jnp.int32), token_types=jnp.full((1, 5), 2))


# Layers that are here for the sake of checkpoints.


def test_a_nystromformer_keeps_samples_apart():
    """There the iteration starts from one number of the whole batch."""
    peer = oracle.load("huggingface/nystromformer")
    model, _ = loaded(peer)
    tokens = jnp.asarray(peer.inputs["tokens"], jnp.int32)
    alone = jnp.concatenate([model.encoder(tokens[i : i + 1]) for i in range(2)])
    np.testing.assert_allclose(model.encoder(tokens), alone, rtol=1e-4, atol=1e-5)


def test_big_bird_counts_its_first_block_again():
    layer = BigBirdOfEvaluation(2, 8, block_size=2, num_random=3, rngs=nnx.Rngs(0))
    block, length = np.arange(26) // 2, 26
    seen = (abs(block[:, None] - block) <= 1) | np.isin(block, [0, 12]) | np.isin(block, [0, 12])[:, None]
    np.testing.assert_array_equal(layer.pattern(length)[0], seen)
    assert layer.pattern(22).all()
    weights = seen * np.where((block == 0) & ~np.isin(block, [0, 12])[:, None], 4.0, 1.0)
    heads = [jax.random.normal(jax.random.key(i), (1, length, 2, 4)) for i in range(3)]
    shares = weights * np.exp(np.einsum("btnh,bsnh->bnts", *heads[:2]) / 2)
    wanted = np.einsum("bnts,bsnh->btnh", shares / shares.sum(-1, keepdims=True), heads[2])
    np.testing.assert_allclose(layer.attend(*heads, None), wanted, rtol=1e-5, atol=1e-6)
    mask = jnp.arange(length) >= 3  # of the first block nothing is left
    shares = shares * np.asarray(mask)
    wanted = np.einsum("bnts,bsnh->btnh", shares / shares.sum(-1, keepdims=True), heads[2])
    np.testing.assert_allclose(layer.attend(*heads, mask[None, None, None]), wanted, rtol=1e-5, atol=1e-6)


def test_axial_positions():
    table = AxialPositions((3, 4), (2, 5), param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    at = jnp.array([[0, 5, 11]])
    np.testing.assert_array_equal(table(at)[0, :, :2], table.rows[...][jnp.array([0, 1, 2])])
    np.testing.assert_array_equal(table(at)[0, :, 2:], table.columns[...][jnp.array([0, 1, 3])])


def test_longt5_shares_its_biases():
    """So that they stay one in training."""
    model, _ = loaded(oracle.load("huggingface/longt5"))
    first, second = (block.mixer for block in model.encoder.blocks)
    assert first.bias is second.bias and first.global_bias is second.global_bias


@pytest.mark.parametrize(("name", "change", "words"), [
    ("longformer", {"pad_token_id": 0}, r"config\['pad_token_id'\] must be 1, got 0"),
    ("big_bird", {"attention_type": "full"}, r"config\['attention_type'\] must be 'block_sparse' or 'original_full', got"),
    ("nystromformer", {"inv_coeff_init_option": True}, r"config\['inv_coeff_init_option'\] must be False"),
    ("longt5", {"layer_norm_epsilon": 1e-5}, r"config\['layer_norm_epsilon'\] must be 1e-06"),
    ("reformer", {"num_buckets": None}, r"config\['num_buckets'\] must be even, .* got None"),
    ("reformer", {"is_decoder": False}, r"config\['is_decoder'\] must be True"),
    ("mega", {"normalization_type": "rmsnorm"}, r"config\['normalization_type'\] must be 'layernorm' or 'scalenorm'"),
    ("mega", {"bidirectional": False}, r"config\['bidirectional'\] must be True"),
])
def test_what_no_layer_does_is_refused(name, change, words):
    peer = oracle.load(f"huggingface/{name}")
    with pytest.raises(ValueError, match=f"from_huggingface: {words}"):
        from_huggingface({**peer.meta["config"], **change}, peer.weights)


def test_a_nystromformer_of_as_many_landmarks_as_tokens():
    """As many landmarks as tokens, without a convolution: it is softmax attention there."""
    peer = oracle.load("huggingface/nystromformer")
    change = dict(num_landmarks=32, conv_kernel_size=None)
    model, unused = from_huggingface(peer.meta["config"] | change, peer.weights)
    assert type(model.encoder.blocks[0].mixer).__name__ == "SoftmaxAttention" and all("conv" in key for key in unused)


def test_a_causal_mega_extends():
    """Its chunks of tokens, and the norm within the layer, one token after the other."""
    peer = oracle.load("huggingface/mega_chunks")
    model, _ = loaded(peer)
    block = model.encoder.blocks[0]
    x = jax.random.normal(jax.random.key(0), (2, 12, 16))
    first, cache = block.extend(x[:, :5], block.mixer.init_cache(2, 12))
    rest, _ = block.extend(x[:, 5:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), block(x), rtol=1e-4, atol=1e-5)
