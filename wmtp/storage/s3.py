"""Requests to S3 through boto3: one client per process, retries with back-off, errors as one line without a secret."""

import os
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

from wmtp.errors import disk_fault
from wmtp.storage.names import SCHEME, StorageError, split_uri

PART_BYTES = 16 << 20  # of a request: large against its overhead, little to lose when a connection breaks
THREADS = 8  # concurrent requests
_KEYS_PER_LISTING = 1000  # as many as S3 gives
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 15.0  # seconds before the second try, doubled before each further one
_DENIED = {"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
           "AllAccessDisabled", "AccountProblem", "InvalidClientTokenId"}  # fmt: skip
_ABSENT, _CHANGED = {"404", "NoSuchKey", "NotFound"}, {"412", "PreconditionFailed"}
_T = TypeVar("_T")


class ChangedError(StorageError):
    """An object was written again while it was being read."""


class CorruptError(StorageError):
    """The content that arrived is not the content that was sent."""


@dataclass(frozen=True)
class RemoteFile:
    """An object of a listing."""

    bucket: str
    key: str
    etag: str
    num_bytes: int

    @property
    def uri(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"


def endpoint_url() -> str | None:
    """Returns the URL of S3: from boto's own variables first, then from MLflow's; None is AWS."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def client():
    """Returns this process's S3 client, for the endpoint and the credentials of its environment."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION")
    return _client(os.getpid(), endpoint_url(), tuple(hash(os.environ.get(name)) for name in names))


@lru_cache(maxsize=4)
def _client(pid: int, endpoint: str | None, identity: tuple[int, ...]):
    import boto3
    from botocore.config import Config

    # A custom endpoint seldom has a name per bucket.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts()},
        max_pool_connections=4 * THREADS,
        connect_timeout=10,
        read_timeout=60,
        # Over https a body is not signed by default; without it would be, for a proof that the ETag gives anyway.
        s3={"addressing_style": "path" if endpoint else "auto", "payload_signing_enabled": False},
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=endpoint, config=config)
    except ValueError:
        raise StorageError("AWS_ENDPOINT_URL is no URL; give http://host:port or https://host") from None


def attempts() -> int:
    """Returns how often a request is tried: ``$AWS_MAX_ATTEMPTS``, or 8, which is about half a minute."""
    return max(1, int(os.environ.get("AWS_MAX_ATTEMPTS") or 8))


def retrying(call: Callable[[], _T], uri: str, doing: str) -> _T:
    """Returns ``call()``, tried again with growing waits if a broken answer arrived; botocore retries other failures.

    The StorageError of the last failure says that `uri` cannot be `doing`, such as read.
    """
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    broken = (CorruptError, boto.FlexibleChecksumError, boto.IncompleteReadError, boto.ResponseStreamingError)
    for attempt in range(attempts()):
        try:
            return call()
        except (boto.BotoCoreError, boto.ClientError, ResponseParserError, CorruptError, OSError) as error:
            if not isinstance(error, (*broken, ResponseParserError)) or attempt + 1 == attempts():
                raise _explained(error, uri, doing) from None  # the chain would carry URLs and headers
            time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
    raise AssertionError("unreachable")


def _explained(error: Exception, uri: str, doing: str) -> StorageError:
    """Returns an error of boto3 as one line, built from its code: its own text may quote a request."""
    from botocore import exceptions as boto

    if isinstance(error, StorageError):
        return error
    bucket, code, kind = split_uri(uri)[0], "", StorageError
    if isinstance(error, boto.ClientError):
        code = error_code(error)
        why = f"{where()} answers {code}"
    elif isinstance(error, OSError):
        why = disk_fault(error) or error.strerror or type(error).__name__
    elif isinstance(error, boto.ParamValidationError):
        why = f"{bucket} is no name of a bucket"
    elif isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        why = (
            "no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where the "
            "machine has a role"
        )
    else:
        name = type(error).__name__
        why = f"{where()} does not answer as it should ({name}); check AWS_ENDPOINT_URL and the network"
    if code in _DENIED:
        why = (
            f"{where()} refuses it ({code}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN) "
            f"of somebody who may use bucket {bucket}"
        )
    elif code == "NoSuchBucket":
        why = f"{where()} has no bucket {bucket}; make it, or check AWS_ENDPOINT_URL"
    elif code in _ABSENT:  # removed: it was listed before
        why, kind = f"it does not exist at {where()}", ChangedError
    elif code in _CHANGED:
        why, kind = "it was written again while it was being read", ChangedError
    return kind(f"{uri} cannot be {doing}: {why}")


def where() -> str:
    """Returns the endpoint for messages: host and port only, since a URL may contain a password."""
    endpoint = endpoint_url()
    parts = urllib.parse.urlsplit(endpoint) if endpoint else None
    return "AWS S3" if parts is None else f"S3 at {parts.hostname}" + (f":{parts.port}" if parts.port else "")


def list_files(uri: str, *, prefix: str | None = None) -> Iterator[RemoteFile]:
    """Yields the objects of a folder in the order of their keys; ``prefix`` replaces the URI's own key and slash."""
    bucket, key = split_uri(uri)
    options: dict[str, Any] = {"Bucket": bucket, "MaxKeys": _KEYS_PER_LISTING}
    options["Prefix"] = f"{key}/" if prefix is None else prefix
    more = True
    while more:
        files, more = _page(uri, **options)
        for file in files:
            options["StartAfter"] = file.key  # safer than a continuation token, which may arrive corrupt
            if not file.key.endswith("/"):  # a console marks an empty folder so
                yield file


def _page(uri: str, **options: Any) -> tuple[list[RemoteFile], bool]:
    """Returns one page of a listing, and whether there are more.

    A listing has no hash to verify. A byte that changes on the way could end it early or rename an object, and then
    files are not fetched or wrong ones are removed. So two listings in a row must agree.
    """

    def ask() -> tuple[list[RemoteFile], bool]:
        said = []
        for _ in range(2):
            page = client().list_objects_v2(**options)
            items = page.get("Contents", [])
            files = [RemoteFile(options["Bucket"], item["Key"], item["ETag"], item["Size"]) for item in items]
            said.append((files, bool(files) and bool(page.get("IsTruncated"))))
        if said[0] != said[1]:
            raise CorruptError(f"{uri} cannot be read: no two listings in a row agree; wait until nobody writes there")
        return said[0]

    return retrying(ask, uri, "read")


def find_files(uri: str) -> list[RemoteFile]:
    """Returns the object that a URI names, or else the objects of the folder that it names, or an empty list.

    It lists instead of sending a HEAD, whose refusal does not give a reason.
    """
    bucket, key = split_uri(uri)
    first, _ = _page(uri, Bucket=bucket, Prefix=key, MaxKeys=1)
    if [file.key for file in first] == [key] and not str(uri).endswith("/"):
        return first
    return sorted(list_files(uri), key=lambda file: file.key) if first else []


def remove(uri: str) -> None:
    """Removes the object of a URI, if there is one."""
    remove_files([RemoteFile(*split_uri(uri), "", 0)])


def remove_files(files: list[RemoteFile]) -> None:
    """Removes objects, manifests first, so that a folder that is partly removed does not look complete."""
    for file in sorted(files, key=lambda file: not file.key.endswith("/manifest.json")):
        retrying(partial(client().delete_object, Bucket=file.bucket, Key=file.key), file.uri, "removed")


def error_code(error) -> str:
    """Returns the code of a `ClientError`, such as ``NoSuchKey``."""
    return str(error.response.get("Error", {}).get("Code", "an error"))
