"""What trusted tests mean: the names in them, and the few expressions that a stand-in cannot answer by itself.

A name is the tests' own, a builtin or a standard library module of the judge's, whatever the program defines, or else
the program's. Only where the entry point itself has a builtin's name (MBPP asks for a `sum`) does the program's win.
"""

import ast
import builtins
import contextlib
import functools
import importlib
import re
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from wmtp.sandbox.jobs import AssertionJob
from wmtp.sandbox.remote import Name, Own
from wmtp.sandbox.session import TEST_MODULE, Session
from wmtp.sandbox.supervise import Failure, described

CANDIDATE = "candidate"
_MODULES = {"np": "numpy", "numpy": "numpy"}  # beside the standard library's
_COPIED = (list, dict, set, bytearray)  # what goes to the program or comes from it is another object here
_SAME, _ASK = "__wmtp_same__", "__wmtp_ask__"
_TAKES_CLASSES = re.compile("raises|assertRaises(Regex)?|suppress|warns|assertWarns(Regex)?|isinstance|issubclass")


class TestBroken(Exception):
    """A trusted test fails for a reason of its own."""


class Namespace(dict):
    """Globals of the tests, where a name that is found nowhere else stands for the program's object of that name."""

    def __init__(self, session: Session, modules: frozenset[str]) -> None:
        super().__init__(__name__=TEST_MODULE)
        self._session = session
        self._modules = modules

    def __missing__(self, name: str) -> object:
        if hasattr(builtins, name) or (name.startswith("__") and name.endswith("__")):
            raise KeyError(name)  # the interpreter goes on to the builtins, or makes its own (__annotations__)
        if name in self._modules:
            return importlib.import_module(_MODULES.get(name, name))
        return self._session.name(name)


def make_namespace(job: AssertionJob, session: Session) -> Namespace:
    """Returns globals for the tests of `job`, after running its preamble; raises `TestBroken`."""
    names = names_in(job.tests, job.setup)
    namespace = Namespace(session, names.modules)
    namespace |= {_SAME: functools.partial(_same, session), _ASK: _ask}
    _import_what_setup_imports(job.setup, namespace)
    try:
        exec(compiled(job.preamble, "preamble"), namespace)
    except TestBroken:
        raise
    except Exception as error:
        raise TestBroken(f"the preamble failed: {described(error)}") from None
    except Failure as failure:  # the program has not begun
        session.failure = None
        raise TestBroken(f"the preamble failed: {failure.detail}") from None
    if job.entry_point:
        target = session.name(job.entry_point)
        namespace[CANDIDATE] = target
        match = re.search(r"(\w+)\s*$", job.entry_point)
        if match and not (hasattr(builtins, match[1]) and (match[1] != job.entry_point or CANDIDATE in names.free)):
            namespace[match[1]] = target
    for name in names.free - namespace.keys():
        with contextlib.suppress(KeyError):  # a class body looks its globals up without __missing__
            namespace[name] = namespace[name]
    return namespace


def name_exceptions(job: AssertionJob, session: Session, namespace: Namespace) -> None:
    """Gives names used as exception classes the classes that `except` needs, once the program is loaded."""
    session.requests = 0
    for name in names_in(job.tests, job.setup).exceptions:
        if type(found := namespace.get(name)) is Name:
            asked = session.requests
            with contextlib.suppress(Exception):  # there is no such name: that is for the test to say
                cls: Any = found._remote("get")
                if issubclass(cls, BaseException):
                    namespace[name] = cls
                    continue  # the test uses it without a further request
            session.requests = asked


class Names(NamedTuple):
    """Names that the tests of a job use and do not themselves assign, define or import."""

    free: frozenset[str]  # all of them
    modules: frozenset[str]  # of the standard library, and numpy, used only as `name.attribute`: the judge's own
    exceptions: frozenset[str]  # used where exception classes are used


