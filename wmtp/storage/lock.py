"""The kernel lock that lets one run at a time write an output folder, and names its holder."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from weakref import WeakValueDictionary

from tqdm import tqdm

from wmtp.storage.names import StorageError

_SECONDS_TO_END = 5.0  # for a killed run to end, and for another node's writes to appear
NAME = "run.lock"


@dataclass(frozen=True)
class Holder:
    """The process that writes a folder."""

    id: str
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class FolderLock:
    """This process's lock on a folder; it ends with the object, with :meth:`release`, or with the process.

    Each rank locks one byte of a file beside the folder. Rank 0's byte means that the folder is taken, the other bytes
    that processes of a run still live. These are POSIX record locks: kill -9 ends them, forked children do not inherit
    them, and they hold between hosts if NFS has locks. The file names the holder.
    """

    @classmethod
    def of(cls, folder: Path) -> "FolderLock":
        """Returns this process's one lock object for a folder."""
        path = _lock_file(folder)
        found = _own.get(path)
        if found is None or not found._is_current():
            found = _own[path] = cls(folder, path)
        return found

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path = folder, path
        self._file: FileIO | None = None
        self._locks = True  # the file system has locks
        self.holder: Holder | None = None  # this process, once rank 0 has the lock
        self.previous: str | None = None  # id of the holder before, whose process has ended

    def take(self) -> Holder:
        """Makes this process the folder's writer, unless another run is; the error names its process. Rank 0 only."""
        if self.holder is not None:
            return self.holder
        if not _soon(self._lock_all):
            raise StorageError(
                f"output_dir {self._folder} is being written by {_read(self._path) or 'another run'}; end that run, or "
                "give another output_dir"
            )
        file = self._open()
        before = holder_of(os.pread(file.fileno(), 4096, 0))  # not by path: closing any other descriptor ends the lock
        self.previous = before.id if before and self._locks else None  # without locks it may still live
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.holder = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(asdict(self.holder)).encode())
        os.fsync(file.fileno())
        return self.holder

    def join(self, holder: Holder, rank: int) -> bool:
        """Joins rank 0's run. Returns False if this rank does not see rank 0's file: it is on another file system."""
        seen = _soon(lambda: _read(self._path) == holder)
        return seen and self._lock(rank, 1)

    def release(self) -> None:
        """Ends the lock, so that another run may write the folder."""
        if self._file is not None:
            if self.holder is not None and self._is_current():
                self._path.unlink(missing_ok=True)  # a process that has opened it sees that it is gone and opens again
            self._file.close()
        self._file = self.holder = None

    def _lock_all(self) -> bool:
        """Locks rank 0's byte if all bytes are free and the open file is still the one at its path."""
        if not self._lock(0, 0):
            return False
        if not self._is_current():
            self.release()
            return False
        if self._locks:
            fcntl.lockf(self._open(), fcntl.LOCK_UN, 0, 1)
        return True

    def _open(self) -> FileIO:
        if self._file is None:
            try:
                self._file = FileIO(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
            except OSError as error:
                why = f"{self._path}: {error.strerror}"
                raise StorageError(f"output_dir {self._folder} cannot be written: {why}") from None
        return self._file

    def _lock(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._open(), fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            self._locks = False
            if start == 0:
                line = f"WARNING: {self._path} cannot be locked ({error.strerror}): make sure that no second run writes"
                tqdm.write(f"{line} {self._folder}", sys.stderr)
        return True

    def _is_current(self) -> bool:
        """Returns whether the open file, if any, is still the one at its path."""
        try:
            return self._file is None or os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False


def _soon(true: Callable[[], bool]) -> bool:
    """Returns whether something becomes true before another run can be expected to have ended."""
    until = time.monotonic() + _SECONDS_TO_END
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _lock_file(folder: Path) -> Path:
    """Returns the path of a folder's lock.

    It lies beside the folder, which holds only the run's own files; inside, if the folder is a mount or its parent
    cannot be written.
    """
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.{NAME}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mounted = folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev
    return folder / f".{NAME}" if mounted or not os.access(folder.parent, os.W_OK) else beside


def _read(path: Path) -> Holder | None:
    try:
        return holder_of(path.read_bytes())
    except OSError:
        return None


def holder_of(content: bytes) -> Holder | None:
    """Returns the holder that a lock or a lease names; None if the content is torn."""
    try:
        fields = json.loads(content)
        return Holder(*(fields[name] for name in ("id", "host", "pid", "started")))
    except (ValueError, KeyError, TypeError):
        return None


_own: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()  # one per path: a second close would end the lock
