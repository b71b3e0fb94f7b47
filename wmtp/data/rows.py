"""Rows of a dataset as dictionaries, each with its place in the source, so that an error can name the line."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

import pyarrow as pa

from wmtp.data import hub
from wmtp.data.documents import printable
from wmtp.data.parquet_rows import ROWS, open_parquet, rows_of
from wmtp.errors import MissingError, UserError, cannot_be_read
from wmtp.files import content_sha256
from wmtp.storage import local_copy

T = TypeVar("T")
_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
# A file of a split, whole or one of its shards as the hub names them.
_OF_SPLIT = re.compile(r"(?P<split>.+?)(?:-\d+-of-(?P<shards>\d+))?\.(?:jsonl?(?:\.gz)?|parquet)")
_LARGEST = 3.4028234663852886e38  # of float32, in which columns are kept
_OF_TESTS = re.compile(r"(?:^|_)(?:test|testcase|assert|assertion|input|output)s?(?:$|_)")  # a column's name
_NAMED = 20  # fields that a message names


def read_rows(
    source: str | Path,
    split: str | None = None,
    subset: str | None = None,
    *,
    max_rows: int | None = None,
    streaming: bool = False,
    lists: bool = False,
) -> Iterator[tuple[str, dict]]:
    """Yields (where, row) from a file, a folder or the Hugging Face hub; `where` is ``file:line``.

    Args:
        source: a ``.json`` (one array, or one object a line), ``.jsonl`` or ``.parquet`` file, the first two also with
            ``.gz``; a pipe with the content of one of the first two; a folder with a file ``{split}`` of one of these
            endings, or its shards ``{split}-00000-of-00002``, in it, in its ``data`` or in ``subset`` below, as a copy
            of a hub dataset has them; or a hub name ``owner/name``, or ``owner/name@revision`` of a commit, tag or
            branch. Files and folders may be local or ``s3://``, see :func:`wmtp.storage.local_copy`.
        split: the file of a folder, or the split of a hub dataset; unused for a file. ``all``: every one.
        subset: the hub dataset's configuration, such as ``sanitized``; of a folder, one below it.
        max_rows: read the first rows alone.
        streaming: fetch the rows of a hub dataset while they are read (:func:`wmtp.data.hub.rows_of`), without a copy
            in the cache of `datasets`. Files are always read so, except that one JSON array is read as a whole.
        lists: a row of one JSON array may be a list too.

    Raises:
        FileNotFoundError: source, or the split's file in it, does not exist.
        ValueError: a file that cannot be read, malformed JSON, a row that is no object or has a key twice, or a hub
            dataset that cannot be loaded.
    """
    if max_rows is not None and max_rows < 1:
        raise UserError(f"max_rows must be >= 1, or null for all rows, got {max_rows}")
    if split == "all" and (splits := _splits(source, subset)):
        return islice((row for each in splits for row in read_rows(source, each, subset)), max_rows)
    paths = _local_files(source, split, subset)
    if paths is None and streaming:
        return hub.rows_of(str(source), subset, split, max_rows)
    if paths is None:
        rows = hub.loaded(str(source), subset, split)
    else:
        rows = (row for path in paths for row in _of_file(path, lists))
    return islice(rows, max_rows)


def count_rows(source: str | Path, split: str | None = None, subset: str | None = None) -> int | None:
    """Counts the rows of :func:`read_rows` without parsing them; returns None where only reading them all would tell.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_rows`.
    """
    if split == "all" and (splits := _splits(source, subset)):
        counts = [count_rows(source, each, subset) for each in splits]
        return None if None in counts else sum(counts)
    paths = _local_files(source, split, subset)
    if paths is None:
        info = hub.load(str(source), subset, split, streaming=True).info
        return info.splits[split].num_examples if info.splits and split in info.splits else None
    counts = [_count(path) for path in paths]
    return None if None in counts else sum(counts)


def _count(path: Path) -> int | None:
    with reading(path):
        if path.suffix == ".parquet":
            with path.open("rb") as file:
                return open_parquet(file, printable(path)).metadata.num_rows
        with _open(path) as file:
            first = next((line for line in file if line.strip()), "")
            return None if first.lstrip().startswith("[") else bool(first) + sum(1 for line in file if line.strip())


def rows_state(arguments: Mapping[str, Any]) -> str | None:
    """Returns a text that changes with the rows of :func:`read_rows`, for :func:`wmtp.data.comes_from`.

    Args:
        arguments: of a builder: source, split and subset. Of a folder every file counts, whatever the split.

    Returns:
        The files' names and SHA-256, or the commit of a hub dataset; None for a pipe, which is read only once.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_rows`.
    """
    source, split, subset = (arguments[key] for key in ("source", "split", "subset"))
    with reading(source):
        folder = local_copy(source)
        if folder.is_dir():
            files = sorted(file for of_split in _files_by_split(folder, subset).values() for file, _ in of_split)
        elif (paths := _local_files(source, split, subset)) is None:
            commit = hub.commit_of(str(source))
            return commit or getattr(hub.load(str(source), subset, split), "_fingerprint", None)
        else:
            files = paths
        if not all(file.is_file() for file in files):
            return None
        return " ".join(f"{file.name} {content_sha256(file)}" for file in files)


# ----------------------------------------------------------------------------------------------------------------------
# Fields


def take(row: dict, where: str, column: str, kind: type[T]) -> T:
    """Returns a row's field; the ValueError of a missing or wrong one names the place and the row's fields."""
    value = row.get(column)
    if value is None and column in row:
        raise UserError(f"{where}: field {column!r} is null; give it a value, or leave the row out")
    if value is None:
        raise UserError(f"{where}: field {column!r} is missing; the row has {fields_of(row)}")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: field {column!r} must be {_KIND[kind]}, got {type(value).__name__} {value!r:.60}")
    return _unicode(value, f"{where}: field {column!r}") if kind is str else value


def fields_of(row: Mapping) -> str:
    """Lists the names of a row's fields for a message; only the first where they are many."""
    names = [*map(str, row)]
    return ", ".join([*names[:_NAMED], *["..."] * (len(names) > _NAMED)]) or "no fields"


