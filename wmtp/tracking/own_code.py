"""A researcher's own code that a run depends on: components outside of WMTP, a copied recipe, what they import."""

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from wmtp.files import file_sha256

_PACKAGE = Path(__file__).resolve().parents[1]
_OTHERS = {_PACKAGE, _PACKAGE.parent / "recipes"} | {
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
}


def own_code(cfg: object, recipe: str) -> dict[str, Path]:
    """The source files by the path at which they can be imported again; empty where all code is WMTP's or installed.

    Args:
        cfg: the config as plain containers: the modules of its ``_component_`` s are looked at.
        recipe: the recipe's name, as in :func:`recipe_module`.
    """
    names = [*_components(cfg), recipe_module(recipe)]
    found: dict[str, Path] = {}
    while names:
        name = names.pop()
        module = sys.modules.get(name)
        file = _own_file(module)
        if module is None or file is None or file in found.values():
            continue
        at = file.name if name == "__main__" else name.replace(".", "/")
        found[at if name == "__main__" else f"{at}/__init__.py" if file.name == "__init__.py" else f"{at}.py"] = file
        names += _imports(module, file)
    return dict(sorted(found.items()))


def recipe_module(recipe: str) -> str:
    """The module that the recipe of that name runs as: what this process was started with, or one that it imported."""
    known = [name for name in list(sys.modules) if name.rpartition(".")[2] == recipe]
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem == recipe
    return "__main__" if started or not known else known[0]


def code_sha256(code: Mapping[str, Path]) -> str:
    """One hash of all the files and their names."""
    lines = [f"{file_sha256(file)}  {name}\n" for name, file in sorted(code.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _components(value: object) -> Iterator[str]:
    """Every module that a ``_component_`` path passes through."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key == "_component_" and isinstance(child, str):
            yield from _with_packages(child)
        yield from _components(child)


def _own_file(module: ModuleType | None) -> Path | None:
    file = Path(getattr(module, "__file__", None) or "").resolve()
    installed = {"site-packages", "dist-packages"} & set(file.parts) or _OTHERS & set(file.parents)
    return file if file.suffix == ".py" and file.is_file() and not installed else None


def _imports(module: ModuleType, file: Path) -> Iterator[str]:
    """Names of what a module imports anywhere in its source, as far as they may be modules."""
    package = getattr(module, "__package__", None) or ""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # it was changed after it was imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_packages(alias.name)
        elif isinstance(node, ast.ImportFrom):
            try:
                name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:  # `from .utils` in a script, which then tries `from utils`
                continue
            for alias in node.names:
                yield from _with_packages(f"{name}.{alias.name}")


def _with_packages(name: str) -> Iterator[str]:
    """``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
