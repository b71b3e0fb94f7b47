"""LiveCodeBench's code generation (Jain et al. 2024, arXiv 2403.07974): contest problems by date, of two kinds.

A problem is a program from stdin to stdout (Codeforces, AtCoder) or a method of a class `Solution` (LeetCode), so that
its tasks are of both kinds; `recipes/eval_mbpp.py` judges both. No row has a solution.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from functools import partial

from wmtp.data.rows import read_rows, take
from wmtp.errors import UserError
from wmtp.eval.assertion_tasks import AssertionTask
from wmtp.eval.stdio_tasks import StdioTask
from wmtp.eval.task_ids import select_tasks
from wmtp.sandbox import StdioTest

_MOST_BYTES = 1 << 30  # of a problem's tests: more comes of no file that was published
# Every program finds these names there, as in the benchmark's own harness: LeetCode's sites import them unasked.
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
_HEADER = "".join(f"from {name} import *\n" for name in _MODULES)
_HEADER += f"import {', '.join(_MODULES)}\nsys.setrecursionlimit(50_000)\n"
_question_id = partial(take, column="question_id", kind=str)
_LISTED = "def listed(answer):\n    return list(answer) if isinstance(answer, tuple) else answer\n"


def live_code_bench(
    source: str = "lighteval/code_generation_lite",
    split: str = "test",
    *,
    subset: str | None = None,
    start_date: str | None = None,
    end_date: str | None = None,
    ids: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    limit: int | None = None,
) -> tuple[AssertionTask | StdioTask, ...]:
    """LiveCodeBench, or a file with the fields of its code_generation_lite; a task's id is its question_id.

    Args:
        source: a JSON, JSONL (.gz too) or Parquet file, a folder with one `{split}` of these, or the hub name.
        split: which file of a folder, or which split of a hub dataset.
        subset: the hub's configuration, such as ``v6``: the problems of that release alone.
        start_date, end_date: only problems whose contest was from, and up to, this day, ``2024-08-01``: those from
            after the end of a model's training data are none that it has seen.
        ids, exclude, limit: as in :func:`~wmtp.eval.mbpp_tasks`.

    Raises:
        FileNotFoundError, ValueError: source unreadable, no problem of that time, or a bad row; the message names file
            and row.
    """
    first, last = str(start_date or ""), str(end_date or "9999")
    rows = read_rows(source, split, subset)
    if start_date is not None or end_date is not None:
        rows = ((where, row) for where, row in rows if first <= _day(row, where) <= last)
    return select_tasks(rows, _question_id, _task, f"{source} (split {split})", ids, exclude, limit)


def _day(row: dict, where: str) -> str:
    date = str(row.get("contest_date"))[:10]  # Parquet has times, JSON texts
    if len(date) != 10:
        raise UserError(f"{where}: field 'contest_date' must be a date, got {row.get('contest_date')!r:.60}")
    return date


def _task(row: dict, where: str) -> AssertionTask | StdioTask:
    content, starter = take(row, where, "question_content", str), take(row, where, "starter_code", str)
    public, private = (_tests(row, where, column) for column in ("public_test_cases", "private_test_cases"))
    if not public + private:
        raise UserError(f"{where}: no tests; a problem needs public_test_cases or private_test_cases")
    kinds = {test["testtype"] for test in public + private}
    if kinds == {"stdin"}:
        given, hidden = (tuple(StdioTest(test["input"], test["output"]) for test in kind) for kind in (public, private))
        return StdioTask(_question_id(row, where), content, given, hidden, (), header=_HEADER, decimals=True)
    if kinds != {"functional"}:
        raise UserError(f"{where}: testtype must be stdin or functional, alike in a problem, got {sorted(kinds)}")
    metadata = _json(take(row, where, "metadata", str), f"{where}: field 'metadata'")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not (isinstance(name, str) and name.isidentifier()):
        raise UserError(f"{where}: field 'metadata' must name the function as func_name, got {metadata!r:.60}")
    return AssertionTask(
        task_id=_question_id(row, where),
        text=f"{content}\n\nUse this starter code:\n\n```python\n{starter}\n```",
        prompt="",
        entry_point=f"Solution().{name}" if "class Solution" in starter else name,
        solution="",
        setup="",
        preamble=_LISTED,
        tests=(),
        challenge_tests=tuple(_assertion(test, where) for test in public + private),
        apart=True,
        header=_HEADER,
    )


def _assertion(test: dict, where: str) -> str:
    """Returns a test of the function: its arguments are one JSON value a line; a tuple is as good as a list."""
    arguments = [_json(line, f"{where}: a test's input") for line in test["input"].split("\n")]
    expected = _json(test["output"], f"{where}: a test's output")
    return f"assert listed(candidate(*{arguments!r})) == {expected!r}"


def _tests(row: dict, where: str, column: str) -> list[dict[str, str]]:
    text, what = take(row, where, column, str), f"{where}: field {column!r}"
    tests = _json(text if text.lstrip()[:1] == "[" else _unpacked(text, what), what)
    fields = ("input", "output", "testtype")
    if not isinstance(tests, list) or not all(
        isinstance(test, dict) and all(isinstance(test.get(name), str) for name in fields) for test in tests
    ):
        raise UserError(f"{what} must be a JSON list of objects with the texts input, output and testtype")
    return tests


def _json(text: str, what: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is no JSON: {error}, got {text!r:.60}") from None


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text; a pickle that names a class or function, as all that run code must, is refused."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"it names {module}.{name}, where only a text may be")


def _unpacked(packed: str, what: str) -> str:
    """Returns the text in base64 of zlib's compression of its pickle, the form that large tests are published in."""
    try:
        stream = zlib.decompressobj()
        pickled = stream.decompress(base64.b64decode(packed, validate=True), _MOST_BYTES)
        if not stream.eof:
            raise UserError(f"{what} is cut off, or holds more than {_MOST_BYTES} bytes")
        text = _TextOnly(io.BytesIO(pickled)).load()
    except UserError:
        raise
    except Exception as error:  # bytes that are no pickle raise whatever the instruction that they are read as raises
        raise UserError(f"{what} is neither JSON nor base64 of a compressed, pickled text: {error}") from None
    if not isinstance(text, str):
        raise UserError(f"{what} is the pickle of a {type(text).__name__}, where only a text may be")
    return text
