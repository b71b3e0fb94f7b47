"""Before anything is judged: each task's own solution passes its tests, and a program that answers nothing does not."""

import json
import sys

import pytest
from processes import start

from wmtp.distributed import start_world
from wmtp.eval import assertion_tasks, packaged_program_tasks
from wmtp.eval.golds import asserts_literally, settle_tests
from wmtp.sandbox import Limits, Sandbox

ROW = {
    "text": "",
    "code": "def f(x):\n    if x < 0: raise ValueError\n    return x\n",
    "test_list": ["assert f(1) == 1"],
}
# What no other process can give back: the names of the function's own local variables.
FOR_INSIDE = {**ROW, "test_list": ["assert f(1) == 1", "assert f.__code__.co_varnames == ('x',)"]}
FAILING = {**ROW, "test_list": ["assert f(1) == 2"]}
MISSING = {**ROW, "test_list": ["import no_such_module\nno_such_module.check(f(1))"]}


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as box:
        yield box


@pytest.fixture
def settle(sandbox, tmp_path):
    """Settle the tests of rows; the modes by task id, and the lines said."""

    def run(rows, tests="protected", **options):
        path, lines = tmp_path / "tasks.jsonl", []
        path.write_text("".join(json.dumps({**row, "task_id": name}) + "\n" for name, row in rows.items()))
        tasks = settle_tests(assertion_tasks(str(path), **options), sandbox, tests=tests, log=lines.append)
        return {task.task_id: task.inside for task in tasks}, lines

    return run


def refusal(settle, *args, **options) -> str:
    with pytest.raises(ValueError, match="cannot be judged") as error:
        settle(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tasks_that_need_it_are_refused_or_judged_inside(settle):
    rows = {"a": ROW, "b": FOR_INSIDE, "c": FOR_INSIDE}
    assert settle({"a": ROW}) == settle({"a": ROW}, "inside") == ({"a": False}, [])
    line = refusal(settle, rows)
    assert line.startswith("2 of 3 tasks cannot be judged (b: protected tests cannot express it: ")
    assert "; set tests=inside to run the tests of 2 in the program's process" in line
    assert line.endswith("or leave all out with tasks.exclude=[b,c]")
    line = refusal(settle, {**rows, "d": FAILING})
    assert "; set tests=inside and tasks.exclude=[d] to run the tests of 2 in" in line
    assert line.endswith("or leave all out with tasks.exclude=[d,b,c]")
    modes, [said] = settle(rows, "inside")
    assert modes == {"a": False, "b": True, "c": True}
    assert said.startswith("2 of 3 tasks are judged inside") and said.endswith(": b, c")
    assert settle(rows, exclude=["b", "c"]) == ({"a": False}, [])


@pytest.mark.parametrize("tests", ["protected", "inside"])
def test_a_solution_that_fails_in_every_mode_is_refused_by_name(settle, tests):
    line = refusal(settle, {"a": ROW, "b": FAILING, "c": MISSING}, tests)
    assert line.startswith("2 of 3 tasks cannot be judged (b: its own solution fails: wrong_answer, test 0: Assertion")
    assert "No module named 'no_such_module'" in line and "tests=inside" not in line
    assert line.endswith("mend them, or leave them out with tasks.exclude=[b,c]")


ASSERTING = {
    "numpy.testing": "import numpy as np\nnp.testing.assert_allclose(f(0.1 + 0.2), 0.3)",
    "pytest.raises": "import pytest\nwith pytest.raises(ValueError): f(-1)",
    "unittest": "import unittest\nunittest.TestCase().assertEqual(f(1), 1)",
    "a helper": "def assertion(out, exp):\n  if out != exp: raise AssertionError\nassertion(f(1), 1)",
    "an imported helper": "from operator import truediv\ntruediv(1, f(1) == 1)",
}
ASSERTING_NOTHING = {
    "a call": "f(1)",
    "a comparison": "f(1) == 1",
    "what is never called": "def check(candidate):\n  assert candidate(1) == 1\nx = f(1)",
    "a class that nobody runs": "from unittest import *\nclass T(TestCase):\n  def test(self): self.assertTrue(f(1))",
}


def test_tests_may_assert_without_the_word(settle):
    """They are accepted where they fail a program that answers nothing; the others are named, all in one line."""
    rows = {name: {**ROW, "test_list": [test]} for name, test in (ASSERTING | ASSERTING_NOTHING).items()}
    assert {name for name, row in rows.items() if asserts_literally(row["test_list"][0])} == {"a helper"}
    modes, _ = settle({name: rows[name] for name in ASSERTING})
    assert modes == dict.fromkeys(ASSERTING, False)
    for tests in ("protected", "inside"):
        line = refusal(settle, rows, tests)
        assert line.startswith(f"{len(ASSERTING_NOTHING)} of {len(rows)} tasks cannot be judged (")
        assert "a call: test 'f(1)' asserts nothing, so every program would pass it" in line
        assert line.endswith(f"tasks.exclude=[{','.join(ASSERTING_NOTHING)}]")


def test_tests_that_never_use_the_program_are_no_tests_inside_either(settle):
    for tests in ("protected", "inside"):
        line = refusal(settle, {"a": {**ROW, "test_list": ["assert 1 == 1"]}, "b": ROW}, tests)
        assert line.startswith("1 of 2 tasks cannot be judged (a: test 'assert 1 == 1' asserts nothing, so")


def test_challenge_tests_that_are_not_run_are_said(settle):
    row = {**ROW, "challenge_test_list": ["assert f(2) == 2", "assert f(3) == 3"]}
    _, [said] = settle({"a": row, "b": ROW, "c": row})
    assert said == "4 challenge tests of 2 tasks are not run; tasks.challenge_tests=true runs them too"
    assert settle({"a": row}, challenge_tests=True) == ({"a": False}, [])


def test_programs_with_stdin_stay_as_they_are(sandbox):
    tasks = packaged_program_tasks()
    assert settle_tests(tasks, sandbox) == tasks


def settle_in_a_world(path):
    start_world("cpu")
    with Sandbox(workers=1, limits=Limits()) as sandbox:
        try:
            tasks = settle_tests(assertion_tasks(path), sandbox, tests="inside")
            print("settled", [task.inside for task in tasks], flush=True)
        except ValueError as error:
            print("refused", error, flush=True)
            sys.exit(1)


@pytest.mark.long
def test_every_rank_gets_rank_0s_finding(tmp_path):
    for name, rows, code in (("good", [ROW, FOR_INSIDE], 0), ("bad", [ROW, FAILING], 1)):
        path, log = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.txt"
        path.write_text("".join(json.dumps({**row, "task_id": str(n)}) + "\n" for n, row in enumerate(rows)))
        start(settle_in_a_world, str(path), size=2, log=log).join(code=code)
        lines = [line for line in log.read_text().splitlines() if line.startswith(("settled", "refused"))]
        assert len(lines) == 2 and len(set(lines)) == 1, log.read_text()
        assert lines[0].startswith(
            "settled [False, True]" if code == 0 else "refused 1 of 2 tasks cannot be judged (1: "
        )
