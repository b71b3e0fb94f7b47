"""Write docs/architecture.md: the rooms of `wmtp`, who may import whom, what a recipe pulls in; from the imports alone.

    python docs/make_architecture.py             (`make docs`)
    python docs/make_architecture.py --check     exit status 1 if the file is not what this would write
    python docs/make_architecture.py --sizes     files and lines of the rooms, and what each recipe pulls in

A room is a package or a single file at the top of `wmtp`. Its floor is one above the highest room that it imports. An
import inside a function counts for who may import whom, and not for what a recipe pulls in. Nothing is imported here.
"""

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "architecture.md"

_HEAD = """# Architecture

The rooms of the library, written by `make docs` from the imports: do not edit.

Recipes are scripts with a plain loop; each imports small builders from these rooms. Imports go down: a room imports
rooms of lower floors only, no two files import each other, and `sandbox`, which runs programs that nobody trusts,
imports nothing of the rest and is imported by `eval` alone. tests/test_architecture.py holds all of it.
"""


@cache
def modules() -> dict[str, Path]:
    """All modules of the library by dotted name; a package is its `__init__`."""
    found = {}
    for path in sorted((ROOT / "wmtp").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> dict[str, bool]:
    """The library's modules that a file imports, and whether as soon as it is imported itself."""
    found: dict[str, bool] = {}
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            while name and name not in modules():
                name = name.rpartition(".")[0]
            if name and modules()[name] != path:
                found[name] = found.get(name, False) or node.col_offset == 0
    return found


@cache
def graph() -> dict[str, dict[str, bool]]:
    """What every module imports, as :func:`imported` has it."""
    return {name: imported(path) for name, path in modules().items()}


def room(module: str) -> str:
    """The room of a module: the part of its name below `wmtp`."""
    return module.split(".")[1] if "." in module else module


def rooms() -> dict[str, set[str]]:
    """The rooms that each room imports, anywhere in a file."""
    found: dict[str, set[str]] = {room(name): set() for name in modules() if "." in name}
    for name, others in graph().items():
        if "." in name:
            found[room(name)].update(room(other) for other in others if "." in other and room(other) != room(name))
    return found


def circles(imports: dict[str, dict[str, bool]] | dict[str, set[str]]) -> list[str]:
    """Where one comes back to where one was by following imports: `a -> b -> a`; none where the list is empty."""
    found, done = [], set()

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            found.append(" -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for other in sorted(imports[name]):
                walk(other, [*way, name])
            done.add(name)

    for name in imports:
        walk(name, [])
    return found


def floors() -> dict[str, int]:
    """The floor of every room, from 0 for those that import no other."""
    below = rooms()

    @cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, below[name]), default=-1)

    return {name: floor(name) for name in below}


def pulled_in(recipe: Path) -> set[str]:
    """The library's modules that are imported when a recipe is."""
    found: set[str] = set()
    waiting = [name for name, at_once in imported(recipe).items() if at_once]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for other, at_once in graph()[name].items() if at_once]
            waiting += [name.rpartition(".")[0]] * ("." in name)  # a package comes before what is in it
    return found


def lines(names: set[str]) -> int:
    """Lines of these modules together."""
    return sum(len(modules()[name].read_text().splitlines()) for name in names)


def purpose(name: str) -> str:
    """The first sentence of a room's docstring."""
    text = " ".join(
        (ast.get_docstring(ast.parse(modules()[f"wmtp.{name}"].read_text())) or "").split("\n\n")[0].split()
    )
    return text.partition(". ")[0].rstrip(".").replace("|", "\\|")


def inside(name: str) -> set[str]:
    """The modules of a room."""
    return {module for module in modules() if "." in module and room(module) == name}


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("[a-z]*.py"))


def architecture() -> str:
    """The text of docs/architecture.md."""
    below, floor = rooms(), floors()
    text = [_HEAD, "| floor | room | what it is | imports |", "|---|---|---|---|"]
    for name in sorted(below, key=lambda name: (-floor[name], name)):
        imports = ", ".join(sorted(below[name], key=lambda other: (-floor[other], other))) or "nothing"
        text.append(f"| {floor[name]} | `{name}` | {purpose(name)} | {imports} |")
    text += ["", "What a recipe pulls in when it starts:", "", "| recipe | rooms |", "|---|---|"]
    for recipe in recipes():
        found = ", ".join(sorted({room(name) for name in pulled_in(recipe) if "." in name}))
        text.append(f"| `{recipe.name}` | {found} |")
    return "\n".join(text) + "\n"


def sizes() -> str:
    """Files and lines of each room, of all together, and of what each recipe pulls in."""
    counted = {name: inside(name) for name in sorted(rooms())} | {"wmtp": set(modules())}
    counted |= {recipe.name: pulled_in(recipe) for recipe in recipes()}
    return "\n".join(f"{name:40} {len(found):4} files {lines(found):6} lines" for name, found in counted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is not up to date")
    parser.add_argument("--sizes", action="store_true", help="write nothing; print files and lines")
    args = parser.parse_args()
    if args.sizes:
        print(sizes())
    elif not args.check:
        TARGET.write_text(architecture())
    elif TARGET.read_text() != architecture():
        sys.exit("error: docs/architecture.md is not what the imports say; run make docs")


if __name__ == "__main__":
    main()
