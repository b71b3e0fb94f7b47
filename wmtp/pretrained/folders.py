"""Folders that hold a model: the hash that identifies one, and a lock under which one process makes it for all."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.files import MANIFEST, file_sha256, locked, publish, unfinished

RUN_FILE = "wmtp_run.json"  # in an exported folder: the run that made it
_ABOUT = {RUN_FILE, MANIFEST, "README.md"}


def checkpoint_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of the names and contents of a checkpoint folder's files, which identifies the model.

    Files about the model (the run that made it, the manifest, its card) do not count: the same weights are the same
    model, whatever run trained them and wherever they lie.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.is_file() and p.name not in _ABOUT):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def model_tags(path: Path | None) -> dict[str, str]:
    """Returns a model's MLflow tags: its hash, and the run that trained it where its folder names one."""
    if path is None:
        return {}
    tags = {"wmtp.model_sha256": checkpoint_sha256(path)}
    file = path / RUN_FILE
    if file.is_file():
        run_id = json.loads(file.read_text()).get("run_id")
        tags |= {"wmtp.training_run_id": run_id} if run_id else {}
    return tags


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """Gives the first process a place to make the folder in, and all others None once the folder is there."""
    if folder.is_dir():  # it appeared by a rename, so it is whole
        yield None
        return
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        partial = unfinished(folder)  # with the lock taken, its remains are those of a killed process
        yield partial
        publish(partial, folder)
