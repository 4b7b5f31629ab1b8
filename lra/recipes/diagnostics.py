"""Diagnostics: what a layer can do at all, by tasks that are drawn; two blocks of width 64, minutes on a laptop.

Command    python scripts/train.py --recipe diagnostics --task recall --layer softmax
Expected   results/diagnostics.csv, in the README
"""

from subquad.lra.recipes.recipe import Recipe

DIAGNOSTICS = Recipe(
    id="diagnostics",
    source="subquad",
    layers={
        "softmax": dict(num_heads=4),
        "blockwise": dict(num_heads=4, max_length="{length}", block_size=8),
        "local": dict(num_heads=4, window_size=8),
        "strided": dict(num_heads=4, stride=8),
        "reformer": dict(num_heads=4, num_hashes=4, chunk_size=8),
        "linformer": dict(num_heads=4, max_length="{length}", num_landmarks=16),
        "performer": dict(num_heads=4, num_features=32),
        "transformer_xl": dict(num_heads=4, segment_length=16, memory_length=48),
        "s4": dict(state_size=16, dt_min=0.01, dt_max=0.5),
    },
    settings={
        "*": dict(batch_size=32, steps=600, evaluate_every=100),
        "recall": dict(steps=500),
    },
)
