"""Quickstart: every layer at the same number of parameters, in minutes on a laptop; on ListOps also named listops-small.

Source     none; sizes that fit a CPU, so that nobody needs a paper to see a layer learn
Command    subquad quickstart
           subquad train --recipe listops-small --layer softmax
Expected   results/quickstart.csv, in the README: seeds, spread and floors
"""

import dataclasses

from subquad.lra.recipes.recipe import EveryLayer, Recipe

QUICKSTART = Recipe(
    id="quickstart",
    source="subquad",
    equal_parameters=True,
    layers=EveryLayer(heads=dict(num_heads=4), own={
        "blockwise": dict(block_size=32),
        "local": dict(window_size=16),
        "strided": dict(stride=16),
        "diagonal": dict(window_size=16, dilation=[1, 1, 2, 4]),
        "random": dict(block_size=16),
        "axial": dict(row_length=16),
        # Eleven maps would be more than the budget.
        "global": dict(radius=16, num_global=4, sharing="query"),
        "longformer": dict(window_size=16),
        "longt5": dict(radius=15),
        "bigbird": dict(block_size=16, num_random=1),
        "reformer": dict(num_hashes=2, chunk_size=32),
        "routing": dict(num_clusters=8),
        "sinkhorn": dict(block_size=32),
        "smyrf": dict(num_hashes=2, cluster_size=32),
        "clustered": dict(num_clusters=16, num_top=16),
        "moba": dict(block_size=25),
        "nsa": dict(
            num_kv_heads=1, block_size=16, num_blocks=4, compression_size=8, compression_stride=4, window_size=32,
        ),
        "linformer": dict(max_length="{length}", num_landmarks=16),
        "nystrom": dict(num_landmarks=16),
        "skyformer": dict(num_landmarks=16),
        "luna": dict(num_slots=16),
        # Nine maps would be more than the budget.
        "isab": dict(qkv_features=32, num_inducing=16),
        "perceiver": dict(qkv_features=32, num_latents=16, latent_features=32),
        "performer": dict(num_features=32),
        "flash": dict(chunk_size=32, shared_features=32, value_features=64),
        "rfa": dict(num_features=32),
        # Twice as wide values would be more than the budget.
        "retention": dict(value_features=64),
        "gsa": dict(num_slots=16),
        "transformer_xl": dict(segment_length=50, memory_length=50),
        "compressive": dict(segment_length=40, memory_length=40, compressed_length=20),
        "infini": dict(segment_length=50),
        "memorizing": dict(segment_length=50, num_neighbors=16),
        "mamba2": dict(head_features=16, state_size=16),
        "rwkv6": dict(head_features=16, mix_rank=4, decay_rank=8),
        "s4": dict(state_size=16, dt_min=0.01, dt_max=0.5),
        "s5": dict(state_size=64, dt_min=0.01, dt_max=0.5),
        "dss": dict(state_size=16, dt_min=0.01, dt_max=0.5),
        "mega": dict(state_size=4, shared_features=16, value_features=64),
        "lru": dict(state_size=64),
        "dynamicconv": dict(num_heads=4, conv_width=15),
        "lsra": dict(num_heads=4),
        "h3": dict(state_size=16, dt_min=0.01, dt_max=0.5),
        "mamba": dict(state_size=8),
        "hyena": dict(convolve_values=False, filter_features=16),
        "rwkv7": dict(head_features=16, decay_rank=8, rate_rank=8, gate_rank=16),
        "differential": dict(num_heads=2),
        "gau": dict(shared_features=32, value_features=64, max_length="{length}", bias="simple"),
        "synthesizer": dict(max_length="{length}", synthesis=["factorized_random", "dot_product"]),
    }),
    settings={
        # Ten times as long, so wider, too: else Linformer's projections alone would be more than the budget.
        "*/lra": dict(in_features=128, mlp_features=512, evaluate_every=150),
        # What bits per byte of all causal layers are compared by.
        "pylib_lm/short": dict(steps=600, evaluate_every=200),
        "*/lra retention": dict(layer_options=dict(value_features=128)),
        # As long, and no wider.
        "text|pathfinder|bbc_text|bbc_halves|photo_patches linformer": dict(
            layer_options=dict(num_landmarks=8, sharing="key_value")
        ),
    },
)  # fmt: skip

# Two blocks of 64 features on expressions of at most 200 tokens, 300 steps: two minutes or less a layer.
LISTOPS_SMALL = dataclasses.replace(
    QUICKSTART, id="listops-small", settings={"listops": dict(config="small"), **QUICKSTART.settings}
)
