"""The trusted code of datasets: tests, solutions, set-ups. What it defines and calls, and who calls its tests."""

import ast
import builtins
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from wmtp.errors import UserError

_CASES = {"TestCase", "IsolatedAsyncioTestCase"}  # of unittest
FUTURE_IMPORT = re.compile(r"^from __future__ import .*\n?", re.MULTILINE)


def parsed(code: str, what: str, mode: str = "exec") -> ast.Module:
    """Returns the syntax tree of a dataset's code; `what` names it in the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MBPP has regular expressions in strings that are not raw
            tree: Any = ast.parse(code, mode=mode)
            return tree
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        raise UserError(f"{what} is not valid Python: {error}") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{what} is nested too deeply for Python to parse; leave the task out") from None


def defined_names(program: ast.Module) -> set[str]:
    """Names of the functions and classes at a parsed program's top level."""
    return {node.name for node in program.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def bound_names(program: ast.Module) -> set[str]:
    """Names that a parsed program's top level defines or assigns."""
    assigned = (node for node in program.body if isinstance(node, ast.Assign | ast.AnnAssign))
    names = (node for statement in assigned for node in ast.walk(statement) if isinstance(node, ast.Name))
    return defined_names(program) | {node.id for node in names if isinstance(node.ctx, ast.Store)}


def called(tests: list[ast.Module], defined: set[str]) -> str | None:
    """Finds the outermost call of the first test to something that the solution defines.

    A builtin's name is meant (MBPP task 126 asks for a `sum`) only where no test calls anything else of the solution's:
    one that has a helper `sum` of its own does not change what `assert sum(f(x)) == 6` adds up with.
    """
    calls = [node.func for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Call)]  # breadth first
    names = [f.id for f in calls if isinstance(f, ast.Name) and f.id in defined]
    return next((name for name in names if not hasattr(builtins, name)), names[0] if names else None)


def imports_of_tests(
    tests: list[ast.Module], solution: ast.Module, setup: str, imports: Sequence[str], where: str
) -> list[str]:
    """Imports that bind names the tests use, out of the solution and the setup, and standard modules used unimported.

    MBPP task 596 asserts with a `sys` that only its solution imports. The judge must hold these names itself: another
    right program need not import them, and a wrong one could bind them to something that answers as it likes.
    """
    nodes = [node for tree in tests for node in ast.walk(tree)]
    open_names = {node.id for node in nodes if isinstance(node, ast.Name)} - defined_names(solution)
    open_names -= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    modules = {n.value.id for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    for code in imports:
        open_names -= {name for name, _ in _imported(parsed(code, f"{where}: test_imports {code!r:.60}"))}
    found = []
    for tree in (parsed(setup, f"{where}: field 'test_setup_code'"), solution):
        for name, statement in _imported(tree):
            if name in open_names:
                found.append(statement)
                open_names.discard(name)
    open_names -= {n.id for n in ast.walk(parsed(setup, where)) if isinstance(n, ast.Name)}  # the setup's variables
    return found + [f"import {name}" for name in sorted(open_names & modules) if name in sys.stdlib_module_names]


def _imported(program: ast.Module) -> Iterator[tuple[str, str]]:
    """Returns name and import statement of each import at a program's top level, without star imports."""
    for node in program.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], ast.unparse(ast.Import([alias]))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, ast.unparse(ast.ImportFrom(node.module, [alias], node.level))


def with_header(header: str, program: str) -> str:
    """Returns a program behind a header; its `from __future__` stays the first statement."""
    if not header or not (future := FUTURE_IMPORT.findall(program)):
        return header + program
    return "\n".join([*future, header + FUTURE_IMPORT.sub("", program)])


def with_calls(test: str, where: str) -> str:
    """Returns test code followed by calls of the test cases and functions that it only defines, for others to collect.

    The first failure raises, and so ends the test. A `TestCase` runs as its `debug` runs it (set-up, each test,
    tear-down), a function or method `test...` as `pytest` calls it.

    Raises:
        UserError: a test that `pytest`'s own runner alone could call: it takes a fixture, or is marked.
    """
    tree = parsed(test, where)
    definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    others = [node for node in tree.body if not isinstance(node, definitions)]
    named = {node.id for other in others for node in ast.walk(other) if isinstance(node, ast.Name)}
    cases, calls = set(_CASES), []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and cases & {ast.unparse(base).rpartition(".")[2] for base in node.bases}:
            cases.add(node.name)
            if node.name not in named and _tests_of(node):
                calls.append(f"unittest.defaultTestLoader.loadTestsFromTestCase({node.name}).debug()")
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test") and node.name not in named:
            calls += [f"{node.name}().{_name_alone(method, where, bound=1)}()" for method in _tests_of(node)]
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test") and node.name not in named:
            calls.append(f"{_name_alone(node, where)}()")
    return "\n".join([test, *["import unittest"] * any("unittest." in call for call in calls), *calls])


def _tests_of(case: ast.ClassDef) -> list[ast.FunctionDef]:
    return [node for node in case.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]


def _name_alone(test: ast.FunctionDef, where: str, bound: int = 0) -> str:
    """Returns a test's name, if it can be called without arguments beside the `bound` first."""
    taken = [arg.arg for arg in [*test.args.posonlyargs, *test.args.args]]
    taken = taken[bound : len(taken) - len(test.args.defaults)]
    marks = [mark for mark in map(ast.unparse, test.decorator_list) if "pytest" in mark]
    if taken or marks:
        what = f"takes the fixture {taken[0]!r}" if taken else f"is marked {marks[0]:.40}"
        raise UserError(
            f"{where}: the test {test.name} {what}, which only pytest's own runner understands; write it without, or "
            "leave the task out with exclude"
        )
    return test.name
