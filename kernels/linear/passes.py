"""The forward and the backward pass of linear attention with decays on a GPU, as launches of the two kernels.

The derivative is the same sums with other operands, where a gradient G of the state goes from the last chunk to the first:

    gradient of   query   key     value    state             of an output o of which do is the gradient
    (output)      q       k       v        S
    q             do      v       k        S^T
    k             v       do      q        G^T   reversed    G = sum_c q_c do_c^T of what comes after, by `linear_states`
    v             k       q       do       G     reversed

A normaliser is one more value, 1: its state is the sum of the keys, and its gradient one more column of do.

The delta rule (DeltaNet, arXiv 2406.06484, section 3): W and U, by `recurrence.delta_rule`, are what a chunk reads of the state
before it and writes without one. All else takes the corrected values for the values; the gradient of a correction acts on the
gradient of the state:

    u = U - W S                                                                          what is written
    du = dU = (the gradient of v without G) + k G,   dW = -du S^T                        its gradient
    G' = exp(g_C - g_0) G + sum_c exp(g_c - g_0) q_c do_c^T - W^T du
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from subquad.kernels import checks, launch, precision, tuning
from subquad.kernels.flash.triton import padded
from subquad.kernels.linear.chunk_kernels import Shape, linear_outputs, linear_states
from subquad.kernels.operation import operation
from subquad.kernels.padding import pad_to


class Operands(NamedTuple):
    """What the kernels take: features, and G = C + 1 log decays g_0 .. g_C of K chunks, in P parts for H = 1 or M channels."""

    query: Float[Array, "B T N M"]
    key: Float[Array, "B S N M"]
    value: Float[Array, "B S N V"]
    late: Float[Array, "B N K G P H"] | None
    early: Float[Array, "B N K G P H"] | None
    state: Float[Array, "B N M V"]
    sums: Float[Array, "B N M"] | None
    erase: Float[Array, "B T N M"] | None = None


class States(NamedTuple):
    """What `linear_states` makes: what the tokens of each chunk read, the last one, and what values were written."""

    read: Float[Array, "B N K M V"]  # `last` unless causal
    read_sums: Float[Array, "B N K M"]
    last: Float[Array, "B N M V"]
    last_sums: Float[Array, "B N M"]
    values: Float[Array, "B T N V"]  # with `partial` their gradient


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a call that is not an array.

    Args:
        prepare: (plan, arrays of the operation) -> (operands, the largest log scale or None): in XLA, differentiable.
        features: a name of `xla.FEATURES`.
        divides: by the normaliser.
        hides: whether tokens may be padding.
        differentiates: which log decays have a gradient, "late" or "early".
    """

    prepare: Callable
    features: str
    is_causal: bool
    divides: bool
    hides: bool
    differentiates: tuple[str, ...]
    scale: float
    eps: float
    chunk: int
    bf16: bool
    precision: str
    mode: launch.Mode

    @property
    def dtype(self):
        """Of what is multiplied; float16 has neither the range of the sums nor that of the features."""
        return jnp.bfloat16 if self.bf16 else jnp.float32


