"""Mirrored objects and folders of S3, fetched once per host."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wmtp.files import MANIFEST, flat_manifest
from wmtp.storage.cache import Cache
from wmtp.storage.names import SCHEME, StorageError, split_uri
from wmtp.storage.s3 import ChangedError, CorruptError, RemoteFile, find_files, where
from wmtp.storage.transfer import download

_LISTINGS = 3  # tries to read a folder that is being written
_FILES_AT_ONCE = 4
_T = TypeVar("_T")


def mirrored(uri: str, otherwise: Path | None = None) -> Path:
    """Returns the local path of an object or a folder, which is fetched into the cache.

    Args:
        otherwise: returned if there is no such object.

    Raises:
        StorageError: S3 refuses it, does not answer, or its content arrives corrupt; or it does not exist and there is
            no `otherwise`.
    """

    def read() -> Path:
        if otherwise is None:
            return _tree(uri, existing_files(uri))
        return _tree(uri, files) if (files := find_files(uri)) else otherwise

    return while_it_changes(read)


def fetch_folder(uri: str, files: list[RemoteFile], target: Path) -> None:
    """Downloads objects below a URI to the same names below a folder outside the cache, each verified."""
    _, key = split_uri(uri)
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="fetch") as pool:
        pending = []
        for file in files:
            path = target / _relative(file, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            pending.append(pool.submit(download, file, path))
        for future in pending:
            future.result()


def existing_files(uri: str) -> list[RemoteFile]:
    """Returns :func:`find_files` of a URI; raises a StorageError if there are none."""
    files = find_files(uri)
    if not files:
        raise StorageError(f"{uri} does not exist: {where()} has no such object or folder")
    return files


def while_it_changes(read: Callable[[], _T]) -> _T:
    """Returns ``read()``, which lists objects and reads them; calls it again if an object changed in between."""
    for listing in range(1, _LISTINGS + 1):
        try:
            return read()
        except ChangedError:
            if listing == _LISTINGS:
                raise
    raise AssertionError("unreachable")


def _tree(uri: str, files: list[RemoteFile]) -> Path:
    cache = Cache()
    _, key = split_uri(uri)
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="mirror") as pool:
        missing = sum(file.num_bytes for file in files if cache.digest_of(file) is None)
        with cache.filling(missing):
            digests = list(pool.map(lambda file: _content(cache, file), files))
            named = {_relative(file, key): digest for file, digest in zip(files, digests, strict=True)}
            for name in named:
                if Path(name).name == MANIFEST:
                    _check_manifest(cache, uri, name, named)
            path = cache.tree(key.rpartition("/")[2], named)
    if missing:
        cache.make_room()  # other processes may have fetched at the same time
    return path


def _content(cache: Cache, file: RemoteFile) -> str:
    """Fetches an object into the cache unless it is there. Returns the SHA-256 of its content."""
    digest = cache.digest_of(file)
    if digest is not None:
        return digest
    with cache.fetching(file):
        digest = cache.digest_of(file)  # another process may have fetched it while we waited
        if digest is None:
            whole = cache.partial(file)
            digest = download(file, whole)
            whole.chmod(0o444)
            if not cache.blob(digest).exists():
                whole.rename(cache.blob(digest))
            whole.unlink(missing_ok=True)
            cache.note(file, digest)
        return digest


def _check_manifest(cache: Cache, uri: str, manifest: str, digests: dict[str, str]) -> None:
    """Compares a folder with its manifest of sizes and SHA-256s; passes over manifests of another kind."""
    for name, entry in (flat_manifest(cache.blob(digests[manifest])) or {}).items():
        name = manifest.removesuffix(MANIFEST) + name
        if digests.get(name) != entry["sha256"]:
            raise CorruptError(
                f"{uri}/{name} is {'missing' if name not in digests else 'not the file'} that {manifest} names; upload "
                "the folder again, with its manifest last"
            )


def _relative(file: RemoteFile, key: str) -> str:
    """Returns an object's name relative to a key; "" for the object of that key itself."""
    name = file.key.removeprefix(key).lstrip("/")
    if ".." in Path(name).parts:
        raise StorageError(f"{SCHEME}{file.bucket}/{file.key} would leave its folder; rename the object")
    return name
