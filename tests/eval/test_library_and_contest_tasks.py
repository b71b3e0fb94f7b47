"""LiveCodeBench's and BigCodeBench's task shapes, and tests as `unittest` and `pytest` collect them, judged."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from wmtp.eval import AssertionTask, StdioTask, assertion_tasks, bigcodebench_tasks, live_code_bench
from wmtp.eval.golds import settle_tests
from wmtp.eval.protocols import bigcode_protocol, chat_protocol, humaneval_protocol
from wmtp.sandbox import Limits, Sandbox


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def packed(tests: list[dict]) -> str:
    """Tests in the form of the published files' larger ones."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def cases(kind: str, *pairs: tuple[str, str]) -> list[dict]:
    return [{"input": given, "output": expected, "testtype": kind} for given, expected in pairs]


PROBLEM = {
    "question_title": "Halves",
    "question_content": "Print half of each number.",
    "platform": "atcoder",
    "question_id": "abc300_a",
    "contest_id": "abc300",
    "contest_date": "2024-08-03T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(cases("stdin", ("2\n", "1\n"))),
    "private_test_cases": packed(cases("stdin", ("3 4\n", "1.5 2\n"))),
    "metadata": "{}",
}
METHOD = {
    **PROBLEM,
    "question_id": "3091",
    "platform": "leetcode",
    "contest_date": "2024-10-06T00:00:00",
    "question_content": "Return the places of the number.",
    "starter_code": "class Solution:\n    def places(self, numbers: List[int], number: int) -> List[int]:\n        ",
    "public_test_cases": json.dumps(cases("functional", ("[1, 2, 1]\n1", "[0, 2]"))),
    "private_test_cases": packed(cases("functional", ("[]\n7", "[]"), ("[7]\n7", "[0]"))),
    "metadata": '{"func_name": "places"}',
}
COMPLETE = '''import pandas as pd
import random

def task_func(values, path):
    """
    Write the values as one column to a CSV file and return their sum; raise ValueError where there are none.
    """
'''
LIBRARY = {
    "task_id": "BigCodeBench/0",
    "complete_prompt": COMPLETE,
    "instruct_prompt": "Write the values as one column to a CSV file and return their sum. Start with:\n```\n...\n```",
    "canonical_solution": "    if not values:\n        raise ValueError('no values')\n"
    "    frame = pd.DataFrame({'value': values})\n    frame.to_csv(path, index=False)\n    return frame['value'].sum()",
    "code_prompt": "import pandas as pd\nimport random\ndef task_func(values, path):\n",
    "test": """
import os, tempfile, unittest
from unittest.mock import patch
import numpy as np
class TestCases(unittest.TestCase):
    def setUp(self):
        self.path = os.path.join(tempfile.mkdtemp(), 'v.csv')
    def test_sum(self):
        np.testing.assert_allclose(task_func([1.5, 2], self.path), 3.5)
        self.assertEqual(pd.read_csv(self.path)['value'].tolist(), [1.5, 2])
    def test_none(self):
        with self.assertRaises(ValueError):
            task_func([], self.path)
    def test_writes_with_pandas(self):
        with patch('pandas.DataFrame.to_csv') as written:
            task_func([1], self.path)
        written.assert_called_once()
""",
    "entry_point": "task_func",
    "doc_struct": "{}",
    "libs": "['pandas', 'random']",
}
LIMITS = Limits(memory_bytes=2 << 30)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2, limits=LIMITS) as box:
        yield box


def verdicts(sandbox, task, *programs: str) -> list[str]:
    return [outcome.verdict for outcome in sandbox.judge(task.job(program, limits=LIMITS) for program in programs)]


# ---- LiveCodeBench


def test_livecodebench_problems_of_both_kinds_are_judged_as_their_harness_does(sandbox, tmp_path):
    source = write(tmp_path / "lcb.jsonl", PROBLEM, METHOD)
    stdin, method = settle_tests(live_code_bench(source), sandbox, log=(said := []).append)
    assert said == ["1 of 2 tasks have no solution: nothing shows whether their tests can be passed"]
    assert isinstance(stdin, StdioTask) and stdin.task_id == "abc300_a" and isinstance(method, AssertionTask)
    halves = "print(*(int(x) / 2 for x in stdin.read().split()))"  # what the harness imports: from sys import *
    assert verdicts(sandbox, stdin, halves, "from __future__ import annotations\n" + halves) == ["passed", "passed"]
    assert verdicts(sandbox, stdin, "print(1)", "import sys; sys.exit(0)", "print('1 e')") == ["wrong_answer"] * 3
    [outcome] = sandbox.judge([stdin.job("print(1.0)", limits=LIMITS)])
    assert outcome.tests == ("passed", "wrong_answer") and stdin.passes_public(outcome)
    right = "class Solution:\n  def places(self, numbers: List[int], number):\n    return {}\n"
    found = "[i for i, n in enumerate(numbers) if n == number]"
    assert verdicts(sandbox, method, right.format(found), right.format(f"tuple({found})")) == ["passed", "passed"]
    lying = "class A(list):\n  def __eq__(self, other): return True\n" + right.format("A()")
    assert verdicts(sandbox, method, right.format("[0, 2]"), lying) == ["wrong_answer"] * 2
    assert method.job("").inside is False


