"""The packed rows of a run: made once on a host and kept for later starts, or in the memory of each process."""

import hashlib
import inspect
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

import wmtp.data
from wmtp.config import build, checked
from wmtp.data import PackedDataset, pack
from wmtp.data.collect import collecting
from wmtp.data.packed_files import fault_of, read_packed, write_packed
from wmtp.distributed import wait_for_all
from wmtp.errors import UserError, may_fill
from wmtp.files import cache_folder, locked, publish, unfinished


def packed_data(
    section: DictConfig, tokenizer: Any, where: str, *, seq_len: int, packed: bool, cache: str | None, workers: int
) -> PackedDataset:
    """Builds and packs the data set of a config's section; every rank calls it.

    With a cache the first process of each host tokenizes and packs, unless the cache has these very rows: of the same
    source (by content), builder with its keys and code, tokenizer and row length. All processes map the same files,
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
    key = None if cache is None else _key(section, tokenizer, where, seq_len=seq_len, **rows)
    if key is None:
        with collecting(workers):
            return pack(build(section, tokenizer, where=where), seq_len, **rows)
    kept = may_fill(cache_folder() / "data" if cache == "auto" else Path(cache).expanduser())
    folder = kept / hashlib.sha256(key.encode()).hexdigest()[:24]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data_cache: {kept} cannot be written ({error.strerror}); give another folder, or null"
            ) from error
        with locked(kept / f"{folder.name}.lock"):  # of two runs one makes them, the other finds them made
            fault = fault_of(folder) if folder.exists() else None
            if fault is not None:
                tqdm.write(f"{where}: {folder} is not whole: {fault}; it is made again", file=sys.stderr)
                shutil.rmtree(folder)
            if not folder.exists():
                with collecting(workers, kept, where):
                    _write(folder, build(section, tokenizer, where=where), seq_len, key, what=where, **rows)
    wait_for_all()
    return read_packed(folder)


def _write(folder: Path, documents: wmtp.data.Documents, seq_len: int, key: str, **rows: Any) -> None:
    partial = unfinished(folder)
    partial.mkdir()
    try:
        (partial / "key.json").write_text(key + "\n")
        write_packed(documents, seq_len, partial, **rows)
    except BaseException:  # a full disk gets its room back
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, folder)


def _key(section: DictConfig, tokenizer: Any, where: str, **rows: Any) -> str | None:
    """Returns all that the rows depend on, as JSON; None where their source cannot be told without reading them."""
    builder, values = checked(section, tokenizer, where=where)
    state = getattr(builder, "source_state", None)
    if state is None:
        return None
    arguments = inspect.signature(builder).bind(tokenizer, **values)
    arguments.apply_defaults()
    _, *keys = arguments.arguments.items()
    source = state(dict(keys))
    if source is None:
        return None
    code = hashlib.sha256()
    for file in sorted({Path(inspect.getfile(builder)), *Path(wmtp.data.__file__).parent.glob("*.py")}):
        code.update(file.read_bytes())
    named = {"builder": f"{builder.__module__}.{builder.__qualname__}", "keys": dict(keys), "source": source}
    made_by = {"tokenizer": tokenizer.fingerprint(), "code": code.hexdigest()}
    return json.dumps({**named, **made_by, **rows}, sort_keys=True, default=str, indent=1)
