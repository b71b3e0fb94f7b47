"""One run at a time writes an output folder: a lock of the kernel's, and for ``s3://`` a lease that is kept alive."""

import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from weakref import WeakValueDictionary, finalize, ref

from tqdm import tqdm

from wmtp.storage.s3 import (
    ChangedError,
    CorruptError,
    StorageError,
    client,
    error_code,
    remove,
    retrying,
    split_uri,
)
from wmtp.storage.transfer import put_bytes

_SECONDS_TO_END = 5.0  # for a run that was just killed, and for a folder's content to come from another node
_HEARTBEAT, _EXPIRY = 15.0, 60.0  # seconds; a lease that is not renewed for so long is nobody's
_NAME = "run.lock"


@dataclass(frozen=True)
class Holder:
    """Who writes a folder."""

    id: str
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class FolderLock:
    """This process's lock on a folder; it ends with the object, with :meth:`release`, or with the process.

    Each rank locks one byte of a file beside the folder: rank 0's says that the folder is taken, the others' that
    processes of a run still live. These are POSIX record locks: they end with a process by kill -9, no forked
    child inherits them, and they hold between hosts where NFS has locks. The file names the holder.
    """

    @classmethod
    def of(cls, folder: Path) -> "FolderLock":
        """This process's lock object for a folder."""
        path = _lock_file(folder)
        found = _own.get(path)
        if found is None or not found._is_current():
            found = _own[path] = cls(folder, path)
        return found

    def __init__(self, folder: Path, path: Path) -> None:
        self._folder, self._path = folder, path
        self._file: FileIO | None = None
        self._locks = True  # whether the file system has locks
        self.holder: Holder | None = None  # this process, once it has the lock on rank 0
        self.previous: str | None = None  # id of the holder before, whose process has ended

    def take(self) -> Holder:
        """Become the folder's writer. Rank 0 only.

        Raises:
            StorageError: a run writes there; the line names its process. Or the place cannot be written.
        """
        if self.holder is not None:
            return self.holder
        until = time.monotonic() + _SECONDS_TO_END
        while not self._lock_all():
            if time.monotonic() > until:
                raise StorageError(
                    f"output_dir {self._folder} is being written by {_read(self._path) or 'another run'}; end that "
                    "run, or give another output_dir"
                )
            time.sleep(0.1)
        file = self._open()
        before = _holder(os.pread(file.fileno(), 4096, 0))  # not by name: closing any descriptor ends the lock
        self.previous = before.id if before and self._locks else None  # without locks it may well live
        started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        self.holder = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), started)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(asdict(self.holder)).encode())
        os.fsync(file.fileno())
        return self.holder

    def join(self, holder: Holder, rank: int) -> bool:
        """Take part in rank 0's run; False where this rank does not see what rank 0 wrote: another file system."""
        until = time.monotonic() + _SECONDS_TO_END
        while _read(self._path) != holder:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        self._lock(rank, 1)
        return True

    def release(self) -> None:
        """Let another run write there."""
        if self._file is not None:
            if self.holder is not None and self._is_current():
                self._path.unlink(missing_ok=True)  # whoever opened it meanwhile sees that it is gone, and opens again
            self._file.close()
        self._file = self.holder = None

    def _lock_all(self) -> bool:
        """Lock rank 0's byte, if every byte is free and the file is still the one of that name."""
        file = self._open()
        if not self._lock(0, 0):
            return False
        if not self._is_current():
            file.close()
            self._file = None
            return False
        if self._locks:
            fcntl.lockf(file, fcntl.LOCK_UN, 0, 1)
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
                line = f"WARNING: {self._path} cannot be locked ({error.strerror}): see to it that no second run writes"
                tqdm.write(f"{line} {self._folder}", sys.stderr)
        return True

    def _is_current(self) -> bool:
        """Whether the file is still the one of its name."""
        if self._file is None:
            return True
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False


