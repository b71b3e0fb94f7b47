"""Builders for your own data: prompts and completions as text, or documents of token ids.

A column of any name that holds a finite number for each token of its row's document is a signal, for a weighting that
names it in ``needs``.
"""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import IGNORE, SCORES, Document, Documents
from wmtp.data.reading import Reading, completed, in_memory, row_name, streamed, with_signals
from wmtp.data.rows import take
from wmtp.data.weights import GivenWeights
from wmtp.errors import UserError
from wmtp.files import publish, unfinished

_TOKEN_ROW = {"tokens": list[int], "labels": list[int], "vocab_hash": str, **dict.fromkeys(SCORES, list[float])}


@in_memory
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
) -> Reading:
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
    missed = {} if reference_ce_column is None else {reference_ce_column: list[float]}
    way_out = "Set reference_ce_column, weight_column or weights_column to it, or to null if the data has none"
    read = (prompt_column, completion_column, id_column, *weights.columns)
    columns = partial(ReadColumns, optional=missed | weights.columns, read=read, way_out=way_out)

    def document(where: str, row: dict) -> Document:
        texts = take(row, where, prompt_column, str), take(row, where, completion_column, str)
        row = {**row, "reference_ce": row.get(reference_ce_column)}
        others = {*read, reference_ce_column} - {"reference_ce"}
        return completed(tokenizer, where, row, *texts, row.get(id_column), others, weights)

    defaults = {"reference_ce_column": "reference_ce", "id_column": "id"}
    set_to = {"reference_ce_column": reference_ce_column, "id_column": id_column}
    named = {key: column for key, column in set_to.items() if column not in (None, defaults[key])}
    return Reading(source, split, subset, max_rows, columns, document, weights, named)


prompt_completion_stream = streamed(prompt_completion, reference_ce_column=None)


@in_memory
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
) -> Reading:
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
    columns = partial(ReadColumns, optional=_TOKEN_ROW | weights.columns, read=("id",))
    document = partial(_token_document, tokenizer, tokenizer.vocab_hash(), weights)
    return Reading(source, split, subset, max_rows, columns, document, weights)


tokenized_stream = streamed(tokenized)


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


def _token_document(tokenizer, vocab_hash: str, weights: GivenWeights, where: str, row: dict) -> Document:
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
    return weights.add(with_signals(document, row, where, read, SCORES), row, where)
