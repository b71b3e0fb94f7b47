"""How the sandbox's processes are started and talk: frames of JSON on a socket.

A frame is four bytes of length (big-endian), then ASCII JSON, written with one call. JSON carries lone surrogates as
escapes, so that any `str` survives; floats are written with `repr`, which is exact.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEADER_BYTES = 4
_LEVELS = 4000  # of arrays and objects: a value of `codec.MAX_DEPTH` levels takes a few for each
_MAX_DIGITS = 640  # the least that can be set; longer integers travel in hexadecimal, which takes linear time to read
_STOP_SECONDS = 5.0
_to_json = json.JSONEncoder(separators=(",", ":")).encode
_BOOTSTRAP = """
import json, socket, sys, types
for name, folders in (("wmtp", []), ("wmtp.sandbox", [{folder!r}])):
    sys.modules[name] = types.ModuleType(name)  # neither __init__ is run: they import what is not needed here
    sys.modules[name].__path__ = folders
from wmtp.sandbox.{module} import main
settings = json.loads(sys.argv[1])
main(socket.socket(fileno=settings["connection"]), settings)
"""


@contextmanager
def room(levels: int) -> Iterator[None]:
    """Allows that many more levels of recursion than elsewhere."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + levels)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def frame(message: object) -> bytes:
    """Returns `message` as one frame."""
    with room(_LEVELS):
        payload = _to_json(message).encode("ascii")
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def parse(payload: bytes) -> object:
    """Returns what a frame of unknown origin holds; raises ValueError, RecursionError or MemoryError."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(_MAX_DIGITS)
    try:
        with room(_LEVELS):
            return json.loads(payload)
    finally:
        sys.set_int_max_str_digits(digits)


def send(connection: socket.socket, message: object) -> None:
    """Writes one frame to a blocking socket."""
    connection.sendall(frame(message))


def receive(connection: socket.socket, start: bytes = b"") -> Any:
    """Reads one frame from a trusted peer, whose first bytes may be there already; None at the end of the stream."""
    rest = _read_exactly(connection, HEADER_BYTES - len(start))
    payload = None if rest is None else _read_exactly(connection, int.from_bytes(start + rest, "big"))
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


class Started:
    """An interpreter that runs `wmtp.sandbox.<module>.main`, and our end of its `connection`.

    It imports nothing else of the library, inherits `descriptors`, and has no environment of the caller's but two
    variables, which say where to find and what to keep. Its command line comes behind that of `prefix`.
    """

    def __init__(
        self,
        module: str,
        settings: dict,
        *,
        descriptors: tuple[int, ...] = (),
        prefix: tuple[str, ...] = (),
        stderr: int = subprocess.DEVNULL,
        new_session: bool = False,
    ) -> None:
        environment = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the order of a set must not change a verdict from run to run
            "MALLOC_ARENA_MAX": "1",  # each further arena would reserve 64 MiB of the address space allowed
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
        }
        passed_on = ("LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
        environment |= {name: os.environ[name] for name in passed_on if name in os.environ}
        code = _BOOTSTRAP.format(folder=os.path.dirname(os.path.realpath(__file__)), module=module)
        self.connection, theirs = socket.socketpair()
        with theirs:
            arguments = json.dumps({**settings, "connection": theirs.fileno()})
            # -P and -s with an environment of our own isolate like -I, which would also ignore PYTHONHASHSEED.
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-P", "-s", "-c", code, arguments],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), *descriptors),
                stderr=stderr,
                start_new_session=new_session,
            )

    def first_report(self, seconds: float) -> dict:
        """Returns what it says of itself, or `{"error": why it says nothing}` once it is killed or gone."""
        self.connection.settimeout(seconds)
        try:
            report = receive(self.connection)
        except OSError as error:
            self.process.kill()
            report = {"error": f"no answer: {error}"}
        self.connection.settimeout(None)
        return {"error": "it ended"} if report is None else report

    def stop(self) -> None:
        """Waits a little for it, which was told to end, then kills it."""
        try:
            self.process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.connection.close()
