"""Scored datasets: documents with columns of scores by a frozen model, in a folder with a manifest.

    <folder>/data/part-00000.parquet, ...   id, tokens, labels, the columns of :data:`COLUMNS`, and the numbers that the
                                            data had for each token before (weight, an earlier scoring), one row a
                                            document; a part that has its name is complete
    <folder>/manifest.json                  hashes of the tokenizer, the model and the data, and every part's; it
                                            appears only when all parts are there

`recipes/score_reference.py` writes them, :func:`scored` reads them for training. Any parquet reader reads the parts:
`datasets.load_dataset("parquet", data_files="<folder>/data/*.parquet")`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from wmtp.config import differences
from wmtp.data.documents import IGNORE, WEIGHT, Columns, Document, Documents, collect, comes_from, digest_tokens
from wmtp.data.rows import reading
from wmtp.errors import MissingError, UserError
from wmtp.files import file_sha256, publish, unfinished, write_whole
from wmtp.storage import local_copy

MANIFEST = "manifest.json"
FORMAT = 1
_HEADER = b"wmtp"  # key of a part's own record in its parquet metadata
# What `column` of `recipes/score_reference.py` writes; the first is the one whose mean the manifest has.
COLUMNS = {
    "reference_ce": ("reference_ce",),
    "reference_mass": ("reference_ce", "reference_mass"),
    "values": ("values",),
}


class TornPart(UserError):
    """The error of a part file that cannot be read, or whose content does not match its own record."""


def _manifest_state(arguments: Mapping[str, Any]) -> str | None:
    """Returns the hash of a scoring's manifest, which holds those of all its data, and that of the model asked for."""
    with reading(arguments["source"]):
        manifest = local_copy(arguments["source"]) / MANIFEST
        if not manifest.is_file():
            return None
        return f"{file_sha256(manifest)} {_model_sha256(arguments['checkpoint'])}"


def _model_sha256(checkpoint: str | None) -> str | None:
    from wmtp.pretrained import checkpoint_sha256, resolve_checkpoint

    return None if checkpoint is None else checkpoint_sha256(resolve_checkpoint(checkpoint))


@comes_from(_manifest_state)
def scored(
    tokenizer,
    *,
    source: str,
    checkpoint: str | None = None,
    rename: Mapping[str, str] | None = None,
    part: Sequence[int] | None = None,
) -> Documents:
    """The documents of a scored dataset with their columns, for training; every hash of the manifest is checked.

    A document that was longer than the scoring's seq_len has zeros from there on; :func:`wmtp.data.pack` refuses longer
    rows.

    Args:
        source: output_dir of `recipes/score_reference.py`, local or ``s3://``.
        checkpoint: the model that must have written the column, in any form that
            :func:`wmtp.pretrained.resolve_checkpoint` takes; None accepts every model.
        rename: other names of columns, such as ``{reference_ce: base_ce}`` before another model scores the documents.
        part: [p, n]: only every n-th document, from the p-th, p = 1 to n; null for all.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the scoring is not complete, or was made with another vocabulary or model; a part is missing, has
            changed, lacks a column or holds a number that is not finite; a name to change that no column has, or to one
            that another has.
    """
    with reading(source):
        folder = local_copy(source)
        manifest = read_manifest(folder)
    vocab_hash, made_with = tokenizer.vocab_hash(), manifest["tokenizer"]["vocab_hash"]
    if vocab_hash != made_with:
        raise UserError(
            f"{folder} was scored with another vocabulary (vocab_hash {made_with:.12}..., that of {tokenizer.name} is "
            f"{vocab_hash:.12}...); use the tokenizer it was made with, or score again"
        )
    ours, theirs = _model_sha256(checkpoint), manifest["model"]["checkpoint_sha256"]
    if ours not in (None, theirs):
        found = "none: random weights" if theirs is None else f"{theirs:.12}..."
        raise UserError(
            f"{folder} was scored by another model (SHA-256 {found}, that of {checkpoint} is {ours:.12}...)"
            "; score again with this checkpoint, or name the one that was used"
        )
    makers = _read_parts(folder, manifest, rename or {})
    if part is not None:
        if len(part) != 2 or not all(type(n) is int for n in part) or not 1 <= part[0] <= part[1]:
            raise UserError(f"part must be [p, n] with 1 <= p <= n, got {list(part)}; null for all documents")
        makers = islice(makers, part[0] - 1, None, part[1])
    items = collect(makers)
    must_read = tuple(manifest.get("must_read", ()))
    return Documents(f"scored {folder}", items, scored_len=manifest["seq_len"], must_read=must_read)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def part_path(folder: Path, number: int) -> Path:
    """Returns the path of part ``number``, counted from 0."""
    return folder / "data" / f"part-{number:05d}.parquet"


