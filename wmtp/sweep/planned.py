"""Whether a cell fits the cards that it would run on: the planner is asked before its runs start."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from wmtp.sweep.cells import Cell, SweepError
from wmtp.training.planning.cards import Card, present_card
from wmtp.training.planning.worth import is_worth_a_plan, why_unplanned


class CannotFit(SweepError):
    """A cell whose run would end for want of memory."""


class Planner:
    """The plans of a sweep's cells: one for each shape of a run, none where the model is small.

    Args:
        processes: of every run.
        sharing: processes of this machine that hold one device's memory between them, by ``cpu`` and ``cuda``.
        log: prints a line.

    Attributes:
        seconds: that a cell's trainings will take, by its name; of those that were asked for.
    """

    def __init__(self, processes: int, sharing: Mapping[str, int], log: Callable[[str], None]) -> None:
        self._processes, self._sharing, self._log = processes, sharing, log
        self.seconds: dict[str, float] = {}

    def fitting(self, cell: Cell, seeds: int = 1) -> Cell:
        """Returns the cell, which is trained with so many seeds.

        Raises:
            CannotFit: by how much it is too large for its cards, and the nearest change that would fit.
        """
        cfg = cell.settings()
        if not {"model", "optimizer", "device"} <= cfg.keys():
            return cell
        try:
            seconds, refused = self._planned(cfg)
        except Exception as error:  # of a user's own parts too: they were built for data, which a simulation has not
            self._log(f"{cell.name}: no plan of this cell: {why_unplanned(error)}")
            return cell
        if refused:
            raise CannotFit(refused)
        if cfg.get("max_steps") and seconds:
            self.seconds[cell.name] = seeds * cfg.max_steps * seconds
        return cell

    def _planned(self, cfg: DictConfig) -> tuple[float, str]:
        """Returns the seconds of a step, 0 for a model that is not planned, and what refuses the run."""
        there = torch.cuda.is_available()
        if (cfg.device == "cuda" and not there) or not is_worth_a_plan(cfg):  # the run itself says what is not there
            return 0.0, ""
        from wmtp.training.planning.plan import lack, plan_config, ways_out
        from wmtp.training.planning.simulation import fake_world

        kind = "cuda" if there and cfg.device != "cpu" else "cpu"
        card = _this(kind)
        card = replace(card, memory=card.memory / self._sharing[kind])
        mesh = fake_world(self._processes, cfg.get("hsdp_replicas") or 1)
        try:
            plan = plan_config(cfg, mesh, card)
            nearest = None if plan.fits else next(ways_out(cfg, mesh, card), None)
        finally:
            dist.destroy_process_group()
        return plan.step_seconds, "" if plan.fits else lack(plan, [nearest] if nearest else [])


@cache
def _this(kind: str) -> Card:
    return present_card(torch.device(kind))
