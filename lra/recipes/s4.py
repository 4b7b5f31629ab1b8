"""S4 and S4D: three sets of configurations of one repository, state-spaces/s4@e757cef, configs/experiment/lra.

Command    subquad train --recipe s4 --layer s4 --task listops
           subquad train --recipe s4d --layer s4 --task listops --layer-options mode=diagonal init=lin
Expected   s4-v1, table 10 of arXiv 2111.00396, in %: listops 58.35, text 76.02, retrieval 87.09, image 87.26,
           pathfinder 86.05, path_x 88.10.  s4d (S4-LegS), same table: listops 59.60, text 86.82, retrieval 90.90, image 88.65,
           pathfinder 94.20, path_x 96.35
Hours      not published; subquad table --paper s4 forecasts them for this machine

Each of the three starts from `SETTINGS`. Step sizes are learned at the rate of all other parameters on tokens, at that of
the state spaces on pixels.
"""

from subquad.lra.recipes.recipe import Recipe, revised
from subquad.lra.recipes.shared import DRAWN, PATH_X

SETTINGS = {
    "*": dict(
        mlp_features=0, pooling="mean", positions=None, dropout_rate=0.0, norm="batch", decay="all", b2=0.999, clip_norm=None,
        selection="best", protocol="modern", head="linear", schedule="cosine", weight_decay=0.05, state_learning_rate=1e-3,
    ),
    "listops": dict(
        config="lra", num_layers=6, in_features=256, batch_size=32, learning_rate=0.01, steps=120_000, warmup_steps=12_000,
        evaluate_every=1200, norm_order="post",
    ),
    "text": dict(
        config="modern", num_layers=6, in_features=256, batch_size=16, learning_rate=0.01, steps=50_000, warmup_steps=5000,
        evaluate_every=500,
    ),
    "retrieval": dict(
        config="lra", num_layers=6, in_features=256, batch_size=64, learning_rate=0.01, steps=50_000, warmup_steps=5000,
        evaluate_every=500,
    ),
    "image": dict(
        config="lra", inputs="continuous", num_layers=6, in_features=512, batch_size=50, learning_rate=0.01, steps=180_000,
        warmup_steps=18_000, evaluate_every=1800, dropout_rate=0.1, norm_order="post",
    ),
    "pathfinder": dict(
        config="32_hard", inputs="continuous", num_layers=6, in_features=256, batch_size=64, learning_rate=0.004,
        steps=500_000, warmup_steps=50_000, evaluate_every=5000,
    ),
    PATH_X: dict(batch_size=16, learning_rate=0.001, layer_options=dict(dt_min=1e-4)),
}  # fmt: skip

DEVIATIONS = (
    ("listops|text|retrieval", "Padding is in no batch's statistics; theirs is."),
    ("retrieval", "Each document of a pair has batch statistics of its own; theirs are of both."),
    ("listops", "No token ends an expression; theirs has one."),
    ("text", "Validation is a tenth of the training reviews, held out, and the rest trains; theirs validates on test."),
    ("text|retrieval", "Tokens are bytes, and none ends a text; theirs are characters with an end."),
    ("image", "Pixels are scaled to -1..1; theirs are normalised by their mean and deviation."),
    ("image", "Each number is dropped by itself; theirs drop a feature at all positions of a picture."),
    *DRAWN,
)

S4 = Recipe(
    id="s4",
    source="Gu et al. 2022, arXiv 2111.00396, configurations of state-spaces/s4@e757cef, configs/experiment/lra",
    layers={"s4": {}},
    settings=revised(SETTINGS, {
        "listops|text|retrieval": dict(step_learning_rate=0.01, layer_options=dict(state_size=4, num_ssm=1)),
        "image": dict(layer_options=dict(state_size=64, num_ssm=1)),
        "pathfinder": dict(layer_options=dict(state_size=64)),
    }),
    deviations=DEVIATIONS,
)

S4D = Recipe(
    id="s4d",
    source=(
        "Gu et al. 2022, arXiv 2206.11893, third version of the configurations of state-spaces/s4@e757cef, "
        "configs/experiment/lra"
    ),
    layers={"s4": dict(state_size=64)},
    settings=revised(SETTINGS, {
        "listops": dict(num_layers=8, in_features=128, batch_size=50, steps=80_000, warmup_steps=8000, evaluate_every=800),
        "retrieval": dict(warmup_steps=2500),
        "listops|text|retrieval": dict(step_learning_rate=0.01),
        "image": dict(warmup_steps=900, norm="layer", layer_options=dict(num_ssm=2)),
        "pathfinder": dict(warmup_steps=2500, weight_decay=0.03, pooling="last"),
        PATH_X: dict(
            batch_size=16, learning_rate=5e-4, warmup_steps=10_000, weight_decay=0.05, pooling="mean",
            layer_options=dict(dt_min=1e-4),
        ),
    }),
    deviations=(
        ("listops", "The warm-up is a tenth of all steps; our source does not give theirs."),
        *DEVIATIONS,
    ),
)

# Without a warm-up. A plateau's patience counts epochs, of ceil(training examples / batch_size) steps: each is validated.
S4_FIRST = Recipe(
    id="s4-v1",
    source="Gu et al. 2022, arXiv 2111.00396, table 11",
    layers={"s4": dict(state_size=64, is_causal=True, glu=False)},
    settings=revised(SETTINGS, {
        "*": dict(schedule="plateau", weight_decay=0.0),
        "listops": dict(in_features=128, batch_size=100, steps=50 * 960, evaluate_every=960, weight_decay=0.01, patience=5),
        "text": dict(
            num_layers=4, in_features=64, batch_size=50, learning_rate=0.001, steps=20 * 450,
            evaluate_every=450, patience=5,
        ),
        "retrieval": dict(learning_rate=0.002, steps=20 * 2299, evaluate_every=2299),
        "image": dict(
            learning_rate=0.004, steps=200 * 900, evaluate_every=900, dropout_rate=0.2, weight_decay=0.01, norm="layer"
        ),
        "pathfinder": dict(batch_size=100, steps=200 * 1600, evaluate_every=1600, dropout_rate=0.1),
        "listops|text|retrieval|image|pathfinder": dict(warmup_steps=0),
        PATH_X: dict(
            batch_size=32, learning_rate=5e-4, steps=100 * 5000, evaluate_every=5000, dropout_rate=0.0, patience=20,
            layer_options=dict(dt_min=1e-4),
        ),
    }),
    deviations=DEVIATIONS,
)  # fmt: skip
