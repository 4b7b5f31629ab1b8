"""DSS: its kernels by the formulas, convolution = scan = steps, modes that grow, and the authors' implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.kernels import convolution
from subquad.zoo.statespace.dss import DSS
from tests import oracle

FEATURES, STATE, LONGEST = 4, 8, 24
SOFTMAX = dict(normalization="softmax", max_length=LONGEST)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(**options):
    layer = DSS(FEATURES, **dict(state_size=STATE) | options, rngs=nnx.Rngs(0))
    layer.log_step[...] += 0.2 * normal(*layer.log_step[...].shape)  # the two steps apart
    return layer


def growing(layer):
    """With every other mode growing, some by several times the others."""
    layer.growth[...] = jnp.asarray([-0.5, 0.5, -2.0, 3.0] * 2)
    return layer


def taps(layer, length):
    """Of each direction by the formulas, in complex128."""
    real = -np.exp(np.float64(layer.log_decay[...])) if layer.max_length is None else np.float64(layer.growth[...])
    modes, step = real + 1j * np.float64(layer.frequency[...]), np.exp(np.float64(layer.log_step[...]))
    exponent = step[:, :1] * modes.real + 1j * step[:, -1:] * modes.imag
    w = np.float64(layer.output_matrix[...]) @ [1, 1j]
    powers = np.exp(exponent[..., None] * np.arange(layer.max_length or length))
    if layer.max_length is None:
        weights = w * (np.exp(exponent) - 1) / modes
    else:
        guarded = np.abs(modes * (np.exp(layer.max_length * np.where(modes.real > 0, -1, 1) * exponent) - 1)) ** 2
        weights, powers = w / modes * guarded / (guarded + 1e-7), powers / powers.sum(-1, keepdims=True)
    return np.einsum("kdn,dnl->kdl", weights, powers)[..., :length].real


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", ["exp", "softmax", "growing"])
def test_the_kernel(kind, separate):
    layer = build(separate_steps=separate, **({} if kind == "exp" else SOFTMAX))
    layer = growing(layer) if kind == "growing" else layer
    for length in (LONGEST, 7):
        want = taps(layer, length)
        np.testing.assert_allclose(layer.kernel(length), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["exp", "softmax", "growing"])
def test_a_call_is_the_convolution(kind, is_causal):
    """Whether by the kernel or by a scan. The second direction begins with the next token."""
    layer, x = build(is_causal=is_causal, **({} if kind == "exp" else SOFTMAX)), normal(2, 9, FEATURES)
    layer = growing(layer) if kind == "growing" else layer
    y, kernels = np.array(layer.skip[...]) * x, taps(layer, 9)
    for t in range(9):
        for s in range(t + 1 if is_causal else 9):
            y[:, t] += (kernels[0, :, t - s] if s <= t else kernels[1, :, s - t - 1]) * x[:, s]
    want = jax.nn.gelu(y, approximate=False) @ layer.out.kernel[...] + layer.out.bias[...]
    np.testing.assert_allclose(layer(x), want, atol=2e-5)


@pytest.mark.parametrize("kind", ["exp", "softmax", "growing"])
def test_convolution_equals_recurrence_and_steps(kind):
    layer, x = build(is_causal=True, **({} if kind == "exp" else SOFTMAX)), normal(2, LONGEST, FEATURES)
    layer = growing(layer) if kind == "growing" else layer
    extend = jax.jit(lambda x, cache: layer.extend(x, cache))
    want, cache, parts = layer(x), layer.init_cache(2, LONGEST), []
    for start, stop in ((0, 15), *((t, t + 1) for t in range(15, LONGEST))):
        y, cache = extend(x[:, start:stop], cache)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=2e-5)
    if kind != "exp":  # the kernel ends, and a cache that is past it does not look like an answer
        assert jnp.isnan(extend(x[:, :1], cache)[0]).all()


def test_a_mode_that_grows_beyond_a_state_is_nan_in_extend():
    layer, x = build(is_causal=True, dt_min=1.0, dt_max=1.0, **SOFTMAX), normal(1, 3, FEATURES)
    layer.growth[...] = jnp.full(STATE, 20.0)
    assert jnp.isfinite(layer(x)).all()
    assert jnp.isnan(layer.extend(x, layer.init_cache(1, 3))[0]).all()


def test_exp_is_s4d_by_zero_order_hold():
    """With B = 1, all C free, and one step; a mode of each conjugate pair stands for both there."""
    layer = DSS(FEATURES, state_size=STATE, is_causal=True, rngs=nnx.Rngs(0))
    s4d = zoo.S4(FEATURES, state_size=2 * STATE, mode="diagonal", num_ssm=1, is_causal=True, glu=False, rngs=nnx.Rngs(1))
    system = s4d.system
    system.log_decay[...], system.frequency[...] = layer.log_decay[...][None], layer.frequency[...][None]
    system.input_matrix[...] = jnp.asarray([1.0, 0.0]) * jnp.ones((1, STATE, 2))
    system.output_matrix[...], system.log_step[...] = layer.output_matrix[...] / 2, layer.log_step[:, 0]
    # B_bar is (exp(a) - 1) / lambda there too.
    s4d.skip[...] = layer.skip[...]
    nnx.update(s4d.out, nnx.state(layer.out))
    x = normal(2, 30, FEATURES)
    np.testing.assert_allclose(s4d(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["exp", "softmax"])
def test_packed_sequences_are_as_alone(kind):
    layer, x = build(**({} if kind == "exp" else SOFTMAX)), normal(2, 17, FEATURES)
    run = jax.jit(lambda x, ids=None: layer(x, segment_ids=ids))
    packed = run(x, jnp.asarray([3] * 6 + [1] * 4 + [3] * 7))
    alone = jnp.concatenate([run(x[:, :6]), run(x[:, 6:10]), run(x[:, 10:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize(("options", "words"), [
    (dict(state_size=0), "state_size must be a positive integer"), (dict(normalization="sum"), "normalization"),
    (dict(normalization="softmax"), "max_length must be given with 'softmax', got None"),
    (dict(max_length=9), "max_length must be None with 'exp'"), (dict(SOFTMAX, max_length=-1), "max_length must be a positive"),
    (dict(dt_min=0.2), r"dt_min must be a number in \(0, 0.1\]"), (dict(gate="glu"), "gate must be a known name"),
])  # fmt: skip
def test_refusals(options, words):
    with pytest.raises(ValueError, match=f"DSS: {words}"):
        DSS(FEATURES, **options, rngs=nnx.Rngs(0))


def test_more_tokens_than_taps():
    layer = build(is_causal=True, **SOFTMAX)
    with pytest.raises(ValueError, match="DSS: inputs_q must be at most the layer's max_length = 24 tokens, got 25"):
        layer(normal(2, LONGEST + 1, FEATURES))
    with pytest.raises(ValueError, match="DSS: max_length must be at most the layer's max_length = 24 tokens, got 25"):
        layer.init_cache(2, LONGEST + 1)


@pytest.mark.parametrize("name", ["dss_exp", "dss_exp_no_scale", "dss_softmax"])
def test_oracle(name):
    """The authors' kernels and convolutions; "no scale" leaves (exp(a) - 1) / lambda out, which w can do here."""
    peer = oracle.load(name)
    layer = DSS(FEATURES, state_size=STATE, is_causal=True, **(SOFTMAX if "softmax" in name else {}), rngs=nnx.Rngs(0))

    def run(inputs, w):
        ours = nnx.clone(layer)
        ours.log_step[...], ours.output_matrix[...] = w["log_dt"], w["W"]
        if "softmax" in name:
            ours.growth[...], ours.frequency[...] = w["Lambda"].T
        else:
            ours.log_decay[...], ours.frequency[...] = w["Lambda_log_neg_re"], w["Lambda_im"]
        if "no_scale" in name:
            exponent, scaled = ours.system()
            plain = jax.lax.complex(w["W"][..., 0], w["W"][..., 1])
            numbers = plain * plain / jnp.where(scaled == 0, 1, scaled)
            ours.output_matrix[...] = jnp.stack([numbers.real, numbers.imag], -1)
        K = ours.kernel(LONGEST)
        y = convolution.convolve(inputs["u"].swapaxes(1, 2), K[0]).swapaxes(1, 2)
        return {"K": K, "y": y}

    # Theirs ran in float32, and takes exp(a) - 1 without expm1: its gradient of lambda is 8e-5 from that in float64.
    oracle.compare("dss", peer, run, of="mechanism", tolerance=1e-4)
