"""Packed rows in flat files, which all processes of a host map: the system keeps one copy, and lends it to all.

<folder>/tokens.npy, labels.npy, document_ids.npy   [R, S] int32
<folder>/signal_0.npy, ...                          [R, S] float32, in the order that facts.json names them
<folder>/members.npy, starts.npy, row_*.npy         the small arrays of PackedDataset
<folder>/ids.arrow                                  the documents' names, row by row
<folder>/facts.json                                 the rest of PackedDataset
<folder>/manifest.json                              each file's size and SHA-256
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from wmtp.data.documents import Documents
from wmtp.data.packing import PackedDataset, fill, plan, rows_sha256
from wmtp.files import MANIFEST, file_sha256, flat_manifest, write_manifest

_COLUMNS = ("tokens", "labels", "document_ids")
_ROWS = 256  # in memory while they are written
_SECONDS = 2.0  # before a progress bar is shown


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
    """Maps the files of :func:`write_packed`: of a row that is read its pages alone come into memory."""

    def mapped(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="c")  # torch wants what it may write to

    facts = json.loads((folder / "facts.json").read_text())
    names = facts.pop("signals")
    small = {name: mapped(name) for name in ("members", "starts", "row_tokens", "row_targets")}
    return PackedDataset(
        **{name: torch.from_numpy(mapped(name)) for name in _COLUMNS},
        signals={name: torch.from_numpy(mapped(f"signal_{i}")) for i, name in enumerate(names)},
        ids=pa.ipc.open_file(pa.memory_map(str(folder / "ids.arrow"))).read_all()["id"],
        **small,
        **{**facts, "unread": tuple(facts["unread"])},
    )


def fault_of(folder: Path) -> str | None:
    """Returns what is wrong with the files of :func:`write_packed`, each held against its hash; None for nothing."""
    manifest = flat_manifest(folder / MANIFEST)
    if manifest is None:
        return f"it has no {MANIFEST}"

    def fault(name: str) -> str | None:
        path = folder / name
        size, expected = path.stat().st_size if path.exists() else None, manifest[name]["bytes"]
        if size != expected:
            return f"{name} {'is missing' if size is None else f'has {size} bytes, not {expected}'}"
        return None if file_sha256(path) == manifest[name]["sha256"] else f"the content of {name} has changed"

    with ThreadPoolExecutor(thread_name_prefix="verify") as pool:
        return next(filter(None, pool.map(fault, manifest)), None)
