"""Assertion tasks: both schemas become the right jobs, prompts are exact, programs are read out of answers."""

import json
from pathlib import Path

import pytest
from shared_data import DATA, needs

from wmtp.data import mbpp
from wmtp.eval import (
    assertion_tasks,
    bigcode_protocol,
    chat_protocol,
    docstring_protocol,
    humaneval_protocol,
    humaneval_tasks,
    mbpp_tasks,
    packaged_function_tasks,
    packaged_program_tasks,
    three_shot_protocol,
)
from wmtp.eval.protocols import first_code_block
from wmtp.pretrained import byte_tokenizer
from wmtp.sandbox import Outcome

TOKENIZER = byte_tokenizer()

MBPP_ROW = {
    "task_id": 11,
    "text": "Double it.",
    "code": "def f(x):\r\n    return 2 * x\r\n",
    "test_list": ["assert f(1) == 2", "assert f('a') == 'aa'"],
    "test_setup_code": "",
    "challenge_test_list": ["assert f([]) == []"],
}
HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Add two."""\n',
    "canonical_solution": "    return helper(helper(x))\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(1) == helper(2)\n",
    "entry_point": "f",
}


def write(path: Path, *rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def passes(task, program: str) -> bool:
    """The judge's rule on trusted programs: the tests run among the preamble's names; others are the program's."""
    job = task.job(program)
    names: dict = {}
    exec(job.program, names)
    exec(job.setup, names)
    tests: dict = {}
    exec(job.preamble, tests)
    tests = {name: value for name, value in names.items() if name not in tests} | tests
    if job.entry_point is not None:
        tests["candidate"] = eval(job.entry_point, names)
        tests[job.entry_point.rpartition(".")[2]] = tests["candidate"]
    try:
        for test in job.tests:
            exec(test, tests)
    except AssertionError:
        return False
    return True


def test_an_mbpp_row(tmp_path):
    source = write(tmp_path / "t.jsonl", MBPP_ROW)
    [task] = mbpp_tasks(source)
    assert (task.task_id, task.text, task.prompt, task.entry_point) == ("Mbpp/11", "Double it.", "", "f")
    assert task.solution == task.program(task.solution) == "def f(x):\n    return 2 * x\n"
    assert task.job("p").tests == ("assert f(1) == 2", "assert f('a') == 'aa'") and task.job("p").program == "p"
    assert passes(task, task.solution) and not passes(task, "f = str")
    [task] = mbpp_tasks(source, challenge_tests=True)
    assert task.job("p").tests == (*task.tests, "assert f([]) == []")


def test_the_sanitized_schema(tmp_path):
    row = {**MBPP_ROW, "prompt": "Halve it.", "test_imports": ["import math", "from cmath import isclose"]}
    del row["text"], row["test_setup_code"], row["challenge_test_list"]
    [task] = mbpp_tasks(write(tmp_path / "s.json", row))
    assert (task.text, task.preamble, task.setup) == ("Halve it.", "import math\nfrom cmath import isclose", "")


def test_names_that_the_tests_use_are_imported_by_the_judge_not_by_the_program(tmp_path):
    row = {
        **MBPP_ROW,
        "code": "import cmath, os.path as p\nfrom decimal import Decimal as D\ndef f(x): return x\ndef re(x): return x",
        "test_setup_code": "import fractions\nroot = f(1)",
        "test_list": [
            "assert math.isclose(f(D(1)), 1) and fractions.Fraction(1) == 1 and cmath.pi and p.sep and re(1).real == 1",
            "assert root.real == 1 and [string.real for string in [1]]",
        ],
        "test_imports": ["import math"],
    }
    [task] = mbpp_tasks(write(tmp_path / "t.jsonl", row))
    expected = ["import math", "import fractions", "import cmath", "import os.path as p"]
    assert task.preamble.split("\n") == [*expected, "from decimal import Decimal as D"]


