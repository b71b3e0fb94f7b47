"""Sanitising: the program is found in what people have, nothing that matters to its answers is lost, twice is once."""

import ast
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import DATA, needs

from wmtp.eval import mbpp_tasks
from wmtp.eval.samples import asked_names
from wmtp.eval.sanitize import breaks_off, defines, is_program, sanitize

F = "def f(x):\n    y = x + 1\n    return y\n"
LONGER = "def f(x):\n    a = 1\n    b = 2\n    return 3\n"
TABBED = "def f(x):\n    y = 1\n    if x:\n\treturn 2\n    return y\n"  # Python 2's tabs, of 8


@pytest.mark.parametrize(
    "text",
    [
        F,
        "\ufeff" + F.replace("\n", "\r\n"),
        f"Here's the function:\n\n```python\n{F}```\n\nIt isn't slow.",
        f"Sure!\n~~~~ py\n{F}~~~~\nDone",
        f"~~~python\n{F}",
        f"```python\n{F}",
        f"python\n{F}",
        f"1. Write it:\n\n   ```python\n{textwrap.indent(F, '   ')}   ```\n",
        f"Use it so:\n```python\nprint(f(1))\nprint(f(2))\nprint(f(3))\nprint(f(4))\n```\nof\n```\n{F}```",
        f"```python\ndef f(x):\n    return 0\n```\nis wrong, better:\n```python\n{F}```",
        f"{F}\nThis adds one, doesn't it?\nNote: it's fast",
        f"Let me think\n{F}\nassert f(1) == 2\nprint(f(1))\nf(3)\nn = int(input())\nprint(f(n))\n",
        f'{F}\nif __name__ == "__main__":\n    main()\n',
        f"def main():\n    print(f(int(input())))\n{F}main()\n",
        f"for x in range(9):\n    print(x)\n{F}results = []\nresults.append(f(3))\n",
        textwrap.indent(F, " "),
        f"[BEGIN]\n{F}[DONE]\n\nYou are an expert Python programmer\n[BEGIN]\n{LONGER}[DONE]",
        f"{F}<|endoftext|>{LONGER}",
        f"<|im_start|>user\nwrite f(x)<|im_end|>\n<|im_start|>assistant\n{F}<|im_end|>",
        f"<s>[INST] write f [/INST]\n{F}</s>",
        f"{F}\nCut in half: \ud83d",
    ],
)
def test_the_function_is_found(text):
    assert sanitize(text, "f").rstrip("\n") == F.rstrip("\n")


def test_tabs_are_those_of_python_2_or_else_of_an_editor():
    assert sanitize(TABBED, "f") == TABBED.replace("\t", " " * 8)
    assert sanitize("def f(x):\n\ty = 1\n    return y\n", "f").split() == ["def", "f(x):", "y", "=", "1", "return", "y"]
    assert is_program(sanitize("def f(x):\n\ty = 1\n    return y\n", "f"))


PROMPT = """from typing import List


def g(x):
    return x + 1


def f(x: int) -> int:
    '''One more.

    >>> f(1)
    2
    '''
"""
METHOD = "class Solution:\n    def f(self, x: int) -> int:\n        "


@pytest.mark.parametrize(
    "completion",
    [
        "    return g(x)\n",
        "    return g(x)\n\nThis isn't hard.\n",
        "return g(x)",
        "for _ in [1]:\n        x = g(x)\n    return x",
        "```python\n    return g(x)\n```\nDone",
        "```python\nreturn g(x)\n```",
        PROMPT + "    return g(x)\n",
        f"Sure:\n```python\n{PROMPT}    return g(x)\n```\nDone",
        "Sure:\n```python\ndef f(x: int) -> int:\n    return g(x)\n```\nDone",
        "    return g(x)\n\n\nif __name__ == '__main__':\n    print(f(int(input())))\n",
        "    return g(x)\n<|endoftext|><|endoftext|>",
    ],
)
def test_what_goes_on_from_a_prompt_is_found_with_it(completion):
    namespace = {}
    exec(sanitize(completion, "f", prompt=PROMPT), namespace)
    assert namespace["f"](1) == 2


@pytest.mark.parametrize("completion", ["return x + 1", METHOD + "return x + 1\n", f"```\n{METHOD}return x + 1\n```"])
def test_a_method_s_body_or_its_class_again(completion):
    namespace = {}
    exec(sanitize(completion, "Solution().f", prompt=METHOD), namespace)
    assert namespace["Solution"]().f(1) == 2


@pytest.mark.parametrize("text", ["", " \n", "I'm sorry, I can't.", "def f(x:\n", "for\nwhile\n"])
def test_where_no_part_is_python_there_is_no_program(text):
    assert sanitize(text, "f") is None
    assert sanitize(text, "f", prompt=PROMPT) is None
    assert not is_program(text)


