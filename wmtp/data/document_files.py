"""Documents in files while a builder makes them, kept for a later start where their rows are costly to read again."""

import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from wmtp.data.documents import WEIGHT, Columns, Document, Makers, Resumable, Storing, Tally, printable
from wmtp.errors import UserError
from wmtp.files import write_whole

_SECONDS = 2.0  # before a progress bar is shown
_SECONDS_A_PART = 5.0  # of making, before what is made is kept
_STATE = "state.json"


class FetchError(UserError):
    """Rows that cannot be fetched now; what was made of those before them may be kept."""


def in_files(folder: Path, what: str) -> Storing:
    """Returns a way to store the documents of :func:`wmtp.data.documents.collect`: they are maps of files.

    A builder that collects several times, as a mixture does, has a folder for each time.

    Args:
        folder: where documents of resumable rows are kept, for the caller to remove once they are used. Other files
            have no name, and lie beside it.
        what: names the data beside the progress bar.
    """
    times = count()

    def store(*making: Any) -> Sequence[Document]:
        number = next(times)
        return _in_files(folder / f"part_{number}" if number else folder, what, *making)

    return store


def _in_files(
    folder: Path, what: str, makers: Makers, making: Callable[[Makers], Iterator[Document]], rows: Resumable | None
) -> Sequence[Document]:
    folder.parent.mkdir(exist_ok=True)
    files = _Files(folder, what, None if rows is None or rows.state() is None else rows)
    bar = tqdm(desc=f"{what}: tokenize", initial=len(files), unit="document", delay=_SECONDS, leave=False)
    try:
        with bar:
            for first in makers:
                for document in making(_for_a_while(chain([first], makers))):
                    files.append(document)
                    bar.update()
                files.keep()
    except FetchError as error:
        raise FetchError(f"{error}: {files.kept} documents are kept in {folder}, and it goes on there") from error
    return files.columns()


def _for_a_while(makers: Makers) -> Makers:
    until = time.monotonic() + _SECONDS_A_PART
    for make in makers:
        yield make
        if time.monotonic() > until:
            return


class _Files:
    """Documents in files: without a name, gone with the process however it ends; or, of rows, in a folder.

    What such a folder holds reaches as far as its `state.json` says: to a place of the rows, with the bytes of each
    file and their CRC-32, below a line with its own. Only what was on disk before is in it, so what a killed process
    wrote last does not count.
    """

    def __init__(self, folder: Path, what: str, rows: Resumable | None) -> None:
        self._folder, self._rows = folder, rows
        self._files: dict[str, IO[bytes]] = {}
        self._sums: dict[str, int] = {}
        self._signals: dict[str, str] = {}  # to their files
        self._tally = Tally()
        self.kept = 0
        if rows is not None:
            self._take_up(rows, what)

    def __len__(self) -> int:
        return self._tally.total

    def append(self, document: Document) -> None:
        if not self._tally.total:
            self._signals = {name: f"signal_{i}" for i, name in enumerate(document.signals)}
        if WEIGHT in document.signals and WEIGHT not in self._signals:  # those before count 1
            self._signals[WEIGHT] = WEIGHT
            self._write(WEIGHT, np.ones(self._open("tokens").tell() // 4, np.float32).data)
        for name in [name for name in self._signals if name not in document.signals and name != WEIGHT]:
            self._files.pop(self._signals.pop(name)).close()
        self._tally.add(document)
        id = printable(document.id).encode()
        self._write("tokens", np.ascontiguousarray(document.tokens, np.int32).data)
        self._write("labels", np.ascontiguousarray(document.labels, np.int32).data)
        self._write("names", id)
        self._write("lengths", np.array([len(document), len(id)]).data)
        for signal, file in self._signals.items():
            self._write(file, np.ascontiguousarray(document.signal(signal), np.float32).data)

    def keep(self) -> None:
        """Notes how far the documents reach, of rows that another process could go on with."""
        if self._rows is None:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        files = {name: (file.tell(), self._sums[name]) for name, file in self._files.items()}
        state = {"rows": self._rows.state(), "tally": vars(self._tally), "signals": self._signals, "files": files}
        text = json.dumps(state)
        write_whole(self._folder / _STATE, f"{zlib.crc32(text.encode())}\n{text}")
        self.kept = len(self)

    def columns(self) -> Sequence[Document]:
        if not len(self):
            return ()

        def mapped(name: str, dtype: type) -> np.ndarray:
            file = self._open(name)
            file.flush()
            # Slices of a memmap itself cost 10 us each; an empty file cannot be mapped.
            return np.asarray(np.memmap(file, dtype, mode="r")) if file.tell() else np.empty(0, dtype)

        lengths = mapped("lengths", np.int64).reshape(-1, 2)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[:, 1])])
        ids = pa.LargeStringArray.from_buffers(len(lengths), *map(pa.py_buffer, (ends, mapped("names", np.uint8))))
        signals = {name: mapped(file, np.float32) for name, file in self._signals.items()}
        tokens, labels = mapped("tokens", np.int32), mapped("labels", np.int32)
        return Columns(ids, lengths[:, 0], tokens, labels, signals, self._tally)

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._files:
            self._files[name] = self._new_file(name)
            self._sums.setdefault(name, 0)
        return self._files[name]

    def _new_file(self, name: str) -> IO[bytes]:
        unnamed = self._rows is None
        return tempfile.TemporaryFile(dir=self._folder.parent) if unnamed else (self._folder / name).open("ab+")

    def _write(self, name: str, data: bytes | memoryview) -> None:
        self._open(name).write(data)
        self._sums[name] = zlib.crc32(data, self._sums[name])

    def _take_up(self, rows: Resumable, what: str) -> None:
        """Goes on where an earlier process was, if it kept documents and they are whole."""
        state, note = None, self._folder / _STATE
        if note.is_file():
            try:
                crc, _, text = note.read_text().partition("\n")
                if crc != str(zlib.crc32(text.encode())):
                    raise ValueError(f"the content of {_STATE} has changed")
                state = json.loads(text)
                for name, (size, crc) in state["files"].items():
                    if size and zlib.crc32(np.memmap(self._folder / name, mode="r", shape=(size,)).data) != crc:
                        raise ValueError(f"the content of {name} has changed")
            except (OSError, ValueError) as error:
                tqdm.write(f"{what}: {self._folder} is not whole: {error}; it is made again", file=sys.stderr)
                state = None
        if state is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            return
        for name, (size, self._sums[name]) in state["files"].items():
            os.truncate(self._folder / name, size)
            self._open(name)
        vars(self._tally).update(state["tally"], counts=Counter(state["tally"]["counts"]))
        self._signals, self.kept = state["signals"], len(self)
        rows.resume(state["rows"])
        tqdm.write(f"{what}: {self.kept} documents are there from an earlier start; it goes on there", file=sys.stderr)
