"""Packages that are no part of the environment, such as other releases of `transformers`: each in a folder, kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp.pretrained.resolve import made_once

ROOT = Path(__file__).resolve().parents[1]
# The oldest release whose reading of an export is promised, the last before 5, and the first whose `generate` calls a
# cache `cache`; with the `tokenizers` and `huggingface_hub` of each.
RELEASES = {"4.40.2": ("0.19.1", "0.36.0"), "4.57.3": ("0.22.1", "0.36.0"), "5.24.0": ("0.23.3", "2.4.0")}
_OURS = ("transformers", "tokenizers", "huggingface_hub")
# Of this environment, and no part of theirs: what they would import only because it is there.
_ABSENT = ("sklearn", "scipy", "pandas", "torchao", "torchvision", "peft", "accelerate", "gguf", "mlflow")


def release_folder(version: str) -> Path:
    """The folder of a release, see :func:`folder_of_pins`."""
    tokenizers, hub = RELEASES[version]
    pins = [f"transformers=={version}", f"tokenizers=={tokenizers}", f"huggingface_hub=={hub}"]
    return folder_of_pins(f"transformers-{version}", pins)


def folder_of_pins(name: str, pins: list[str]) -> Path:
    """A folder with the packages, without what they depend on, installed where it is not there yet.

    Where they cannot be, the test is skipped, and pytest's summary says so (`-ra`): a machine without a package index
    is no fault of the project.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "wmtp-tests" / f"{name}-py{sys.version_info.minor}"
    uv = shutil.which("uv", path=f"{ROOT / '.tools/bin'}{os.pathsep}{os.environ['PATH']}")
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"  # a virtual environment has no pip
    command = (
        [uv, "pip", "install", "--python", sys.executable] if uv else [base, "-m", "pip", "install", "--retries=1"]
    )

    def install(partial: Path) -> None:
        whole = [*command, "--quiet", "--no-deps", "--target", partial, *pins]
        try:
            done = subprocess.run(list(map(str, whole)), capture_output=True, text=True, timeout=300)
            why = done.stderr.strip().splitlines()[-1:] if done.returncode else None
        except subprocess.TimeoutExpired:
            why = "no end after 300 s"
        if why is not None:
            pytest.skip(f"NOT TESTED with {name}, which cannot be installed here: {why}")

    return made_once(folder, install)


def become(folder: Path) -> None:
    """Import the release in place of this environment's; for a process that was forked and does nothing else after."""
    for name in list(sys.modules):
        if name.split(".")[0] in _OURS:
            del sys.modules[name]
    sys.modules.update(dict.fromkeys(_ABSENT))
    sys.path.insert(0, str(folder))
