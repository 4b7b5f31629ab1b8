"""Choose an implementation: the one rule for every operation."""

import contextvars
import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax

from subquad.kernels import gpu, launch, precision

Implementation = Literal["reference", "xla", "triton", "cudnn", "interpret"]
Implementations = Mapping[str, Callable]

# Never taken unless asked for: a test's interpreter, and the specification where there is a faster form.
BY_NAME_ONLY = ("interpret", "reference")

Declined = launch.Declined

_report: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("report", default=None)


MOST_NAMES = 80  # that an error lists


def nearest(name: str, known) -> str:
    """The clause that ends an unknown-name error: the nearest match, then the known names; of very many, those near it."""
    known = sorted(known)
    matches = difflib.get_close_matches(str(name), known, n=6)
    hint = f"Did you mean {matches[0]!r}? " if matches else ""
    if len(known) > MOST_NAMES:
        return f"{hint}{len(known)} are known, such as {', '.join(matches[1:] or known[:5])}."
    return f"{hint}Known: {', '.join(known)}."


def check_name(owner: str, implementation: str | None) -> None:
    """Refuses an `implementation` that is no known word (ValueError). None and the known words pass."""
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"{owner}: implementation must be None or a known name, got {implementation!r}. "
            f"{nearest(implementation, get_args(Implementation))}"
        )


def reference_or_best(implementation: Implementation | None) -> Implementation | None:
    """The implementation of an operation that is a part of a layer and has no kernel which the layer's word could name."""
    return "reference" if implementation == "reference" else None


def triton(module: str, function: str) -> dict[str, Callable]:
    """The implementations "triton" and "interpret": `function(*args, mode=...)` of a module that is imported when first run."""

    def run(*args, mode: launch.Mode, **kwargs):
        launch.require(mode)
        return getattr(importlib.import_module(module), function)(*args, mode=mode, **kwargs)

    return {mode: functools.partial(run, mode=mode) for mode in get_args(launch.Mode)}


def implementations(name: str, xla, reference) -> Implementations:
    """Of the function `name`: those in an operation's modules `triton`, `xla` and `reference`."""
    return {**triton(f"{xla.__package__}.triton", name), "xla": getattr(xla, name), "reference": getattr(reference, name)}


@precision.promoting
def run(operation: str, implementations: Implementations, implementation: Implementation | None, *args, **kwargs) -> Any:
    """Runs `operation`.

    The choice is made while tracing, by what the implementations themselves say: one that cannot serve a call raises
    `Declined` before it does any work.

    Args:
        operation: the operation's public name, for messages.
        implementations: those that exist, the preferred first.
        implementation: None takes the first that does not decline; a name takes exactly that one.
        args, kwargs: what it is called with. One array of 64 bits makes all floating ones so, see `precision.matched`.
    Returns: what the implementation returns.
    Raises:
        ValueError: the name is not a known word.
        NotImplementedError: the named implementation does not exist for this operation, or declines this call.
    """
    check_name(operation, implementation)
    args, kwargs = precision.matched((args, kwargs))
    lines = _report.get() if _report.get() is not None else []
    if implementation is not None:
        lines.append(f"{operation} runs {implementation}, asked for by name")
        return _run_named(operation, implementations, implementation, *args, **kwargs)
    candidates = [name for name in implementations if name not in BY_NAME_ONLY] or ["reference"]
    outputs, chosen, answers = None, None, []
    for name in implementations:
        if name not in candidates:
            answer = "only by name"
        elif chosen is not None:
            answer = f"comes after {chosen}"
        else:
            try:
                outputs, chosen, answer = implementations[name](*args, **kwargs), name, "runs"
            except Declined as reason:
                answer = f"declines: {reason}"
        answers.append(f"    {name:9} {answer}")
    lines.append("\n".join([f"{operation} runs {chosen}", *answers]))
    if chosen is None:
        raise Declined(lines[-1])
    return outputs


def explain(function: Callable, *args, **kwargs) -> None:
    """Prints, for each operation inside `function(*args, **kwargs)`, what would run here and why the others would not.

    Nothing is computed. `function` is an operation, a layer or any function that calls them.

    Example:
        >>> from subquad.kernels import convolution
        >>> explain(convolution.convolve, jax.numpy.ones((1, 8, 2)), jax.numpy.ones((2, 8)), implementation="reference")
        convolution.convolve runs reference, asked for by name
    """
    lines: list[str] = []
    token = _report.set(lines)
    try:
        # Apart, or JAX would find what is compiled already in its cache and choose nothing.
        with gpu.separate_trace_cache():
            jax.eval_shape(lambda: jax.tree.leaves(function(*args, **kwargs)))
    finally:
        _report.reset(token)
    # A layer may run the same operation in several places.
    print("\n".join(dict.fromkeys(lines)))


def _run_named(operation, implementations, implementation, *args, **kwargs):
    if implementation not in implementations:
        raise Declined(
            f"{operation}: implementation={implementation!r} does not exist for this operation. "
            f"Use None or one of {', '.join(sorted(implementations))}."
        )
    try:
        return implementations[implementation](*args, **kwargs)
    except Declined as reason:
        raise Declined(
            f"{operation}: implementation={implementation!r} declines this call: {reason} "
            "Use None to take the best that can run it here."
        ) from reason
