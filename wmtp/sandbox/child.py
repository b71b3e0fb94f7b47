"""What runs in the forked, confined process: the model's program, and a loop that answers the judge's requests.

Nothing here is trusted once the program has started: the program may change any of it. All it can reach that way
is its own answers.
"""

import atexit
import fcntl
import gc
import io
import mmap
import os
import random
import resource
import socket
import sys
import threading
import weakref

from wmtp.sandbox import usage, wire
from wmtp.sandbox.confine import Confinement
from wmtp.sandbox.server import Server, execute, new_module, text_of

CHANNEL = 3  # the only descriptor beside stdin, stdout and stderr
_END = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16)  # of the zygote's descriptors
_ABOVE = 64  # descriptors are moved up there first, so that none is overwritten while they are put in place
MAX_DETAIL = 500


def run(confinement: Confinement, request: dict, descriptors: list[int], scratch: str) -> None:
    """Confines this process and runs what the judge sends in the folder `scratch`; never returns.

    Args:
        descriptors: channel, stdout, stderr and, for what runs as a program rather than serve requests, stdin.
    """
    try:
        channel = _arrange(descriptors)
        os.chdir(scratch)
        os.umask(0o077)
        limits = request["limits"]
        try:
            confinement.apply(limits)
        except (OSError, ValueError) as error:
            wire.send(channel, {"fatal": f"confinement failed: {error}"})
            os._exit(71)
        os.closerange(CHANNEL + 1, _END)
        random.seed(0)  # what cannot be done before the fork: the same random numbers in every run
        wire.send(channel, {"ready": usage.usage_of(resource.getrusage(resource.RUSAGE_SELF))})
        if len(descriptors) == 3:
            Server(channel, limits["output_bytes"]).serve()
        elif (message := wire.receive(channel)) is not None:
            _run_main(channel, message["program"])
    except BaseException:
        os._exit(70)
    os._exit(0)


def _arrange(descriptors: list[int]) -> socket.socket:
    os.setsid()
    if len(descriptors) == 3:
        descriptors = [*descriptors, os.open(os.devnull, os.O_RDONLY)]
    channel, stdout, stderr, stdin = (fcntl.fcntl(number, fcntl.F_DUPFD, _ABOVE) for number in descriptors)
    for target, source in enumerate((stdin, stdout, stderr, channel)):
        os.dup2(source, target, inheritable=target < CHANNEL)
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, CHANNEL)


def prepare_interpreter() -> None:
    """Gives the zygote streams that fit the descriptors a child will get, and integers without a limit on digits.

    A stream asks its descriptor at once whether it can seek, so stdin and stdout must already be what they will be.
    """
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)
    sys.stdin = sys.__stdin__ = _text(0, "r")
    sys.stdout = sys.__stdout__ = _text(1, "w")
    sys.stderr = sys.__stderr__ = _text(2, "w", errors="backslashreplace")
    sys.set_int_max_str_digits(0)
    mmap.mmap = usage.PrivateMap
    sys.argv = ["program.py"]
    sys.dont_write_bytecode = True  # the library's own files have been, by now; what a program imports stays as it was


def _text(number: int, mode: str, errors: str = "surrogateescape") -> io.TextIOWrapper:
    raw = io.FileIO(number, mode, closefd=False)
    buffered = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    stream = io.TextIOWrapper(buffered, encoding="utf-8", errors=errors, line_buffering=number == 2)
    stream.mode, raw.name = mode, ("<stdin>", "<stdout>", "<stderr>")[number]
    return stream


def _run_main(channel: socket.socket, program: str) -> None:
    """Runs the program as `__main__`, lets it end as the interpreter would, and says whether it raised."""
    failure = None
    try:
        execute(program, "program.py", new_module("__main__").__dict__)
    except SystemExit as stop:
        if stop.code is not None and stop.code != 0:
            failure = _describe(stop)
    except BaseException as error:
        failure = _describe(error)
    try:
        threading._shutdown()  # waits for threads that are no daemons
        atexit._run_exitfuncs()  # contest templates write their output here
        _flush(sys.stdout)  # or put their own stream in its place
        sys.stdout = sys.__stdout__
        _drop_main_module()  # or rely on its finalizer
        _flush(sys.stdout)
    except BaseException as error:
        failure = failure or _describe(error)
    wire.send(channel, {"raised": failure})


def _flush(stream: io.TextIOBase | None) -> None:
    if stream is not None and not getattr(stream, "closed", False):
        stream.flush()


def _drop_main_module() -> None:
    """Lets go of `__main__` in the interpreter's order: finalizers run while the globals are whole, if they can."""
    module = weakref.ref(sys.modules.pop("__main__"))
    gc.collect()
    if module() is not None:
        names = module().__dict__
        for private in (True, False):
            for name in list(names):
                if name != "__builtins__" and private == (name[:1] == "_" and name[1:2] != "_"):
                    names[name] = None


def _describe(error: BaseException) -> dict:
    """Returns an exception as a line of text, and whether it says that there was no memory."""
    text = f"{type(error).__name__}: {text_of(error)}".removesuffix(": ")
    return {"text": text[:MAX_DETAIL], "refused_memory": usage.is_refused_memory(error)}
