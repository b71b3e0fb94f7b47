"""Documents, the result of every dataset builder: token ids, labels, and the data's numbers for each token."""

import hashlib
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, Protocol

import numpy as np

from wmtp.errors import UserError

IGNORE = -100  # the label of a token that is no target
_MOST = 8  # columns that a line names
_AT_ONCE = 64  # documents that a thread makes before it asks for more
SCORES = ("reference_ce", "reference_mass", "values")  # the signals that frozen models give
WEIGHT = "weight"  # the signal of weights that the data carry: 1 in documents without any (wmtp.data.weights)


@dataclass(frozen=True)
class Document:
    """One training example: a prompt, a completion and EOS.

    Attributes:
        tokens: [T] int32 token ids.
        labels: [T] int32, unshifted: ``labels[j]`` is ``tokens[j]``, or -100 where the token is no target (prompt).
        id: names the document in messages.
        signals: [T] float32 by name: a number for each token, for a weighting to read. ``reference_ce`` is a reference
            model's CE of the token, ``reference_mass`` how much it holds no likelier than the token, ``values`` a value
            model's value of the prefix that ends with it; a column of the data has its own name.
    """

    tokens: np.ndarray
    labels: np.ndarray
    id: str
    signals: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Returns the tokens before the first target; all of them where there is none."""
        targets = np.flatnonzero(self.labels != IGNORE)
        return tuple(self.tokens[: targets[0] if len(targets) else None].tolist())

    def signal(self, name: str) -> np.ndarray:
        """Returns a signal that the data set has: [T] float32."""
        if name == WEIGHT and name not in self.signals:
            return np.ones(len(self), np.float32)
        return self.signals[name]


class Tally:
    """Counts the documents that have each signal."""

    def __init__(self, documents: Iterable[Document] = ()) -> None:
        self.total = 0
        self.counts: Counter[str] = Counter()
        self.first_without: dict[str, str] = {}  # of SCORES: the name of the first document that lacks it
        for document in documents:
            self.add(document)

    def add(self, document: Document) -> None:
        self.total += 1
        self.counts.update(document.signals.keys())
        for name in SCORES:
            if name not in document.signals:
                self.first_without.setdefault(name, document.id)


class Columns(Sequence[Document]):
    """Documents in flat arrays, which may be mapped files; the object of a document is made when it is indexed.

    Args:
        ids: of pyarrow: the names.
        lengths: [N] tokens of each document.
        tokens, labels: [T] int32.
        signals: [T] float32 by name.
        tally: of the documents before those signals were left out that only some of them have.
    """

    def __init__(
        self,
        ids: Any,
        lengths: np.ndarray,
        tokens: np.ndarray,
        labels: np.ndarray,
        signals: Mapping[str, np.ndarray],
        tally: Tally | None = None,
    ) -> None:
        self._ids, self._tokens, self._labels, self.signals, self.tally = ids, tokens, labels, signals, tally
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> np.ndarray:
        """Returns the tokens of each document: [N] int64."""
        return np.diff(self._ends, prepend=0)

    def name(self, index: int) -> str:
        """Returns a document's name."""
        return self._ids[index].as_py()

    def cut_at(self, lengths: np.ndarray, ids: Any) -> "Columns":
        """Returns other documents, of these lengths and names (pyarrow's), over the same tokens."""
        return Columns(ids, lengths, self._tokens, self._labels, self.signals)

    def __getitem__(self, index: int) -> Document:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = slice(int(self._ends[index - 1]) if index else 0, int(self._ends[index]))
        signals = {name: numbers[place] for name, numbers in self.signals.items()}
        return Document(self._tokens[place], self._labels[place], self.name(index), signals)