NEEDED = [
    "import sys; sys.setrecursionlimit(5000)",
    "from decimal import getcontext\ngetcontext().prec = 50",
    "from random import seed\nseed(1)",
    "T = []\nfor i in range(9):\n    T.append(i)\n    print(i)",
    "T = {}\nT['a'] = 1\nT |= {'b': 2}",
    "T = [0] * 9\ndef fill():\n    T[0] = 1\nfill()",
    "def init():\n    global T\n    T = 3\ninit()",
    "T = [3, 1]\nimport heapq\nheapq.heapify(T)",
    "try:\n    import numpy as T\nexcept ImportError:\n    T = None",
    "import sys\nif sys.version_info > (3,):\n    T = 1\nelse:\n    T = 2",
    "T = {}\ndef keep(g):\n    T[g.__name__] = g\n    return g\n@keep\ndef handler():\n    pass",
    "class T:\n    all = []\n    def __init_subclass__(cls):\n        T.all.append(cls)\nclass One(T):\n    pass",
    "class T:\n    pass\nT.__lt__ = lambda self, other: True",
    "def T():\n    return 1\nT = (lambda old: lambda: old() + 1)(T)",
    "T = 1\nT += 1",
    "T = [[2, 1]]\nfor row in T:\n    row.sort()",
]


@pytest.mark.parametrize("before", NEEDED)
def test_a_statement_that_changes_what_the_function_uses_stays(before):
    program = f"{before}\ndef f(x):\n    return T\n"
    assert ast.dump(ast.parse(sanitize(f"{program}print(f(1))\nf(2)\nassert f(1)\n", "f"))) == ast.dump(
        ast.parse(program)
    )


def test_names_that_the_tests_use_stay_and_a_program_without_the_function_stays_whole():
    program = "class Node:\n    pass\ndef f(x):\n    return x\nprint(1)\n"
    assert sanitize(program, "f", names={"Node"}) == program.replace("print(1)\n", "")
    assert sanitize(program, "f") == "def f(x):\n    return x\n"
    assert sanitize(program, "g") == program
    dynamic = "def helper():\n    return 1\ndef f(x):\n    return eval(x)\n"
    assert sanitize(f"{dynamic}n = int(input())\nprint(f(n))\n", "f") == dynamic


def test_a_program_that_reads_stdin_is_cut_out_of_its_text_and_stays_whole():
    program = "n = int(input())\nprint(n)\nassert n\nif __name__ == '__main__':\n    print(1)\n"
    assert sanitize(program) == program
    assert sanitize(f"Here is it:\n```python\n{program}```\nI hope it's right.").strip() == program.strip()


LINES = [
    "def f(x):", "    return x", "    y = (x,", "    x)", "class A:", "    pass", "x = 1", "if x:", "else:",
    "import os", "'''", "It's prose.", "some words", "(", ")", "", "    ", "\tx = 2", "@f", "try:", "except E:", "```",
    "x = [", "]", "x.append(f(1))", "print(x)", "T[0] = f", "x += 1", "    global x", "return x",
    'f"{x}"', "\\", "# note", "for x in f:",
]  # fmt: skip


def _brute(lines):
    """EvalPlus's rule over every span of lines."""
    best = 0
    for start in range(len(lines)):
        for stop in range(start + 1, len(lines) + 1):
            filled = sum(bool(line.strip()) for line in lines[start:stop])
            if filled > best and is_program("\n".join(lines[start:stop])):
                best = filled
    return best


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([line for line in LINES if "```" not in line and "\t" not in line]), max_size=8))
def test_the_longest_span_is_the_longest_of_all_spans(lines):
    if not lines or all(line[:1] == " " or not line for line in lines):
        return  # blanks that all lines start with are taken off first
    found = sanitize("\n".join(lines))
    assert sum(bool(line.strip()) for line in (found or "").split("\n")) == _brute(lines)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=14), st.sampled_from(["f", None, "x", "A().f"]))
def test_sanitising_twice_changes_nothing(lines, entry_point):
    once = sanitize("\n".join(lines), entry_point)
    assert once is None or sanitize(once, entry_point) == once
    assert once is None or is_program(once) or not once.strip()


@pytest.mark.parametrize(
    ("text", "is_so"),
    [
        ("def f(x):", True),
        ("def f(x):\n    y = (1,", True),
        ("def f(x):\n    return x +", True),
        ("def f(x):\n    return 'ab", True),
        ('def f(x):\n    """Adds', True),
        ("Here:\n```python\ndef f(x):\n    return [x", True),
        ("Here:\n```\nx = 1\n```\nand\n```python\nimport math\ndef f(x):", True),
        ("    y = [x\n", True),  # goes on from a prompt
        (F, False),
        ("    return x\n", False),
        (f"```python\n{F}```\nThat's it", False),
        (f"{F}```\nThat's it", False),  # the prompt had opened the fence
        (f"```python\n{F}", False),  # where ``` was a stop string
        (f"{F}\nThat's it, a function that adds", False),
        ("no program at all", False),
        ("", False),
    ],
)
def test_code_that_ends_in_the_middle_is_told_from_prose_after_a_program(text, is_so):
    assert breaks_off(text) is is_so


def test_what_a_program_defines():
    assert defines(F, "f") and defines("from a import g as f", "f") and defines("f = abs", "f")
    assert not defines(F, "g") and not defines("class S:\n    def f(self): pass\n", "f")
    assert defines("from a import *", "f") and defines("def f(", "g")  # which cannot be known


@needs("mbpp")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MBPP has escapes in strings that are not raw
def test_golds_are_the_programs_that_they_were():
    """Nothing is left out of 499 of 500; of one, a number that nobody reads."""
    changed = []
    for task in mbpp_tasks(str(DATA / "mbpp"), "test"):
        cut = sanitize(f"Here:\n```python\n{task.solution}\n```\nIt's it.", task.entry_point, names=asked_names(task))
        changed += [task.task_id] * (ast.dump(ast.parse(cut)) != ast.dump(ast.parse(task.solution)))
    assert changed == ["Mbpp/416"]
