"""Transfer of one object to one file and back: boto3's parallel transfer, and a check of what arrived."""

import base64
import hashlib
import mmap
import os
import re
from functools import partial
from io import BufferedReader
from pathlib import Path
from types import SimpleNamespace

from wmtp.files import file_sha256, publish, unfinished
from wmtp.storage.names import split_uri
from wmtp.storage.s3 import (
    PART_BYTES,
    THREADS,
    ChangedError,
    CorruptError,
    RemoteFile,
    attempts,
    client,
    error_code,
    retrying,
)

_MOST_PARTS = 9_000  # S3 takes 10,000
_md5 = partial(hashlib.md5, usedforsecurity=False)


def download(file: RemoteFile, target: Path) -> str:
    """Downloads an object to `target`, which appears by a rename once it is verified. Returns the SHA-256.

    The content is compared with the object's SHA-256 (metadata ``sha256``, as :func:`upload` stores it, or S3's own
    checksum), otherwise with its ETag if that is an MD5 of the whole or of its parts. One process at a time may do
    this for a target.

    Raises:
        ChangedError: the object is no longer the one that was listed.
        StorageError: it cannot be read, or its content is wrong each time.
    """
    part = unfinished(target)
    digest = retrying(lambda: _fetch(file, part), file.uri, "read")
    publish(part, target)
    return digest


def _fetch(file: RemoteFile, part: Path) -> str:
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    at, changed = {"Bucket": file.bucket, "Key": file.key}, f"{file.uri} cannot be read: it was written again meanwhile"
    head = client().head_object(**at, ChecksumMode="ENABLED")
    if (head["ETag"], head["ContentLength"]) != (file.etag, file.num_bytes):
        raise ChangedError(changed)
    try:
        with _manager(PART_BYTES) as manager, part.open("wb") as arriving:
            known = [_known(file.num_bytes, file.etag)]
            manager.download(file.bucket, file.key, arriving, subscribers=known).result()
    except S3DownloadFailedError:  # its ETag has changed
        raise ChangedError(changed) from None
    except RetriesExceededError as error:
        raise error.last_exception from None
    found, etag = file_sha256(part), _md5_etag(head)
    if (sha256 := _sha256(head)) is not None:
        what, own, expected = "SHA-256", found, sha256
    elif etag is None:
        return found
    else:
        part_bytes = client().head_object(**at, PartNumber=1)["ContentLength"] if "-" in etag else 0
        what, own, expected = "ETag", _etag(part, part_bytes), etag
        if own.partition("-")[2] != etag.partition("-")[2]:  # parts of several sizes, which are not known
            return found
    if own != expected:
        raise CorruptError(f"{file.uri} arrived corrupt: its {what} is {own}, S3 says {expected}")
    return found


def upload(path: Path, uri: str, *, sha256: str | None = None) -> None:
    """Uploads a file to an object, which appears once it is whole. What is appended meanwhile is left out.

    Args:
        sha256: of the content, if a manifest gives it; stored with the object. For a file of one part it is computed.
    """
    with path.open("rb") as file:  # the one that is open, though another may take its name or it be removed meanwhile
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= PART_BYTES:
            put_bytes(uri, file.read(num_bytes))
        else:
            retrying(lambda: _in_parts(file, num_bytes, uri, {"sha256": sha256} if sha256 else {}), uri, "written")


def put_bytes(uri: str, body: bytes, **condition: str) -> None:
    """Writes a small object.

    Args:
        condition: ``IfNoneMatch="*"``: no such object exists; ``IfMatch=etag``: the object still has that ETag. If it
            does not hold, that is a ChangedError.
    """
    bucket, key = split_uri(uri)
    metadata = {"sha256": hashlib.sha256(body).hexdigest()}

    def put() -> None:
        answer = client().put_object(Bucket=bucket, Key=key, Body=body, Metadata=metadata, **condition)
        _prove(answer, _md5(body).hexdigest(), uri)

    retrying(put, uri, "written")


def _in_parts(file: BufferedReader, num_bytes: int, uri: str, metadata: dict[str, str]) -> None:
    from botocore.exceptions import ClientError

    file.seek(0)
    body, (bucket, key) = _Parts(file, num_bytes), split_uri(uri)
    part_bytes = max(PART_BYTES, -(-num_bytes // _MOST_PARTS))
    try:
        with _manager(part_bytes) as manager:
            known = [_known(num_bytes)]
            manager.upload(body, bucket, key, {"Metadata": metadata}, subscribers=known).result()
    except ClientError as error:
        if error_code(error) != "NoSuchUpload":  # an earlier try may have completed it, and its answer got lost
            raise
    _prove(client().head_object(Bucket=bucket, Key=key), _etag_of(body.md5s), uri)


class _Parts:
    """A reader of a file's first bytes that hashes the parts as they are read."""

    def __init__(self, file: BufferedReader, num_bytes: int) -> None:
        self._file, self._left = file, num_bytes
        self.md5s: list[bytes] = []

    def read(self, num_bytes: int) -> bytes:
        part = self._file.read(min(num_bytes, self._left))
        if part:
            self._left -= len(part)
            self.md5s.append(_md5(part).digest())
        return part


def _prove(answer: dict, etag: str, uri: str) -> None:
    """Compares the ETag that S3 answers with that of the sent content, if it is made of MD5s."""
    if _md5_etag(answer) not in (None, etag):
        raise CorruptError(f"{uri} cannot be written: it arrives corrupt; check the network")


def _etag(path: Path, part_bytes: int) -> str:
    """Returns the ETag of a file as S3 computes it: the MD5, or for parts the MD5 of the parts' MD5s."""
    with path.open("rb") as file:
        if not part_bytes:
            return hashlib.file_digest(file, _md5).hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            starts = range(0, len(view), part_bytes)
            return _etag_of([_md5(view[start : start + part_bytes]).digest() for start in starts])


def _etag_of(md5s: list[bytes]) -> str:
    return f"{_md5(b''.join(md5s)).hexdigest()}-{len(md5s)}"


def _md5_etag(answer: dict) -> str | None:
    """Returns an answer's ETag; None if it is not made of MD5s, as under some encryptions."""
    etag = answer["ETag"].strip('"').lower()
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    return etag if plain and re.fullmatch(r"[0-9a-f]{32}(-\d+)?", etag) else None


def _sha256(head: dict) -> str | None:
    """Returns the SHA-256 of an object's content; S3's own checksum of an upload in parts is another hash."""
    stored = head.get("ChecksumSHA256", "-")
    return head.get("Metadata", {}).get("sha256") or (None if "-" in stored else base64.b64decode(stored).hex())


def _manager(part_bytes: int):
    from s3transfer.manager import TransferConfig, TransferManager

    # Always in ranges, even of one byte: only those are requested with the ETag as a condition.
    config = TransferConfig(
        multipart_threshold=1,
        multipart_chunksize=part_bytes,
        max_request_concurrency=THREADS,
        num_download_attempts=attempts(),
    )
    return TransferManager(client(), config)


def _known(num_bytes: int, etag: str | None = None) -> SimpleNamespace:
    """Returns a subscriber that gives a transfer the size and ETag, which it would otherwise ask S3 for."""

    def on_queued(future, **_) -> None:
        future.meta.provide_transfer_size(num_bytes)
        future.meta.provide_object_etag(etag)

    return SimpleNamespace(on_queued=on_queued)
