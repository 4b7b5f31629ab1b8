"""BlockwiseAttention: the permutations of BlockBERT, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo

from .patterned import FEATURES, check_dense, check_extend, check_support, inputs, padding


def make(max_length, block_size, is_causal=False, heads=4, **options):
    return zoo.BlockwiseAttention(
        heads, FEATURES, max_length=max_length, block_size=block_size, is_causal=is_causal, rngs=nnx.Rngs(0), **options
    )


CASES = [
    (dict(max_length=30, block_size=15), False),
    (dict(max_length=30, block_size=8, shifts=(0, 1, 2, 3)), False),
    (dict(max_length=100, block_size=7, shifts=(-1, 14, 3, -16)), False),
    (dict(max_length=30, block_size=8), True),
    (dict(max_length=100, block_size=7, shifts=(1, -3, 15, -14)), True),
]


@pytest.mark.parametrize(("options", "is_causal"), CASES)
def test_attends_to_its_pattern_and_nothing_else(options, is_causal):
    check_support(make(is_causal=is_causal, **options), 29)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("options", "is_causal"), CASES)
@pytest.mark.parametrize("length", [1, 29])
def test_is_softmax_attention_under_its_pattern(options, is_causal, length):
    check_dense(make(is_causal=is_causal, **options), length, padding(length))


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_the_masking_matrices_of_the_paper(blocks):
    """M_ij = 1 where pi(floor(i n / N)) = floor(j n / N), with the shifts of the identity as permutations pi."""
    length = 12
    layer = make(length, length // blocks, shifts=range(4))
    permutations = [tuple((i + shift) % blocks for i in range(blocks)) for shift in range(4)]
    assert len(set(permutations)) == blocks
    for head, permutation in enumerate(permutations):
        for i, j in np.ndindex(length, length):
            assert layer.pattern(length)[head, i, j] == (permutation[i * blocks // length] == j * blocks // length)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_block_is_softmax_attention(is_causal):
    layer = make(40, 40, is_causal)
    full = zoo.SoftmaxAttention(4, FEATURES, is_causal=is_causal, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    np.testing.assert_allclose(layer(inputs(33)), full(inputs(33)), atol=2e-6)


def test_the_identity_is_a_sequence_per_block():
    layer = make(32, 8, shifts=(0,) * 4)
    full = zoo.SoftmaxAttention(4, FEATURES, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(layer))
    x = inputs(32)
    np.testing.assert_allclose(layer(x), full(x.reshape(8, 8, FEATURES)).reshape(x.shape), atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "blocks", "division"), [(12, 3, [8, 2, 2]), (12, 2, [10, 2]), (1, 3, [1, 0, 0]), (2, 3, [1, 1, 0])]
)
def test_the_papers_division_of_heads(heads, blocks, division):
    layer = zoo.BlockwiseAttention(heads, 4 * heads, max_length=60, block_size=60 // blocks, rngs=nnx.Rngs(0))
    assert np.bincount(np.mod(layer.shifts, blocks), minlength=blocks).tolist() == division


def test_a_shorter_input_is_a_padded_one():
    layer, x = make(48, 8), inputs(48)
    mask = jnp.broadcast_to(jnp.arange(48) < 21, (2, 1, 1, 48))
    np.testing.assert_allclose(layer(x, mask=mask)[:, :21], layer(x[:, :21]), atol=2e-6)


def test_causal_heads_look_back_and_the_first_blocks_see_nothing():
    layer = make(32, 8, is_causal=True)
    assert layer.shifts == (0, 0, -1, -2)
    seen = layer.pattern(32).any(2)
    assert seen[:2].all()
    assert not seen[2, :8].any() and seen[2, 8:].all()
    assert not seen[3, :16].any() and seen[3, 16:].all()


@pytest.mark.parametrize("cuts", [[40], [1] * 40, [3, 17, 20], [25, 1, 14], [8, 8, 24]], ids=str)
@pytest.mark.parametrize("options", [{}, {"shifts": (1, -2, 5, 0)}], ids=str)
def test_extend_in_any_cutting(cuts, options):
    check_extend(make(45, 8, is_causal=True, **options), 40, cuts, padding(40), max_length=42)


def test_extend_reads_two_blocks_of_the_cache():
    layer = make(4096, 16, is_causal=True)
    cache = layer.init_cache(1, 4096)
    text = str(jax.make_jaxpr(lambda x, cache: layer.extend(x, cache))(inputs(1, batch=1), cache))
    scores = [line for line in text.splitlines() if "dot_general" in line]
    assert scores and not any("4096" in line for line in scores)


def refused(word):
    return pytest.raises(ValueError, match=f"BlockwiseAttention: {word} must")


def test_refusals():
    with refused("inputs_q"):
        make(16, 8)(inputs(17))
    with refused("block_size"):
        make(16, 0)
    with refused("max_length"):
        make(0, 8)
    with refused("shifts"):
        make(16, 8, shifts=(0, 1))
    with refused("shifts"):
        make(16, 8, shifts=3)
    with refused("shifts"):
        make(16, 8, shifts=(0, 1, 0.5, 1))
    with refused("max_length"):
        make(16, 8, is_causal=True).init_cache(1, 17)
