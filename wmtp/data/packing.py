"""Packing of documents into rows of one length, and batches of rows: endless for training, one pass for evaluation."""

import bisect
import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wmtp.data.documents import IGNORE, Documents, left_out
from wmtp.errors import UserError


@dataclass(frozen=True)
class PackedDataset:
    """Rows of S tokens, each holding whole documents and padding at the end.

    Attributes:
        tokens: [R, S] int32, pad_id where there is no document.
        labels: [R, S] int32, unshifted, -100 where the token is no target.
        document_ids: [R, S] int32, 0, 1, ... within a row, -1 for padding.
        signals: [R, S] float32 by name, 0 for padding: those that every document has.
        ids: the names of each row's documents.
        members: the indices of each row's documents in the dataset that was packed.
        num_cut: documents cut to S tokens.
        num_dropped: documents left out because they have no target within S tokens.
        fingerprint: SHA-256 of the documents and of the settings of :func:`pack`.
        name, skipped, unread: of the documents.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor
    signals: Mapping[str, Tensor]
    ids: tuple[tuple[str, ...], ...]
    members: tuple[tuple[int, ...], ...]
    pad_id: int
    num_cut: int
    num_dropped: int
    fingerprint: str
    name: str
    skipped: dict[str, int]
    unread: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_targets(self) -> int:
        """Counts the targets of head 1; a document's first token is none, as nothing comes before it."""
        return int(self.row_targets.sum())

    @cached_property
    def row_targets(self) -> Tensor:
        """Counts the targets of head 1 in each row, [R]."""
        same_document = self.document_ids[:, 1:] == self.document_ids[:, :-1]
        return ((self.labels[:, 1:] != IGNORE) & same_document).sum(dim=1)

    @property
    def max_token_id(self) -> int:
        return int(self.tokens.max())

    def row_ids(self, row: int) -> tuple[str, ...]:
        """Returns the names of the documents of a row, in order."""
        return self.ids[row]

    @cached_property
    def rows_sha256(self) -> str:
        """Returns the SHA-256 of what a model is trained on: tokens, labels, places of documents; not the signals."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for column in (self.tokens, self.labels, self.document_ids):
            digest.update(column.numpy().tobytes())
        return digest.hexdigest()

    def summary(self, needs: Collection[str] | None = None) -> str:
        """Describes the data in one line: counts, share of the rows that is filled, and columns not read.

        Args:
            needs: names of the signals that the weighting reads; None where they are not known.
        """
        documents, filled = sum(map(len, self.ids)), float((self.document_ids >= 0).double().mean())
        idle = () if needs is None else (name for name in self.signals if name not in needs)
        return (
            f"{self.name}: {len(self)} rows of {self.seq_len} tokens, {documents} documents, {self.num_targets} "
            f"targets, {self.num_cut} cut, {self.num_dropped} dropped (no target within seq_len), "
            f"{filled:.1%} full{left_out(self.skipped, (*idle, *self.unread))}"
        )

    def batch(self, rows: list[int], *, size: int | None = None) -> dict[str, Any]:
        """Returns the rows as int64 tensors [B, S], their `signals` by name, float32, and the list `rows`.

        With `size`, rows of padding, without document and target, fill the batch up to so many rows.
        """
        empty = (size or len(rows)) - len(rows)

        def take(column: Tensor, pad: float) -> Tensor:
            return torch.cat([column[rows], column.new_full((empty, self.seq_len), pad)]) if empty else column[rows]

        return {
            "tokens": take(self.tokens, self.pad_id).long(),
            "labels": take(self.labels, IGNORE).long(),
            "document_ids": take(self.document_ids, -1).long(),
            "signals": {name: take(signal, 0.0) for name, signal in self.signals.items()},
            "rows": list(rows),
        }


def pack(
    documents: Documents, seq_len: int, *, packed: bool = True, pad_id: int, require_targets: bool = True
) -> PackedDataset:
    """Packs documents into rows of seq_len tokens; no document spans two rows.

    Longest first, each document goes into the row where it leaves the least room (best-fit decreasing). A longer
    document is cut to seq_len. Documents keep their order within a row, and rows are in the order of their first
    documents: the result depends on the documents alone.

    Args:
        packed: False gives each document a row of its own.
        pad_id: token id that fills the rest of a row.
        require_targets: leave out documents without a target within seq_len tokens: training learns nothing from them.

    Raises:
        ValueError: no document has a target within seq_len tokens, or fewer than seq_len tokens have been scored.
    """
    if seq_len < 2:
        raise UserError(f"seq_len must be >= 2, got {seq_len}: the first token of a row predicts the second")
    if documents.scored_len is not None and seq_len > documents.scored_len:
        longer = sum(len(document) > documents.scored_len for document in documents)
        if longer:
            raise UserError(
                f"{documents.name}: {longer} documents were cut to {documents.scored_len} tokens when they were "
                f"scored, and seq_len is {seq_len}; score them with seq_len >= {seq_len}, or lower seq_len here"
            )
    kept = [i for i, d in enumerate(documents) if not require_targets or (d.labels[1:seq_len] != IGNORE).any()]
    if not kept:
        raise UserError(f"{documents.name}: no document has a target within seq_len {seq_len} tokens; raise seq_len")
    lengths = {i: min(len(documents[i]), seq_len) for i in kept}
    rows = _best_fit(lengths, seq_len) if packed else [[i] for i in kept]

    shape = (len(rows), seq_len)
    tokens, labels = np.full(shape, pad_id, np.int32), np.full(shape, IGNORE, np.int32)
    document_ids = np.full(shape, -1, np.int32)
    signals = {name: np.zeros(shape, np.float32) for name in documents.signals}
    for row, members in enumerate(rows):
        start = 0
        for number, i in enumerate(members):
            document, length = documents[i], lengths[i]
            place = (row, slice(start, start + length))
            tokens[place], labels[place] = document.tokens[:length], document.labels[:length]
            document_ids[place] = number
            for name, signal in signals.items():
                signal[place] = document.signals[name][:length]
            start += length

    how = f"{documents.fingerprint} seq_len={seq_len} packed={bool(packed)}"
    return PackedDataset(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        document_ids=torch.from_numpy(document_ids),
        signals={name: torch.from_numpy(signal) for name, signal in signals.items()},
        ids=tuple(tuple(documents[i].id for i in members) for members in rows),
        members=tuple(map(tuple, rows)),
        pad_id=pad_id,
        num_cut=sum(len(documents[i]) > seq_len for i in kept),
        num_dropped=len(documents) - len(kept),
        fingerprint=hashlib.sha256(how.encode()).hexdigest(),
        name=documents.name,
        skipped=documents.skipped,
        unread=tuple(column for column in documents.unread if column not in signals),
    )


def _best_fit(lengths: dict[int, int], seq_len: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(room, (lengths[i], -1))
        free, row = room.pop(at) if at < len(room) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        if free > lengths[i]:
            bisect.insort(room, (free - lengths[i], row))
    return sorted(sorted(members) for members in rows)


class BatchStream:
    """An endless stream of batches whose whole state is one number: the rows all ranks have consumed together.

    Row p of the stream is ``permutation(seed, epoch = p // R)[p % R]`` of the R rows. A call takes the rows
    [p, p + batch_size * world_size), of which rank r gets its contiguous block. So the global batch is the same at any
    world size and any split into micro-batches, and a run resumes at another world size.

    Args:
        batch_size: rows of one rank's batch.
        seed: of the permutations, >= 0.

    Raises:
        ValueError: the dataset has fewer rows than one batch of all ranks.
    """

    def __init__(self, dataset: PackedDataset, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        if batch_size < 1 or not 0 <= rank < world_size or seed < 0:
            raise UserError(
                "batch_size must be >= 1, rank in [0, world_size) and seed >= 0, "
                f"got batch_size {batch_size}, rank {rank}, world_size {world_size}, seed {seed}"
            )
        if len(dataset) < batch_size * world_size:
            raise UserError(
                f"the dataset has {len(dataset)} rows of {dataset.seq_len} tokens, fewer than "
                f"batch_size {batch_size} x world size {world_size} = {batch_size * world_size}; lower batch_size or "
                "seq_len, set packed=false, use fewer processes, or give more data"
            )
        self.position = 0
        self._dataset, self._batch_size, self._rank, self._world_size = dataset, batch_size, rank, world_size
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its permutation)

    @property
    def epoch(self) -> float:
        """Returns how often the dataset has been seen."""
        return self.position / len(self._dataset)

    @property
    def num_targets(self) -> int:
        """Counts the targets of head 1 in all rows that have been consumed."""
        epoch, index = divmod(self.position, len(self._dataset))
        begun = self._dataset.row_targets[self._permutation(epoch)[:index]].sum() if index else 0
        return epoch * self._dataset.num_targets + int(begun)

    def next_batch(self) -> dict[str, Any]:
        """Returns this rank's rows as a :meth:`PackedDataset.batch`, and moves on."""
        start = self.position + self._rank * self._batch_size
        self.position += self._batch_size * self._world_size
        return self._dataset.batch([self._row(p) for p in range(start, start + self._batch_size)])

    def state_dict(self) -> dict:
        """Returns the position, with the seed and the data that it belongs to."""
        return {"position": self.position, "seed": self._seed, "fingerprint": self._dataset.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Restores a :meth:`state_dict`; refuses one of other data, another packing or another seed."""
        for key, value in self.state_dict().items():
            if key != "position" and state[key] != value:
                what = "the data or its packing (dataset, tokenizer, seq_len, packed)" if key == "fingerprint" else key
                raise UserError(
                    f"cannot resume: {what} changed since the checkpoint, {key} was {state[key]!s:.16}, now "
                    f"{value!s:.16}; restore it, or start a new run from the checkpoint's weights"
                )
        self.position = state["position"]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self._dataset))
        return int(self._permutation(epoch)[index])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._order = (epoch, generator.permutation(len(self._dataset)))
        return self._order[1]


def validation_batches(dataset: PackedDataset, batch_size: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
    """Yields one pass over the dataset: every row once over all ranks, in equally many full batches on each rank.

    Ranks that run out get rows without document and target, so that collectives inside the model stay in step.
    """
    per_step = batch_size * world_size
    for start in range(rank * batch_size, -(-len(dataset) // per_step) * per_step, per_step):
        rows = list(range(min(start, len(dataset)), min(start + batch_size, len(dataset))))
        yield dataset.batch(rows, size=batch_size)
