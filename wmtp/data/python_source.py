"""Documented functions of a Python source tree: the signature and docstring are the prompt, the body is the target."""

import ast
import hashlib
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from wmtp.data.documents import Documents, collect, comes_from, document_from_text, printable
from wmtp.data.rows import reading, unreadable
from wmtp.errors import MissingError, UserError
from wmtp.numerics.keyed import text_hash
from wmtp.storage import local_copy

SPLITS = ("train", "reference", "heldout")
EXCLUDED = (
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip",
    "site-packages", "dist-packages", "__pycache__",
)  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A function cut in two; `prompt + body` is valid Python.

    `prompt` holds decorators, signature and docstring and ends with a newline. `body` starts with its own indentation
    (or with the comments and blank lines that follow the docstring) and ends with a newline. Both are the source text,
    moved left by the function's indentation.
    """

    module: str  # path below the root
    id: str  # module:line:qualified name
    prompt: str
    body: str


def _tree_state(arguments: Mapping[str, Any]) -> str | None:
    """Returns a text that changes with the modules below a folder, and with the Python that parses them."""
    folder, exclude = _root(arguments["root"]), arguments["exclude"]
    if isinstance(exclude, str) or not folder.is_dir():
        return None
    return f"{folder} {_tree_sha256(folder, exclude)} python {sys.version}"


def _tree_sha256(folder: Path, exclude: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in module_paths(folder, exclude):
        with reading(path):
            content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode(errors="surrogateescape"))
        digest.update(content)
    return digest.hexdigest()


def _root(root: str | None) -> Path:
    root = sysconfig.get_paths()["stdlib"] if root is None else root
    with reading(root):
        return local_copy(root)


@comes_from(_tree_state)
def python_functions(
    tokenizer,
    *,
    root: str | None = None,
    split: str = "train",
    fractions: Sequence[float] = (0.7, 0.2, 0.1),
    max_functions: int | None = None,
    min_body_lines: int = 1,
    max_body_lines: int | None = None,
    exclude: Sequence[str] = EXCLUDED,
) -> Documents:
    """Functions and methods with a docstring, out of every module below a folder.

    A hash of its path puts each module into one split: the same on every machine, and no function of a module is both
    in training and held out. Of functions with equal text the first in path order is kept, whatever its split.

    Args:
        root: folder of Python files; None is the standard library of this interpreter.
        split: ``train``, ``reference`` (for a reference model on data of its own), ``heldout``, or ``all``.
        fractions: shares of the modules for train, reference and heldout; each >= 0, together at most 1.
        max_functions: keep at most so many, a sample that depends on their ids alone.
        min_body_lines, max_body_lines: bounds on the lines of the body.
        exclude: names of folders that are not entered; by default those of tests, of installed packages, and of the
            standard library's applications.

    Raises:
        FileNotFoundError: root is no folder.
        ValueError: an argument out of range, or no function found.
    """
    folder = _root(root)
    with reading(folder):
        if not folder.is_dir():
            raise MissingError(f"root {folder} is no folder of Python files")
    if isinstance(exclude, str):
        raise UserError(f"exclude must be a list of folder names, got {exclude!r}; write [{exclude}]")
    if split not in (*SPLITS, "all"):
        raise UserError(f"split must be one of {', '.join(SPLITS)}, all, got {split!r}")
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) > 1 + 1e-9:
        raise UserError(f"fractions must be three numbers >= 0 that sum to at most 1, got {list(fractions)}")
    if max_functions is not None and max_functions < 1:
        raise UserError(f"max_functions must be >= 1, got {max_functions}")

    found, unparsed, repeated = _distinct_functions(folder, tuple(exclude), _tree_sha256(folder, exclude))
    of_split = [f for f in found if split in ("all", split_of(f.module, fractions))]
    longest = float("inf") if max_body_lines is None else max_body_lines
    functions = [f for f in of_split if min_body_lines <= f.body.count("\n") <= longest]
    first = f" (the first is {unparsed[0]})" if unparsed else ""
    skipped = {
        f"modules that Python cannot parse{first}": len(unparsed),
        "repeated functions": repeated,
        "bodies too short or too long": len(of_split) - len(functions),
    }
    if max_functions is not None and len(functions) > max_functions:
        chosen = {f.id for f in sorted(functions, key=lambda f: text_hash(f.id))[:max_functions]}
        functions = [f for f in functions if f.id in chosen]
    documents = collect(partial(document_from_text, tokenizer, f.prompt, f.body, f.id) for f in functions)
    return Documents(f"python_functions {split} of {folder}", documents, skipped)


@lru_cache(maxsize=2)  # a recipe asks for train and heldout of one tree
def _distinct_functions(folder: Path, exclude: tuple[str, ...], _sha256: str) -> tuple[list[Function], list[str], int]:
    """Returns all modules' functions, each text once, the modules that do not parse, and the count of repeated ones."""
    functions: dict[str, Function] = {}
    unparsed, repeated = [], 0
    for path in module_paths(folder, exclude):
        module = printable(path.relative_to(folder).as_posix())
        try:
            found = list(functions_of(read_source(path), module))
        except OSError as error:
            _refuse(error)
        # ValueError: null bytes, or bytes outside the declared encoding; the last two: code nested too deeply.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            unparsed.append(module)
            continue
        for function in found:
            if functions.setdefault(function.prompt + function.body, function) is not function:
                repeated += 1
    return list(functions.values()), unparsed, repeated


def module_paths(root: Path, exclude: Sequence[str] = EXCLUDED) -> list[Path]:
    """Returns the Python files below root, sorted by path; folders whose name is excluded are not entered."""
    found = []
    for folder, below, files in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if name not in exclude]
        found += [path for name in files if name.endswith(".py") and (path := Path(folder, name)).is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(error, error.filename) from error


def split_of(module: str, fractions: Sequence[float]) -> str | None:
    """Returns the split of a module by the hash of its relative path; None for the share that no split claims."""
    share = text_hash(module) / 2**64
    for split, fraction in zip(SPLITS, fractions, strict=True):
        if share < fraction:
            return split
        share -= fraction
    return None


def read_source(path: Path) -> str:
    """Reads a module's text by its declared encoding, with LF line ends."""
    with tokenize.open(path) as file:
        return file.read()


def functions_of(source: str, module: str) -> Iterator[Function]:
    """Yields the documented functions of a module and its classes in source order, without those inside functions.

    Functions without a body after the docstring, or whose body starts on the docstring's line, are left out.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        tree = ast.parse(source)
    lines = source.split("\n")  # not splitlines: Python does not end a line at a form feed
    for name, node in _walk(tree):
        if ast.get_docstring(node, clean=False) is None or len(node.body) < 2:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        docstring_end, following = node.body[0].end_lineno or node.lineno, node.body[1]
        if min([following.lineno, *(d.lineno for d in getattr(following, "decorator_list", ()))]) <= docstring_end:
            continue
        indent = lines[node.lineno - 1][: node.col_offset]
        text = [line.removeprefix(indent) + "\n" for line in lines[first - 1 : node.end_lineno]]
        cut = docstring_end - first + 1
        yield Function(module, f"{module}:{node.lineno}:{name}", "".join(text[:cut]), "".join(text[cut:]))


def _walk(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    waiting: list[tuple[ast.AST, str]] = [(tree, "")]  # no recursion: an elif is nested in the one before it
    while waiting:
        node, prefix = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            continue
        prefix = f"{prefix}{node.name}." if isinstance(node, ast.ClassDef) else prefix
        inside = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt | ast.ExceptHandler | ast.match_case)]
        waiting += [(child, prefix) for child in reversed(inside)]
