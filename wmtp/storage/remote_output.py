"""The output folder of a run whose output_dir is in S3: a local folder, and a copy uploaded in the background.

A checkpoint, an export or a scored dataset in S3 is complete if its manifest.json is there: it is uploaded last.
"""

import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue

from tqdm import tqdm

from wmtp.files import (
    MANIFEST,
    UNFINISHED,
    cache_folder,
    flat_manifest,
    publish,
    unfinished,
    verify_manifest,
    write_manifest,
    write_whole,
)
from wmtp.storage.lease import Lease
from wmtp.storage.lock import FolderLock, Holder
from wmtp.storage.mirror import fetch_folder, while_it_changes
from wmtp.storage.names import StorageError, split_uri
from wmtp.storage.output import Output
from wmtp.storage.s3 import RemoteFile, list_files, remove, remove_files
from wmtp.storage.transfer import put_bytes, upload

_NOT_UPLOADED = (UNFINISHED, ".lock")
# Not fetched as a whole: a resumed run reads little of them.
_REMADE = ("checkpoints/", "export/", "held_out/", "profiler/", "token_weights/")
_PROBE = ".wmtp_can_write"
_SECONDS_BETWEEN_ROUNDS = 60.0
_CACHES = ("hidden_states", "trunk_states")  # of a frozen trunk: computed again faster than moved