def test_a_humaneval_row(tmp_path):
    [task] = humaneval_tasks(write(tmp_path / "h.jsonl", HUMANEVAL_ROW))
    assert task.task_id == "HumanEval/0" and task.prompt == task.preamble == HUMANEVAL_ROW["prompt"]
    program = task.program(task.solution)
    assert program == HUMANEVAL_ROW["prompt"] + HUMANEVAL_ROW["canonical_solution"]
    assert task.job(program).tests == (HUMANEVAL_ROW["test"] + "\ncheck(candidate)",)
    assert passes(task, program) and not passes(task, task.program("    return helper(x)\n"))
    # The judge's own helper decides, not the one a program puts in its place.
    assert not passes(task, "def helper(x):\n    return 0\n\ndef f(x):\n    return 0\n")


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("def f(x):\n", "    return x + 2\n"),
        ("def f(x):", "\n    return x + 2\n"),
        ("def f(\n    x,\n):\n    # Adds two.\n", "    return x + 2\n"),
        ("def f(x):\n\t# Adds two.\n", "\treturn x + 2\n"),
    ],
)
def test_a_prompt_needs_no_docstring(prompt, answer, tmp_path):
    row = {**HUMANEVAL_ROW, "prompt": prompt, "canonical_solution": answer}
    row["test"] = "def check(candidate):\n    assert candidate(1) == 3\n"
    [task] = humaneval_tasks(write(tmp_path / "h.jsonl", row))
    assert task.prompt == prompt and passes(task, task.program(answer)) and not passes(task, "def f(x): return x\n")


def test_every_split_of_a_folder(tmp_path):
    write(tmp_path / "test.jsonl", MBPP_ROW)
    write(tmp_path / "prompt.jsonl", {**MBPP_ROW, "task_id": 2})
    assert [task.task_id for task in mbpp_tasks(str(tmp_path), "all")] == ["Mbpp/2", "Mbpp/11"]
    write(tmp_path / "all.jsonl", MBPP_ROW)  # which then is what is meant
    assert [task.task_id for task in mbpp_tasks(str(tmp_path), "all")] == ["Mbpp/11"]


