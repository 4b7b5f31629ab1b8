"""Skyformer (Chen et al. 2021, arXiv 2111.00035), as in pkuzengqi/Skyformer@1a677cb.

Command    subquad train --recipe skyformer --layer softmax --task listops
Expected   softmax, table 1, in %: listops 38.37, text 61.95, retrieval 80.69, image 40.57, pathfinder 65.26
Hours      softmax, table 2, theirs: listops 2.24, text 4.30, retrieval 8.33, image 4.22, pathfinder 2.57

Starts from the settings of Nystromformer; each task has steps, batch and rates of its own.
"""

from subquad.lra.recipes import nystromformer
from subquad.lra.recipes.recipe import Recipe, revised

SKYFORMER = Recipe(
    id="skyformer",
    source="Chen et al. 2021, arXiv 2111.00035, as in pkuzengqi/Skyformer@1a677cb",
    layers=nystromformer.LAYERS.but(
        linformer=dict(max_length="{length}", num_landmarks=128),
        nystrom=dict(num_landmarks=128, conv_width=None),
        performer=dict(num_features=128),
    ),
    settings=revised(nystromformer.SETTINGS, {
        "listops": dict(steps=50_000, evaluate_every=500),
        "text": dict(steps=50_000, warmup_steps=80, evaluate_every=500),
        "retrieval": dict(steps=50_000, batch_size=16, learning_rate=2e-4, evaluate_every=1000),
        "image": dict(steps=50_000, evaluate_every=50),
        "pathfinder": dict(steps=50_000, batch_size=128, learning_rate=2e-4, evaluate_every=500),
    }),
    deviations=(
        ("*", "The best on validation is taken of all steps; theirs of those after the first fifth."),
        ("*", "Gradients are not clipped; theirs are, each number to -1..1."),
        ("* nystrom", "Landmarks are means of tokens alone, and each matrix is inverted from its own start, not the batch's."),
        ("* skyformer", "Landmarks are drawn once; theirs in every call, and their inverse starts from the whole batch."),
        ("* kernelized", "Attention weights are not dropped; the released code drops 0.1 of them."),
        ("text|retrieval|pathfinder", "Validation reads the whole split; theirs reads a part of it, another one each time."),
        ("* linformer", nystromformer.LINFORMER),
        *nystromformer.DEVIATIONS,
    ),
)  # fmt: skip
