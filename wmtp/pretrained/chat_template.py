"""Conversations as token ids by a tokenizer's chat template, and which of them are the assistant's turns.

A template says it itself, where it marks what the model generates (``{% generation %}``). Of every other template it is
proven, conversation by conversation, by the ids of its beginnings: a turn is what the whole has after the ids of all
messages before it with the generation prompt, up to the ids of all messages through it. Both must be the first ids of
the whole; where a template rewrites earlier turns, or a token straddles an edge, nothing is certain and it is refused.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend

from wmtp.errors import UserError, one_line

Message = Mapping[str, Any]  # role, content, and whatever else the template reads
_RENDERING = Lock()  # `transformers` shares a template's compiled form, which tracks one rendering at a time
_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OURS = frozenset(("messages", "conversations", "tools", "chat_template", "add_generation_prompt"))
_OURS |= {"continue_final_message", "return_assistant_tokens_mask"}
_WAY_OUT = (
    "train on the last turn alone (turns=last), one row for each turn, or mark the assistant's turns in the template "
    "with {% generation %}"
)


class Turn(NamedTuple):
    """A turn of the assistant: the tokens [start, end) of a conversation, its end-of-turn token included.

    ``message`` is the number of its message; None where the template marks more or fewer turns than the assistant has.
    """

    message: int | None
    start: int
    end: int


class Conversation(NamedTuple):
    """A conversation as the model sees it."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]  # the characters [start, end) of each token; bytes of one character share it
    turns: list[Turn]


