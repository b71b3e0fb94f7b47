"""Objects and folders of S3, fetched once per host into a cache with a size limit.

$WMTP_CACHE/s3/objects/<object>/<sha256>    the content of one version of an object, read-only, named by its hash
               trees/<digest>/<name>        a mirrored file or folder: hard links to contents, appears by a rename
               partial/                     downloads under way
               locks/                       empty files to lock; they are never removed
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from wmtp.files import (
    MANIFEST,
    UNFINISHED,
    bytes_of,
    cache_folder,
    file_sha256,
    flat_manifest,
    locked,
    take_lock,
    unfinished,
)
from wmtp.storage.names import SCHEME, StorageError, split_uri
from wmtp.storage.s3 import ChangedError, CorruptError, RemoteFile, endpoint_url, find_files, where
from wmtp.storage.transfer import download

_LISTINGS = 3  # tries to read a folder that is being written
_FILES_AT_ONCE = 4
_VERIFIED_NS = 10**18  # the mtime of every verified content: one with another is hashed before it is used again
_used: dict[Path, int | None] = {}  # trees this process uses: descriptors of their shared locks, held until it ends
_T = TypeVar("_T")


def mirrored(uri: str, otherwise: Path | None = None) -> Path:
    """Returns the local path of an object or a folder, fetched into the cache, where it stays while this process lives.

    Args:
        otherwise: returned if there is no such object; without it, that is an error too.
    """

    def read() -> Path:
        if otherwise is None:
            return _tree(uri, existing_files(uri))
        return _tree(uri, files) if (files := find_files(uri)) else otherwise

    return while_it_changes(read)


def fetch_folder(uri: str, files: list[RemoteFile], target: Path) -> None:
    """Downloads objects below a URI to the same names below a folder outside the cache, each verified."""
    _, key = split_uri(uri)
    paths = [target / _relative(file, key) for file in files]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="fetch") as pool:
        list(pool.map(download, files, paths))


def existing_files(uri: str) -> list[RemoteFile]:
    """Returns :func:`find_files` of a URI; raises a StorageError if there are none."""
    files = find_files(uri)
    if not files:
        raise StorageError(f"{uri} does not exist: {where()} has no such object or folder")
    return files


def while_it_changes(read: Callable[[], _T]) -> _T:
    """Returns ``read()``, which lists objects and reads them; calls it again if an object changed in between."""
    for _ in range(_LISTINGS - 1):
        try:
            return read()
        except ChangedError:
            continue
    return read()


# ----------------------------------------------------------------------------------------------------------------------
# The cache


def _tree(uri: str, files: list[RemoteFile]) -> Path:
    _, key = split_uri(uri)
    missing = sum(file.num_bytes for file in files if not _object(file).is_dir())
    make_room(missing)
    with locked(_lock("filling"), shared=True):  # contents that are in no tree yet are not removed
        with ThreadPoolExecutor(_FILES_AT_ONCE, thread_name_prefix="mirror") as pool:
            contents = dict(zip((_relative(file, key) for file in files), pool.map(_content, files), strict=True))
        for name in contents:
            if Path(name).name == MANIFEST:
                _check_manifest(uri, name, contents)
        path = link_tree(key.rpartition("/")[2], contents)
    if missing:
        make_room()  # other processes may have fetched at the same time
    return path


def _content(file: RemoteFile) -> Path:
    """Returns the verified content of an object, which one thread of one process fetches unless it is there."""
    folder = _object(file)
    with locked(_lock(folder.name)):
        content = _verified(folder)
        if content is None:
            partial = _cache("partial") / folder.name
            content = folder / download(file, partial)
            partial.chmod(0o444)
            os.utime(partial, ns=(_VERIFIED_NS, _VERIFIED_NS))
            folder.mkdir(parents=True, exist_ok=True)
            partial.rename(content)
    return content


def _verified(folder: Path) -> Path | None:
    """Returns the content in an object's folder; None if it must be fetched."""
    content = next(folder.glob("*"), None)
    if content is not None and content.stat().st_mtime_ns != _VERIFIED_NS:
        if file_sha256(content) != content.name:
            content.unlink(missing_ok=True)  # somebody wrote into it; trees that link to it are built again
            return None
        os.utime(content, ns=(_VERIFIED_NS, _VERIFIED_NS))
    return content


