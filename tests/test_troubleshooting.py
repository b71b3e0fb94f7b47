"""Every line that docs/troubleshooting.md quotes is one that the code can still print."""

import ast
import importlib.util
import re
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
BLOCKS = re.findall(r"^```text ?(\S*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
OURS = [line for source, block in BLOCKS if not source for line in block.splitlines()]
OTHERS = [(source, line) for source, block in BLOCKS if source not in ("", "other") for line in block.splitlines()]


@pytest.fixture(scope="module")
def messages() -> list[list[str]]:
    """The literal parts of every string of the library and the recipes, in order, where they say enough to be known."""
    found = []
    for file in [*ROOT.glob("wmtp/**/*.py"), *ROOT.glob("recipes/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                parts = [node.value]
            else:
                continue
            if sum(map(len, parts)) >= 15:
                found.append(parts)
    return found


def in_order(parts: list[str], line: str) -> bool:
    place = 0
    for part in parts:
        place = line.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_the_page_has_a_cure_for_many_lines():
    assert len(re.findall(r"^### ", PAGE, flags=re.MULTILINE)) == len(BLOCKS) >= 35


@pytest.mark.parametrize("line", OURS)
def test_the_code_can_print_the_line(messages, line):
    assert any(in_order(parts, line) for parts in messages), f"no message of wmtp/ or recipes/ reads like: {line}"


@pytest.mark.parametrize(("source", "line"), OTHERS)
def test_the_pinned_package_can_print_the_line(source, line):
    package, _, rest = source.partition("/")
    if not rest:
        file = Path(sysconfig.get_paths()["stdlib"]) / package
    elif package == "recipes":  # torchtune's, beside it; ours is of the same name
        file = Path(importlib.util.find_spec("torchtune").origin).parent.parent / source
    else:
        file = Path(importlib.util.find_spec(package).origin).parent / rest
    literal = [text for text in re.split(r"\[.*?\]|\(SIGKILL\)|\d+", line) if text.strip()]
    written = re.sub(r"\s+", " ", re.sub(r'"\s*\n\s*f?"', "", file.read_text()))
    assert all(text.strip(" .:") in written for text in literal)
