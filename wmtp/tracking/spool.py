"""The spool: a run's records for MLflow, on disk until the store has them.

    <output_dir>/metrics.jsonl                  the run's metrics, one step with its time per line, kept only here
    <output_dir>/tracking_spool/run.json        the run: experiment, name, key, and its id once the store gave one
    <output_dir>/tracking_spool/records.jsonl   all other records, one per line
    <output_dir>/tracking_spool/sent.json       for both files, the position up to which the store has its records
    <output_dir>/tracking_spool/refused.jsonl   records that the store can never take, with its reason

A call that makes a record returns once it is written, without waiting for the disk: a killed process loses no record, a
machine that loses power may lose the last seconds. To send a record twice changes nothing, so `sent.json` may lag. A
resumed run cuts metrics.jsonl; a repeated step keeps its time, so it is the same record to the store.
"""

import io
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from wmtp.errors import UserError
from wmtp.files import take_lock, write_whole
from wmtp.tracking import FOLDER, METRICS

Position = tuple[str, int]  # a file's name, and an offset in bytes


class Spool:
    """The spool of one run, open in one process at a time: another process is refused."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        lock = take_lock(self.folder / "spool.lock", wait=False)
        if lock is None:
            raise UserError(f"{self.folder} is in use by another process; wait until its run has ended")
        self._lock, self._writing = lock, threading.Lock()
        self._files = {"metrics": output_dir / METRICS, "records": self.folder / "records.jsonl"}
        self._file: io.FileIO | None = None
        self._closed = False
        self._sent = _read_json(self.folder / "sent.json")
        for name in self._sent:  # steps that a resumed run cut off are repeated after this position
            path = self._files[name]
            self._sent[name] = min(self._sent[name], path.stat().st_size if path.exists() else 0)

    @property
    def run(self) -> dict:
        """The content of run.json; empty for a run that has not begun."""
        return read_run(self.output_dir)

    def set_run(self, **facts: object) -> None:
        """Changes facts in run.json, which is whole at every moment."""
        write_whole(self.folder / "run.json", json.dumps({**self.run, **facts}, indent=1) + "\n")

    def append(self, record: dict) -> None:
        """Writes a record, whole or not at all: the error of a full disk names the file. Any thread may call it."""
        line = (json.dumps(record) + "\n").encode()
        with self._writing:
            if self._closed:  # then another process may have the spool
                raise ValueError(f"{self.folder} is closed")
            if self._file is None:
                self._file = self._files["records"].open("a+b", buffering=0)
                self._file.seek(0)
                self._file.truncate(self._file.read().rfind(b"\n") + 1)  # of a line that a kill has torn
            start = self._file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that fills up takes a part
                    line = line[self._file.write(line) :]
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(start)  # the next record must begin a line
                raise OSError(error.errno, error.strerror, self._file.name) from error

    def unsent(self, limit: int = sys.maxsize) -> list[tuple[dict, Position]]:
        """Returns the next records to send, at most so many, each with its position for :meth:`mark_sent`."""
        found: list[tuple[dict, Position]] = []
        for name, path in self._files.items():
            offset = self._sent.get(name, 0)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written, or torn by a kill
                    offset += len(line)
                    record = json.loads(line)
                    if name == "metrics":
                        time, step = record.pop("time", 0.0), record.pop("step")
                        record = {"kind": "metrics", "time": round(1000 * time), "step": step, "metrics": record}
                    found.append((record, (name, offset)))
                    if len(found) == limit:
                        return found
        return found

    def kinds(self) -> list[str]:
        """Returns the kinds of all records since all were sent last, in order; metrics are none."""
        file = self._files["records"]
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line)["kind"] for line in lines if line.endswith(b"\n")]

    def mark_sent(self, *positions: Position) -> None:
        """Records that the store has all records up to these positions."""
        if not self._closed:  # then another process may have the spool
            self._sent |= dict(positions)
            self._write_sent()

    def refuse(self, record: dict, why: str) -> None:
        """Sets a record aside that the store can never take, so that later ones can be sent."""
        with (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps({"why": why, **record}) + "\n")

    def close(self) -> int:
        """Closes the spool, so that another process may open it. Returns how many records are unsent.

        If all are sent, their file is removed. A second call changes nothing.
        """
        if self._closed:
            return 0
        self._closed = True
        with self._writing:
            if self._file is not None:
                self._file.close()
        left = len(self.unsent())
        if not left:
            self._files["records"].unlink(missing_ok=True)  # first: the sender may still look for more
            self._sent.pop("records", None)
            self._write_sent()
        os.close(self._lock)
        return left

    def _write_sent(self) -> None:
        write_whole(self.folder / "sent.json", json.dumps(self._sent) + "\n")


def read_run(output_dir: Path) -> dict:
    """Returns the content of a folder's run.json without opening the spool; empty if there is none."""
    return _read_json(output_dir / FOLDER / "run.json")


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}
