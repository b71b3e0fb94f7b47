"""What of requirements.lock goes into the image: everything but torch, which the base brings with its own CUDA.

    python docker/locked.py base FOLDER      # the base has the pinned torch and a Python that pyproject.toml allows
    python docker/locked.py select FOLDER    # prints the requirements to install beside that torch, with their hashes
    python docker/locked.py verify FOLDER    # what is installed is what was selected, and torch is still the base's

FOLDER holds pyproject.toml and requirements.lock. Standard library alone: it runs in a bare base.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def blocks(lock: str) -> list[str]:
    """The requirements of a lock file, each with its hash and `# via` lines."""
    return re.split(r"\n(?=[A-Za-z0-9])", lock.strip())


def name_and_pin(block: str) -> tuple[str, str]:
    """A requirement's name and version."""
    match = re.match(r"([\w.-]+)==([\w.+!-]+)", block)
    if match is None:
        raise SystemExit(f"error: requirements.lock holds a line that pins nothing: {block.splitlines()[0]!r}")
    return match[1], match[2]


def parents(block: str) -> set[str]:
    """The packages that brought a requirement in, from its `# via` lines."""
    after = re.search(r"# via\b(.*)", block, re.DOTALL)
    return set(re.findall(r"[\w.-]+", after[1].replace("#", " "))) if after else set()


def selected(lock: str, dependencies: list[str], without: str = "torch") -> list[str]:
    """The blocks of what `dependencies` need, except `without` and what is there for its sake alone.

    The lock holds the development group too, and torch's CUDA wheels; neither is reached from the project's own
    dependencies without passing through torch.
    """
    kept = {re.split(r"[=<>\[; ]", pin, maxsplit=1)[0] for pin in dependencies} - {without}
    every = [(name_and_pin(block)[0], parents(block), block) for block in blocks(lock)]
    while reached := {name for name, via, _ in every if via & kept} - kept - {without}:
        kept |= reached
    return [block for name, _, block in every if name in kept]


def applies(block: str) -> bool:
    """Whether the requirement is for this Python: the one part of a marker by which the lock names a package twice."""
    bound = re.search(r"python_full_version (<|>=) '(\d+)\.(\d+)'", block.splitlines()[0])
    if bound is None:
        return True
    older = sys.version_info[:2] < (int(bound[2]), int(bound[3]))
    return older if bound[1] == "<" else not older


def check_base(project: dict, lock: str) -> None:
    """Refuse a base whose Python or torch is not what the project pins, and a torch installed over the base's."""
    wanted = project["project"]["requires-python"]
    for sign, major, minor in re.findall(r"(>=|<)(\d+)\.(\d+)", wanted):
        newer = sys.version_info[:2] >= (int(major), int(minor))
        if newer != (sign == ">="):
            raise SystemExit(f"error: the base has Python {sys.version.split()[0]}, pyproject.toml wants {wanted}")
    pin = dict(map(name_and_pin, blocks(lock)))["torch"]
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the base has no torch; choose a BASE with torch {pin}")
    if version("torch").split("+")[0] != pin:
        raise SystemExit(f"error: the base has torch {version('torch')}, requirements.lock pins {pin}; change BASE")
    if sys.prefix != sys.base_prefix and Path(spec.origin).is_relative_to(sys.prefix):
        raise SystemExit(f"error: torch was installed into {sys.prefix}, over the base's; it must not be selected")


def check_installed(requirements: list[str]) -> None:
    """Refuse an environment in which a selected requirement is missing or has another version."""
    for name, pin in (name_and_pin(block) for block in requirements if applies(block)):
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found != pin:
            raise SystemExit(f"error: {name} {found} is installed, requirements.lock pins {pin}")


def main(command: str, folder: str) -> None:
    project = tomllib.loads((Path(folder) / "pyproject.toml").read_text())
    lock = (Path(folder) / "requirements.lock").read_text()
    requirements = selected(lock, project["project"]["dependencies"])
    if command == "select":
        print("\n".join(requirements))
        return
    if command not in ("base", "verify"):
        raise SystemExit(f"error: command must be base, select or verify, got {command!r}")
    check_base(project, lock)
    if command == "verify":
        check_installed(requirements)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: locked.py base|select|verify FOLDER")
    main(*sys.argv[1:])
