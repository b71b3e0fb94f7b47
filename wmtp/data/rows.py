"""Rows of a dataset as dictionaries, each with the place it came from, so that an error can name the line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wmtp.errors import MissingError, UserError
from wmtp.storage import local_copy

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_PARQUET_ROWS = 256  # rows of a parquet file in memory at a time
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_rows(
    source: str | Path, split: str | None = None, subset: str | None = None, *, streaming: bool = False
) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) from a file, a folder or the Hugging Face hub; `where` is ``file:line``.

    Args:
        source: a ``.json`` (one array, or one object a line), ``.jsonl`` or ``.parquet`` file, the first two also with
            ``.gz``; a folder that holds ``{split}`` with one of these endings; or a hub name ``owner/name``. Files and
            folders may be local or ``s3://``, see :func:`wmtp.storage.local_copy`.
        split: which file of a folder, or which split of a hub dataset; unused for a file.
        subset: the hub dataset's configuration, such as ``sanitized``.
        streaming: read parquet and hub rows as they come, without a copy in the cache of `datasets`. Rows of JSON lines
            are always read so, and one JSON array always as a whole.

    Raises:
        FileNotFoundError: source, or the split's file in it, does not exist.
        ValueError: malformed JSON, a row that is no object, or a hub dataset that cannot be loaded.
    """
    path = _local_file(source, split)
    if path is None:
        return _numbered(_from_hub(str(source), subset, split, streaming), f"{source}[{split}]")
    if path.suffix == ".parquet":
        rows = _from_parquet(path) if streaming else _load_dataset("parquet", data_files=str(path), split="train")
        return _numbered(rows, str(path))
    return _from_json(path)


def count_rows(source: str | Path, split: str | None = None, subset: str | None = None) -> int | None:
    """How many rows :func:`read_rows` gives, without parsing them; None where only reading them all would tell.

    Raises:
        FileNotFoundError, ValueError: as in :func:`read_rows`.
    """
    path = _local_file(source, split)
    if path is None:
        info = _from_hub(str(source), subset, split, streaming=True).info
        return info.splits[split].num_examples if info.splits and split in info.splits else None
    if path.suffix == ".parquet":
        return _parquet_file(path).metadata.num_rows
    with _reading(path), _open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"")
        return None if first.lstrip().startswith(b"[") else bool(first) + sum(1 for line in file if line.strip())


def take(row: dict, where: str, column: str, kind: type) -> object:
    """A row's field, or a ValueError that says where it is missing or wrong, and which fields are there."""
    if row.get(column) is None:
        raise UserError(f"{where}: field {column!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[column], kind):
        raise UserError(
            f"{where}: field {column!r} must be {_KIND[kind]}, got {type(row[column]).__name__} {row[column]!r:.60}"
        )
    return row[column]


_KIND = {str: "a string", list: "a list", int: "a whole number", dict: "an object", bool: "true or false"}


def _local_file(source: str | Path, split: str | None) -> Path | None:
    """The file that source and split name; None for a name on the hub."""
    path = local_copy(source)
    if path.is_dir():
        return _file_of_split(path, split)
    if path.exists():
        return path
    if str(source).endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(str(source)):
        raise MissingError(f"{source} does not exist; give a file, a folder, or a hub name owner/name as source")
    return None


def _file_of_split(folder: Path, split: str | None) -> Path:
    if split is None:
        raise UserError(f"{folder} is a folder; set split to the name of one of its files, or source to a file")
    found = [folder / f"{split}{suffix}" for suffix in _SUFFIXES if (folder / f"{split}{suffix}").exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder} holds {' and '.join(f.name for f in found)}; set source to one of these files")
    there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
    raise MissingError(f"{folder} has no {split}{'|'.join(_SUFFIXES)} for split {split!r}; it holds {there}")


def _from_json(path: Path) -> Iterator[tuple[str, dict]]:
    with _reading(path), _open(path, "rt") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        if first == "[":
            for number, row in enumerate(_parse(file.read(), path, 1), start=1):
                yield _checked(row, f"{path}: row {number}")
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked(_parse(line.rstrip("\r\n"), path, number), f"{path}:{number}")


def _open(path: Path, mode: str):
    encoding = None if "b" in mode else "utf-8"
    return gzip.open(path, mode, encoding=encoding) if path.suffix == ".gz" else path.open(mode, encoding=encoding)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: not readable as {'gzipped ' * (path.suffix == '.gz')}UTF-8 text: {error}") from error


def _from_parquet(path: Path) -> Iterator[dict]:
    for batch in _parquet_file(path).iter_batches(batch_size=_PARQUET_ROWS):
        yield from batch.to_pylist()


def _parquet_file(path: Path):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not readable as parquet: {error}") from error


def _parse(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{line + error.lineno - 1}: malformed JSON: {error.msg} at column {error.colno}"
        ) from None


def _checked(row: object, where: str) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return where, row


def _from_hub(name: str, subset: str | None, split: str | None, streaming: bool):
    if split is None:
        raise UserError(f"{name} is read from the hub; set split (such as train)")
    return _load_dataset(name, subset, split=split, **({"streaming": True} if streaming else {}))


def _load_dataset(*args, **kwargs):
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # the hub's errors share no base class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        name = kwargs.get("data_files", args[0])
        raise UserError(
            f"dataset {name!r} cannot be loaded ({reason}); check its name, subset and split, "
            "or download it and give a local file or folder as source"
        ) from error


def _numbered(rows, name: str) -> Iterator[tuple[str, dict]]:
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, start=1))