@functools.lru_cache(maxsize=512)
def names_in(tests: tuple[str, ...], setup: str) -> Names:
    """Returns names in trusted tests, which must compile; many programs are judged by the same tests."""
    nodes = _by_type(ast.parse(test) for test in tests)
    bases = {id(node.value) for node in nodes[ast.Attribute]}
    loaded = [node for node in nodes[ast.Name] if type(node.ctx) is ast.Load]
    free = {node.id for node in loaded} - _defined(nodes)
    plain = {node.id for node in loaded if id(node) not in bases}
    modules = (free - plain - _defined(_by_type([_parse(setup)]))) & (sys.stdlib_module_names | _MODULES.keys())
    # After `except` and in `raises(...)` at any depth, after `raise` itself.
    classes = [handler.type for handler in nodes[ast.ExceptHandler] if handler.type]
    classes += [part for call in nodes[ast.Call] if _takes_classes(call.func) for part in call.args]
    where = [part for each in classes for part in ast.walk(each)]
    where += [getattr(node.exc, "func", node.exc) for node in nodes[ast.Raise]]
    exceptions = {node.id for node in where if type(node) is ast.Name}
    return Names(frozenset(free), frozenset(modules), frozenset(exceptions & free))


def _takes_classes(called: ast.expr) -> bool:
    return bool(_TAKES_CLASSES.fullmatch(getattr(called, "attr", getattr(called, "id", ""))))


def _by_type(trees: Iterable[ast.AST]) -> dict[type, list]:
    nodes: dict[type, list] = defaultdict(list)
    for tree in trees:
        for node in ast.walk(tree):
            nodes[type(node)].append(node)
    return nodes


def _import_what_setup_imports(setup: str, namespace: dict) -> None:
    """Imports the judge's own: the program may have put something else in the place of what its side imports."""
    for node in _parse(setup).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            with contextlib.suppress(ImportError):  # the program's side has it, or reports the error
                exec(compile(ast.Module([node], []), "setup", "exec"), namespace)


def _defined(nodes: dict[type, list]) -> set[str]:
    """Returns names that the code itself assigns, defines or imports, in whatever scope."""
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)
    imported = (alias for node in nodes[ast.Import] + nodes[ast.ImportFrom] for alias in node.names)
    return {
        *(node.id for node in nodes[ast.Name] if type(node.ctx) is not ast.Load),
        *(node.name for kind in named for node in nodes[kind] if node.name),
        *((alias.asname or alias.name).split(".")[0] for alias in imported),
    }


def _parse(setup: str) -> ast.Module:
    try:
        return ast.parse(setup)
    except (SyntaxError, ValueError):  # the program's side, which runs it, reports it
        return ast.Module([], [])


@functools.lru_cache(maxsize=512)
def compiled(source: str, name: str) -> types.CodeType:
    """Returns trusted code; raises `TestBroken`.

    `is`, `type(x)`, `hash(x)` and `x.__class__` are turned into calls of helpers: a stand-in has no say in them.
    """
    tree: str | ast.Module = source
    try:
        if _REWRITTEN.search(source):
            tree = ast.fix_missing_locations(_Rewrite().visit(ast.parse(source)))
        return compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise TestBroken(f"{name} does not compile: {error}") from None


_REWRITTEN = re.compile(r"\bis\b|\b(type|hash)\s*\(|__class__")


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


class _Rewrite(ast.NodeTransformer):
    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        if len(node.ops) > 1 or not isinstance(node.ops[0], ast.Is | ast.IsNot):
            return node
        if isinstance(node.left, ast.Constant) or isinstance(node.comparators[0], ast.Constant):
            return node
        same = _call(_SAME, node.left, node.comparators[0])
        return same if isinstance(node.ops[0], ast.Is) else ast.UnaryOp(ast.Not(), same)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ("type", "hash") and len(node.args) == 1:
            return _call(_ASK, ast.Constant(node.func.id), node.func, *node.args)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return _call(_ASK, ast.Constant("type"), ast.Name("type", ast.Load()), node.value)
        return node


def _same(session: Session, left: object, right: object) -> bool:
    """Returns `left is right`; between two objects of the program's that is the program's to say, so nobody does."""
    if issubclass(type(left), Own) and issubclass(type(right), Own) and left is not right:
        raise session.refuse("asks whether two objects of the program's own are one")
    if session.answered and left is not right and type(left) is type(right) and type(left) in _COPIED:
        raise session.refuse("asks whether two values are one object, which copies of them cannot tell")
    return left is right


def _ask(operation: str, function: Callable, value: Any) -> object:
    """Returns `type(value)` or `hash(value)`, which for an object of the program's is an answer."""
    own = function is getattr(builtins, operation) and issubclass(type(value), Own)
    return value._remote(operation) if own else function(value)
