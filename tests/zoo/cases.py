"""One row per layer buys every test of the contract suite."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from subquad import zoo

FEATURES = 16
LONG = 8192  # the longest sequence of the cost tests
POISONS = (float("nan"), float("inf"), float("-inf"), 1e12, 1e18)  # what may stand where nothing is seen


@dataclasses.dataclass(frozen=True)
class Case:
    """How the contract suite builds a layer.

    Args:
        name: the layer.
        options: its options, small enough that blocks, windows and segments end inside the test sequences.
        cost_options: options of the cost test, of everyday size; None: `options`.
        dead: parameters whose gradient is zero by the mathematics, with the reason in a comment.
        dead_if_causal: the same where it is causal; None: `dead`.
        extend_equals_call: a sequence cut into `extend` calls gives what one call gives.
        tolerance: largest absolute difference between two float32 runs of the same mathematics.
    """

    name: str
    options: dict[str, Any]
    cost_options: dict[str, Any] | None = None
    dead: tuple[str, ...] = ()
    dead_if_causal: tuple[str, ...] | None = None
    extend_equals_call: bool = True
    tolerance: float = 2e-5

    def make(self, is_causal: bool = False, seed: int = 0, **more) -> nnx.Module:
        return zoo.make(
            self.name, in_features=FEATURES, rngs=nnx.Rngs(seed), **{**self.options, "is_causal": is_causal, **more}
        )

    @property
    def supports(self) -> zoo.Support:
        return zoo.LAYERS[self.name].supports


# A constant added to all keys adds the same number to every logit of a row, which a softmax over q . k takes away again.
SOFTMAX_INVARIANT = ("key/bias",)

CASES = {
    case.name: case
    for case in (
        Case("softmax", dict(num_heads=4, num_kv_heads=2), dead=SOFTMAX_INVARIANT),
        Case(
            "blockwise", dict(num_heads=4, max_length=100, block_size=5), dict(num_heads=4, max_length=LONG, block_size=128),
            dead=SOFTMAX_INVARIANT,
        ),
        Case("local", dict(num_heads=2, window_size=4), dict(num_heads=4, window_size=128), dead=SOFTMAX_INVARIANT),
        Case(
            "diagonal", dict(num_heads=2, window_size=2, dilation=3),
            dict(num_heads=8, window_size=128, dilation=(1, 1, 1, 1, 2, 2, 4, 4)), dead=SOFTMAX_INVARIANT,
        ),
        Case(
            "random", dict(num_heads=2, max_length=100, block_size=3, num_random=30),
            # In an input half as long every block sees one of its 8, and some block all: a step of 8 blocks, as in the whole.
            dict(num_heads=4, max_length=LONG, block_size=64, num_random=8, random_seed=1), dead=SOFTMAX_INVARIANT,
        ),
        Case("strided", dict(num_heads=2, stride=4), dict(num_heads=4, stride=128), dead=SOFTMAX_INVARIANT),
        Case("axial", dict(num_heads=2, row_length=5), dict(num_heads=4, row_length=128), dead=SOFTMAX_INVARIANT),
        Case("global", dict(num_heads=2, radius=3, num_global=3), dict(num_heads=4, radius=64, num_global=8)),
        Case(
            "longformer", dict(num_heads=2, window_size=3, num_global=3), dict(num_heads=4, window_size=128, num_global=8),
            dead=(*SOFTMAX_INVARIANT, "key_global/bias"),
        ),
        Case(
            "longt5", dict(num_heads=2, radius=3, block_size=4, num_buckets=8, max_distance=10), dict(num_heads=4),
            dead=SOFTMAX_INVARIANT,
        ),
        Case(
            "bigbird", dict(num_heads=2, max_length=100, block_size=3, num_random=1),
            # Longer than both sequences: one of them alone would have the last block, which sees all.
            dict(num_heads=4, max_length=2 * LONG, block_size=64), dead=SOFTMAX_INVARIANT,
        ),
        Case(
            "reformer", dict(num_heads=2, num_hashes=2, chunk_size=6), dict(num_heads=4, num_hashes=2, chunk_size=64),
            extend_equals_call=False,
        ),
        # The square root of the longest sequence.
        Case("routing", dict(num_heads=2, num_clusters=4), dict(num_heads=4, num_clusters=91), extend_equals_call=False),
        Case(
            "sinkhorn", dict(num_heads=2, max_length=100, block_size=5),
            dict(num_heads=4, max_length=LONG, block_size=64),
        ),
        Case(
            "smyrf", dict(num_heads=2, num_hashes=2, cluster_size=6), dict(num_heads=4, num_hashes=2, cluster_size=64),
            dead=SOFTMAX_INVARIANT,
        ),
        Case("informer", dict(num_heads=2, factor=3), dict(num_heads=4), dead=SOFTMAX_INVARIANT),
        Case(
            "clustered", dict(num_heads=2, num_clusters=4, num_top=3, num_iterations=3), dict(num_heads=4, num_clusters=32),
            dead=SOFTMAX_INVARIANT,
        ),
        Case(
            "moba", dict(num_heads=4, num_kv_heads=2, block_size=5, num_blocks=2), dict(num_heads=4, block_size=91),
            dead=SOFTMAX_INVARIANT,
        ),
        Case(
            "nsa",
            dict(
                num_heads=4, num_kv_heads=2, block_size=4, num_blocks=3, compression_size=4, compression_stride=2,
                window_size=5,
            ),
            dead=(*SOFTMAX_INVARIANT, "window_key/bias", "compress_key/outer/bias"),
        ),
        Case(  # rotated, so that a constant added to all keys counts in the causal layer too
            "h_transformer", dict(num_heads=2, num_kv_heads=1, block_size=2, rotary_base=100.0), dict(num_heads=4),
        ),
        Case(
            "linformer", dict(num_heads=2, max_length=100, num_landmarks=6),
            dict(num_heads=4, max_length=LONG, num_landmarks=64),
        ),
        Case("kernelized", dict(num_heads=4, num_kv_heads=2)),
        Case("skyformer", dict(num_heads=2, num_landmarks=6), dict(num_heads=4, num_landmarks=64)),
        Case(
            "nystrom", dict(num_heads=2, num_landmarks=6, conv_width=5), dict(num_heads=4, num_landmarks=64),
            dead=SOFTMAX_INVARIANT,
        ),
        Case("luna", dict(num_heads=2, num_slots=6), dict(num_heads=4, num_slots=64)),
        Case(
            "isab", dict(num_heads=2, num_inducing=6), dict(num_heads=4, num_inducing=32),
            dead=(*SOFTMAX_INVARIANT, "induced_key/bias"),
        ),
        Case(
            "perceiver", dict(num_heads=2, num_latents=6, latent_features=12),
            dict(num_heads=4, num_latents=32, latent_features=32),
            dead=(*SOFTMAX_INVARIANT, "latent_key/bias", "layers/0/key/bias"),
        ),
        # Of an uncompressed key, and of a block that is not whole, the bias is not what it is of the others.
        Case(
            "memory_compressed", dict(num_heads=4, num_kv_heads=2, compression=4), dead=("compress_key/bias",),
            dead_if_causal=(),
        ),
        Case("linear", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case("performer", dict(num_heads=2, num_features=24), dict(num_heads=4, num_features=64)),
        Case("cosformer", dict(num_heads=2, num_kv_heads=1, max_length=100), dict(num_heads=4, max_length=LONG)),
        Case("dpfp", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case("hedgehog", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case(
            "flash", dict(chunk_size=7, shared_features=4, value_features=8),
            dict(chunk_size=128, shared_features=64, value_features=256),
        ),
        Case("rfa", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case("retention", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case("gla", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4)),
        Case("hgrn2", dict(num_heads=4, lower_bound=0.25), dict(num_heads=4)),
        Case("based", dict(num_heads=4, num_kv_heads=2, qkv_features=16), dict(num_heads=4)),
        Case("gsa", dict(num_heads=4, num_kv_heads=2, num_slots=6), dict(num_heads=4, num_slots=32)),
        Case("efficient", dict(num_heads=4, num_kv_heads=2), dict(num_heads=4), dead=SOFTMAX_INVARIANT),
        Case(
            "transformer_xl", dict(num_heads=2, segment_length=8, memory_length=5),
            dict(num_heads=4, segment_length=256, memory_length=256), dead=SOFTMAX_INVARIANT,
        ),
        Case(  # the task does not train what compresses: `reconstruction_loss` does
            "compressive",
            dict(num_heads=2, segment_length=6, memory_length=4, compressed_length=3, rate=2, compression="conv"),
            dict(num_heads=4, segment_length=256, memory_length=256, compressed_length=64),
            dead=(*SOFTMAX_INVARIANT, "compressor/kernel", "compressor/bias"),
        ),
        Case(  # rotated, so that a constant added to all keys counts in the segment; in the memory it does anyway
            "infini", dict(num_heads=4, num_kv_heads=2, segment_length=6, rotary_base=100.0),
            dict(num_heads=4, segment_length=256),
        ),
        Case("memorizing", dict(num_heads=4, num_kv_heads=2, segment_length=6, num_neighbors=3)),
        Case("deltanet", dict(num_heads=4, num_kv_heads=2, value_features=24), dict(num_heads=4)),
        Case("mamba2", dict(head_features=8, state_size=6, num_groups=2), dict(head_features=64)),
        Case("rwkv6", dict(head_features=8, mix_rank=4, decay_rank=5), dict(head_features=64)),
        Case("mlstm", dict(num_heads=2, block_size=8), dict(num_heads=4)),
        Case("rwkv4", dict(hidden_features=12), dict(hidden_features=None)),
        Case("gated_deltanet", dict(num_heads=4, num_kv_heads=2, value_features=24), dict(num_heads=4)),
        # With as many key heads as query heads their float32 decays, and the keys of two steps, are above a GiB at 64K tokens.
        Case("kda", dict(num_heads=4, num_kv_heads=2, value_features=24), dict(num_heads=4, num_kv_heads=1)),
        Case("delta_product", dict(num_heads=4, num_kv_heads=2, value_features=24), dict(num_heads=4, num_kv_heads=1)),
        Case("rwkv7", dict(head_features=8, decay_rank=5, rate_rank=3, gate_rank=4), dict(head_features=64)),
        Case("s4", dict(state_size=8), dict(state_size=16)),
        Case("mega", dict(state_size=3, shared_features=4, value_features=8, chunk_size=7, out_features=FEATURES)),
        Case("dss", dict(state_size=8), dict(state_size=16)),
        Case("lru", dict(state_size=8), dict(state_size=64)),
        Case("rglru", dict(hidden_features=12, num_blocks=3), dict(num_blocks=8)),
        Case("hgrn", dict(lower_bound=0.25)),
        Case("h3", dict(head_features=2, state_size=4, conv_width=3, dt_min=0.05, dt_max=0.5), dict(state_size=16)),
        Case("mamba", dict(hidden_features=12, state_size=4, step_rank=3), dict(state_size=16)),
        Case("s5", dict(state_size=8, num_blocks=2, gate="full"), dict(state_size=64)),
        Case("lightconv", dict(num_heads=4, conv_width=5), dict(num_heads=8, conv_width=15)),
        Case("dynamicconv", dict(num_heads=4, conv_width=5), dict(num_heads=8, conv_width=15)),
        Case("lsra", dict(num_heads=2, conv_heads=4, conv_width=5), dead=("attention/key/bias",)),
        # Rounding of an FFT is in proportion to its largest token: here one 30 times as large as the others, gated by itself.
        Case(
            "hyena", dict(max_length=100, filter_features=8, num_bands=3, frequency=1.0),
            dict(max_length=LONG, convolve_values=False), tolerance=2e-4,
        ),
        # With a linear map behind, so that there is something to learn. Outputs are sqrt(T D) times as large as inputs.
        Case("fnet", dict(out_features=FEATURES), tolerance=2e-4),
        Case("entmax", dict(num_heads=4, num_kv_heads=2, alpha="learned"), dead=SOFTMAX_INVARIANT),
        Case(  # the "Pro" block, whose norm sees a constant that is added to all keys
            "forgetting",
            dict(
                num_heads=4, num_kv_heads=2, use_output_gate=True, use_output_norm=True, use_qk_norm=True, use_kv_shift=True,
            ),
        ),
        Case("stickbreaking", dict(num_heads=4, num_kv_heads=2)),
        Case("differential", dict(num_heads=2, num_kv_heads=1), dead=SOFTMAX_INVARIANT),
        Case("gau", dict(shared_features=4, value_features=8, bias="simple", max_length=100)),
        Case(
            "synthesizer", dict(num_heads=2, max_length=100, synthesis=("dense", "random", "dot_product")),
            dead=SOFTMAX_INVARIANT,
        ),
    )
}

# Layers that choose by comparing: rounding may choose otherwise for a token, which is no small change; so large a part of the
# outputs stays. A query that moves to another cluster takes the means of both with it, and so the outputs of all in them.
CHOOSING = {
    "reformer": 0.9, "routing": 0.9, "smyrf": 0.9, "informer": 0.9, "clustered": 0.7, "moba": 0.9, "nsa": 0.9,
    "memorizing": 0.9,
}  # fmt: skip

DIRECTIONS = [
    (name, is_causal)
    for name, case in CASES.items()
    for is_causal in (False, True)
    if (case.supports.causal if is_causal else case.supports.bidirectional)
]
# Layers whose family, a folder of zoo/, has a row above: of what is not the contract's core they run a sample.
FAMILIES = {name: zoo.LAYERS[name].__module__.split(".")[-2] for name in CASES}
SIBLINGS = [name for at, name in enumerate(CASES) if FAMILIES[name] in list(FAMILIES.values())[:at]]
sampled = pytest.mark.sample(6, of=SIBLINGS)
halved = pytest.mark.sample(2, of=SIBLINGS)  # of what takes longest
CAUSAL = [name for name, is_causal in DIRECTIONS if is_causal]
SEGMENTED = [(name, is_causal) for name, is_causal in DIRECTIONS if CASES[name].supports.segment_ids]
EXTENDING = [name for name in CAUSAL if CASES[name].supports.extend]


def one_direction(pairs: list[tuple[str, bool]]) -> list:
    """Of what a family's code does alike in both directions each sibling meets one by default: one this, the next that."""
    left_out = [(name, at % 2 == 0) for at, name in enumerate(SIBLINGS)]
    both = [pair for pair in pairs if (pair[0], not pair[1]) in pairs]
    return [pytest.param(*pair, marks=pytest.mark.full if pair in left_out and pair in both else ()) for pair in pairs]


def label(value) -> str | None:
    return {True: "causal", False: "bidirectional"}.get(value) if isinstance(value, bool) else None


def inputs(length: int, batch: int = 2, seed: int = 0, dtype=jnp.float32):
    return nnx.Rngs(seed).params.normal((batch, length, FEATURES)).astype(dtype)
