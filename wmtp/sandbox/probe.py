"""Which protections really hold here: each is tried in a throw-away child, never inferred from a version number."""

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
from typing import TYPE_CHECKING

from wmtp.sandbox import namespaces, syscalls
from wmtp.sandbox.confine import Confinement
from wmtp.sandbox.jobs import Limits
from wmtp.sandbox.memory import UNTOUCHED_BYTES, PrivateMap, ResidentMemory

if TYPE_CHECKING:
    from wmtp.sandbox.zygote import Zygote

_PROBE_LIMITS = asdict(Limits(memory_bytes=256 << 20, file_bytes=1 << 20, threads=8))


def report(zygote: "Zygote", spaces: str, settings: dict, missing: list[str]) -> dict:
    """Try every layer alone and then all together; take out of `zygote.confinement` what does not hold.

    Returns:
        `layers`, `missing` (with reasons) and `floor`: whether seccomp, rlimits, and one of Landlock, a mount namespace
        and bubblewrap hold.
    """
    full = zygote.confinement
    layers: list[str] = []

    def holds(name: str, confinement: Confinement, check: Callable[[], list[str]]) -> bool:
        problems = _try(confinement, zygote.scratch, check)
        if problems:
            missing.append(f"{name}: {'; '.join(problems)}")
        else:
            layers.append(name)
        return not problems

    def alone(ruleset=None, filter=None, limit_resources=False, limit_tasks=False, watch_memory=False) -> Confinement:
        return Confinement(ruleset, filter, limit_resources, full.warm_bytes, limit_tasks, watch_memory)

    outside = settings["outside"]
    if full.ruleset is not None:
        fenced = namespaces.FENCED if spaces or settings["wrapped"] else outside
        fenced = fenced if os.path.exists(fenced) else outside
        name, abi = f"landlock ABI {full.ruleset.abi}", full.ruleset.abi
        if not holds(name, alone(ruleset=full.ruleset), lambda: _landlock_problems(fenced, abi)):
            full.ruleset = None
    if full.filter is not None and not holds("seccomp", alone(filter=full.filter), _seccomp_problems):
        full.filter = None
    rlimits = full.limit_resources and holds("rlimits", alone(limit_resources=True), _rlimit_problems)
    full.limit_resources = rlimits
    if rlimits and full.limit_tasks:
        full.limit_tasks = holds("thread limit", alone(limit_resources=True, limit_tasks=True), _task_limit_problems)
    elif rlimits:
        missing.append("thread limit: RLIMIT_NPROC would count processes that are not the program's")
    if full.watch_memory:
        watched = alone(limit_resources=True, watch_memory=True)
        full.watch_memory = holds("resident memory", watched, lambda: _memory_problems(zygote.memory))
    if syscalls.SUPPORTED:
        holds("no_new_privs and no capabilities", alone(), _privilege_problems)
    apart = False
    if spaces or settings["wrapped"]:
        problems = _isolation_problems(outside, spaces)
        apart = not problems
        name = f"namespaces {spaces}" if spaces else "bubblewrap"
        (layers if apart else missing).append(name if apart else f"{name}: {'; '.join(problems)}")
    bounded = os.statvfs(zygote.scratch)
    if bounded.f_blocks * bounded.f_frsize <= 1 << 30:
        layers.append("scratch folder of bounded size")
    else:
        missing.append("scratch folder of bounded size: no tmpfs could be mounted; only single files are bounded")
    problems = _try(full, zygote.scratch, _working_problems)
    if problems:
        missing.append(f"all layers together: {'; '.join(problems)}")
    floor = full.filter is not None and (full.ruleset is not None or apart) and rlimits and not problems
    return {"layers": layers, "missing": missing, "floor": floor}


def _try(confinement: Confinement, scratch: str, check: Callable[[], list[str]]) -> list[str]:
    """Problems found by `check` in a child under `confinement`; empty where the layer holds."""
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
def _refused(problems: list[str], what: str, error: type[OSError] = PermissionError) -> Iterator[None]:
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
    try:
        bytearray(2 * _PROBE_LIMITS["memory_bytes"])
        problems.append("memory beyond the limit could be had")
    except MemoryError:
        pass
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
    try:
        bytearray(_PROBE_LIMITS["memory_bytes"] + 2 * UNTOUCHED_BYTES)
        problems.append("memory beyond any limit could be had")
    except MemoryError:
        pass
    return problems


def _task_limit_problems() -> list[str]:
    limit = _PROBE_LIMITS["threads"]
    try:
        _start_threads(limit)
    except RuntimeError as error:
        return [f"{limit} threads are allowed, but: {error}"]
    try:
        _start_threads(2 * limit)
    except RuntimeError:
        return []
    return [f"twice the {limit} threads allowed could be started"]


def _start_threads(count: int) -> None:
    """Run `count` threads at once; raises RuntimeError where the system refuses one."""
    release = threading.Event()
    threads = [threading.Thread(target=release.wait) for _ in range(count)]
    started = []
    try:
        for thread in threads:
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
    problems = []
    if os.path.exists(outside):
        problems.append("a file outside is visible")
    if spaces and os.getpid() != 1:
        problems.append("other processes are visible")
    if [name for _, name in socket.if_nameindex() if name != "lo"]:
        problems.append("a network is visible")
    return problems


def _working_problems() -> list[str]:
    """What honest programs need must still work under all layers."""
    _start_threads(1)
    left, right = socket.socketpair()
    left.close()
    right.close()
    with open("probe", "w"):
        os.remove("probe")
    return []
