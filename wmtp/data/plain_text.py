"""Builders for plain texts, of which every token is a target: continued pre-training."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import IGNORE, WEIGHT, Columns, Document, Tally, printable
from wmtp.data.reading import SET_THE_KEY, Reading, in_memory, row_name, streamed, with_signals
from wmtp.data.rows import take
from wmtp.data.weights import GivenWeights, Learnt
from wmtp.errors import UserError


@in_memory
def text(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    text_column: str = "text",
    id_column: str | None = "id",
    piece_len: int | None = None,
    joined: bool = False,
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
) -> Reading:
    """One document a row: its text and EOS; every token is a target but BOS, and the first, which nothing predicts.

    Packing alone cuts a text at ``seq_len`` and leaves the rest out: ``piece_len`` makes documents of all of it.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.
        text_column: the text, taken as it is.
        id_column: optional field that names the document in messages; its place in source otherwise, or where null.
        piece_len: a longer document becomes several of so many tokens, the last of what is left; usually
            ``${seq_len}``. Null: documents stay whole.
        joined: join the documents in their order, with EOS (and BOS) between them, and cut the whole into pieces of
            piece_len tokens, so that every row is full. Attention, positions and heads then cross the edges of the
            texts, as in usual pre-training and Rho-1's; otherwise they stop there, rows are packed.
        weight_column, weights_column: as in :func:`prompt_completion`; spans are of the text's characters.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, joined without piece_len, or a wrong row; the message
            names file and line.
    """
    weights = GivenWeights(weight_column, weights_column)
    if piece_len is not None and piece_len < 2:
        raise UserError(f"piece_len must be >= 2, got {piece_len}: the first token of a piece predicts the second")
    if joined and piece_len is None:
        raise UserError("joined needs piece_len, the tokens of a row: set it to ${seq_len}")
    read = (text_column, id_column, *weights.columns)
    columns = partial(ReadColumns, optional=weights.columns, read=read, way_out=SET_THE_KEY)

    def document(where: str, row: dict) -> Document:
        text, start = take(row, where, text_column, str), tokenizer.encode_prompt("")
        tokens = np.array([*start, *tokenizer.encode(text), tokenizer.eos_id], np.int32)
        labels = tokens.copy()
        labels[: len(start)] = IGNORE
        whole = with_signals(Document(tokens, labels, row_name(row.get(id_column), where)), row, where, read)
        return weights.add(whole, row, where, lambda: Learnt(text, tokenizer.offsets(text), len(start), "text"))

    cut = partial(pieces, piece_len=piece_len, joined=joined)
    return Reading(source, split, subset, max_rows, columns, document, weights, cut=cut)


text_stream = streamed(text, piece_len=None, joined=False)


def pieces(items: Sequence[Document], piece_len: int | None, *, joined: bool) -> Sequence[Document]:
    """Cuts documents, each by itself or joined in their order, into pieces of ``piece_len`` tokens.

    The last piece, of each document or of the whole, has what is left. A piece is named by the document that it begins
    in, and from which of its tokens on.

    Returns:
        documents over the same arrays as the given ones, where these are in files.
    """
    if piece_len is None or not items:
        return items
    whole = items if isinstance(items, Columns) else _columns(items)
    lengths = whole.lengths
    starts = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    if joined:
        cuts = np.arange(0, total, piece_len)
    else:
        of_each = -(-lengths // piece_len)
        first = np.repeat(np.cumsum(of_each) - of_each, of_each)
        cuts = np.repeat(starts, of_each) + (np.arange(of_each.sum()) - first) * piece_len
    document = np.searchsorted(starts, cuts, side="right") - 1
    names = [
        f"{whole.name(i)}, from token {cut - starts[i]}" if cut > starts[i] else whole.name(i)
        for i, cut in zip(document.tolist(), cuts.tolist(), strict=True)
    ]
    return whole.cut_at(np.diff(np.append(cuts, total)), pa.array(names, pa.string()))


def _columns(items: Sequence[Document]) -> Columns:
    tally = Tally(items)
    common = [name for name, count in tally.counts.items() if count == tally.total or name == WEIGHT]
    flat = {name: np.concatenate([document.signal(name) for document in items]) for name in common}
    tokens, labels = (np.concatenate([getattr(d, part) for d in items]) for part in ("tokens", "labels"))
    ids = pa.array([printable(document.id) for document in items], pa.string())
    return Columns(ids, np.array([len(d) for d in items]), tokens, labels, flat)
