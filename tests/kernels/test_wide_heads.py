"""Heads of more than 64 features, of which some kernels take a slice at a time, against the float64 reference."""

import pytest

from subquad.kernels import gate, specs


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("linear.random_feature_attention/relu-causal-96", "bfloat16"),
        ("lsh.attention/ring-counted-96", "float32"),
        ("lsh.extend/once-96", "float32"),
        ("relative.attention/mask-96", "float32"),
        ("softmax.attention/everything-96", "float32"),
    ],
)
def test_wide_heads(name, dtype):
    verdict = gate.check(specs.find(name), "interpret", 20, dtype)
    assert verdict.passed, verdict
