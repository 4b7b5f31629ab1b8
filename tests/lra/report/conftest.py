import pytest

from subquad.lra.report import ledger


@pytest.fixture
def nothing_shipped(monkeypatch, tmp_path_factory):
    """Only the rows that a test writes."""
    monkeypatch.setattr(ledger, "SHIPPED", tmp_path_factory.mktemp("shipped"))
