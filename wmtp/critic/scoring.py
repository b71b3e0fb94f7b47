"""Values of whole pair data sets, and the hidden states of a frozen backbone kept in a file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmtp.critic.losses import response_last, response_mean
from wmtp.critic.metrics import probabilities, score_report
from wmtp.data import PairDataset, held_out_batches
from wmtp.distributed import World, gather_objects
from wmtp.errors import UserError
from wmtp.state_file import StateFile


@dataclass(frozen=True)
class PairScores:
    """One number per program from its values; column 0 the correct program of each pair, column 1 the incorrect one."""

    mean: np.ndarray  # [P, 2] float64: mean value over the response
    last: np.ndarray  # [P, 2] float64: value at the last response token


def pair_values(model: nn.Module, batch: dict, device: torch.device | str, hidden: Tensor | None = None) -> Tensor:
    """Values [P, 2, S] of a batch of pairs.

    Each program is a row of its own that starts at position 0 and is padded at the end, so plain causal attention is
    exact: no mask, no document ids.

    Args:
        model: a :class:`wmtp.models.ValueModel`.
        batch: of :meth:`wmtp.data.PairDataset.batch`.
        hidden: [P, 2, S, D] from a :class:`HiddenStates`: then the backbone does not run.
    """
    tokens = batch["tokens"].flatten(0, 1).to(device)  # [2P, S]
    if hidden is not None:
        hidden = hidden.flatten(0, 1).to(device)
    return model(tokens, hidden=hidden).unflatten(0, (-1, 2))


@torch.no_grad()
def score_pairs(
    values_of: Callable[[dict], Tensor], dataset: PairDataset, *, batch_size: int, world: World | None = None
) -> PairScores:
    """Scores of every pair, on every rank; each rank computes its share.

    Args:
        values_of: batch -> values [P, 2, S], such as :func:`pair_values` of a model in evaluation mode.
        batch_size: pairs of one rank's batch.
        world: the processes that share the work; None for this one alone.

    Raises:
        ValueError: a value is not finite; the message names the problem.
    """
    rank, world_size = (0, 1) if world is None else (world.rank, world.size)
    mine: dict[int, list[list[float]]] = {}
    for batch in held_out_batches(dataset, batch_size, rank, world_size):
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
    """:func:`wmtp.critic.score_report` of a value model: pairwise accuracy with its interval, AUC, calibration.

    Args:
        values_of, batch_size, world: as in :func:`score_pairs`.
        loss: what the values were trained by, ``mse`` or ``pairwise``: says which probability they imply.
        score: ``mean`` of the response's values, or the ``last`` one.
        labels: whether ``mse`` learnt labels, 1 and 0. Values that regress other rewards are no probabilities, and have
            no calibration.
        seed: of the bootstrap.
    """
    scores = score_pairs(values_of, dataset, batch_size=batch_size, world=world)
    probability = probabilities(scores.mean, scores.last, loss) if labels or loss == "pairwise" else None
    return score_report(getattr(scores, score), dataset.problems, probability, seed=seed)


class HiddenStates:
    """Hidden states of a frozen backbone at the response tokens of a data set, computed once, in a file.

    The file is named by what its content depends on, and counts once a note beside it says that it is complete. Epochs
    after the first then cost the head alone.

    Args:
        folder: where the file is, or is to be; shared by all ranks.
        dataset: whose tokens.
        embed_dim: D.
        dtype: of the stored states, float32 or bfloat16.
        model_key: names the backbone's weights and the dtype of its computation.
    """

    def __init__(
        self, folder: Path, dataset: PairDataset, *, embed_dim: int, dtype: torch.dtype, model_key: str
    ) -> None:
        self._dataset, self._dim, self._dtype = dataset, embed_dim, dtype
        lengths = dataset.lengths.reshape(-1)  # [2P]: document 2 * row + side
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        key = f"{dataset.fingerprint} {model_key}"
        self._file = StateFile(folder, key, num_tokens=int(self._starts[-1]), embed_dim=embed_dim, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    def complete(self) -> bool:
        """Whether an earlier run has computed them all."""
        return self._file.complete()

    @torch.no_grad()
    def compute(
        self, model: nn.Module, device: torch.device | str = "cpu", *, batch_size: int, world: World | None = None
    ) -> None:
        """Run the backbone over the data set, unless that is done; every rank calls this and writes its share."""
        rank, world_size = (0, 1) if world is None else (world.rank, world.size)
        if self._file.complete_for_all(world):
            return
        model.eval()
        # Shortest first, so that a batch holds little padding.
        order = np.argsort([max(map(len, both)) for both in self._dataset.documents], kind="stable").tolist()
        batches = list(held_out_batches(self._dataset.take(order), batch_size, rank, world_size))
        with self._file.written(world) as write:
            for batch in tqdm(batches, disable=rank != 0, desc="hidden states", unit="batch", leave=False):
                hidden = model(batch["tokens"].flatten(0, 1).to(device), return_hidden=True)  # [2P, S, D]
                hidden = hidden.cpu().unflatten(0, (-1, 2))
                for i, row in enumerate(batch["rows"]):
                    for side in (0, 1):
                        write(self._starts[2 * order[row] + side], hidden[i, side][batch["response"][i, side]])

    def of(self, batch: dict) -> Tensor:
        """[P, 2, S, D] states of a batch of the data set, 0 where a token is no response."""
        hidden = torch.zeros(*batch["tokens"].shape, self._dim, dtype=self._dtype)
        for i, row in enumerate(batch["rows"]):
            for side in (0, 1):
                start, end = self._starts[2 * row + side], self._starts[2 * row + side + 1]
                hidden[i, side][batch["response"][i, side]] = self._file.read(start, end)
        return hidden


def keep_hidden_states(
    model: nn.Module,
    datasets: Sequence[PairDataset],
    folder: Path,
    *,
    dtype: torch.dtype,
    model_key: str,
    batch_size: int,
    world: World,
) -> dict[str, HiddenStates]:
    """:class:`HiddenStates` of several data sets, by fingerprint; what an earlier run left there is used again."""
    found = {}
    for dataset in datasets:
        states = HiddenStates(
            folder, dataset, embed_dim=model.config.embed_dim, dtype=dtype, model_key=model_key
        )  # fmt: skip
        states.compute(model, world.device, batch_size=batch_size, world=world)
        found[dataset.fingerprint] = states
    return found
