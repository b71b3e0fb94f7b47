"""Evaluation protocols: what a model is shown of a task, where its answer ends, and which program the answer is.

Each builder below returns a :class:`Protocol` and can be named as `_component_`:

    three_shot_protocol   MBPP as its paper asks it: three solved tasks, then the task      (arXiv 2108.07732)
    bigcode_protocol      MBPP 0-shot: a docstring of the text and the first test           (BigCode's harness)
    docstring_protocol    a docstring of the text and all tests: the prompt that `wmtp.data.mbpp` trains on
    humaneval_protocol    HumanEval 0-shot: the signature and docstring, to be continued    (arXiv 2107.03374)
    alphacode_protocol    CodeContests 0-shot, conditioned on a correct solution            (arXiv 2203.07814)
    chat_protocol         any task as a message to a chat model
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from wmtp.data.contest_rows import alphacode_prompt
from wmtp.data.mbpp_rows import mbpp_prompt
from wmtp.errors import UserError
from wmtp.eval.assertion_tasks import AssertionTask, mbpp_tasks
from wmtp.eval.stdio_tasks import StdioTask
from wmtp.eval.trusted_code import FUTURE_IMPORT

Task = AssertionTask | StdioTask
Messages = list[dict[str, str]]

_BIGCODE_MBPP_STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
_BIGCODE_HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
# No program of MBPP contains one of these, and a model that goes on after its program writes one of them next.
_DOCSTRING_STOP = ('\n"""', "\nassert", "\nprint", "\n```")
# An opening fence of three or more, its lines, and the same fence again, or the end of an answer that was cut off.
_FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})[^\n`]*\n(.*?)(?:^[ \t]*\2|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Protocol:
    """How a model is asked, and how its answer is read.

    Attributes:
        name: for the report.
        stop: an answer ends before the first of these strings, beside EOS.
        render: the text to continue, or the messages of a conversation.
        extract: the program that an answer to a task is.
        chat: of messages: the template's further ``arguments``, and the ``date`` that it writes.
    """

    name: str
    stop: tuple[str, ...]
    render: Callable[[Task], str | Messages]
    extract: Callable[[Task, str], str]
    chat: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, task: Task, tokenizer) -> list[int]:
        """Returns the token ids after which the answer starts.

        Raises:
            ValueError: the protocol is for other tasks, or the tokenizer has no chat template for messages.
        """
        rendered = self.render(task)
        if isinstance(rendered, str):
            return tokenizer.encode_prompt(rendered)
        return tokenizer.chat.prompt(rendered, **self.chat)

    def program(self, task: Task, completion: str) -> str:
        """Returns the program to judge; an answer that was not yet cut at a stop string is cut here."""
        return self.extract(task, cut_at_stop(completion, self.stop))


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the first occurrence of any of the strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def three_shot_protocol(
    examples_source: str = "google-research-datasets/mbpp",
    examples_split: str = "prompt",
    example_ids: Sequence[int | str] = (2, 3, 4),
    subset: str | None = None,
) -> Protocol:
    """MBPP's few-shot prompt: solved tasks between [BEGIN] and [DONE], then the task up to its [BEGIN].

    Args:
        examples_source: a file, a folder or a hub name, as :func:`mbpp_tasks` reads it.
        examples_split: the split the examples are in; the paper's tasks 2, 3, 4 are in ``prompt``.
        example_ids: the tasks shown, in this order.
        subset: the hub's ``full`` or ``sanitized``.

    Raises:
        FileNotFoundError, ValueError: the examples cannot be read.
    """
    examples = mbpp_tasks(examples_source, examples_split, subset=subset, ids=list(example_ids))
    shown = {example.task_id for example in examples}

    def render(task: Task) -> str:
        row = _mbpp_row(task, "three_shot_protocol")
        if task.task_id in shown:
            raise UserError(f"task {task.task_id} is one of the examples three_shot_protocol shows; set example_ids")
        return mbpp_prompt(row, "3shot", [_mbpp_row(example, "three_shot_protocol") for example in examples])

    return Protocol(f"mbpp {len(examples)}-shot", ("[DONE]",), render, _continued)


def bigcode_protocol() -> Protocol:
    """MBPP's 0-shot prompt and stop strings of the BigCode evaluation harness."""
    return Protocol("mbpp 0-shot (BigCode)", _BIGCODE_MBPP_STOP, partial(_of_mbpp, "bigcode"), _continued)


def docstring_protocol() -> Protocol:
    """The prompt that :func:`wmtp.data.mbpp` trains on, and stop strings for models that do not end by themselves."""
    return Protocol("docstring", _DOCSTRING_STOP, partial(_of_mbpp, "docstring"), _continued)


def humaneval_protocol() -> Protocol:
    """HumanEval 0-shot: the prompt as it is; the answer ends where a new top-level statement starts."""

    def render(task: Task) -> str:
        name = task.entry_point if isinstance(task, AssertionTask) else None
        if name is None or not re.search(rf"\bdef\s+{re.escape(name)}\b", task.prompt):
            raise UserError(
                f"humaneval_protocol needs a prompt that starts the function asked for; that of task {task.task_id} "
                "does not: use chat_protocol, or a protocol of the task's own benchmark"
            )
        return task.prompt

    return Protocol("humaneval 0-shot", _BIGCODE_HUMANEVAL_STOP, render, _continued)


def alphacode_protocol(rating: int | None = None, tags: Sequence[str] | None = None) -> Protocol:
    """CodeContests' statement as comment lines under a header that asks for a correct Python 3 program.

    Args:
        rating, tags: stated instead of the problem's own, which a contest does not reveal.
    """

    def render(task: Task) -> str:
        if not isinstance(task, StdioTask):
            for_stdin = "alphacode_protocol is for programs that read stdin"
            raise UserError(f"{for_stdin}; task {task.task_id} asks for a function")
        its_rating, its_tags = task.rating if rating is None else rating, task.tags if tags is None else tags
        return alphacode_prompt(task.description, rating=its_rating, tags=its_tags)

    stop = tuple(
        f"\n# {line}" for line in ("RATING:", "TAGS:", "LANGUAGE IS", "CORRECT SOLUTION", "INCORRECT SOLUTION")
    )
    return Protocol("code_contests 0-shot (AlphaCode)", stop, render, _continued)


def chat_protocol(template_arguments: Mapping[str, Any] | None = None, date: str | None = None) -> Protocol:
    """One user message; the program is the first fenced code block of the answer, or all of it where there is none.

    The block of a HumanEval task follows the task's prompt, so that its imports and helper functions are there; a
    function in the block replaces the prompt's unfinished one.

    Args:
        template_arguments, date: as in :func:`wmtp.data.chat`; give those that the model was trained with.
    """
    return Protocol("chat", (), _message, _from_chat, {"arguments": template_arguments, "date": date})


def first_code_block(answer: str) -> str:
    """Returns the lines of the first fenced block, without the fence's indentation; the answer where it has none."""
    found = _FENCE.search(answer)
    if found is None:
        return answer
    indent, _, code = found.groups()
    return re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) if indent else code


def _continued(task: Task, completion: str) -> str:
    return task.program(completion)


def _from_chat(task: Task, answer: str) -> str:
    code = first_code_block(answer)
    if isinstance(task, StdioTask) or not task.prompt:
        return code
    name = re.match(r"\w*", task.entry_point or "").group()
    if not re.search(rf"^\s*(?:async\s+def|def|class)\s+{name}\b", code, re.MULTILINE):
        return task.program(code)  # the body alone, or a class's methods
    # `from __future__` must stay the first statement of the program.
    return "".join(FUTURE_IMPORT.findall(code)) + task.program("\n" + FUTURE_IMPORT.sub("", code))


def _message(task: Task) -> Messages:
    if isinstance(task, StdioTask):
        text = (
            "Solve this problem with a correct Python 3 program that reads standard input and writes standard output. "
            f"Answer with one Python code block.\n\n{task.description}"
        )
    elif task.prompt:
        asked = task.text or f"Complete this Python function:\n\n```python\n{task.prompt.rstrip()}\n```"
        text = f"{asked}\n\nAnswer with one Python code block that holds all of it."
    else:
        tests = "\n".join(task.tests)
        shown = f"Your code should pass these tests:\n\n```python\n{tests}\n```\n\n" if tests else ""
        text = f"{task.text}\n\n{shown}Answer with one Python code block that holds the function, without the tests."
    return [{"role": "user", "content": text}]


def _of_mbpp(style: str, task: Task) -> str:
    return mbpp_prompt(_mbpp_row(task, f"{style}_protocol"), style)


def _mbpp_row(task: Task, protocol: str) -> dict:
    if not isinstance(task, AssertionTask) or task.prompt or not task.tests:
        raise UserError(
            f"{protocol} shows a task's tests, which only MBPP means to be shown; "
            f"task {task.task_id} is of another benchmark: use its protocol, or chat_protocol"
        )
    return {"text": task.text, "test_list": list(task.tests), "code": task.solution}
