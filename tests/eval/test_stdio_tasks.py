"""Stdio tasks: rows of CodeContests become jobs with the contest's limits, and prompts that ask for a right program."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from shared_data import DATA, needs

from wmtp.data.contest_rows import alphacode_prompt
from wmtp.eval import (
    alphacode_protocol,
    chat_protocol,
    code_contests,
    packaged_function_tasks,
    packaged_program_tasks,
)
from wmtp.pretrained import byte_tokenizer
from wmtp.sandbox import Limits, Outcome, StdioTest

TOKENIZER = byte_tokenizer()
ROW = {
    "name": "1_A. Sum",
    "description": "Add.\r\nTwo numbers.\n\nEnd.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["2 2\n", "0 0\n"], "output": ["4\n", "0\n"]},
    "generated_tests": {"input": ["5 5\n"], "output": ["10\n"]},
    "solutions": {"language": [3, 2, 1, 3], "solution": ["py3", "cpp", "py2", "py3 too"]},
    "incorrect_solutions": {"language": [], "solution": []},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
    "memory_limit_bytes": 256_000_000,
    "difficulty": 7,
    "cf_rating": 800,
    "cf_tags": ["math", "", "greedy"],
    "source": 2,
}


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def outcome(tests, lenient=()) -> Outcome:
    return Outcome(tests[-1] if tests else "harness_error", "", tuple(tests), tuple(lenient), 0.0, 0.0)


def test_a_row_of_the_dataset(tmp_path):
    [task] = code_contests(write(tmp_path / "c.jsonl", ROW))
    assert task.task_id == task.name == "1_A. Sum"
    assert (task.time_limit_seconds, task.memory_limit_bytes, task.rating) == (1.5, 256_000_000, 800)
    assert task.tags == ("math", "greedy") and task.difficulty == 7 and task.solutions == ("py3", "py3 too")
    assert task.tests == (*task.public_tests, *task.private_tests, *task.generated_tests)
    assert task.tests[0] == StdioTest("1 2\n", "3\n") and task.tests[-1] == StdioTest("5 5\n", "10\n")
    job = task.job("program", machine_factor=3)
    assert (job.program, job.tests) == ("program", task.tests)
    assert (job.limits.cpu_seconds, job.limits.memory_bytes) == (4.5, 1_024_000_000)
    assert job.limits.wall_seconds == Limits().wall_seconds
    assert task.job("p", machine_factor=40).limits.wall_seconds == 300  # never shorter than the CPU time allows


def test_unknown_limits_are_the_sandboxs(tmp_path):
    row = {"name": "n", "description": "d", "tests": {"input": ["a"], "output": ["b"]}, "tags": ["dp"]}
    zero = {**ROW, "time_limit": None, "memory_limit_bytes": 0}
    task, other = code_contests(write(tmp_path / "c.jsonl", row, zero))
    assert task.private_tests == (StdioTest("a", "b"),) and task.public_tests == task.generated_tests == ()
    assert (task.rating, task.tags, task.solutions) == (0, ("dp",), ())
    for unknown in (task, other):
        assert unknown.time_limit_seconds is unknown.memory_limit_bytes is None
        assert unknown.job("p", machine_factor=9).limits == Limits()
        assert unknown.job("p", limits=Limits(cpu_seconds=1)).limits == Limits(cpu_seconds=1)


def test_public_passes_and_the_lenient_rule_are_read_from_the_outcome(tmp_path):
    [task] = code_contests(write(tmp_path / "c.jsonl", ROW))  # 1 public test of 4
    assert task.passes_public(outcome(["passed"] * 4)) and task.passes_public(outcome(["passed", "timeout"]))
    assert not task.passes_public(outcome(["wrong_answer"])) and not task.passes_public(outcome([]))
    assert replace(task, public_tests=()).passes_public(outcome(["wrong_answer"]))
    assert task.passes_lenient(outcome(["passed"] * 4, [True] * 4)) is True
    assert task.passes_lenient(outcome(["passed", "wrong_answer"], [True, False])) is False
    assert task.passes_lenient(outcome(["passed", "wrong_answer"], [True, True])) is None  # judging stopped before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "field 'name' is null"),
        ({kind: {"input": [], "output": []} for kind in ROW if kind.endswith("_tests")}, "no tests; a problem needs"),
        ({"public_tests": {"input": ["a"], "output": []}}, "public_tests must be equally many .*, got 1 and 0"),
        ({"public_tests": {"input": [1], "output": [1]}}, "public_tests must be equally many input and output texts"),
        ({"hidden_tests": {"input": ["a"], "output": ["b"]}}, "nobody runs what the column 'hidden_tests' holds"),
        ({"public_tests": [1]}, "field 'public_tests' must be an object, got list"),
        ({"public_tests": {"input": ["a"]}}, "field 'public_tests': field 'output' is missing; the row has input"),
        ({"time_limit": {"seconds": 0, "nanos": 0}}, "time_limit must be null or {seconds, nanos} of more than 0 s"),
        ({"time_limit": 2}, "time_limit must be null or {seconds, nanos} of more than 0 s, got 2"),
        ({"cf_rating": -1}, "field 'cf_rating' must be >= 0"),
        ({"solutions": {"language": [3], "solution": []}}, "solutions has 1 languages and 0 programs"),
        ({"name": "first"}, "task_id 'first' is also that of .*:1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(changes, message, tmp_path):
    source = write(tmp_path / "c.jsonl", {**ROW, "name": "first"}, {**ROW, **changes})
    with pytest.raises(ValueError, match=rf"c\.jsonl:2: {message}") as error:
        code_contests(source)
    assert "\n" not in str(error.value)


def test_empty_files_and_bad_factors(tmp_path):
    with pytest.raises(ValueError, match=r"c\.jsonl: no tasks"):
        code_contests(write(tmp_path / "c.jsonl"))
    [task] = code_contests(write(tmp_path / "c.jsonl", ROW))
    with pytest.raises(ValueError, match="machine_factor must be a number > 0, got 0"):
        task.job("p", machine_factor=0)
    with pytest.raises(ValueError, match="field 'gold_passes_exactly' is missing"):
        code_contests(write(tmp_path / "c.jsonl", ROW), reproducible_only=True)


def test_limit_reads_no_further_than_asked(tmp_path):
    source = write(tmp_path / "c.jsonl", ROW, {"name": "broken"})
    assert len(code_contests(source, limit=1)) == 1


def test_the_packaged_programs():
    tasks = packaged_program_tasks()
    assert len(tasks) == 12 and all(len(task.solutions) == 2 and task.public_tests for task in tasks)
    assert all(task.job("p").limits.cpu_seconds == 4 for task in tasks)
    assert [task.name for task in packaged_program_tasks(ids=["ferry_queue"])] == ["ferry_queue"]


@needs("code_contests")
def test_the_real_problems():
    source = str(DATA / "code_contests" / "problems.jsonl")
    tasks = code_contests(source)
    assert len(tasks) == 200 and len(code_contests(source, reproducible_only=True)) == 153
    assert all(task.private_tests and not task.public_tests and task.solutions for task in tasks)


def test_the_alphacode_prompt_asks_for_a_correct_solution(tmp_path):
    [task] = code_contests(write(tmp_path / "c.jsonl", ROW))
    statement = "# Add.\n# Two numbers.\n#\n# End.\n"
    expected = f"# RATING: 800\n# TAGS: math,greedy\n# LANGUAGE IS python3\n# CORRECT SOLUTION\n{statement}"
    protocol = alphacode_protocol()
    assert TOKENIZER.decode(protocol.prompt(task, TOKENIZER)) == expected
    assert protocol.program(task, "print(3)\n# RATING: 900\n# TAGS: dp") == "print(3)"
    bare = task.description
    assert alphacode_prompt(bare) == f"# LANGUAGE IS python3\n# CORRECT SOLUTION\n{statement}"
    assert alphacode_prompt(bare, correct=False).splitlines()[1] == "# INCORRECT SOLUTION"
    assert alphacode_protocol(rating=0, tags=[]).render(task) == alphacode_prompt(bare)
    assert alphacode_protocol(rating=3500, tags=["dp"]).render(task).startswith("# RATING: 3500\n# TAGS: dp\n")
    with pytest.raises(ValueError, match="is for programs that read stdin; task packaged/1 asks for a function"):
        protocol.prompt(packaged_function_tasks(limit=1)[0], TOKENIZER)


def test_no_statement_can_leave_the_comment(tmp_path):
    hostile = "a\x0cimport os\x1cb\u2028c\x85d\re\r\nf"
    [task] = code_contests(write(tmp_path / "c.jsonl", {**ROW, "description": hostile}))
    assert compile(alphacode_prompt(task.description), "prompt", "exec").co_consts == (None,)


def test_the_chat_prompt_holds_the_statement_and_the_answer_is_its_code_block(tmp_path):
    [task] = code_contests(write(tmp_path / "c.jsonl", ROW))
    [message] = chat_protocol().render(task)
    assert message["role"] == "user" and message["content"].endswith(ROW["description"])
    assert chat_protocol().program(task, "It is:\n```python\nprint(3)\n```") == "print(3)\n"
