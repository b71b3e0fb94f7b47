"""Frames of JSON on a byte stream: four bytes of length (big-endian), then ASCII JSON, written with one call.

JSON carries lone surrogates as escapes, so that any `str` survives; floats are written with `repr`, which is exact.
"""

import json
import socket
import sys
from types import TracebackType

HEADER_BYTES = 4
_LEVELS = 4000  # of arrays and objects: a value of `codec.MAX_DEPTH` levels takes a few for each
_MAX_DIGITS = 640  # the least that can be set; longer integers travel in hexadecimal, which takes linear time to read


class room:
    """Context in which that many more levels of recursion are allowed than elsewhere."""

    def __init__(self, levels: int) -> None:
        self._levels = levels

    def __enter__(self) -> None:
        self._limit = sys.getrecursionlimit()
        sys.setrecursionlimit(self._limit + self._levels)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.setrecursionlimit(self._limit)


def frame(message: object) -> bytes:
    """`message` as one frame."""
    with room(_LEVELS):
        payload = json.dumps(message, separators=(",", ":")).encode("ascii")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def parse(payload: bytes) -> object:
    """What a frame of unknown origin holds; raises ValueError, RecursionError or MemoryError."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(_MAX_DIGITS)
    try:
        with room(_LEVELS):
            return json.loads(payload)
    finally:
        sys.set_int_max_str_digits(digits)


def send(connection: socket.socket, message: object) -> None:
    """Write one frame to a blocking socket."""
    connection.sendall(frame(message))


def receive(connection: socket.socket, start: bytes = b"") -> object | None:
    """Read one frame from a blocking socket; None at the end of the stream. For trusted peers: no bound on size.

    Args:
        start: bytes of the header that were already read.
    """
    rest = _read_exactly(connection, HEADER_BYTES - len(start))
    if rest is None:
        return None
    payload = _read_exactly(connection, int.from_bytes(start + rest, "big"))
    if payload is None:
        return None
    with room(_LEVELS):
        return json.loads(payload)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