@dataclass(frozen=True)
class Documents:
    """A dataset's documents in a fixed order.

    Attributes:
        name: names the source in messages.
        items: at least one document; each of :data:`SCORES` is in all of them or in none.
        skipped: the number of candidates that the builder left out, by reason.
        scored_len: the number of tokens of a longer document that have been scored; None where all have.
        unread: columns of the source that the builder does not read.
        must_read: signals without which the labels mean something else: a weighting that does not read them is refused.

    Raises:
        ValueError: no document, or a column that only some of them have.
    """

    name: str
    items: Sequence[Document]
    skipped: dict[str, int] = field(default_factory=dict)
    scored_len: int | None = None
    unread: tuple[str, ...] = ()
    must_read: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.items:
            raise UserError(f"{self.name}: the dataset is empty{left_out(self.skipped)}")
        for name in SCORES:
            having, total = self._tally.counts[name], self._tally.total
            if 0 < having < total:
                raise UserError(
                    f"{self.name}: {total - having} of {total} documents have no {name}, "
                    f"the first is {self._tally.first_without[name]}; score all of them or none"
                )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Document:
        return self.items[index]

    def __iter__(self) -> Iterator[Document]:
        return iter(self.items)

    def read(self, keep: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, Document | None]]:
        """Yields documents as :meth:`DocumentStream.read` does."""
        return ((index, document if keep(index) else None) for index, document in enumerate(self.items))

    def count(self) -> int:
        """Returns the number of documents."""
        return len(self.items)

    @cached_property
    def signals(self) -> tuple[str, ...]:
        """Returns the names of the signals that every document has, and of the weights that any has."""
        counts, total = self._tally.counts, self._tally.total
        return tuple(sorted(name for name, count in counts.items() if count == total or name == WEIGHT))

    @cached_property
    def _tally(self) -> Tally:
        return getattr(self.items, "tally", None) or Tally(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Returns the SHA-256 of every document's length, tokens, labels and signals, in order."""
        digest = hashlib.sha256()
        for document in self.items:
            digest_tokens(digest, document)
            for name in self.signals:
                digest.update(name.encode())
                digest.update(document.signal(name).astype("<f4").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class DocumentStream:
    """A dataset of any size, whose documents are made one by one in every reading.

    Attributes:
        name: names the source in messages.
        makers: starts a reading and yields, in a fixed order, a function for each document that makes (tokenizes) it.
        count: returns the number of documents, or None where only a whole reading would tell.
        must_read: as of :class:`Documents`.
    """

    name: str
    makers: Callable[[], Iterator[Callable[[], Document]]]
    count: Callable[[], int | None]
    must_read: tuple[str, ...] = ()

    def read(self, keep: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, Document | None]]:
        """Yields (index, document) in order; a document that ``keep`` refuses is not made, and is None."""
        return ((index, make() if keep(index) else None) for index, make in enumerate(self.makers()))


def comes_from(state: Callable[[Mapping[str, Any]], str | None]) -> Callable[[Callable], Callable]:
    """Marks a builder with what its documents come from, so that a recipe may keep them in its `data_cache`.

    Args:
        state: of the builder's arguments by name: gives a text that changes whenever the source's content does, at much
            lower cost than the builder; or None, where there is none, or where the builder will refuse its arguments.
    """

    def mark(builder: Callable) -> Callable:
        builder.source_state = state  # type: ignore[attr-defined]
        return builder

    return mark


def state_of(builder: Callable, keys: Mapping[str, Any]) -> str | None:
    """Returns the text of :func:`comes_from` for a builder called with these keys; None where it has none."""
    state = getattr(builder, "source_state", None)
    if state is None:
        return None
    arguments = inspect.signature(builder).bind(None, **keys)
    arguments.apply_defaults()
    _, *bound = arguments.arguments.items()  # without the tokenizer
    return state(dict(bound))


def printable(text: object) -> str:
    """Returns a text that any file and terminal takes: what is no Unicode, as in a file's name, is escaped."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def left_out(skipped: Mapping[str, int], unread: Iterable[str] = ()) -> str:
    """Returns the end of a line that lists what a builder left out and the columns it does not read; "" for nothing."""
    reasons, names = ", ".join(f"{count} {reason}" for reason, count in skipped.items() if count), list(unread)
    columns = ", ".join(names[:_MOST]) + (f" and {len(names) - _MOST} more" if len(names) > _MOST else "")
    said = [f"left out: {reasons}"] * bool(reasons) + [f"columns not read: {columns}"] * bool(names)
    return f" ({'; '.join(said)})" if said else ""


def digest_tokens(digest, document: Document) -> None:
    """Adds a document's length, tokens and labels, without its signals, to a hash."""
    digest.update(len(document).to_bytes(8, "little"))
    digest.update(document.tokens.astype("<i4").tobytes())
    digest.update(document.labels.astype("<i4").tobytes())


def document_from_text(tokenizer, prompt: str, completion: str, id: str) -> Document:
    """Makes a document of prompt + completion + EOS; the completion and EOS are the targets.

    Prompt and completion are tokenized apart and joined: no token straddles the split, and a generated completion
    starts exactly where a trained one does. The prompt starts with BOS where the tokenizer's model expects one.
    """
    head = tokenizer.encode_prompt(prompt)
    target = [*tokenizer.encode(completion), tokenizer.eos_id]
    tokens = np.array(head + target, dtype=np.int32)
    labels = tokens.copy()
    labels[: len(head)] = IGNORE
    return Document(tokens, labels, id)


# ----------------------------------------------------------------------------------------------------------------------
# Making and keeping


class Resumable(Protocol):
    """Rows whose reading another process can go on with."""

    def state(self) -> dict | None:
        """Returns the place behind the last row, as JSON; None where reading all again costs little."""

    def resume(self, state: dict) -> None:
        """Goes to such a place, before the first row is read."""


Makers = Iterator[Callable[[], Document]]
Storing = Callable[[Makers, Callable[[Makers], Iterator[Document]], Resumable | None], Sequence[Document]]
_how: ContextVar[tuple[int, Storing | None]] = ContextVar("how", default=(1, None))


@contextmanager
def collecting(workers: int, storing: Storing | None = None) -> Iterator[None]:
    """Lets :func:`collect` inside this context use so many threads, and store documents elsewhere than in memory.

    Args:
        storing: such as :func:`wmtp.data.document_files.in_files`.
    """
    before = _how.set((workers, storing))
    try:
        yield
    finally:
        _how.reset(before)


def collect(makers: Iterable[Callable[[], Document]], rows: Resumable | None = None) -> Sequence[Document]:
    """Makes documents in the given order; a builder calls this once it knows how each of its documents is made.

    Tokenizing releases the interpreter's lock, so threads do it side by side. Outside of :func:`collecting` one thread
    makes them, and they are kept in memory. In files they take 8 bytes a token, and 4 for each signal that all have.

    Args:
        rows: what the documents are made of, one of each. If they can be resumed, files keep the documents every few
            seconds, and the next process makes only the others, should this one be killed or lose its network.
    """
    workers, storing = _how.get()
    making = partial(_make, workers=workers)
    return tuple(making(iter(makers))) if storing is None else storing(iter(makers), making, rows)


def _make(makers: Makers, workers: int) -> Iterator[Document]:
    """Yields the documents in order, while threads make the next ones, a bounded number."""
    if workers == 1:
        yield from (make() for make in makers)
        return
    waiting = deque[Future[list[Document]]]()
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        while some := list(islice(makers, _AT_ONCE)):
            waiting.append(pool.submit(lambda some: [make() for make in some], some))
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        for future in waiting:
            yield from future.result()
