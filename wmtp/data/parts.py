"""The scoring of a dataset part by part, in memory that does not grow, without the forward pass.

Part p holds the documents [p * size, (p + 1) * size) of the dataset. Each part is packed, batched and scored by itself,
so its values depend neither on the number of processes nor on the parts that are there already.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from wmtp.data.documents import IGNORE, Document, Documents, DocumentStream
from wmtp.data.packing import PackedDataset, pack
from wmtp.errors import UserError

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class Part:
    """Consecutive documents of a dataset: its part p."""

    number: int
    documents: tuple[Document, ...]


class PartReader:
    """One reading of a dataset in parts, which makes only the documents of the parts to keep.

    Args:
        size: documents of a part; the last part may have fewer.
        keep: tells by its number whether a part is made.

    Attributes:
        num_documents: documents of the dataset read so far.
    """

    def __init__(self, dataset: Documents | DocumentStream, size: int, keep: Callable[[int], bool]) -> None:
        self._dataset, self._size, self._keep = dataset, size, keep
        self.num_documents = 0

    def __iter__(self) -> Iterator[Part]:
        documents: list[Document] = []
        for index, document in self._dataset.read(lambda i: self._keep(i // self._size)):
            if documents and index % self._size == 0:
                yield Part(index // self._size - 1, tuple(documents))
                documents = []
            self.num_documents = index + 1
            if document is not None:
                documents.append(document)
        if documents:
            yield Part((self.num_documents - 1) // self._size, tuple(documents))


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yields the items in order, while a thread makes the next one."""
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(next, iterator, _END)
        while (item := ahead.result()) is not _END:
            ahead = pool.submit(next, iterator, _END)
            yield item  # type: ignore[misc]  # no _END


def rows_to_score(documents: Sequence[Document], column: str, seq_len: int, pad_id: int) -> PackedDataset | None:
    """Packs the documents that need a forward pass; returns None where none does.

    Args:
        column: ``values`` needs all documents, any other those with a target within seq_len tokens.
    """
    every = column == "values"
    if not every and not any((document.labels[1:seq_len] != IGNORE).any() for document in documents):
        return None
    return pack(Documents("part", documents), seq_len, pad_id=pad_id, require_targets=not every)


def column_of(documents: Sequence[Document], rows: PackedDataset | None, scores: np.ndarray) -> list[np.ndarray]:
    """Takes the rows' scores back to their documents: for each a [T] float32 column, 0 where nothing was scored.

    Args:
        rows: the documents packed by :func:`rows_to_score`.
        scores: [R, S] float32, a score for each position of the rows.
    """
    columns = [np.zeros(len(document), np.float32) for document in documents]
    if rows is None:
        return columns
    for row in range(len(rows)):
        start = 0
        for i in rows.row_members(row):
            length = min(len(documents[i]), rows.seq_len)
            columns[i][:length] = scores[row, start : start + length]
            start += length
    return columns


def require_finite(documents: Sequence[Document], columns: Sequence[np.ndarray], what: str) -> None:
    """Refuses scores that are not finite; the ValueError names the first document and token with one."""
    for document, column in zip(documents, columns, strict=True):
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            raise UserError(
                f"document {document.id}: {what} of token {bad[0]} is {column[bad[0]]}; look at the document and the "
                "checkpoint, or compute with dtype=fp32"
            )