class RemoteOutput(Output):
    """The folder of a run and its remote copy, which the process that claims it uploads.

    After the first :meth:`upload`, new files are uploaded at each call and every minute. Uploads never raise and never
    block: a failure is printed to stderr and tried again, and :meth:`close` raises it. The local files stay.
    """

    def __init__(self, output_dir: str, folder: Path | None = None) -> None:
        self._uri = output_dir.rstrip("/")
        bucket, self._key = split_uri(self._uri)
        here = cache_folder() / "outputs" / bucket / self._key
        super().__init__(folder or here, self._uri)
        self._record = here.with_name(f"{here.name}.uploads.json")  # self._sent; inodes outlast a move of the folder
        self._sent: dict[str, list[int] | None] = {}  # inode, size and mtime of each file when it was uploaded
        self._lease: Lease | None = None  # of the process that has claimed the folder
        self._error: StorageError | None = None  # why the last round did not upload everything
        self._busy: str | None = None  # the folder that is being uploaded
        self._rounds: Queue[bool] = Queue()  # that are asked for; False ends the thread
        self._worker: threading.Thread | None = None

    def claim(self, *, whole: bool = False) -> Holder:
        holder = super().claim()
        put_bytes(f"{self._uri}/{_PROBE}", b"wmtp")  # missing rights are found before hours of training
        remove(f"{self._uri}/{_PROBE}")
        lease = Lease(self._uri, holder, FolderLock.of(self.folder).previous)
        lease.take()
        self._lease = lease
        while_it_changes(lambda: self._fetch(whole))
        self.folder.mkdir(parents=True, exist_ok=True)
        return holder

    def begin(self, replaces: Iterable[str] = ()) -> None:
        if self._lease is None:
            return
        names = tuple(replaces)
        for name in names:
            there = self._remote_files(name)
            remove_files([file for n, file in there.items() if f"{n}/".startswith(f"{name}/")])
        self._sent = {name: at for name, at in self._sent.items() if name.partition("/")[0] not in names}
        self.upload()

    def upload(self, path: Path | None = None) -> None:
        if self._lease is None:
            return
        if path is not None and path.is_dir() and path != self.folder and not (path / MANIFEST).exists():
            write_manifest(path)
        if self._rounds.empty():  # else a round that is yet to begin sees these files too
            self._rounds.put(True)
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="upload", daemon=True)
            self._worker.start()

    def may_remove(self, path: Path) -> bool:
        return self._busy != str(path.relative_to(self.folder))

    def _fetch(self, whole: bool) -> None:
        """Fetches an earlier run's files from S3 if this machine has none of them, or fewer.

        Args:
            whole: the run's files and its newest complete checkpoint, verified; otherwise only their names. Of a run
                without checkpoints, the files that another machine has added to.
        """
        files = self._remote_files()
        with suppress(FileNotFoundError, ValueError):  # what an earlier process uploaded, as far as it is still in S3
            record = json.loads(self._record.read_text())
            self._sent = {n: at for n, at in record.items() if at and n in files and files[n].num_bytes == at[-2]}
        self.remote_names = list(files)
        if not whole:
            return
        newest, here = _newest_checkpoint(files), _newest_checkpoint(self._local_files())
        wanted = {name: file for name, file in files.items() if not name.startswith(_REMADE)}
        if (self.folder / "config.yaml").exists():
            if newest is not None and here is not None and here >= newest:
                return
            if newest is None:  # journals and parts only grow; files that this machine sent and then removed stay away
                sizes = {name: (_stamp(self.folder / name) or (0, -1))[1] for name in wanted.keys() - self._sent.keys()}
                wanted = {name: wanted[name] for name, size in sizes.items() if size < wanted[name].num_bytes}
        fetch_folder(self._uri, list(wanted.values()), self.folder)
        if newest is not None:
            self._log(f"fetching {self._uri}/{newest}")
            target, torn = self.folder / newest, unfinished(self.folder / newest)
            inside = {name: file for name, file in files.items() if _step_of(name) == newest}
            fetch_folder(f"{self._uri}/{newest}", list(inside.values()), torn)
            verify_manifest(torn)
            shutil.rmtree(target, ignore_errors=True)  # incomplete, or `here` would name it
            publish(torn, target)
            wanted |= inside
        self._sent |= {name: _stamp(self.folder / name) for name in wanted}
        self._write_record()

    def close(self, *, fail: bool = True) -> None:
        """Waits until everything is uploaded, with one more try after a failure; see :class:`Output`."""
        if self._lease is None:
            return super().close(fail=fail)
        for _ in range(2):
            self.upload()
            self.wait()
            if self._error is None:
                break
        self._rounds.put(False)
        if self._worker is not None:
            self._worker.join()
            self._worker = None
        self._lease.release()
        super().close(fail=fail)
        if self._error is None:
            return self._log(f"uploaded to {self._uri}")
        line = (
            f"not everything could be uploaded: {self._error}; it is all in {self.folder}; when S3 answers again, "
            f"run: python -m wmtp.storage upload {self.folder} {self._uri}"
        )
        if fail:
            raise StorageError(line)
        return self._log(line)

    # ------------------------------------------------------------------------------------------------------------------
    # The background

    def wait(self) -> None:
        """Waits until all rounds of uploads that were asked for have ended, well or not."""
        self._rounds.join()

    def _work(self) -> None:
        asked: bool | None = None
        while asked is not False:
            asked = None
            with suppress(Empty):
                asked = self._rounds.get(timeout=_SECONDS_BETWEEN_ROUNDS)
            try:
                if asked is not False:
                    self._round()
                    self._error = None
            except Exception as error:  # of any kind: training goes on, and close() raises it
                if not isinstance(error, StorageError):
                    error = StorageError(f"{self._uri}: {type(error).__name__}: {error}")
                self._error = error
                self._log(f"UPLOAD FAILED, to be tried again at the next save or in a minute: {error}")
            self._busy = None
            if asked is not None:
                self._rounds.task_done()

    def _round(self) -> None:
        """Uploads new files: the run's own, then checkpoints, newest first, then the file that names the latest."""
        try:
            files = self._local_files()
            self._send([name for name in files if not name.startswith("checkpoints/")])
            for step in sorted({step for name in files if (step := _step_of(name))}, reverse=True):
                self._busy = step
                self._send([name for name in self._local_files() if _step_of(name) == step])
            self._busy = None
            if "checkpoints/latest" in files:
                self._send(["checkpoints/latest"])
                self._prune()
        finally:
            self._write_record()

    def _send(self, names: list[str]) -> None:
        """Uploads the files that changed; manifests after all others, the deepest first."""
        manifests = {name: flat_manifest(self.folder / name) or {} for name in names if Path(name).name == MANIFEST}
        changed = {name for name in names if self._sent.get(name) != _stamp(self.folder / name)}
        known: dict[str, str] = {}
        for name, entries in manifests.items():
            below = name.removesuffix(MANIFEST)
            known |= {below + file: entry["sha256"] for file, entry in entries.items()}
            if entries and any(n.startswith(below) for n in changed - manifests.keys()):
                # Files of that folder are about to be replaced: it must not look complete before all are.
                remove(f"{self._uri}/{name}")
                self._sent.pop(name, None)
                changed.add(name)
        for name in sorted(changed, key=lambda name: (name in manifests, -name.count("/"), name)):
            path, stamp, below = self.folder / name, _stamp(self.folder / name), name.removesuffix(MANIFEST)
            try:
                if all(below + file in self._sent for file in manifests.get(name, ())):
                    upload(path, f"{self._uri}/{name}", sha256=known.get(name))
                    self._sent[name] = stamp
            except FileNotFoundError:
                self._sent.pop(name, None)  # an old checkpoint was removed meanwhile: its manifest is not sent

    def _prune(self) -> None:
        """Removes remote checkpoints, and files of the best, that are gone here: none before a newer is complete."""
        files = self._remote_files("checkpoints/")
        newest, here = _newest_checkpoint(files), {_step_of(name) for name in self._local_files()}
        if newest is None:
            return
        old = {n: file for n, file in files.items() if (step := _step_of(n)) and step < newest and step not in here}
        if (self.folder / "best").is_dir():
            best = self._remote_files("best/")
            old |= {name: file for name, file in best.items() if not (self.folder / name).exists()}
        remove_files(list(old.values()))
        self._sent = {name: at for name, at in self._sent.items() if name not in old}

    # ------------------------------------------------------------------------------------------------------------------
    # Local and remote files

    def _local_files(self) -> list[str]:
        """Returns the names of all files that are not being written."""
        found = []
        for folder, folders, files in os.walk(self.folder):  # which passes over folders that vanish meanwhile
            folders[:] = [name for name in folders if name not in _CACHES and not name.endswith(_NOT_UPLOADED)]
            below = Path(folder).relative_to(self.folder)
            found += [(below / name).as_posix() for name in files if not name.endswith(_NOT_UPLOADED)]
        return found

    def _remote_files(self, below: str = "") -> dict[str, RemoteFile]:
        """Returns the files in S3 by their names, which begin with `below`; the lease is none of them."""
        there = list_files(self._uri, prefix=f"{self._key}/{below}")
        return {f.key.removeprefix(self._key).lstrip("/"): f for f in there if not f.key.endswith(_NOT_UPLOADED)}

    def _write_record(self) -> None:
        write_whole(self._record, json.dumps(self._sent))

    def _log(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def _newest_checkpoint(names) -> str | None:
    """Returns ``checkpoints/step_N`` of the highest complete step among file names."""
    return max((step for name in names if (step := _step_of(name)) and name == f"{step}/{MANIFEST}"), default=None)


def _step_of(name: str) -> str | None:
    """Returns ``checkpoints/step_N`` of a file in a checkpoint, None for other files."""
    match = re.match(r"(checkpoints/step_\d+)/", name)
    return match and match[1]


def _stamp(path: Path) -> list[int] | None:
    """Returns inode, size and mtime, which change when a file is written or replaced; None if it is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]
