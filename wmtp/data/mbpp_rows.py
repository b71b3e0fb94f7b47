"""MBPP (Austin et al. 2021, arXiv 2108.07732): short Python tasks with a text, three tests and a program.

Prompt formats, each followed by the program as target:

    docstring   a docstring of the text and all tests
    bigcode     a docstring of the text and the first test (the BigCode harness's 0-shot prompt)
    3shot       the paper's: tasks 2, 3, 4 with their programs, then the task; the program ends with [DONE]
"""

from collections.abc import Iterable

from wmtp.data.columns import ReadColumns
from wmtp.data.documents import Documents, comes_from, document_from_text
from wmtp.data.rows import lf, read_rows, rows_state, take, take_texts
from wmtp.errors import UserError

PROMPTS = ("docstring", "bigcode", "3shot")
SPLIT_IDS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
_FEW_SHOT_IDS = (2, 3, 4)
_TASK = (
    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n[BEGIN]\n"
)


@comes_from(rows_state)
def mbpp(
    tokenizer,
    *,
    source: str = "google-research-datasets/mbpp",
    split: str = "train",
    subset: str | None = None,
    prompt: str = "docstring",
) -> Documents:
    """MBPP for fine-tuning: the task is the prompt, the program (with LF line ends) the target.

    Args:
        source: a JSON or JSONL file (.gz too), a folder with `{split}.json`, or the hub name.
        split: ``train``, ``validation``, ``test`` or ``prompt``: the tasks of the published id ranges, also out of one
            file that holds them all; ``all`` takes every row of a file, and every file of a folder.
        subset: the hub's ``full`` or ``sanitized``; both schemas are read from files as they are.
        prompt: ``docstring``: a docstring of the text and all tests. ``bigcode``: of the text and the first test.
            ``3shot``: the paper's, which also reads tasks 2, 3, 4 from the split ``prompt`` of source.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a row that lacks a field; the message names file and row.
    """
    if split not in (*SPLIT_IDS, "all"):
        raise UserError(f"split must be one of {', '.join(SPLIT_IDS)}, all, got {split!r}")
    if prompt not in PROMPTS:
        raise UserError(f"prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    examples = few_shot_tasks(source, subset) if prompt == "3shot" else ()
    documents, skipped = [], {"tasks of other splits": 0}
    rows = ReadColumns(
        read_rows(source, split, subset, streaming=True), {}, ("task_id", "text", "prompt", "code", "test_list")
    )
    for where, row in rows:
        task = mbpp_task(row, where)
        if split != "all" and task["task_id"] not in SPLIT_IDS[split]:
            skipped["tasks of other splits"] += 1
            continue
        completion = f"{task['code']}\n[DONE]" if prompt == "3shot" else task["code"]
        text = mbpp_prompt(task, prompt, examples)
        documents.append(document_from_text(tokenizer, text, completion, f"mbpp/{task['task_id']}"))
    return Documents(f"mbpp {split} of {source}", tuple(documents), skipped, unread=rows.unread)


def mbpp_task(row: dict, where: str) -> dict:
    """Returns task_id, text, code and test_list of a row of either schema, checked, with LF line ends in the code."""
    take(row, where, "test_list", list)
    tests = take_texts(row, where, "test_list")
    if not tests:
        raise UserError(f"{where}: field 'test_list' must be a list of assert statements, got []")
    text = "prompt" if row.get("text") is None and row.get("prompt") is not None else "text"
    return {
        "task_id": take(row, where, "task_id", int),
        "text": take(row, where, text, str),
        "code": lf(take(row, where, "code", str)),
        "test_list": tests,
    }


def mbpp_prompt(task: dict, prompt: str = "docstring", examples: Iterable[dict] = ()) -> str:
    """Returns the text that a model continues with the program; `examples` are solved tasks, for ``3shot``."""
    if prompt == "3shot":
        solved = "".join(f"{_paper_task(example)}{example['code']}\n[DONE]\n\n" for example in examples)
        return solved + _paper_task(task)
    tests = task["test_list"] if prompt == "docstring" else task["test_list"][:1]
    return "\n".join(['"""', task["text"], *tests, '"""', ""])


def few_shot_tasks(source: str, subset: str | None = None) -> list[dict]:
    """Returns tasks 2, 3 and 4, which the paper shows before every task.

    Raises:
        FileNotFoundError, ValueError: source has no split `prompt`, or it lacks one of them.
    """
    tasks = {t["task_id"]: t for t in (mbpp_task(row, where) for where, row in read_rows(source, "prompt", subset))}
    absent = [i for i in _FEW_SHOT_IDS if i not in tasks]
    if absent:
        raise UserError(f"prompt=3shot shows MBPP tasks 2, 3, 4, but the split 'prompt' of {source} lacks {absent}")
    return [tasks[i] for i in _FEW_SHOT_IDS]


def _paper_task(task: dict) -> str:
    return _TASK.format(task["text"], "\n".join(task["test_list"]))
