"""Datasets on the Hugging Face hub: the commit that is read, and its rows while they are fetched."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import islice
from typing import Any

from tqdm import tqdm

from wmtp.data.document_files import FetchError
from wmtp.data.parquet_rows import ROWS, open_parquet
from wmtp.data.parquet_rows import rows_of as rows_in
from wmtp.errors import UserError, one_line
from wmtp.files import cache_folder, locked, write_whole

_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 10.0  # to wait for the hub's word on a dataset


def is_name(source: object) -> bool:
    """Returns whether a source reads as ``owner/name``, or ``owner/name@revision``."""
    return _NAME.fullmatch(str(source)) is not None


def load(source: str, subset: str | None, split: str | None, **how: Any) -> Any:
    """Calls ``datasets.load_dataset``, whose errors become one line."""
    name, _, revision = source.partition("@")
    if split is None:
        raise UserError(f"{name} is read from the hub; set split (such as train)")
    with _loading(source):
        import datasets

        return datasets.load_dataset(name, subset, split=split, revision=revision or None, **how)


@contextmanager
def _loading(source: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's errors share no base class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"dataset {source!r} cannot be loaded ({reason}); check its name, subset and split, "
            "or download it and give a local file or folder as source"
        ) from error


@cache
def commit_of(source: str) -> str | None:
    """Returns the commit of a hub dataset, the same as long as this process lives.

    Where the hub does not answer it is that of the last start on this host, as a line says; None where there was none.

    Raises:
        ValueError: the hub has no such dataset or revision, or does not give it to this user.
    """
    name, _, revision = source.partition("@")
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    note = cache_folder() / "hub" / source.replace("/", "--")
    try:
        commit = HfApi().dataset_info(name, revision=revision or None, timeout=_SECONDS, expand=["sha"]).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        with _loading(source):
            raise
    except Exception as error:  # it cannot be reached, or is in trouble
        commit = note.read_text() if note.is_file() else None
        if commit is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            line = f"{source}: the hub does not answer ({one_line(error)}); its commit is taken to be {commit} still"
            tqdm.write(line, file=sys.stderr)
    else:
        with locked(note.with_name("lock")):  # all ranks of a host ask
            write_whole(note, str(commit))
    return commit


class HubRows(Iterator[tuple[str, dict]]):
    """The rows of a hub dataset at one commit, fetched while they are read, file by file; they can be read once.

    Another process can go on where one stopped (:class:`wmtp.data.documents.Resumable`). It fetches again the row group
    of a Parquet file in which that was, or the file of another format from its start, and nothing before it.

    Args:
        source: ``owner/name@commit``.
        max_rows: read the first rows alone; row groups, and files, behind them are not asked for.
    """

    def __init__(self, source: str, subset: str | None, split: str, max_rows: int | None) -> None:
        name, _, commit = source.partition("@")
        self._name, self._max_rows = f"{name}[{split}]", max_rows
        self._files: list[Callable[[int], Iterator[dict]]]  # rows of each behind its first so many
        with _loading(source):
            import datasets

            builder = datasets.load_dataset_builder(name, subset, revision=commit)
            urls = (builder.config.data_files or {}).get(split, [""])
            if all(url.endswith(".parquet") for url in urls) and builder.config.filters is None:
                self._files = [partial(_of_row_groups, url, builder.config.columns) for url in urls]
            else:
                stream = builder.as_streaming_dataset(split=split)
                self._files = [partial(_of_file, stream, number) for number in range(stream.num_shards)]
        self._file = self._row = self._count = 0  # the file, its rows read, and all rows read
        self._rows = self._read()

    def __next__(self) -> tuple[str, dict]:
        return next(self._rows)

    def _read(self) -> Iterator[tuple[str, dict]]:
        while self._file < len(self._files) and self._count != self._max_rows:
            for row in self._fetched():
                self._row, self._count = self._row + 1, self._count + 1
                yield f"{self._name}: row {self._count}", row
                if self._count == self._max_rows:
                    return
            self._file, self._row = self._file + 1, 0

    def _fetched(self) -> Iterator[dict]:
        try:
            yield from self._files[self._file](self._row)
        except Exception as error:  # what the client, its file system and the readers of formats raise
            raise FetchError(
                f"{self._name}: what follows row {self._count} cannot be fetched ({one_line(error)}); start again"
            ) from error

    def state(self) -> dict:
        return {"file": self._file, "row": self._row, "count": self._count}

    def resume(self, state: dict) -> None:
        self._file, self._row, self._count = state["file"], state["row"], state["count"]


def _of_row_groups(url: str, columns: list[str] | None, behind: int) -> Iterator[dict]:
    """Yields the rows of a Parquet file; `datasets` fetches it whole for one row, and may abort the process at its end
    where not all are read (Arrow's issue 45214)."""
    from datasets.utils.file_utils import xopen  # tries again for some minutes

    with xopen(url, "rb") as file:
        found = open_parquet(file, url, pre_buffer=True)
        for group in range(found.num_row_groups):
            rows = found.metadata.row_group(group).num_rows
            if behind < rows:
                for batch in found.iter_batches(ROWS, row_groups=[group], columns=columns):
                    yield from rows_in(batch.slice(min(behind, len(batch))))
                    behind = max(0, behind - len(batch))
            else:
                behind -= rows


def _of_file(stream: Any, number: int, behind: int) -> Iterator[dict]:
    """Yields the rows of a file of any format that `datasets` reads; a batch never reaches into the next file."""
    for batch in stream.shard(stream.num_shards, number).iter(batch_size=ROWS):
        rows = [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        yield from rows[behind:]
        behind = max(0, behind - len(rows))


def rows_of(source: str, subset: str | None, split: str | None, max_rows: int | None) -> Iterator[tuple[str, dict]]:
    """Returns (where, row) of a hub dataset at :func:`commit_of`, fetched while they are read where that can be.

    A slice of a split (``train[:1%]``), and what is read while the hub does not answer, are of a whole copy in the
    cache of `datasets`.
    """
    commit = commit_of(source)
    at = source if commit is None else f"{source.partition('@')[0]}@{commit}"
    if split is not None and "[" not in split and commit is not None:
        return HubRows(at, subset, split, max_rows)
    return islice(loaded(at, subset, split), max_rows)


def loaded(source: str, subset: str | None, split: str | None) -> Iterator[tuple[str, dict]]:
    """Yields (where, row) of a whole copy in the cache of `datasets`."""
    batches = load(source, subset, split).with_format("arrow").iter(ROWS)
    name = source.partition("@")[0]
    return numbered((row for batch in batches for row in rows_in(batch)), f"{name}[{split}]")


def numbered(rows: Any, name: str) -> Iterator[tuple[str, dict]]:
    """Yields rows behind their places, counted from 1."""
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, start=1))
