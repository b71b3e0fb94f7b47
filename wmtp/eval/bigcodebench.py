"""BigCodeBench (Zhuo et al. 2024, arXiv 2406.15877): functions that use many libraries, judged by `unittest` cases."""

import ast
import importlib.util
from collections.abc import Sequence
from functools import partial

from wmtp.data.rows import read_rows, refuse_unread_tests, take
from wmtp.errors import UserError
from wmtp.eval.assertion_tasks import AssertionTask
from wmtp.eval.task_ids import Tasks, select_tasks
from wmtp.eval.trusted_code import with_calls

_task_id = partial(take, column="task_id", kind=str)


def bigcodebench_tasks(
    source: str = "bigcode/bigcodebench",
    split: str = "v0.1.4",
    *,
    installed_only: bool = False,
    ids: Sequence[int | str] | None = None,
    exclude: Sequence[int | str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask, ...]:
    """BigCodeBench, or a file with its fields: complete_prompt starts the program, instruct_prompt asks in words.

    The tests of all are judged inside the program's process: they patch what it calls, and share files and objects of
    the libraries with it.

    Args:
        source: a JSON, JSONL (.gz too) or Parquet file, a folder with one `{split}` of these, or the hub name.
        split: which file of a folder, or which split of a hub dataset: there, the version.
        installed_only: leave out tasks of which a library is not installed; else they are refused.
        ids, exclude, limit: as in :func:`~wmtp.eval.mbpp_tasks`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, a library that is not installed, or a bad row; the message
            names file and row.
    """
    lacking: dict[str, set[str]] = {}

    def make(row: dict, where: str) -> AssertionTask:
        task = _task(row, where)
        if absent := {name for name in _libraries(row, where) if importlib.util.find_spec(name) is None}:
            lacking[task.task_id] = absent
        return task

    found = select_tasks(read_rows(source, split), _task_id, make, f"{source} (split {split})", ids, exclude, limit)
    names = ", ".join(sorted(set().union(*lacking.values())))
    if lacking and not installed_only:
        raise UserError(
            f"{source}: {len(lacking)} of {len(found)} tasks need libraries that are not installed: {names}; install "
            "them, or set tasks.installed_only=true to leave these tasks out"
        )
    if len(lacking) == len(found):
        raise UserError(f"{source}: no tasks; each needs a library that is not installed: {names}")
    tasks = Tasks(task for task in found if task.task_id not in lacking)
    tasks.left_out = getattr(found, "left_out", frozenset()) | lacking.keys()
    return tasks


def _libraries(row: dict, where: str) -> set[str]:
    """Returns the top-level modules that a row's `libs` names: a list, or the text of one."""
    listed = row.get("libs") or []
    try:
        names = ast.literal_eval(listed) if isinstance(listed, str) else listed
        return {name.partition(".")[0] for name in names}
    except (ValueError, SyntaxError, TypeError, AttributeError):
        raise UserError(f"{where}: field 'libs' must be a list of modules, got {listed!r:.60}") from None


def _task(row: dict, where: str) -> AssertionTask:
    refuse_unread_tests(row, where, frozenset({"test"}), "test, as a class of unittest.TestCase")
    test = take(row, where, "test", str)
    judged = with_calls(test, f"{where}: field 'test'")
    if judged == test:
        raise UserError(f"{where}: field 'test' must define a unittest.TestCase with tests, got {test!r:.60}")
    return AssertionTask(
        task_id=_task_id(row, where),
        text=take(row, where, "instruct_prompt", str),
        prompt=take(row, where, "complete_prompt", str),
        entry_point=take(row, where, "entry_point", str),
        solution=take(row, where, "canonical_solution", str),
        setup="",
        preamble="",
        tests=(judged,),
        inside=True,
    )
