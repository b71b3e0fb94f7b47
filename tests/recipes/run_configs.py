"""Worker of the multi-process tests: runs the recipe on each config given, in one process group."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from omegaconf import OmegaConf

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP


def run_configs(*paths):
    for path in paths:
        recipe = FullFinetuneRecipeWMTP(OmegaConf.load(path))
        recipe.setup()
        recipe.train()
        recipe.export()


if __name__ == "__main__":
    run_configs(*sys.argv[1:])
