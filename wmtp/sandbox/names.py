"""What the names in trusted tests mean: the tests' own, the judge's builtins and modules, or the program's objects."""

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Iterable

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
        if hasattr(builtins, name):
            raise KeyError(name)  # the interpreter goes on to the builtins
        if name in self._modules:
            return importlib.import_module(name)
        return self.remote(name)

    def remote(self, expression: str) -> Remote:
        """The program's object of that name."""
        return Remote(self._session, {"@": expression}, f"<{expression} of the program>")


def make_namespace(job: AssertionJob, session: Session, preamble: object) -> Namespace:
    """Globals for the tests of `job`, after running its compiled `preamble`."""
    trees = [ast.parse(test) for test in job.tests]
    namespace = Namespace(session, frozenset(module_names(trees, job.setup)))
    _import_what_setup_imports(job.setup, namespace)
    exec(preamble, namespace)
    if job.entry_point:
        target = namespace.remote(job.entry_point)
        namespace[CANDIDATE] = target
        if match := re.search(r"(\w+)\s*$", job.entry_point):
            namespace[match[1]] = target
    elif (name := shadowing_name(trees, namespace)) is not None:
        namespace[name] = namespace.remote(name)
    return namespace


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


def module_names(trees: Iterable[ast.Module], setup: str) -> set[str]:
    """Names of standard library modules that the tests use only as `name.attribute`.

    The program imports them too, but what it has under such a name would then compute an expected value.
    """
    plain, bases = set(), set()
    for tree in trees:
        owned = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (bases if id(node) in owned else plain).add(node.id)
    return ((bases - plain) & sys.stdlib_module_names) - _assigned(setup)


def shadowing_name(trees: Iterable[ast.Module], namespace: Namespace) -> str | None:
    """The builtin that the program must be replacing (`assert sum(10, 15) == 6`): the first one called, where the
    tests name nothing else that the program could have defined."""
    first = None
    stored = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name) and _is_stored(node)}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and not _is_stored(node):
                known = node.id in namespace or node.id in stored or node.id in namespace._modules
                if not known and not hasattr(builtins, node.id):
                    return None
            if first is None and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                first = node.func.id if hasattr(builtins, node.func.id) else None
    return first


def _is_stored(node: ast.Name) -> bool:
    return not isinstance(node.ctx, ast.Load)


def _assigned(source: str) -> set[str]:
    return {node.id for node in ast.walk(_parse(source)) if isinstance(node, ast.Name) and _is_stored(node)}


def _parse(setup: str) -> ast.Module:
    try:
        return ast.parse(setup)
    except (SyntaxError, ValueError):  # the program's side, which runs it, reports it
        return ast.Module([], [])
