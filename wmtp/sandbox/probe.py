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

from wmtp.sandbox import namespaces, syscalls
from wmtp.sandbox.confine import Confinement
from wmtp.sandbox.jobs import Limits
from wmtp.sandbox.usage import UNTOUCHED_BYTES, PrivateMap, ResidentMemory

_PROBE_LIMITS = asdict(Limits(memory_bytes=256 << 20, file_bytes=1 << 20, threads=8))


def report(full: Confinement, scratch: str, watch: ResidentMemory | None, spaces: str, settings: dict) -> dict:
    """Tries every layer alone and then all together; takes out of `full` what does not hold.

    Args:
        full: what is to confine programs.
        scratch: the folder that they may write to.
        watch: reads the memory that they hold.
        spaces: kinds of namespaces that this process is in.
        settings: of the zygote.

    Returns:
        `layers`, `missing` (with reasons) and `floor`: whether seccomp, rlimits, and one of Landlock, a mount namespace
        and bubblewrap hold.
    """
    layers: list[str] = []
    missing: list[str] = []

    def found(name: str, problems: list[str]) -> bool:
        (missing if problems else layers).append(f"{name}: {'; '.join(problems)}" if problems else name)
        return not problems

    def holds(name: str, check: Callable[[], list[str]], **layer: Any) -> bool:
        return found(name, _try(Confinement(warm_bytes=full.warm_bytes, **layer), scratch, check))

    outside, wrapped = settings["outside"], settings["wrapped"]
    if full.ruleset is not None:
        abi = full.ruleset.abi
        fenced = namespaces.FENCED if (spaces or wrapped) and os.path.exists(namespaces.FENCED) else outside
        check = functools.partial(_landlock_problems, fenced, abi)
        if not holds(f"landlock ABI {abi}", check, ruleset=full.ruleset):
            full.ruleset = None
    if full.filter is not None and not holds("seccomp", _seccomp_problems, filter=full.filter):
        full.filter = None
    full.limit_resources = full.limit_resources and holds("rlimits", _rlimit_problems, limit_resources=True)
    if full.limit_resources and full.limit_tasks:
        full.limit_tasks = holds("thread limit", _task_limit_problems, limit_resources=True, limit_tasks=True)
    elif full.limit_resources:
        missing.append("thread limit: RLIMIT_NPROC would count processes that are not the program's")
    if watch is not None:
        check = functools.partial(_memory_problems, watch)
        full.watch_memory = holds("resident memory", check, limit_resources=True, watch_memory=True)
    if syscalls.SUPPORTED:
        holds("no_new_privs and no capabilities", _privilege_problems)
    apart = bool(spaces or wrapped) and found(
        f"namespaces {spaces}" if spaces else "bubblewrap", _isolation_problems(outside, spaces)
    )
    bounded = os.statvfs(scratch)
    too_large = bounded.f_blocks * bounded.f_frsize > 1 << 30
    unbounded = ["no tmpfs could be mounted; only single files are bounded"] if too_large else []
    found("scratch folder of bounded size", unbounded)
    problems = _try(full, scratch, _working_problems)
    if problems:
        missing.append(f"all layers together: {'; '.join(problems)}")
    fenced_in = full.filter is not None and (full.ruleset is not None or apart)
    return {"layers": layers, "missing": missing, "floor": fenced_in and full.limit_resources and not problems}


def _try(confinement: Confinement, scratch: str, check: Callable[[], list[str]]) -> list[str]:
    """Returns the problems found by `check` in a child under `confinement`; none where the layer holds."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(scratch)
            try:
                confinement.apply(_PROBE_LIMITS)
                problems = check()
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            os.write(writer, json.dumps(problems).encode("ascii"))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(data) if data else [f"the probe died with status {status}"]


@contextmanager
def _refused(problems: list[str], what: str, error: type[Exception] = PermissionError) -> Iterator[None]:
    try:
        yield
    except error:
        return
    except OSError as other:
        problems.append(f"{what} failed in an unexpected way ({other})")
        return
    problems.append(f"{what} was possible")


def _landlock_problems(fenced: str, abi: int) -> list[str]:
    problems: list[str] = []
    with _refused(problems, "reading a file outside"), open(fenced):
        pass
    with _refused(problems, "listing /"):
        os.listdir("/")
    with open(os.__file__), open("landlock-probe", "w"):
        os.remove("landlock-probe")
    if abi >= 4:
        with _refused(problems, "connecting to a TCP port"), socket.socket() as client:
            client.connect(("127.0.0.1", 9))
    if abi >= 6:
        with _refused(problems, "a signal to the outside"):
            os.kill(os.getppid(), 0)
    return problems


def _seccomp_problems() -> list[str]:
    problems: list[str] = []
    with _refused(problems, "fork"):
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    with _refused(problems, "execve"):
        os.execv(sys.executable, [sys.executable, "-c", ""])
    with _refused(problems, "a socket"):
        socket.socket().close()
    with _refused(problems, "a signal to the outside"):
        os.kill(os.getppid(), 0)
    with _refused(problems, "chmod"):
        os.chmod(".", 0o700)
    _start_threads(1)
    return problems


def _rlimit_problems() -> list[str]:
    problems: list[str] = []
    with _refused(problems, "memory beyond the limit", MemoryError):
        bytearray(2 * _PROBE_LIMITS["memory_bytes"])
    with open("rlimit-probe", "wb") as file:
        with _refused(problems, "a file beyond the limit", OSError):
            file.truncate(_PROBE_LIMITS["file_bytes"] + 1)
        os.remove("rlimit-probe")
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if soft != hard or soft == resource.RLIM_INFINITY:
        problems.append(f"the CPU limit is {soft}, {hard}")
    return problems


def _memory_problems(watch: ResidentMemory) -> list[str]:
    size = _PROBE_LIMITS["memory_bytes"] // 8
    reader, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        held = bytearray(b"x" * size), PrivateMap(-1, size)
        held[1][::4096] = b"x" * len(range(0, size, 4096))
        os.write(writer, b"x")
        signal.pause()
    os.close(writer)
    os.read(reader, 1)
    more = watch.of(os.pidfd_open(holder)) - watch.own()
    os.kill(holder, signal.SIGKILL)
    os.wait()
    problems = [] if 2 * size <= more <= 3 * size else [f"{2 * size} bytes were taken, {more} are seen"]
    with _refused(problems, "memory beyond any limit", MemoryError):
        bytearray(_PROBE_LIMITS["memory_bytes"] + 2 * UNTOUCHED_BYTES)
    return problems


def _task_limit_problems() -> list[str]:
    problems: list[str] = []
    _start_threads(_PROBE_LIMITS["threads"])
    with _refused(problems, "starting twice the threads allowed", RuntimeError):
        _start_threads(2 * _PROBE_LIMITS["threads"])
    return problems


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


def _privilege_problems() -> list[str]:
    problems: list[str] = []
    with _refused(problems, "chroot"):
        os.chroot(".")
    return problems


def _isolation_problems(outside: str, spaces: str) -> list[str]:
    signs = {
        "a file outside is visible": os.path.exists(outside),
        "other processes are visible": bool(spaces) and os.getpid() != 1,
        "a network is visible": any(name != "lo" for _, name in socket.if_nameindex()),
    }
    return [problem for problem, seen in signs.items() if seen]


def _working_problems() -> list[str]:
    """Returns none: what honest programs need raises where it does not work under all layers."""
    _start_threads(1)
    for end in socket.socketpair():
        end.close()
    with open("probe", "w"):
        os.remove("probe")
    return []
