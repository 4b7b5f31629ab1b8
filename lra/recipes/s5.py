"""S5 (Smith et al. 2023, arXiv 2208.04933), as in lindermanlab/S5@3c18fdb, bin/run_experiments.

Command    subquad train --recipe s5 --layer s5 --task listops
Expected   table 1, in %: listops 62.15, text 89.31, retrieval 91.40, image 88.00, pathfinder 95.33, path_x 98.58
Hours      not published; subquad table --paper s5 forecasts them for this machine

It starts from the settings of S4's page. Epochs are of ceil(training examples / batch_size) steps.
"""

from subquad.lra.recipes.recipe import Recipe, revised
from subquad.lra.recipes.s4 import DEVIATIONS, SETTINGS
from subquad.lra.recipes.shared import PATH_X

S5 = Recipe(
    id="s5",
    source="Smith et al. 2023, arXiv 2208.04933, configurations of lindermanlab/S5@3c18fdb, bin/run_experiments",
    layers={"s5": {}},
    settings=revised(SETTINGS, {
        "listops": dict(
            num_layers=8, in_features=128, batch_size=50, learning_rate=3e-3, weight_decay=0.04, steps=40 * 1920,
            warmup_steps=1920, evaluate_every=1920, norm_order="pre",
            layer_options=dict(state_size=16, num_blocks=8, gate="only"),
        ),
        "text": dict(
            batch_size=50, learning_rate=4e-3, weight_decay=0.07, dropout_rate=0.1, steps=35 * 450, warmup_steps=0,
            evaluate_every=450, layer_options=dict(state_size=192, num_blocks=12, gate="only"),
        ),
        "retrieval": dict(
            in_features=128, batch_size=32, learning_rate=2e-3, step_learning_rate=2e-3, steps=20 * 4597, warmup_steps=4597,
            evaluate_every=4597, layer_options=dict(state_size=256, num_blocks=16, output_init="truncated"),
        ),
        "image": dict(
            learning_rate=4.5e-3, weight_decay=0.07, steps=250 * 900, warmup_steps=900, evaluate_every=900, norm_order="pre",
            layer_options=dict(state_size=384, num_blocks=3),
        ),
        "pathfinder": dict(
            in_features=192, learning_rate=4.5e-3, state_learning_rate=9e-4, weight_decay=0.03, dropout_rate=0.05,
            steps=200 * 2500, warmup_steps=2500, evaluate_every=2500,
            layer_options=dict(state_size=256, num_blocks=8, output_init="truncated"),
        ),
        PATH_X: dict(
            in_features=128, batch_size=32, learning_rate=1.8e-3, state_learning_rate=6e-4, weight_decay=0.06, dropout_rate=0.0,
            steps=75 * 5000, warmup_steps=5000, evaluate_every=5000,
            layer_options=dict(num_blocks=16, output_init="complex", dt_min=1e-4),
        ),
    }),
    deviations=(
        ("listops|text|retrieval|image", "Running statistics keep 0.9 of what they were at a step; theirs 0.95."),
        ("listops|image", "B learns at the rate of the state space and without weight decay; theirs as all else."),
        (PATH_X, "B has no weight decay; theirs has."),
        *DEVIATIONS,
    ),
)  # fmt: skip
