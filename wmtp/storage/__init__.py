"""Paths that may be local or `s3://`: a run's inputs are mirrored into a cache, its outputs are uploaded.

Only these functions import the code for S3, once they are given a path in S3.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wmtp.files import require_folder
from wmtp.storage.names import StorageError, is_remote
from wmtp.storage.output import Output

__all__ = ["Output", "StorageError", "check_inputs", "is_remote", "local_copy", "output_of"]


def local_copy(path: str | Path) -> Path:
    """Returns the local path of a file or folder that a config names.

    Args:
        path: a local path, or ``s3://bucket/key`` of an object or a folder, which is mirrored into the cache
            (``$WMTP_CACHE``). A relative local path that does not exist is looked for below ``$WMTP_MIRROR``
            (``s3://bucket/prefix``), if that is set. A path that exists nowhere is returned too: the caller reports it.

    Raises:
        StorageError: S3 has no such object, refuses it, does not answer, or its content arrives corrupt.
    """
    local, mirror = Path(path).expanduser(), os.environ.get("WMTP_MIRROR") or ""
    if not is_remote(path) and (local.exists() or not mirror or local.is_absolute()):
        return local
    from wmtp.storage.mirror import mirrored

    if is_remote(path):
        return mirrored(str(path))
    if not is_remote(mirror):
        raise StorageError(f"WMTP_MIRROR must be s3://bucket/prefix, got {mirror}")
    return mirrored(f"{mirror.rstrip('/')}/{local.as_posix()}", otherwise=local)


def output_of(output_dir: str) -> Output:
    """Returns the output folder of a run: local, or ``s3://bucket/prefix`` with a local folder below the cache.

    Raises:
        UserError: a local one that is a file, or lies below one.
    """
    if not is_remote(output_dir):
        require_folder(Path(output_dir), "output_dir")
        return Output(output_dir)
    from wmtp.storage.remote_output import RemoteOutput

    return RemoteOutput(output_dir)


def check_inputs(cfg: DictConfig | None) -> None:
    """Refuses a config with a path in S3 that cannot be read, by its key; outputs and tracking are not looked at."""
    if cfg is None:
        return
    for key, value in _strings(OmegaConf.to_container(cfg, resolve=True)):
        if is_remote(value) and key.split(".")[0] not in ("output_dir", "tracking"):
            try:
                from wmtp.storage.mirror import existing_files

                existing_files(value)
            except StorageError as error:
                raise StorageError(f"{key}: {error}") from None


def _strings(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield prefix, value
    elif isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _strings(child, f"{prefix}.{key}" if prefix else str(key))
