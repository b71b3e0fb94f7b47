"""Code (the researcher's own too), packages and hardware that a result depends on beside its config."""

import ast
import getpass
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from wmtp.errors import mask_secrets
from wmtp.files import file_sha256

_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets", "mlflow", "wmtp")
_MAX_CHANGES = 2_000_000  # characters of the diff that are kept
_CODE = {".py", ".yaml", ".yml", ".toml", ".sh"}
_MAX_NEW_FILE = 100_000  # bytes: of a larger untracked file, or one of another kind, only the name is kept
_SOURCE = Path(__file__).resolve()
_OTHERS = {_SOURCE.parents[1], _SOURCE.parents[2] / "recipes"} | {
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
}
_NO_PART_OF_THE_RESULT = ("output_dir", "resume", "overwrite", "tracking")


def environment_tags(own: Collection[Path] = ()) -> dict[str, str]:
    """Returns the tags of every run: code versions, packages, Python, hardware, number of processes.

    ``wmtp.git_dirty`` says whether any code is in no commit, the researcher's own files too; ``wmtp.own_git_commit``
    has the commits of the repositories that these are in.
    """
    import torch
    import torch.distributed as dist

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hardware = f"{devices} x {torch.cuda.get_device_name()}, " if devices else ""
    ours, theirs = repositories([_SOURCE]), repositories(own)
    commits = {root: _git(root, "rev-parse", "HEAD").strip() for root in {*ours, *theirs}}
    changed = any(_git(root, "status", "--porcelain").strip() for root in commits)
    # An image has no checkout; the commit that it was built from is in its environment.
    commit = next(map(commits.get, ours), None) or os.environ.get("WMTP_GIT_COMMIT") or "unknown"
    elsewhere = " ".join(f"{root.name}@{commits[root] or 'unknown'}" for root in theirs if root not in ours)
    return {
        "wmtp.git_commit": commit,
        "wmtp.git_dirty": str(changed or not all(_git(file.parent, "ls-files", "--", file.name) for file in own)),
        **({"wmtp.own_git_commit": elsewhere} if elsewhere else {}),
        "wmtp.packages": " ".join(f"{name}=={_version(name)}" for name in _PACKAGES),
        "wmtp.python": platform.python_version(),
        "wmtp.hardware": f"{hardware}{os.cpu_count()} x {_cpu_name()}",
        "wmtp.world_size": str(dist.get_world_size() if dist.is_initialized() else 1),
    }


def config_sha256(cfg: dict) -> str:
    """Returns the SHA-256 of a resolved config without the keys that only say where a run is written."""
    kept = {key: value for key, value in cfg.items() if key not in _NO_PART_OF_THE_RESULT}
    named = json.loads(json.dumps(kept, default=str))  # YAML's keys may be of several types, which have no order
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def mlflow_fields(cfg: dict, facts: Mapping[str, object], recipe: str) -> dict[str, str]:
    """Returns the tags that MLflow's pages show of a run: source and its version, user, and a description."""
    file = Path(getattr(sys.modules[recipe_module(recipe)], "__file__", None) or recipe)
    commit = next((_git(root, "rev-parse", "HEAD").strip() for root in repositories([file])), "")
    made_by = f"{(cfg.get('model') or {}).get('_component_', 'model')} from {cfg.get('checkpoint') or 'random weights'}"
    lines = [
        f"**{facts['method']}** on **{facts['dataset']}**",
        f"samples of {cfg['samples']}" if cfg.get("samples") else made_by,
        f"`{shlex.join(sys.argv)}`, {os.environ.get('WORLD_SIZE', '1')} process(es)",
    ]
    return {
        "mlflow.source.name": str(file),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit or os.environ.get("WMTP_GIT_COMMIT") or "unknown",
        "mlflow.user": login_name(),
        "mlflow.note.content": "\n\n".join(lines),
    }


