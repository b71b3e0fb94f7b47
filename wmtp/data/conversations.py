"""Builders for conversations, rendered by the tokenizer's own chat template; the assistant's turns are the targets."""

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import IGNORE, Document
from wmtp.data.reading import SET_THE_KEY, Reading, in_memory, row_name, streamed, with_signals
from wmtp.data.rows import fields_of, take
from wmtp.data.weights import GivenWeights, is_spans, number, over_characters, over_tokens
from wmtp.errors import UserError, one_line

_TURNS = ("all", "last")
# ShareGPT's names of the roles, and OpenAI's.
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}
_ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
_OF_A_TURN = ("weight", "weights")


@in_memory
def chat(
    tokenizer,
    *,
    source: str,
    split: str | None = None,
    subset: str | None = None,
    max_rows: int | None = None,
    messages_column: str | None = None,
    tools_column: str | None = "tools",
    id_column: str | None = "id",
    turns: str = "all",
    template_arguments: Mapping[str, Any] | None = None,
    date: str | None = None,
    weight_column: str | None = "weight",
    weights_column: str | None = "weights",
    prompt_weight: float | None = None,
) -> Reading:
    """One document a conversation, as the tokenizer's chat template renders it; the assistant's turns are the targets.

    A turn includes the token that ends it. Turns are those that the template marks by ``{% generation %}``, else they
    are proven by rendering the conversation up to each (:mod:`wmtp.pretrained.chat_template`); where neither is certain
    the conversation is refused.

    Args:
        source, split, subset, max_rows: as in :func:`prompt_completion`.
        messages_column: a list of ``{role, content, ...}`` (OpenAI) or ``{from, value}`` (ShareGPT). Null:
            ``messages``, or ``conversations`` where a row has no such field. What else a message has, such as
            tool_calls, is the template's. ``weight`` (a number) and ``weights`` (spans ``{start, end, weight}`` of the
            content's characters) are those of an assistant's turn.
        tools_column: optional field: a list of tools, or its JSON as a string, for the template.
        id_column: optional field that names the document in messages; its place in source otherwise, or where null.
        turns: ``all`` of the assistant's, or the ``last`` alone: what comes before it is its prompt.
        template_arguments: further variables of the template, such as ``{enable_thinking: false}``.
        date: what the template's strftime_now gives; needed where a template writes today's date.
        weight_column, weights_column: optional fields of a row: what its tokens count, and what each of them does.
        prompt_weight: what all other tokens count, in [0, 1]; above 0 they are targets. Null: they are none.

    Raises:
        FileNotFoundError, ValueError: source unreadable or empty, no chat template, a conversation that it refuses, or
            a wrong row; the message names file and line.
    """
    weights = GivenWeights(weight_column, weights_column, prompt_weight)
    if turns not in _TURNS:
        raise UserError(f"turns must be one of {', '.join(_TURNS)}, got {turns!r}")
    template = tokenizer.chat
    optional = weights.columns | ({} if tools_column is None else {tools_column: list})
    read = ("messages", "conversations", id_column) if messages_column is None else (messages_column, id_column)
    columns = partial(ReadColumns, optional=optional, read=read, way_out=SET_THE_KEY)
    options = {"arguments": template_arguments, "date": date, "last": turns == "last"}

    def document(where: str, row: dict) -> Document:
        column, messages, tools = conversation_of(row, where, messages_column, tools_column)
        found = template.conversation(spoken(messages), tools, **options, where=where)
        tokens = np.array(found.ids, np.int32)
        labels = np.full_like(tokens, IGNORE)
        for turn in found.turns:
            labels[turn.start : turn.end] = tokens[turn.start : turn.end]
        whole = Document(tokens, labels, row_name(row.get(id_column), where))
        whole = with_signals(whole, row, where, (column, tools_column, id_column, *weights.columns))
        of_row = weights.of_row(row, len(found.ids), where)
        return weights.finish(whole, _weights(of_row, messages, found, f"{where}: {column}"), where)

    return Reading(source, split, subset, max_rows, columns, document, weights)


chat_stream = streamed(chat)


def conversation_of(
    row: dict, where: str, messages_column: str | None = None, tools_column: str | None = "tools"
) -> tuple[str, list[dict[str, Any]], list | None]:
    """Returns the column of a row's conversation, its messages and its tools; columns as in :func:`chat`.

    Messages are in OpenAI's shape: ShareGPT's ``{from, value}`` become ``{role, content}``.

    Raises:
        UserError: no such column, tools that are no list, no turn, one that is no object or has no role or content, an
            unknown ``from``, or a misspelt key.
    """
    column = messages_column or ("conversations" if row.get("messages") is None else "messages")
    if column not in row and messages_column is None:
        raise UserError(f"{where}: a row needs messages, or ShareGPT's conversations; it has {fields_of(row)}")
    turns = take(row, where, column, list)
    if not turns:
        raise UserError(f"{where}: {column} is empty; leave the row out")
    messages = [_message(turn, f"{where}: {column}[{number}]") for number, turn in enumerate(turns)]
    return column, messages, None if tools_column is None else _tools(row, where, tools_column)


