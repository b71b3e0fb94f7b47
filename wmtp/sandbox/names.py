"""What the names in trusted tests mean: the tests' own, the judge's builtins and modules, or the program's objects."""

import ast
import builtins
import contextlib
import functools
import importlib
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from wmtp.sandbox.jobs import AssertionJob
from wmtp.sandbox.remote import Remote, Session

TEST_MODULE = "tests"
CANDIDATE = "candidate"


class Namespace(dict):
    """Globals of the tests. A name that is found nowhere else stands for the program's object of that name."""

    def __init__(self, session: Session, modules: frozenset[str]) -> None:
        super().__init__(__name__=TEST_MODULE)
        self._session = session
        self._modules = modules

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name) or (name.startswith("__") and name.endswith("__")):
            raise KeyError(name)  # the interpreter goes on to the builtins, or makes its own (__annotations__)
        if name in self._modules:
            return importlib.import_module(name)
        return self.remote(name)

    def remote(self, expression: str) -> Remote:
        """The program's object of that name."""
        return Remote(self._session, {"@": expression}, f"<{expression} of the program>")


def make_namespace(job: AssertionJob, session: Session, preamble: object) -> Namespace:
    """Globals for the tests of `job`, after running its compiled `preamble`."""
    names = names_in(job.tests, job.setup)
    namespace = Namespace(session, names.modules)
    _import_what_setup_imports(job.setup, namespace)
    exec(preamble, namespace)
    if job.entry_point:
        target = namespace.remote(job.entry_point)
        namespace[CANDIDATE] = target
        if match := re.search(r"(\w+)\s*$", job.entry_point):
            namespace[match[1]] = target
    free = names.free - namespace.keys()
    if names.first_called in free and all(hasattr(builtins, name) for name in free - names.modules):
        # `assert sum(10, 15) == 6`: nothing else is named that the program could have defined, so it defines `sum`.
        namespace[names.first_called] = namespace.remote(names.first_called)
    for name in free - namespace.keys():
        with contextlib.suppress(KeyError):  # a class body looks its globals up without __missing__
            namespace[name] = namespace[name]
    return namespace


class Names(NamedTuple):
    """What the tests of a job say about names.

    Fields:
        free: names that they use and do not themselves assign, define or import.
        modules: names of standard library modules that they use only as `name.attribute`. The program imports them
            too, but what it has under such a name would then compute an expected value.
        first_called: the first name that is called.
    """

    free: frozenset[str]
    modules: frozenset[str]
    first_called: str | None


@functools.lru_cache(maxsize=512)
def names_in(tests: tuple[str, ...], setup: str) -> Names:
    """Names in trusted tests, which must compile; many programs are judged by the same tests."""
    nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    bases = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    loaded = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    free = {node.id for node in loaded} - _defined(nodes)
    plain = {node.id for node in loaded if id(node) not in bases}
    modules = (free - plain - _defined(ast.walk(_parse(setup)))) & sys.stdlib_module_names
    calls = (node.func for node in nodes if isinstance(node, ast.Call))
    first_called = next((function.id for function in calls if isinstance(function, ast.Name)), None)
    return Names(frozenset(free), frozenset(modules), first_called)


def _import_what_setup_imports(setup: str, namespace: dict) -> None:
    """Let the tests use the judge's own modules under the names that the set-up imports.

    The program's side imports them too, but may have put something else in their place.
    """
    for node in _parse(setup).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "setup", "exec"), namespace)
            except ImportError:
                continue  # the program's side has it, or reports the error


def _defined(nodes: Iterable[ast.AST]) -> set[str]:
    """Names that the code itself assigns, defines or imports, in whatever scope."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def _parse(setup: str) -> ast.Module:
    try:
        return ast.parse(setup)
    except (SyntaxError, ValueError):  # the program's side, which runs it, reports it
        return ast.Module([], [])
