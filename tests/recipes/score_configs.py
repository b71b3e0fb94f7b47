"""Worker of the multi-process tests: scores each config given, one after the other, in one process group."""

from omegaconf import OmegaConf

from recipes.score_reference import ScoreReferenceRecipe


def score_configs(*paths):
    for path in paths:
        recipe = ScoreReferenceRecipe(OmegaConf.load(path))
        recipe.setup()
        recipe.report(recipe.score())
