"""Long Range Arena (Tay et al. 2020, arXiv 2011.04006), as its code was released: google-research/long-range-arena@cd31e5c.

Command    subquad train --recipe lra-2020 --layer softmax --task listops
Expected   softmax, table 1, in %: listops 36.37, text 64.27, retrieval 57.46, image 42.44, pathfinder 71.40, path_x at chance
Hours      not published; subquad table --paper lra forecasts them for this machine

Sizes and schedules are those of the released configurations, task by task, then layer by layer. ERRATA.md has what was
found in that code.
"""

from subquad.lra.recipes.recipe import EveryLayer, Recipe
from subquad.lra.recipes.shared import ARENA_TEXT, BLACK, DRAWN

LEARNED_POSITIONS = dict(positions="learned", position_std=0.02)
NO_DROPOUT = "Attention weights are not dropped; the released code drops {} of them."
WIDE_IMAGE = dict(in_features=128, num_layers=1, mlp_features=128)

LAYERS = EveryLayer(heads=dict(num_heads=8, use_bias=False), own={
    "blockwise": dict(block_size=50),
    "local": dict(window_size=25),
    "strided": dict(pattern="fixed", stride=50, num_summary=10),
    "diagonal": dict(window_size=25),
    "random": dict(block_size=50),
    "global": dict(num_global=4),
    # 512 tokens, of which the query is one; the released models have no global tokens.
    "longformer": dict(window_size=(255, 256), num_global=0),
    # Their Reformer cuts every sequence of the released configurations into ten chunks, here as below.
    "reformer": dict(num_hashes=1, num_buckets=10, chunk_size=200),
    "routing": dict(num_clusters=32),
    "sinkhorn": dict(block_size=50),
    "smyrf": dict(num_hashes=2, cluster_size=50),
    "moba": dict(block_size=64),
    "nsa": dict(num_kv_heads=2, num_blocks=4, window_size=64),
    "linformer": dict(max_length="{length}", num_landmarks=16),
    "performer": dict(num_features=2),
    "transformer_xl": dict(segment_length=256, memory_length=256),
    "compressive": dict(segment_length=256, memory_length=256, compressed_length=64),
    "infini": dict(segment_length=256),
    "memorizing": dict(segment_length=256),
    "mamba2": dict(head_features=32, state_size=64),
    "rwkv6": dict(head_features=32),
    "lsra": dict(num_heads=8),
    "hyena": dict(convolve_values=False),
    "rwkv7": dict(head_features=32),
    "gau": dict(max_length="{length}", bias="simple"),
    "synthesizer": dict(max_length="{length}", synthesis=["random", "dot_product"]),
})  # fmt: skip

