"""Tasks whose answer is a program from stdin to stdout: CodeContests (Li et al. 2022, arXiv 2203.07814)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from wmtp.data.columns import ReadColumns
from wmtp.data.contest_rows import PYTHON3, programs_of, topics, whole_number
from wmtp.data.packaged import packaged_programs
from wmtp.data.rows import is_number, read_rows, refuse_unread_tests, take
from wmtp.errors import UserError
from wmtp.eval.task_ids import select_tasks
from wmtp.eval.trusted_code import with_header
from wmtp.sandbox import Limits, Outcome, StdioJob, StdioTest

_KINDS = ("public_tests", "private_tests", "generated_tests")
_JUDGING = {**dict.fromkeys((*_KINDS, "tests", "time_limit"), dict), "memory_limit_bytes": int}
# Contests set their memory limits for compiled languages, and where only the address space can be limited, stacks and
# arenas that are never touched count too.
_MEMORY_FACTOR = 4
_name = partial(take, column="name", kind=str)
_COLUMNS = frozenset({*_JUDGING, "input_file", "output_file"})  # the last two are CodeContests' own


@dataclass(frozen=True)
class StdioTask:
    """One program to write, with its tests and the contest's limits.

    Attributes:
        name: unique.
        description: the statement, in words.
        public_tests: those of the statement; a sample that passes them is a candidate for submission (see n@k).
        private_tests: the contest's hidden tests.
        generated_tests: made by mutating inputs, with outputs on which correct programs agree.
        time_limit_seconds: of one test, None where the contest's limit is unknown.
        memory_limit_bytes: None where it is unknown.
        rating: Codeforces difficulty, 0 where unknown.
        tags: topics.
        difficulty: the dataset's number.
        solutions: correct programs in Python 3.
        header: code that the benchmark runs before every program, as its beginning.
        decimals: 1.0 is right where 1 is expected, see :class:`wmtp.sandbox.StdioJob`.
    """

    name: str
    description: str
    public_tests: tuple[StdioTest, ...]
    private_tests: tuple[StdioTest, ...]
    generated_tests: tuple[StdioTest, ...]
    time_limit_seconds: float | None = None
    memory_limit_bytes: int | None = None
    rating: int = 0
    tags: tuple[str, ...] = ()
    difficulty: int = 0
    solutions: tuple[str, ...] = ()
    header: str = ""
    decimals: bool = False
    inside: ClassVar[bool] = False  # its tests are texts, which no program can reach

    @property
    def task_id(self) -> str:
        return self.name

    @property
    def tests(self) -> tuple[StdioTest, ...]:
        """All tests in the order of judging: public, private, generated."""
        return self.public_tests + self.private_tests + self.generated_tests

    def program(self, completion: str) -> str:
        """Returns the program that a plain continuation of the prompt makes: the continuation alone."""
        return completion

    def job(
        self,
        program: str,
        *,
        machine_factor: float = 2.0,
        limits: Limits | None = None,
        stop_at_first_failure: bool = True,
    ) -> StdioJob:
        """Returns the job that the sandbox judges.

        Args:
            program: source.
            machine_factor: CPU time allowed, in time limits: contests set theirs for their own machines.
            limits: used as they are where the contest's limit is unknown; the factor does not apply to them.
            stop_at_first_failure: False judges all tests, which :meth:`passes_lenient` needs of a failing program.

        Raises:
            ValueError: machine_factor is not > 0.
        """
        if not 0 < machine_factor < math.inf:
            raise UserError(f"machine_factor must be a number > 0, got {machine_factor!r}")
        limits = Limits() if limits is None else limits
        if self.time_limit_seconds is not None:
            cpu_seconds = self.time_limit_seconds * machine_factor
            # Wall time only ends what sleeps: a loaded machine must not turn right programs into timeouts.
            limits = replace(limits, cpu_seconds=cpu_seconds, wall_seconds=max(limits.wall_seconds, 5 * cpu_seconds))
        if self.memory_limit_bytes is not None:
            limits = replace(limits, memory_bytes=self.memory_limit_bytes * _MEMORY_FACTOR)
        return StdioJob(
            program=with_header(self.header, program),
            tests=self.tests,
            limits=limits,
            stop_at_first_failure=stop_at_first_failure,
            decimals=self.decimals,
        )

    def passes_public(self, outcome: Outcome) -> bool:
        """Returns whether all public tests were judged and passed; True where there are none."""
        public = outcome.tests[: len(self.public_tests)]
        return len(public) == len(self.public_tests) and all(verdict == "passed" for verdict in public)

    def passes_lenient(self, outcome: Outcome) -> bool | None:
        """Returns whether all tests pass under DeepMind's rule of comparison; None where judging stopped before."""
        if not all(outcome.lenient_tests):
            return False
        return True if len(outcome.lenient_tests) == len(self.tests) else None