def test_each_call_of_a_livecodebench_function_has_the_limit_for_itself(sandbox, tmp_path):
    method = live_code_bench(write(tmp_path / "lcb.jsonl", METHOD))[0]
    slow = """import time
class Solution:
  def places(self, numbers, number):
    seconds = {seconds}
    while time.process_time() < seconds: pass
    return [i for i, n in enumerate(numbers) if n == number]
"""
    limits = Limits(cpu_seconds=1.0, memory_bytes=2 << 30)
    programs = slow.format(seconds="time.process_time() + 0.6"), slow.format(seconds="5 if not numbers else 0")
    patient, stuck = sandbox.judge(method.job(program, limits=limits) for program in programs)
    assert patient.tests == ("passed",) * 3 and patient.cpu_seconds > 1.8
    assert stuck.tests == ("passed", "timeout") and stuck.detail.startswith("test 1: more than 1 s of CPU time")


def test_livecodebench_prompts_show_the_statement_and_no_hidden_test(tmp_path):
    tasks = live_code_bench(write(tmp_path / "lcb.jsonl", PROBLEM, METHOD))
    stdin, method = (chat_protocol().render(task)[0]["content"] for task in tasks)
    assert "Print half" in stdin and "1.5" not in stdin
    assert "class Solution" in method and "assert" not in method and "candidate" not in method
    for protocol in (bigcode_protocol(), humaneval_protocol()):
        with pytest.raises(ValueError, match="3091"):
            protocol.render(tasks[1])


def test_livecodebench_problems_are_chosen_by_the_day_of_their_contest(tmp_path):
    source = write(tmp_path / "lcb.jsonl", PROBLEM, METHOD)
    ids = lambda **dates: [task.task_id for task in live_code_bench(source, **dates)]
    assert ids(start_date="2024-08-03", end_date="2024-10-05") == ["abc300_a"]
    assert ids(start_date="2024-08-04") == ["3091"]
    with pytest.raises(ValueError, match=r"lcb\.jsonl \(split test\): no tasks"):
        ids(start_date="2025-01-01")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("here_it_ran",)


def pickled(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"private_test_cases": pickled(Runs())}, "names posix.mkdir, where only a text may be"),
        ({"private_test_cases": pickled(["[]"])}, "is the pickle of a list, where only a text may be"),
        ({"private_test_cases": pickled("no JSON")}, "is no JSON: .*'no JSON'"),
        ({"private_test_cases": base64.b64encode(zlib.compress(b"abc")).decode()}, "neither JSON nor base64"),
        ({"private_test_cases": pickled("[]")[:-20]}, "neither JSON nor base64|is cut off"),
        ({"private_test_cases": '["a"]'}, "must be a JSON list of objects with the texts input, output and testtype"),
        ({"private_test_cases": "[]", "public_test_cases": "[]"}, "no tests; a problem needs public_test_cases"),
        ({"public_test_cases": METHOD["public_test_cases"]}, "testtype must be stdin or functional, alike"),
        ({**METHOD, "metadata": "{}"}, "field 'metadata' must name the function as func_name, got {}"),
        ({**METHOD, "public_test_cases": json.dumps(cases("functional", ("[1", "1")))}, "a test's input is no JSON"),
        ({"question_id": None}, "field 'question_id' is null"),
    ],
)
def test_a_bad_problem_is_refused_in_one_line_and_runs_nothing(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"lcb\.jsonl:2: .*{message}|lcb\.jsonl:2: {message}") as error:
        live_code_bench(write(tmp_path / "lcb.jsonl", {**PROBLEM, "question_id": "first"}, {**PROBLEM, **change}))
    assert "\n" not in str(error.value) and not (tmp_path / "here_it_ran").exists()


# ---- BigCodeBench


def test_bigcodebench_is_judged_inside_its_gold_passes_and_wrong_programs_do_not(sandbox, tmp_path):
    tasks = bigcodebench_tasks(write(tmp_path / "bcb.jsonl", LIBRARY))
    with pytest.raises(ValueError, match=r"1 of 1 tasks cannot be judged .*its tests patch what .*set tests=inside"):
        settle_tests(tasks, sandbox)
    [task] = settle_tests(tasks, sandbox, tests="inside", log=(said := []).append)
    assert task.inside and "1 of 1 tasks are judged inside" in said[0] and task.gold_seconds > 0
    complete = task.program("    pd.DataFrame({'value': values}).to_csv(path, index=False)\n    return sum(values)\n")
    never_raises, answers_nothing, ends = complete, task.program("    return 3.5\n"), "import os\nos._exit(0)"
    assert verdicts(sandbox, task, never_raises, answers_nothing) == ["wrong_answer", "wrong_answer"]
    assert verdicts(sandbox, task, ends, task.program("    raise KeyError('x')")) == ["exception", "exception"]
    [outcome] = sandbox.judge([task.job(complete, limits=LIMITS)])
    assert outcome.judged == "inside" and "ValueError not raised" in outcome.detail


