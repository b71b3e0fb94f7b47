"""Plans of runs, from simulations of their steps: memory, work and time, before a card is rented."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh

from wmtp.config import build
from wmtp.distributed import World
from wmtp.errors import advise, one_line

if TYPE_CHECKING:
    from wmtp.training.planning.cards import Card

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
    """Prints the plan of a run that is about to start, and what would make it fit where it does not.

    Every rank calls it, and the first one simulates a step. A run goes on without a plan where the simulation cannot
    take what the user has put in, and says so. One that is out of memory later ends with its plan and what holds less.

    Args:
        cfg: the run's; nothing is planned for a small model.
        steps: of the whole run; None: as many as it takes for so many ``tokens``.
        log: prints a line.
    """
    group = dist.new_group(backend="fake")  # sends nothing, so that a step can be simulated within a run
    advise(lambda: _advice(cfg, world, group))
    if not world.is_main:
        return
    from wmtp.training.planning.plan import lack, plan_config, ways_out

    with torch.random.fork_rng(devices=[]):  # all ranks draw the same random weights afterwards
        try:
            if not is_worth_a_plan(cfg):
                return
            mesh, card = _planned_on(world, group)
            plan = plan_config(cfg, mesh, card)
            log(plan.line(math.ceil(tokens / plan.tokens) if steps is None else steps))
            line = "" if plan.fits else f"WARNING: {lack(plan, list(islice(ways_out(cfg, mesh, card), 1)))}"
        except Exception as error:  # of a user's own parts too: they were built for data, which a simulation has not
            line = f"no plan of this run: {why_unplanned(error)}"
    if line:
        log(line)


def _planned_on(world: World, group: dist.ProcessGroup) -> tuple[DeviceMesh, "Card"]:
    """Returns a run's mesh and card for the planner."""
    from wmtp.training.planning.cards import present_card
    from wmtp.training.planning.simulation import mesh_of

    replicas = 1 if world.mesh.ndim == 1 else world.mesh.size(0)
    return mesh_of(group, world.size, replicas), present_card(world.device)


def _advice(cfg: DictConfig, world: World, group: dist.ProcessGroup) -> str:
    """Says what a run that is out of memory was planned to hold, and what would hold a tenth less at least."""
    from wmtp.training.planning.plan import plan_config, ways_out

    try:
        mesh, card = _planned_on(world, group)
        plan = plan_config(cfg, mesh, card)
        room = replace(card, memory=min(card.memory, 0.9 * plan.memory))
        ways = " | ".join(ways_out(cfg, mesh, room)) or "no change of its config"
        return f"{plan.line()}; what would hold less: {ways}"
    except Exception as error:  # as above; the line of the run's own error is to be printed
        return f"no plan of this run: {why_unplanned(error)}"
