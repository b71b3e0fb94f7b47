"""What goes into the image: the lock without torch and without development, by hash."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH = version("torch").split("+")[0]


def locked(command, folder=ROOT):
    done = subprocess.run(
        [sys.executable, ROOT / "docker/locked.py", command, folder], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr.strip()


def selected_pins(text):
    return re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.MULTILINE)


@pytest.fixture
def small_lock(tmp_path):
    """A lock in which every way leads somewhere: through torch, through development, and through both."""
    lock = f"""\
both==1.0 ; sys_platform == 'linux' \\
    --hash=sha256:aa
    # via
    #   library
    #   torch
cuda==13.0 \\
    --hash=sha256:bb
    # via torch
library==2.0 \\
    --hash=sha256:cc
    # via
    #   checker
    #   project
checker==3.0 \\
    --hash=sha256:dd
    # via project
torch=={TORCH} \\
    --hash=sha256:ee
    # via
    #   library
    #   project
"""
    project = f'[project]\nrequires-python = ">=3.11,<3.13"\ndependencies = ["torch=={TORCH}", "library==2.0"]\n'

    def write(lock=lock, project=project):
        (tmp_path / "requirements.lock").write_text(lock)
        (tmp_path / "pyproject.toml").write_text(project)
        return tmp_path

    write.lock, write.project = lock, project
    return write


def test_selected_is_what_the_library_needs_without_torch_and_development(small_lock):
    status, text, _ = locked("select", small_lock())
    assert status == 0
    assert selected_pins(text) == [("both", "1.0"), ("library", "2.0")]
    assert text.count("--hash=") == 2


def test_every_dependency_of_the_library_but_torch_goes_into_the_image():
    _, text, _ = locked("select")
    selected = {name for name, _ in selected_pins(text)}
    wanted = {re.split(r"[=\[]", pin)[0] for pin in PROJECT["project"]["dependencies"]}
    assert wanted - selected == {"torch"}
    of_torch = {name for name in selected if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert of_torch == {"nvidia-ml-py"}  # plain Python, which reads a GPU's figures
    development = {re.split(r"[=\[]", pin)[0] for pin in PROJECT["dependency-groups"]["dev"]}
    assert not development & selected
    assert text.count("--hash=") >= len(selected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"torch=={TORCH}", "torch==2.0.1", "requirements.lock pins 2.0.1; change BASE"),
        (">=3.11,<3.13", ">=3.8,<3.9", "pyproject.toml wants >=3.8,<3.9"),
    ],
    ids=["torch", "python"],
)
def test_a_base_of_other_versions_is_refused(small_lock, old, new, message):
    folder = small_lock(small_lock.lock.replace(old, new), small_lock.project.replace(old, new))
    status, _, error = locked("base", folder)
    assert status == 1
    assert message in error
    assert "\n" not in error


def test_an_environment_without_a_locked_package_is_refused():
    # This environment has a torch of its own, which `verify` refuses first: ask for the packages alone.
    code = "import locked; locked.check_installed(['both==1.0'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docker", capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: both none is installed, requirements.lock pins 1.0"


def test_torch_installed_over_the_base_is_refused():
    status, _, error = locked("verify")  # this environment holds torch itself, as an image's must not
    assert status == 1
    assert "torch was installed into" in error


def test_what_builds_the_wheel_is_what_pyproject_names():
    pins = selected_pins((ROOT / "docker/build-requirements.lock").read_text())
    assert PROJECT["build-system"]["requires"] == [f"{name}=={pin}" for name, pin in pins if name == "hatchling"]


def test_the_build_context_lets_in_what_the_dockerfile_copies_and_nothing_else():
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = [line.split()[1:-1] for line in dockerfile.splitlines() if re.match(r"COPY (?!--from)", line)]
    sources = {path for paths in copied for path in paths if not path.startswith("--")}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line[1:] for line in ignore if line.startswith("!")} == sources
    assert all((ROOT / path).exists() for path in sources)
