"""Atomic writes of files and folders, their hashes and manifests, and locks between processes."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wmtp.errors import UserError, may_fill

MANIFEST = "manifest.json"
UNFINISHED = ".tmp"  # suffix of a file or folder that is being written
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_RACY_NS = 2 * 10**9  # a file this young may change again without a new ctime, which moves in ticks


def cache_folder() -> Path:
    """Returns the folder for data that is fetched or computed once: ``$WMTP_CACHE`` or ``~/.cache/wmtp``."""
    return may_fill(Path(os.environ.get("WMTP_CACHE") or Path.home() / ".cache" / "wmtp"))


def bytes_of(text: str) -> int | None:
    """Returns the bytes that a size such as 200GB or 1.5 TB means; None if it is none."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    return None if size is None else int(float(size[1]) * _UNITS[size[2]])


def require_folder(folder: Path, what: str) -> None:
    """Refuses a path that can be no folder, because it is a file or lies below one; nothing is made."""
    there = next((at for at in (folder, *folder.parents) if os.path.lexists(at)), None)
    if there is not None and not there.is_dir():
        raise UserError(f"{what} {folder} can be no folder: {there} is a file; name another folder")


def require_file(path: Path, what: str) -> None:
    """Refuses a path that can be no file, because it is a folder or lies below a file; nothing is made."""
    if path.is_dir():
        raise UserError(f"{what}={path} is a folder; name a file to write")
    require_folder(path.parent, f"{what}={path}:")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(path: Path) -> Path:
    """Returns the path to write a file or a folder to before :func:`publish`; removes a killed process's remains."""
    written = path.with_name(path.name + UNFINISHED)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(written, ignore_errors=True)
    return written


def publish(written: Path, path: Path) -> None:
    """Renames a written file or folder to its final path. Content and name are on disk when this returns."""
    for part in (*written.rglob("*"), written):
        sync(part)
    os.replace(written, path)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file in UTF-8 atomically: a killed process leaves the old or the new file whole."""
    written = unfinished(path)
    written.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    publish(written, path)


def take_lock(path: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Locks a file, which is created if absent and never removed, against all other threads and processes of the host.

    Returns:
        A descriptor: the lock ends when it is closed, or with the process. None if another has the lock and ``wait`` is
        False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Holds :func:`take_lock` for a block; yields whether the lock was free."""
    descriptor = take_lock(path, shared=shared, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def locked_cache(path: Path, where: str, way_out: str) -> Iterator[None]:
    """Holds :func:`locked` on a file of a cache for a block.

    Raises:
        UserError: the cache, which is named by ``where``, cannot be written to.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(path))
        except OSError as error:
            raise UserError(f"{where}: {path.parent} cannot be written ({error.strerror}); {way_out}") from error
        yield


def file_state(file: Path) -> list[int]:
    """Returns the facts that change when a file is written or replaced; programs can set mtime, but not ctime."""
    stat = file.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def content_sha256(file: Path) -> str:
    """Returns the SHA-256 of a large file: one process of a host reads it, and notes the hash until it changes."""
    state = file_state(file)
    note = cache_folder() / "sha256" / hashlib.sha256(str(state).encode()).hexdigest()
    with locked_cache(note.with_name("lock"), "WMTP_CACHE", "give it another folder"):
        if note.is_file() and re.fullmatch(rb"[0-9a-f]{64}", known := note.read_bytes()):
            return known.decode()
        steady = time.time_ns() - state[-1] > _RACY_NS
        digest = file_sha256(file)
        if steady and file_state(file) == state:
            write_whole(note, digest)
        return digest


def write_manifest(folder: Path) -> dict[str, dict]:
    """Writes a folder's manifest: each file's size and SHA-256, and returns it. All is on disk when this returns."""
    files: dict[str, dict] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        sync(path)
        files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))
    sync(folder / MANIFEST)
    sync(folder)
    return files


def flat_manifest(file: Path) -> dict[str, dict] | None:
    """Returns a manifest's entry for each file; None if it is gone, or not one of :func:`write_manifest`."""
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = lambda entry: isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
    flat = isinstance(entries, dict) and all(map(whole, entries.values()))
    return entries if flat else None


def verify_manifest(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        ValueError: no manifest, or a file that is missing, of another size, or of other content.
    """
    for name, expected in read_manifest(folder).items():
        verify_file(folder, name, expected)


def read_manifest(folder: Path) -> dict[str, dict]:
    """Returns what :func:`write_manifest` wrote; raises UserError where there is none."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        raise UserError(f"checkpoint {folder} has no {MANIFEST}: it is not a complete checkpoint of a run")
    return json.loads(manifest.read_text())


def verify_file(folder: Path, name: str, expected: dict) -> None:
    """Compares a file with its manifest's entry; raises UserError where it is missing, or of other size or content."""
    path = folder / name
    size = path.stat().st_size if path.exists() else None
    if size != expected["bytes"]:
        raise UserError(
            f"checkpoint file {path} has {'gone' if size is None else f'{size} bytes'}, its manifest says "
            f"{expected['bytes']} bytes; delete {folder} to resume from the checkpoint before it"
        )
    if file_sha256(path) != expected["sha256"]:
        raise UserError(f"checkpoint file {path} is corrupt: its SHA-256 is not the manifest's; delete {folder}")