class Lease:
    """The right to write a folder in S3: an object that names the holder and changes as long as it lives.

    Another machine's lease counts as given up once it has not changed for a minute, by the clock of whoever looks.

    Args:
        uri: of the folder.
        holder: this process.
        previous: id of a holder of which it is known that it has ended.
    """

    def __init__(self, uri: str, holder: Holder, previous: str | None) -> None:
        self._uri, self._folder = f"{uri}/{_NAME}", uri
        self._holder, self._previous = holder, previous
        self._beats = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        finalize(self, self._end.set)  # the lease of a run that nobody holds any more is not renewed

    def take(self) -> None:
        """Become the writer, and stay it until :meth:`release`.

        Raises:
            StorageError: a run on another machine writes there.
        """
        seen, since = None, time.monotonic()
        while True:
            etag, there = self._there()
            if there is None:
                self._write(IfNoneMatch="*")
            elif there.id in (self._holder.id, self._previous) or (etag == seen and time.monotonic() - since > _EXPIRY):
                self._write(IfMatch=etag or "")
            elif seen is None:
                seen, since = etag, time.monotonic()
                tqdm.write(f"{self._folder} was last written by {there}; waiting up to {_EXPIRY:.0f} s to see whether "
                           "it lives", sys.stderr)  # fmt: skip
            elif etag != seen:
                raise StorageError(
                    f"output_dir {self._folder} is being written by {there}; end that run, or give another output_dir"
                )
            now = self._there()[1]  # also where conditions are not kept: the last writer is the holder
            if now is not None and now.id == self._holder.id:
                break
            time.sleep(min(1.0, _HEARTBEAT / 4))
        self._thread = threading.Thread(target=_renew, args=(ref(self), self._end), name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                if (there := self._there()[1]) is not None and there.id == self._holder.id:
                    remove(self._uri)
            except StorageError as error:
                tqdm.write(f"the lease on {self._folder} ends by itself in a minute: {error}", sys.stderr)

    def renew(self) -> None:
        """Show that the holder lives; where another has taken the lease, this process ends at once."""
        try:
            etag, there = self._there()
            if there is not None and there.id != self._holder.id:
                line = f"error: {self._folder} was taken over by {there}: this run ends, so that not two write there"
                tqdm.write(line, sys.stderr)
                sys.stderr.flush()
                os._exit(1)
            self._write(**({"IfNoneMatch": "*"} if there is None else {"IfMatch": etag}))
        except StorageError:
            pass  # S3 is away, for others too; uploads say so

    def _write(self, **condition: str) -> None:
        self._beats += 1
        body = json.dumps({**asdict(self._holder), "beat": self._beats}).encode()
        try:
            put_bytes(self._uri, body, **condition)
        except ChangedError:
            pass  # somebody was faster, or an answer was lost on the way: reading tells
        except StorageError as error:
            if "NotImplemented" not in str(error):  # a store that knows no conditions
                raise
            put_bytes(self._uri, body)

    def _there(self) -> tuple[str | None, Holder | None]:
        """ETag and holder of the lease that is there; None where there is none."""
        bucket, key = split_uri(self._uri)

        def read() -> tuple[str | None, Holder | None]:
            from botocore.exceptions import ClientError

            try:
                answer = client().get_object(Bucket=bucket, Key=key)
                body = answer["Body"].read()
                if answer["Metadata"].get("sha256", "") != hashlib.sha256(body).hexdigest():
                    raise CorruptError(f"{self._uri} cannot be read: it arrives corrupt; check the network")
                return answer["ETag"], _holder(body)
            except ClientError as error:
                if error_code(error) in ("NoSuchKey", "404"):
                    return None, None
                raise

        return retrying(read, self._uri, "read")


def _renew(lease: "ref[Lease]", end: threading.Event) -> None:
    while not end.wait(_HEARTBEAT):
        held = lease()
        if held is not None:
            held.renew()
        del held


def _lock_file(folder: Path) -> Path:
    """Where a folder's lock is: beside it, so that it holds only what belongs to the run; inside, where that is another
    file system or nobody may write there."""
    folder = folder.resolve()
    beside = folder.with_name(f".{folder.name}.{_NAME}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    mounted = folder.exists() and folder.stat().st_dev != folder.parent.stat().st_dev
    return folder / f".{_NAME}" if mounted or not os.access(folder.parent, os.W_OK) else beside


def _read(path: Path) -> Holder | None:
    try:
        return _holder(path.read_bytes())
    except OSError:
        return None


def _holder(content: bytes) -> Holder | None:
    """The holder that a lock or a lease names; None where it is torn."""
    try:
        fields = json.loads(content)
        return Holder(*(fields[name] for name in ("id", "host", "pid", "started")))
    except (ValueError, KeyError, TypeError):
        return None


_own: WeakValueDictionary[Path, FolderLock] = WeakValueDictionary()  # a second open and close would drop the lock
