"""Builders for your own data: prompts and completions as text, or documents of token ids.

Each has two forms: `Documents` in memory, for training, and a `DocumentStream` of any size, for scoring.

A column of any name that holds a finite number for each token of its row's document is a signal, for a weighting that
names it in ``needs``.
"""

import gzip
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import (
    IGNORE,
    SCORES,
    Document,
    Documents,
    DocumentStream,
    collect,
    comes_from,
    document_from_text,
)
from wmtp.data.rows import count_rows, is_number, read_rows, rows_state, take
from wmtp.data.weights import GivenWeights, Learnt
from wmtp.errors import UserError
from wmtp.files import publish, unfinished

Rows = Iterable[tuple[str, dict]]  # of read_rows
_TOKEN_ROW = {"tokens": list[int], "labels": list[int], "vocab_hash": str, **dict.fromkeys(SCORES, list[float])}
_FIRST_ROWS = 1000  # of a stream: one of them must have the column that the config names


@comes_from(rows_state)
def prompt_completion(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    reference_ce_column: str | None = "reference_ce",
    id_column: str | None = "id",
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> Documents:
    """One document a row: prompt + completion + EOS, where completion and EOS are the targets.

    Args:
        source: a JSON, JSONL (.gz too) or parquet file; a folder with `{split}.jsonl`, or with the split's shards as a
            copy of a hub dataset has them; or a hub name, which may end with `@revision`.
        split, subset: of a folder or a hub dataset.
        max_rows: read the first rows alone; of a hub dataset no more is fetched. Null for all.
        prompt_column, completion_column: text fields, taken as they are: nothing is stripped or put between them.
        reference_ce_column: optional field: one CE for each token of the document (prompt, completion and EOS, and BOS
            in front where the tokenizer adds one). Null for data that has none.
        id_column: optional field that names the document in messages; its place in source otherwise, or where null.
        weight_column: optional field: what the row's tokens count (:func:`wmtp.weighting.given`), or a list as below.
        weights_column: optional field: what each of the document's tokens counts; or spans ``{start, end, weight}`` of
            the completion's characters.
        prompt_weight: what a token of the prompt counts, in [0, 1]; above 0 prompts are targets. Null: they are none.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    weights = GivenWeights(weight_column, weights_column, prompt_weight)
    columns = (prompt_column, completion_column, reference_ce_column, id_column)
    way_out = "Set reference_ce_column, weight_column or weights_column to it, or to null if the data has none"
    missed = {reference_ce_column: list[float]} if reference_ce_column is not None else {}
    read = [column for column in columns if column is not None]
    given = Source(source, split, subset, max_rows)
    rows = ReadColumns(given.rows(), missed | weights.columns, read, way_out=way_out)
    items = collect(_of_text(rows, tokenizer, columns, weights), rows)
    weights.require(rows, source)
    named = {"reference_ce_column": (reference_ce_column, "reference_ce"), "id_column": (id_column, "id")}
    for key, (column, default) in named.items():
        if items and column not in (None, default):  # the data of a user who sets the key have such a column
            rows.require(key, column, source)
    return Documents(str(source), items, unread=rows.unread, must_read=weights.must_read)


def prompt_completion_stream(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    id_column: str | None = "id",
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> DocumentStream:
    """The documents of :func:`prompt_completion` without the dataset in memory; a hub dataset is not downloaded whole.

    Args:
        source, split, subset, max_rows, prompt_column, completion_column, id_column: as in :func:`prompt_completion`.
        weight_column, weights_column, prompt_weight: as in :func:`prompt_completion`; they are kept beside the scores.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or an id_column of another name that none of the first 1,000
            rows has; a wrong row raises when it is read.
    """
    if id_column not in (None, "id"):
        rows = ReadColumns(read_rows(source, split, subset, streaming=True), {})
        if all(id_column not in row for _, row in islice(rows, _FIRST_ROWS)) and rows.there:
            rows.require("id_column", id_column, f"the first {_FIRST_ROWS:,} rows of {source}")
    columns = (prompt_column, completion_column, None, id_column)
    weights = GivenWeights(weight_column, weights_column, prompt_weight)
    makers = partial(_of_text, tokenizer=tokenizer, columns=columns, weights=weights)
    return Source(source, split, subset, max_rows).stream(makers, must_read=weights.must_read)


@comes_from(rows_state)
def tokenized(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> Documents:
    """Documents that are token ids already, such as those of :func:`save_tokenized`; nothing is added to them.

    A row is {"tokens": [...], "labels": [...], "reference_ce": [...], "values": [...], "id": ..., "vocab_hash": ...}.
    Labels are unshifted (-100, or the token at the same place); without them every token is a target. The last four
    are optional, and so are other columns of a number for each token; a vocab_hash must be this tokenizer's.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.
        weight_column, weights_column, prompt_weight: as in :func:`prompt_completion`, without spans.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    weights = GivenWeights(weight_column, weights_column, prompt_weight)
    rows = _token_columns(Source(source, split, subset, max_rows).rows(), weights)
    items = collect(_of_tokens(rows, tokenizer, weights), rows)
    weights.require(rows, source)
    return Documents(str(source), items, unread=rows.unread, must_read=weights.must_read)


def tokenized_stream(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> DocumentStream:
    """The documents of :func:`tokenized` without the dataset in memory.

    Args:
        source, split, subset, max_rows, weight_column, weights_column, prompt_weight: as in :func:`tokenized`.

    Raises:
        FileNotFoundError, ValueError: source unreadable; a wrong row raises when it is read.
    """
    weights = GivenWeights(weight_column, weights_column, prompt_weight)

    def makers(rows: Rows) -> Iterator[Callable[[], Document]]:
        return _of_tokens(_token_columns(rows, weights), tokenizer, weights)

    return Source(source, split, subset, max_rows).stream(makers, must_read=weights.must_read)


def save_tokenized(documents: Documents, path: str | Path, tokenizer) -> None:
    """Writes documents for :func:`tokenized`, as JSONL (or .jsonl.gz); the file appears only when whole.

    Raises:
        ValueError: documents with a prompt_weight, which the file would not tell from other targets.
    """
    if documents.must_read:
        raise UserError(
            f"{documents.name}: a file of tokens does not say which targets are a prompt's; save the documents without "
            "prompt_weight, and give it to wmtp.data.tokenized"
        )
    path, vocab_hash = Path(path), tokenizer.vocab_hash()
    torn = unfinished(path)
    with gzip.open(torn, "wt", encoding="utf-8") if path.suffix == ".gz" else torn.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"id": document.id, "vocab_hash": vocab_hash, "tokens": document.tokens.tolist()}
            row["labels"] = document.labels.tolist()
            row |= {name: document.signal(name).tolist() for name in documents.signals}
            file.write(json.dumps(row) + "\n")
    publish(torn, path)


@dataclass(frozen=True)
class Source:
    """The rows that a builder's keys of these names say, as of :func:`wmtp.data.read_rows`."""

    source: str
    split: str | None
    subset: str | None
    max_rows: int | None

    def rows(self) -> Rows:
        """Starts a reading; of a hub dataset rows are fetched while they are read."""
        return read_rows(self.source, self.split, self.subset, max_rows=self.max_rows, streaming=True)

    def stream(self, makers: Callable[[Rows], Iterator], *, must_read: tuple[str, ...] = ()) -> DocumentStream:
        """Returns the stream of the documents that ``makers`` makes of the rows, read anew in each reading."""

        def count() -> int | None:
            total = count_rows(self.source, self.split, self.subset)
            return total if total is None or self.max_rows is None else min(total, self.max_rows)

        self.rows()  # refuses at once a source that cannot be opened
        return DocumentStream(str(self.source), lambda: makers(self.rows()), count, must_read)


def _of_text(
    rows: Rows, tokenizer, columns: tuple[str, str, str | None, str | None], weights: GivenWeights
) -> Iterator[Callable[[], Document]]:
    for where, row in rows:
        yield partial(_text_document, tokenizer, where, row, *columns, weights)


def _text_document(
    tokenizer,
    where: str,
    row: dict,
    prompt: str,
    completion: str,
    reference_ce: str | None,
    id: str | None,
    weights: GivenWeights,
) -> Document:
    read = (prompt, completion, reference_ce, "reference_ce", id, *weights.columns)
    columns = {name: column for name, column in row.items() if name not in read}
    columns["reference_ce"] = row.get(reference_ce)
    texts = take(row, where, prompt, str), take(row, where, completion, str)
    return completed(tokenizer, where, row, *texts, id=row.get(id), columns=columns, weights=weights)


def completed(
    tokenizer,
    where: str,
    row: dict,
    prompt: str,
    completion: str,
    *,
    id: object,
    columns: Mapping[str, object],
    weights: GivenWeights,
) -> Document:
    """Makes a row's document of a prompt and a completion, with signals from other columns and the row's weights."""
    document = document_from_text(tokenizer, prompt, completion, row_name(id, where))
    document = with_signals(document, columns, where, ("reference_ce",))
    learnt = lambda: Learnt(completion, tokenizer.offsets(completion), len(document.prompt), "completion")
    return weights.add(document, row, where, learnt)


def row_name(id: object, where: str) -> str:
    """Returns the name of a row's document: its id, or its place where it has none."""
    return where if id is None or id == "" else str(id)


def _token_columns(rows: Rows, weights: GivenWeights) -> ReadColumns:
    return ReadColumns(rows, _TOKEN_ROW | weights.columns, ("id",))


def _of_tokens(rows: Rows, tokenizer, weights: GivenWeights) -> Iterator[Callable[[], Document]]:
    vocab_hash = tokenizer.vocab_hash()
    for where, row in rows:
        yield partial(_token_document, tokenizer, vocab_hash, where, row, weights)


def _token_document(tokenizer, vocab_hash: str, where: str, row: dict, weights: GivenWeights) -> Document:
    if row.get("vocab_hash") not in (None, vocab_hash):
        raise UserError(
            f"{where}: tokenized with another vocabulary (vocab_hash {row['vocab_hash']!r:.14}..., that of "
            f"{tokenizer.name} is {vocab_hash:.12}...); use the tokenizer it was made with"
        )
    tokens = take(row, where, "tokens", list)
    if not tokens:
        raise UserError(f"{where}: field 'tokens' is empty")
    for position, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
            raise UserError(
                f"{where}: tokens[{position}] must be a whole number in [0, {tokenizer.vocab_size}), got {token!r:.40}"
            )
    labels = tokens if row.get("labels") is None else take(row, where, "labels", list)
    if len(labels) != len(tokens):
        raise UserError(f"{where}: labels has {len(labels)} values, tokens has {len(tokens)}")
    for position, (label, token) in enumerate(zip(labels, tokens, strict=True)):
        if label not in (IGNORE, token):
            raise UserError(
                f"{where}: labels[{position}] must be {IGNORE} or tokens[{position}] = {token}, got {label!r:.40} "
                "(labels are unshifted)"
            )
    document = Document(np.array(tokens, np.int32), np.array(labels, np.int32), row_name(row.get("id"), where))
    read = ("tokens", "labels", "id", "vocab_hash", *weights.columns)
    columns = {name: column for name, column in row.items() if name not in read}
    return weights.add(with_signals(document, columns, where, SCORES), row, where)


def with_signals(document: Document, columns: Mapping[str, object], where: str, known: Collection[str]) -> Document:
    """Adds to a document those columns of its row that hold a finite number for each of its tokens.

    Columns of another content are passed over; a ``known`` one is refused.
    """
    for name in known:
        if columns.get(name) is not None:
            _require_numbers(columns[name], len(document), f"{where}: {name}")
    signals = {
        str(name): np.array(column, np.float32)
        for name, column in columns.items()
        if isinstance(column, list) and len(column) == len(document) and all(map(is_number, column))
    }
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