def chunk_states(plan: Plan, x: Operands, key, value, first, first_sums, *, is_reversed=False, last_value=None, partial=None):
    """Launches `linear_states`."""
    (batch, length, heads, features), values, is_delta = key.shape, value.shape[3], x.erase is not None
    config = configure(linear_states, plan, x, features, values)
    blocks = -(-features // config.blocks["BLOCK_M"]) * -(-values // config.blocks["BLOCK_V"])
    written_key = weighed(plan, x, x.key, True) if is_delta else None
    if is_delta:
        key = weighed(plan, x, key, False) if is_reversed else written_key
    inputs = dict(key=key, value=value, last_value=last_value, written_key=written_key, erase=x.erase, partial=partial)
    inputs |= log_decays_and_words(plan, x, length) | dict(first=first, first_sums=first_sums)
    chunks = -(-length // plan.chunk)
    outputs = dict(
        states=output(plan.is_causal, batch, heads, chunks, features, values, dtype=plan.dtype),
        states_sums=output(plan.is_causal and plan.divides, batch, heads, chunks, features),
        last=output(True, batch, heads, features, values), last_sums=output(plan.divides, batch, heads, features),
        corrected=output(is_delta, batch, length, heads, values, dtype=plan.dtype),
    )  # fmt: skip
    states, sums, last, last_sums, corrected = launch.call(
        linear_states, inputs, outputs, grid=batch * heads * blocks, config=config, mode=plan.mode,
        constants=dict(SHAPE=shape_of(plan, x, key, value, is_reversed)),
    )  # fmt: skip
    read = (states, sums) if plan.is_causal else (last, last_sums)
    return States(*read, last, last_sums, corrected if is_delta else value)


def chunk_outputs(plan: Plan, x: Operands, query, key, value, states: States | None, dtype, *, is_reversed=False,
                  is_transposed=False, last_value=None, partner=None):  # fmt: skip
    """Launches `linear_outputs`: (outputs or a gradient, what they were multiplied by, products with `partner`)."""
    (batch, length, heads, _), values = query.shape, value.shape[3]
    config = configure(linear_outputs, plan, x, query.shape[3], values)
    blocks = -(-values // config.blocks["BLOCK_V"])
    is_output = not (is_reversed or is_transposed)
    # What cancels in sums over time must not be rounded before: products of channels are made of float32.
    in_xla = partner is not None and has_channels(x)
    has_partner = partner is not None and not in_xla
    inputs = dict(query=query, key=key, value=value, last_value=last_value, **log_decays_and_words(plan, x, length))
    inputs |= dict(states=None, states_sums=None) if states is None else dict(states=states.read, states_sums=states.read_sums)
    outputs = dict(
        out=output(True, batch, length, heads, values, dtype=jnp.float32 if in_xla else dtype),
        inverse=output(is_output and plan.divides, batch, heads, length),
        products=output(has_partner, batch, heads, blocks, length),
    )  # fmt: skip
    constants = dict(
        SHAPE=shape_of(plan, x, query, value, is_reversed, is_transposed), HAS_PARTNER=has_partner,
        SCALE=plan.scale if is_output else 1.0, EPS=plan.eps,
    )  # fmt: skip
    out, inverse, products = launch.call(
        linear_outputs, inputs | dict(partner=partner if has_partner else None), outputs, constants=constants, config=config,
        grid=batch * heads * blocks * -(-length // plan.chunk), mode=plan.mode,
    )  # fmt: skip
    if in_xla:
        out, products = out.astype(dtype), out * partner
    return out, inverse, products


def output(exists, *shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape if exists else (1,), dtype)


def has_channels(x: Operands) -> bool:
    """Whether every channel has a decay of its own."""
    return x.late is not None and x.late.shape[5] > 1


def log_decays_and_words(plan: Plan, x: Operands, length: int) -> dict:
    """Log decays, and the run-time numbers of a launch: tokens, their chunks, and those that log decays have."""
    words = launch.words(length, -(-length // plan.chunk), 0 if x.late is None else x.late.shape[2])
    return dict(late=x.late, early=x.early, words=words)


def shape_of(plan: Plan, x: Operands, features, values, is_reversed: bool, is_transposed: bool = False) -> Shape:
    parts, channels = (0, 1) if x.late is None else x.late.shape[4:]
    return Shape(
        features.shape[2], features.shape[3], values.shape[3], plan.chunk, is_reversed, is_transposed, parts, channels,
        plan.chunk.bit_length() - 1, plan.is_causal, plan.divides, x.erase is not None, plan.bf16, plan.precision,
    )  # fmt: skip


def forward(plan: Plan, *arrays):
    """((outputs, last state, its sums, the largest log scale), what `backward` needs)."""
    x, largest = plan.prepare(plan, *arrays)
    S = chunk_states(plan, x, x.key, x.value, x.state, x.sums)
    out, inverse, _ = chunk_outputs(plan, x, x.query, x.key, S.values, S, arrays[2].dtype)
    if not plan.divides:
        return (out, S.last, None, largest), (arrays,)
    return (out, S.last, S.last_sums, largest), (arrays, out, inverse)


def backward(plan: Plan, residuals, cotangents):
    """The gradients of the operation's arrays: the launches of the table above."""
    arrays, *divided = residuals
    grad_out, grad_last, grad_last_sums, _ = cotangents
    if plan.hides:
        idle = checks.may_be_padding(arrays[:1], grad_out)
        arrays = jnp.where(idle, 0, arrays[0]), *arrays[1:]
    x, pull, _ = jax.vjp(functools.partial(plan.prepare, plan), *arrays, has_aux=True)
    do, grad_normaliser = plan.scale * grad_out.astype(jnp.float32), None
    if plan.divides:
        out, inverse = divided
        do *= inverse.swapaxes(1, 2)[..., None]
        out = jnp.where(idle, 0, out) if plan.hides else out
        grad_normaliser = -jnp.sum(do * out.astype(jnp.float32), -1).swapaxes(1, 2)
    do, partial = do.astype(plan.dtype), None
    S = chunk_states(plan, x, x.key, x.value, x.state, x.sums)
    if x.erase is not None:
        partial, *_ = chunk_outputs(plan, x, x.key, x.query, do, None, plan.dtype, is_reversed=True)
    G = chunk_states(
        plan, x, x.query, do, grad_last, grad_last_sums, is_reversed=True, last_value=grad_normaliser, partial=partial
    )
    partner = {name: x.query if name == "late" else x.key for name in plan.differentiates if x.late is not None}
    grad_query, _, query_products = chunk_outputs(
        plan, x, do, S.values, x.key, S, x.query.dtype, is_transposed=True, last_value=grad_normaliser,
        partner=partner.get("late"),
    )  # fmt: skip
    grad_key, _, key_products = chunk_outputs(
        plan, x, S.values, do, x.query, G, x.key.dtype, is_reversed=True, is_transposed=True, last_value=grad_normaliser,
        partner=partner.get("early"),
    )  # fmt: skip
    if x.erase is None:
        grad_value, *_ = chunk_outputs(plan, x, x.key, x.query, do, G, x.value.dtype, is_reversed=True)
        grad_erase = None
    else:
        grad_value, grad_erase = G.values, -through(G.values, S.read, plan.chunk).astype(x.erase.dtype)
    grad_late, grad_early = (None if g is None else jnp.zeros_like(g) for g in (x.late, x.early))
    if "late" in partner:
        grad_late = at_tokens(grad_late, query_products, at_ends(plan, S, G, has_channels(x)))
    if "early" in partner:
        grad_early = at_tokens(grad_early, -key_products)
    grad_sums = G.last_sums if plan.divides else None
    grads = pull(Operands(grad_query, grad_key, grad_value, grad_late, grad_early, G.last, grad_sums, grad_erase))
    return tuple(None if g is None or g.dtype == jax.dtypes.float0 else g for g in grads)


def at_ends(plan: Plan, S: States, G: States, by_channel: bool):
    """The gradient [B, N, chunks, H] of the log decays at the ends of chunks, by the states after them: <S', G'>."""
    following = lambda states, last: jnp.concatenate([states[:, :, 1:].astype(jnp.float32), last[:, :, None]], 2)
    ends = jnp.sum(following(S.read, S.last) * G.read.astype(jnp.float32), 4)
    if plan.divides:
        ends += following(S.read_sums, S.last_sums) * G.read_sums
    return ends if by_channel else ends.sum(3, keepdims=True)


def at_tokens(zeros, products, ends=0.0):
    """The gradient of log decays [B, N, K, C + 1, P, H], which is that of their last part.

    Args:
        products: of what they weigh with its gradient: [B, T, N, H], or their sums [B, N, blocks, T] where H = 1.
        ends: added at the ends of chunks.
    """
    batch, heads, chunks, places, _, channels = zeros.shape
    rows = products.sum(2)[..., None] if channels == 1 else products.swapaxes(1, 2)
    rows = pad_to(rows, 2, chunks * (places - 1)).reshape(batch, heads, chunks, places - 1, channels).at[:, :, :, -1].add(ends)
    return zeros.at[:, :, :, 1:, -1].set(rows)


def weighed(plan: Plan, x: Operands, rows, is_key: bool):
    """Keys decayed to the end of their chunk, or queries to its start, for the kernel of the delta rule: it holds a whole state
    and has no registers left for that."""
    if x.late is None:
        return rows
    g = x.late
    gaps = g[:, :, :, -1:] - g[:, :, :, 1:] if is_key else g[:, :, :, 1:] - g[:, :, :, :1]
    factor = jnp.exp(gaps.sum(4)).reshape(*g.shape[:2], -1, g.shape[5])[:, :, : rows.shape[1]]
    return (rows * factor.swapaxes(1, 2)).astype(plan.dtype)


@precision.full
def through(values, states, chunk: int):
    """The products [B, T, N, M] of values [B, T, N, V] with the states before their chunks."""
    rows = cut_chunks(values, chunk)
    rows = jnp.einsum("bkcv,bkmv->bkcm", rows, states.reshape(*rows.shape[:2], *states.shape[3:]))
    return rows.reshape(*states.shape[:2], -1, rows.shape[3])[:, :, : values.shape[1]].swapaxes(1, 2)


def cut_chunks(x, chunk: int):
    """[B, T, N, X] as [B, N K, C, X], with zeros at the end."""
    batch, length, _, width = x.shape
    return pad_to(x.swapaxes(1, 2), 2, -(-length // chunk) * chunk).reshape(batch, -1, chunk, width)


def configure(kernel, plan: Plan, x: Operands, features: int, values: int) -> tuning.Config:
    best = heuristic(kernel, plan, x, padded(features), padded(values))
    sizes = dict(features=padded(features), values=padded(values), bf16=plan.bf16, precision=plan.precision, chunk=plan.chunk)
    return tuning.config(kernel.__name__, best, **sizes, channels=has_channels(x), delta=x.erase is not None)


def heuristic(kernel, plan: Plan, x: Operands, features: int, values: int) -> tuning.Config:
    """The largest blocks with which nothing overflows the registers of Hopper."""
    if plan.mode == "interpret":  # the cost there is per step, whatever its size
        return tuning.Config(dict(BLOCK_M=features, BLOCK_V=values))
    block_m, block_v, warps, stages = 64, 64, 4, 2
    if plan.precision == "tf32x3":  # three products keep both halves of both operands
        block_m, block_v, warps, stages = (32, 64, 8, 1) if kernel is linear_outputs else (32, 32, 8 if features > 32 else 4, 1)
        if kernel is linear_outputs:  # small blocks have too little work for more
            warps = 2 if values <= 16 else 4 if features <= 16 else warps
    if has_channels(x) and kernel is linear_outputs:  # decays are whole tiles
        block_m, warps = block_m // 2, 4 if plan.chunk == 16 else 8
    if x.erase is not None and kernel is linear_states:  # what is read of a state is a sum over its features
        block_m, block_v, warps, stages = features, block_v // 2, 8, 1
    return tuning.Config(dict(BLOCK_M=min(block_m, features), BLOCK_V=min(block_v, values)), warps, stages)


# Of query, key, value, log scales or decays, segments, projection; of the state: itself, its sums, the largest log scale; beta;
# the reader of what is erased.
ARRAYS = ("b t n h", "b s n h", "b s n v", "b s n k", "b s", "b m h", "b n m v", "b n m", "b n", "b s n", "b r n h")
OUTPUTS = ("b t n v", "b n m v", "b n m", "b n")
SHARED = [[5]]  # may be one for all samples
run_sums = operation(forward, backward, arrays=ARRAYS, outputs=OUTPUTS, shared=SHARED)
run_means = operation(forward, backward, arrays=ARRAYS, outputs=OUTPUTS, saved=("b n t",), shared=SHARED)
