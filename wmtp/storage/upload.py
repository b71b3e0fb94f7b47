"""One file to one object: parallel parts, each proved by its ETag, and the content's SHA-256 as metadata."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from wmtp.storage.s3 import PART_BYTES, CorruptError, client, retrying, split_uri

_MOST_PARTS = 9_000  # S3 takes 10,000


def upload(path: Path, uri: str, *, sha256: str | None = None, threads: int = 4) -> None:
    """Write a file's content as it is now to an object, which appears when all of it is there.

    A file that grows meanwhile is uploaded up to where it ended at first.

    Args:
        path: the file.
        uri: ``s3://bucket/key``.
        sha256: of the content where it is known, as a manifest knows it; to be kept with the object. Of a file of one
            part it is computed. A large one is not read twice for it: the ETags of its parts prove it too.
        threads: parts under way at once.

    Raises:
        FileNotFoundError: no such file.
        StorageError: S3 refuses it, does not answer, or keeps something else than was sent.
    """
    with path.open("rb") as file:
        descriptor = file.fileno()
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes <= PART_BYTES:
            put_bytes(uri, os.pread(descriptor, num_bytes, 0))
        else:
            _in_parts(descriptor, num_bytes, uri, {} if sha256 is None else {"sha256": sha256}, threads)


def put_bytes(uri: str, body: bytes, **condition: str) -> None:
    """Write a small object.

    Args:
        condition: ``IfNoneMatch="*"`` where there is none, ``IfMatch=etag`` where it is still that one.

    Raises:
        ChangedError: the condition does not hold.
    """
    metadata = {"sha256": hashlib.sha256(body).hexdigest()}
    retrying(lambda: _put(uri, body, metadata, condition), uri, "written")


def _put(uri: str, body: bytes, metadata: dict[str, str], condition: dict[str, str]) -> None:
    bucket, key = split_uri(uri)
    _prove(client().put_object(Bucket=bucket, Key=key, Body=body, Metadata=metadata, **condition), body, uri)


def _in_parts(descriptor: int, num_bytes: int, uri: str, metadata: dict[str, str], threads: int) -> None:
    bucket, key = split_uri(uri)
    at = {"Bucket": bucket, "Key": key}
    size = max(PART_BYTES, -(-num_bytes // _MOST_PARTS))

    def send(number: int) -> dict:
        start = (number - 1) * size
        body = os.pread(descriptor, min(size, num_bytes - start), start)

        def request() -> dict:
            answer = client().upload_part(**at, UploadId=upload_id, PartNumber=number, Body=body)
            _prove(answer, body, uri)
            sums = {name: value for name, value in answer.items() if name.startswith("Checksum") and name[8:].isupper()}
            return {"PartNumber": number, "ETag": answer["ETag"], **sums}

        return retrying(request, uri, "written")

    upload_id = retrying(lambda: client().create_multipart_upload(**at, Metadata=metadata), uri, "written")["UploadId"]
    with ThreadPoolExecutor(threads, thread_name_prefix="upload-part") as pool:
        futures = [pool.submit(send, number) for number in range(1, -(-num_bytes // size) + 1)]
        try:
            parts = [future.result() for future in futures]
            _complete(at, upload_id, parts, uri)
        except BaseException:
            for future in futures:
                future.cancel()
            _abort(at, upload_id, uri)
            raise


def _complete(at: dict, upload_id: str, parts: list[dict], uri: str) -> None:
    from botocore.exceptions import ClientError

    md5s = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts if len(part["ETag"].strip('"')) == 32)
    whole = f"{hashlib.md5(md5s, usedforsecurity=False).hexdigest()}-{len(parts)}"  # as S3 makes a whole's ETag

    def request() -> None:
        try:
            client().complete_multipart_upload(**at, UploadId=upload_id, MultipartUpload={"Parts": parts})
        except ClientError as error:
            # An earlier try may have done it, and its answer was lost on the way.
            gone = error.response.get("Error", {}).get("Code") == "NoSuchUpload"
            if not gone or client().head_object(**at)["ETag"].strip('"') != whole:
                raise

    retrying(request, uri, "written")


def _abort(at: dict, upload_id: str, uri: str) -> None:
    """Give up an upload's parts, so that S3 does not keep and charge them; one try: the upload's error matters more."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client().abort_multipart_upload(**at, UploadId=upload_id)
    except (BotoCoreError, ClientError):
        tqdm.write(f"the parts of an upload to {uri} stay in the bucket; a lifecycle rule can remove such", sys.stderr)


def _prove(answer: dict, body: bytes, uri: str) -> None:
    """Hold what S3 says it has against what was sent, where its ETag is an MD5."""
    etag = answer["ETag"].strip('"').lower()
    plain = answer.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in answer
    if plain and len(etag) == 32 and etag != hashlib.md5(body, usedforsecurity=False).hexdigest():
        raise CorruptError(f"{uri} cannot be written: it arrives corrupt; check the network")