def take_texts(row: dict, where: str, column: str) -> list[str]:
    """Returns a row's list of strings, empty where it has none."""
    values = [] if row.get(column) is None else take(row, where, column, list)
    if not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: field {column!r} must be a list of strings, got {values!r:.60}")
    return [_unicode(value, f"{where}: {column}[{place}]") for place, value in enumerate(values)]


def refuse_unread_tests(row: dict, where: str, known: Collection[str], instead: str) -> None:
    """Refuses a row with a column that looks like tests but is never run: programs would pass without them.

    Args:
        known: columns that are run, or that add nothing to the tests.
        instead: the columns where tests belong, for the message.
    """
    for column, value in row.items():
        name = re.sub(r"([a-z])([A-Z])", r"\1_\2", str(column)).lower().replace("-", "_")
        if value and isinstance(value, str | list | dict) and column not in known and _OF_TESTS.search(name):
            raise UserError(
                f"{where}: nobody runs what the column {column!r} holds, which looks like tests; "
                f"put it into {instead}, or remove the column"
            )


def is_number(value: object) -> bool:
    """Returns whether a value is a number that is finite in float32 too; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def lf(text: str) -> str:
    """Returns a text with LF line ends."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


_KIND = {str: "a string", list: "a list", int: "a whole number", dict: "an object", bool: "true or false"}


def _unicode(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a character, {text[error.start]!a} at place {error.start}, which is no Unicode text; "
            "write the whole character, or leave the row out"
        ) from None
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _local_files(source: str | Path, split: str | None, subset: str | None) -> list[Path] | None:
    """Returns the files that source, split and subset name; None for a name on the hub."""
    with reading(source):
        path = local_copy(source)
        if path.is_dir():
            return _files_of_split(path, split, subset)
        if path.exists():
            return [path]
    if str(source).endswith(_SUFFIXES) or not hub.is_name(source):
        raise missing(source, "give a file, a folder, or a hub name owner/name as source")
    return None


def _splits(source: str | Path, subset: str | None) -> list[str]:
    """Returns the splits of a folder by name; none where it has a file for a split `all`, or is no folder."""
    with reading(source):
        folder = local_copy(source)
        splits = _files_by_split(folder, subset) if folder.is_dir() else {}
    return [] if "all" in splits else sorted(splits)


def _files_by_split(folder: Path, subset: str | None) -> dict[str, list[tuple[Path, int | None]]]:
    """Returns the files of each split of a folder, with the number of shards that a file's name says."""
    found: dict[str, list[tuple[Path, int | None]]] = {}
    for place in (folder, folder / "data", *([folder / subset] if subset else [])):
        for file in sorted(place.iterdir()) if place.is_dir() else ():
            if file.is_file() and (named := _OF_SPLIT.fullmatch(file.name)):
                shards = named["shards"] and int(named["shards"])
                found.setdefault(named["split"], []).append((file, shards))
    return found


