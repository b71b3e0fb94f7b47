"""The learning rate of each optimizer step: one schedule of our own, and any other that a config names."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch.optim.lr_scheduler import LambdaLR

from wmtp.config import ConfigError, build, component_of
from wmtp.errors import UserError, one_line, raised_in


def cosine_with_warmup(
    optimizer: torch.optim.Optimizer, num_training_steps: int, num_warmup_steps: int = 0, min_lr_ratio: float = 0.0
) -> LambdaLR:
    """Raises the learning rate linearly over W warm-up steps, then lowers it on half a cosine over the rest.

    Step i of N, counted from 1, has the optimizer's lr times

        i / W                                                   for i <= W
        m + (1 - m) * (1 + cos(pi * (i - P) / (N + 1 - P))) / 2  after it, with the peak's step P = max(W, 1)

    so that step P has all of it and the ratio m would be reached at step N + 1: neither the first nor the last step is
    spent on a rate of 0. With W = 2, N = 5, m = 0: 0.5, 1, 0.854, 0.5, 0.146.

    Args:
        num_training_steps: N; a recipe gives it.
        num_warmup_steps: W, >= 0; beyond N the rate rises to the end.
        min_lr_ratio: m in [0, 1], where the decay ends, as a share of lr.

    Raises:
        UserError: a value out of its range.
    """
    if num_warmup_steps < 0:
        raise UserError(f"num_warmup_steps must be >= 0, got {num_warmup_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio must be in [0, 1], got {min_lr_ratio}")
    peak = max(num_warmup_steps, 1)

    def ratio(steps_done: int) -> float:
        step = min(steps_done + 1, max(num_training_steps, peak) + 1)
        if step <= peak:
            return step / peak
        decayed = (step - peak) / (num_training_steps + 1 - peak)
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * decayed)) / 2

    return LambdaLR(optimizer, ratio)


def build_schedule(
    section: DictConfig | None,
    optimizer: torch.optim.Optimizer,
    *,
    num_training_steps: int,
    step: int = 0,
    log: Callable[[str], None] = print,
) -> Any:
    """Builds the config's schedule, stands it at a step of its course, and says so if a step's rate is 0.

    A run that goes on gets the rates that its config gives from that step on: the schedule is stepped there from its
    start, so it must follow from the number of steps alone.

    Args:
        section: lr_scheduler of the config: a function of an optimizer and, if it has such a parameter, of
            num_training_steps, that returns an object with ``step()``; None for a constant rate.
        optimizer: with its groups' learning rates as the config says, not yet scheduled.
        num_training_steps: optimizer steps of the whole run.
        step: optimizer steps done.
        log: called with a line of warning.

    Returns:
        the schedule, or None.

    Raises:
        ConfigError: not to be found, an unknown key, a value refused, or a schedule that needs a metric.
    """
    if section is None:
        return None
    parameters = inspect.signature(component_of(section, "lr_scheduler")).parameters.values()
    takes_steps = any(p.name == "num_training_steps" or p.kind is p.VAR_KEYWORD for p in parameters)
    steps = {"num_training_steps": num_training_steps} if takes_steps else {}

    # The whole course is tried on a stand-in: same groups, no parameters of the model.
    groups = [{**_copy(group), "params": [torch.zeros(())]} for group in optimizer.param_groups]
    stand_in = torch.optim.Optimizer(groups, dict(optimizer.defaults))
    rates = _rates(build(section, stand_in, where="lr_scheduler", **steps), stand_in, num_training_steps)
    zero = [name for name, rate in (("first", rates[:1]), ("last", rates[-1:])) if 0.0 in rate]
    if zero and any(rates):
        log(
            f"WARNING: the {' and the '.join(zero)} of {num_training_steps} steps changes nothing: its learning rate "
            f"is 0 by lr_scheduler ({section._component_}); wmtp.training.lr_schedule.cosine_with_warmup has "
            "no such step"
        )
    schedule = build(section, optimizer, where="lr_scheduler", **steps)
    _rates(schedule, optimizer, min(step, num_training_steps))
    return schedule


def _rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Yields each step's largest learning rate while the schedule goes so many steps."""
    if not callable(getattr(schedule, "step", None)):
        raise ConfigError(f"lr_scheduler gives a {type(schedule).__name__}, which is no schedule: it has no step()")
    required = [p.name for p in inspect.signature(schedule.step).parameters.values() if p.default is p.empty]
    if required:
        raise ConfigError(
            f"lr_scheduler: {type(schedule).__name__}.step needs {', '.join(required)} at each step, a recipe has only "
            "the number of steps; use a schedule that follows from it, such as "
            "wmtp.training.lr_schedule.cosine_with_warmup"
        )
    rates = []
    with warnings.catch_warnings():  # of steps of a schedule without steps of the optimizer, which were done before
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            rates.append(max(float(group["lr"]) for group in optimizer.param_groups))
            try:
                schedule.step()
            except ValueError as error:
                if raised_in(error) != __file__:  # it is of the user's own
                    raise
                name = type(schedule).__name__
                raise ConfigError(f"lr_scheduler: {name} is not for {steps} steps: {one_line(error)}") from error
    return rates


def _copy(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if torch.is_tensor(value) else value for key, value in group.items() if key != "params"}
