"""Builders for your own data: prompts and completions as text, or documents of token ids.

Each has two forms: `Documents` in memory, for training, and a `DocumentStream` of any size, for scoring.

A column of any name that holds a finite number for each token of its row's document is a signal, for a weighting that
names it in ``needs``.
"""

import gzip
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
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
) -> Documents:
    """One document a row: prompt + completion + EOS, where completion and EOS are the targets.

    Args:
        source: a JSON, JSONL (.gz too) or parquet file, a folder with `{split}.jsonl`, or a hub name, which may end
            with `@revision`.
        split, subset: of a folder or a hub dataset.
        max_rows: read the first rows alone; of a hub dataset no more is fetched. Null for all.
        prompt_column, completion_column: text fields, taken as they are: nothing is stripped or put between them.
        reference_ce_column: optional field: one CE for each token of the document (prompt, completion and EOS, and BOS
            in front where the tokenizer adds one). Null for data that has none.
        id_column: optional field that names the document in messages; its place in source otherwise, or where null.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    columns = (prompt_column, completion_column, reference_ce_column, id_column)
    way_out = f"Set reference_ce_column to it, or to null if the data has no {reference_ce_column}"
    missed = {reference_ce_column: list[float]} if reference_ce_column is not None else {}
    read = [column for column in columns if column is not None]
    found = read_rows(source, split, subset, max_rows=max_rows, streaming=True)
    rows = ReadColumns(found, missed, read, way_out=way_out)
    items = collect(_of_text(rows, tokenizer, columns), rows)
    named = {"reference_ce_column": (reference_ce_column, "reference_ce"), "id_column": (id_column, "id")}
    for key, (column, default) in named.items():
        if items and column not in (None, default):  # the data of a user who sets the key have such a column
            rows.require(key, column, source)
    return Documents(str(source), items, unread=rows.unread)


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
) -> DocumentStream:
    """The documents of :func:`prompt_completion` without the dataset in memory; a hub dataset is not downloaded whole.

    Args:
        source, split, subset, max_rows, prompt_column, completion_column, id_column: as in :func:`prompt_completion`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or an id_column of another name that none of the first 1,000
            rows has; a wrong row raises when it is read.
    """
    if id_column not in (None, "id"):
        rows = ReadColumns(read_rows(source, split, subset, streaming=True), {})
        if all(id_column not in row for _, row in islice(rows, _FIRST_ROWS)) and rows.there:
            rows.require("id_column", id_column, f"the first {_FIRST_ROWS:,} rows of {source}")
    columns = (prompt_column, completion_column, None, id_column)
    return _stream(partial(_of_text, tokenizer=tokenizer, columns=columns), source, split, subset, max_rows)


@comes_from(rows_state)
def tokenized(
    tokenizer, *, source: str, split: str | None = None, subset: str | None = None, max_rows: int | None = None
) -> Documents:
    """Documents that are token ids already, such as those of :func:`save_tokenized`; nothing is added to them.

    A row is {"tokens": [...], "labels": [...], "reference_ce": [...], "values": [...], "id": ..., "vocab_hash": ...}.
    Labels are unshifted (-100, or the token at the same place); without them every token is a target. The last four
    are optional, and so are other columns of a number for each token; a vocab_hash must be this tokenizer's.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    rows = _token_columns(read_rows(source, split, subset, max_rows=max_rows, streaming=True))
    items = collect(_of_tokens(rows, tokenizer), rows)
    return Documents(str(source), items, unread=rows.unread)


def tokenized_stream(
    tokenizer, *, source: str, split: str | None = None, subset: str | None = None, max_rows: int | None = None
) -> DocumentStream:
    """The documents of :func:`tokenized` without the dataset in memory.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.

    Raises:
        FileNotFoundError, ValueError: source unreadable; a wrong row raises when it is read.
    """
    return _stream(lambda rows: _of_tokens(_token_columns(rows), tokenizer), source, split, subset, max_rows)


def save_tokenized(documents: Documents, path: str | Path, tokenizer) -> None:
    """Writes documents for :func:`tokenized`, as JSONL (or .jsonl.gz); the file appears only when whole."""
    path, vocab_hash = Path(path), tokenizer.vocab_hash()
    torn = unfinished(path)
    with gzip.open(torn, "wt", encoding="utf-8") if path.suffix == ".gz" else torn.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"id": document.id, "vocab_hash": vocab_hash, "tokens": document.tokens.tolist()}
            row["labels"] = document.labels.tolist()
            row |= {name: document.signals[name].tolist() for name in documents.signals}
            file.write(json.dumps(row) + "\n")
    publish(torn, path)


def _stream(
    makers: Callable[[Rows], Iterator], source: str, split: str | None, subset: str | None, max_rows: int | None
) -> DocumentStream:
    def read() -> Rows:
        return read_rows(source, split, subset, max_rows=max_rows, streaming=True)

    def count() -> int | None:
        total = count_rows(source, split, subset)
        return total if total is None or max_rows is None else min(total, max_rows)

    read()  # refuses at once a source that cannot be opened
    return DocumentStream(str(source), lambda: makers(read()), count)


def _of_text(
    rows: Rows, tokenizer, columns: tuple[str, str, str | None, str | None]
) -> Iterator[Callable[[], Document]]:
    for where, row in rows:
        yield partial(_text_document, tokenizer, where, row, *columns)


def _text_document(
    tokenizer, where: str, row: dict, prompt: str, completion: str, reference_ce: str | None, id: str | None
) -> Document:
    texts = take(row, where, prompt, str), take(row, where, completion, str)
    document = document_from_text(tokenizer, *texts, _name(row.get(id), where))
    read = (prompt, completion, reference_ce, "reference_ce", id)
    columns = {name: column for name, column in row.items() if name not in read}
    return _with_signals(document, columns | {"reference_ce": row.get(reference_ce)}, where, ("reference_ce",))


def _name(id: object, where: str) -> str:
    return where if id is None or id == "" else str(id)


def _token_columns(rows: Rows) -> ReadColumns:
    return ReadColumns(rows, _TOKEN_ROW, ("id",))


def _of_tokens(rows: Rows, tokenizer) -> Iterator[Callable[[], Document]]:
    vocab_hash = tokenizer.vocab_hash()
    for where, row in rows:
        yield partial(_token_document, tokenizer, vocab_hash, where, row)


def _token_document(tokenizer, vocab_hash: str, where: str, row: dict) -> Document:
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
    document = Document(np.array(tokens, np.int32), np.array(labels, np.int32), _name(row.get("id"), where))
    columns = {name: column for name, column in row.items() if name not in ("tokens", "labels", "id", "vocab_hash")}
    return _with_signals(document, columns, where, SCORES)


def _with_signals(document: Document, columns: Mapping[str, object], where: str, known: Collection[str]) -> Document:
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