def code_contests(
    source: str = "deepmind/code_contests",
    split: str = "test",
    *,
    ids: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    limit: int | None = None,
    reproducible_only: bool = False,
) -> tuple[StdioTask, ...]:
    """CodeContests, or a file with its fields.

    Args:
        source: a JSON, JSONL (.gz too) or Parquet file, a folder with one `{split}` of these, or the hub name.
        split: which file of a folder, or which split of a hub dataset.
        ids: only the problems with these names, in this order.
        exclude: without the problems with these names.
        limit: only the first so many.
        reproducible_only: keep only rows whose `gold_passes_exactly` is true: a known correct program's output equals
            the expected one (other problems have several valid answers, which no comparison of texts can judge).

    A row may have `tests` instead of public, private and generated tests: they count as private. Limits may be null or
    absent: the sandbox's apply.

    Raises:
        FileNotFoundError, ValueError: source unreadable, or a bad row; the message names file and row.
    """
    rows: Iterable[tuple[str, dict]] = ReadColumns(read_rows(source, split), _JUDGING)
    if reproducible_only:
        rows = ((where, row) for where, row in rows if take(row, where, "gold_passes_exactly", bool))
    return select_tasks(rows, _name, _stdio_task, source, ids, exclude, limit)


def packaged_program_tasks(
    *, ids: Sequence[str] | None = None, exclude: Sequence[str] | None = None, limit: int | None = None
) -> tuple[StdioTask, ...]:
    """The 12 programs of :func:`wmtp.data.packaged_programs`.

    Args:
        ids, exclude, limit: as in :func:`code_contests`.
    """
    rows = ((f"packaged program {row['name']}", row) for row in packaged_programs())
    return select_tasks(rows, _name, _stdio_task, "packaged programs", ids, exclude, limit)


def _stdio_task(row: dict, where: str) -> StdioTask:
    refuse_unread_tests(row, where, _COLUMNS, "tests, or public_tests, private_tests or generated_tests")
    if row.get("tests") is not None and all(row.get(kind) is None for kind in _KINDS):
        found = [(), _tests(row, where, "tests"), ()]
    else:
        found = [_tests(row, where, kind) for kind in _KINDS]
    public, private, generated = found
    if not public + private + generated:
        raise UserError(f"{where}: no tests; a problem needs tests, or public_tests, private_tests or generated_tests")
    return StdioTask(
        name=_name(row, where),
        description=take(row, where, "description", str),
        public_tests=public,
        private_tests=private,
        generated_tests=generated,
        time_limit_seconds=_seconds(row.get("time_limit"), where),
        memory_limit_bytes=whole_number(row, where, "memory_limit_bytes") or None,
        rating=whole_number(row, where, "cf_rating"),
        tags=topics(row, where, "cf_tags" if row.get("cf_tags") is not None else "tags"),
        difficulty=whole_number(row, where, "difficulty"),
        solutions=programs_of(row, where, "solutions", PYTHON3) if row.get("solutions") is not None else (),
    )


def _tests(row: dict, where: str, kind: str) -> tuple[StdioTest, ...]:
    if row.get(kind) is None:
        return ()
    tests = take(row, where, kind, dict)
    inputs, outputs = (take(tests, f"{where}: field {kind!r}", column, list) for column in ("input", "output"))
    if len(inputs) != len(outputs) or not all(isinstance(text, str) for text in [*inputs, *outputs]):
        raise UserError(
            f"{where}: {kind} must be equally many input and output texts, got {len(inputs)} and {len(outputs)}"
        )
    return tuple(StdioTest(*pair) for pair in zip(inputs, outputs, strict=True))


def _seconds(limit: object, where: str) -> float | None:
    if limit is None:
        return None
    if isinstance(limit, dict):
        seconds, nanos = limit.get("seconds") or 0, limit.get("nanos") or 0
        if all(map(is_number, (seconds, nanos))) and seconds + nanos * 1e-9 > 0:
            return seconds + nanos * 1e-9
    raise UserError(f"{where}: time_limit must be null or {{seconds, nanos}} of more than 0 s, got {limit!r:.60}")