def spoken(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns messages as a template sees them: without weights."""
    return [{key: value for key, value in message.items() if key not in _OF_A_TURN} for message in messages]


def _tools(row: dict, where: str, column: str) -> list | None:
    tools = row.get(column)
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError as error:
            raise UserError(f"{where}: field {column!r} is a string, and no JSON: {one_line(error)}") from None
    return None if tools is None else take({column: tools}, where, column, list)


def _message(turn: object, what: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise UserError(f"{what} must be an object with role and content, got {turn!r:.40}")
    turn = {str(key): value for key, value in turn.items() if value is not None}
    read = ("role", "content", *_OF_A_TURN) if "role" in turn else ("from", "value", *_OF_A_TURN)
    for key in turn.keys() - set(read):
        near = difflib.get_close_matches(key, [name for name in read if name not in turn], n=1, cutoff=0.8)
        if near:
            raise UserError(f"{what}: nobody reads the key {key!r}; did you mean {near[0]!r}? Rename or remove it")
    if "role" in turn:
        role = take(turn, what, "role", str)
        meant = _ROLES.get(role.lower(), role)
        if meant == role and role not in _ROLES:  # a template may know it; one letter from ours it is a slip
            meant = next(iter(difflib.get_close_matches(role.lower(), ("user", "assistant"), n=1, cutoff=0.85)), role)
        if meant != role and meant in ("user", "assistant"):
            raise UserError(f"{what}: role is {role!r}, another name of {meant!r}; rename it")
    elif "from" in turn:
        speaker = take(turn, what, "from", str)
        if speaker not in _ROLES:
            raise UserError(f"{what}: from must be one of {', '.join(_ROLES)}, got {speaker!r:.40}; rename it")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        role = _ROLES[speaker]
        turn = {"role": role, "content": take(turn, what, "value", str), **others}
    else:
        raise UserError(f"{what} must have role and content, or ShareGPT's from and value; it has {fields_of(turn)}")
    if not turn.keys() & {"content", "tool_calls", "function_call"}:
        raise UserError(f"{what} has no content; give it a text ('' for none), or tool_calls; it has {fields_of(turn)}")
    if "content" in turn and not isinstance(turn["content"], list | dict):  # the template's own
        take(turn, what, "content", str)
    weighted = [key for key in _OF_A_TURN if key in turn]
    if weighted and role != "assistant":
        raise UserError(
            f"{what}: {weighted[0]} is of a turn of {role!r}, which is no target; the assistant's turns have weights, "
            "and all else prompt_weight"
        )
    return turn


def _weights(of_row: np.ndarray | None, messages: list[dict], found: Any, what: str) -> np.ndarray | None:
    """Returns the product of the weights of the row, its turns and their spans, for each token; None for none."""
    parts = [] if of_row is None else [of_row]
    weighted = [i for i, message in enumerate(messages) if any(key in message for key in _OF_A_TURN)]
    if weighted and any(turn.message is None for turn in found.turns):
        raise UserError(
            f"{what}[{weighted[0]}] has a weight, and the chat template marks {len(found.turns)} turns, which are not "
            "the assistant's one by one; give a number for each token of the row instead"
        )
    for turn in found.turns if weighted else ():
        parts.append(_of_turn(messages[turn.message], turn, found, f"{what}[{turn.message}]"))
    return np.prod(parts, axis=0) if parts else None


def _of_turn(message: dict, turn: Any, found: Any, what: str) -> np.ndarray:
    """Returns the weights [T] of one turn's message, 1 outside of it."""
    weights = np.ones(len(found.ids))
    inside = slice(turn.start, turn.end)
    if "weights" in message:
        content, spans = message.get("content"), take(message, what, "weights", list)
        if not isinstance(content, str):
            raise UserError(
                f"{what}: weights holds spans of its content, which must be a string; give it a weight instead"
            )
        if spans and not is_spans(spans):
            raise UserError(f"{what}: weights of a turn must be spans {{start, end, weight}}, got {spans[0]!r:.40}")
        offsets = found.offsets[inside]
        of_content = over_characters(spans, content, f"{what}: weights", "content")
        place, kept = _rendered(content, found.text, offsets, what)
        characters = np.ones(len(found.text))
        characters[place : place + len(of_content[kept])] = of_content[kept]
        weights[inside] = over_tokens(characters, offsets)
    if "weight" in message:
        weights[inside] *= number(message["weight"], f"{what}: weight")
    return weights


def _rendered(content: str, text: str, offsets: Sequence[tuple[int, int]], what: str) -> tuple[int, slice]:
    """Returns where a turn's text holds its content, and which of its characters: templates strip white space."""
    start, end = offsets[0][0], offsets[-1][1]
    solid = content.strip()
    before = content.find(solid)
    for kept in (slice(0, len(content)), slice(before, before + len(solid))):
        place = text.find(content[kept], start, end) if solid else -1
        if place >= 0 and place == text.rfind(content[kept], start, end):
            return place, kept
    raise UserError(
        f"{what}: weights holds spans of its content, which the chat template does not render once, as it is; give a "
        "weight for the whole turn, or a number for each token of the row"
    )