class ChatTemplate:
    """The chat template of a `transformers` tokenizer.

    Args:
        hf: a tokenizer of `transformers` with a chat template.
        name: of the tokenizer, for messages.
    """

    def __init__(self, hf, name: str) -> None:
        self._hf, self._name = hf, name
        spec = json.loads(hf.backend_tokenizer.to_str())
        # Nothing is added to a rendered text, so all that a post-processor would do is trim the offsets' white space.
        spec["post_processor"] = spec["truncation"] = spec["padding"] = None
        self._backend = Backend.from_str(json.dumps(spec))
        self._special = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}

    def conversation(
        self,
        messages: Sequence[Message],
        tools: list | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        last: bool = False,
        where: str = "conversation",
    ) -> Conversation:
        """Renders messages, and finds the assistant's turns among the ids.

        The ids are those of `apply_chat_template(messages, tools, **arguments)`, and where the template marks the turns
        they are those of its `return_assistant_tokens_mask`.

        Args:
            tools: handed to the template, as all keys of the messages are.
            arguments: further variables of the template.
            date: what the template's strftime_now gives, so that the ids are the same on every day.
            last: find the last turn alone.
            where: names the conversation in messages.

        Raises:
            UserError: the template refuses the messages, or the turns are not certain.
        """
        render, marks = self._renderer(messages, tools, arguments, date, where)
        text, blocks = render(len(messages), masked=marks)
        encoded = self._backend.encode(text, add_special_tokens=False)
        whole = Conversation(text, encoded.ids, encoded.offsets, [])  # an encoding makes its lists anew each time
        numbers = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
        if marks:
            turns = _marked(blocks[0], whole.offsets, numbers)
            return whole._replace(turns=turns[-1:] if last else turns)

        def beginning(count: int, prompt: bool) -> tuple[str, list[int]]:
            shown = render(count, prompt)[0]
            return shown, self._ids(shown)

        wanted = numbers[-1:] if last else numbers
        return whole._replace(turns=[self._proven(number, messages, whole, beginning, where) for number in wanted])

    def prompt(
        self,
        messages: Sequence[Message],
        tools: list | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        where: str = "prompt",
    ) -> list[int]:
        """Returns the ids of messages, and of what the template puts before an answer to them.

        Args, Raises: as in :meth:`conversation`.
        """
        return self._ids(self._renderer(messages, tools, arguments, date, where)[0](len(messages), True)[0])

    def _renderer(
        self,
        messages: Sequence[Message],
        tools: list | None,
        arguments: Mapping[str, Any] | None,
        date: str | None,
        where: str,
    ) -> tuple[Callable[..., tuple[str, Any]], bool]:
        """Returns what renders the first so many messages, and whether the template marks the assistant's turns."""
        if not isinstance(arguments, Mapping | None) or _OURS & (arguments or {}).keys():
            raise UserError(
                f"template_arguments must be names and values, none of them {', '.join(sorted(_OURS))}, got {arguments}"
            )
        if not isinstance(date, str | None):
            raise UserError(f"date must be a text in quotes, got {date!r}")
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        template = self._dated(self._hf.get_chat_template(None, tools), date)
        variables = {**self._hf.special_tokens_map, **(arguments or {})}

        def render(count: int, prompt: bool = False, masked: bool = False) -> tuple[str, Any]:
            return self._render(
                said[:count], where,
                {**variables, "tools": tools, "chat_template": template, "add_generation_prompt": prompt,
                 "return_assistant_tokens_mask": masked},
            )  # fmt: skip

        return render, _MASK.search(template) is not None

    def _ids(self, text: str) -> list[int]:
        # Unlike `encode`, a batch is encoded without the interpreter's lock.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _dated(self, template: str, date: str | None) -> str:
        """Returns a template whose strftime_now gives the date; without one it refuses to be called."""
        if "strftime_now" not in template:
            return template
        no_date = "it writes today's date, and the data would be others tomorrow: set date to the text to write instead"
        shown = (
            f"{{{{ {json.dumps(date)} }}}}" if date is not None else f"{{{{ raise_exception({json.dumps(no_date)}) }}}}"
        )
        # The line end behind the macro is removed by trim_blocks, and the template begins a line as it did.
        return f"{{% macro strftime_now(format='') %}}{shown}{{% endmacro %}}\n{template}"

    def _render(self, messages: list[dict], where: str, options: Mapping[str, Any]) -> tuple[str, Any]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with _RENDERING:
                rendered: Any = render_jinja_template([messages], **options)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages[:8]) + ", ..." * (len(messages) > 8)
            raise UserError(
                f"{where}: the chat template of {self._name} refuses the conversation of {roles}: {one_line(error)}"
            ) from error
        [text], blocks = rendered
        for number, message in enumerate(messages):
            content = message.get("content")
            if content and isinstance(content, list | dict) and str(content) in text:
                raise UserError(
                    f"{where}: messages[{number}]: the chat template of {self._name} knows no content that is a "
                    f"{type(content).__name__}, and would write its brackets; make it a string"
                )
        return text, blocks

    def _proven(
        self, number: int, messages: Sequence[Message], whole: Conversation, beginning: Callable, where: str
    ) -> Turn:
        """Returns a turn by the prefix rule of this module."""
        turn = f"{where}: messages[{number}]"
        if number == 0:
            raise UserError(f"{turn} is the assistant's, and nothing comes before it; begin with a user's message")
        shown, before = beginning(number, True)
        if whole.ids[: len(before)] != before:
            if whole.text.startswith(shown):
                raise UserError(
                    f"{turn}: a token of {self._name} joins the end of the prompt with the beginning of this turn, "
                    "which generation would not do; strip its content, or leave the row out"
                )
            raise self._uncertain(turn, "what comes before this one", before, whole)
        through = whole.ids if number + 1 == len(messages) else beginning(number + 1, False)[1]
        # What stands behind a whole conversation (Phi-3's end of text) is not the turn's: a prompt does not follow it.
        end = _common(through, beginning(number + 1, True)[1])
        if end < len(through) and through[end] in self._special and not self._closed(whole, len(before), end):
            end += 1  # the turn's only end is another where the conversation goes on (gpt-oss)
        content = messages[number].get("content")
        if isinstance(content, str) and len(before) < end <= len(whole.ids):
            learnt = whole.text[whole.offsets[len(before)][0] : whole.offsets[end - 1][1]]
            end = end if content.strip() in learnt else len(through)
        if whole.ids[:end] != through[:end] or end <= len(before):
            raise self._uncertain(turn, "this one", through, whole)
        return Turn(number, len(before), self._closed(whole, len(before), end) or end)

    def _uncertain(self, turn: str, what: str, beginning: list[int], whole: Conversation) -> UserError:
        return UserError(
            f"{turn}: {self._name}'s chat template marks no turns, and renders {what} otherwise in the whole "
            f"conversation than where it ends (from token {_common(whole.ids, beginning)} on); {_WAY_OUT}"
        )

    def _closed(self, whole: Conversation, start: int, end: int) -> int | None:
        """Returns the end of a turn's last special token if white space alone follows, which nobody generates."""
        special = [i for i in range(start, end) if whole.ids[i] in self._special] if end <= len(whole.ids) else []
        if special and not whole.text[whole.offsets[special[-1]][1] : whole.offsets[end - 1][1]].strip():
            return special[-1] + 1
        return None


def _marked(blocks: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]], numbers: list[int]) -> list[Turn]:
    """Returns the turns that a template marks as characters [start, end): every token that holds one of them."""
    turns, at = [], 0
    of_message = numbers if len(blocks) == len(numbers) else [None] * len(blocks)
    for (first, last), number in zip(blocks, of_message, strict=True):
        while at < len(offsets) and offsets[at][1] <= first:
            at += 1
        start = at
        while at < len(offsets) and offsets[at][0] < last:
            at += 1
        if at > start:
            turns.append(Turn(number, start, at))
        at = start  # a token may hold the end of one turn and the start of the next
    return turns


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns how many ids two sequences begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