def missing(path: str | Path, way_out: str, key: str = "") -> MissingError:
    """Returns the error of a path that is not there; ``key`` (as in "source: ") stands before the path."""
    if str(path).startswith("/dev/"):
        return MissingError(
            f"{key}{path} does not exist in this process: what the shell writes for <(...) is open in one process "
            "only; run with plain python, or give a file, a named pipe, or /dev/stdin"
        )
    return MissingError(f"{key}{path} does not exist; {way_out}")


def _files_of_split(folder: Path, split: str | None, subset: str | None) -> list[Path]:
    if split is None:
        raise UserError(f"{folder} is a folder; set split to the name of one of its files, or source to a file")
    found = _files_by_split(folder, subset).get(split, [])
    files, shards = [file for file, _ in found], {number for _, number in found}
    if len(files) == 1 and shards <= {None, 1}:
        return files
    if not files:
        there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
        raise MissingError(f"{folder} has no {split}{'|'.join(_SUFFIXES)} for split {split!r}; it holds {there}")
    if shards == {len(files)}:
        return files
    if len(shards) == 1 and None not in shards:
        raise MissingError(f"{folder} has {len(files)} of the {shards.pop()} shards of split {split!r}; copy them all")
    raise UserError(f"{folder} holds {' and '.join(f.name for f in files)}; set source to one of these files")


def _of_file(path: Path, lists: bool) -> Iterator[tuple[str, dict]]:
    parquet = path.suffix == ".parquet"
    return hub.numbered(_from_parquet(path), printable(path)) if parquet else _from_json(path, lists)


def _from_json(path: Path, lists: bool) -> Iterator[tuple[str, dict]]:
    name = printable(path)
    with reading(path), _open(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            for number, row in enumerate(_parse(file.read(), name, 1), start=1):
                yield _checked(row, f"{name}: row {number}", lists)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked(_parse(line.rstrip("\r\n"), name, number), f"{name}:{number}")


def _open(path: Path) -> TextIO:
    """Opens a text file, plain or gzipped, without the byte order mark; a pipe is read at once, as a whole."""
    file: BinaryIO = path.open("rb") if path.is_file() else io.BytesIO(path.read_bytes())
    zipped = file.read(2) == b"\x1f\x8b" or path.suffix == ".gz"
    file.seek(0)
    return io.TextIOWrapper(gzip.open(file) if zipped else file, encoding="utf-8-sig")


def unreadable(error: OSError, path: str | Path) -> UserError:
    """Returns the file system's refusal as an error that names the file or folder."""
    return UserError(cannot_be_read(error, printable(error.filename or path), "name another source"))


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns the errors of reading a file inside this context into one line with the file's name."""
    name = printable(path)
    try:
        yield
    except UserError:
        raise
    except (UnicodeDecodeError, EOFError, zlib.error, pa.ArrowException, OSError) as error:
        if getattr(error, "strerror", None):
            raise unreadable(error, path) from error
        kind = "parquet" if name.endswith(".parquet") else f"{'gzipped ' * name.endswith('.gz')}UTF-8 text"
        raise UserError(f"{name}: not readable as {kind}: {' '.join(str(error).split())}") from error


def _from_parquet(path: Path) -> Iterator[dict]:
    """Yields the rows of an open file, because readers that are given a name take it for a pattern."""
    with reading(path), path.open("rb") as file:
        for batch in open_parquet(file, printable(path)).iter_batches(ROWS):
            yield from rows_of(batch)


def _parse(text: str, name: str, line: int) -> object:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise UserError(
            f"{name}:{line}: malformed JSON: {error.msg.removesuffix(' at')} at column {error.colno}; "
            "write one object a line, or one array"
        ) from None
    except RecursionError:
        raise UserError(f"{name}:{line}: JSON that is nested too deeply to be read") from None
    except ValueError as error:  # a key that is there twice, a number of more digits than Python reads
        raise UserError(f"{name}:{line}: malformed JSON: {error}") from None


def _object(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return row


def _checked(row: object, where: str, lists: bool = False) -> tuple[str, dict]:
    if not isinstance(row, dict) and not (lists and isinstance(row, list)):
        raise UserError(
            f"{where}: a row must be a JSON object, got {type(row).__name__}; write one object a line, each with its "
            "fields by name"
        )
    return where, row
