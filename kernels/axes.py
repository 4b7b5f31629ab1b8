"""Axis letters, once for the whole library, and the array types made of them.

    B batch              N query heads            V value features     W window
    T query length       K key/value heads        D model features     P state size
    S key length         H head features          M landmarks or random features
    C chunk              R hash rounds            L blocks in a list

Kernels take exactly one batch axis (layers flatten theirs) and lay arrays out as [B, T, N, H]. The annotations are
checked in the tests, not in production.
"""

from jaxtyping import Array, Bool, Float, Int, Shaped

Query = Float[Array, "B T N H"]
Key = Float[Array, "B S K H"]
Value = Float[Array, "B S K V"]
Output = Float[Array, "B T N V"]
LogSumExp = Float[Array, "B T N"]
# Each axis of a mask or bias is full or 1, so its letters are not bound.
Mask = Bool[Array, "_ _ _ _"]
Bias = Float[Array, "_ _ _ _"]
KeyMask = Bool[Array, "_ 1 1 S"]
Positions = Int[Array, "_ _"]

__all__ = [
    "Array",
    "Bias",
    "Bool",
    "Float",
    "Int",
    "Key",
    "KeyMask",
    "LogSumExp",
    "Mask",
    "Output",
    "Positions",
    "Query",
    "Shaped",
    "Value",
]
