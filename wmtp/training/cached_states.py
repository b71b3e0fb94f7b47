"""The states of a frozen trunk or backbone for a whole data set, computed once: then a step costs the heads alone."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wmtp.data import PackedDataset
from wmtp.distributed import World, gather_objects, wait_for_all
from wmtp.files import content_sha256

States = Callable[[nn.Module, dict, torch.device | str], Tensor]


class CachedStates:
    """What a frozen model gives for each row of a data set, in a file that is named by what its content depends on.

    It counts as long as the note beside it has its hash; what a killed process left is written anew.

    Args:
        folder: where the file is, or is to be; shared by all ranks.
        dataset: whose tokens: packed rows, or the pairs of a critic.
        states: ``states(model, batch, device) -> [..., S, D]`` of a batch of the data set.
        kept: where in [..., S] of a batch a state is kept; elsewhere it takes no room.
        counts: [R] how many each row keeps.
        order: of the computation; None for that of the rows.
        key: names all that the states depend on: the data, the weights, the dtype of their computation.
        embed_dim: D.
        dtype: of the stored states.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Any,
        states: States,
        kept: Callable[[dict], Tensor],
        counts: np.ndarray,
        *,
        order: Sequence[int] | None = None,
        key: str,
        embed_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self._dataset, self._states, self._kept, self._dim, self._dtype = dataset, states, kept, embed_dim, dtype
        self._order = range(len(dataset)) if order is None else order
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._file = folder / f"{hashlib.sha256(f'{key} {embed_dim} {dtype}'.encode()).hexdigest()[:24]}.bin"
        self._note = self._file.with_suffix(".json")
        self._mapped: Tensor | None = None

    @torch.no_grad()
    def compute(self, model: nn.Module, world: World | None = None, *, batch_size: int) -> None:
        """Runs the model over the data set, unless that is done; every rank calls this and writes its share."""
        if self._complete(world):
            return
        rank, world_size, device = (0, 1, "cpu") if world is None else (world.rank, world.size, world.device)
        model.eval()
        per_step = batch_size * world_size
        firsts = range(rank * batch_size, -(-len(self._order) // per_step) * per_step, per_step)
        with self._written(world) as write:
            for first in tqdm(firsts, disable=rank != 0, desc="frozen states", unit="batch", leave=False):
                # A rank that runs out gets empty rows, so that collectives inside the model stay in step.
                batch = self._dataset.batch(list(self._order[first : first + batch_size]), size=batch_size)
                states, kept = self._states(model, batch, device).cpu(), self._kept(batch)
                for i, row in enumerate(batch["rows"]):
                    write(self._starts[row], states[i][kept[i]])

    def of(self, batch: dict) -> Tensor:
        """Returns [..., S, D] states of a batch of the data set, 0 where none is kept."""
        kept = self._kept(batch).cpu()
        states = torch.zeros(*kept.shape, self._dim, dtype=self._dtype)
        for i, row in enumerate(batch["rows"]):
            states[i][kept[i]] = self._read(self._starts[row], self._starts[row + 1])
        return states

    @property
    def _num_bytes(self) -> int:
        return int(self._starts[-1]) * self._dim * self._dtype.itemsize

    def _complete(self, world: World | None) -> bool:
        """Returns whether an earlier run has written it all, as every rank sees it."""
        noted = self._note.exists()
        done = noted and self._note.read_bytes() == self._record()
        if noted and not done and (world is None or world.is_main):
            tqdm.write(f"{self._file} is not what was written into it; it is made again", file=sys.stderr)
        return all(gather_objects(done)) if world is not None and world.size > 1 else done

    def _record(self) -> bytes | None:
        """Returns what the note of the file as it is would say; None for a file of another size."""
        if not self._file.exists() or self._file.stat().st_size != self._num_bytes:
            return None
        facts = {"tokens": int(self._starts[-1]), "embed_dim": self._dim, "sha256": content_sha256(self._file)}
        return json.dumps(facts).encode()

    @contextmanager
    def _written(self, world: World | None) -> Iterator[Callable[[int, Tensor], None]]:
        """Gives ``write(start, states [n, D])``; the file is complete when the last rank leaves the block."""
        wait = (lambda: None) if world is None or world.size == 1 else wait_for_all
        is_main = world is None or world.is_main
        if is_main:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._note.unlink(missing_ok=True)
            self._file.touch()
            os.truncate(self._file, self._num_bytes)
        wait()
        with self._file.open("r+b") as file:

            def write(start: int, states: Tensor) -> None:
                file.seek(int(start) * self._dim * self._dtype.itemsize)
                file.write(states.to("cpu", self._dtype).contiguous().view(torch.uint8).numpy().tobytes())

            yield write
            file.flush()
            os.fsync(file.fileno())
        wait()
        if is_main:
            self._note.write_bytes(self._record() or b"")
        wait()

    def _read(self, start: int, end: int) -> Tensor:
        """Returns [end - start, D] states, mapped from the file."""
        if self._mapped is None:
            size = int(self._starts[-1]) * self._dim
            flat = torch.from_file(str(self._file), shared=True, size=size, dtype=self._dtype)
            self._mapped = flat.view(-1, self._dim)
        return self._mapped[start:end]


def trunk_states(folder: Path, dataset: PackedDataset, model_key: str, **stored: Any) -> CachedStates:
    """Computes the trunk's states, [B, S, D], that :class:`~wmtp.models.MTPDecoder` gives with ``return_trunk``.

    Args:
        folder, dataset, stored: as in :class:`CachedStates`.
        model_key: names the trunk's weights and the dtype of its computation.
    """

    def states(model: nn.Module, batch: dict, device: torch.device | str) -> Tensor:
        return model(batch["tokens"].to(device), document_ids=batch["document_ids"].to(device), return_trunk=True)

    counts = dataset.row_tokens
    key = f"trunk {dataset.fingerprint} {model_key}"
    return CachedStates(folder, dataset, states, lambda batch: batch["document_ids"] >= 0, counts, key=key, **stored)


def keep_states(
    make: Callable[..., CachedStates],
    model: Any,
    datasets: Sequence[Any],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    model_key: str,
    batch_size: int,
    world: World,
) -> dict[str, CachedStates]:
    """States of several data sets, by fingerprint; what an earlier run left in the folder is used again.

    Args:
        make: :func:`trunk_states` or :func:`wmtp.critic.hidden_states`.
        datasets: as in :class:`CachedStates`; None for one that is not there.
        dtype: of the stored states; with None nothing is kept, and the model runs in every pass.
    """
    found = {}
    for dataset in datasets if dtype is not None else ():
        if dataset is not None:
            states = make(folder, dataset, model_key, embed_dim=model.config.embed_dim, dtype=dtype)
            states.compute(model, world, batch_size=batch_size)
            found[dataset.fingerprint] = states
    return found
