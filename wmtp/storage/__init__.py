"""Paths that may be local or `s3://`: what a run reads is mirrored into a cache, what it writes is uploaded."""

from wmtp.storage.mirror import check_inputs, local_copy
from wmtp.storage.output import Output
from wmtp.storage.s3 import StorageError, is_remote

__all__ = ["Output", "StorageError", "check_inputs", "is_remote", "local_copy"]
