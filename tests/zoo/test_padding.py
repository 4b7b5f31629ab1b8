"""Padding on either side and holes, in every layer and pattern: positions, blocks, windows, states count real tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .cases import FEATURES, inputs

LENGTH, FULL, PADDINGS = 9, 16, (1, 2, 3, 4, 7)

# Blocks, strides and segments of 4 and a memory of 3, so that 9 tokens after 1 to 7 of padding meet every border.
STRIDED = dict(num_heads=2, stride=4)
LAYERS = {
    "softmax": ("softmax", dict(num_heads=2, rotary_base=100.0)),
    "blockwise": ("blockwise", dict(num_heads=3, max_length=20, block_size=4, qkv_features=18, rotary_base=100.0)),
    "local": ("local", dict(num_heads=2, window_size=3, rotary_base=100.0)),
    "strided": ("strided", STRIDED),
    "strided-separate": ("strided", dict(STRIDED, heads="separate")),
    "fixed": ("strided", dict(STRIDED, pattern="fixed", num_summary=2, distinct_summary=True, rotary_base=100.0)),
    "fixed-separate": ("strided", dict(STRIDED, num_heads=4, pattern="fixed", heads="separate")),
    "diagonal": ("diagonal", dict(num_heads=2, window_size=2, dilation=(3, 1), rotary_base=100.0)),
    "random": ("random", dict(num_heads=2, max_length=20, block_size=2, num_random=6, rotary_base=100.0)),
    "axial": ("axial", dict(num_heads=2, row_length=4, rotary_base=100.0)),
    "bigbird": ("bigbird", dict(num_heads=2, max_length=20, block_size=2, num_random=1, rotary_base=100.0)),
    "bigbird-etc": ("bigbird", dict(num_heads=2, max_length=20, block_size=2, num_random=1, num_global=3)),
    "longformer": ("longformer", dict(num_heads=2, window_size=2, num_global=3, rotary_base=100.0)),
    "reformer": ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=4)),
    "performer": ("performer", dict(num_heads=2, num_features=24, rotary_base=100.0)),
    "retention": ("retention", dict(num_heads=2, rotary_base=100.0)),
    "h_transformer": ("h_transformer", dict(num_heads=2, block_size=2, rotary_base=100.0)),
    "compressive": ("compressive", dict(num_heads=2, segment_length=4, memory_length=2, compressed_length=2, rate=2)),
    "compressive-used": (
        "compressive",
        dict(num_heads=2, segment_length=4, memory_length=2, compressed_length=2, rate=2, compression="most_used"),
    ),
    "transformer_xl": ("transformer_xl", dict(num_heads=2, segment_length=4, memory_length=3)),
    "memorizing": ("memorizing", dict(num_heads=2, segment_length=4, num_neighbors=2)),
    "infini": ("infini", dict(num_heads=2, segment_length=4, rotary_base=100.0)),
    "forgetting": ("forgetting", dict(num_heads=2, rotary_base=100.0)),
    "forgetting-pro": (
        "forgetting",
        dict(
            num_heads=2, rotary_base=100.0, use_output_gate=True, use_output_norm=True, use_qk_norm=True, use_kv_shift=True,
        ),
    ),
    "stickbreaking": ("stickbreaking", dict(num_heads=2, rotary_base=100.0)),
    "moba": ("moba", dict(num_heads=2, block_size=4, num_blocks=2, rotary_base=100.0)),
    "nsa": (
        "nsa",
        dict(
            num_heads=2, block_size=4, num_blocks=3, compression_size=4, compression_stride=2, window_size=3, rotary_base=100.0,
        ),
    ),
    "synthesizer": ("synthesizer", dict(num_heads=2, max_length=20, synthesis=("random", "dense"))),
    "s5": ("s5", dict(state_size=8)),
    "lru": ("lru", dict(state_size=8)),
    "mega": ("mega", dict(state_size=3, shared_features=4, value_features=8, chunk_size=4)),
    "gau": ("gau", dict(shared_features=4, value_features=8, bias="simple", max_length=20)),
    "flash": ("flash", dict(chunk_size=4, shared_features=4, value_features=8)),
    "dss": ("dss", dict(state_size=8, normalization="softmax", max_length=40)),
    "lightconv": ("lightconv", dict(num_heads=4, conv_width=4)),
    "dynamicconv": ("dynamicconv", dict(num_heads=4, conv_width=4)),
    "lsra": ("lsra", dict(num_heads=2, conv_width=4)),
    "deltanet": ("deltanet", dict(num_heads=2, value_features=8)),
    "mamba2": ("mamba2", dict(head_features=8, state_size=4)),
    "rwkv6": ("rwkv6", dict(head_features=8, mix_rank=4)),
    "mlstm": ("mlstm", dict(num_heads=2)),
    "rwkv4": ("rwkv4", dict(hidden_features=12)),
    "gated_deltanet": ("gated_deltanet", dict(num_heads=2)),
    "kda": ("kda", dict(num_heads=2)),
    "delta_product": ("delta_product", dict(num_heads=2)),
    "rwkv7": ("rwkv7", dict(head_features=8, gate_rank=4)),
    "rglru": ("rglru", dict(hidden_features=12, num_blocks=3)),
    "hyena": ("hyena", dict(max_length=20, filter_features=8, num_bands=3, frequency=1.0)),
    "hgrn": ("hgrn", dict(lower_bound=0.25)),
    "h3": ("h3", dict(head_features=2, state_size=4, conv_width=3)),
    "mamba": ("mamba", dict(hidden_features=12, state_size=4, step_rank=3)),
    "s4": ("s4", dict(state_size=8)),
    "s4-diagonal": ("s4", dict(state_size=8, mode="diagonal")),
}
BOTH = [
    pytest.param(label, is_causal, marks=() if label in zoo.LAYERS else pytest.mark.sample(2))
    for label, is_causal in itertools.product(LAYERS, (True, False))
    if is_causal or zoo.LAYERS[LAYERS[label][0]].supports.bidirectional
]


@functools.cache
def layer_of(label: str, is_causal: bool = True) -> nnx.Module:
    name, options = LAYERS[label]
    return zoo.make(name, in_features=FEATURES, is_causal=is_causal, rngs=nnx.Rngs(0), **options)


@functools.cache
def run(label: str, is_causal: bool = True):
    layer = layer_of(label, is_causal)
    return jax.jit(lambda x, mask=None: layer(x, mask=mask))


@functools.cache
def step(label: str):
    layer = layer_of(label)
    return jax.jit(lambda x, cache, mask=None: layer.extend(x, cache, mask=mask))


def places() -> np.ndarray:
    """Where the real tokens of each sample stand, [B, FULL]: after padding, around holes, before padding; one has fewer."""
    rng, at = np.random.default_rng(0), np.arange(FULL)
    after = [(padding <= at) & (at < padding + LENGTH) for padding in (0, *PADDINGS)]
    holes = [np.isin(at, rng.choice(FULL, count, replace=False)) for count in (LENGTH, LENGTH, 5)]
    return np.stack([*after, *holes])


def spread(x, real):
    """Each sample's tokens at its real places, and NaN elsewhere."""
    out = np.full((*real.shape, x.shape[-1]), np.nan, np.float32)
    for into, sample, at in zip(out, np.asarray(x), real, strict=True):
        into[at] = sample[: at.sum()]
    return out


