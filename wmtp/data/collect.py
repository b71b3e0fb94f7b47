"""The documents of a builder, made by threads, and kept in memory or in flat files that are mapped."""

import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from wmtp.data.documents import Columns, Document, Tally
from wmtp.data.rows import printable

Makers = Iterable[Callable[[], Document]]
_AT_ONCE = 64  # documents that a thread makes before it asks for more
_NAMES = 1 << 16  # held as Python's own at a time
_SECONDS = 2.0  # before a progress bar is shown

_how: ContextVar[tuple[int, Path | None, str]] = ContextVar("how", default=(1, None, ""))


@contextmanager
def collecting(workers: int, folder: Path | None = None, what: str = "") -> Iterator[None]:
    """Lets :func:`collect` inside this context use so many threads, and files in a folder if one is given.

    Args:
        what: names the data beside the progress bar.
    """
    before = _how.set((workers, folder, what))
    try:
        yield
    finally:
        _how.reset(before)


def collect(makers: Makers) -> Sequence[Document]:
    """Makes documents in the given order; a builder calls this once it knows how each of its documents is made.

    Tokenizing releases the interpreter's lock, so threads do it side by side. Outside of :func:`collecting` one thread
    makes them, and they are kept in memory. In files they take 8 bytes a token, and 4 for each signal that all have.
    """
    workers, folder, what = _how.get()
    made = (make() for make in makers) if workers == 1 else _by_threads(makers, workers)
    if folder is None:
        return tuple(made)
    files = _Files(folder)
    for document in tqdm(made, desc=f"{what}: tokenize", unit="document", delay=_SECONDS, leave=False):
        files.append(document)
    return files.columns()


def _by_threads(makers: Makers, workers: int) -> Iterator[Document]:
    """Yields the documents in order, while threads make the next ones, a bounded number."""
    iterator, waiting = iter(makers), deque[Future[list[Document]]]()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        while some := list(islice(iterator, _AT_ONCE)):
            waiting.append(pool.submit(lambda some: [make() for make in some], some))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()


class _Files:
    """Files without a name, which are gone with the process however it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tokens, self._labels = folder, self._file(folder), self._file(folder)
        self._signals: dict[str, IO[bytes]] = {}
        self._lengths, self._tally = array("q"), Tally()
        self._names: list[str] = []
        self._ids: list[pa.Array] = []

    @staticmethod
    def _file(folder: Path) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=folder)

    def append(self, document: Document) -> None:
        if not self._lengths:
            self._signals = {name: self._file(self._folder) for name in document.signals}
        self._tally.add(document)
        self._lengths.append(len(document))
        self._tokens.write(document.tokens.astype(np.int32).tobytes())
        self._labels.write(document.labels.astype(np.int32).tobytes())
        for name in tuple(self._signals):
            if name in document.signals:
                self._signals[name].write(document.signals[name].astype(np.float32).tobytes())
            else:
                self._signals.pop(name).close()
        self._names.append(printable(document.id))
        if len(self._names) == _NAMES:
            self._take_names()

    def _take_names(self) -> None:
        self._ids.append(pa.array(self._names, pa.string()))
        self._names = []

    def columns(self) -> Sequence[Document]:
        if not self._lengths:
            return ()
        self._take_names()

        def mapped(file: IO[bytes], dtype: type) -> np.ndarray:
            file.flush()
            return np.memmap(file, dtype, mode="r")

        signals = {name: mapped(file, np.float32) for name, file in self._signals.items()}
        tokens, labels = mapped(self._tokens, np.int32), mapped(self._labels, np.int32)
        return Columns(pa.chunked_array(self._ids), np.array(self._lengths), tokens, labels, signals, self._tally)