def _check_manifest(uri: str, manifest: str, contents: dict[str, Path]) -> None:
    """Compares a folder with its manifest of sizes and SHA-256s; passes over manifests of another kind."""
    for name, entry in (flat_manifest(contents[manifest]) or {}).items():
        name = manifest.removesuffix(MANIFEST) + name
        if name not in contents or contents[name].name != entry["sha256"]:
            what = "missing" if name not in contents else "not the file"
            raise CorruptError(f"{uri}/{name} is {what} that {manifest} names; upload the folder again, whole")


def link_tree(name: str, contents: dict[str, Path]) -> Path:
    """Returns a folder of the given files, or a single file if the only name is "".

    It stays while this process lives. It is never replaced, not even briefly: other processes read it.

    Args:
        name: the last part of the returned path.
        contents: the content of each file, at least one, by its relative name; a content is named by its SHA-256.
    """
    digest = _key(
        "tree", *(f"{file} {content.parent.name} {content.name}" for file, content in sorted(contents.items()))
    )
    folder, in_use = _cache("trees") / digest, _lock(digest)
    if in_use not in _used:
        _used[in_use] = take_lock(in_use, shared=True)
    os.utime(in_use)  # the time of the tree's last use
    with locked(_lock(f"{digest}.making")):
        made = folder if folder.exists() else unfinished(folder)
        for file, content in contents.items():
            link, new = made / name / file if file else made / name, made / ".new"
            if not (link.exists() and link.samefile(content)):  # missing, or linked to a content that was damaged since
                link.parent.mkdir(parents=True, exist_ok=True)
                new.unlink(missing_ok=True)
                os.link(content, new)
                new.replace(link)
        if made != folder:
            made.rename(folder)
    return folder / name


def make_room(num_bytes: int = 0) -> None:
    """Removes the least recently used trees that no process uses, until `num_bytes` fit under ``$WMTP_CACHE_LIMIT``."""
    text = os.environ.get("WMTP_CACHE_LIMIT", "").strip()
    if not text:
        return
    limit = bytes_of(text)
    if limit is None:
        raise StorageError(f"WMTP_CACHE_LIMIT must be a size such as 200GB, got {text}")
    with locked(_lock("filling"), wait=False) as ours:
        if not ours:  # the process that is filling the cache makes room when it is done
            return
        last_use = {lock.name: lock.stat().st_mtime for lock in _cache("locks").iterdir()}
        trees = [tree for tree in _cache("trees").iterdir() if tree.suffix != UNFINISHED]
        for tree in sorted(trees, key=lambda tree: last_use.get(tree.name, 0.0)):
            if _sweep() + num_bytes <= limit:
                return
            with locked(_lock(tree.name), wait=False) as unused:
                if unused:
                    shutil.rmtree(tree)
        _sweep()


def _sweep() -> int:
    """Removes contents that no tree links to and leftovers of killed processes. Returns the bytes that remain."""
    for torn in _cache("trees").glob(f"*{UNFINISHED}"):
        shutil.rmtree(torn)
    total = sum(part.stat().st_blocks * 512 for part in _cache("partial").iterdir())
    for content in _cache("objects").glob("*/*"):
        stat = content.stat()
        if stat.st_nlink == 1:
            shutil.rmtree(content.parent)
        else:
            total += stat.st_size
    return total


def _object(file: RemoteFile) -> Path:
    """Returns the folder of one version of an object's content."""
    return _cache("objects") / _key(endpoint_url(), file.uri, file.etag, file.num_bytes)


def _cache(name: str) -> Path:
    folder = cache_folder() / "s3" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _lock(name: str) -> Path:
    return _cache("locks") / name


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _relative(file: RemoteFile, key: str) -> str:
    """Returns an object's name relative to a key; "" for the object of that key itself."""
    name = file.key.removeprefix(key).lstrip("/")
    if ".." in Path(name).parts:
        raise StorageError(f"{SCHEME}{file.bucket}/{file.key} would leave its folder; rename the object")
    return name
