"""The packed rows of a run: made once on a host and kept for later starts, or in the memory of each process.

What is kept are flat files, which all processes read: the system holds one copy for them in its page cache.

    <cache>/<hash of the key>/
        tokens.npy, labels.npy, document_ids.npy    [R, S] int32
        signal_0.npy, ...                           [R, S] float32, in the order that facts.json names them
        members.npy, starts.npy, row_*.npy          the small arrays of PackedDataset
        ids.arrow                                   the documents' names, row by row
        facts.json                                  the rest of PackedDataset
        key.json                                    all that the rows depend on
        manifest.json                               each file's size and SHA-256
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from omegaconf import DictConfig
from tqdm import tqdm

import wmtp.data
import wmtp.pretrained
from wmtp.config import build, checked
from wmtp.data import Documents, PackedDataset, pack
from wmtp.data.documents import collecting, state_of
from wmtp.data.packing import FileRows, fill, plan, rows_sha256
from wmtp.distributed import wait_for_all
from wmtp.errors import UserError, may_fill
from wmtp.files import (
    MANIFEST,
    cache_folder,
    file_sha256,
    flat_manifest,
    locked_cache,
    publish,
    unfinished,
    write_manifest,
)

_COLUMNS = ("tokens", "labels", "document_ids")
_ROWS = 256  # in memory while they are written
_SECONDS = 2.0  # before a progress bar is shown


def packed_data(
    section: DictConfig, tokenizer: Any, where: str, seq_len: int, *, packed: bool, cache: str | None, workers: int
) -> PackedDataset:
    """Builds and packs the data set of a config's section; every rank calls it.

    With a cache the first process of each host tokenizes and packs, unless the cache has these very rows: of the same
    source (by content), builder with its keys and code, tokenizer and row length. All processes read the same files,
    after one has held them against their hashes. Without a cache, and where the builder does not say what it reads
    (:func:`wmtp.data.comes_from`), each process holds all rows. The rows are the same, bit for bit.

    Args:
        where: the section's name, for messages.
        cache: a folder; ``auto`` is `data` in ``$WMTP_CACHE`` or ``~/.cache/wmtp``; None for no cache.
        workers: threads that tokenize.

    Raises:
        ValueError: as the builder and :func:`wmtp.data.pack`; or the folder cannot be written.
    """
    rows = {"packed": packed, "pad_id": tokenizer.pad_id}
    if cache is None or (key := _key(section, tokenizer, where, seq_len=seq_len, **rows)) is None:
        with collecting(workers):
            return pack(build(section, tokenizer, where=where), seq_len, **rows)
    kept = may_fill(cache_folder() / "data" if cache == "auto" else Path(cache).expanduser())
    folder = kept / hashlib.sha256(key.encode()).hexdigest()[:24]
    documents_kept = folder.with_name(f"{folder.name}.documents")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with locked_cache(folder.with_name(f"{folder.name}.lock"), "data_cache", "give another folder, or null"):
            fault = fault_of(folder, key) if folder.exists() else None
            if fault is not None:
                tqdm.write(f"{where}: {folder} is not whole: {fault}; it is made again", file=sys.stderr)
                shutil.rmtree(folder)
            if not folder.exists():
                from wmtp.data.document_files import in_files  # only where rows are made

                with collecting(workers, in_files(documents_kept, where)):
                    documents = build(section, tokenizer, where=where)
                if _key(section, tokenizer, where, seq_len=seq_len, **rows) != key:
                    raise UserError(f"{where}: {documents.name} changed while it was read; start again")
                _write(folder, documents, seq_len, key, what=where, **rows)
            shutil.rmtree(documents_kept, ignore_errors=True)
    wait_for_all()
    return read_packed(folder)


def _write(folder: Path, documents: Documents, seq_len: int, key: str, **rows: Any) -> None:
    torn = unfinished(folder)
    torn.mkdir()
    try:
        (torn / "key.json").write_text(key + "\n")
        write_packed(documents, seq_len, torn, **rows)
    except BaseException:  # a full disk gets its room back
        shutil.rmtree(torn, ignore_errors=True)
        raise
    publish(torn, folder)


def _key(section: DictConfig, tokenizer: Any, where: str, **rows: Any) -> str | None:
    """Returns all that the rows depend on, as JSON; None where their source cannot be told without reading them."""
    builder, values = checked(section, tokenizer, where=where)
    source = state_of(builder, values)
    if source is None:
        return None
    code = hashlib.sha256()
    written = inspect.getfile(inspect.unwrap(builder))
    files = {Path(__file__), Path(written), *Path(wmtp.data.__file__).parent.glob("*.py")}
    files |= {Path(wmtp.pretrained.__file__).with_name(f"{name}.py") for name in ("tokenizer", "chat_template")}
    for file in sorted(files):
        code.update(file.read_bytes())
    named = {**_named(partial(builder, **values)), "source": source}
    made_by = {"tokenizer": tokenizer.fingerprint(), "code": code.hexdigest()}
    return json.dumps({**named, **made_by, **rows}, sort_keys=True, default=_named, indent=1)


def _named(value: Any) -> Any:
    """Returns what JSON says of a key's value: of a builder in it, its name and keys."""
    if not isinstance(value, partial):
        return str(value)
    return {"builder": f"{value.func.__module__}.{value.func.__qualname__}", "keys": value.keywords}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_packed(documents: Documents, seq_len: int, folder: Path, *, packed: bool, pad_id: int, what: str) -> None:
    """Writes the rows of :func:`wmtp.data.pack` into an empty folder; all is on disk when this returns.

    Args:
        what: names the data beside the progress bar.

    Raises:
        ValueError: as :func:`wmtp.data.pack`.
    """
    facts = plan(documents, seq_len, packed=packed, pad_id=pad_id)
    num_rows, names = len(facts["row_tokens"]), list(documents.signals)
    blocks = fill(documents, seq_len, facts, rows_at_once=_ROWS)
    progress = tqdm(total=num_rows, desc=f"{what}: pack", unit="row", delay=_SECONDS, leave=False)
    with ExitStack() as files, progress:

        def column(name: str, dtype: type) -> IO[bytes]:
            file = files.enter_context((folder / f"{name}.npy").open("wb"))
            described = np.lib.format.dtype_to_descr(np.dtype(dtype))
            header = {"descr": described, "fortran_order": False, "shape": (num_rows, seq_len)}
            np.lib.format.write_array_header_1_0(file, header)
            return file

        # Written, not mapped: on a full disk a write fails with an error, but a store into a mapping kills the process.
        to = {name: column(name, np.int32) for name in _COLUMNS}
        signals_to = {name: column(f"signal_{i}", np.float32) for i, name in enumerate(names)}
        schema = pa.schema({"id": pa.large_string()})
        ids_to = pa.ipc.new_file(files.enter_context((folder / "ids.arrow").open("wb")), schema)
        for columns, signals, ids in blocks:
            for name, values in columns.items():
                to[name].write(values.data)
            for name, values in signals.items():
                signals_to[name].write(values.data)
            ids_to.write_batch(pa.record_batch([ids], schema))
            progress.update(len(columns["tokens"]))
        ids_to.close()
    plain = {name: value for name, value in facts.items() if not isinstance(value, np.ndarray)}
    for name in facts.keys() - plain.keys():
        np.save(folder / f"{name}.npy", facts[name])
    digest = rows_sha256(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _COLUMNS))
    (folder / "facts.json").write_text(json.dumps({**plain, "signals": names, "rows_sha256": digest}, indent=1))
    write_manifest(folder)


