"""Softmax attention by cuDNN, through JAX: the fastest form of plain and causal attention on an NVIDIA GPU."""

import jax
import numpy as np

from subquad.kernels import gpu, launch
from subquad.kernels.patterns import CAUSAL

OLDEST, HOPPER = 80, 90  # compute capabilities


def attention(query, key, value, bias, visible, pattern, scale: float, *, return_lse: bool, by_name: bool):
    """Arguments as checked by `subquad.kernels.softmax.attention` -> (out [B, T, N, V], None).

    `by_name`: whether the caller asked for cuDNN; else it is taken from Hopper on only.
    """
    if reason := refusal(query, value, bias, visible, pattern, return_lse, by_name):
        raise launch.Declined(reason)
    run = jax.nn.dot_product_attention
    try:
        return run(query, key, value, scale=scale, is_causal=pattern is not None, implementation="cudnn"), None, None
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # No cuDNN, or one too old for this GPU. What it says of shardings comes at compile time, too late to decline.
        said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise launch.Declined(f"JAX refuses it: {said}.") from error


def refusal(query, value, bias, visible, pattern, return_lse: bool, by_name: bool) -> str | None:
    """Why cuDNN does not take a call; None if it does."""
    capability = gpu.capability()
    if capability is None:
        return "JAX sees no NVIDIA GPU here."
    if capability < OLDEST:
        return f"the GPU has compute capability {capability / 10}, and cuDNN's attention starts at {OLDEST / 10}."
    if capability < HOPPER and not by_name:
        return f"the GPU has compute capability {capability / 10}, and below {HOPPER / 10} cuDNN is taken by name only."
    if query.dtype.name not in ("bfloat16", "float16"):
        return f"the operands are {query.dtype}, and cuDNN takes bfloat16 and float16 only."
    features, largest = query.shape[3], 256 if capability >= HOPPER else 128
    if value.shape[3] != features:
        return f"values have {value.shape[3]} features and keys {features}, and JAX wants them equal."
    if features % 8 or features > largest:
        return f"a head has {features} features, and cuDNN takes multiples of 8 up to {largest}."
    if bias is not None:
        return "a bias keeps cuDNN from skipping anything; the tiled kernels take it."
    if return_lse:
        return "JAX rounds cuDNN's log-sum-exp to the operands' dtype and drops its gradient."
    if visible.mask is not None:
        return "a mask is an array, and cuDNN would need lengths to skip anything."
    if visible.query_segment_ids is not None:
        return "segments are arrays, and cuDNN would need their lengths to skip anything."
    if pattern not in (None, CAUSAL):
        return "cuDNN's window differs from this one; the tiled kernels take it."
    if pattern is not None and not from_start(visible):
        return "cuDNN counts positions from the start, and these queries and keys are elsewhere."
    if jax.default_backend() != "gpu":
        return "this machine has no cuDNN to ask."
    return None


def from_start(visible) -> bool:
    """Whether queries and keys are as many and count from the same position."""
    known = all(isinstance(positions, np.ndarray) for positions in visible[:2])
    if not known or visible.query_positions.shape != visible.key_positions.shape:
        return False
    first = visible.query_positions.flat[0]
    return all((positions == first + np.arange(positions.shape[1])).all() for positions in visible[:2])
