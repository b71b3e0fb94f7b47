"""The plan of a run, before a card is rented: memory by kind, time by part, and what each lever buys.

    python recipes/plan_memory.py --config configs/meta_mtp_7b/rho1.yaml gpus=4 gpu=a100_80gb
    python recipes/plan_memory.py --config configs/meta_mtp_7b/eval_mbpp.yaml gpus=4 gpu=a100_80gb
    python recipes/plan_memory.py --config configs/smollm2_135m/rho1.yaml gpus=1 gpu=cpu batch_size=8

One optimizer step of a training config is simulated, one batch of a scoring, or one round of an evaluation's answers,
by the recipe's own code on tensors without data: no GPU, no dataset and, where the model has a builder of its own, no
checkpoint are needed. All keys of the config can be overridden on the command line, beside some of the planner's own:
`gpus`, `gpu` (a100_40gb, a100_80gb, h100_80gb, h200_141gb, or cpu: this machine), `page` (an HTML file),
`prompt_tokens` (of an evaluation's longest prompt; else prompts and answers fill the context), and `recipe`, where the
config is of a copied one.
"""

import importlib.util
import inspect
import sys
from pathlib import Path

import wmtp  # noqa: F401  # isort: skip  # first: it silences what torchtune says when it is imported
from omegaconf import DictConfig

from wmtp import config
from wmtp.config import ConfigError, ConfigReader, changed
from wmtp.errors import clear_errors
from wmtp.files import require_file, write_whole
from wmtp.training.planning.cards import find_card
from wmtp.training.planning.frozen_step import most_rows
from wmtp.training.planning.page import plan_page
from wmtp.training.planning.plan import Plan, lack, largest_batch, levers, plan_config, short, ways_out
from wmtp.training.planning.simulation import fake_world

OWN = ("gpus", "gpu", "page", "recipe", "prompt_tokens")


class PlanMemoryRecipe:
    """Order of events: read and check the config, `plan` it, `show` the plans, `write` the page."""

    def __init__(self, cfg: DictConfig) -> None:
        """Reads the planner's keys; all others are checked by the recipe that the config is of."""
        read = ConfigReader(DictConfig({key: cfg[key] for key in OWN if key in cfg}))
        self._gpus = read.integer("gpus", 1, minimum=1)
        self._card = find_card(read.text("gpu", "a100_80gb"))
        page = read.text("page", None)
        self._page = None if page is None else Path(page)
        if self._page is not None:
            require_file(self._page, "page")
        recipe = read.text("recipe", None)
        prompt_tokens = read.integer("prompt_tokens", None, minimum=1)
        read.done()
        self._cfg = DictConfig({key: cfg[key] for key in cfg if key not in OWN})
        if self._cfg.get("model") is None:
            raise ConfigError("plan_memory plans what runs a model; this config has none")
        _check(self._cfg, Path(__file__).with_name(_recipe_of(self._cfg)) if recipe is None else Path(recipe))
        if prompt_tokens is not None:
            self._cfg.prompt_tokens = prompt_tokens
        replicas = self._cfg.get("hsdp_replicas") or 1
        if self._gpus % replicas:
            raise ConfigError(f"hsdp_replicas must divide gpus={self._gpus}, got {replicas}")
        self._mesh = fake_world(self._gpus, replicas)

    def plan(self) -> None:
        """Plans the config, and the config with each lever; then finds how many rows it could have."""
        self._plans = {"as configured": self._plan([])}
        for name, changes in levers(self._cfg, self._card).items():
            self._plans[f"{name} ({' '.join(changes)})"] = self._plan(changes)
        if "seq_len" in self._cfg:
            rows = largest_batch(self._cfg, self._mesh, self._card)
            self._rows = f"largest micro-batch that fits: batch_size={rows}"
        else:
            self._rows = f"kv_memory has room for {most_rows(self._cfg, self._card.memory)} answers at once"

    def _plan(self, changes: list[str]) -> Plan:
        return plan_config(changed(self._cfg.copy(), changes), self._mesh, self._card)

    def show(self) -> None:
        """Prints the plan, its parts and what each lever buys."""
        plan = self._plans["as configured"]
        print(plan.line(self._cfg.get("max_steps")))
        for title, shares, scale, unit in (
            (f"memory of a card in the {plan.moment}", plan.held, 1e9, "GB"),
            (f"a {plan.unit}", plan.seconds, 1.0, "s"),
        ):
            print(f"\n{title}")
            for name, share in sorted(shares.items(), key=lambda item: -item[1]):
                print(f"  {short(share / scale):>8} {unit}  {name}")
        print(f"  {plan.moved / 1e9:8.0f} GB moved by operations other than products and attention")
        print(f"  {plan.waits:8d} times the host waits for the device")
        print("\n      GB         s   tokens/s   MFU")
        for name, other in self._plans.items():
            figures = f"{short(other.memory / 1e9):>8}  {short(other.step_seconds):>8}  {other.tokens_per_second:9,.0f}"
            mfu = f"{other.mfu:4.0%}" if other.flops else " " * 4
            print(f"{figures}  {mfu}  {name}{'' if other.fits else ': does not fit'}")
        print(self._rows)
        if not plan.fits:
            raise ConfigError(lack(plan, list(ways_out(self._cfg, self._mesh, self._card))))

    def write(self) -> None:
        """Writes the page, if one is asked for."""
        if self._page is not None:
            write_whole(self._page, plan_page(f"Plan of {self._cfg.get('output_dir')}", self._plans))
            print(f"wrote {self._page}", file=sys.stderr)


def _recipe_of(cfg: DictConfig) -> str:
    """Returns the file name of the recipe that reads such a config."""
    marks = {
        "backbone": "critic_stage1.py",
        "adapters": "lora_wmtp.py",
        "optimizer": "full_finetune_distributed_wmtp.py",
        "column": "score_reference.py",
        "speed_prompts": "eval_heads.py",
        "n_at_k": "eval_codecontests.py",
        "programs": "score_rollouts.py",
    }
    return next((recipe for key, recipe in marks.items() if key in cfg), "eval_mbpp.py")


def _check(cfg: DictConfig, recipe: Path) -> None:
    """Lets a recipe read and check every key, as it does before it builds anything."""
    if not recipe.is_file():
        raise ConfigError(f"recipe={recipe} does not exist")
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for name, value in vars(module).items() if "Recipe" in name and inspect.isclass(value)]
    if len(classes) != 1:
        raise ConfigError(f"recipe={recipe} must define one class whose name has Recipe in it, found {len(classes)}")
    classes[0](cfg)


@clear_errors()
@config.parse
def main(cfg: DictConfig) -> None:
    recipe = PlanMemoryRecipe(cfg)
    recipe.plan()
    recipe.write()
    recipe.show()


if __name__ == "__main__":
    main()
