"""What a call draws from: the caller's `rngs`, or those of the Linen module around it."""

from typing import Any

from flax import nnx
from flax.nnx.bridge.wrappers import current_linen_module


def call_rngs(rngs: nnx.Rngs | nnx.RngStream | None, owner: str) -> nnx.Rngs | None:
    """The `rngs` that a call draws from: the caller's, or, inside a Linen module, a stream of its "dropout" collection.

    Through `nnx.bridge.to_linen` no call can be given `rngs`, because `apply` takes that word for itself. The stream is made
    for this call from `make_rng`, so that no module holds a state that a call would change.

    Args:
        rngs: a stream, which Flax's own layers take, is their stream "dropout", and counts on.
        owner: whose call it is, for the error.
    Raises: TypeError: a key or a number, from which every layer would draw the same.
    """
    if isinstance(rngs, nnx.RngStream):
        of_stream: Any = nnx.Rngs()
        of_stream.dropout = rngs
        return of_stream
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"{owner}: rngs must be an nnx.Rngs, got {type(rngs).__name__}. Pass nnx.Rngs(dropout=key): "
            "from a key alone every layer would draw the same."
        )
    module = current_linen_module()
    if rngs is not None or module is None or not module.has_rng("dropout"):
        return rngs
    return nnx.Rngs(dropout=module.make_rng("dropout"))
