"""What is known of a path in S3 without asking S3."""

from pathlib import Path

from wmtp.errors import UserError

SCHEME = "s3://"


class StorageError(UserError):
    """What S3 refused or could not do: one line with the URI, the reason and the way out, and never a credential."""


def is_remote(path: str | Path) -> bool:
    """Whether a path names an object or a folder in S3: ``s3://bucket/key``."""
    return str(path).startswith(SCHEME)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key, the key without slashes around it.

    Raises:
        StorageError: not ``s3://bucket/key``.
    """
    bucket, _, key = str(uri).removeprefix(SCHEME).partition("/")
    if not is_remote(uri) or not bucket or not key.strip("/"):
        raise StorageError(f"{uri} must be s3://bucket/key")
    return bucket, key.strip("/")
