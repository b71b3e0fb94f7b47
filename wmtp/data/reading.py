"""What builders of rows share: how a row becomes a document, and the two forms of a dataset that they build.

A builder returns a :class:`Reading`; :func:`in_memory` makes it one of `Documents`, for training, and :func:`streamed`
one of a `DocumentStream` of any size, for scoring.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import islice
from typing import Any

import numpy as np

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import Document, Documents, DocumentStream, collect, comes_from, document_from_text
from wmtp.data.rows import count_rows, is_number, read_rows, rows_state
from wmtp.data.weights import GivenWeights, Learnt
from wmtp.errors import UserError

Rows = Iterable[tuple[str, dict]]  # of read_rows
SET_THE_KEY = "Set the key that names it to this column, or to null if the data has none"  # ReadColumns' way out
_FIRST_ROWS = 1000  # of a stream: one of them must have the column that the config names


@dataclass(frozen=True)
class Reading:
    """Rows, and how each becomes a document.

    Attributes:
        source, split, subset, max_rows: as of :func:`wmtp.data.read_rows`.
        columns: checks the rows' columns while they are read.
        document: makes the document of a row, given its place and the row.
        weights: the keys of the rows' weights.
        named: key to column: those that a config names, so that the data must have them.
        cut: makes other documents of these, such as pieces.
    """

    source: str
    split: str | None
    subset: str | None
    max_rows: int | None
    columns: Callable[[Rows], ReadColumns]
    document: Callable[[str, dict], Document]
    weights: GivenWeights
    named: Mapping[str, str] = field(default_factory=dict)
    cut: Callable[[Sequence[Document]], Sequence[Document]] | None = None

    def documents(self) -> Documents:
        """Reads and makes all of them."""
        rows = self.columns(self._rows())
        items = collect(self._makers(rows), rows)
        self.weights.require(rows, self.source)
        for key, column in self.named.items() if items else ():
            rows.require(key, column, self.source)
        documents = Documents(str(self.source), items, unread=rows.unread, must_read=self.weights.must_read)
        return documents if self.cut is None else replace(documents, items=self.cut(items))

    def stream(self) -> DocumentStream:
        """Returns the stream that reads them anew each time; of :attr:`named` the first 1,000 rows are asked."""
        self._rows()  # refuses at once a source that cannot be opened
        for key, column in self.named.items():
            rows = ReadColumns(self._rows(), {})
            if all(column not in row for _, row in islice(rows, _FIRST_ROWS)) and rows.there:
                rows.require(key, column, f"the first {_FIRST_ROWS:,} rows of {self.source}")
        read = lambda: self._makers(self.columns(self._rows()))
        return DocumentStream(str(self.source), read, self._count, self.weights.must_read)

    def _rows(self) -> Rows:
        """Starts a reading; of a hub dataset rows are fetched while they are read."""
        return read_rows(self.source, self.split, self.subset, max_rows=self.max_rows, streaming=True)

    def _makers(self, rows: Rows) -> Iterator[Callable[[], Document]]:
        return (partial(self.document, where, row) for where, row in rows)

    def _count(self) -> int | None:
        total = count_rows(self.source, self.split, self.subset)
        return total if total is None or self.max_rows is None else min(total, self.max_rows)


def in_memory(read: Callable[..., Reading]) -> Callable[..., Documents]:
    """Makes a builder of a function that says what to read, as a decorator."""

    @comes_from(rows_state)
    @wraps(read)
    def build(tokenizer, **keys: Any) -> Documents:
        return read(tokenizer, **keys).documents()

    return build


def streamed(builder: Callable[..., Documents], **fixed: Any) -> Callable[..., DocumentStream]:
    """Returns the builder of the same documents, but one by one, without the dataset in memory.

    A wrong row raises when it is read. Weights are kept beside the scores.

    Args:
        fixed: keys that it does not have, with their values.
    """
    read = inspect.unwrap(builder)

    @wraps(read)
    def build(tokenizer, **keys: Any) -> DocumentStream:
        return read(tokenizer, **keys, **fixed).stream()

    signature = inspect.signature(read)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in fixed]
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return build


# ----------------------------------------------------------------------------------------------------------------------
# A row's document


def completed(
    tokenizer,
    where: str,
    row: Mapping,
    prompt: str,
    completion: str,
    id: object,
    read: Collection,
    weights: GivenWeights,
) -> Document:
    """Makes a row's document of a prompt and a completion, with the signals of columns not ``read``, and weights."""
    document = document_from_text(tokenizer, prompt, completion, row_name(id, where))
    document = with_signals(document, row, where, read)
    learnt = lambda: Learnt(completion, tokenizer.offsets(completion), len(document.prompt), "completion")
    return weights.add(document, row, where, learnt)


def row_name(id: object, where: str) -> str:
    """Returns the name of a row's document: its id, or its place where it has none."""
    return where if id is None or id == "" else str(id)


def with_signals(
    document: Document, row: Mapping, where: str, read: Collection, known: Collection[str] = ("reference_ce",)
) -> Document:
    """Adds to a document those columns of its row that hold a finite number for each of its tokens.

    Columns of another content are passed over; a ``known`` one is refused.

    Args:
        read: columns that are none, as the builder reads them otherwise.
    """
    signals = {}
    for name, column in row.items():
        if name in read:
            continue
        if name in known and column is not None:
            _require_numbers(column, len(document), f"{where}: {name}")
        if isinstance(column, list) and len(column) == len(document) and all(map(is_number, column)):
            signals[str(name)] = np.array(column, np.float32)
    return replace(document, signals=signals) if signals else document


def _require_numbers(column: object, length: int, what: str) -> None:
    if not isinstance(column, list):
        raise UserError(f"{what} must be a list of numbers, got {type(column).__name__}")
    if len(column) != length:
        raise UserError(
            f"{what} has {len(column)} values, the document has {length} tokens "
            "(prompt, completion and EOS); score it with this tokenizer"
        )
    for position, value in enumerate(column):
        if not is_number(value):
            raise UserError(f"{what}[{position}] must be a finite number, got {value!r:.40}")
