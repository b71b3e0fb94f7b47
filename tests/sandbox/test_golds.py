"""The data sets' own solutions pass, on an idle machine and on a busy one; the packaged wrong programs fail."""

import multiprocessing
import os

import golds
import pytest
from shared_data import needs

from wmtp.data import packaged_functions, packaged_programs
from wmtp.eval import packaged_function_tasks, packaged_program_tasks
from wmtp.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def failures(sandbox, tasks):
    """What did not pass, by name."""
    outcomes = sandbox.judge(job for _, job in tasks)
    return {name: outcome for (name, _), outcome in zip(tasks, outcomes, strict=True) if outcome.verdict != "passed"}


@needs("mbpp")
@pytest.mark.parametrize(("split", "count"), [("train", 374), ("validation", 90), ("test", 500)])
def test_mbpp(split, count, sandbox):
    tasks = golds.mbpp(split)
    assert len(tasks) == count
    assert failures(sandbox, tasks) == {}


@needs("humaneval")
def test_humaneval(sandbox):
    tasks = golds.humaneval()
    assert len(tasks) == 164
    assert failures(sandbox, tasks) == {}


@needs("mbppplus")
def test_mbppplus(sandbox):
    """Their solutions pass base and plus; a table of the tests shown passes base alone."""
    tasks = golds.mbppplus()
    assert len(tasks) == 30 and failures(sandbox, golds.gold_jobs(tasks)) == {}
    outcomes = sandbox.judge(task.job(recited(task)) for task in tasks)
    known = {task.task_id: outcome for task, outcome in zip(tasks, outcomes, strict=True)}
    assert all(task.passes_base(known[task.task_id]) for task in tasks), known
    assert [name for name, outcome in known.items() if outcome.verdict == "passed"] == []


def recited(task) -> str:
    """A program that knows the answers to the shown tests by their arguments, from the task's own solution."""
    return f"""
{task.solution}
def _table():
    known, right = {{}}, {task.entry_point}
    def note(*arguments):
        known[repr(arguments)] = right(*arguments)
        return known[repr(arguments)]
    for test in {task.tests!r}:
        exec(test, dict(globals(), {task.entry_point}=note))
    return known
_known = _table()
def {task.entry_point}(*arguments):
    return _known.get(repr(arguments))
"""


@needs("leetcode")
def test_leetcode(sandbox):
    tasks = golds.leetcode(100)
    assert len(tasks) == 100
    assert failures(sandbox, tasks) == {}


@needs("code_contests")
@pytest.mark.long
def test_code_contests(sandbox):
    tasks = golds.contests(tests_each=3)
    assert len(tasks) == 153
    assert failures(sandbox, tasks) == {}


def spin():
    while True:
        pass


@pytest.fixture
def busy_machine():
    """One spinning process per core, started and ended here."""
    processes = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(os.cpu_count())]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.kill()
        process.join()


@needs("mbpp")
@needs("humaneval")
@needs("code_contests")
def test_golds_pass_under_load(sandbox, busy_machine):
    """Sixty of them; `benchmarks/judging.py --golds --load` runs all of them, with all tests, several times."""
    assert failures(sandbox, golds.all_golds(tests_each=1)[::20][:60]) == {}


def test_packaged_functions(sandbox):
    tasks = packaged_function_tasks()
    wrong = sandbox.judge(task.job(row["wrong_code"]) for task, row in zip(tasks, packaged_functions(), strict=True))
    assert failures(sandbox, golds.gold_jobs(tasks)) == {}
    assert {outcome.verdict for outcome in wrong} <= {"wrong_answer", "exception", "timeout"}


def test_packaged_programs(sandbox):
    for task, row in zip(packaged_program_tasks(), packaged_programs(), strict=True):
        for kind, passes in (("solutions", True), ("incorrect_solutions", False)):
            jobs = [task.job(text, stop_at_first_failure=False) for text in row[kind]["solution"]]
            outcomes = sandbox.judge(jobs)
            assert [outcome.verdict == "passed" for outcome in outcomes] == [passes] * len(jobs)
            if not passes:  # each passes at least one test and fails at least one, and no test is left out
                assert all({"passed"} < set(outcome.tests) for outcome in outcomes)
                assert [len(outcome.tests) for outcome in outcomes] == [len(job.tests) for job in jobs]
