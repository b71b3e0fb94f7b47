"""Losses of a value model: regression on a reward spread over the response, and a comparison of two responses.

Every loss is a sum and a count: add both up over the optimizer step (ranks and micro-batches) and divide once, so that
the result depends neither on the world size nor on how the step is cut. V_j is the value of the prefix x_<=j; the
response is the program and its EOS, the prompt is never a target. Values are float32 or float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp.errors import UserError

LOSSES = ("mse", "pairwise")
SPREADS = ("terminal", "uniform", "length", "gae")


class ValueLoss(NamedTuple):
    """The share of one micro-batch in the step's loss; only ``loss_sum`` carries a gradient."""

    loss_sum: Tensor  # scalar, of the values' dtype
    count: Tensor  # type: ignore[assignment]  # scalar int64: target tokens of mse, pairs of pairwise


def spread_rewards(
    spread: str, rewards: Tensor, response: Tensor, values: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Spreads one reward per sequence over the response: the targets of the value at each position.

        terminal    r at the last response token, no target elsewhere
        uniform     r at every response token
        length      r * i / n at the i-th of n response tokens: linear, from 0 before the response to r at its end
        gae         the lambda-return G_j of a reward that comes after the last token (Schulman et al. 2016,
                    arXiv 1506.02438): G_T = r, and before it
                    G_j = gamma * ((1 - lambda) * V_{j+1} + lambda * G_{j+1})
                    which is V_j plus the generalized advantage, sum_l (gamma * lambda)^l delta_{j+l} with
                    delta_j = gamma * V_{j+1} - V_j and delta_T = r - V_T; V carries no gradient

    Args:
        rewards: [B] one reward per sequence.
        response: [B, S] bool, True at response tokens.
        values: [B, S] the current V, which ``gae`` starts from; the others do not read it.
        gamma, gae_lambda: of ``gae``, each in [0, 1].

    Returns:
        targets [B, S] (0 where there is none), and has_target [B, S] bool.

    Raises:
        ValueError: an unknown spread.
    """
    if spread not in SPREADS:
        raise UserError(f"reward_spread must be one of {', '.join(SPREADS)}, got {spread!r}")
    rewards = rewards[:, None]  # [B, 1]
    place = response.cumsum(dim=1)  # [B, S]: i at the i-th response token
    length = place[:, -1:]  # [B, 1]: n
    last = response & (place == length)
    if spread == "terminal":
        return rewards * last, last
    if spread == "uniform":
        return rewards * response, response
    if spread == "length":
        return rewards * place / length.clamp(min=1) * response, response
    values, targets = values.detach(), torch.zeros_like(values)
    after = rewards[:, 0]  # the return of the response token that follows; after the last one, the reward itself
    for j in range(values.shape[1] - 1, -1, -1):
        here = response[:, j]
        targets[:, j] = torch.where(here, after, 0.0)
        before = gamma * ((1 - gae_lambda) * values[:, j] + gae_lambda * after)
        after = torch.where(here, before, after)
    return targets, response


def mse_loss(values: Tensor, targets: Tensor, has_target: Tensor) -> ValueLoss:
    """Sums (V - target)^2 over the positions that have a target, and counts them; all [B, S]."""
    error = torch.where(has_target, values - targets, 0.0)
    return ValueLoss(error.square().sum(), has_target.sum())


def pairwise_loss(
    correct_values: Tensor, correct_response: Tensor, incorrect_values: Tensor, incorrect_response: Tensor
) -> ValueLoss:
    """Sums -log sigmoid(mean V over the correct response - mean V over the incorrect one) (Bradley-Terry).

    Args:
        correct_values, incorrect_values: [P, S] values of the two responses of each pair (each side its own S).
        correct_response, incorrect_response: [P, S] bool, True at response tokens. Pairs without any do not count.
    """
    difference = response_mean(correct_values, correct_response) - response_mean(incorrect_values, incorrect_response)
    present = correct_response.any(dim=1) & incorrect_response.any(dim=1)  # [P]
    return ValueLoss(-(F.logsigmoid(difference) * present).sum(), present.sum())


def response_mean(values: Tensor, response: Tensor) -> Tensor:
    """Returns the mean of values [B, S] over the response tokens: [B], 0 where a row has none."""
    values = torch.where(response, values, 0.0)
    return values.sum(dim=1) / response.sum(dim=1).clamp(min=1)


def response_last(values: Tensor, response: Tensor) -> Tensor:
    """Returns the value [B, S] at the last response token: [B], 0 where a row has none."""
    last = response & (response.cumsum(dim=1) == response.sum(dim=1, keepdim=True))
    return torch.where(last, values, 0.0).sum(dim=1)


def critic_loss(
    loss: str, reward_spread: str | None = None, *, gamma: float | None = None, gae_lambda: float | None = None
) -> Callable[[Tensor, Tensor, Tensor], ValueLoss]:
    """Returns the loss that a config names as a function of (values [P, 2, S], response [P, 2, S], rewards [P, 2]).

    Axis 1 is the program of a pair: 0 the correct one, 1 the incorrect one.

    Args:
        loss: ``mse`` or ``pairwise``.
        reward_spread: of ``mse``: ``terminal``, ``uniform``, ``length`` or ``gae``; None for ``pairwise``.
        gamma, gae_lambda: of ``gae`` alone; by default 1 and 0.95.

    Raises:
        ValueError: an unknown name, a value out of range, or a key that this loss does not read.
    """
    if loss not in LOSSES:
        raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if loss == "pairwise" and reward_spread is not None:
        raise UserError(f"loss pairwise spreads no reward: set reward_spread to null, got {reward_spread!r}")
    if loss == "mse" and reward_spread not in SPREADS:
        raise UserError(f"loss mse needs a reward_spread, one of {', '.join(SPREADS)}, got {reward_spread!r}")
    factors = {name: of for name, of in (("gamma", gamma), ("gae_lambda", gae_lambda)) if of is not None}
    for name, factor in factors.items():
        if reward_spread != "gae":
            raise UserError(f"{name} is read by reward_spread gae alone: set it to null, got {factor!r}")
        if not 0 <= factor <= 1:
            raise UserError(f"{name} must be in [0, 1], got {factor!r}")
    if loss == "pairwise":
        return lambda values, response, rewards: pairwise_loss(
            values[:, 0], response[:, 0], values[:, 1], response[:, 1]
        )

    def mse(values: Tensor, response: Tensor, rewards: Tensor) -> ValueLoss:
        values, response = values.flatten(0, 1), response.flatten(0, 1)  # [2P, S]
        targets = spread_rewards(str(reward_spread), rewards.flatten(), response, values, **factors)
        return mse_loss(values, *targets)

    return mse
