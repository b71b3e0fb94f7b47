"""Your own data: prompts and completions as text, or documents already made of token ids."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np

from wmtp.data.documents import IGNORE, Document, Documents, document_from_text
from wmtp.data.rows import read_rows, take


def prompt_completion(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    reference_ce_column: str = "reference_ce",
    id_column: str = "id",
) -> Documents:
    """One document a row: prompt + completion + EOS, where completion and EOS are the targets.

    Args:
        source: a JSON, JSONL (.gz too) or parquet file, a folder with `{split}.jsonl`, or a hub name.
        split, subset: of a folder or a hub dataset.
        prompt_column, completion_column: text fields, taken as they are: nothing is stripped or put between them.
        reference_ce_column: optional field: one CE for each token of the document (prompt, completion and EOS, and BOS
            in front where the tokenizer adds one).
        id_column: optional field that names the document in messages; its place in source otherwise.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    documents = []
    for where, row in read_rows(source, split, subset):
        prompt, completion = (take(row, where, column, str) for column in (prompt_column, completion_column))
        document = document_from_text(tokenizer, prompt, completion, str(row.get(id_column) or where))
        documents.append(_with_reference_ce(document, row.get(reference_ce_column), where))
    return Documents(str(source), tuple(documents))


def tokenized(tokenizer, *, source: str, split: str | None = None, subset: str | None = None) -> Documents:
    """Documents that are token ids already, such as those of :func:`save_tokenized`; nothing is added to them.

    A row is {"tokens": [...], "labels": [...], "reference_ce": [...], "id": ..., "vocab_hash": ...}. Labels are
    unshifted (-100, or the token at the same place); without them every token is a target. The last three are optional;
    a vocab_hash must be this tokenizer's.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, or a wrong row; the message names file and line.
    """
    documents, vocab_hash = [], tokenizer.vocab_hash()
    for where, row in read_rows(source, split, subset):
        if row.get("vocab_hash") not in (None, vocab_hash):
            raise ValueError(
                f"{where}: tokenized with another vocabulary (vocab_hash {row['vocab_hash']!r:.14}..., that of "
                f"{tokenizer.name} is {vocab_hash:.12}...); use the tokenizer it was made with"
            )
        tokens = take(row, where, "tokens", list)
        if not tokens:
            raise ValueError(f"{where}: field 'tokens' is empty")
        for position, token in enumerate(tokens):
            if type(token) is not int or not 0 <= token < tokenizer.vocab_size:
                raise ValueError(
                    f"{where}: tokens[{position}] must be a whole number in [0, {tokenizer.vocab_size}), "
                    f"got {token!r:.40}"
                )
        labels = tokens if row.get("labels") is None else take(row, where, "labels", list)
        if len(labels) != len(tokens):
            raise ValueError(f"{where}: labels has {len(labels)} values, tokens has {len(tokens)}")
        for position, (label, token) in enumerate(zip(labels, tokens, strict=True)):
            if label not in (IGNORE, token):
                raise ValueError(
                    f"{where}: labels[{position}] must be {IGNORE} or tokens[{position}] = {token}, got {label!r:.40} "
                    "(labels are unshifted)"
                )
        document = Document(np.array(tokens, np.int32), np.array(labels, np.int32), str(row.get("id") or where))
        documents.append(_with_reference_ce(document, row.get("reference_ce"), where))
    return Documents(str(source), tuple(documents))


def save_tokenized(documents: Documents, path: str | Path, tokenizer) -> None:
    """Write documents for :func:`tokenized`, as JSONL (or .jsonl.gz); the file appears only when whole."""
    path, torn = Path(path), Path(f"{path}.part")
    vocab_hash = tokenizer.vocab_hash()
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(torn, "wt", encoding="utf-8") if path.suffix == ".gz" else torn.open("w", encoding="utf-8") as file:
        for document in documents:
            row = {"id": document.id, "vocab_hash": vocab_hash, "tokens": document.tokens.tolist()}
            row["labels"] = document.labels.tolist()
            if document.reference_ce is not None:
                row["reference_ce"] = document.reference_ce.tolist()
            file.write(json.dumps(row) + "\n")
    os.replace(torn, path)


def _with_reference_ce(document: Document, values: object, where: str) -> Document:
    if values is None:
        return document
    if not isinstance(values, list):
        raise ValueError(f"{where}: reference_ce must be a list of numbers, got {type(values).__name__}")
    if len(values) != len(document):
        raise ValueError(
            f"{where}: reference_ce has {len(values)} values, the document has {len(document)} tokens "
            "(prompt, completion and EOS); score it with this tokenizer"
        )
    for position, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: reference_ce[{position}] must be a finite number, got {value!r:.40}")
    return Document(document.tokens, document.labels, document.id, np.array(values, np.float32))
