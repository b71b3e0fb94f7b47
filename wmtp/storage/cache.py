"""The cache of mirrored objects: contents by their SHA-256, folders of links to them, locks, and a size limit.

$WMTP_CACHE/s3/blobs/<sha256>            contents, read-only
               index/<object>.json       an object's ETag, size, SHA-256, and its blob's mtime
               trees/<digest>/<name>     a mirrored file or folder: hard links to blobs, appears by a rename
               partial/                  downloads under way
               locks/                    empty files to lock; they are never removed
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.files import cache_folder, file_sha256, locked, take_lock
from wmtp.storage.names import StorageError
from wmtp.storage.s3 import RemoteFile, endpoint_url

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_used: dict[Path, int | None] = {}  # trees this process uses: descriptors of their shared locks, held until it ends


def size_limit() -> int | None:
    """Returns the bytes that mirrored objects may take: ``$WMTP_CACHE_LIMIT``, such as ``200GB``; None is no limit.

    Raises:
        StorageError: the variable is not a size.
    """
    text = os.environ.get("WMTP_CACHE_LIMIT", "").strip()
    if not text:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.upper())
    if match is None:
        raise StorageError(f"WMTP_CACHE_LIMIT must be a size such as 200GB, got {text}")
    return int(float(match[1]) * _UNITS[match[2]])


class Cache:
    """The mirrored objects below the cache folder, shared by all processes of a host."""

    def __init__(self) -> None:
        self._folder = cache_folder() / "s3"
        for name in ("blobs", "index", "trees", "partial"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)

    # ---- one object

    def digest_of(self, file: RemoteFile) -> str | None:
        """Returns the SHA-256 of an object's content if the cache has it whole; None if it must be fetched.

        Size and mtime are compared with the index; if the mtime differs, the content is hashed again.
        """
        try:
            entry = json.loads(self._index(file).read_text())
        except (FileNotFoundError, ValueError):
            return None
        if (entry["etag"], entry["bytes"]) != (file.etag, file.num_bytes):
            return None
        blob = self.blob(entry["sha256"])
        try:
            stat = blob.stat()
        except FileNotFoundError:
            return None
        if (stat.st_size, stat.st_mtime_ns) == (entry["bytes"], entry["mtime_ns"]):
            return entry["sha256"]
        if stat.st_size == entry["bytes"] and file_sha256(blob) == entry["sha256"]:
            self.note(file, entry["sha256"])
            return entry["sha256"]
        blob.unlink(missing_ok=True)  # somebody wrote into it; trees that link to it are built again
        return None

    def note(self, file: RemoteFile, sha256: str) -> None:
        """Records an object's ETag, size and SHA-256 in the index."""
        stat = self.blob(sha256).stat()
        entry = {"uri": file.uri, "etag": file.etag, "bytes": file.num_bytes, "sha256": sha256}
        written = self._index(file).with_suffix(f".{os.getpid()}.tmp")
        written.write_text(json.dumps({**entry, "mtime_ns": stat.st_mtime_ns}))
        written.replace(self._index(file))

    def blob(self, sha256: str) -> Path:
        return self._folder / "blobs" / sha256

    def partial(self, file: RemoteFile) -> Path:
        """Returns the path to download an object to; each version of its content has its own."""
        return self._folder / "partial" / _key(endpoint_url(), file.uri, file.etag)

    @contextmanager
    def fetching(self, file: RemoteFile) -> Iterator[None]:
        """Holds the lock under which one thread of one process at a time fetches an object."""
        with locked(self._lock(_key("object", endpoint_url(), file.uri))):
            yield

    def _index(self, file: RemoteFile) -> Path:
        return self._folder / "index" / f"{_key(endpoint_url(), file.uri)}.json"

    # ---- mirrored files and folders

    def tree(self, name: str, digests: dict[str, str]) -> Path:
        """Returns a folder of the given files, or a single file if the only name is "".

        It stays while this process lives. It is never replaced, not even briefly: other processes read it.

        Args:
            name: the last part of the returned path.
            digests: SHA-256 of each file, at least one, by its relative name; their blobs exist.
        """
        digest = _key("tree", *(f"{file} {sha256}" for file, sha256 in sorted(digests.items())))
        folder = self._folder / "trees" / digest
        self._use(folder)
        path = folder / name
        with locked(self._lock(f"{digest}.making")):
            made = folder if folder.exists() else Path(tempfile.mkdtemp(".tmp", f"{digest}.", folder.parent))
            for file, sha256 in digests.items():
                link, new = made / name / file if file else made / name, made / ".new"
                if not _same_file(link, self.blob(sha256)):  # missing, or a link to a blob that was damaged since
                    link.parent.mkdir(parents=True, exist_ok=True)
                    new.unlink(missing_ok=True)
                    os.link(self.blob(sha256), new)
                    new.replace(link)
            if made != folder:
                made.chmod(0o755)
                made.rename(folder)
        return path

    def _use(self, tree: Path) -> None:
        lock = self._lock(tree.name)
        if tree not in _used:
            _used[tree] = take_lock(lock, shared=True)
        os.utime(lock)  # the time of the tree's last use

    # ---- the size limit

    @contextmanager
    def filling(self, num_bytes: int) -> Iterator[None]:
        """Makes room for `num_bytes`, then protects blobs that are in no tree yet from removal."""
        self.make_room(num_bytes)
        with locked(self._lock("filling"), shared=True):
            yield

    def make_room(self, num_bytes: int = 0) -> None:
        """Removes the least recently used trees that no process uses, until `num_bytes` fit under the limit."""
        limit = size_limit()
        if limit is None:
            return
        with locked(self._lock("filling"), wait=False) as ours:
            if not ours:  # the process that is filling the cache makes room when it is done
                return
            trees = [tree for tree in (self._folder / "trees").iterdir() if not tree.name.endswith(".tmp")]
            for tree in sorted(trees, key=self._last_use):
                if self._sweep() + num_bytes <= limit:
                    return
                with locked(self._lock(tree.name), wait=False) as unused:
                    if unused:
                        shutil.rmtree(tree)
            self._sweep()

    def _sweep(self) -> int:
        """Removes blobs that no tree links to and leftovers of killed processes. Returns the bytes that remain."""
        total = 0
        for torn in (self._folder / "trees").glob("*.tmp"):
            shutil.rmtree(torn)
        for blob in (self._folder / "blobs").iterdir():
            stat = blob.stat()
            if stat.st_nlink == 1:
                blob.unlink()
            else:
                total += stat.st_size
        return total + sum(part.stat().st_blocks * 512 for part in (self._folder / "partial").iterdir())

    def _last_use(self, tree: Path) -> float:
        lock = self._lock(tree.name)
        return lock.stat().st_mtime if lock.exists() else 0.0

    def _lock(self, name: str) -> Path:
        return self._folder / "locks" / name


def _same_file(path: Path, blob: Path) -> bool:
    try:
        return path.samefile(blob)
    except FileNotFoundError:
        return False


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]
