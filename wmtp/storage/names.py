"""Paths in S3 as text, without a request."""

from pathlib import Path

from wmtp.errors import UserError

SCHEME = "s3://"


class StorageError(UserError):
    """A request that S3 refused or could not do: one line with URI, reason and way out, and never a credential."""


def is_remote(path: str | Path) -> bool:
    """Returns whether a path names an object or a folder in S3: ``s3://bucket/key``."""
    return str(path).startswith(SCHEME)


def split_uri(uri: str) -> tuple[str, str]:
    """Returns bucket and key of ``s3://bucket/key``, the key without slashes around it; refuses any other form."""
    bucket, _, key = str(uri).removeprefix(SCHEME).partition("/")
    if not is_remote(uri) or not bucket or not key.strip("/"):
        raise StorageError(f"{uri} must be s3://bucket/key")
    return bucket, key.strip("/")
