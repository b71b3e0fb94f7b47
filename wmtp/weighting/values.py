"""Weights from a critic follow each token's change of the value that a frozen model gives to the text so far."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.products import on_cuda
from wmtp.weighting.base import Signals, Weighting, check_choice, check_clip, check_range, is_checked
from wmtp.weighting.rows import SPREAD, clipped_mean_one, require_finite, weigh_rows, z_score


def critic(
    delta: str = "td",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    map: str = "softmax",
    temperature: float = 1.0,
    beta: float = 1.0,
    whiten: str = "sequence",
    momentum: float = 0.99,
    warmup_steps: int = 10,
    min_weight: float = 0.1,
    max_weight: float = 5.0,
    strength: float = 1.0,
    scope: str = "sequence",
) -> Weighting:
    """Weights from the change of a frozen critic's value, V_j = value of the prefix x_<=j.

    delta_j = V_j - gamma * V_{j-1}. In reinforcement learning the TD error of appending token j is
    r_j + gamma * V_j - V_{j-1}, with no reward r before the end. Both are the change V_j - V_{j-1} at gamma = 1, the
    default. Below 1, delta_j exceeds the TD error by (1 - gamma)(V_j + V_{j-1}) and so rewards the level of the value
    too; at gamma = 0 only this level is left. At the last token V_j stands for the reward itself.

    Args:
        delta: the advantage of a token. ``td``: delta_j. ``gae``: A_j = sum_l (gamma * gae_lambda)^l delta_{j+l} over
            the targets of the document (Schulman et al. 2016, arXiv 1506.02438, eq. 16).
        gamma, gae_lambda: in [0, 1].
        map: ``softmax``: N * softmax(A / temperature). ``exp``: exp(A / beta) (AWR, Peng et al. 2019, arXiv
            1910.00177, Algorithm 1). Both are then scaled to mean 1 within the clip, so they give the same weights
            where temperature equals beta: these are two names of one parameter.
        temperature, beta: > 0; large is uniform.
        whiten: before the map, subtract the mean and divide by the standard deviation: ``sequence``: of the
            document's own targets. ``running``: of all advantages of the steps so far (exponentially weighted, over
            all ranks), which keeps documents comparable. ``none``: leave the advantages as they are.
        momentum: of the running statistics, in [0, 1): a step counts momentum times as much one step later.
        warmup_steps: steps in which running statistics are gathered and every weight is 1; >= 1.
        min_weight, max_weight: clip, 0 <= min <= 1 <= max. Mean 1 and the clip hold together.
        strength: lambda in [0, 1]; 0 is plain MTP.
        scope: ``sequence`` or ``batch``.

    Raises:
        ValueError: a value out of its range.
    """
    check_choice("delta", delta, ("td", "gae"))
    check_range("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
    check_range("gae_lambda", gae_lambda, 0 <= gae_lambda <= 1, "in [0, 1]")
    check_choice("map", map, ("softmax", "exp"))
    check_range("temperature", temperature, 0 < temperature < math.inf, "> 0")
    check_range("beta", beta, 0 < beta < math.inf, "> 0")
    check_choice("whiten", whiten, ("sequence", "running", "none"))
    check_range("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
    why = "a whole number >= 1 (the first step has no statistics to whiten with)"
    check_range("warmup_steps", warmup_steps, warmup_steps >= 1, why)
    bounds = check_clip(min_weight, max_weight)
    running = RunningMoments(momentum, warmup_steps) if whiten == "running" else None
    scale = temperature if map == "softmax" else beta

    def score(signals: Signals) -> Tensor:
        valid = signals.valid[:1]
        deltas = value_deltas(signals.values, valid[0], gamma)
        if is_checked(signals.step) or not on_cuda(deltas):  # it waits for the device
            _check_deltas(deltas[valid[0]])
        advantages = gae(deltas, gamma * gae_lambda, signals.document_ids) if delta == "gae" else deltas
        if running is not None:
            return running.whiten(advantages, valid[0], gather=signals.training)[None]
        if whiten == "sequence":
            return weigh_rows(advantages[None], signals.rows(1, "sequence"), z_score)
        return advantages[None]

    return Weighting(
        score,
        lambda advantages, mask: clipped_mean_one(advantages.double() / scale, mask, *bounds),
        needs={"values"},
        scope=scope,
        strength=strength,
        bounds=bounds,
        state=running,
    )


def value_deltas(values: Tensor, valid: Tensor, gamma: float) -> Tensor:
    """Computes delta_j = V_j - gamma * V_{j-1} at the targets, 0 elsewhere: [B, S] float64.

    Args:
        values: [B, S], V_j of the prefix x_<=j. It is read at the targets and at the token before each of them, which
            is in the same document: of a prompt, only the last token's value counts.
        valid: [B, S] bool, head 1's targets (``wmtp.weighting.targets.valid_targets``).
        gamma: in [0, 1].
    """
    x = values.double()
    deltas = torch.zeros_like(x)
    deltas[:, 1:] = x[:, 1:] - gamma * x[:, :-1]
    return torch.where(valid, deltas, torch.zeros_like(deltas))


def gae(deltas: Tensor, decay: float, document_ids: Tensor | None = None) -> Tensor:
    """Computes A_j = sum_{l >= 0} decay^l delta_{j+l} within the document (Schulman et al. 2016, eq. 16).

    The sums over the next n positions give those over 2n: A_j + decay^n A_{j+n}. So it takes log2(S) steps, and no
    term is divided by a power of decay that vanishes.

    Args:
        deltas: [B, S], 0 where the token is no target; l counts positions.
        decay: gamma * lambda in [0, 1].
        document_ids: [B, S], each document contiguous; None where each row is one document.

    Returns:
        [B, S] float64.
    """
    total, reach = deltas.double(), 1
    while reach < total.shape[1]:
        ahead = decay**reach * total[:, reach:]
        if document_ids is not None:
            ahead = ahead * (document_ids[:, reach:] == document_ids[:, :-reach])
        total = torch.cat([total[:, :-reach] + ahead, total[:, -reach:]], dim=1)
        reach *= 2
    return total


class RunningMoments:
    """The mean and variance of all targets seen in training, exponentially weighted by optimizer step.

    Count, sum and sum of squares of a step are gathered on each rank, call by call, and merged over ranks once per
    step. So the statistics depend neither on the world size nor on how a step is cut into micro-batches. The three
    decay together and only their ratios are used. So the start needs no bias correction (numerator and denominator
    carry the same 1 - momentum^t), a step weighs as many targets as it has, and a forward pass that runs twice, as
    under activation checkpointing, changes nothing.
    """

    def __init__(self, momentum: float, warmup_steps: int) -> None:
        self._momentum, self._warmup_steps = momentum, warmup_steps
        self._sums = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares, decayed
        self._steps = 0
        self._gathered: Tensor | None = None  # of this step, on this rank

    def whiten(self, x: Tensor, valid: Tensor, *, gather: bool = True) -> Tensor:
        """Whitens x [B, S] by the steps before this one: (x - mean) / standard deviation, [B, S] float64.

        The result is 0 while these steps are too few. ``gather`` adds the entries of ``valid`` to this step's sums.
        """
        if gather:
            seen = torch.where(valid, x.double(), 0.0)
            sums = torch.stack([valid.double().sum(), seen.sum(), seen.square().sum()])
            self._gathered = sums if self._gathered is None else self._gathered + sums
        count, total, squares = self._sums.tolist()
        if self._steps < self._warmup_steps or count == 0:
            return torch.zeros_like(x, dtype=torch.float64)
        mean = total / count
        std = math.sqrt(max(0.0, squares / count - mean**2))
        return (x.double() - mean) / std if std > SPREAD else torch.zeros_like(x, dtype=torch.float64)

    def end_step(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Merges the step's sums of all ranks; refuses a step in which this rank gathered nothing."""
        if self._gathered is None:
            raise RuntimeError("end_step: no weights were computed since the last step; call it once per step")
        sums = all_reduce_sum(self._gathered).cpu()
        self._sums = self._momentum * self._sums + (1 - self._momentum) * sums
        self._steps += 1
        self._gathered = None

    def state_dict(self) -> dict:
        """Returns the sums and the number of steps; within a step it refuses, as gathered sums would be lost."""
        if self._gathered is not None:
            raise RuntimeError("state_dict: the step's sums are not merged yet; call end_step first")
        return {"sums": self._sums.tolist(), "steps": self._steps}

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`, exactly."""
        if set(state) != {"sums", "steps"}:
            raise UserError(
                f"the running whitening's state must hold sums and steps, got {', '.join(sorted(state)) or 'nothing'}; "
                "resume with the weighting of the checkpoint"
            )
        self._sums = torch.tensor(state["sums"], dtype=torch.float64)
        self._steps, self._gathered = int(state["steps"]), None


def _check_deltas(deltas: Tensor) -> None:
    """Refuses differences that are not finite, and warns of differences without spread."""
    require_finite(deltas, "value differences")
    if deltas.numel() > 1 and (deltas.max() - deltas.min()).item() <= SPREAD:
        warnings.warn(
            f"critic: {deltas.numel()} value differences without spread (a value model that has learnt nothing?)",
            stacklevel=2,
        )
