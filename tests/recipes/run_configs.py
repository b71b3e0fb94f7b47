"""Worker of the multi-process tests: runs the recipe on each config given, in one process group."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import OmegaConf

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP

for path in sys.argv[1:]:
    recipe = FullFinetuneRecipeWMTP(OmegaConf.load(path))
    recipe.setup()
    recipe.train()
    recipe.export()
