"""Patches of the kernels' sizes reach what is traced."""

import pytest

from subquad.kernels import gpu


@pytest.fixture
def monkeypatch(monkeypatch, request):
    """What is traced under a patch stays apart: JAX would find what another test has traced with the same shapes."""
    with gpu.separate_trace_cache(request.node.nodeid):
        yield monkeypatch