def part_paths(folder: Path) -> list[Path]:
    """Returns the paths of the complete parts, in order."""
    return sorted((folder / "data").glob("part-*.parquet"))


def write_part(
    path: Path, documents: Sequence[Document], values: Mapping[str, Sequence[np.ndarray]], binding: dict[str, Any]
) -> dict[str, Any]:
    """Writes documents with their columns; the file gets its name only once it is whole and on disk.

    Args:
        values: for each of the columns that the binding's ``column`` stands for, and each document, [T] float32.
        binding: all that the values depend on beside the documents: column, tokenizer, model, seq_len, dtype, ...

    Returns:
        the part's entry in the manifest.
    """
    names, seq_len = COLUMNS[binding["column"]], binding["seq_len"]
    flat = {name: np.concatenate(values[name]).astype(np.float32) for name in names}
    first = flat[names[0]]
    targets = sum(int((d.labels[1:seq_len] != IGNORE).sum()) for d in documents)
    header = {
        "documents": len(documents),
        "tokens": len(first),
        "targets": targets,  # of head 1, within seq_len
        "cut_documents": sum(len(d) > seq_len for d in documents),
        "scores": sum(min(len(d), seq_len) for d in documents) if names == ("values",) else targets,
        "sum": float(first.sum(dtype=np.float64)),
        "data_sha256": data_sha256(documents, binding["column"]),
        "column_sha256": _column_sha256(flat[name] for name in names),
    }
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])]).astype(np.int32)
    lists = {
        "tokens": np.concatenate([d.tokens for d in documents]).astype(np.int32),
        "labels": np.concatenate([d.labels for d in documents]).astype(np.int32),
        **flat,
    }
    weighted = [WEIGHT] * any(WEIGHT in d.signals for d in documents)
    for name in (*weighted, *_carried(documents, binding["column"])):
        lists[name] = np.concatenate([d.signal(name) for d in documents])
    arrays = {name: pa.ListArray.from_arrays(offsets, pa.array(values)) for name, values in lists.items()}
    table = pa.table({"id": pa.array([d.id for d in documents], pa.string()), **arrays})
    table = table.replace_schema_metadata({_HEADER: json.dumps({"binding": binding, **header})})
    torn = unfinished(path)
    pq.write_table(table, torn, compression="zstd", use_dictionary=False)
    publish(torn, path)
    return manifest_entry(path, header)


