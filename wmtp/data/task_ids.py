"""Task ids as people write them: 11, "11", "MBPP/11" and "Mbpp/11" are one task."""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from wmtp.errors import UserError


class HasTaskId(Protocol):
    @property
    def task_id(self) -> str: ...


T = TypeVar("T", bound=HasTaskId)


class TaskIds:
    """Finds a task's own id from any way of writing it.

    An id matches as it stands, whatever its case, or by its number alone: 11 and "11" are the task whose id ends in
    "/11", if there is just one.

    Args:
        known: the tasks' own ids.
    """

    def __init__(self, known: Iterable[str]) -> None:
        self._known = list(known)
        self._exact = set(self._known)
        self._by_name: dict[str, set[str]] = {}
        for task_id in self._known:
            number = task_id.rpartition("/")[2]
            for name in {task_id.casefold(), number} if number.isdecimal() else {task_id.casefold()}:
                self._by_name.setdefault(name, set()).add(task_id)

    def find(self, written: object, where: str) -> str:
        """The task's own id.

        Raises:
            ValueError: no task, or more than one, has the id; the message starts with `where`.
        """
        if isinstance(written, bool) or not isinstance(written, str | int):
            raise UserError(f"{where}: task_id must be a string or a whole number, got {written!r:.60}")
        name = str(written)
        found = {name} if name in self._exact else self._by_name.get(name.casefold(), set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise UserError(f"{where}: task_id {written!r} could be {' or '.join(sorted(found)[:5])}; write it out")
        near = difflib.get_close_matches(name, self._known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the first is {self._known[0]!r}" if self._known else "none"
        raise UserError(f"{where}: task_id {written!r:.60} is none of the {len(self._known)} tasks; {hint}")


def select_tasks(
    tasks: Iterable[tuple[str, T]], source: object, ids: Sequence | None, limit: int | None
) -> tuple[T, ...]:
    """The tasks with the given ids, in the order of `ids`, or all of them; the first `limit` of these.

    Args:
        tasks: (where it was read, task).
        source: for messages.

    Raises:
        ValueError: no tasks, two with one id, an element of `ids` without a task or given twice, or limit < 1.
    """
    tasks = _unique(tasks)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be a whole number >= 1 or null, got {limit!r}")
    if ids is None:
        chosen = list(itertools.islice(tasks, limit))  # read no further: a public split can hold gigabytes of tests
    else:
        by_id = {task.task_id: task for task in tasks}
        finder = TaskIds(by_id)
        names = [finder.find(written, f"{source}: ids") for written in ids]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{source}: ids names the task {twice} more than once")
        chosen = [by_id[name] for name in names][:limit]
    if not chosen:
        raise UserError(f"{source}: no tasks; {'the file is empty' if ids is None else 'ids is empty'}")
    return tuple(chosen)


def _unique(tasks: Iterable[tuple[str, T]]) -> Iterator[T]:
    seen: dict[str, str] = {}
    for where, task in tasks:
        if task.task_id in seen:
            raise UserError(f"{where}: task_id {task.task_id!r} is also that of {seen[task.task_id]}")
        seen[task.task_id] = where
        yield task
