"""Rows of a dataset as dictionaries, each with the place it came from, so that an error can name the line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_rows(source: str | Path, split: str | None = None, subset: str | None = None) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) from a file, a folder or the Hugging Face hub; `where` is ``file:line``.

    Args:
        source: a ``.json`` (one array, or one object a line), ``.jsonl`` or ``.parquet`` file, the first two also with
            ``.gz``; a folder that holds ``{split}`` with one of these endings; or a hub name ``owner/name``.
        split: which file of a folder, or which split of a hub dataset; unused for a file.
        subset: the hub dataset's configuration, such as ``sanitized``.

    Raises:
        FileNotFoundError: source, or the split's file in it, does not exist.
        ValueError: malformed JSON, a row that is no object, or a hub dataset that cannot be loaded.
    """
    path = Path(source)
    if path.is_dir():
        path = _file_of_split(path, split)
    elif not path.exists():
        if str(source).endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(str(source)):
            raise FileNotFoundError(
                f"{source} does not exist; give a file, a folder, or a hub name owner/name as source"
            )
        return _numbered(_from_hub(str(source), subset, split), f"{source}[{split}]")
    if path.suffix == ".parquet":
        return _numbered(_load_dataset("parquet", data_files=str(path), split="train"), str(path))
    return _from_json(path)


def take(row: dict, where: str, column: str, kind: type) -> object:
    """A row's field, or a ValueError that says where it is missing or wrong, and which fields are there."""
    if row.get(column) is None:
        raise ValueError(f"{where}: field {column!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[column], kind):
        raise ValueError(
            f"{where}: field {column!r} must be {_KIND[kind]}, got {type(row[column]).__name__} {row[column]!r:.60}"
        )
    return row[column]


_KIND = {str: "a string", list: "a list", int: "a whole number", dict: "an object", bool: "true or false"}


def _file_of_split(folder: Path, split: str | None) -> Path:
    if split is None:
        raise ValueError(f"{folder} is a folder; set split to the name of one of its files, or source to a file")
    found = [folder / f"{split}{suffix}" for suffix in _SUFFIXES if (folder / f"{split}{suffix}").exists()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds {' and '.join(f.name for f in found)}; set source to one of these files")
    there = ", ".join(sorted(f.name for f in folder.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(f"{folder} has no {split}{'|'.join(_SUFFIXES)} for split {split!r}; it holds {there}")


def _from_json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
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
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not readable as {'gzipped ' * (path.suffix == '.gz')}UTF-8 text: {error}") from error


def _parse(text: str, path: Path, line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{line + error.lineno - 1}: malformed JSON: {error.msg} at column {error.colno}"
        ) from None


def _checked(row: object, where: str) -> tuple[str, dict]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
    return where, row


def _from_hub(name: str, subset: str | None, split: str | None):
    if split is None:
        raise ValueError(f"{name} is read from the hub; set split (such as train)")
    return _load_dataset(name, subset, split=split)


def _load_dataset(*args, **kwargs):
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # the hub's errors share no base class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        name = kwargs.get("data_files", args[0])
        raise ValueError(
            f"dataset {name!r} cannot be loaded ({reason}); check its name, subset and split, "
            "or download it and give a local file or folder as source"
        ) from error


def _numbered(rows, name: str) -> Iterator[tuple[str, dict]]:
    return ((f"{name}: row {number}", row) for number, row in enumerate(rows, start=1))