def manifest_entry(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest's entry of a part: its file, with size and hash, and the part's own record."""
    return {"file": f"data/{path.name}", "bytes": path.stat().st_size, "sha256": file_sha256(path), **header}


def read_part(path: Path) -> tuple[Columns, dict[str, Any], dict[str, Any]]:
    """Reads a part: its documents with their column, its binding, and its own record.

    Raises:
        TornPart: the file cannot be read, or its content does not match its own record.
    """
    binding, header = part_header(path)
    try:
        table = pq.read_table(path).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise TornPart(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    names = COLUMNS.get(binding["column"], (binding["column"],))
    for name in names:
        if name not in table.column_names:
            raise TornPart(f"{path} has no column {name!r}; it has {', '.join(table.column_names)}")
    lengths = table["tokens"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    flat = {name: _flat(table[name]) for name in table.column_names if name != "id"}
    signals = {name: values for name, values in flat.items() if name not in ("tokens", "labels")}
    documents = Columns(table["id"].combine_chunks(), lengths, flat["tokens"], flat["labels"], signals)
    whole = len({len(values) for values in flat.values()}) == 1
    if not whole or data_sha256(documents, binding["column"]) != header["data_sha256"]:
        raise TornPart(f"{path}: its tokens and labels are not those that its record names")
    if _column_sha256(flat[name] for name in names) != header["column_sha256"]:
        raise TornPart(f"{path}: its column {' or '.join(names)} is not the one that its record names")
    return documents, binding, header


def part_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a part's binding and its record, without its data.

    Raises:
        TornPart: the file cannot be read, or is no part of a scored dataset.
    """
    try:
        header = json.loads((pq.read_schema(path).metadata or {})[_HEADER])
        return header.pop("binding"), header
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise TornPart(f"{path} is no complete part of a scored dataset: {' '.join(str(error).split())}") from error


def require_same_binding(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Refuses to mix parts of two scorings; the UserError names the settings that differ, with both values."""
    if changed := differences(found, wanted):
        raise UserError(
            f"cannot resume with {', '.join(changed)} since {path} was scored; restore it, or score into another "
            "output_dir"
        )


def data_sha256(documents: Sequence[Document], column: str) -> str:
    """Returns the SHA-256 of what a scoring with this `column` is told: the documents' lengths, tokens, labels, weights
    and other signals, in order; of weights 1 as of none."""
    digest, carried = hashlib.sha256(), _carried(documents, column)
    for document in documents:
        digest_tokens(digest, document)
        weights = document.signal(WEIGHT)
        if (weights != 1).any():
            digest.update(weights.astype("<f4").tobytes())
        for name in carried:
            digest.update(name.encode() + document.signal(name).astype("<f4").tobytes())
    return digest.hexdigest()


def _carried(documents: Sequence[Document], column: str) -> list[str]:
    """Returns the signals, but weights, that each document has and that this `column` does not write anew."""
    shared = set.intersection(*(set(document.signals) for document in documents)) if len(documents) else set()
    return sorted(shared - {WEIGHT, "id", "tokens", "labels", *COLUMNS.get(column, (column,))})


# ----------------------------------------------------------------------------------------------------------------------
# The manifest


def write_column_manifest(folder: Path, binding: dict[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes manifest.json over all parts, in order; with it the dataset is complete."""
    counts = ("documents", "tokens", "targets", "cut_documents", "scores")
    totals = {key: sum(e[key] for e in entries) for key in counts}
    manifest = {
        "format": FORMAT,
        **binding,
        "data": {"sha256": _all_sha256(entries), **totals},
        "mean": sum(e["sum"] for e in entries) / max(totals["scores"], 1),
        "parts": list(entries),
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a complete scored dataset.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the dataset is not complete, or the file is no manifest.
    """
    if not folder.is_dir():
        raise MissingError(f"scored dataset {folder} does not exist; score it with recipes/score_reference.py")
    file = folder / MANIFEST
    if not file.exists():
        raise UserError(
            f"{folder} has no {MANIFEST}: its scoring is not complete ({len(part_paths(folder))} parts are there); "
            "run recipes/score_reference.py with resume=true"
        )
    try:
        manifest = json.loads(file.read_text())
        known, column = manifest["format"] == FORMAT, manifest["column"]
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{file} is not the manifest of a scored dataset (format {FORMAT}); score again")
    if column not in COLUMNS:
        raise UserError(f"{file}: column must be one of {', '.join(COLUMNS)}, got {column!r:.40}; score again")
    return manifest


def _read_parts(folder: Path, manifest: dict[str, Any], rename: Mapping[str, str]) -> Iterator[Callable[[], Document]]:
    """Yields a function for each document that makes it, part by part, each held against the manifest first."""
    totals, entries = manifest["data"], manifest["parts"]
    if _all_sha256(entries) != totals["sha256"]:
        raise UserError(f"{folder / MANIFEST}: its parts do not make up its data hash; score again")
    for entry in entries:
        with reading(folder):
            part = _read_as_recorded(folder, entry)
        part.signals = _renamed(part.signals, rename, folder)
        for i in range(len(part)):
            yield partial(part.__getitem__, i)


def _renamed(signals: Mapping[str, np.ndarray], rename: Mapping[str, str], folder: Path) -> dict[str, np.ndarray]:
    for old, new in rename.items():
        if old not in signals or new in signals or new in ("id", "tokens", "labels"):
            raise UserError(f"rename: {old} to {new}, but {folder} has the columns {', '.join(signals)}")
    return {rename.get(name, name): values for name, values in signals.items()}


def _read_as_recorded(folder: Path, entry: dict[str, Any]) -> Columns:
    """Reads a part and holds it against its entry in the manifest."""
    path = folder / entry["file"]
    if not path.exists():
        raise UserError(f"{path} is missing: {MANIFEST} names it; restore it, or score again")
    if path.stat().st_size != entry["bytes"] or file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path} has changed: its SHA-256 is not the one in {MANIFEST}; restore it, or score again")
    part, _, header = read_part(path)
    if any(header[key] != entry.get(key) for key in header if key != "sum"):  # the column's hash binds the sum
        raise UserError(f"{path}: {MANIFEST} records other hashes or counts of it; restore it, or score again")
    for name, column in part.signals.items():
        if not np.isfinite(column).all():
            bad = next(d for d in part if not np.isfinite(d.signals[name]).all())
            raise UserError(f"{path}: {name} of document {bad.id} must be finite numbers, got {name} with NaN or inf")
    return part


def _all_sha256(entries: Sequence[dict[str, Any]]) -> str:
    return hashlib.sha256("".join(entry["data_sha256"] for entry in entries).encode()).hexdigest()


def _column_sha256(columns: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for values in columns:
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
