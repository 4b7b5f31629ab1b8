"""Who races whom: ours against other people's implementations, one small adapter for each."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peers.sides import Case, Side


@dataclass(frozen=True)
class Contest:
    """One race.

    Args:
        family: the layer or mechanism of ours.
        name: the peer and its setting.
        peer: the distribution that the peer comes from; "subquad" where it is our own.
        ours, theirs: build the sides; `theirs` imports the peer, and its ImportError is a row.
        same: both sides compute the same function of the same numbers, so their results must agree.
        devices: where it makes sense.
        longest, why: the greatest length at which the peer is tried, and why not further.
        fixed: fields of the case that this race does not leave to the command line.
        note: what a reader of the row should know.

    Without `theirs` nothing runs: the row is what the compiler says of ours.
    """

    family: str
    name: str
    peer: str
    ours: Callable[[Case], Side]
    theirs: Callable[[Case], Side] | None
    same: bool = False
    devices: tuple[str, ...] = ("cpu",)
    longest: int | None = None
    why: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def contests() -> list[Contest]:
    """All of them."""
    from peers import buckets, dense, gpu, kernelized, lowrank, own, patterns, recurrent, statespace

    modules = (dense, patterns, buckets, lowrank, kernelized, recurrent, statespace, own, gpu)
    return [contest for module in modules for contest in module.CONTESTS]
