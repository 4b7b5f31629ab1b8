"""Every option of every constructor reaches the layer: what it computes, what it draws, or what shapes it has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subquad import zoo
from subquad.zoo.base import Attention
from subquad.zoo.options import options_of

from .cases import FEATURES, inputs

LENGTH = 24
NSA = dict(num_heads=2, block_size=4, num_blocks=4, compression_size=4, compression_stride=2, window_size=5)

# What an option does to the outputs of a layer with the same variables: (layer, the other options, the option, its value).
# `is_causal` has no row: the contract suite runs both directions.
COMPUTED = [
    ("softmax", dict(num_heads=2), "rotary_base", 100.0),
    ("blockwise", dict(num_heads=4, max_length=24), "rotary_base", 100.0),
    ("local", dict(num_heads=2), "rotary_base", 100.0),
    ("strided", dict(num_heads=2), "rotary_base", 100.0),
    ("blockwise", dict(num_heads=4, block_size=5, max_length=25), "max_length", 40),  # other permutations
    ("blockwise", dict(num_heads=4, max_length=24), "block_size", 5),
    ("blockwise", dict(num_heads=4, max_length=24, block_size=5), "shifts", (1, -1, 0, 3)),
    ("local", dict(num_heads=2, window_size=3), "window_size", 5),
    ("local", dict(num_heads=2, window_size=3), "window_size", (3, 2)),
    ("local", dict(num_heads=2, window_size=3), "window_size", (2, 3)),
    ("local", dict(num_heads=2, window_size=3, is_causal=True), "window_size", (5, 0)),
    ("diagonal", dict(num_heads=2), "rotary_base", 100.0),
    ("diagonal", dict(num_heads=2, window_size=2), "window_size", (2, 3)),
    ("diagonal", dict(num_heads=2, window_size=2), "dilation", 3),
    ("diagonal", dict(num_heads=2, window_size=2), "dilation", (2, 3)),
    ("random", dict(num_heads=2, max_length=24, block_size=2), "rotary_base", 100.0),
    ("random", dict(num_heads=2, max_length=24, block_size=2), "max_length", 40),  # other draws
    ("random", dict(num_heads=2, max_length=24, block_size=2), "block_size", 3),
    ("random", dict(num_heads=2, max_length=24, block_size=2), "num_random", 1),
    ("random", dict(num_heads=2, max_length=24, block_size=2), "random_seed", 1),
    ("axial", dict(num_heads=2, row_length=4), "rotary_base", 100.0),
    ("axial", dict(num_heads=2, row_length=4), "row_length", 5),
    ("axial", dict(num_heads=2, row_length=4), "axis", "row"),
    ("axial", dict(num_heads=2, row_length=4), "axis", "column"),
    ("global", dict(num_heads=2), "rotary_base", 100.0),
    ("global", dict(num_heads=2, radius=3), "radius", 4),
    ("global", dict(num_heads=2, radius=3), "num_global", 4),
    ("longt5", dict(num_heads=2), "radius", 4),
    ("longt5", dict(num_heads=2), "block_size", 5),
    ("longt5", dict(num_heads=2), "max_distance", 10),
    ("longt5", dict(num_heads=2), "scale", 0.5),
    ("longformer", dict(num_heads=2), "rotary_base", 100.0),
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "rotary_base", 100.0),
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "max_length", 40),  # other draws, and another last block
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "block_size", 3),
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "num_random", 1),
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "num_global", 3),
    ("bigbird", dict(num_heads=2, max_length=24, block_size=2), "random_seed", 1),
    ("longformer", dict(num_heads=2, window_size=3), "window_size", (2, 3)),
    ("longformer", dict(num_heads=2, window_size=3, num_global=1), "num_global", 4),
    ("strided", dict(num_heads=2, stride=4), "pattern", "fixed"),
    ("strided", dict(num_heads=2, stride=4), "stride", 5),
    ("strided", dict(num_heads=2, stride=4), "heads", "separate"),
    ("strided", dict(num_heads=2, stride=4, pattern="fixed"), "num_summary", 2),
    ("strided", dict(num_heads=2, stride=4, pattern="fixed"), "distinct_summary", True),
    ("strided", dict(num_heads=2, stride=4, pattern="fixed"), "heads", "separate"),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=6), "chunk_size", 4),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=4), "chunks_before", 2),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=4), "chunks_after", 1),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=6), "scale", 1.0),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=6), "reach", "chunk"),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=6), "correct_duplicates", False),
    ("performer", dict(num_heads=2, num_features=16), "kernel", "relu"),
    ("performer", dict(num_heads=2, num_features=16), "rotary_base", 100.0),
    ("linear", dict(num_heads=2), "rotary_base", 100.0),
    ("kernelized", dict(num_heads=2), "rotary_base", 100.0),
    ("skyformer", dict(num_heads=2, num_landmarks=6), "rotary_base", 100.0),
    ("skyformer", dict(num_heads=2, num_landmarks=6), "gamma", 1.0),
    ("skyformer", dict(num_heads=2, num_landmarks=6), "num_iterations", 1),
    ("cosformer", dict(num_heads=2, max_length=24), "max_length", 40),
    ("h_transformer", dict(num_heads=2, block_size=2), "block_size", 4),
    ("h_transformer", dict(num_heads=2, block_size=4), "rotary_base", 100.0),
    ("rfa", dict(num_heads=2), "rotary_base", 100.0),
    ("rfa", dict(num_heads=2, is_causal=True, gate=False), "constants", "code"),
    ("retention", dict(num_heads=2), "rotary_base", 100.0),
    ("retention", dict(num_heads=2), "decay", (0.5, 1.0)),
    ("gla", dict(num_heads=2), "temperature", 1.0),
    ("hgrn2", dict(num_heads=2), "lower_bound", 0.9),
    ("based", dict(num_heads=2), "rotary_base", 100.0),
    ("gsa", dict(num_heads=2, num_slots=5), "temperature", 1.0),
    ("deltanet", dict(num_heads=2), "normalization", "sum"),
    ("deltanet", dict(num_heads=2), "negative_eigenvalues", True),
    ("gated_deltanet", dict(num_heads=2), "negative_eigenvalues", True),
    ("kda", dict(num_heads=2), "negative_eigenvalues", True),
    ("delta_product", dict(num_heads=2), "negative_eigenvalues", False),
    ("nystrom", dict(num_heads=2, num_landmarks=6), "num_landmarks", 5),
    ("nystrom", dict(num_heads=2, num_landmarks=6), "num_iterations", 2),
    ("nystrom", dict(num_heads=2, num_landmarks=6), "rotary_base", 100.0),
    ("reformer", dict(num_heads=2, num_hashes=2, num_buckets=4, chunk_size=6), "rotary_base", 100.0),
    ("routing", dict(num_heads=2, num_clusters=4), "window_size", 3),
    ("routing", dict(num_heads=2, num_clusters=4, window_size=3, is_causal=True), "selection", "last"),
    ("routing", dict(num_heads=2, num_clusters=4), "normalize", False),
    ("routing", dict(num_heads=2, num_clusters=4), "rotary_base", 100.0),
    ("smyrf", dict(num_heads=2, num_hashes=2, cluster_size=6), "cluster_size", 5),
    ("smyrf", dict(num_heads=2, num_hashes=2, cluster_size=6), "rotary_base", 100.0),
    ("informer", dict(num_heads=2, factor=2), "rotary_base", 100.0),
    ("clustered", dict(num_heads=2, num_clusters=4, num_top=3), "num_clusters", 6),
    ("clustered", dict(num_heads=2, num_clusters=4, num_top=3), "num_top", 0),
    ("clustered", dict(num_heads=2, num_clusters=4, num_top=0, num_bits=8), "num_iterations", 1),
    ("clustered", dict(num_heads=2, num_clusters=4), "rotary_base", 100.0),
    ("moba", dict(num_heads=2, block_size=6, num_blocks=2), "block_size", 4),
    ("moba", dict(num_heads=2, block_size=6, num_blocks=2), "num_blocks", 1),
    ("moba", dict(num_heads=2, block_size=6, num_blocks=2), "rotary_base", 100.0),
    ("nsa", NSA, "block_size", 6),
    ("nsa", NSA, "num_blocks", 3),
    ("nsa", NSA, "num_initial", 0),
    ("nsa", NSA, "num_local", 1),
    ("nsa", NSA, "window_size", 3),
    ("nsa", NSA, "compression_stride", 1),
    ("nsa", NSA, "rotary_base", 100.0),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "block_size", 7),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "num_iterations", 1),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "temperature", 2.0),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "sort_cut", 2),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "rotary_base", 100.0),
    ("linformer", dict(num_heads=2, max_length=24, num_landmarks=6), "rotary_base", 100.0),
    ("luna", dict(num_heads=2, num_slots=5, is_causal=True), "activation", "elu"),
    ("memory_compressed", dict(num_heads=2), "rotary_base", 100.0),
    ("perceiver", dict(num_heads=2, num_latents=6), "num_repeats", 3),
    ("transformer_xl", dict(num_heads=2, segment_length=6, memory_length=4), "segment_length", 8),
    ("transformer_xl", dict(num_heads=2, segment_length=6, memory_length=4), "memory_length", 2),
    ("infini", dict(num_heads=2, segment_length=6), "segment_length", 4),
    ("infini", dict(num_heads=2, segment_length=6), "update", "linear"),
    ("infini", dict(num_heads=2, segment_length=6), "rotary_base", 100.0),
    ("memorizing", dict(num_heads=2, segment_length=6, num_neighbors=3), "segment_length", 4),
    ("memorizing", dict(num_heads=2, segment_length=6, num_neighbors=3), "num_neighbors", 1),
    ("memorizing", dict(num_heads=2, segment_length=6, num_neighbors=3), "memory_length", 2),
    *(
        ("compressive", dict(num_heads=2, segment_length=4, memory_length=4, compressed_length=4, rate=2), option, value)
        for option, value in dict(segment_length=6, memory_length=2, compressed_length=2, rate=1, compression="max").items()
    ),
    ("compressive", dict(num_heads=2, segment_length=4, memory_length=4, rate=2), "compression", "most_used"),
    ("compressive", dict(num_heads=2, segment_length=8, memory_length=4, rate=2, compression="dilated"), "dilation", 1),
    ("s4", dict(state_size=4, mode="diagonal"), "discretization", "bilinear"),
    ("s5", dict(state_size=8, dt_min=0.5, dt_max=2.0), "discretization", "bilinear"),
    ("entmax", dict(num_heads=2), "rotary_base", 100.0),
    ("entmax", dict(num_heads=2), "alpha", 2),
    ("forgetting", dict(num_heads=2), "rotary_base", 100.0),
    ("stickbreaking", dict(num_heads=2), "rotary_base", 100.0),
    ("stickbreaking", dict(num_heads=2), "attend_current", True),
    ("differential", dict(num_heads=2), "rotary_base", 100.0),
    ("differential", dict(num_heads=2), "lambda_init", 0.2),
    ("dpfp", dict(num_heads=2), "rotary_base", 100.0),
    ("hedgehog", dict(num_heads=2), "rotary_base", 100.0),
    ("hedgehog", dict(num_heads=2), "activation", "exp"),
    ("dpfp", dict(num_heads=2), "nu", 2),
    ("gau", dict(), "rotary_base", None),
    ("flash", dict(chunk_size=7), "rotary_base", 100.0),
    ("flash", dict(chunk_size=7, is_causal=True), "chunk_size", 5),
    ("s5", dict(state_size=8), "gate", "only"),
    ("s5", dict(state_size=8), "gate", None),
    ("lru", dict(state_size=8, gate="half"), "gate", "only"),
    ("mega", dict(), "function", "laplace"),
    ("mega", dict(), "chunk_size", 5),
    ("hyena", dict(max_length=24), "max_length", 40),
    ("hyena", dict(max_length=24), "shift", 0.1),
    ("hgrn", dict(), "lower_bound", 0.9),
    ("h3", dict(state_size=4, dt_min=0.5, dt_max=2.0), "discretization", "zoh"),
    ("dss", dict(state_size=4, gate="half"), "gate", None),
    ("dss", dict(state_size=4, normalization="softmax", max_length=24), "max_length", 30),
]

# What an option does to the values that are drawn; all other variables stay: (..., the variables that change).
DRAWN = [
    ("performer", dict(num_heads=2, num_features=16), "orthogonal", False, {"projection"}),
    ("performer", dict(num_heads=2, num_features=16), "row_norm", "sqrt", {"projection"}),
    ("s4", dict(state_size=4, mode="diagonal"), "init", "lin", {"system/frequency", "system/input_matrix"}),
    ("s4", dict(state_size=8, mode="diagonal"), "init", "inv", {"system/frequency", "system/input_matrix"}),
    ("s4", dict(state_size=4), "dt_min", 0.01, {"system/log_step"}),
    ("s4", dict(state_size=4), "dt_max", 0.5, {"system/log_step"}),
    ("mamba2", dict(head_features=8), "dt_min", 0.01, {"step_bias"}),
    ("mamba2", dict(head_features=8), "dt_max", 0.5, {"step_bias"}),
    ("s5", dict(state_size=8), "init", "lin", {"frequency", "input_matrix", "output_matrix"}),
    ("s5", dict(state_size=8), "num_blocks", 2, {"frequency", "input_matrix", "output_matrix"}),
    ("s5", dict(state_size=8), "output_init", "truncated", {"output_matrix"}),
    ("s5", dict(state_size=8), "dt_min", 0.01, {"log_step"}),
    ("s5", dict(state_size=8), "dt_max", 0.5, {"log_step"}),
    ("dss", dict(state_size=4), "dt_min", 0.01, {"log_step"}),
    ("dss", dict(state_size=4), "dt_max", 0.5, {"log_step"}),
    ("hyena", dict(max_length=24), "frequency", 1.0, {"frequency"}),
    ("h3", dict(state_size=4), "init", "inv", {"system/frequency"}),
    ("h3", dict(state_size=4), "dt_min", 0.01, {"system/log_step"}),
    ("h3", dict(state_size=4), "dt_max", 0.5, {"system/log_step"}),
    ("mamba", dict(), "dt_min", 0.01, {"step/bias"}),
    ("mamba", dict(), "dt_max", 0.5, {"step/bias"}),
    ("lru", dict(), "r_min", 0.9, {"log_decay", "log_scale"}),
    ("lru", dict(), "r_max", 0.999, {"log_decay", "log_scale"}),
    ("lru", dict(), "max_phase", 0.314, {"log_phase"}),
]

# What an option does to the shapes of variables; None: there is no such variable.
SHAPED = [
    ("softmax", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("local", dict(num_heads=4), "num_kv_heads", 1, {"key/kernel": (16, 1, 4), "value/kernel": (16, 1, 4)}),
    ("global", dict(num_heads=4), "num_kv_heads", 2, {"key_global/kernel": (16, 2, 4), "value_to_long/kernel": (16, 2, 4)}),
    ("global", dict(num_heads=4), "sharing", "query", {"key_to_global/kernel": None, "value_to_long/kernel": None}),
    ("global", dict(num_heads=4), "sharing", "all", {"query_global/kernel": None, "value_global/bias": None}),
    ("longt5", dict(num_heads=4), "num_buckets", 8, {"bias": (8, 4), "global_bias": (8, 4)}),
    ("longt5", dict(num_heads=4), "block_size", None, {"global_bias": None, "global_scale": None}),
    ("longformer", dict(num_heads=4), "num_kv_heads", 2, {"key_global/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("longformer", dict(num_heads=4), "num_global", 0, {"query_global/kernel": None, "value_global/bias": None}),
    ("linear", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("cosformer", dict(num_heads=4, max_length=24), "num_kv_heads", 2, {"key/kernel": (16, 2, 4)}),
    ("h_transformer", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("rfa", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("rfa", dict(num_heads=2), "num_features", 20, {"projection": (2, 20, 8)}),
    ("rfa", dict(num_heads=2, is_causal=True), "gate", False, {"gate/kernel": None, "gate/bias": None}),
    ("retention", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 8)}),
    ("retention", dict(num_heads=4), "value_features", 24, {"value/kernel": (16, 4, 6), "gate/kernel": (16, 4, 6)}),
    ("gla", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 2), "decay_up/kernel": (16, 2, 2)}),
    ("gla", dict(num_heads=4), "value_features", 24, {"value/kernel": (16, 4, 6), "gate/kernel": (16, 4, 6)}),
    ("gla", dict(num_heads=4), "decay_rank", 3, {"decay_down/kernel": (16, 3), "decay_up/kernel": (3, 4, 2)}),
    ("based", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 16), "value/kernel": (16, 2, 4)}),
    ("based", dict(num_heads=4), "value_features", 24, {"value/kernel": (16, 4, 6), "out/kernel": (4, 6, 16)}),
    ("gsa", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "forget/kernel": (16, 2, 64)}),
    ("gsa", dict(num_heads=4), "num_slots", 20, {"forget/kernel": (16, 4, 20)}),
    ("efficient", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("kernelized", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("skyformer", dict(num_heads=2), "num_landmarks", 20, {"landmarks": (20,)}),
    ("nystrom", dict(num_heads=2), "conv_width", 3, {"taps": (3, 2)}),
    ("nystrom", dict(num_heads=2), "conv_width", None, {"taps": None}),
    ("reformer", dict(num_heads=2), "num_hashes", 3, {"rotations": (2, 8, 3, 64)}),
    ("reformer", dict(num_heads=2), "num_buckets", (4, 6), {"rotations": (2, 8, 4, 5)}),
    ("routing", dict(num_heads=2), "num_clusters", 5, {"centroids": (2, 5, 8)}),
    ("smyrf", dict(num_heads=2), "num_hashes", 3, {"directions": (3, 2, 10)}),
    ("informer", dict(num_heads=2), "factor", 2, {"sample": (48,)}),
    ("clustered", dict(num_heads=2), "num_bits", 5, {"planes": (2, 5, 8)}),
    ("moba", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("memorizing", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("infini", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("nsa", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "window_value/kernel": (16, 2, 4)}),
    ("nsa", dict(num_heads=4), "compression_size", 48, {"compress_key/inner/kernel": (48, 4, 16)}),
    ("nsa", dict(num_heads=4), "compression", "mean", {"compress_key/inner/kernel": None, "compress_value/position": None}),
    ("sinkhorn", dict(num_heads=2, max_length=24, block_size=6), "max_length", 30, {"sort_scores": (2, 8, 5)}),
    ("linformer", dict(num_heads=2, max_length=24), "max_length", 30, {"projection/key": (30, 256)}),
    ("linformer", dict(num_heads=2, max_length=24), "num_landmarks", 5, {"projection/value": (24, 5)}),
    ("linformer", dict(num_heads=2, max_length=24), "sharing", "key_value", {"projection/value": None}),
    ("linformer", dict(num_heads=2, max_length=24), "sharing", "none", {"projection/key": (2, 24, 256)}),
    ("luna", dict(num_heads=2), "num_slots", 20, {"slots": (20, 16)}),
    ("luna", dict(share_key_value=False), "share_key_value", True, {"value/kernel": None, "unpack_value/kernel": None}),
    ("isab", dict(num_heads=2), "num_inducing", 20, {"inducing": (20, 16)}),
    ("perceiver", dict(num_heads=2), "num_latents", 20, {"latents": (20, 16)}),
    ("perceiver", dict(num_heads=2), "latent_features", 12, {"latents": (128, 12), "encoder/inner/kernel": (12, 12)}),
    ("perceiver", dict(num_heads=2), "latent_heads", 4, {"layers/0/key/kernel": (16, 4, 4), "latent_key/kernel": (16, 2, 8)}),
    ("perceiver", dict(num_heads=2), "num_layers", 0, {"layers/0/query/kernel": None}),
    ("memory_compressed", dict(num_heads=2), "compression", 4, {"compress_key/kernel": (32, 2, 8)}),
    ("memory_compressed", dict(num_heads=2, null_key=True), "null_key", False, {"null_key": None, "null_value": None}),
    ("memory_compressed", dict(num_heads=4), "num_kv_heads", 2, {"compress_value/kernel": (12, 2, 4)}),
    ("performer", dict(num_heads=2), "num_features", 20, {"projection": (20, 8)}),
    ("s4", dict(), "state_size", 6, {"system/frequency": (16, 3), "system/output_matrix": (2, 16, 3, 2)}),
    ("s4", dict(), "num_ssm", 4, {"system/frequency": (4, 32), "system/log_step": (16,)}),
    ("s4", dict(), "mode", "diagonal", {"system/low_rank": None}),
    ("s4", dict(), "glu", False, {"out/kernel": (16, 16)}),
    ("s4", dict(), "out_features", 5, {"out/kernel": (16, 10)}),
    ("entmax", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("forgetting", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("forgetting", dict(use_output_gate=True), "use_output_gate", False, {"output_gate/kernel": None}),
    ("forgetting", dict(use_output_norm=True), "use_output_norm", False, {"output_norm/scale": None}),
    ("forgetting", dict(use_qk_norm=True), "use_qk_norm", False, {"query_norm/scale": None, "key_norm/scale": None}),
    ("forgetting", dict(use_kv_shift=True), "use_kv_shift", False, {"key_shift/kernel": None, "value_shift/kernel": None}),
    ("stickbreaking", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("stickbreaking", dict(num_heads=4, remainder=True), "remainder", False, {"rest": None}),
    ("differential", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("dpfp", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "value/kernel": (16, 2, 4)}),
    ("hedgehog", dict(num_heads=4), "num_kv_heads", 2, {"key/kernel": (16, 2, 4), "key_map": (2, 4, 4), "key_shift": (2, 4)}),
    ("s5", dict(), "state_size", 6, {"frequency": (3,), "input_matrix": (3, 16, 2), "output_matrix": (2, 16, 3, 2)}),
    ("s5", dict(), "gate", "full", {"out/kernel": (16, 32)}),
    ("s5", dict(gate=None), "out_features", 5, {"out/kernel": (16, 5)}),
    ("mega", dict(), "state_size", 6, {"damping": (2, 16, 6), "reduction": (2, 16, 6)}),
    ("mega", dict(), "shared_features", 6, {"query_key_scale": (2, 6), "mixed/kernel": (16, 70)}),
    ("mega", dict(), "value_features", 5, {"value/kernel": (16, 5)}),
    ("mamba2", dict(head_features=8), "hidden_features", 24, {"gate/kernel": (16, 24), "step/kernel": (16, 3)}),
    ("mamba2", dict(head_features=8), "head_features", 4, {"direct": (8,), "norm/scale": (1, 32)}),
    ("mamba2", dict(head_features=8), "state_size", 6, {"input/kernel": (16, 44)}),
    ("mamba2", dict(head_features=8, state_size=6), "num_groups", 2, {"input/kernel": (16, 56), "norm/scale": (2, 16)}),
    ("mamba2", dict(head_features=8, state_size=6), "conv_width", 3, {"convolution/taps": (3, 44)}),
    ("mamba2", dict(head_features=8), "out_features", 5, {"out/kernel": (32, 5)}),
    ("rwkv6", dict(head_features=8), "hidden_features", 24, {"gate/kernel": (16, 24), "bonus": (3, 8)}),
    ("rwkv6", dict(head_features=8), "head_features", 4, {"bonus": (4, 4), "norm/scale": (4, 4)}),
    ("rwkv6", dict(head_features=8), "mix_rank", 3, {"mix_down": (5, 16, 3), "mix_up": (5, 3, 16)}),
    ("rwkv6", dict(head_features=8), "decay_rank", 3, {"decay_down": (16, 3), "decay_up": (3, 16)}),
    ("rwkv6", dict(head_features=8), "out_features", 5, {"out/kernel": (16, 5)}),
    ("rwkv7", dict(head_features=8), "hidden_features", 24, {"value/kernel": (16, 24), "bonus": (3, 8)}),
    ("rwkv7", dict(head_features=8), "head_features", 4, {"bonus": (4, 4), "norm/scale": (4, 4)}),
    ("rwkv7", dict(head_features=8), "decay_rank", 3, {"decay_down": (16, 3), "decay_up": (3, 16)}),
    ("rwkv7", dict(head_features=8), "rate_rank", 3, {"rate_down": (16, 3), "rate_up": (3, 16)}),
    ("rwkv7", dict(head_features=8), "gate_rank", 3, {"gate_down": (16, 3), "gate_up": (3, 16)}),
    ("rwkv7", dict(head_features=8), "out_features", 5, {"out/kernel": (16, 5)}),
    ("mlstm", dict(), "hidden_features", 24, {"gate/kernel": (16, 24), "query/kernel": (4, 6, 4)}),
    ("mlstm", dict(), "num_heads", 2, {"gates": (2, 96, 2), "norm/scale": (2, 16)}),
    ("mlstm", dict(), "block_size", 8, {"key/kernel": (8, 4, 8), "value/kernel": (8, 4, 8)}),
    ("mlstm", dict(), "conv_width", 3, {"convolution/taps": (3, 32)}),
    ("mlstm", dict(), "out_features", 5, {"out/kernel": (32, 5)}),
    ("rwkv4", dict(), "hidden_features", 24, {"key/kernel": (16, 24), "bonus": (24,)}),
    ("rwkv4", dict(), "out_features", 5, {"out/kernel": (16, 5)}),
    ("mega", dict(bias="simple", max_length=30), "max_length", 24, {"distances": (47,)}),
    ("mega", dict(out_features=4), "out_features", 5, {"out/kernel": (16, 5)}),
    ("gau", dict(), "shared_features", 6, {"query_key_scale": (2, 6), "shared/kernel": (16, 6)}),
    ("gau", dict(), "value_features", 5, {"value/kernel": (16, 5), "gate/kernel": (16, 5), "out/kernel": (5, 16)}),
    ("gau", dict(is_causal=True, max_length=24), "bias", "simple", {"rotated": None}),
    ("gau", dict(bias="simple", max_length=30), "max_length", 24, {"distances": (47,)}),
    ("gau", dict(), "out_features", 5, {"out/kernel": (32, 5)}),
    ("flash", dict(), "shared_features", 6, {"query_key_scale": (4, 6), "shared/kernel": (16, 6)}),
    ("flash", dict(), "value_features", 5, {"value/kernel": (16, 5), "gate/kernel": (16, 5), "out/kernel": (5, 16)}),
    ("flash", dict(), "bias", "simple", {"rotated": None}),
    ("flash", dict(), "out_features", 5, {"out/kernel": (32, 5)}),
    ("dss", dict(), "state_size", 6, {"frequency": (6,), "output_matrix": (2, 16, 6, 2)}),
    ("dss", dict(), "separate_steps", False, {"log_step": (16, 1)}),
    ("dss", dict(), "out_features", 5, {"out/kernel": (16, 5)}),
    ("lru", dict(), "state_size", 6, {"log_phase": (6,), "input_matrix": (6, 16, 2), "output_matrix": (2, 16, 6, 2)}),
    ("lru", dict(), "out_features", 5, {"out/kernel": (16, 10)}),
    ("rglru", dict(), "hidden_features", 32, {"input/kernel": (16, 32), "decay_gate/kernel": (2, 16, 2), "taps": (4, 32)}),
    ("rglru", dict(), "num_blocks", 2, {"decay_gate/kernel": (8, 2, 8), "input_gate/kernel": (8, 2, 8)}),
    ("rglru", dict(), "conv_width", 3, {"taps": (3, 16)}),
    ("rglru", dict(), "out_features", 5, {"out/kernel": (16, 5)}),
    ("hgrn", dict(), "out_features", 5, {"out/kernel": (32, 5)}),
    ("h3", dict(), "head_features", 2, {"system/frequency": (8, 32), "skip": (8,)}),
    ("h3", dict(), "state_size", 6, {"system/frequency": (16, 3), "shift/taps": (6, 16)}),
    ("h3", dict(), "conv_width", 3, {"shift/taps": (3, 16)}),
    ("h3", dict(), "out_features", 5, {"out/kernel": (16, 5)}),
    ("deltanet", dict(num_heads=2), "num_kv_heads", 1, {"key/kernel": (16, 1, 8), "rule/key/taps": (4, 8)}),
    ("deltanet", dict(num_heads=2), "value_features", 24, {"value/kernel": (16, 2, 12), "out/kernel": (2, 12, 16)}),
    ("deltanet", dict(num_heads=2), "conv_width", 3, {"rule/query/taps": (3, 16), "rule/value/taps": (3, 16)}),
    ("mamba", dict(), "hidden_features", 24, {"input/kernel": (16, 24), "gate/kernel": (16, 24), "log_rates": (24, 16)}),
    ("mamba", dict(), "state_size", 6, {"log_rates": (32, 6), "select/kernel": (32, 13)}),
    ("mamba", dict(), "step_rank", 3, {"step/kernel": (3, 32), "select/kernel": (32, 35)}),
    ("mamba", dict(), "conv_width", 3, {"convolution/taps": (3, 32)}),
    ("mamba", dict(), "out_features", 5, {"out/kernel": (32, 5)}),
    ("deltanet", dict(num_heads=2), "num_kv_heads", 1, {"key/kernel": (16, 1, 8), "rule/key/taps": (4, 8)}),
    ("deltanet", dict(num_heads=2), "value_features", 24, {"value/kernel": (16, 2, 12), "out/kernel": (2, 12, 16)}),
    ("deltanet", dict(num_heads=2), "conv_width", 3, {"rule/query/taps": (3, 16), "rule/value/taps": (3, 16)}),
    ("hyena", dict(max_length=24), "order", 3, {"input/kernel": (16, 64), "last_kernel": (64, 16, 3), "skip": (16, 3)}),
    ("hyena", dict(max_length=24), "convolve_values", False, {"last_kernel": (64, 16, 1), "skip": (16, 1)}),
    ("hyena", dict(max_length=24), "conv_width", 4, {"short/taps": (4, 48)}),
    ("hyena", dict(max_length=24), "filter_features", 8, {"last_kernel": (8, 16, 2), "frequency": (8,)}),
    ("hyena", dict(max_length=24), "num_inner", 1, {"inner_kernel": (1, 64, 64), "inner_bias": (1, 64)}),
    ("hyena", dict(max_length=24), "num_bands", 5, {"first_kernel": (11, 64)}),
    ("hyena", dict(max_length=24), "out_features", 5, {"out/kernel": (16, 5)}),
    ("gated_deltanet", dict(num_heads=2), "num_kv_heads", 1, {"key/kernel": (16, 1, 8), "rule/key/taps": (4, 8)}),
    ("gated_deltanet", dict(num_heads=2), "value_features", 24, {"value/kernel": (16, 2, 12), "out/kernel": (2, 12, 16)}),
    ("gated_deltanet", dict(num_heads=2), "conv_width", 3, {"rule/query/taps": (3, 16), "rule/value/taps": (3, 16)}),
    ("kda", dict(num_heads=2), "num_kv_heads", 1, {"key/kernel": (16, 1, 8), "rule/key/taps": (4, 8)}),
    ("kda", dict(num_heads=2), "value_features", 24, {"value/kernel": (16, 2, 12), "out/kernel": (2, 12, 16)}),
    ("kda", dict(num_heads=2), "conv_width", 3, {"rule/query/taps": (3, 16), "rule/value/taps": (3, 16)}),
    ("delta_product", dict(num_heads=2), "num_kv_heads", 1, {"key/kernel": (16, 2, 8), "rule/key/taps": (4, 16)}),
    ("delta_product", dict(num_heads=2), "value_features", 24, {"value/kernel": (16, 4, 12), "out/kernel": (2, 12, 16)}),
    ("delta_product", dict(num_heads=2), "conv_width", 3, {"rule/query/taps": (3, 16), "rule/value/taps": (3, 32)}),
    ("kda", dict(num_heads=2), "rank", 3, {"decay_down/kernel": (16, 3), "gate_up/kernel": (3, 2, 8)}),
    ("delta_product", dict(num_heads=2), "num_steps", 3, {"key/kernel": (16, 6, 8), "rate/kernel": (16, 6)}),
    ("delta_product", dict(num_heads=2), "use_decay", False, {"decay/step_bias": None, "decay_logits/kernel": None}),
    ("fnet", dict(out_features=4), "out_features", 5, {"out/kernel": (16, 5), "out/bias": (5,)}),
    ("lightconv", dict(num_heads=4), "num_heads", 8, {"convolution/taps": (31, 8)}),
    ("lightconv", dict(num_heads=4), "conv_width", 6, {"convolution/taps": (6, 4)}),
    ("lightconv", dict(), "use_glu", False, {"convolution/input/kernel": (16, 16)}),
    ("lightconv", dict(), "out_features", 5, {"out/kernel": (16, 5), "convolution/input/kernel": (16, 32)}),
    ("dynamicconv", dict(num_heads=4), "num_heads", 8, {"convolution/query/kernel": (16, 31, 8)}),
    ("dynamicconv", dict(num_heads=4), "conv_width", 6, {"convolution/query/kernel": (16, 6, 4)}),
    ("dynamicconv", dict(), "use_glu", False, {"convolution/input/kernel": (16, 16)}),
    ("dynamicconv", dict(), "out_features", 5, {"out/kernel": (16, 5), "convolution/input/kernel": (16, 32)}),
    ("lsra", dict(), "num_heads", 2, {"attention/key/kernel": (8, 2, 4), "local/convolution/taps": (31, 2)}),
    ("lsra", dict(), "conv_heads", 8, {"attention/key/kernel": (8, 4, 2), "local/convolution/taps": (31, 8)}),
    ("lsra", dict(), "conv_width", 6, {"local/convolution/taps": (6, 4)}),
    ("lsra", dict(), "is_dynamic", True, {"local/convolution/taps": None}),
    ("lsra", dict(), "use_glu", False, {"local/convolution/input/kernel": (8, 8)}),
    ("lsra", dict(), "out_features", 6, {"attention/out/kernel": (4, 2, 3), "local/out/kernel": (8, 3)}),
    ("synthesizer", dict(max_length=24), "synthesis", "random", {"dense/columns": None}),
    ("synthesizer", dict(max_length=24), "max_length", 30, {"dense/columns": (2, 8, 30)}),
    ("synthesizer", dict(max_length=24, num_heads=4), "num_kv_heads", 1, {"value/kernel": (16, 1, 4)}),
    ("synthesizer", dict(max_length=24, synthesis="factorized_dense"), "factor", 7, {"outer/columns": (2, 8, 4)}),
    ("synthesizer", dict(max_length=24, synthesis="factorized_random"), "rank", 3, {"rows": (2, 24, 3), "columns": (2, 24, 3)}),
]

# Each has a test of its own: below, in the layer's own file (dropout), or in the contract suite.
OF_HEADLESS = {"in_features", "is_causal", "rngs", "dtype", "param_dtype", "precision", "implementation"}
SHARED = OF_HEADLESS | {"num_heads", "qkv_features", "out_features", "in_kv_features", "use_bias", "kernel_init", "bias_init"}
ALONE = {
    "linformer": {"projection"},
    "softmax": {"dropout_rate", "broadcast_dropout"},
    **{name: {"dropout_rate"} for name in ("lightconv", "dynamicconv", "lsra")},
    "synthesizer": {"is_fixed"}, "dss": {"normalization"}, "mega": {"bias"},
}

# What a layer needs beside the usual words.
SIZES = {
    "based": dict(value_features=8),
    "bigbird": dict(max_length=24),
    "blockwise": dict(max_length=24),
    "cosformer": dict(max_length=24),
    "delta_product": dict(num_steps=1),
    "fnet": dict(out_features=FEATURES),
    "gla": dict(value_features=8, decay_rank=2),
    "gsa": dict(num_slots=2),
    "hyena": dict(max_length=24),
    "kda": dict(rank=2),
    "linformer": dict(max_length=24),
    "mamba2": dict(head_features=8),
    "rwkv6": dict(head_features=8),
    "rwkv7": dict(head_features=8),
    "random": dict(max_length=24),
    "retention": dict(value_features=8),
    "sinkhorn": dict(max_length=24),
    "synthesizer": dict(max_length=24, synthesis=("dense", "dot_product")),
}
# Linear maps of a layer, where they are not four.
MAPS = {
    "fnet": 1,
    "deltanet": 5,
    "forgetting": 5,
    "gated_deltanet": 7,
    "kda": 9,
    "delta_product": 7,
    "dss": 1,
    "dynamicconv": 3,
    "gla": 7,
    "global": 11,
    "gsa": 5,
    "h3": 4,
    "hgrn": 4,
    "hyena": 2,
    "isab": 9,
    "lsra": 6,
    "nsa": 13,
    "luna": 5,
    "mamba": 5,
    "mega": 3,
    "memory_compressed": 6,
    "lightconv": 2,
    "longformer": 7,
    "lru": 1,
    "perceiver": 16,
    "reformer": 3,
    "retention": 5,
    "rglru": 3,
    "mlstm": 3,
    "rwkv6": 5,
    "s4": 1,
    "s5": 1,
    "synthesizer": 5,
    "transformer_xl": 5,
    "compressive": 5,
}
# Of 4 heads of 2 features, 5 features out: kernels that do not make heads of the inputs. Others take what heads gathered, or
# three tokens of a head.
OTHER_SHAPES = {
    "out": (4, 2, 5), "unpack_key": (8, 4, 2), "unpack_value": (8, 4, 2), "compress_key": (6, 4, 2),
    "compress_value": (6, 4, 2), "induce_out": (4, 2, FEATURES), "induce_mlp": (FEATURES, FEATURES),
    "forget_gate": (FEATURES, 4),
    **{f"compress_{x}/{name}": shape for x in ("key", "value") for name, shape in dict(inner=(32, 2, 8), outer=(8, 2)).items()},
    "branch_gate": (FEATURES, 4, 3),
    **{f"layers/0/{name}": (FEATURES, 4, FEATURES // 4) for name in ("query", "key", "value")},
    **{f"{block}/{name}": (FEATURES, FEATURES) for block in ("encoder", "layers/0") for name in ("inner", "outer")},
    "rate": (FEATURES, 4), "decay_logits": (FEATURES, 4), "encoder/out": (4, 2, FEATURES),
    **{f"{name}_down": (FEATURES, 2) for name in ("decay", "gate")}, **{f"{name}_up": (2, 4, 2) for name in ("decay", "gate")},
    "layers/0/out": (4, FEATURES // 4, FEATURES),
}  # fmt: skip


def build(name, **options):
    heads = dict(num_heads=2) if issubclass(zoo.LAYERS[name], Attention) else {}
    return zoo.make(name, in_features=FEATURES, rngs=nnx.Rngs(0), **{**heads, **options})


def variables(layer) -> dict:
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(layer))}


def shapes_of(name, **options) -> dict:
    """As of `variables`; nothing is drawn."""
    state = nnx.state(nnx.eval_shape(lambda: build(name, **options)))
    return {"/".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}


@functools.cache
def default(name, items):
    layer = build(name, **dict(items))
    return nnx.state(layer), jax.jit(lambda x: layer(x))(inputs(LENGTH))


def readable(rows) -> list[str]:
    """Names of the cases, the same in every process: a set would be written in any order."""
    return [f"{name}-{option}-{value}" for name, _, option, value, *_ in rows]


@pytest.mark.parametrize("name,options,option,value", COMPUTED, ids=readable(COMPUTED))
def test_an_option_changes_the_outputs(name, options, option, value):
    state, want = default(name, tuple(options.items()))
    layer = nnx.eval_shape(lambda: build(name, **{**options, option: value}))
    nnx.update(layer, state)
    got = jax.jit(lambda x: layer(x))(inputs(LENGTH))
    assert got.shape == want.shape and jnp.isfinite(got).all()
    assert jnp.abs(got - want).max() > 0.01 * jnp.abs(want).max()


@pytest.mark.parametrize("name,options,option,value,changed", DRAWN, ids=readable(DRAWN))
def test_an_option_changes_what_is_drawn(name, options, option, value, changed):
    before, after = variables(build(name, **options)), variables(build(name, **{**options, option: value}))
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)
    assert {path for path in before if (before[path] != after[path]).any()} == changed


@pytest.mark.parametrize("name,options,option,value,shapes", SHAPED, ids=readable(SHAPED))
def test_an_option_changes_shapes(name, options, option, value, shapes):
    before, after = shapes_of(name, **options), shapes_of(name, **{**options, option: value})
    for path, shape in shapes.items():
        assert path in before
        assert after[path] == shape if shape else path not in after


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_every_option_has_a_test(name):
    known = {row[2] for row in [*COMPUTED, *DRAWN, *SHAPED] if row[0] == name} | ALONE.get(name, set())
    known |= SHARED if issubclass(zoo.LAYERS[name], Attention) else OF_HEADLESS
    refused = set() if zoo.LAYERS[name].supports.rotary else {"rotary_base"}  # see test_rotary
    assert options_of(zoo.LAYERS[name]) - refused <= known, "a new option needs a row in COMPUTED, DRAWN or SHAPED"


# Options with an exact meaning.


def test_s4s_gate_is_the_second_half():
    layer, plain = (build("s4", state_size=4, mode="diagonal", glu=glu) for glu in (True, False))
    x, halves, graph = inputs(7), [], nnx.graphdef(plain)
    run = jax.jit(lambda state: nnx.merge(graph, state)(x))
    nnx.update(plain.system, nnx.state(layer.system))
    plain.skip[...] = layer.skip[...]
    for half in (slice(0, FEATURES), slice(FEATURES, None)):
        plain.out.kernel[...], plain.out.bias[...] = layer.out.kernel[..., half], layer.out.bias[half]
        halves.append(run(nnx.state(plain)))
    np.testing.assert_allclose(jax.jit(lambda: layer(x))(), halves[0] * jax.nn.sigmoid(halves[1]), atol=1e-5)


# The shell.

# Biases of gates, which the papers' layouts have beside projections without any.
OF_GATES = {
    "forgetting": "forget_gate/bias", "rfa": "gate/bias", "gla": "decay_up/bias", "kda": "gate_up/bias",
}  # fmt: skip
OF_THE_SHELL = [name for name, layer in zoo.LAYERS.items() if issubclass(layer, Attention)]


@pytest.mark.parametrize("name", OF_THE_SHELL)
def test_the_shell_takes_sizes_and_initialisers(name):
    ones, twos = nnx.initializers.ones, nnx.initializers.constant(2.0)
    layer = build(name, num_heads=4, qkv_features=8, out_features=5, kernel_init=ones, bias_init=twos, **SIZES.get(name, {}))
    found = variables(layer)
    kernels = {path: leaf for path, leaf in found.items() if path.endswith("/kernel")}
    assert {path: leaf.shape for path, leaf in kernels.items()} == {
        path: OTHER_SHAPES.get(path.removesuffix("/kernel"), (FEATURES, 4, 2)) for path in kernels
    }
    assert {"query/kernel", "out/kernel"} <= set(kernels) and {"key/kernel", "value/kernel"} & set(kernels)
    assert all((leaf == 1).all() for leaf in kernels.values())
    biases = {path: leaf for path, leaf in found.items() if path.endswith("/bias") and "norm/" not in path}
    assert {"query/bias", "out/bias"} <= set(biases) and all((leaf == 2).all() for leaf in biases.values())
    bare = variables(build(name, use_bias=False, **SIZES.get(name, {})))
    assert set(bare) == set(variables(build(name, **SIZES.get(name, {})))) - (set(biases) - {OF_GATES.get(name)})


@pytest.mark.parametrize("name", [name for name in OF_THE_SHELL if zoo.LAYERS[name].supports.cross])
def test_keys_and_values_may_have_other_features(name):
    layer = build(name, in_kv_features=5, **SIZES.get(name, {}))
    found = variables(layer)
    maps = {path: found[f"{path}/kernel"].shape[0] for path in ("query", "key", "value") if f"{path}/kernel" in found}
    assert len(maps) > 1 and maps == {path: FEATURES if path == "query" else 5 for path in maps}
    context = jax.random.normal(jax.random.key(1), (2, 9, 5))
    y, other = layer(inputs(7), context), layer(inputs(7), context, context[:, ::-1])
    assert y.shape == (2, 7, FEATURES) and jnp.abs(y - other).max() > 1e-3


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_dtypes_and_precision_reach_every_map(name):
    highest = jax.lax.Precision.HIGHEST
    layer = build(name, dtype=jnp.bfloat16, param_dtype=jnp.float16, precision=highest, **SIZES.get(name, {}))
    maps = [module for _, module in nnx.iter_graph(layer) if isinstance(module, nnx.Linear | nnx.LinearGeneral)]
    assert len(maps) == MAPS.get(name, 4)
    for module in maps:
        assert (module.dtype, module.param_dtype, module.precision) == (jnp.bfloat16, jnp.float16, highest)
    params = jax.tree.leaves(nnx.state(layer, nnx.Param))
    assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.float16)}
    assert jax.eval_shape(layer, inputs(5)).dtype == jnp.bfloat16
