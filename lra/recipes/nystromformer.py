"""Nystromformer (Xiong et al. 2021, arXiv 2102.03902), as in mlpen/Nystromformer@5689313: the model of 2 layers x 64 features.

Command    subquad train --recipe nystromformer --layer softmax --task listops
Expected   softmax, table 3, in %: listops 37.10, text 65.02, retrieval 79.35, image 38.20, pathfinder 74.16
Hours      not published; subquad table --paper nystromformer forecasts them for this machine

`SETTINGS` and `LAYERS` are also where the pages of Skyformer and xFormers start from.
"""

from subquad.lra.recipes.recipe import EveryLayer, Recipe
from subquad.lra.recipes.shared import BLACK, DRAWN

LAYERS = EveryLayer(heads=dict(num_heads=2), own={
    "blockwise": dict(block_size=64),
    "local": dict(window_size=32),
    "strided": dict(stride=64),
    "diagonal": dict(window_size=32),
    "global": dict(radius=32, num_global=4),
    "longformer": dict(window_size=32),
    "longt5": dict(radius=63),
    "reformer": dict(num_hashes=2, chunk_size=64),
    "routing": dict(num_clusters=32),
    "sinkhorn": dict(block_size=64),
    "smyrf": dict(num_hashes=2, cluster_size=64),
    "moba": dict(block_size=64),
    "nsa": dict(num_kv_heads=2, num_blocks=4, window_size=64),
    "linformer": dict(max_length="{length}", num_landmarks=256),
    "nystrom": dict(num_landmarks=64, conv_width=35),
    "skyformer": dict(num_landmarks=128),
    "luna": dict(num_slots=256),
    "performer": dict(num_features=256, kernel="relu"),
    "transformer_xl": dict(segment_length=256, memory_length=256),
    "compressive": dict(segment_length=256, memory_length=256, compressed_length=64),
    "infini": dict(segment_length=256),
    "memorizing": dict(segment_length=256),
    "mamba2": dict(head_features=32, state_size=64),
    "rwkv6": dict(head_features=32),
    "s4": dict(state_size=64),
    "s5": dict(state_size=64),
    "dss": dict(state_size=64),
    "lru": dict(state_size=64),
    "lsra": dict(num_heads=2),
    "hyena": dict(convolve_values=False),
    "rwkv7": dict(head_features=32),
    "gau": dict(max_length="{length}", bias="simple"),
    "synthesizer": dict(max_length="{length}", synthesis=["factorized_random", "dot_product"]),
})  # fmt: skip
SETTINGS = {
    "*": dict(
        in_features=64, num_layers=2, mlp_features=128, pooling="mean", positions="learned", dropout_rate=0.1, head="mlp",
        learning_rate=1e-4, schedule="onecycle", weight_decay=0.0, b2=0.999, eps=1e-6, clip_norm=None, selection="best",
        protocol="modern", embedding_std=0.02, position_std=0.02,
    ),
    "* softmax": dict(attention_dropout_rate=0.1),  # no other layer of theirs drops weights
    "listops": dict(config="lra", steps=5000, batch_size=32, warmup_steps=1000, evaluate_every=50),
    "text": dict(config="modern", steps=20_000, batch_size=32, warmup_steps=8000, evaluate_every=500),
    "retrieval": dict(config="lra", steps=30_000, batch_size=32, warmup_steps=800, evaluate_every=300),
    "image": dict(config="lra", steps=35_000, batch_size=256, warmup_steps=175, evaluate_every=175),
    "pathfinder": dict(config="32_hard", steps=62_400, batch_size=256, warmup_steps=312, evaluate_every=312),
}  # fmt: skip
LINFORMER = "Each layer projects keys and values of all heads by two matrices; theirs has one a head, which all layers share."
DEVIATIONS = (
    ("listops|text|retrieval", "Real tokens are averaged; theirs are summed and divided by the padded length."),
    ("retrieval", "The head has a second hidden layer, of half as many features."),
    ("image|pathfinder", BLACK),
    *DRAWN,
)

NYSTROMFORMER = Recipe(
    id="nystromformer",
    source="Xiong et al. 2021, arXiv 2102.03902, as in mlpen/Nystromformer@5689313",
    layers=LAYERS,
    settings=SETTINGS,
    deviations=(
        ("*", "Activations are float32; theirs are in half precision, but for attention."),
        ("*", "Every example of validation and test counts; theirs leaves the last partial batch out."),
        ("* nystrom", "Landmarks are means of tokens alone, and each matrix is inverted from its own start, not the batch's."),
        ("pathfinder/128_*", "The paper has no Path-X: settings are those of Pathfinder at 32 x 32."),
        ("* linformer", LINFORMER),
        ("text", "Sequences have 4,096 bytes, as the paper says; their script makes 1,000 of them."),
        *DEVIATIONS,
    ),
)
