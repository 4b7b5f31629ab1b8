"""How a kernel's work is cut: the heuristic of each kernel, or what was measured for sizes like these on this GPU."""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping

from subquad.kernels import gpu

TUNED = pathlib.Path(__file__).parent / "tuned"


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel's work is cut: block sizes by the names of the kernel's constants, and what Triton needs to know."""

    blocks: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def __hash__(self):
        return hash((tuple(sorted(self.blocks.items())), self.num_warps, self.num_stages))


@dataclasses.dataclass(frozen=True)
class Request:
    """What a configuration is asked for."""

    kernel: str
    sizes: tuple[tuple[str, int | str | bool], ...]


# By `trying`: what it says, and the heuristics of all that was asked for.
_tried: contextvars.ContextVar[tuple[Mapping[Request, Config], dict[Request, Config]]] = contextvars.ContextVar("tried")


def config(kernel: str, heuristic: Config, **sizes) -> Config:
    """The tuned configuration of a kernel for these sizes on this device, or the heuristic where nothing was measured."""
    request = Request(kernel, tuple(sorted(sizes.items())))
    trials, requested = _tried.get(({}, {}))
    requested[request] = heuristic
    return trials.get(request) or tuned(gpu.device_kind()).get(request, heuristic)


def size_class(size: int, most: int) -> int:
    """The power of two that holds a size, `most` at most: sizes of one class share what was tuned for one of them."""
    return min(1 << (size - 1).bit_length(), most)


@contextlib.contextmanager
def trying(trials: Mapping[Request, Config]) -> Iterator[dict[Request, Config]]:
    """Uses these configurations for what is traced inside, and collects the heuristics of all that is asked for."""
    requested: dict[Request, Config] = {}
    token = _tried.set((trials, requested))
    try:
        with gpu.separate_trace_cache():
            yield requested
    finally:
        _tried.reset(token)


@functools.cache
def tuned(kind: str) -> dict[Request, Config]:
    """The committed table of a device; empty where it was never tuned."""
    path = TUNED / f"{kind}.json"
    if not path.exists():
        return {}
    return {
        Request(row["kernel"], tuple(sorted(row["sizes"].items()))): Config(row["blocks"], row["num_warps"], row["num_stages"])
        for row in json.loads(path.read_text())["rows"]
    }
