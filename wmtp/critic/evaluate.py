"""Values and scores of whole pair data sets, and the cached states of a frozen backbone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wmtp.critic.losses import response_last, response_mean
from wmtp.critic.metrics import probabilities, score_report
from wmtp.critic.pair_dataset import PairDataset
from wmtp.data import validation_batches
from wmtp.distributed import World, gather_objects
from wmtp.errors import UserError
from wmtp.training.cached_states import CachedStates


@dataclass(frozen=True)
class PairScores:
    """The scores of programs; column 0 is the correct program of each pair, column 1 the incorrect one."""

    mean: np.ndarray  # [P, 2] float64: mean value over the response
    last: np.ndarray  # [P, 2] float64: value at the last response token


def pair_values(model: nn.Module, batch: dict, device: torch.device | str, hidden: Tensor | None = None) -> Tensor:
    """Computes the values [P, 2, S] of a batch of pairs.

    Each program is a row of its own that starts at position 0 and is padded at the end, so plain causal attention is
    exact without a mask or document ids.

    Args:
        model: a :class:`wmtp.models.ValueModel`.
        batch: of :meth:`wmtp.critic.PairDataset.batch`.
        hidden: [P, 2, S, D] from :func:`hidden_states`; with them the backbone does not run.
    """
    tokens = batch["tokens"].flatten(0, 1).to(device)  # [2P, S]
    if hidden is not None:
        hidden = hidden.flatten(0, 1).to(device)
    return model(tokens, hidden=hidden).unflatten(0, (-1, 2))


def hidden_states(folder: Path, dataset: PairDataset, model_key: str, **stored: Any) -> CachedStates:
    """Caches the hidden states [P, 2, S, D] of a :class:`~wmtp.models.ValueModel` for the response tokens.

    Args:
        folder, dataset, stored: as in :class:`wmtp.training.cached_states.CachedStates`.
        model_key: names the backbone's weights and the dtype of its computation.
    """

    def states(model: nn.Module, batch: dict, device: torch.device | str) -> Tensor:
        return model(batch["tokens"].flatten(0, 1).to(device), return_hidden=True).unflatten(0, (-1, 2))

    # Shortest first, so that a batch holds little padding.
    order = np.argsort([max(map(len, both)) for both in dataset.documents], kind="stable").tolist()
    key, counts = f"{dataset.fingerprint} {model_key}", dataset.lengths.sum(axis=1)
    return CachedStates(
        folder, dataset, states, lambda batch: batch["response"], counts, order=order, key=key, **stored
    )


@torch.no_grad()
def score_pairs(
    values_of: Callable[[dict], Tensor], dataset: PairDataset, *, batch_size: int, world: World | None = None
) -> PairScores:
    """Scores every pair; each rank computes its share, and all get the result.

    Args:
        values_of: batch -> values [P, 2, S], such as :func:`pair_values` of a model in evaluation mode.
        batch_size: pairs of one rank's batch.
        world: the processes that share the work; None for this one alone.

    Raises:
        ValueError: a value is not finite; the message names the problem.
    """
    rank, world_size = (0, 1) if world is None else (world.rank, world.size)
    mine: dict[int, list[list[float]]] = {}
    for batch in validation_batches(dataset, batch_size, rank, world_size):  # type: ignore[arg-type]  # as packed rows
        values = values_of(batch).flatten(0, 1).double().cpu()
        response = batch["response"].flatten(0, 1)
        both = torch.stack([response_mean(values, response), response_last(values, response)])  # [2, 2P]
        mine |= dict(zip(batch["rows"], both.unflatten(1, (-1, 2)).transpose(0, 1).tolist(), strict=False))
    everyone = mine
    if world_size > 1:
        everyone = {row: scores for part in gather_objects(mine) for row, scores in part.items()}
    table = np.array([everyone[row] for row in range(len(dataset))])  # [P, mean or last, 2]
    if not np.isfinite(table).all():
        bad = dataset.problems[~np.isfinite(table).all(axis=(1, 2))]
        raise UserError(
            f"{dataset.name}: the values of {len(bad)} pairs are not finite, the first is of {str(bad[0])!r}"
        )
    return PairScores(table[:, 0], table[:, 1])


def evaluate_pairs(
    values_of: Callable[[dict], Tensor],
    dataset: PairDataset,
    *,
    batch_size: int,
    loss: str,
    score: str = "mean",
    labels: bool = True,
    world: World | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Returns :func:`wmtp.critic.score_report` of a value model: pairwise accuracy, its interval, AUC, calibration.

    Args:
        values_of, batch_size, world: as in :func:`score_pairs`.
        loss: the values' training loss, ``mse`` or ``pairwise``, which decides the probability that they imply.
        score: ``mean`` of the response's values, or the ``last`` one.
        labels: ``mse`` learnt labels, 1 and 0. Values that regress other rewards are no probabilities, and have no
            calibration.
        seed: of the bootstrap.
    """
    scores = score_pairs(values_of, dataset, batch_size=batch_size, world=world)
    probability = probabilities(scores.mean, scores.last, loss) if labels or loss == "pairwise" else None
    return score_report(getattr(scores, score), dataset.problems, probability, seed=seed)
