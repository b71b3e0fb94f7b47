"""Builders for rows of instructions: a prompt made of their columns by a template, and the answer as target."""

import difflib
import string
from collections.abc import Mapping
from functools import partial

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import Document
from wmtp.data.reading import SET_THE_KEY, Reading, completed, in_memory, streamed
from wmtp.data.rows import fields_of, take
from wmtp.data.weights import GivenWeights
from wmtp.errors import UserError

# The prompts of Stanford's Alpaca (2023), which models tuned on such data expect word for word.
_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
_ALPACA = f"Below is an instruction that describes a task. {_REQUEST}### Response:\n"
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{_REQUEST}### Input:\n{{input}}\n\n### Response:\n"
)


@in_memory
def instruct(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    template: str | None = None,
    completion_column: str = "output",
    id_column: str | None = "id",
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> Reading:
    """One document a row: a prompt that a template makes of its columns; the answer and EOS are the targets.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.
        template: the prompt, with ``{column}`` for the text of a column and ``{{`` for a brace, such as
            ``"Q: {question}\\nA: "``. Null: Alpaca's, of ``instruction`` and, where it is not empty, ``input``.
        completion_column: the answer, taken as it is.
        id_column: optional field that names the document in messages; its place in source otherwise, or where null.
        weight_column, weights_column, prompt_weight: as in :func:`prompt_completion`; spans are of the answer's
            characters.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, a template that is malformed or names a column which
            a row lacks, or a wrong row; the message names file and line.
    """
    weights = GivenWeights(weight_column, weights_column, prompt_weight)
    if template is not None and not columns_of(template):
        raise UserError(f"template must name a column as {{column}}, got {template!r:.60}")
    named = ["instruction"] if template is None else columns_of(template)
    optional = weights.columns | ({"input": str} if template is None else {})
    read = (*named, completion_column, id_column)
    columns = partial(ReadColumns, optional=optional, read=read, way_out=SET_THE_KEY)

    def document(where: str, row: dict) -> Document:
        filled_in = template or (_ALPACA if row.get("input") in (None, "") else _ALPACA_WITH_INPUT)
        completion, prompt = take(row, where, completion_column, str), filled(filled_in, row, where)
        others = (*columns_of(filled_in), completion_column, id_column, *weights.columns)
        return completed(tokenizer, where, row, prompt, completion, row.get(id_column), others, weights)

    return Reading(source, split, subset, max_rows, columns, document, weights)


instruct_stream = streamed(instruct)


def columns_of(template: str) -> list[str]:
    """Returns the columns that a template names; the UserError of a malformed one says what is wrong with it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r:.60} is malformed: {error}; braces are {{{{ and }}}}") from None
    names = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    for name, form, conversion in names:
        if form or conversion or not name:
            got = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise UserError(
                f"template {template!r:.60}: a column is written {{column}}, got {{{got}}}; braces are {{{{ and }}}}"
            )
    return list(dict.fromkeys(name for name, _, _ in names))


def filled(template: str, row: Mapping, where: str) -> str:
    """Returns a template with the texts of a row's columns."""
    parts = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        if name not in row:
            near = difflib.get_close_matches(name, map(str, row), n=1)
            hint = f"did you mean {near[0]!r}? The row" if near else "the row"
            raise UserError(f"{where}: the template names the column {name!r}; {hint} has {fields_of(row)}")
        parts.append(take(dict(row), where, name, str))
    return "".join(parts)