def login_name() -> str:
    """Returns the name of this process's user; a container's user may have only a number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid {os.getuid()}"


def repositories(files: Iterable[Path]) -> list[Path]:
    """Returns the git checkouts of files, each once. Files that git ignores, such as installed packages, have none."""
    known = [file for file in files if not _git(file.parent, "check-ignore", file.name)]
    roots = [_git(file.parent, "rev-parse", "--show-toplevel").strip() for file in known]
    return [Path(root) for root in dict.fromkeys(roots) if root]


def code_changes(own: Iterable[Path] = ()) -> str:
    """Returns the uncommitted diffs of WMTP's checkout and of those with the researcher's own files, secrets masked.

    New files are included; without changes the text is empty.
    """
    diff = "".join(map(_changes, repositories([_SOURCE, *own])))
    if len(diff) > _MAX_CHANGES:
        diff = f"{diff[:_MAX_CHANGES]}\nCut here: the diff has {len(diff)} characters.\n"
    return mask_secrets(diff)


def _changes(root: Path) -> str:
    diff = _git(root, "diff", "HEAD", "--no-color", "--no-ext-diff")
    for name in filter(None, _git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0")):
        file = root / name
        if file.suffix in _CODE and file.is_file() and file.stat().st_size <= _MAX_NEW_FILE:
            diff += _git(root, "diff", "--no-color", "--no-ext-diff", "--no-index", "/dev/null", name, ok=1)
        else:
            diff += f"Only in the working tree, not shown: {name}\n"
    return diff and f"# In the checkout {root.name}\n{diff}"


def _git(folder: Path, *args: str, ok: int = 0) -> str:
    """Returns git's output in a folder; empty if git fails or there is no commit."""
    try:
        done = subprocess.run(("git", "-C", str(folder), *args), capture_output=True, check=False, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""  # git is not installed, or hangs: the tag says unknown
    return done.stdout.decode("utf-8", "replace") if done.returncode in (0, ok) else ""


def _version(name: str) -> str:
    with suppress(PackageNotFoundError):  # run from a checkout that is on the path, not installed
        return version(name)
    return "unknown"


def _cpu_name() -> str:
    with suppress(OSError):  # no Linux
        if name := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return name[1]
    return platform.processor() or platform.machine()


# ----------------------------------------------------------------------------------------------------------------------
# The researcher's own code: components outside WMTP, a copied recipe, and their imports


def own_code(cfg: object, recipe: str) -> dict[str, Path]:
    """Returns the source files by the path from which they can be imported again; empty if all code is installed.

    They are those of the config's ``_component_`` s and of the recipe, and what these import.
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
    """Returns the name of the module that a recipe runs as: ``__main__``, or an imported module of that name."""
    known = [name for name in list(sys.modules) if name.rpartition(".")[2] == recipe]
    started = Path(getattr(sys.modules["__main__"], "__file__", None) or "").stem == recipe
    return "__main__" if started or not known else known[0]


def code_sha256(code: Mapping[str, Path]) -> str:
    """Returns one hash of all files and their names."""
    lines = [f"{file_sha256(file)}  {name}\n" for name, file in sorted(code.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _components(value: object) -> Iterator[str]:
    """Yields every module that a ``_component_`` path passes through."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        if key == "_component_" and isinstance(child, str):
            yield from _with_packages(child)
        yield from _components(child)


def _own_file(module: ModuleType | None) -> Path | None:
    file = Path(getattr(module, "__file__", None) or "").resolve()
    installed = {"site-packages", "dist-packages"} & set(file.parts) or _OTHERS & set(file.parents)
    return file if file.suffix == ".py" and file.is_file() and not installed else None


def _imports(module: ModuleType, file: Path) -> Iterator[str]:
    """Yields the names that a module imports anywhere in its source; some may be no modules."""
    package = getattr(module, "__package__", None) or ""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # the file was changed after the import
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
    """Yields ``a``, ``a.b`` and ``a.b.c`` of ``a.b.c``."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))
