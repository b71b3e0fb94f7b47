"""The packaged tasks: correct programs pass every test, wrong ones fail some and pass some, fault lines are right."""

import ast
import json
import subprocess
import sys

import pytest

from wmtp.data.packaged import packaged_functions, packaged_programs

FUNCTIONS = packaged_functions()
PROGRAMS = packaged_programs()
TEST_KINDS = ("public_tests", "private_tests", "generated_tests")

# Reads a list of jobs {"code", "asserts"} or {"code", "inputs"}; writes each job's list of passed or of stdout texts.
# A job's test that raises, or that runs for more than the limit, gives False or None.
RUNNER = """
import contextlib, io, json, signal, sys

def stop(*_):
    raise TimeoutError

def fails_as(value, run):
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        return run()
    except Exception:
        return value
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

def run_assert(program, statement):
    names = {}
    exec(program, names)
    exec(statement, names)
    return True

def run_program(program, text):
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {"__name__": "__main__"})
    return out.getvalue()

signal.signal(signal.SIGALRM, stop)
answers = []
for job in json.load(sys.stdin):
    program = compile(job["code"], "program", "exec")
    if "asserts" in job:
        answers.append([fails_as(False, lambda: run_assert(program, statement)) for statement in job["asserts"]])
    else:
        answers.append([fails_as(None, lambda: run_program(program, text)) for text in job["inputs"]])
json.dump(answers, sys.__stdout__)
"""


def run_jobs(jobs: list[dict]) -> list[list]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUNNER], input=json.dumps(jobs), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def all_tests(task: dict, *kinds: str) -> tuple[list[str], list[str]]:
    """The inputs and the outputs of a program task's tests, joined over the kinds in order."""
    kinds = kinds or TEST_KINDS
    inputs = [text for kind in kinds for text in task[kind]["input"]]
    outputs = [text for kind in kinds for text in task[kind]["output"]]
    return inputs, outputs


def test_counts_and_unique_names():
    assert [task["task_id"] for task in FUNCTIONS] == list(range(1, 37))
    assert len({task["text"] for task in FUNCTIONS}) == 36
    assert len(PROGRAMS) == len({task["name"] for task in PROGRAMS}) == 12


def test_rows_are_fresh_at_every_call():
    packaged_functions()[0]["test_list"].clear()
    packaged_programs()[0]["public_tests"]["input"].clear()
    assert (packaged_functions(), packaged_programs()) == (FUNCTIONS, PROGRAMS)


@pytest.mark.parametrize("task", FUNCTIONS, ids=lambda task: str(task["task_id"]))
def test_function_fields(task):
    kinds = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
    kinds |= {"challenge_test_list": list, "wrong_code": str, "fault_line": int}
    assert {name: type(value) for name, value in task.items()} == kinds
    assert task["text"].startswith("Write a ")
    assert len(task["test_list"]) >= 4
    statements = task["test_list"] + task["challenge_test_list"]
    assert len(set(statements)) == len(statements)
    defined = {node.name for node in ast.parse(task["code"]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for statement in statements:
        (node,) = ast.parse(statement).body
        assert isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare)
        assert [type(operator) for operator in node.test.ops] == [ast.Eq]
        called = {name.id for name in ast.walk(node.test.left) if isinstance(name, ast.Name)}
        assert called & defined, f"{statement} calls none of {defined}"


@pytest.mark.parametrize("task", FUNCTIONS, ids=lambda task: str(task["task_id"]))
def test_wrong_code_differs_from_code_in_the_fault_line_alone(task):
    assert task["code"].endswith("\n") and "\r" not in task["code"] + task["wrong_code"]
    right, wrong = task["code"].splitlines(), task["wrong_code"].splitlines()
    differing = [number for number, (a, b) in enumerate(zip(right, wrong, strict=True), start=1) if a != b]
    assert differing == [task["fault_line"]]


@pytest.mark.parametrize("task", PROGRAMS, ids=lambda task: task["name"])
def test_program_fields(task):
    assert set(task) == {
        "name", "description", *TEST_KINDS, "solutions", "incorrect_solutions", "time_limit", "memory_limit_bytes",
        "difficulty", "cf_rating", "cf_tags", "source",
    }  # fmt: skip
    assert task["time_limit"] == {"seconds": 2, "nanos": 0} and task["memory_limit_bytes"] == 256 * 2**20
    assert task["difficulty"] in (1, 2, 3) and task["cf_rating"] == task["source"] == 0 and task["cf_tags"]
    for kind, fewest in zip(TEST_KINDS, (2, 4, 2), strict=True):
        assert set(task[kind]) == {"input", "output"}
        assert len(task[kind]["input"]) == len(task[kind]["output"]) >= fewest
    inputs, outputs = all_tests(task)
    assert len(set(inputs)) == len(inputs) and all(text.endswith("\n") for text in inputs + outputs)
    for example in zip(*all_tests(task, "public_tests"), strict=True):
        assert "Input\n{}Output\n{}".format(*example) in task["description"]
    for kind, count in (("solutions", 2), ("incorrect_solutions", 1)):
        assert set(task[kind]) == {"language", "solution"} and len(task[kind]["solution"]) >= count
        assert task[kind]["language"] == [3] * len(task[kind]["solution"])
        assert all(source.endswith("\n") and "\r" not in source for source in task[kind]["solution"])


def test_correct_functions_pass_all_asserts_and_wrong_ones_only_some():
    right = [{"code": t["code"], "asserts": t["test_list"] + t["challenge_test_list"]} for t in FUNCTIONS]
    wrong = [{"code": t["wrong_code"], "asserts": t["test_list"]} for t in FUNCTIONS]
    answers = run_jobs(right + wrong)
    for task, right_passes, wrong_passes in zip(FUNCTIONS, answers[:36], answers[36:], strict=True):
        assert all(right_passes), f"task {task['task_id']}: code fails {right_passes}"
        assert any(wrong_passes) and not all(wrong_passes), f"task {task['task_id']}: wrong_code passes {wrong_passes}"


def test_correct_programs_pass_all_tests_and_wrong_ones_only_some():
    jobs, expected = [], []
    for task in PROGRAMS:
        inputs, outputs = all_tests(task)
        for kind in ("solutions", "incorrect_solutions"):
            for number, source in enumerate(task[kind]["solution"]):
                jobs.append({"code": source, "inputs": inputs})
                expected.append((f"{task['name']} {kind} {number}", outputs, len(task["public_tests"]["input"])))
    for answer, (name, outputs, num_public) in zip(run_jobs(jobs), expected, strict=True):
        passed = [got == want for got, want in zip(answer, outputs, strict=True)]
        if " solutions" in name:
            assert all(passed), f"{name}: {passed}"
        else:
            assert any(passed[:num_public]) and not all(passed[num_public:]), f"{name}: {passed}"
