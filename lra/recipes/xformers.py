"""xFormers' Long Range Arena: facebookresearch/xformers, the arena's configuration at the parent of 6c3890ab.

Command    subquad train --recipe xformers --layer softmax --task listops
Expected   softmax ("Standard"), its README, in %: listops 37.50, text 62.66, retrieval 79.24, image 38.69, pathfinder 70.37
Hours      not published; subquad table --paper xformers forecasts them for this machine

Starts from the settings of Nystromformer.
"""

from subquad.lra.recipes import nystromformer
from subquad.lra.recipes.recipe import Recipe, revised
from subquad.lra.recipes.shared import ARENA_TEXT

XFORMERS = Recipe(
    id="xformers",
    source="facebookresearch/xformers, the arena's configuration at the parent of 6c3890ab",
    layers=nystromformer.LAYERS.but(nystrom=dict(num_landmarks=128, conv_width=35)),
    settings=revised(nystromformer.SETTINGS, {
        "listops": dict(steps=10_000, evaluate_every=100),
        "text": dict(ARENA_TEXT, pooling="cls"),
        "text +num_heads": dict(layer_options=dict(num_heads=4)),
        "retrieval|image|pathfinder": dict(reversible=True),
        # A quarter of the length.
        "listops linformer": dict(layer_options=dict(num_landmarks=500)),
        "text linformer": dict(layer_options=dict(num_landmarks=1024)),
        "retrieval linformer": dict(layer_options=dict(num_landmarks=1000)),
        "image|pathfinder linformer": dict(layer_options=dict(num_landmarks=256)),
    }),
    deviations=(
        ("* linformer", "Attention weights are not dropped; theirs are."),
        ("* performer", "Random features are fixed; theirs are drawn anew every 1000 steps."),
        *nystromformer.DEVIATIONS,
    ),
)  # fmt: skip
