"""The sandbox stands alone: it imports nothing else of the library, and its files import only what is below them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import wmtp.sandbox

FOLDER = Path(wmtp.sandbox.__file__).parent
ORDER = [name for line in wmtp.sandbox.__doc__.splitlines()[-6:] for name in line[20:].split()]


def imported(path):
    """Modules of the library that a file imports, at its top or inside of functions, under whatever condition."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in names if name.partition(".")[0] == "wmtp")


def test_the_order_names_every_file_once():
    assert sorted(ORDER) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_those_before_it(name):
    below = ORDER[: ORDER.index(name)]
    for target in imported(FOLDER / f"{name}.py"):
        assert target.startswith("wmtp.sandbox.") and target.split(".")[2] in below, target


def test_nothing_else_of_the_library_is_loaded():
    code = "import sys, wmtp.sandbox; print(*[name for name in sys.modules if name.startswith('wmtp')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - {"wmtp"}
    assert loaded and all(name.startswith("wmtp.sandbox") for name in loaded)
