"""What differs where a layer or model runs inside a Linen module."""

from flax import nnx
from flax.nnx.bridge.wrappers import current_linen_module


def call_rngs(rngs: nnx.Rngs | None) -> nnx.Rngs | None:
    """The `rngs` that a call draws from: the caller's, or, inside a Linen module, a stream of its "dropout" collection.

    Through `nnx.bridge.to_linen` no call can be given `rngs`, because `apply` takes that word for itself. The stream is made
    for this call from `make_rng`, so that no module holds a state that a call would change.
    """
    module = current_linen_module()
    if rngs is not None or module is None or not module.has_rng("dropout"):
        return rngs
    return nnx.Rngs(dropout=module.make_rng("dropout"))
