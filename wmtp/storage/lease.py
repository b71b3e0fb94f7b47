"""The lease that lets one run at a time write a folder in S3."""

import hashlib
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from weakref import finalize, ref

from tqdm import tqdm

from wmtp.storage.lock import NAME, Holder, holder_of
from wmtp.storage.names import StorageError, split_uri
from wmtp.storage.s3 import ChangedError, CorruptError, client, error_code, remove, retrying
from wmtp.storage.transfer import put_bytes

_HEARTBEAT, _EXPIRY = 15.0, 60.0  # seconds between renewals, and after which an unrenewed lease is free


class Lease:
    """The right to write a folder in S3: an object that names the holder and is rewritten while the holder lives.

    Another machine's lease is free once it has not changed for a minute, by this machine's clock. That of `previous`,
    the id of a holder that is known to have ended, is free at once.
    """

    def __init__(self, uri: str, holder: Holder, previous: str | None) -> None:
        self._uri, self._folder = f"{uri}/{NAME}", uri
        self._holder, self._previous = holder, previous
        self._beats = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        finalize(self, self._end.set)  # a lease that was garbage-collected is not renewed

    def take(self) -> None:
        """Makes this process the writer until :meth:`release`, unless a run on another machine writes there."""
        seen, since = None, time.monotonic()
        while True:
            etag, there = self._there()
            if there is None:
                self._write(IfNoneMatch="*")
            elif there.id in (self._holder.id, self._previous) or (etag == seen and time.monotonic() - since > _EXPIRY):
                self._write(IfMatch=etag or "")
            elif seen is None:
                seen, since = etag, time.monotonic()
                line = f"{self._folder} was last written by {there}; waiting up to {_EXPIRY:.0f} s to see if it lives"
                tqdm.write(line, sys.stderr)
            elif etag != seen:
                raise StorageError(
                    f"output_dir {self._folder} is being written by {there}; end that run, or give another output_dir"
                )
            now = self._there()[1]  # read back: a store that ignores conditions lets the last writer win
            if now is not None and now.id == self._holder.id:
                break
            time.sleep(min(1.0, _HEARTBEAT / 4))
        self._thread = threading.Thread(target=_renew, args=(ref(self), self._end), name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stops the renewals and removes the object, if it is still this process's."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            try:
                if (there := self._there()[1]) is not None and there.id == self._holder.id:
                    remove(self._uri)
            except StorageError as error:
                tqdm.write(f"the lease on {self._folder} ends by itself in a minute: {error}", sys.stderr)

    def renew(self) -> None:
        """Renews the lease. If another process has taken it, this process ends at once."""
        with suppress(StorageError):  # S3 does not answer other processes either; uploads report it
            etag, there = self._there()
            if there is not None and there.id != self._holder.id:
                line = f"error: {self._folder} was taken over by {there}: this run ends, so that not two write there"
                tqdm.write(line, sys.stderr)
                sys.stderr.flush()
                os._exit(1)
            self._write(**({"IfNoneMatch": "*"} if there is None else {"IfMatch": etag}))

    def _write(self, **condition: str) -> None:
        self._beats += 1
        body = json.dumps({**asdict(self._holder), "beat": self._beats}).encode()
        try:
            put_bytes(self._uri, body, **condition)
        except ChangedError:
            pass  # another process was faster, or an answer got lost: reading the object tells
        except StorageError as error:
            if "NotImplemented" not in str(error):  # the store knows no conditions
                raise
            put_bytes(self._uri, body)

    def _there(self) -> tuple[str | None, Holder | None]:
        """Returns ETag and holder of the current lease, or None for both."""
        bucket, key = split_uri(self._uri)

        def read() -> tuple[str | None, Holder | None]:
            from botocore.exceptions import ClientError

            try:
                answer = client().get_object(Bucket=bucket, Key=key)
                body = answer["Body"].read()
                if answer["Metadata"].get("sha256", "") != hashlib.sha256(body).hexdigest():
                    raise CorruptError(f"{self._uri} cannot be read: it arrives corrupt; check the network")
                return answer["ETag"], holder_of(body)
            except ClientError as error:
                if error_code(error) in ("NoSuchKey", "404"):
                    return None, None
                raise

        return retrying(read, self._uri, "read")


def _renew(lease: "ref[Lease]", end: threading.Event) -> None:
    while not end.wait(_HEARTBEAT):
        if (held := lease()) is not None:
            held.renew()
        del held
