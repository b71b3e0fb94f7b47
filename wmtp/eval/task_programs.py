"""Programs of tasks with tests, right and faulty ones: what `recipes/score_rollouts.py` gives values to.

A builder is a plain function `builder(tasks, **config keys)`, named as `_component_`; it returns a tuple of programs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wmtp.data.packaged import packaged_functions
from wmtp.data.rows import fields_of, lf, read_rows, take
from wmtp.errors import UserError
from wmtp.eval.assertion_tasks import AssertionTask
from wmtp.eval.protocols import Task
from wmtp.eval.task_ids import TaskIds

_ID, _FAULT = ("task_id", "problem", "task"), ("fault_line", "fault_location")
_RIGHT, _FAULTY = ("correct", "code", "completion"), ("incorrect", "faulty", "wrong_code")


@dataclass(frozen=True)
class TaskProgram:
    """An answer to a task.

    Attributes:
        task: whose tests judge it.
        text: what follows the task's prompt (of MBPP: the whole program), with LF line ends.
        id: names it in messages and results.
        fault_line: number, from 1, of its wrong line, where that is known.
    """

    task: Task
    text: str
    id: str
    fault_line: int | None = None


def solutions(tasks: Sequence[Task]) -> tuple[TaskProgram, ...]:
    """The tasks' own solutions; tasks without one are left out.

    Raises:
        ValueError: no task has a solution.
    """
    found = [
        (task, task.solution if isinstance(task, AssertionTask) else "".join(task.solutions[:1])) for task in tasks
    ]
    return _distinct((task, text, "solution", None) for task, text in found if text.strip())


def packaged_function_programs(tasks: Sequence[Task]) -> tuple[TaskProgram, ...]:
    """The solutions of :func:`wmtp.eval.packaged_function_tasks`, and a variant of each with one wrong line."""
    rows, by_id = packaged_functions(), {task.task_id: task for task in tasks}
    named = [(by_id[f"packaged/{row['task_id']}"], row) for row in rows if f"packaged/{row['task_id']}" in by_id]
    right = [(task, row["code"], "solution", None) for task, row in named]
    return _distinct([*right, *((task, row["wrong_code"], "faulty", row["fault_line"]) for task, row in named)])


def paired_programs(
    tasks: Sequence[Task], *, source: str, split: str | None = None, subset: str | None = None
) -> tuple[TaskProgram, ...]:
    """Programs of a file: pairs of a right and a faulty one, or single ones.

    Args:
        source: a JSON, JSONL (.gz too) or parquet file, a folder, or a hub name. Rows: the task's id (task_id, problem
            or task), a right program (correct, code or completion), a faulty one (incorrect, faulty or wrong_code), or
            one of both, and where it is known the faulty one's wrong line, from 1 (fault_line or fault_location).
        split, subset: of a folder or a hub dataset.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a row without a task or a program; the message names file
            and line.
    """
    ids, by_id = TaskIds(task.task_id for task in tasks), {task.task_id: task for task in tasks}
    found: list[tuple[Task, str, str, int | None]] = []
    for number, (where, row) in enumerate(read_rows(source, split, subset), start=1):
        if (named := _first(row, _ID)) is None or not any(_first(row, both) for both in (_RIGHT, _FAULTY)):
            raise UserError(
                f"{where}: needs a task ({', '.join(_ID)}) and a program ({', '.join((*_RIGHT, *_FAULTY))}); the row "
                f"has {fields_of(row)}"
            )
        task = by_id[ids.find(row[named], where)]
        if column := _first(row, _RIGHT):
            found.append((task, take(row, where, column, str), f"correct {number}", None))
        if column := _first(row, _FAULTY):
            text = take(row, where, column, str)
            found.append((task, text, f"faulty {number}", _fault_line(row, where, text)))
    return _distinct(found)


def _distinct(found: Iterable[tuple[Task, str, str, int | None]]) -> tuple[TaskProgram, ...]:
    """Returns the programs, each text of a task once; a blank one is refused."""
    programs: dict[tuple[str, str], TaskProgram] = {}
    for task, text, name, fault_line in found:
        text, id = lf(text), f"{task.task_id} {name}"
        if not text.strip():
            raise UserError(f"{id}: the program is blank; leave it out")
        programs.setdefault((task.task_id, text.rstrip()), TaskProgram(task, text, id, fault_line))
    if not programs:
        raise UserError("programs: there is none; give a file with rows, or tasks that have solutions")
    return tuple(programs.values())


def _first(row: dict, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)


def _fault_line(row: dict, where: str, text: str) -> int | None:
    """Returns the wrong line's number; ConDefects writes it as text, and some lie outside of the program."""
    if (column := _first(row, _FAULT)) is None:
        return None
    if not str(row[column]).strip().isdecimal():
        raise UserError(f"{where}: field {column!r} must be a line number, got {row[column]!r:.60}")
    line = int(row[column])
    return line if 1 <= line <= len(lf(text).rstrip().split("\n")) else None
