"""What a run has to tell MLflow, on disk until the store has it.

    <output_dir>/metrics.jsonl                  the run's metrics, a step and its time a line: these are here alone
    <output_dir>/tracking_spool/run.json        which run: experiment, name, key, and its id once the store gave one
    <output_dir>/tracking_spool/000001.jsonl    all other records, one a line, of the first process; 000002 of the next
    <output_dir>/tracking_spool/sent.json       up to where in each file the store has them
    <output_dir>/tracking_spool/refused.jsonl   records that the store can never take, with its reason

A record is written before the call that makes it returns, without waiting for the disk: a killed process loses none, a
machine that loses power may lose the last seconds. To send a record twice changes nothing, so `sent.json` may lag. A
run that goes on cuts metrics.jsonl; a step that happens again keeps its time, and so is the same record to the store.
"""

import io
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

from wmtp.errors import UserError
from wmtp.files import take_lock, write_whole
from wmtp.tracking import FOLDER, METRICS

Position = tuple[int, int]  # number of a file, 0 for metrics.jsonl, and up to where in it


class Spool:
    """The spool of one run, open in one process at a time.

    Args:
        output_dir: the run's folder.

    Raises:
        ValueError: another process has it open.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir, self.folder = output_dir, output_dir / FOLDER
        lock = take_lock(self.folder / "spool.lock", wait=False)
        if lock is None:
            raise UserError(f"{self.folder} is in use by another process; wait until its run has ended")
        self._lock = lock
        self._writing = threading.Lock()
        self._file: io.FileIO | None = None
        self._closed = False
        numbers = self._numbers()
        self._next = numbers[-1] + 1 if numbers else 1
        self._sent = self._read_sent()

    # ------------------------------------------------------------------------------------------------------------------
    # The run

    @property
    def run(self) -> dict:
        """What run.json says; empty for a run that has not begun."""
        return read_run(self.output_dir)

    def set_run(self, **facts: object) -> None:
        """Change facts of run.json, which is whole at every moment."""
        write_whole(self.folder / "run.json", json.dumps({**self.run, **facts}, indent=1) + "\n")

    # ------------------------------------------------------------------------------------------------------------------
    # Records

    def append(self, record: dict) -> None:
        """Write a record down, whole or not at all. Any thread may call it.

        Raises:
            OSError: the disk is full; it names the file.
        """
        line = (json.dumps(record) + "\n").encode()
        with self._writing:
            if self._file is None:
                self._file = (self.folder / f"{self._next:06d}.jsonl").open("ab", buffering=0)
            start = self._file.seek(0, os.SEEK_END)
            try:
                while line:  # a disk that gets full takes a part
                    line = line[self._file.write(line) :]
            except OSError as error:
                with suppress(OSError):
                    self._file.truncate(start)  # or the next record would go on in this one's line
                raise OSError(error.errno, error.strerror, self._file.name) from error

    def unsent(self, limit: int) -> list[tuple[dict, Position]]:
        """The next records to send, at most so many, each with the position to give to :meth:`mark_sent`."""
        found: list[tuple[dict, Position]] = []
        for number in (0, *self._numbers()):
            path, offset = self._path(number), self._sent.get(number, 0)
            if number == 0 and not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # being written, or torn when its process was killed: then the next file goes on
                    offset += len(line)
                    record = json.loads(line)
                    if number == 0:
                        time, step = record.pop("time", 0.0), record.pop("step")
                        record = {"kind": "metrics", "time": round(1000 * time), "step": step, "metrics": record}
                    found.append((record, (number, offset)))
                    if len(found) == limit:
                        return found
        return found

    def count_unsent(self) -> int:
        return len(self.unsent(limit=10**9))

    def mark_sent(self, *positions: Position) -> None:
        """The store has all records up to here. Without effect after :meth:`close`: another process may go on."""
        if self._closed:
            return
        self._sent |= dict(positions)
        self._write_sent()
        for number in self._numbers():
            if number < max(self._sent):
                self._path(number).unlink()

    def refuse(self, record: dict, why: str) -> None:
        """Keep a record that the store can never take out of the way of those behind it."""
        with (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps({"why": why, **record}) + "\n")

    def close(self) -> None:
        """Let another process open it; a spool without anything unsent keeps no records, only where it is."""
        self._closed = True
        with self._writing:
            if self._file is not None:
                self._file.close()
        if not self.unsent(limit=1):
            for number in self._numbers():
                self._path(number).unlink()
                self._sent.pop(number, None)
            self._write_sent()
        os.close(self._lock)

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.folder.glob("[0-9]*.jsonl"))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl" if number else self.output_dir / METRICS

    def _read_sent(self) -> dict[int, int]:
        file, metrics = self.folder / "sent.json", self.output_dir / METRICS
        sent = {int(number): at for number, at in json.loads(file.read_text()).items()} if file.exists() else {}
        if 0 in sent:  # what was cut off happens again, from here on
            sent[0] = min(sent[0], metrics.stat().st_size if metrics.exists() else 0)
        return sent

    def _write_sent(self) -> None:
        write_whole(self.folder / "sent.json", json.dumps(self._sent) + "\n")


def read_run(output_dir: Path) -> dict:
    """What a folder's spool says about its run, without opening it; empty where there is none."""
    file = output_dir / FOLDER / "run.json"
    return json.loads(file.read_text()) if file.exists() else {}