def read_packed(folder: Path) -> PackedDataset:
    """Opens the files of :func:`write_packed`: rows are read when they are asked for, and kept by the system alone."""
    facts = json.loads((folder / "facts.json").read_text())
    facts |= {name: tuple(facts[name]) for name in ("unread", "must_read")}
    facts["signals"] = {name: FileRows(folder / f"signal_{i}.npy") for i, name in enumerate(facts["signals"])}
    facts |= {name: FileRows(folder / f"{name}.npy") for name in _COLUMNS}
    for name in ("members", "starts", "row_tokens", "row_targets"):
        facts[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="c"))  # torch wants what it may write to
    ids = pa.ipc.open_file(pa.memory_map(str(folder / "ids.arrow"))).read_all()["id"]
    return PackedDataset(**facts, ids=ids)


def fault_of(folder: Path, key: str) -> str | None:
    """Returns what is wrong with the kept rows of a key, each file held against its hash; None for nothing."""
    manifest = flat_manifest(folder / MANIFEST)
    if manifest is None:
        return f"it has no {MANIFEST}"
    if unnamed := {path.name for path in folder.iterdir()} - {MANIFEST} - manifest.keys():
        return f"{MANIFEST} does not name {min(unnamed)}"

    def fault(name: str) -> str | None:
        path = folder / name
        size, expected = path.stat().st_size if path.exists() else None, manifest[name]["bytes"]
        if size != expected:
            return f"{name} {'is missing' if size is None else f'has {size} bytes, not {expected}'}"
        return None if file_sha256(path) == manifest[name]["sha256"] else f"the content of {name} has changed"

    with ThreadPoolExecutor(thread_name_prefix="verify") as pool:
        if found := next(filter(None, pool.map(fault, manifest)), None):
            return found
    return None if (folder / "key.json").read_text() == key + "\n" else "it holds the rows of another key.json"