def mask_of(real):
    return jnp.asarray(real)[:, None, None]


def check(outputs, real, alone):
    """The outputs at real tokens are those of each sample `alone`, a function of its number of tokens."""
    assert np.isfinite(outputs).all()
    for sample, at in enumerate(real):
        expected = np.asarray(alone(int(at.sum())))[sample]
        np.testing.assert_allclose(outputs[sample][at], expected, rtol=0, atol=2e-5 * abs(expected).max(), err_msg=str(at * 1))


@pytest.mark.parametrize("label,is_causal", BOTH)
def test_a_call(label, is_causal):
    real, x = places(), inputs(LENGTH, batch=len(places()))
    alone = functools.cache(lambda count: run(label, is_causal)(x[:, :count]))
    check(run(label, is_causal)(spread(x, real), mask_of(real)), real, alone)


@pytest.mark.parametrize("label", LAYERS)
def test_extend_in_any_cutting(label):
    real, x, layer = places(), inputs(LENGTH, batch=len(places())), layer_of(label)
    whole = step(label)(x, layer.init_cache(len(x), LENGTH))[0]
    for cuts in ([FULL], [5, 1, 5, 5], [1] * 11 + [5]):
        cache, outputs = layer.init_cache(len(x), LENGTH), []  # room for the real tokens, and for no padding
        for part in np.split(np.arange(FULL), np.cumsum(cuts)[:-1]):
            y, cache = step(label)(spread(x, real)[:, part], cache, mask_of(real[:, part]))
            outputs.append(y)
        check(np.concatenate(outputs, axis=1), real, lambda count: whole[:, :count])


@pytest.mark.parametrize("label", [label for label in LAYERS if hasattr(layer_of(label).init_cache(1, 1), "length")])
def test_only_the_samples_that_overflow_are_poisoned(label):
    layer, x = layer_of(label), inputs(5, batch=2)
    real = np.array([[1, 1, 0, 1, 1], [1, 0, 1, 0, 1]], bool)
    with pytest.raises(ValueError, match="cache must have room for 4 tokens, got room for 3"):
        layer.extend(x, layer.init_cache(2, 3), mask=mask_of(real))
    y, cache = step(label)(x, layer.init_cache(2, 3), mask_of(real))
    later, _ = step(label)(x[:, :1], cache, mask_of(real[:, :1]))
    assert jnp.isnan(y[0]).all() and jnp.isfinite(y[1]).all() and jnp.isnan(later).all()


@pytest.mark.parametrize("label", ["transformer_xl", "fixed"])
def test_three_layers(label):
    """In the call, in `extend` and in generation, whose prompts end in real tokens."""
    name, options = LAYERS[label]
    model = zoo.CausalLM(vocab_size=32, in_features=FEATURES, num_layers=3, mlp_features=0, max_length=40, mixer=name,
                         mixer_options=options, rngs=nnx.Rngs(3))  # fmt: skip
    for block in model.encoder.blocks:
        block.mixer.out.kernel[...] *= 8  # so that tokens are drawn for what is around them
    real = np.stack([np.isin(np.arange(FULL), np.linspace(padding, FULL - 1, LENGTH).round()) for padding in PADDINGS])
    own = np.random.default_rng(1).integers(1, 32, (len(real), LENGTH))
    padded = np.zeros(real.shape, int)
    padded[real] = own.ravel()

    @jax.jit
    def both(tokens, mask=None):
        return model(tokens, mask=mask), model.extend(tokens, model.init_cache(len(tokens), LENGTH), mask=mask)[0]

    expected = both(own)[0]
    for logits in both(padded, jnp.asarray(real)):
        check(logits, real, lambda count: expected)
    np.testing.assert_array_equal(model.generate(padded, 12, mask=jnp.asarray(real)), model.generate(own, 12))
