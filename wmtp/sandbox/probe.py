"""Which protections really hold here: each is tried in a throw-away child, never inferred from a version number."""

import functools
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from wmtp.sandbox import namespaces
from wmtp.sandbox.confine import Confinement
from wmtp.sandbox.jobs import Limits
from wmtp.sandbox.usage import UNTOUCHED_BYTES, PrivateMap, ResidentMemory

_LIMITS = asdict(Limits(memory_bytes=256 << 20, file_bytes=1 << 20, threads=8))


class Hole(Exception):
    """What a protection should have kept from happening."""


def report(full: Confinement, scratch: str, watch: ResidentMemory | None, spaces: str, settings: dict) -> dict:
    """Tries every layer alone and then all together; takes out of `full` what does not hold.

    Args:
        spaces: kinds of namespaces that this process is in.
        settings: of the zygote.

    Returns:
        `layers`, `missing` (with reasons) and `floor`: whether seccomp, rlimits, and one of Landlock, a mount namespace
        and bubblewrap hold.
    """
    layers: list[str] = []
    missing: list[str] = []

    def found(name: str, problem: str) -> bool:
        (missing if problem else layers).append(f"{name}: {problem}" if problem else name)
        return not problem

    def holds(name: str, check: Callable[[], None], **layer: Any) -> bool:
        return found(name, try_out(Confinement(warm_bytes=full.warm_bytes, **layer), scratch, check))

    outside, wrapped = settings["outside"], settings["wrapped"]
    if full.ruleset is not None:
        abi = full.ruleset.abi
        fenced = namespaces.FENCED if (spaces or wrapped) and os.path.exists(namespaces.FENCED) else outside
        if not holds(f"landlock ABI {abi}", functools.partial(_landlock, fenced, abi), ruleset=full.ruleset):
            full.ruleset = None
    if full.filter is not None and not holds("seccomp", _seccomp, filter=full.filter):
        full.filter = None
    full.limit_resources = full.limit_resources and holds("rlimits", _rlimits, limit_resources=True)
    if full.limit_resources and full.limit_tasks:
        full.limit_tasks = holds("thread limit", _thread_limit, limit_resources=True, limit_tasks=True)
    elif full.limit_resources:
        missing.append("thread limit: RLIMIT_NPROC would count processes that are not the program's")
    if watch is not None:
        check = functools.partial(_resident_memory, watch)
        full.watch_memory = holds("resident memory", check, limit_resources=True, watch_memory=True)
    holds("no_new_privs and no capabilities", _privileges)
    apart = bool(spaces or wrapped) and found(
        f"namespaces {spaces}" if spaces else "bubblewrap", _isolation(outside, spaces)
    )
    bounded = os.statvfs(scratch)
    too_large = bounded.f_blocks * bounded.f_frsize > 1 << 30
    unbounded = "no tmpfs could be mounted; only single files are bounded" if too_large else ""
    found("scratch folder of bounded size", unbounded)
    problem = try_out(full, scratch, _what_honest_programs_need)
    if problem:
        missing.append(f"all layers together: {problem}")
    fenced_in = full.filter is not None and (full.ruleset is not None or apart)
    return {"layers": layers, "missing": missing, "floor": fenced_in and full.limit_resources and not problem}


def try_out(confinement: Confinement, scratch: str, check: Callable[[], None]) -> str:
    """Returns what `check` raises in a child under `confinement`, "" where the layer holds."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        problem = "the probe was broken off"
        try:
            os.chdir(scratch)
            confinement.apply(_LIMITS)
            check()
            problem = ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".removeprefix("Hole: ")
        finally:
            os.write(writer, json.dumps(problem).encode("ascii"))
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(data) if data else f"the probe died with status {status}"


@contextmanager
def _refused(what: str, error: type[Exception] = PermissionError) -> Iterator[None]:
    try:
        yield
    except error:
        return
    except OSError as other:
        raise Hole(f"{what} failed in an unexpected way ({other})") from None
    raise Hole(f"{what} was possible")


def _landlock(fenced: str, abi: int) -> None:
    with _refused("reading a file outside"), open(fenced):
        pass
    with _refused("listing /"):
        os.listdir("/")
    with open(os.__file__), open("landlock-probe", "w"):
        os.remove("landlock-probe")
    if abi >= 4:
        with _refused("connecting to a TCP port"), socket.socket() as client:
            client.connect(("127.0.0.1", 9))
    if abi >= 6:
        with _refused("a signal to the outside"):
            os.kill(os.getppid(), 0)


def _seccomp() -> None:
    with _refused("fork"):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    with _refused("execve"):
        os.execv(sys.executable, [sys.executable, "-c", ""])
    with _refused("a socket"):
        socket.socket().close()
    with _refused("a signal to the outside"):
        os.kill(os.getppid(), 0)
    with _refused("chmod"):
        os.chmod(".", 0o700)
    _start_threads(1)


def _rlimits() -> None:
    with _refused("memory beyond the limit", MemoryError):
        bytearray(2 * _LIMITS["memory_bytes"])
    with open("rlimit-probe", "wb") as file:
        os.remove("rlimit-probe")
        with _refused("a file beyond the limit", OSError):
            file.truncate(_LIMITS["file_bytes"] + 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != hard or soft == resource.RLIM_INFINITY:
        raise Hole(f"the CPU limit is {soft}, {hard}")


def _resident_memory(watch: ResidentMemory) -> None:
    size = _LIMITS["memory_bytes"] // 8
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = bytearray(b"x" * size), PrivateMap(-1, size)
        held[1][::4096] = b"x" * len(range(0, size, 4096))
        os.write(writer, b"x")
        signal.pause()
    os.close(writer)
    os.read(reader, 1)
    try:
        more = watch.of(os.pidfd_open(holder)) - watch.own()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.wait()
    if not 2 * size <= more <= 3 * size:
        raise Hole(f"{2 * size} bytes were taken, {more} are seen")
    with _refused("memory beyond any limit", MemoryError):
        bytearray(_LIMITS["memory_bytes"] + 2 * UNTOUCHED_BYTES)


def _thread_limit() -> None:
    _start_threads(_LIMITS["threads"])
    with _refused("starting twice the threads allowed", RuntimeError):
        _start_threads(2 * _LIMITS["threads"])


def _start_threads(count: int) -> None:
    """Runs `count` threads at once; raises RuntimeError where the system refuses one."""
    release = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=release.wait)
            thread.start()
            started.append(thread)
    finally:
        release.set()
        for thread in started:
            thread.join()


def _privileges() -> None:
    with _refused("chroot"):
        os.chroot(".")


def _isolation(outside: str, spaces: str) -> str:
    """Returns what can be seen that namespaces should hide, asked in the zygote itself."""
    signs = {
        "a file outside is visible": os.path.exists(outside),
        "other processes are visible": bool(spaces) and os.getpid() != 1,
        "a network is visible": any(name != "lo" for _, name in socket.if_nameindex()),
    }
    return "; ".join(sign for sign, seen in signs.items() if seen)


def _what_honest_programs_need() -> None:
    _start_threads(1)
    for end in socket.socketpair():
        end.close()
    with open("probe", "w"):
        os.remove("probe")
