"""Frames of JSON on a byte stream: four bytes of length (big-endian), then ASCII JSON, written with one call.

JSON carries lone surrogates as escapes, so that any `str` survives; floats are written with `repr`, which is exact.
"""

import json
import socket

HEADER_BYTES = 4


def frame(message: object) -> bytes:
    """`message` as one frame."""
    payload = json.dumps(message, separators=(",", ":")).encode("ascii")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


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
    return None if payload is None else json.loads(payload)


def _read_exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
