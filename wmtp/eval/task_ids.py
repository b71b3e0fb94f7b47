"""Task ids as people write them: 11, "11", "MBPP/11" and "Mbpp/11" are one task."""

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from wmtp.data.mbpp_rows import SPLIT_IDS
from wmtp.errors import UserError

# What stands before the number of a published task: the set's name, and the numbers of its splits.
_PUBLISHED: dict[str, tuple[str, Mapping[str, range]]] = {
    "mbpp": ("MBPP", SPLIT_IDS),
    "humaneval": ("HumanEval", {"test": range(164)}),
    "packaged": ("the packaged functions", {"test": range(1, 37)}),
}

T = TypeVar("T")


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
        """Returns the task's own id.

        Raises:
            ValueError: no task, or more than one, has the id; the message starts with `where`.
        """
        if isinstance(written, bool) or not isinstance(written, str | int):
            raise UserError(f"{where}: task_id must be a string or a whole number, got {written!r:.60}")
        name = str(written).strip()
        found = {name} if name in self._exact else self._by_name.get(name.casefold(), set())
        if len(found) == 1:
            return next(iter(found))
        if found:
            raise UserError(f"{where}: task_id {written!r} could be {' or '.join(sorted(found)[:5])}; write it out")
        if (hint := self._of_another_set(name)) is None:
            near = difflib.get_close_matches(name, self._known, n=1)
            first = f"the first is {self._known[0]!r}" if self._known else "none"
            hint = (
                f"; did you mean {near[0]!r}?" if near else f"; {first}: write the id as the tasks do, or leave it out"
            )
        raise UserError(f"{where}: task_id {written!r:.60} is none of the {len(self._known)} tasks{hint}")

    def _of_another_set(self, name: str) -> str | None:
        """Says which published set or split an id is of, and how to get its tasks; None where it is of none."""
        ours = {known.rpartition("/")[0].casefold() for known in self._known}
        family, _, number = name.casefold().rpartition("/")
        family = family or (next(iter(ours)) if len(ours) == 1 else "")  # 602 among MBPP's is MBPP's
        if family not in _PUBLISHED or not number.isdecimal():
            return None
        title, splits = _PUBLISHED[family]
        split = next((split for split, ids in splits.items() if int(number) in ids), None)
        if split is None:
            first, last = min(ids[0] for ids in splits.values()), max(ids[-1] for ids in splits.values())
            return f"; {title} has no such task, its ids are {first} to {last}: correct it, or leave it out"
        if ours != {family}:
            names = sorted(_PUBLISHED[our][0] if our in _PUBLISHED else our or "another set" for our in ours)
            return f": it is of {title}, and these are of {', '.join(names)}; set tasks to {title}'s, or leave it out"
        here = {int(known.rpartition("/")[2]) for known in self._known if known.rpartition("/")[2].isdecimal()}
        their = [other for other, ids in splits.items() if here & set(ids)]
        if split in their:
            return (
                f": it is of {title}, but not of those chosen; set tasks.limit, tasks.ids or tasks.source so that "
                "it is, or leave it out"
            )
        return (
            f": it is of {title}'s split {split}, and these are of its split {' and '.join(their)}; "
            f"set tasks.split={split}, or all, or leave it out"
        )


class Tasks(tuple):
    """Tasks, and the ids of those that were left out on purpose: a sample of one of these is no mistake."""

    left_out: frozenset[str] = frozenset()


def select_tasks(
    rows: Iterable[tuple[str, dict]],
    id_of: Callable[[dict, str], str],
    make: Callable[[dict, str], T],
    source: object,
    ids: Sequence | None,
    exclude: Sequence | None,
    limit: int | None,
) -> tuple[T, ...]:
    """Returns the tasks of the rows with the given ids, in the order of `ids`, or of all; the first `limit` of these.

    Args:
        rows: (where it was read, row).
        id_of: a row's task id; gets the row and where it was read, as `make`, its task.
        source: for messages.
        exclude: ids of rows that are left out before they become tasks, so that a bad one can be; see `Tasks.left_out`.

    Raises:
        ValueError: no tasks, two with one id, an element of `ids` or `exclude` without a row, one of `ids` given twice,
            or limit < 1.
    """
    named = _unique((where, row, id_of(row, where)) for where, row in rows)
    if limit is not None and limit < 1:
        raise UserError(f"limit must be a whole number >= 1 or null, got {limit!r}")
    left_out: set[str] = set()
    if ids is None and not exclude:
        chosen = itertools.islice(named, limit)  # read no further: a public split can hold gigabytes of tests
    else:
        by_id = {task_id: (where, row, task_id) for where, row, task_id in named}
        finder = TaskIds(by_id)
        names = list(by_id) if ids is None else [finder.find(written, f"{source}: ids") for written in ids]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{source}: ids names the task {twice} more than once")
        left_out = {finder.find(written, f"{source}: exclude") for written in exclude or ()}
        chosen = itertools.islice((by_id[name] for name in names if name not in left_out), limit)
    tasks = Tasks(make(row, where) for where, row, _ in chosen)
    tasks.left_out = frozenset(left_out)
    if not tasks:
        reason = "exclude leaves none" if exclude else "the file is empty" if ids is None else "ids is empty"
        raise UserError(f"{source}: no tasks; {reason}")
    return tasks


def _unique(rows: Iterable[tuple[str, dict, str]]) -> Iterator[tuple[str, dict, str]]:
    seen: dict[str, str] = {}
    for where, row, task_id in rows:
        if task_id in seen:
            raise UserError(f"{where}: task_id {task_id!r} is also that of {seen[task_id]}")
        seen[task_id] = where
        yield where, row, task_id
