"""The learning rate of each step, by hand, and schedules of torch and torchtune in a recipe's place."""

import pytest
import torch
from omegaconf import OmegaConf

from wmtp.config import ConfigError
from wmtp.training.lr_schedule import build_schedule


def optimizer(*rates):
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def build(own=None, steps=5, step=0, component="wmtp.training.lr_schedule.cosine_with_warmup", says=None, **keys):
    says = [] if says is None else says
    section = OmegaConf.create({"_component_": component, **keys})
    return build_schedule(section, own or optimizer(1.0), num_training_steps=steps, step=step, log=says.append)


def rates(own, schedule, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in own.param_groups])
        own.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("steps", "keys", "by_hand"),
    [
        (5, {"num_warmup_steps": 2}, [0.5, 1, 0.8535534, 0.5, 0.1464466]),  # cos(pi / 4) = 0.7071068
        (4, {}, [1, 0.8535534, 0.5, 0.1464466]),
        (3, {"num_warmup_steps": 1, "min_lr_ratio": 0.1}, [1, 0.775, 0.325]),  # 0.1 + 0.9 * (3 / 4, 1 / 4)
        (1, {"num_warmup_steps": 4}, [0.25]),
        (2, {"num_warmup_steps": 2, "min_lr_ratio": 1.0}, [0.5, 1]),
    ],
)
def test_the_cosine_s_rates_are_those_of_the_formula_and_no_step_has_rate_0(steps, keys, by_hand):
    own, says = optimizer(1.0, 10.0), []
    found = rates(own, build(own, steps, says=says, **keys), steps)
    assert [first for first, _ in found] == pytest.approx(by_hand)
    assert [second for _, second in found] == pytest.approx([10 * rate for rate in by_hand])
    assert says == []


@pytest.mark.parametrize(
    ("component", "keys"),
    [
        ("torch.optim.lr_scheduler.StepLR", {"step_size": 2, "gamma": 0.1}),
        ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.7}),
        ("torch.optim.lr_scheduler.CosineAnnealingLR", {"T_max": 9, "eta_min": 0.01}),
        ("torch.optim.lr_scheduler.OneCycleLR", {"max_lr": 1.0, "total_steps": 8}),
        ("torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", {"num_warmup_steps": 2}),
        ("wmtp.training.lr_schedule.cosine_with_warmup", {"num_warmup_steps": 3}),
    ],
)
def test_a_schedule_that_is_stood_at_a_step_gives_what_it_gives_there_bit_for_bit(component, keys):
    """With all that it sets in the optimizer's groups: OneCycleLR moves betas too."""
    whole, cut = optimizer(1.0), optimizer(1.0)
    schedule = build(whole, 8, component=component, **keys)
    rates(whole, schedule, 5)
    later = build(cut, 8, step=5, component=component, **keys)
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in own.param_groups] for own in (whole, cut)]
    assert groups[0] == groups[1]
    assert rates(cut, later, 3) == rates(whole, schedule, 3)


def test_a_step_without_a_rate_is_said_in_one_line():
    says = []
    tune = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"
    assert build(component=tune, num_warmup_steps=2, says=says).get_last_lr() == [0.0]
    assert len(says) == 1 and "the first of 5 steps changes nothing: its learning rate is 0 by lr_scheduler" in says[0]
    build(component="torch.optim.lr_scheduler.LinearLR", start_factor=1.0, end_factor=0.0, total_iters=4, says=says)
    assert len(says) == 2 and "the last of 5 steps changes nothing" in says[1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"component": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
            "ReduceLROnPlateau.step needs metrics at each step",
        ),
        (
            {"component": "torch.optim.lr_scheduler.OneCycleLR", "max_lr": 1.0, "total_steps": 3},
            "OneCycleLR is not for 5 steps: Tried to step",
        ),
        ({"component": "torch.nn.Flatten"}, r"lr_scheduler gives a Flatten, which is no schedule: it has no step\(\)"),
        ({"num_warmup_steps": -1}, r"lr_scheduler\.num_warmup_steps must be >= 0, got -1"),
        ({"min_lr_ratio": 1.5}, r"lr_scheduler\.min_lr_ratio must be in \[0, 1\], got 1.5"),
        ({"num_cycles": 0.5}, "unknown key 'num_cycles' in lr_scheduler"),
        ({"num_warmup_steps": "two"}, r"lr_scheduler\.num_warmup_steps must be a number, got 'two'"),
    ],
)
def test_what_is_no_schedule_for_a_recipe_is_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        build(**keys)
