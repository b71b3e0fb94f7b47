"""Packing of documents into rows of one length, and batches of rows: endless for training, one pass for evaluation."""

import bisect
import hashlib
import heapq
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from wmtp.data.documents import IGNORE, Documents, left_out, printable
from wmtp.errors import UserError


class FileRows:
    """The rows of an array [R, S] in a ``.npy`` file, each read when it is asked for.

    They are not mapped: a mapping's pages count as this process's memory, up to the whole file, and where a file is cut
    off meanwhile, a mapping ends the process without a word.
    """

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r")  # reads what the file says of itself
        self.shape, self._dtype, self._start = torch.Size(array.shape), array.dtype, array.offset
        self._file = path.open("rb", buffering=0)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Returns rows [len(index), S], as a tensor's method does with dim 0."""
        rows = np.empty((len(index), self.shape[1]), self._dtype)
        length = self.shape[1] * rows.itemsize
        for row, i in zip(rows, index.tolist(), strict=True):
            if os.preadv(self._file.fileno(), [row], self._start + i * length) < length:
                raise UserError(f"{self._file.name} was cut off while it was in use; start again: it is made again")
        return torch.from_numpy(rows)


@dataclass(frozen=True)
class PackedDataset:
    """Rows of S tokens, each holding whole documents and padding at the end, in memory or in files.

    Attributes:
        tokens: [R, S] int32, pad_id where there is no document.
        labels: [R, S] int32, unshifted, -100 where the token is no target.
        document_ids: [R, S] int32, 0, 1, ... within a row, -1 for padding.
        signals: [R, S] float32 by name, 0 for padding: those of the documents.
        members: [N] int64, for each document, row by row, its index in the dataset that was packed.
        ids: of pyarrow, [N], their names.
        starts: [R + 1] int64: row r holds members[starts[r] : starts[r + 1]].
        row_tokens: [R] int64, the tokens of each row that are no padding.
        row_targets: [R] int64, the targets of head 1 in each row; a document's first token is none, as nothing comes
            before it.
        num_cut: documents cut to S tokens.
        num_dropped: documents left out because they have no target within S tokens.
        fingerprint: SHA-256 of the documents and of the settings of :func:`pack`.
        rows_sha256: SHA-256 of what a model is trained on: tokens, labels, places of documents; not the signals.
        name, skipped, unread, must_read: of the documents.
    """

    tokens: Tensor | FileRows
    labels: Tensor | FileRows
    document_ids: Tensor | FileRows
    signals: Mapping[str, Tensor | FileRows]
    members: np.ndarray
    ids: Any
    starts: np.ndarray
    row_tokens: np.ndarray
    row_targets: np.ndarray
    max_token_id: int
    pad_id: int
    num_cut: int
    num_dropped: int
    fingerprint: str
    rows_sha256: str
    name: str
    skipped: dict[str, int]
    unread: tuple[str, ...]
    must_read: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_targets(self) -> int:
        """Counts the targets of head 1."""
        return int(self.row_targets.sum())

    def row_members(self, row: int) -> np.ndarray:
        """Returns the indices of the documents of a row, in order."""
        return self.members[self.starts[row] : self.starts[row + 1]]

    def row_ids(self, row: int) -> tuple[str, ...]:
        """Returns the names of the documents of a row, in order."""
        return tuple(self.ids[self.starts[row] : self.starts[row + 1]].to_pylist())

    def summary(self, needs: Collection[str] | None = None) -> str:
        """Describes the data in one line: counts, share of the rows that is filled, and columns not read.

        Args:
            needs: names of the signals that the weighting reads; None where they are not known.
        """
        filled = int(self.row_tokens.sum()) / (len(self) * self.seq_len)
        idle = () if needs is None else (name for name in self.signals if name not in needs)
        return (
            f"{self.name}: {len(self)} rows of {self.seq_len} tokens, {len(self.members)} documents, "
            f"{self.num_targets} targets, {self.num_cut} cut, {self.num_dropped} dropped (no target within seq_len), "
            f"{filled:.1%} full{left_out(self.skipped, (*idle, *self.unread))}"
        )

    def require_read(self, needs: Collection[str], where: str = "this weighting") -> None:
        """Refuses a reader of the labels whose ``needs`` lack a signal that they mean nothing without.

        Raises:
            UserError: prompts are targets (prompt_weight), and nothing reads at what weight.
        """
        if not set(self.must_read) <= set(needs):
            raise UserError(
                f"{self.name}: prompt_weight makes its prompts targets, but {where} does not read their weights and "
                "would count them in full; use wmtp.weighting.given, or leave prompt_weight out"
            )

    def batch(self, rows: list[int], *, size: int | None = None) -> dict[str, Any]:
        """Returns rows as int64 tensors [B, S], `signals` by name, float32, the list `rows`, and `of`, the fingerprint.

        With `size`, rows of padding, without document and target, fill the batch up to so many rows.
        """
        empty, index = (size or len(rows)) - len(rows), torch.tensor(rows, dtype=torch.int64)

        def take(column: Tensor | FileRows, pad: float) -> Tensor:
            found = column.index_select(0, index)
            return torch.cat([found, found.new_full((empty, self.seq_len), pad)]) if empty else found

        return {
            "tokens": take(self.tokens, self.pad_id).long(),
            "labels": take(self.labels, IGNORE).long(),
            "document_ids": take(self.document_ids, -1).long(),
            "signals": {name: take(signal, 0.0) for name, signal in self.signals.items()},
            "rows": list(rows),
            "of": self.fingerprint,
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
    facts = plan(documents, seq_len, packed=packed, pad_id=pad_id, require_targets=require_targets)
    [(columns, signals, ids)] = fill(documents, seq_len, facts, rows_at_once=len(facts["row_tokens"]))
    tensors: dict[str, Any] = {name: torch.from_numpy(column) for name, column in columns.items()}
    tensors["signals"] = {name: torch.from_numpy(signal) for name, signal in signals.items()}
    return PackedDataset(**facts, **tensors, ids=ids, rows_sha256=rows_sha256(**columns))


def plan(
    documents: Documents, seq_len: int, *, packed: bool, pad_id: int, require_targets: bool = True
) -> dict[str, Any]:
    """Decides which document goes into which row, and returns all fields of the dataset that need no row to be filled.

    Args, Raises: as in :func:`pack`.
    """
    if seq_len < 2:
        raise UserError(f"seq_len must be >= 2, got {seq_len}: the first token of a row predicts the second")
    lengths, targets, largest = (np.zeros(len(documents), np.int64) for _ in range(3))
    for i, document in enumerate(documents):
        lengths[i] = len(document)
        targets[i] = np.count_nonzero(document.labels[1:seq_len] != IGNORE)
        largest[i] = document.tokens[:seq_len].max(initial=0)
    if documents.scored_len is not None and seq_len > documents.scored_len:
        longer = int((lengths > documents.scored_len).sum())
        if longer:
            raise UserError(
                f"{documents.name}: {longer} documents were cut to {documents.scored_len} tokens when they were "
                f"scored, and seq_len is {seq_len}; score them with seq_len >= {seq_len}, or lower seq_len here"
            )
    kept = np.flatnonzero(targets > 0) if require_targets else np.arange(len(documents))
    if not len(kept):
        if any((document.labels[1:] != IGNORE).any() for document in documents):
            raise UserError(
                f"{documents.name}: no document has a target within seq_len {seq_len} tokens; raise seq_len"
            )
        raise UserError(f"{documents.name}: no document has a target; in a chat: a message of the role assistant")
    fitting = np.minimum(lengths, seq_len)
    row = _best_fit(fitting[kept], seq_len) if packed else np.arange(len(kept))
    members, starts = kept[np.argsort(row, kind="stable")], np.cumsum([0, *np.bincount(row)])
    row_tokens, row_targets = (np.add.reduceat(counts[members], starts[:-1]) for counts in (fitting, targets))
    padded = int(row_tokens.sum()) < len(row_tokens) * seq_len
    how = f"{documents.fingerprint} seq_len={seq_len} packed={bool(packed)}"
    return {
        "members": members,
        "starts": starts,
        "row_tokens": row_tokens,
        "row_targets": row_targets,
        "max_token_id": max(int(largest[kept].max()), pad_id if padded else 0),
        "pad_id": pad_id,
        "num_cut": int((lengths[kept] > seq_len).sum()),
        "num_dropped": len(documents) - len(kept),
        "fingerprint": hashlib.sha256(how.encode()).hexdigest(),
        "name": documents.name,
        "skipped": documents.skipped,
        "unread": tuple(column for column in documents.unread if column not in documents.signals),
        "must_read": documents.must_read,
    }


def fill(
    documents: Documents, seq_len: int, facts: Mapping[str, Any], *, rows_at_once: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray], pa.Array]]:
    """Yields the rows of a :func:`plan`, a number of them at a time: columns and signals [r, S] by name, and names."""
    starts, members, pad_id = facts["starts"], facts["members"], facts["pad_id"]
    for first in range(0, len(starts) - 1, rows_at_once):
        rows = range(first, min(first + rows_at_once, len(starts) - 1))
        shape, ids = (len(rows), seq_len), []
        tokens, labels = np.full(shape, pad_id, np.int32), np.full(shape, IGNORE, np.int32)
        document_ids = np.full(shape, -1, np.int32)
        signals = {name: np.zeros(shape, np.float32) for name in documents.signals}
        for row in rows:
            start = 0
            for number, i in enumerate(members[starts[row] : starts[row + 1]].tolist()):
                document = documents[i]
                length = min(len(document), seq_len)
                place = (row - first, slice(start, start + length))
                tokens[place], labels[place] = document.tokens[:length], document.labels[:length]
                document_ids[place] = number
                for name, signal in signals.items():
                    signal[place] = document.signal(name)[:length]
                start += length
                ids.append(printable(document.id))
        columns = {"tokens": tokens, "labels": labels, "document_ids": document_ids}
        yield columns, signals, pa.array(ids, pa.large_string())


def rows_sha256(tokens: np.ndarray, labels: np.ndarray, document_ids: np.ndarray) -> str:
    """Returns the SHA-256 of the columns [R, S] and of their shape."""
    digest = hashlib.sha256(str(tokens.shape).encode())
    for column in (tokens, labels, document_ids):
        digest.update(column.reshape(-1).data)
    return digest.hexdigest()


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns the row of each document, rows counted in the order of their first documents."""
    rows, count = np.empty(len(lengths), np.int64), 0
    room: list[int] = []  # what is free in some row, sorted
    with_room: dict[int, list[int]] = {}  # the rows where so much is free, a heap
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(room, length)
        if at < len(room):
            free = room[at]
            rows[i] = heapq.heappop(with_room[free])
            if not with_room[free]:
                del with_room[free], room[at]
        else:
            free, rows[i], count = seq_len, count, count + 1
        left = free - length
        if left and left not in with_room:
            bisect.insort(room, left)
            with_room[left] = []
        if left:
            heapq.heappush(with_room[left], int(rows[i]))
    first = np.unique(rows, return_index=True)[1]
    return np.argsort(np.argsort(first))[rows]


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
