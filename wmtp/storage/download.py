"""One object to one file: parallel ranged requests that go on after a cut; content is proved before it counts."""

import base64
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from wmtp.files import publish
from wmtp.storage.s3 import PART_BYTES, THREADS, ChangedError, CorruptError, RemoteFile, client, retrying

_BLOCK = 1 << 18  # what a cut loses at most
_WHOLE_TRIES = 3  # downloads of an object whose content turned out wrong


def download(file: RemoteFile, target: Path) -> str:
    """Fetch an object; `target` appears by a rename once its content is proved. Returns the SHA-256.

    What has arrived is kept in ``<target>.part`` and noted in ``<target>.parts``, part by part: after a cut or a
    SIGKILL the next call fetches only the rest. The caller lets one process at a time do this.

    The content is held against the SHA-256 that the object carries (metadata ``sha256``, as :mod:`upload` stores it, or
    S3's own checksum), else against its ETag where that is an MD5, of the whole or of its parts.

    Raises:
        ChangedError: the object is no longer the one that was listed.
        CorruptError: three downloads in a row gave wrong content.
        StorageError: it cannot be read.
    """
    part, journal = target.with_name(target.name + ".part"), target.with_name(target.name + ".parts")
    for attempt in range(1, _WHOLE_TRIES + 1):
        try:
            digest = _fetch(file, _expected(file), part, journal)
            break
        except CorruptError:
            part.unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
            if attempt == _WHOLE_TRIES:
                raise
    publish(part, target)
    journal.unlink(missing_ok=True)
    return digest


@dataclass(frozen=True)
class _Expected:
    sha256: str | None  # of the content
    md5: str | None  # of the content
    md5_of_parts: str | None  # MD5 over the parts' MD5s, as an ETag has it, of parts of part_bytes
    part_bytes: int


def _expected(file: RemoteFile) -> _Expected:
    """What the object says about its content, and the parts in which to fetch it."""
    options = {"Bucket": file.bucket, "Key": file.key}
    head = retrying(lambda: client().head_object(**options, ChecksumMode="ENABLED"), file.uri, "read")
    if (head["ETag"], head["ContentLength"]) != (file.etag, file.num_bytes):
        raise ChangedError(f"{file.uri} cannot be read: it was written again while it was being read")
    sha256 = head.get("Metadata", {}).get("sha256")
    if sha256 is None and "-" not in (stored := head.get("ChecksumSHA256", "-")):
        sha256 = _hex(stored)
    etag = file.etag.strip('"').lower()
    if sha256 is not None or head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head:
        return _Expected(sha256, None, None, PART_BYTES)  # an ETag under such encryption is no MD5
    plain, _, count = etag.partition("-")
    if len(plain) != 32 or any(c not in "0123456789abcdef" for c in plain):
        return _Expected(None, None, None, PART_BYTES)
    if not count:
        return _Expected(None, plain, None, PART_BYTES)
    first = retrying(lambda: client().head_object(**options, PartNumber=1), file.uri, "read")["ContentLength"]
    if math.ceil(file.num_bytes / max(1, first)) != int(count):
        return _Expected(None, None, None, PART_BYTES)  # parts of different sizes: nothing tells which
    return _Expected(None, None, etag, first)


def _hex(base64_text: str) -> str:
    return base64.b64decode(base64_text).hex()


def _fetch(file: RemoteFile, expected: _Expected, part: Path, journal: Path) -> str:
    """All parts into the partial file, then the proof; returns the SHA-256."""
    size = expected.part_bytes
    starts = range(0, file.num_bytes, size)
    identity = {"etag": file.etag, "bytes": file.num_bytes, "part_bytes": size}
    done = _parts_done(journal, identity) if part.exists() else set()
    if not done:
        journal.write_text(json.dumps(identity) + "\n")
    whole, md5, part_md5s = hashlib.sha256(), hashlib.md5(usedforsecurity=False), []
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(descriptor, file.num_bytes)
        with journal.open("ab", buffering=0) as notes, ThreadPoolExecutor(THREADS, thread_name_prefix="get") as pool:

            def fetch(start: int) -> None:
                _fetch_range(file, descriptor, start, min(size, file.num_bytes - start))
                notes.write(f"{start}\n".encode())  # a single append: parts that end together do not mix

            futures = {start: pool.submit(fetch, start) for start in starts if start not in done}
            try:
                for start in starts:  # hashing the front while the rest arrives
                    if start in futures:
                        futures[start].result()
                    own = hashlib.md5(usedforsecurity=False)
                    for offset in range(start, min(start + size, file.num_bytes), _BLOCK):
                        block = os.pread(descriptor, min(_BLOCK, start + size - offset), offset)
                        whole.update(block)
                        if expected.md5 is not None:
                            md5.update(block)
                        if expected.md5_of_parts is not None:
                            own.update(block)
                    part_md5s.append(own.digest())
            except BaseException:
                for future in futures.values():
                    future.cancel()
                raise
    finally:
        os.close(descriptor)
    found = {
        "sha256": whole.hexdigest(),
        "md5": md5.hexdigest(),
        "md5_of_parts": f"{hashlib.md5(b''.join(part_md5s), usedforsecurity=False).hexdigest()}-{len(part_md5s)}",
    }
    for kind, value in found.items():
        wanted = getattr(expected, kind)
        if wanted is not None and wanted != value:
            raise CorruptError(f"{file.uri} arrived corrupt: its {kind} is {value}, S3 says {wanted}")
    return found["sha256"]


def _parts_done(journal: Path, identity: dict) -> set[int]:
    """Starts of the parts that an earlier process noted; none where it was after another object."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []  # a last line without its end is torn
    try:
        if not lines or json.loads(lines[0]) != identity:
            return set()
        return {int(line) for line in lines[1:] if line}
    except ValueError:
        return set()


def _fetch_range(file: RemoteFile, descriptor: int, start: int, length: int) -> None:
    """One part into its place, going on at the byte where a connection was cut, as often as each brings some."""
    from botocore.exceptions import BotoCoreError

    arrived = 0

    def request() -> None:
        nonlocal arrived
        before, last = arrived, start + length - 1
        asked = f"bytes={start + arrived}-{last}"
        answer = client().get_object(Bucket=file.bucket, Key=file.key, Range=asked, IfMatch=file.etag)
        if answer["ContentLength"] != length - arrived:
            raise CorruptError(f"{file.uri} cannot be read: S3 answers {asked} with {answer['ContentLength']} bytes")
        try:
            with closing(answer["Body"]) as body:
                while arrived < length and (block := body.read(min(_BLOCK, length - arrived))):
                    os.pwrite(descriptor, block, start + arrived)
                    arrived += len(block)
        except (BotoCoreError, ConnectionError, TimeoutError):
            if arrived == before:
                raise
        if arrived == before:
            raise CorruptError(f"{file.uri} cannot be read: the connection ends without a byte")

    while arrived < length:
        retrying(request, file.uri, "read")
