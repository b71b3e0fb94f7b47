"""Folders that hold a model: what identifies one, and how one is made once for all who ask."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.files import MANIFEST, file_sha256, locked, publish, unfinished

RUN_FILE = "wmtp_run.json"  # in an exported folder: the run that made it
_ABOUT = {RUN_FILE, MANIFEST, "README.md"}


def checkpoint_sha256(path: str | Path) -> str:
    """SHA-256 over the names and contents of a checkpoint folder's files: which model a result is of.

    What is said about the model (which run made it, what the folder holds, its card) is left out: the same weights are
    the same model whoever trained them, and wherever they lie.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).iterdir() if p.is_file() and p.name not in _ABOUT):
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def model_tags(path: Path | None) -> dict[str, str]:
    """What a run on a model tells MLflow about it: its hash, and the run that trained it where its folder says so."""
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
    """Give the first process that asks a place to make the folder in, and all others None once the folder is there."""
    if folder.is_dir():  # it appeared by a rename, so it is whole
        yield None
        return
    with locked(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            yield None
            return
        partial = unfinished(folder)  # what is there is of a process that was killed: the lock is ours
        yield partial
        publish(partial, folder)
