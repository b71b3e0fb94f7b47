"""What a result depends on beside its config: code, packages, hardware."""

import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wmtp.secrets import mask_secrets

_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets", "mlflow", "wmtp")
_MAX_CHANGES = 2_000_000  # characters of the diff that are kept
_CODE = {".py", ".yaml", ".yml", ".toml", ".sh"}
_MAX_NEW_FILE = 100_000  # bytes: a larger file that git does not know, or one of another kind, is named only
_NO_PART_OF_THE_RESULT = ("output_dir", "resume", "overwrite", "tracking")


def environment_tags() -> dict[str, str]:
    """The tags of every run: code version, packages, Python, hardware, number of processes."""
    import torch
    import torch.distributed as dist

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hardware = f"{devices} x {torch.cuda.get_device_name()}, " if devices else ""
    commit, changed = _git("rev-parse", "HEAD").strip(), _git("status", "--porcelain").strip()
    return {
        # An image has the commit it was built from in its environment, and no checkout.
        "wmtp.git_commit": commit or os.environ.get("WMTP_GIT_COMMIT") or "unknown",
        "wmtp.git_dirty": str(bool(changed)),
        "wmtp.packages": " ".join(f"{name}=={_version(name)}" for name in _PACKAGES),
        "wmtp.python": platform.python_version(),
        "wmtp.hardware": f"{hardware}{os.cpu_count()} x {_cpu_name()}",
        "wmtp.world_size": str(dist.get_world_size() if dist.is_initialized() else 1),
    }


def config_sha256(cfg: dict) -> str:
    """SHA-256 of a resolved config without what decides only where a run is written: equal runs have equal hashes."""
    kept = {key: value for key, value in cfg.items() if key not in _NO_PART_OF_THE_RESULT}
    return hashlib.sha256(repr(_sorted(kept)).encode()).hexdigest()


def code_changes() -> str:
    """The diff between the commit and the files as they are, new files too, without secrets; empty for none."""
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff")
    root = Path(_git("rev-parse", "--show-toplevel").strip() or ".")
    for name in filter(None, _git("-C", str(root), "ls-files", "--others", "--exclude-standard", "-z").split("\0")):
        file = root / name
        if file.suffix in _CODE and file.is_file() and file.stat().st_size <= _MAX_NEW_FILE:
            diff += _git("-C", str(root), "diff", "--no-color", "--no-ext-diff", "--no-index", "/dev/null", name, ok=1)
        else:
            diff += f"Only in the working tree, not shown: {name}\n"
    if len(diff) > _MAX_CHANGES:
        diff = f"{diff[:_MAX_CHANGES]}\nCut here: the diff has {len(diff)} characters.\n"
    return mask_secrets(diff)


def _git(*args: str, ok: int = 0) -> str:
    """What git says in the checkout of the working directory, or else in that of this package; empty where it fails."""
    for folder in (Path.cwd(), Path(__file__).resolve().parent):
        command = ("git", "-C", str(folder), *args)
        try:
            inside = subprocess.run(
                ("git", "-C", str(folder), "rev-parse", "HEAD"), capture_output=True, check=False, timeout=10
            )
            if inside.returncode == 0:
                done = subprocess.run(command, capture_output=True, check=False, timeout=60)
                return done.stdout.decode("utf-8", "replace") if done.returncode in (0, ok) else ""
        except (OSError, subprocess.SubprocessError):
            return ""  # no git, or it hangs: the tag says unknown
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that is on the path, not installed
        return "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _sorted(value):
    if isinstance(value, dict):
        return [(str(key), _sorted(value[key])) for key in sorted(value, key=str)]
    return [_sorted(child) for child in value] if isinstance(value, list) else value
