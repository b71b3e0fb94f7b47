"""The locked requirements are those of pyproject.toml."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_requirements_lock_holds_every_pin_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    locked = set(re.findall(r"^([\w.-]+==[\w.+-]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert [pin for pin in wanted if re.sub(r"\[.*\]", "", pin) not in locked] == []  # else: make lock