LRA_2020 = Recipe(
    id="lra-2020",
    source="Tay et al. 2020, arXiv 2011.04006, configurations released in google-research/long-range-arena@cd31e5c",
    layers=LAYERS,
    settings={
        "*": dict(
            config="lra", protocol="lra-2020", selection="last", in_features=512, num_layers=4, mlp_features=1024,
            pooling="cls", positions="sinusoidal", embedding_std=1.0, dropout_rate=0.1, steps=5000, batch_size=32,
            learning_rate=0.05, schedule="rsqrt", warmup_steps=1000, weight_decay=0.1, decay="all", eps=1e-9, clip_norm=None,
            evaluate_every=50,
        ),
        "* softmax": dict(attention_dropout_rate=0.1),
        # Text
        "text": dict(ARENA_TEXT, evaluate_every=100),
        "text|retrieval +num_heads": dict(layer_options=dict(num_heads=4)),
        "text reformer": dict(layer_options=dict(chunk_size=100)),
        "text performer": dict(layer_options=dict(num_features=64, kernel="relu")),
        # Retrieval. Theirs names CLS and has none: the first byte is read.
        "retrieval": dict(
            in_features=128, num_layers=4, mlp_features=512, warmup_steps=8000, evaluate_every=100, pooling="first"
        ),
        "retrieval reformer": dict(layer_options=dict(chunk_size=400)),
        "retrieval performer": dict(layer_options=dict(num_features=32, kernel="relu")),
        # Image
        "image": dict(
            in_features=32, num_layers=1, mlp_features=64, steps=35_000, batch_size=256, learning_rate=5e-4,
            schedule="cosine", warmup_steps=175, weight_decay=0.0, evaluate_every=175, dropout_rate=0.3, **LEARNED_POSITIONS,
        ),
        "image blockwise|transformer_xl": dict(layer_options=dict(num_heads=1, qkv_features=32)),
        "image softmax": dict(attention_dropout_rate=0.2),
        "image softmax|strided|linformer|linear|performer|synthesizer": dict(
            WIDE_IMAGE, layer_options=dict(num_heads=8, qkv_features=64)
        ),
        "image local": dict(WIDE_IMAGE, layer_options=dict(num_heads=2, qkv_features=64), pooling="mean"),
        "image longformer": dict(
            WIDE_IMAGE, num_layers=4, layer_options=dict(num_heads=4, qkv_features=64), pooling="mean"
        ),
        "image bigbird": dict(WIDE_IMAGE, layer_options=dict(num_heads=1, qkv_features=64)),
        "image reformer": dict(
            in_features=64, num_layers=4, mlp_features=64, layer_options=dict(num_heads=8, qkv_features=64, chunk_size=103)
        ),
        "image sinkhorn": dict(
            weight_decay=0.7, dropout_rate=0.1, layer_options=dict(num_heads=1, qkv_features=32, block_size=64)
        ),
        "image performer": dict(layer_options=dict(num_features=8, kernel="relu")),
        # Pathfinder
        "pathfinder": dict(
            config="32_hard", in_features=32, num_layers=1, mlp_features=32, steps=62_400, batch_size=512, learning_rate=1e-3,
            schedule="cosine", warmup_steps=312, weight_decay=0.0, evaluate_every=312, pooling="mean",
        ),
        "pathfinder softmax|strided|linformer|reformer|linear|performer|synthesizer": dict(dropout_rate=0.2),
        "pathfinder blockwise|linformer|transformer_xl": dict(layer_options=dict(num_heads=2, qkv_features=16)),
        "pathfinder softmax": dict(num_layers=4, layer_options=dict(num_heads=4, qkv_features=16)),
        "pathfinder local": dict(
            in_features=64, num_layers=2, mlp_features=64, layer_options=dict(num_heads=4, qkv_features=32)
        ),
        "pathfinder synthesizer": dict(
            in_features=64, num_layers=2, mlp_features=64, layer_options=dict(num_heads=4, qkv_features=32)
        ),
        "pathfinder strided": dict(layer_options=dict(num_heads=8, qkv_features=16)),
        "pathfinder longformer": dict(layer_options=dict(num_heads=2, qkv_features=16), num_layers=2),
        "pathfinder bigbird": dict(
            in_features=64, num_layers=4, mlp_features=64, dropout_rate=0.2, layer_options=dict(num_heads=2, qkv_features=32)
        ),
        "pathfinder reformer": dict(
            in_features=64, num_layers=2, mlp_features=64, layer_options=dict(num_heads=8, qkv_features=64, chunk_size=103)
        ),
        "pathfinder linear": dict(in_features=128, mlp_features=128, layer_options=dict(num_heads=2, qkv_features=64)),
        "pathfinder sinkhorn": dict(
            num_layers=2, mlp_features=64, dropout_rate=0.2, layer_options=dict(num_heads=4, qkv_features=16)
        ),
        "pathfinder performer": dict(
            num_layers=4, layer_options=dict(num_heads=8, qkv_features=16, num_features=2, kernel="relu")
        ),
        # Pathfinder at 64 x 64 and 256 x 256, with the arena's own files as with ours
        "pathfinder/*64_*|*256_*": dict(in_features=32, num_layers=2, mlp_features=32, pooling="cls", **LEARNED_POSITIONS),
        "pathfinder/*64_*": dict(steps=125_000, batch_size=256, warmup_steps=625, evaluate_every=625),
        "pathfinder/*256_*": dict(steps=500_000, batch_size=32, warmup_steps=5000, evaluate_every=5000),
        "pathfinder/*64_*|*256_* +num_heads": dict(dropout_rate=0.1, layer_options=dict(num_heads=4, qkv_features=32)),
        "pathfinder/*64_* reformer": dict(layer_options=dict(chunk_size=410)),
        "pathfinder/*256_* reformer": dict(layer_options=dict(chunk_size=6554)),
        # Pathfinder at 128 x 128: Path-X
        "pathfinder/*128_*": dict(
            in_features=32, num_layers=1, mlp_features=32, steps=500_000, batch_size=64, warmup_steps=2500,
            evaluate_every=2500, clip_norm=1.0, **LEARNED_POSITIONS,
        ),
        "pathfinder/*128_* +num_heads": dict(dropout_rate=0.1, layer_options=dict(num_heads=2, qkv_features=16)),
        "pathfinder/*128_* reformer": dict(layer_options=dict(qkv_features=32, chunk_size=1639)),
        "pathfinder/*64_*|*128_*|*256_* performer": dict(layer_options=dict(num_features=8)),
        # Blocks of 64 divide pictures; those of 50, texts.
        "image|pathfinder blockwise|sinkhorn": dict(layer_options=dict(block_size=64)),
        "image|pathfinder local": dict(layer_options=dict(window_size=32)),
    },
    deviations=(
        ("*", "Sizes and schedules are of the released configurations; the paper's appendix has others."),
        ("*", "Every test example counts; the released code drops the last partial batch."),
        ("* local", "Neighbours are attended to, as many as the released layer's groups of 50 distant positions hold."),
        ("* strided", "The pattern looks both ways; the released code masks a dense causal attention."),
        (
            "* bigbird",
            "Random blocks are drawn from all, the same in every layer; the released code draws from the first 1,024 tokens.",
        ),
        ("* linformer", "Keys and values have a projection each; the released layer has one for both."),
        ("* synthesizer", "Logits of both kinds are averaged with weights that are learned; the released layer adds them."),
        (
            "* reformer",
            "Logits are divided by sqrt(d) and keys normalised; the released layer multiplies, and normalises nothing.",
        ),
        (
            "* sinkhorn",
            "Blocks of neighbours are sorted; the released layer shows all blocks their sum, of distant positions.",
        ),
        ("* sinkhorn", "The own and the sorted block share one softmax; the released layer adds two."),
        ("* linformer|reformer|linear|performer", "Padding is masked out; the released layer ignores it."),
        ("listops performer", "Random features are fixed; the released ones are drawn anew from the queries of each call."),
        (
            "text|retrieval|image|pathfinder performer",
            "The ReLU is of a random projection; the released one is of the features themselves.",
        ),
        # The released Performer drops none either.
        (
            "listops|text|retrieval|pathfinder local|strided|longformer|sinkhorn|linformer|synthesizer",
            NO_DROPOUT.format(0.1),
        ),
        ("image local|strided|longformer|linformer|synthesizer", NO_DROPOUT.format(0.2)),
        ("text", "Sequences have 1,000 bytes, as released; the paper took the best of 1K to 4K."),
        ("retrieval", "Both documents reach the head; in the released code the second one does not."),
        ("image|pathfinder", BLACK),
        *DRAWN,
    ),
)  # fmt: skip
