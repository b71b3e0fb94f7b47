"""Worker of the multi-process tests: scores each config given, one after the other, in one process group."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import OmegaConf

from recipes.score_reference import ScoreReferenceRecipe

for path in sys.argv[1:]:
    recipe = ScoreReferenceRecipe(OmegaConf.load(path))
    recipe.setup()
    recipe.report(recipe.score())
