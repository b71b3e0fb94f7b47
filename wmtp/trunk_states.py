"""The states of a frozen trunk for a whole data set, computed once: then a step costs the heads alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmtp.data import PackedDataset, held_out_batches
from wmtp.distributed import World
from wmtp.state_file import StateFile


class TrunkStates:
    """What :class:`~wmtp.models.MTPDecoder` gives with ``return_trunk`` for each row of a data set, in a file.

    Args:
        folder: where the file is, or is to be; shared by all ranks.
        dataset: whose tokens; padding takes no room.
        embed_dim: D.
        dtype: of the stored states.
        model_key: names the trunk's weights and the dtype of its computation.
    """

    def __init__(
        self, folder: Path, dataset: PackedDataset, *, embed_dim: int, dtype: torch.dtype, model_key: str
    ) -> None:
        self._dataset, self._dim, self._dtype = dataset, embed_dim, dtype
        self._lengths = (dataset.document_ids >= 0).sum(dim=1).numpy()  # documents come first in a row, then padding
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)])
        key = f"trunk {dataset.fingerprint} {model_key}"
        self._file = StateFile(folder, key, num_tokens=int(self._starts[-1]), embed_dim=embed_dim, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        return self._file.num_bytes

    @torch.no_grad()
    def compute(self, model: nn.Module, world: World, *, batch_size: int) -> bool:
        """Run the trunk over the data set, unless that is done; every rank calls this. Whether it ran."""
        if self._file.complete_for_all(world):
            return False
        model.eval()
        batches = list(held_out_batches(self._dataset, batch_size, world.rank, world.size))
        with self._file.written(world) as write:
            for batch in tqdm(batches, disable=not world.is_main, desc="trunk states", unit="batch", leave=False):
                inputs = {key: batch[key].to(world.device) for key in ("tokens", "document_ids")}
                states = model(**inputs, return_trunk=True)  # [B, S, D]
                for i, row in enumerate(batch["rows"]):
                    write(self._starts[row], states[i, : self._lengths[row]])
        return True

    def of(self, batch: dict) -> Tensor:
        """[B, S, D] states of a batch of the data set, 0 for padding."""
        states = torch.zeros(*batch["tokens"].shape, self._dim, dtype=self._dtype)
        for i, row in enumerate(batch["rows"]):
            states[i, : self._lengths[row]] = self._file.read(self._starts[row], self._starts[row + 1])
        return states


def keep_trunk_states(
    model: nn.Module,
    datasets: Sequence[PackedDataset | None],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    model_key: str,
    batch_size: int,
    world: World,
) -> dict[str, TrunkStates]:
    """:class:`TrunkStates` of several data sets, by fingerprint; what an earlier run left there is used again.

    Empty where ``dtype`` is None: nothing is kept, and the trunk runs in every pass.
    """
    found = {}
    for dataset in datasets if dtype is not None else ():
        if dataset is None:
            continue
        states = TrunkStates(
            folder, dataset, embed_dim=model.config.embed_dim, dtype=dtype, model_key=model_key
        )  # fmt: skip
        states.compute(model, world, batch_size=batch_size)
        found[dataset.fingerprint] = states
    return found
