"""Recipes: pages of data, one for each paper or released configuration. `plan.plan` turns them into runs."""

from subquad.lra.recipes.diagnostics import DIAGNOSTICS, MAD, MAMBA, STATE_TRACKING, ZOOLOGY
from subquad.lra.recipes.lra_2020 import LRA_2020
from subquad.lra.recipes.nystromformer import NYSTROMFORMER
from subquad.lra.recipes.quickstart import LISTOPS_SMALL, QUICKSTART
from subquad.lra.recipes.recipe import Recipe as Recipe
from subquad.lra.recipes.s4 import S4, S4_FIRST, S4D
from subquad.lra.recipes.s5 import S5
from subquad.lra.recipes.skyformer import SKYFORMER
from subquad.lra.recipes.xformers import XFORMERS

_EVERY = (
    QUICKSTART, LISTOPS_SMALL, LRA_2020, NYSTROMFORMER, SKYFORMER, XFORMERS, S4, S4D, S4_FIRST, S5, DIAGNOSTICS, MAMBA,
    ZOOLOGY, MAD, STATE_TRACKING,
)  # fmt: skip
RECIPES: dict[str, Recipe] = {recipe.id: recipe for recipe in _EVERY}