def test_bigcodebench_asks_for_a_completion_or_in_words(tmp_path):
    [task] = bigcodebench_tasks(write(tmp_path / "bcb.jsonl", LIBRARY))
    assert humaneval_protocol().render(task) == COMPLETE
    assert chat_protocol().render(task)[0]["content"].startswith(LIBRARY["instruct_prompt"])


def test_bigcodebench_names_libraries_that_are_not_here_or_leaves_their_tasks_out(tmp_path):
    absent = {**LIBRARY, "task_id": "BigCodeBench/1", "libs": "['no_such_library.part', 'pandas']"}
    source = write(tmp_path / "bcb.jsonl", LIBRARY, absent)
    with pytest.raises(ValueError, match="1 of 2 tasks need libraries that are not installed: no_such_library; inst"):
        bigcodebench_tasks(source)
    tasks = bigcodebench_tasks(source, installed_only=True)
    assert [task.task_id for task in tasks] == ["BigCodeBench/0"] and tasks.left_out == {"BigCodeBench/1"}
    with pytest.raises(ValueError, match="no tasks; each needs a library that is not installed: no_such_library"):
        bigcodebench_tasks(source, installed_only=True, ids=[1])
    assert len(bigcodebench_tasks(source, exclude=[1])) == 1
    with pytest.raises(ValueError, match=r"bcb\.jsonl:1: field 'test' must define a unittest.TestCase with tests"):
        bigcodebench_tasks(write(tmp_path / "bcb.jsonl", {**LIBRARY, "test": "assert task_func"}))


# ---- Tests of unittest and pytest in any file

ROW = {"task_id": 1, "prompt": "def f(x):\n", "entry_point": "f", "canonical_solution": "    return 1 / x\n"}
STYLES = {
    "a test case": "import unittest\nclass T(unittest.TestCase):\n"
    "  def setUp(self): self.x = 2\n  def test_half(self): self.assertAlmostEqual(f(self.x), 0.5)\n"
    "  def test_zero(self): self.assertRaises(ZeroDivisionError, f, 0)\n",
    "functions of pytest": "import pytest\ndef test_half(): assert f(2) == pytest.approx(0.5)\n"
    "def test_zero():\n  with pytest.raises(ZeroDivisionError): f(0)\n",
    "a class of pytest": "import numpy as np\nclass TestF:\n"
    "  def test_half(self): np.testing.assert_allclose(f(2), 0.5)\n  def test_minus(self): assert f(-2) < 0\n",
    "what its end calls": "def check_all():\n  assert f(2) == 0.5\ndef check(candidate): check_all()\n",
}
INSIDE = "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(f.__code__.co_argcount, 1)\n"


def test_tests_of_unittest_and_pytest_are_run_and_protected_where_they_can_be(sandbox, tmp_path):
    rows = [{**ROW, "task_id": name, "test": test} for name, test in STYLES.items()]
    tasks = settle_tests(assertion_tasks(write(tmp_path / "t.jsonl", *rows)), sandbox)
    right, wrong = "def f(x): return 1 / x", "def f(x): return 1 // (x or 1)"
    lying = "class A(float):\n  def __eq__(self, other): return True\ndef f(x): return A(1 / x)"
    for task in tasks:
        assert verdicts(sandbox, task, right, wrong) == ["passed", "wrong_answer"], task.task_id
        assert verdicts(sandbox, task, lying) != ["harness_error"] and not task.inside, task.task_id
    row = {**ROW, "test": INSIDE}
    [task] = settle_tests(assertion_tasks(write(tmp_path / "i.jsonl", row)), sandbox, tests="inside")
    assert task.inside and verdicts(sandbox, task, right, "def f(x, y=1): return 1 / x") == ["passed", "wrong_answer"]


@pytest.mark.parametrize(
    "test, message",
    [
        ("def test_f(tmp_path): assert f(1)", "the test test_f takes the fixture 'tmp_path', which only pytest's own"),
        (
            "import pytest\n@pytest.mark.parametrize('x', [1])\ndef test_f(x=1): assert f(x)",
            "is marked pytest.mark.para",
        ),
        ("class TestF:\n  def test_f(self, capsys): assert f(1)", "the test test_f takes the fixture 'capsys'"),
        ("class T: pass", r"must define check\(candidate\), a unittest.TestCase or functions test"),
    ],
)
def test_what_only_pytest_could_run_is_refused(test, message, tmp_path):
    with pytest.raises(ValueError, match=rf"t\.jsonl:1: field 'test'.*{message}") as error:
        assertion_tasks(write(tmp_path / "t.jsonl", {**ROW, "test": test}))
    assert "\n" not in str(error.value)
