"""The rooms of the library: imports go down, in no circle, and a training recipe pulls in no more than it needs."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOOSE = {"distributed", "errors", "files"}  # single files at the top; all else has a room


@pytest.fixture(scope="module")
def drawn():
    spec = importlib.util.spec_from_file_location("make_architecture", ROOT / "docs" / "make_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_imports_say(drawn):
    assert drawn.TARGET.read_text() == drawn.architecture(), "run make docs"


def test_no_circle_of_files_or_rooms(drawn):
    assert drawn.circles(drawn.graph()) == []
    assert drawn.circles(drawn.rooms()) == []
    assert drawn.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b -> c -> b"]


def test_few_rooms_and_no_loose_files(drawn):
    single = {name for name in drawn.rooms() if drawn.modules()[f"wmtp.{name}"].name != "__init__.py"}
    assert single == LOOSE
    assert len(drawn.rooms()) <= 20


def test_the_sandbox_stands_apart(drawn):
    below = drawn.rooms()
    assert below["sandbox"] == set()
    assert [name for name in below if "sandbox" in below[name]] == ["eval"]


@pytest.mark.parametrize(
    "recipe, lines", [("full_finetune_distributed_wmtp", 10400), ("lora_wmtp", 10882), ("critic_stage1", 9465)]
)
def test_a_training_recipe_imports_little_and_no_judge(drawn, recipe, lines):
    """Counted from the imports, and by importing it; what a config names comes on top."""
    found = drawn.pulled_in(ROOT / "recipes" / f"{recipe}.py")
    rooms = {drawn.room(name) for name in found}
    assert {"training", "models", "data"} <= rooms
    assert not rooms & {"sandbox", "eval", "registry", "generation"}
    assert len(found) <= 74 and drawn.lines(found) <= lines
    program = f"import sys; import recipes.{recipe}; print(*(n for n in sys.modules if n.partition('.')[0] == 'wmtp'))"
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(shown.splitlines()[-1].split()) - {"wmtp.training.launcher"} == found  # torch imports the launcher
