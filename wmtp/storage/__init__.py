"""Paths that may be local or `s3://`: what a run reads is mirrored into a cache, what it writes is uploaded."""

from wmtp.storage.mirror import local_copy
from wmtp.storage.output import Output, open_output
from wmtp.storage.s3 import StorageError, is_remote

__all__ = ["Output", "StorageError", "is_remote", "local_copy", "open_output"]