def test_any_file_with_either_schema(tmp_path):
    leetcode = {
        **HUMANEVAL_ROW,
        "task_id": "two-sum",
        "query": "Add.",
        "entry_point": "S().f",
        "prompt": "import math\n",
    }
    leetcode["completion"] = leetcode.pop("canonical_solution")
    own = {**MBPP_ROW, "task_id": "mine/a"}
    tasks = assertion_tasks(write(tmp_path / "t.jsonl", MBPP_ROW, HUMANEVAL_ROW, leetcode, own))
    assert [task.task_id for task in tasks] == ["Mbpp/11", "HumanEval/0", "two-sum", "mine/a"]
    assert (tasks[2].text, tasks[2].entry_point) == ("Add.", "S().f")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**MBPP_ROW, "test_list": []}, r"field 'test_list' must be a list of assert statements, got \[\]"),
        ({**MBPP_ROW, "test_list": ["assert f(1"]}, r"test 'assert f\(1' is not valid Python: '\(' was never closed"),
        ({**MBPP_ROW, "test": "assert g(1) == 2"}, r"field 'test' uses nothing that field 'code' defines \('assert g"),
        ({**MBPP_ROW, "test": "assert f(1"}, r"field 'test' is not valid Python: '\(' was never closed"),
        ({**MBPP_ROW, "test": ["assert f(1)"]}, "field 'test' must be a string, got list"),
        (
            {**MBPP_ROW, "plus_input": [[1]]},
            "nobody runs what the column 'plus_input' holds, .* into test_list,",
        ),
        (
            {**MBPP_ROW, "hiddenTests": "f(1)"},
            "nobody runs what the column 'hiddenTests' holds, .*, or remove",
        ),
        ({**MBPP_ROW, "assertion": "f(1) == 2"}, "nobody runs what the column 'assertion' holds"),
        ({**HUMANEVAL_ROW, "base_input": [[1]]}, r"nobody runs .* 'base_input' .* put it into test, as assertions of"),
        ({**HUMANEVAL_ROW, "input_output": "[]"}, "nobody runs what the column 'input_output' holds"),
        ({**MBPP_ROW, "test_imports": [1]}, r"field 'test_imports' must be a list of strings, got \[1\]"),
        ({**MBPP_ROW, "code": "def f(x) return"}, "field 'code' is not valid Python: expected ':'"),
        ({**MBPP_ROW, "task_id": None}, "field 'task_id' is null; give it a value"),
        ({**HUMANEVAL_ROW, "test": "assert f(1)"}, r"field 'test' must define check\(candidate\), a unit"),
        ({**HUMANEVAL_ROW, "entry_point": "def f"}, "field 'entry_point' is not valid Python: "),
        ({**HUMANEVAL_ROW, "canonical_solution": None}, "field 'canonical_solution' is null"),
        ({"task_id": 1, "prompt": "x"}, "neither MBPP's fields .* nor HumanEval's .*; the row has task_id, prompt"),
        ("{", "malformed JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row, message, tmp_path):
    source = write(tmp_path / "t.jsonl", {**MBPP_ROW, "task_id": 12}, row)
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: {message}") as error:
        assertion_tasks(source)
    assert "\n" not in str(error.value)


def test_empty_files_and_repeated_ids(tmp_path):
    with pytest.raises(ValueError, match=r"e\.jsonl: no tasks; the file is empty"):
        assertion_tasks(write(tmp_path / "e.jsonl"))
    with pytest.raises(ValueError, match=r"e\.jsonl \(split train\): no tasks"):
        mbpp_tasks(write(tmp_path / "e.jsonl", MBPP_ROW), "train")
    source = write(tmp_path / "t.jsonl", MBPP_ROW, HUMANEVAL_ROW, MBPP_ROW)
    with pytest.raises(ValueError, match=r"t\.jsonl:3: task_id 'Mbpp/11' is also that of .*t\.jsonl:1"):
        assertion_tasks(source)
    with pytest.raises(ValueError, match="split must be one of prompt, test, validation, train, all, got 'dev'"):
        mbpp_tasks(source, "dev")


def test_a_bad_row_can_be_left_out(tmp_path):
    source = write(tmp_path / "t.jsonl", {**MBPP_ROW, "test": "assert"}, {**MBPP_ROW, "task_id": 12})
    assert [task.task_id for task in mbpp_tasks(source, exclude=[11])] == ["Mbpp/12"]
    assert [task.task_id for task in assertion_tasks(source, ids=[12])] == ["Mbpp/12"]


def test_ids_and_limit_choose_tasks(tmp_path):
    source = write(tmp_path / "t.jsonl", *({**MBPP_ROW, "task_id": i} for i in range(11, 20)))
    chosen = lambda **options: [task.task_id for task in mbpp_tasks(source, **options)]
    assert chosen(limit=2) == ["Mbpp/11", "Mbpp/12"]
    assert chosen(ids=[19, "12", "MBPP/11", "Mbpp/15"]) == ["Mbpp/19", "Mbpp/12", "Mbpp/11", "Mbpp/15"]
    assert chosen(exclude=[11, "Mbpp/13"], limit=2) == ["Mbpp/12", "Mbpp/14"]
    assert chosen(ids=[19, 12], exclude=["19"]) == ["Mbpp/12"]
    for options, message in [
        ({"ids": [20]}, r"t\.jsonl \(split test\): ids: task_id 20 is none of the 9 tasks"),
        ({"ids": ["Mpbb/11"]}, "did you mean 'Mbpp/11'?"),
        ({"ids": [11, "11"]}, "ids names the task Mbpp/11 more than once"),
        ({"ids": []}, "no tasks; ids is empty"),
        ({"exclude": [20]}, r"t\.jsonl \(split test\): exclude: task_id 20 is none of the 9 tasks"),
        ({"ids": [11], "exclude": [11]}, "no tasks; exclude leaves none"),
        ({"limit": 0}, "limit must be a whole number >= 1 or null, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            chosen(**options)


def test_the_packaged_functions():
    tasks = packaged_function_tasks()
    assert [task.task_id for task in tasks] == [f"packaged/{i}" for i in range(1, 37)]
    assert [task.task_id for task in packaged_function_tasks(ids=[3])] == ["packaged/3"]
    assert all(passes(task, task.solution) for task in tasks)


PLUS_TEST = """import math

def assertion(out, exp):
    assert out == exp or math.isclose(out, exp)

inputs = [[1], [2.5]]
for inp, exp in zip(inputs, [2, 5.0]):
    assertion(f(*inp), exp)
"""


def test_in_mbpp_plus_only_numbers_of_the_expected_shape_are_close(tmp_path):
    close = PLUS_TEST.replace("math.isclose(out, exp)", "np.allclose(out, exp, rtol=1e-07)").replace(
        "math", "numpy as np"
    )
    [task] = mbpp_tasks(write(tmp_path / "p.jsonl", {**MBPP_ROW, "test": close}))
    shown = "def f(x):\n    return {1: 2, 'a': 'aa'}.get(x, %s)\n"
    assert passes(task, shown % "5.0000000001") and not passes(task, shown % "[]") and not passes(task, shown % "[5.0]")


def test_mbpp_plus_is_judged_by_the_base_tests_and_then_by_the_plus_tests(tmp_path):
    row = {**MBPP_ROW, "prompt": MBPP_ROW["text"], "test": PLUS_TEST, "source_file": "v2.ipynb", "contest": "tests"}
    del row["text"], row["challenge_test_list"], row["test_setup_code"]
    for [task] in (mbpp_tasks(write(tmp_path / "p.jsonl", row)), assertion_tasks(str(tmp_path / "p.jsonl"))):
        assert task.plus_tests == (PLUS_TEST,) and task.job("p").tests == (*MBPP_ROW["test_list"], PLUS_TEST)
        assert PLUS_TEST not in docstring_protocol().render(task)
        recited = "def f(x):\n    return {1: 2, 'a': 'aa'}.get(x, 0)\n"
        assert passes(task, task.solution) and not passes(task, recited)
        for tests, base in (
            ("passed " * 3, True),
            ("passed passed timeout", True),
            ("passed exception", False),
        ):
            assert task.passes_base(Outcome("", "", tuple(tests.split()), (), 0.0, 0.0)) is base
    [plain] = mbpp_tasks(write(tmp_path / "t.jsonl", {**MBPP_ROW, "test": ""}))
    assert plain.plus_tests == () and plain.passes_base(Outcome("passed", "", ("passed",), (), 0.0, 0.0)) is None
    assert plain.unused_tests == 1 and mbpp_tasks(str(tmp_path / "t.jsonl"), challenge_tests=True)[0].unused_tests == 0


def test_columns_of_relatives_that_add_no_test_are_taken(tmp_path):
    leetcode = {**HUMANEVAL_ROW, "query": "Add.", "input_output": "[{'input': 'x = 1', 'output': '3'}]"}
    pack = {
        **HUMANEVAL_ROW,
        "task_id": "Python/0",
        "test_setup": "",
        "example_test": "def check(f): 1",
        "input": None,
    }
    assert len(assertion_tasks(write(tmp_path / "t.jsonl", leetcode, pack))) == 2


@needs("mbpp")
def test_the_real_mbpp():
    tasks = {t.task_id: t for split in ("train", "validation", "test") for t in mbpp_tasks(str(DATA / "mbpp"), split)}
    assert len(tasks) == 964
    # 126 asks for a function called `sum`; 367 and 927 build trees from the program's classes; 596 asserts with `sys`.
    assert {i for i, task in tasks.items() if task.preamble} == {"Mbpp/596"}
    assert {i for i, task in tasks.items() if task.setup} == {"Mbpp/367", "Mbpp/927"}
    assert tasks["Mbpp/126"].entry_point == "sum" and tasks["Mbpp/596"].preamble == "import sys"
    for number in (11, 126, 367, 596, 601, 927):
        assert passes(tasks[f"Mbpp/{number}"], tasks[f"Mbpp/{number}"].solution)
    # What the evaluation shows is what training showed, to the token.
    trained = mbpp(TOKENIZER, source=str(DATA / "mbpp"))
    task = tasks["Mbpp/601"]
    prompt = docstring_protocol().prompt(task, TOKENIZER)
    assert prompt == trained[0].tokens[trained[0].labels < 0].tolist()
    # Stop strings cut no known solution, save one of BigCode's that cuts the published 0-shot protocol's too.
    for protocol, cut in ((docstring_protocol(), 0), (bigcode_protocol(), 1)):
        assert sum(protocol.program(t, t.solution) != t.solution for t in tasks.values()) == cut


@needs("humaneval")
def test_the_real_humaneval():
    tasks = humaneval_tasks(str(DATA / "humaneval" / "HumanEval.jsonl.gz"))
    protocol = humaneval_protocol()
    assert len(tasks) == 164
    for task in tasks:
        assert TOKENIZER.decode(protocol.prompt(task, TOKENIZER)) == task.prompt
        assert protocol.program(task, task.solution + "\ndef g(): pass") == task.prompt + task.solution
    assert all(passes(tasks[number], tasks[number].program(tasks[number].solution)) for number in (0, 32, 38, 50))


@needs("leetcode")
def test_the_real_leetcode():
    [task] = assertion_tasks(str(DATA / "leetcode" / "LeetCodeDataset-v0.2.0-train.jsonl.gz"), limit=1)
    assert (task.task_id, task.entry_point) == ("two-sum", "Solution().twoSum")
    assert passes(task, task.program(task.solution))
    answer = f"Use a map.\n```python\n{task.solution}```"
    assert passes(task, chat_protocol().program(task, answer))


# ---- Protocols


def test_three_shot_is_the_papers_prompt_with_the_examples_of_any_file(tmp_path):
    rows = [{**MBPP_ROW, "task_id": i, "text": f"Do {i}.", "code": f"def f(): {i}"} for i in (2, 3, 4, 11, 601, 602)]
    source = write(tmp_path / "all.jsonl", *rows)
    [task] = mbpp_tasks(source, ids=[11])
    ask = "You are an expert Python programmer, and here is your task: Do {}. Your code should pass these tests:\n\n"
    ask += "assert f(1) == 2\nassert f('a') == 'aa'\n[BEGIN]\n"
    solved = "".join(f"{ask.format(i)}def f(): {i}\n[DONE]\n\n" for i in (2, 3, 4))
    protocol = three_shot_protocol(source)
    assert TOKENIZER.decode(protocol.prompt(task, TOKENIZER)) == solved + ask.format(11)
    assert protocol.stop == ("[DONE]",)
    assert protocol.program(task, "def f(): 5\n[DONE]\n\nYou are") == "def f(): 5\n"
    two = three_shot_protocol(source, "train", [602, 601])
    text = TOKENIZER.decode(two.prompt(task, TOKENIZER))
    assert text.index("Do 602.") < text.index("Do 601.") < text.index("Do 11.")
    with pytest.raises(ValueError, match=r"\(split prompt\): ids: task_id 7 is none of the 3 tasks"):
        three_shot_protocol(source, example_ids=[2, 7])
    [shown] = mbpp_tasks(source, "train", ids=[602])
    with pytest.raises(ValueError, match="task Mbpp/602 is one of the examples three_shot_protocol shows"):
        two.prompt(shown, TOKENIZER)


def test_prompts_never_show_hidden_tests(tmp_path):
    [task] = mbpp_tasks(write(tmp_path / "t.jsonl", MBPP_ROW), challenge_tests=True)
    expected = {
        bigcode_protocol: '"""\nDouble it.\nassert f(1) == 2\n"""\n',
        docstring_protocol: '"""\nDouble it.\nassert f(1) == 2\nassert f(\'a\') == \'aa\'\n"""\n',
    }
    for protocol, text in expected.items():
        assert protocol().render(task) == text
    assert "assert f([])" not in chat_protocol().render(task)[0]["content"]
    [humaneval] = humaneval_tasks(write(tmp_path / "h.jsonl", HUMANEVAL_ROW))
    assert "check" not in chat_protocol().render(humaneval)[0]["content"]
    for protocol in (bigcode_protocol(), docstring_protocol()):
        with pytest.raises(ValueError, match=r"shows a task's tests, .* HumanEval/0 is of another benchmark"):
            protocol.prompt(humaneval, TOKENIZER)
        with pytest.raises(ValueError, match="of another benchmark"):
            protocol.prompt(packaged_program_tasks()[0], TOKENIZER)
    with pytest.raises(ValueError, match=r"prompt that starts the function .* Mbpp/11 does not"):
        humaneval_protocol().prompt(task, TOKENIZER)
    with pytest.raises(ValueError, match="byte_tokenizer has no chat template"):
        chat_protocol().prompt(task, TOKENIZER)


def test_bigcode_ends_where_a_new_top_level_statement_starts(tmp_path):
    [task] = mbpp_tasks(write(tmp_path / "t.jsonl", MBPP_ROW))
    for rest in ("\nassert f(1)", "\nprint(f(1))", "\nclass A:", '\n"""next', "\nif True:", "\n```"):
        assert bigcode_protocol().program(task, f"def f(x):\n    if x:\n        return x{rest}") == (
            "def f(x):\n    if x:\n        return x"
        )


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Sure!\n```python\nx = 1\n```\nAnd\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = '``'\ny = 2", "x = '``'\ny = 2"),  # cut off by the length limit
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''\n"),
        ("~~~\nx\n~~~", "x\n"),
        ("1. This:\n   ```python\n   if x:\n       y\n   ```\n", "if x:\n    y\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("use `f` and ```x``` inline", "use `f` and ```x``` inline"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_the_first_code_block_of_an_answer(answer, code):
    assert first_code_block(answer) == code


def test_a_chat_answer_to_humaneval_may_be_the_function_or_its_body(tmp_path):
    [task] = humaneval_tasks(write(tmp_path / "h.jsonl", HUMANEVAL_ROW))
    program = chat_protocol().program
    for code in (
        "def f(x):\n    return helper(helper(x))\n",
        "    return helper(helper(x))\n",
        "from __future__ import annotations\nimport math\n\ndef f(x: Unknown) -> None:\n    return x + 2\n",
    ):
        assert passes(task, program(task, f"Here:\n```python\n{code}```")), code
    assert not passes(task, program(task, "```python\ndef f(x):\n    return x\n```"))
    [plain] = mbpp_tasks(write(tmp_path / "t.jsonl", MBPP_ROW))
    assert program(plain, "no block") == "no block"
