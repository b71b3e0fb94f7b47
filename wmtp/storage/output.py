"""The output folder of a run."""

from collections.abc import Iterable
from pathlib import Path

from wmtp.storage.lock import FolderLock, Holder


class Output:
    """The folder of a run, which one run at a time writes.

    Args:
        folder: its local path.
        remote: ``s3://bucket/prefix`` of its copy; None for none.
    """

    def __init__(self, folder: str | Path, remote: str | None = None) -> None:
        self.folder, self.remote = Path(folder), remote
        self.remote_names: list[str] = []  # files of an earlier run in the copy
        self._lock: FolderLock | None = None  # this process's, after `claim` or `join`

    def claim(self, *, whole: bool = False) -> Holder:
        """Locks the folder, and its copy, for this process until :meth:`close`. Rank 0 only.

        Args:
            whole: also fetch an earlier run's files from S3 if this machine has fewer; otherwise only their names.

        Raises:
            StorageError: another run writes there; or no credentials, no bucket, no permission in S3.
        """
        self._lock = FolderLock.of(self.folder)
        return self._lock.take()

    def join(self, holder: Holder, rank: int) -> bool:
        """Joins the run of rank 0, which claimed the folder. Returns False if this rank does not see its files."""
        self._lock = FolderLock.of(self.folder)
        return self._lock.join(holder, rank)

    def begin(self, replaces: Iterable[str] = ()) -> None:
        """Removes the files and folders that a new run replaces from the remote copy, then starts uploads."""

    def upload(self, path: Path | None = None) -> None:
        """Starts uploading the new and changed files; a folder `path` that is complete now gets a manifest first."""

    def may_remove(self, path: Path) -> bool:
        """Returns whether a folder is not being uploaded just now."""
        return True

    def close(self, *, fail: bool = True) -> None:
        """Waits until everything is uploaded, then lets another run write the folder.

        Args:
            fail: raise a StorageError for what could not be uploaded; False only prints it, for a run that has failed.
        """
        if self._lock is not None and fail:  # other ranks of a failed run may still be at work: the lock ends with them
            self._lock.release()
