"""Plans of runs, from simulations of their steps: memory, work and time, before a card is rented."""

from collections.abc import Callable

import torch.distributed as dist
from omegaconf import DictConfig

from wmtp.distributed import World
from wmtp.errors import advise


def plan_run(cfg: DictConfig, world: World, steps: int | None, log: Callable[[str], None], *, tokens: int = 0) -> None:
    """Prints the plan of a run that is about to start, and what would make it fit where it does not.

    Every rank calls it, and the first one simulates a step. A run goes on without a plan where the simulation cannot
    take what the user has put in, and says so. One that is out of memory later ends with its plan and what holds less.

    Args:
        cfg: the run's; nothing is planned for a small model.
        steps: of the whole run; None: as many as it takes for so many ``tokens``.
        log: prints a line.
    """
    group = dist.new_group(backend="fake")  # sends nothing, so that a step can be simulated within a run

    def advice() -> str:
        from wmtp.training.planning.run import what_holds_less  # seconds that few runs need

        return what_holds_less(cfg, world, group)

    advise(advice)
    if world.is_main:
        from wmtp.training.planning.run import say_plan

        say_plan(cfg, world, group, steps, tokens, log)
