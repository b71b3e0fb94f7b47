"""Rows of the data sets as jobs whose verdict is known: their own solutions, which must pass.

The one place that knows the rows' fields; used by `test_golds.py` and by `benchmarks/judging.py`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from wmtp.data import read_rows
from wmtp.sandbox import AssertionJob, Limits, StdioJob, StdioTest

DATA = Path(os.environ.get("WMTP_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))

# One solution needs 3 s of CPU time for a test, and CPU time too doubles where another process shares the core.
CONTEST_LIMITS = Limits(cpu_seconds=20.0, wall_seconds=120.0)


def mbpp(split: str) -> Iterator[tuple[str, AssertionJob]]:
    """(name, job) of every MBPP task of a split."""
    for _, row in read_rows(DATA / "mbpp", split):
        yield f"mbpp/{row['task_id']}", mbpp_job(row, row["code"])


def mbpp_job(row: dict, code: str) -> AssertionJob:
    """A program for an MBPP row, in the data set's form or in the packaged one, judged by all of the row's tests."""
    return AssertionJob(
        program=code.replace("\r\n", "\n"),
        tests=(*row["test_list"], *row["challenge_test_list"]),
        setup=row["test_setup_code"].replace("\r\n", "\n"),
    )


def humaneval() -> Iterator[tuple[str, AssertionJob]]:
    """(name, job) of every HumanEval task; the prompt may hold helper functions that the tests use."""
    for _, row in read_rows(DATA / "humaneval" / "HumanEval.jsonl.gz"):
        yield (
            row["task_id"],
            AssertionJob(
                program=row["prompt"] + row["canonical_solution"],
                tests=(f"{row['test']}\ncheck(candidate)",),
                preamble=row["prompt"],
                entry_point=row["entry_point"],
            ),
        )


def leetcode(count: int) -> Iterator[tuple[str, AssertionJob]]:
    """(name, job) of `count` LeetCode tasks, spread over the data set."""
    rows = [row for _, row in read_rows(DATA / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz")]
    for row in rows[:: max(1, len(rows) // count)][:count]:
        yield (
            row["task_id"],
            AssertionJob(
                program=f"{row['prompt']}\n{row['completion']}",
                tests=(f"{row['test']}\ncheck(candidate)",),
                preamble=row["prompt"],
                entry_point=row["entry_point"],
            ),
        )


def code_contests(tests_each: int | None = None) -> Iterator[tuple[str, StdioJob]]:
    """(name, job) of the CodeContests problems whose solution prints exactly the expected output.

    tests_each: only so many of a problem's ten tests; all ten together take a minute of computing.
    """
    for _, row in read_rows(DATA / "code_contests" / "problems.jsonl"):
        if row["gold_passes_exactly"]:
            tests = list(zip(row["tests"]["input"], row["tests"]["output"], strict=True))[:tests_each]
            tests = tuple(StdioTest(*test) for test in tests)
            yield row["name"], StdioJob(row["solutions"]["solution"][0], tests, limits=CONTEST_LIMITS)


def packaged_program_job(row: dict, solution: str) -> StdioJob:
    """A program for a packaged contest task, judged by all of its tests, none left out after a failure."""
    kinds = ("public_tests", "private_tests", "generated_tests")
    tests = [test for kind in kinds for test in zip(row[kind]["input"], row[kind]["output"], strict=True)]
    return StdioJob(solution, tuple(StdioTest(*test) for test in tests), stop_at_first_failure=False)


def all_golds(tests_each: int | None = None) -> list[tuple[str, AssertionJob | StdioJob]]:
    """Every gold program but LeetCode's: 374 + 90 + 500 MBPP, 164 HumanEval, 153 CodeContests."""
    splits = [task for split in ("train", "validation", "test") for task in mbpp(split)]
    return [*splits, *humaneval(), *code_contests(tests_each)]
