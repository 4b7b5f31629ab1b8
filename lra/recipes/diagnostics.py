"""Diagnostics: what a layer can do at all, on tasks that are drawn; two blocks of width 64, minutes on a laptop.

Command    subquad train --recipe diagnostics --task recall --layer softmax
Expected   results/diagnostics.csv, in the README

Then the settings of the papers, as far as they are known: Mamba's, Zoology's and MAD's.
"""

from subquad.lra.recipes.recipe import EveryLayer, Recipe

# Causal, as the papers' models are; Linformer cannot be, and looks at whole sequences.
LAYERS = EveryLayer(heads=dict(num_heads=4), is_causal=True, own={
    "blockwise": dict(block_size=8),
    "local": dict(window_size=8),
    "strided": dict(stride=8),
    "diagonal": dict(window_size=8, dilation=[1, 1, 2, 4]),
    "random": dict(block_size=8),
    "axial": dict(row_length=8),
    "global": dict(radius=8, num_global=4),
    "longformer": dict(window_size=8),
    "longt5": dict(radius=8, block_size=8),
    "bigbird": dict(block_size=8, num_random=1),
    "reformer": dict(num_hashes=4, chunk_size=8),
    "routing": dict(num_clusters=8),
    "sinkhorn": dict(block_size=8),
    "smyrf": dict(num_hashes=4, cluster_size=8),
    "clustered": dict(num_clusters=16, num_top=8),
    "moba": dict(block_size=16),
    "nsa": dict(
        num_kv_heads=1, block_size=16, num_blocks=4, compression_size=8, compression_stride=4, window_size=32,
    ),
    "h_transformer": dict(block_size=8),
    "linformer": dict(max_length="{length}", num_landmarks=16),
    "nystrom": dict(num_landmarks=16),
    "skyformer": dict(num_landmarks=16),
    "luna": dict(num_slots=16),
    "isab": dict(num_inducing=16),
    "perceiver": dict(num_latents=16),
    "performer": dict(num_features=32),
    "flash": dict(chunk_size=16, shared_features=16, value_features=64),
    "rfa": dict(num_features=32),
    "gsa": dict(num_slots=16),
    "transformer_xl": dict(segment_length=16, memory_length=48),
    "compressive": dict(segment_length=16, memory_length=16, compressed_length=8),
    "infini": dict(segment_length=16),
    "memorizing": dict(segment_length=16, num_neighbors=8),
    "mamba2": dict(head_features=16, state_size=32),
    "rwkv6": dict(head_features=16),
    "s4": dict(state_size=16, dt_min=0.01, dt_max=0.5),
    "s5": dict(state_size=64, dt_min=0.01, dt_max=0.5),
    "dss": dict(state_size=16, dt_min=0.01, dt_max=0.5),
    "mega": dict(shared_features=16, value_features=64),
    "lru": dict(state_size=64),
    "lightconv": dict(conv_width=8),
    "dynamicconv": dict(conv_width=8),
    "lsra": dict(num_heads=4, conv_width=8),
    "h3": dict(state_size=16, dt_min=0.01, dt_max=0.5),
    "hyena": dict(convolve_values=False),
    "rwkv7": dict(head_features=16),
    "differential": dict(num_heads=2),
    "gau": dict(max_length="{length}", bias="simple", shared_features=16, value_features=64),
    "synthesizer": dict(max_length="{length}", synthesis=["random", "dot_product"]),
})  # fmt: skip
# Tasks whose length may change after training: learned positions would end. Tokens as large as these positions, which drown
# smaller ones: induction is then not learned in 2,000 steps.
LONGER = dict(positions="sinusoidal", embedding_std=1.0)
# Layers that know the order of tokens themselves: their papers give them no positions.
ORDERED = (
    "retention|gla|hgrn2|mamba2|rwkv6|mlstm|rwkv4|s4|s5|dss|lru|rglru|hgrn|h3|mamba|hyena|"
    "deltanet|gated_deltanet|kda|delta_product|rwkv7"
)

DIAGNOSTICS = Recipe(
    id="diagnostics",
    source="subquad",
    layers=LAYERS,
    settings={
        "*": dict(batch_size=32, steps=600, evaluate_every=100),
        "recall": dict(steps=500),
        # Which value came last has to be known by the layer itself.
        "recall/overwritten": dict(positions=None),
        "induction|mqar": dict(LONGER, steps=1500, learning_rate=2e-3, evaluate_every=250),
        "parity|modular_addition|s5": dict(LONGER, steps=1000, evaluate_every=200),
        f"* {ORDERED}": dict(positions=None),
        # A state that is reflected takes turns.
        "parity|modular_addition|s5 deltanet|gated_deltanet|kda": dict(layer_options=dict(negative_eigenvalues=True)),
        "mad": dict(steps=1000, evaluate_every=200),
        "listops": dict(LONGER, batch_size=16, steps=2000, evaluate_every=200),
        # An encoder reads the whole expression.
        "listops +is_causal": dict(layer_options=dict(is_causal=False)),
    },
)

