"""Plans of runs, from simulations of their steps: memory, work and time, before a card is rented."""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from wmtp.config import build
from wmtp.distributed import World
from wmtp.errors import one_line

SMALLEST = 50_000_000  # parameters of a model that is worth the seconds that its plan takes


def is_worth_a_plan(cfg: DictConfig) -> bool:
    """Returns whether a training config's model is as large as that."""
    with torch.device("meta"):
        model = build(cfg.model, where="model")
    return sum(parameter.numel() for parameter in model.parameters()) >= SMALLEST


def why_unplanned(error: Exception) -> str:
    """Says what a simulation met that it cannot take."""
    return f"a simulated step ended with {type(error).__name__}: {one_line(error):.200}"


def plan_run(cfg: DictConfig, world: World, steps: int | None, log: Callable[[str], None], *, tokens: int = 0) -> None:
    """Prints the plan of a run that is about to start; every rank calls it, and the first one simulates a step.

    A run goes on without a plan where the simulation cannot take what the user has put in, and says so.

    Args:
        cfg: the run's; nothing is planned for a small model.
        steps: of the whole run; None: as many as it takes for so many ``tokens``.
        log: prints a line.
    """
    group = dist.new_group(backend="fake")  # sends nothing, so that a step can be simulated within a run
    if not world.is_main:
        return
    from wmtp.training.planning.cards import present_card
    from wmtp.training.planning.plan import plan_config
    from wmtp.training.planning.simulation import mesh_of

    replicas = 1 if world.mesh.ndim == 1 else world.mesh.size(0)
    with torch.random.fork_rng(devices=[]):  # all ranks draw the same random weights afterwards
        try:
            if not is_worth_a_plan(cfg):
                return
            plan = plan_config(cfg, mesh_of(group, world.size, replicas), present_card(world.device))
            line = plan.line(math.ceil(tokens / plan.tokens) if steps is None else steps)
        except Exception as error:  # of a user's own parts too: they were built for data, which a simulation has not
            line = f"no plan of this run: {why_unplanned(error)}"
    log(line)
