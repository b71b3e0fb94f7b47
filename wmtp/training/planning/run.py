"""The plan of a run that is there: said before it starts, and where it is out of memory."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch.distributed.device_mesh import DeviceMesh

from wmtp.distributed import World
from wmtp.training.planning.cards import Card, present_card
from wmtp.training.planning.plan import lack, plan_config, ways_out
from wmtp.training.planning.simulation import mesh_of
from wmtp.training.planning.worth import is_worth_a_plan, why_unplanned


def say_plan(
    cfg: DictConfig,
    world: World,
    group: dist.ProcessGroup,
    steps: int | None,
    tokens: int,
    log: Callable[[str], None],
) -> None:
    """Prints what :func:`~wmtp.training.planning.plan_run` does, on the first rank; ``group`` sends nothing."""
    with torch.random.fork_rng(devices=[]):  # all ranks draw the same random weights afterwards
        try:
            if not is_worth_a_plan(cfg):
                return
            mesh, card = _planned_on(world, group)
            plan = plan_config(cfg, mesh, card)
            log(plan.line(math.ceil(tokens / plan.tokens) if steps is None else steps))
            if not plan.fits:
                nearest = next(ways_out(cfg, mesh, card), None)
                log(f"WARNING: {lack(plan, [nearest] if nearest else [])}")
        except Exception as error:  # of a user's own parts too: they were built for data, which a simulation has not
            log(f"no plan of this run: {why_unplanned(error)}")


def what_holds_less(cfg: DictConfig, world: World, group: dist.ProcessGroup) -> str:
    """Says what a run that is out of memory was planned to hold, and what would hold a tenth less at least."""
    try:
        mesh, card = _planned_on(world, group)
        plan = plan_config(cfg, mesh, card)
        room = replace(card, memory=min(card.memory, 0.9 * plan.memory))
        ways = " | ".join(ways_out(cfg, mesh, room)) or "no change of its config"
        return f"{plan.line()}; what would hold less: {ways}"
    except Exception as error:  # as above; the run's own error is to be told
        return f"no plan of this run: {why_unplanned(error)}"


def _planned_on(world: World, group: dist.ProcessGroup) -> tuple[DeviceMesh, Card]:
    replicas = 1 if world.mesh.ndim == 1 else world.mesh.size(0)
    return mesh_of(group, world.size, replicas), present_card(world.device)