# Adam without decay at a constant rate; the state-space layers of the paper know no positions.
_PLAIN = dict(mlp_features=0, schedule="constant", warmup_steps=0, weight_decay=0.0, b2=0.999, clip_norm=None, positions=None)
MAMBA = Recipe(
    id="mamba",
    source="Gu and Dao 2023, arXiv 2312.00752, sections 4.1.1 and 4.1.2",
    layers=LAYERS,
    settings={
        "*": dict(_PLAIN, config="mamba", in_features=64, num_layers=2),
        "* +num_heads": LONGER,
        "* transformer_xl": dict(positions=None, embedding_std=None),
        "* h3": dict(layer_options=dict(state_size=64, dt_min=0.001, dt_max=0.1)),
        "selective_copy": dict(batch_size=64, steps=400_000, learning_rate=1e-4, evaluate_every=4000),
        "induction": dict(batch_size=8, steps=204_800, learning_rate=2e-4, in_features=128, evaluate_every=8192),
        "induction h3": dict(steps=81_920),
        "induction mamba": dict(steps=8192, learning_rate=1e-3, in_features=64, evaluate_every=1024),
    },
    deviations=(
        ("*", "The best on validation is taken of all steps."),
        ("induction mamba", "Training ends after 8,192 steps, where all is right; theirs after 204,800. The rate is constant."),
        ("induction softmax", "Positions are sinusoidal, where none are rotated; the heads are 4: theirs were not read."),
    ),
)

STATE_TRACKING = Recipe(
    id="state-tracking",
    source="Grazzi et al. 2024, arXiv 2411.12537, section 5.1, as in NX-AI/xlstm, experiments/parity_xlstm11.yaml",
    layers=LAYERS,
    settings={
        "*": dict(
            config="xlstm", in_features=64, num_layers=2, mlp_features=128, positions=None, steps=2000, batch_size=64,
            learning_rate=1e-3, warmup_steps=200, weight_decay=0.1, b2=0.999, clip_norm=None, evaluate_every=200,
        ),
        "* softmax": LONGER,
        "* deltanet": dict(steps=6000, warmup_steps=600),
    },
    deviations=(
        ("*", "Trained on 64 sequences a step at width 64; theirs on 256, at 128 where it was read."),
        ("* deltanet", "Training ends after 6,000 steps; theirs after 20,000, where it was read."),
        ("* softmax|mlstm|mamba", "Training ends after 2,000 steps; theirs after 20,000, where it was read."),
        ("*", "Validated on sequences of the trained lengths, and the last rate is 0; theirs a thousandth of the first."),
        ("* softmax", "Which positions theirs has was not read; these are sinusoidal."),
        ("* mlstm|mamba", "A feed-forward network follows each layer."),
    ),
)  # fmt: skip

ZOOLOGY = Recipe(
    id="zoology",
    source="Arora et al. 2023, arXiv 2312.04927, figure 2, as in HazyResearch/zoology, experiments/iclr24_zoology_figure2",
    layers=LAYERS.but(softmax=dict(num_heads=1)),
    settings={
        "*": dict(
            config="64_4", in_features=64, num_layers=2, mlp_features=0, positions="learned", steps=64 * 196, batch_size=512,
            learning_rate=1e-3, weight_decay=0.1, decay="all", b2=0.999, clip_norm=None, warmup_steps=0, evaluate_every=196,
        ),
        # The paper gives positions to attention alone, and four blocks to all others.
        "* s4": dict(num_layers=4, positions=None),
        "*/256_16": dict(batch_size=256, steps=64 * 391, evaluate_every=391),
        "*/512_64": dict(batch_size=128, steps=64 * 782, evaluate_every=782),
    },
    deviations=(("*", "One rate of the paper's grid, 1e-4 to 1e-2, and one width of 64 to 512."),),
)  # fmt: skip

MAD = Recipe(
    id="mad",
    source="Poli et al. 2024, arXiv 2403.17844, as in athms/mad-lab, configs/tasks and mad/configs.py",
    layers=LAYERS,
    settings={
        "*": dict(
            in_features=128, num_layers=2, mlp_features=512, positions=None, steps=200 * 100, batch_size=128,
            learning_rate=5e-4, weight_decay=0.0, b2=0.999, clip_norm=None, warmup_steps=0, evaluate_every=500,
        ),
        "*/memorisation": dict(steps=200 * 2, evaluate_every=20),
    },
    deviations=(
        ("*", "One rate and decay of the paper's grid; the feed-forward network has no gate."),
        ("*/compression", "The decoder has ReLU and no norms."),
    ),
)  # fmt: skip
