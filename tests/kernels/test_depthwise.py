"""Short convolutions against the definition in float64, cut into calls, with padding, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subquad.kernels import convolution

B, T, D = 2, 9, 6
IMPLEMENTATIONS = ("xla", "reference")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(inputs, kernel, is_causal):
    """The definition, one token and tap at a time."""
    (batch, length, features), (width, groups) = inputs.shape, kernel.shape[-2:]
    kernel = np.broadcast_to(kernel, (batch, length, width, groups)).astype(float)
    outputs, ahead = np.zeros(inputs.shape), 0 if is_causal else (width - 1) // 2
    for t in range(length):
        for j in range(width):
            if 0 <= t + ahead - j < length:
                outputs[:, t] += np.repeat(kernel[:, t, j], features // groups, -1) * inputs[:, t + ahead - j]
    return outputs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", [(1, 6), (4, 6), (5, 2), (B, T, 3, 1), (B, T, 12, 3)])
def test_against_the_definition(shape, is_causal, implementation):
    inputs, kernel = random(B, T, D), random(*shape, seed=1)
    got = convolution.depthwise(inputs, kernel, is_causal=is_causal, implementation=implementation)
    np.testing.assert_allclose(got, direct(inputs, kernel, is_causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (B, T, 5, 3), (1, 2)])
def test_cuts_change_nothing(shape):
    """Values and gradients, also where a call is shorter than the state."""
    inputs, kernel, weights = random(B, T, D), random(*shape, seed=1), random(B, T, D, seed=2)

    def cut(inputs, kernel, sizes):
        outputs, first, state = [], 0, None
        for size in sizes:
            taps = kernel[:, first : first + size] if kernel.ndim == 4 else kernel
            out, state = convolution.depthwise(
                inputs[:, first : first + size], taps, is_causal=True, initial_state=state, return_state=True
            )
            outputs.append(out)
            first += size
        return jnp.concatenate(outputs, 1)

    run = lambda sizes: jax.value_and_grad(lambda *x: jnp.sum(weights * cut(*x, sizes) ** 2), (0, 1))(inputs, kernel)
    for got, want in zip(jax.tree.leaves(run((1, 2, 1, 5))), jax.tree.leaves(run((T,))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (B, T, 5, 3)])
def test_padding_reaches_nothing(shape):
    """Whatever inputs and taps of padding hold; and a state ends with the last real token."""
    kept = np.ones((B, T), bool)
    kept[0, 6:] = kept[1, 0] = False
    inputs, kernel, weights = random(B, T, D), random(*shape, seed=1), random(B, T, D, seed=2)

    @jax.jit
    def run(number):
        tokens = jnp.where(kept[..., None], inputs, number)
        taps = jnp.where(kept[..., None, None], kernel, number) if kernel.ndim == 4 else kernel
        call = lambda *x: convolution.depthwise(*x, is_causal=True, mask=kept[:, None, None], return_state=True)
        (out, state), pull = jax.vjp(call, tokens, taps)
        return out, state, *pull((jnp.where(kept[..., None], weights, number), state))

    for got, want in zip(run(np.nan), run(0.0), strict=True):
        np.testing.assert_array_equal(got, want)
    short = kernel[:1, :6] if kernel.ndim == 4 else kernel
    _, want = convolution.depthwise(inputs[:1, :6], short, is_causal=True, return_state=True)
    np.testing.assert_array_equal(run(np.nan)[1][:1], want)
    assert not np.asarray(run(np.nan)[0])[~kept].any()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (B, T, 5, 3)])
def test_segments_are_as_alone(shape, is_causal):
    """Values and gradients, with padding, and with equal ids on both sides of another run."""
    inputs, kernel, weights = random(B, T, D), random(*shape, seed=1), random(B, T, D, seed=2)
    mask = jnp.asarray(np.arange(T) != 5)[None, None, None]

    def packed(inputs, kernel):
        ids = jnp.asarray([3] * 4 + [1] * 2 + [3] * 3)[None]
        return convolution.depthwise(inputs, kernel, is_causal=is_causal, mask=mask, segment_ids=ids)

    def alone(inputs, kernel):
        taps = lambda part: kernel[:, part] if kernel.ndim == 4 else kernel
        parts = [slice(0, 4), slice(4, 6), slice(6, 9)]
        return jnp.concatenate([
            convolution.depthwise(inputs[:, part], taps(part), is_causal=is_causal, mask=mask[..., part]) for part in parts
        ], 1)  # fmt: skip

    got, want = (jax.value_and_grad(lambda *x, f=f: jnp.sum(weights * f(*x)), (0, 1))(inputs, kernel) for f in (packed, alone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(packed(inputs, kernel), alone(inputs, kernel), rtol=1e-5, atol=1e-5)


def test_a_causal_kernel_is_that_of_convolve():
    inputs, kernel = random(B, T, D), random(4, D, seed=1)
    want = convolution.convolve(inputs, kernel.T, implementation="reference")
    np.testing.assert_allclose(convolution.depthwise(inputs, kernel, is_causal=True), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("taps", [(4, 64), (35, 8), (1, 4096, 7, 16)])
def test_memory_is_that_of_a_few_tokens(taps, dtype):
    """Taps are read where they lie, and no array of tokens by taps is made."""
    inputs, kernel = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((1, 4096, 64), taps))
    run = lambda u, k, g: jax.vjp(lambda *x: convolution.depthwise(*x, is_causal=True), u, k)[1](g)
    taps_bytes = 4 * 4096 * taps[-1] * taps[-2] if len(taps) == 4 else 0
    temporary = jax.jit(run).lower(inputs, kernel, inputs).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 7 * (4 * 4096 * 64) + 3 * taps_bytes


def test_what_is_refused():
    inputs, kernel = jnp.ones((B, T, D)), jnp.ones((4, D))
    cases = [
        ("inputs must have shape", ValueError, (inputs[0], kernel), {}),
        ("kernel must have shape .* N dividing D = 6", ValueError, (inputs, kernel[:, :4]), {}),
        ("kernel must have shape", ValueError, (inputs, kernel[None]), {}),
        ("return_state must be left out", ValueError, (inputs, kernel), dict(return_state=True)),
        ("initial_state must be left out", ValueError, (inputs, kernel), dict(initial_state=inputs[:, :3])),
        (r"initial_state must have shape .*\(2, 3, 6\)", ValueError, (inputs, kernel),
         dict(initial_state=inputs[:, :2], is_causal=True)),
        ("mask must be boolean", TypeError, (inputs, kernel), dict(mask=jnp.ones((B, 1, 1, T)))),
        ("mask must be key padding", ValueError, (inputs, kernel), dict(mask=jnp.ones((B, 1, T, T), bool))),
        ("return_state must be left out where there are segment_ids", ValueError, (inputs, kernel),
         dict(segment_ids=jnp.zeros((B, T), int), is_causal=True, return_state=True)),
        ("segment_ids must be integers", TypeError, (inputs, kernel), dict(segment_ids=jnp.ones((B, T)))),
        ("inputs must be floating-point", TypeError, (inputs.astype(int), kernel), {}),
    ]  # fmt: skip
    for message, kind, arrays, options in cases:
        with pytest.raises(kind, match=f"convolution.depthwise: {message}"):
            convolution.depthwise(*arrays, **options)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_taps_of_a_long_input(dtype, is_causal):
    """Their gradient is summed a few tokens at a time on a CPU."""
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    inputs, kernel, cotangent = normal(2, 2500, 3), normal(4, 3), normal(2, 2500, 3)
    got = jax.vjp(lambda k: convolution.depthwise(inputs, k, is_causal=is_causal), kernel)[1](cotangent)[0]
    padded = np.pad(np.float64(inputs), ((0, 0), (3, 3), (0, 0)))
    first = 3 if is_causal else 4
    want = [np.sum(padded[:, first - j : first - j + 2500] * np.float64(cotangent), (0, 1)) for j in range(4)]
    np.testing.assert_allclose(np.float64(got), want, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4, atol=1e-3)
