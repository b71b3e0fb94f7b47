"""The tasks that ship with the package: small, written for it, and usable without a download.

Every task has correct and subtly wrong programs: a judge can be tried on both, and token weights can be examined where
the fault is known. The rows have the fields of the public datasets of the same form, and lie in the package's folder
`wmtp/data/tasks`.
"""

import json
from pathlib import Path

PACKAGED_TASKS = Path(__file__).with_name("tasks")  # with solutions, which no judged program may see


def packaged_functions() -> list[dict]:
    """Returns 36 function-writing tasks as rows of MBPP's `full` configuration, with a wrong program for each.

    Fields:
        task_id: int, 1 to 36.
        text: the task in one sentence.
        code: a correct program.
        test_list: at least four ``assert <expression> == <literal>``.
        test_setup_code: always empty.
        challenge_test_list: further asserts of the same form, or none.
        wrong_code: `code` with one line changed; fails at least one assert of test_list and passes at least one.
        fault_line: the number of that line, from 1, in both `code` and `wrong_code`.
    """
    return _read("functions.jsonl")


def packaged_programs() -> list[dict]:
    """Returns 12 tasks that read stdin and write stdout, as rows of deepmind/code_contests.

    Fields:
        name: unique.
        description: the statement, with the input and output format and the public tests as examples.
        public_tests, private_tests, generated_tests: ``{"input": [...], "output": [...]}``, lists of equal length.
        solutions: ``{"language": [...], "solution": [...]}``, two correct programs; language 3 is Python 3.
        incorrect_solutions: the same for wrong programs; each passes at least one public test and fails at least one
            private or generated test.
        time_limit: ``{"seconds": 2, "nanos": 0}`` for one test.
        memory_limit_bytes: 256 MiB.
        difficulty: 1 (easy) to 3 (hard), among these tasks.
        cf_rating, source: 0 (unknown), as the tasks are from no contest.
        cf_tags: list of topics.
    """
    return _read("programs.jsonl")


def _read(name: str) -> list[dict]:
    return [json.loads(line) for line in (PACKAGED_TASKS / name).read_text(encoding="utf-8").splitlines()]
