"""Choose an implementation: the one rule for every operation."""

import difflib
from collections.abc import Callable, Mapping
from typing import Literal, get_args

Implementation = Literal["reference", "xla", "triton", "cudnn", "interpret"]

# None takes the first of these that the operation has and that can run here; the reference is never a fallback in
# disguise, it is what an operation without a faster form runs.
PREFERENCE = ("xla", "reference")


def nearest(name: str, known) -> str:
    """The clause that ends an unknown-name error: the nearest match, then the known names."""
    known = sorted(known)
    match = difflib.get_close_matches(str(name), known, n=1)
    hint = f"Did you mean {match[0]!r}? " if match else ""
    return f"{hint}Known: {', '.join(known)}."


def check_name(owner: str, implementation: str | None) -> None:
    """Refuses an `implementation` that is no known word (ValueError). None and the known words pass."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"{owner}: implementation must be None or a known name, got {implementation!r}. "
            f"{nearest(implementation, get_args(Implementation))}"
        )


def choose(operation: str, available: Mapping[str, Callable], implementation: Implementation | None) -> Callable:
    """Picks the function that runs `operation`.

    Args:
        operation: the operation's public name, for messages.
        available: the implementations that exist, by name.
        implementation: None takes the best that can run here; a name takes exactly that one.
    Returns: the chosen function.
    Raises:
        ValueError: the name is not a known word.
        NotImplementedError: the named implementation does not exist for this operation.
    """
    check_name(operation, implementation)
    if implementation is None:
        return next(available[name] for name in PREFERENCE if name in available)
    if implementation not in available:
        raise NotImplementedError(
            f"{operation}: implementation={implementation!r} does not exist for this operation yet. "
            f"Use None or one of {', '.join(sorted(available))}."
        )
    return available[implementation]
