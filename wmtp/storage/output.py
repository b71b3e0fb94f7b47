"""Where a run writes."""

from collections.abc import Iterable
from pathlib import Path

from wmtp.storage.lock import FolderLock, Holder


class Output:
    """The folder of a run, which one run at a time writes.

    Attributes:
        folder: where it is.
        remote: where a copy of it is kept, ``s3://bucket/prefix``; None for none.
        remote_names: what an earlier run left there.
        lock: this process's, from :meth:`claim` or :meth:`join` on.
    """

    def __init__(self, folder: str | Path, remote: str | None = None) -> None:
        self.folder, self.remote = Path(folder), remote
        self.remote_names: list[str] = []
        self.lock: FolderLock | None = None

    def claim(self, *, whole: bool = False) -> Holder:
        """Makes the folder this process's to write until it is closed. Rank 0 alone.

        Args:
            whole: fetch what a run left in S3 where this machine has none of it or less; else only its files' names.

        Raises:
            StorageError: another run writes there; or S3 refuses.
        """
        self.lock = FolderLock.of(self.folder)
        return self.lock.take()

    def join(self, holder: Holder, rank: int) -> bool:
        """Takes part in the run of rank 0, which claimed the folder; False where this rank does not see its files."""
        self.lock = FolderLock.of(self.folder)
        return self.lock.join(holder, rank)

    def begin(self, replaces: Iterable[str] = ()) -> None:
        """The run exists here, and now in S3: what it replaces, by name, goes from there, and uploads start."""

    def upload(self, path: Path | None = None) -> None:
        """Starts uploading what is new or has changed below the folder, `path` among it.

        Args:
            path: a file or folder that is complete now. A folder without a manifest gets one.
        """

    def may_remove(self, path: Path) -> bool:
        """Whether a folder is not being uploaded just now. A removed one that was not uploaded is not missed."""
        return True

    def close(self, *, fail: bool = True) -> None:
        """Lets another run write there, once everything is uploaded.

        Raises:
            StorageError: something could not be uploaded; with ``fail`` False, for a run that has failed, it is only
                said.
        """
        if self.lock is not None and fail:  # where a run failed, other ranks may still be at work: it ends with them
            self.lock.release()
