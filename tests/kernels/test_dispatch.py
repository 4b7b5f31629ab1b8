"""The rule that chooses an implementation."""

import pytest

from subquad.kernels import dispatch


def test_the_best_that_exists_runs():
    available = {"reference": "slow", "xla": "fast"}
    assert dispatch.choose("op", available, None) == "fast"
    assert dispatch.choose("op", available, "reference") == "slow"
    assert dispatch.choose("op", {"reference": "slow"}, None) == "slow"


def test_a_name_means_exactly_that_one():
    with pytest.raises(NotImplementedError, match="op: implementation='triton'.*xla"):
        dispatch.choose("op", {"xla": "fast"}, "triton")


def test_an_unknown_name_is_a_mistake():
    with pytest.raises(ValueError, match="'triton'"):
        dispatch.choose("op", {"xla": "fast"}, "tritan")
