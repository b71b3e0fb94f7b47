"""The zygote: a warm, single-threaded interpreter that forks one confined process per program.

It never sees a program, a test or an expected value: the judge hands it descriptors and limits, the program travels
over a socket between the judge and the forked process. The judge sends a request with the descriptors, and later an
`end`, which kills what still runs; the zygote answers every request with one report of how the process ended.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import time

from wmtp.sandbox import child, confine, filesystem, landlock, memory, namespaces, probe, seccomp, syscalls, wire
from wmtp.sandbox.usage import usage_of

# What programs import most; anything else is imported when a program asks, at its own cost.
_WARM_MODULES = """
    abc array bisect calendar cmath collections collections.abc contextlib copy ctypes dataclasses datetime decimal
    enum fractions functools heapq io itertools json math numbers operator queue random re statistics string
    struct textwrap threading time traceback types typing unicodedata
"""
_MAX_DESCRIPTORS = 4
_POLL_SECONDS = 0.002
_CPUS = os.cpu_count() or 1


def main() -> None:
    """Entry point of the process: settings as JSON in argv[1]."""
    settings = json.loads(sys.argv[1])
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, settings["control"])
    zygote = Zygote(control, settings)
    wire.send(control, zygote.report)
    zygote.serve()


class Zygote:
    """Sets up the layers once, then serves the judge.

    Args:
        control: socket to the judge.
        settings: `base` (an empty folder), `without` (layers to leave out, each with the reason), `hidden` (folders
            that no program may see), `outside` (a file that none may be able to read), `wrapped` (inside bubblewrap),
            `address_space` (of an interpreter like this one, for where /proc cannot be read).
    """

    def __init__(self, control: socket.socket, settings: dict) -> None:
        self._control = control
        self._without: dict[str, str] = settings["without"]
        self._missing: list[str] = []
        self._base = settings["base"]
        limit_tasks = self._count_tasks()
        confine.die_with_parent()  # after the change of user, which would undo it
        self.memory = self._layer("resident memory", memory.ResidentMemory)  # before /proc is out of sight
        spaces = self._enter_namespaces(settings)
        for name in _WARM_MODULES.split():
            importlib.import_module(name)
        warm_bytes = confine.address_space() or settings["address_space"]
        hidden = settings["hidden"]
        readable = filesystem.without_hidden(filesystem.readable_paths(), hidden)
        self.scratch = box = os.path.join(self._base, "scratch")
        self._own_root = False
        if spaces:
            try:
                namespaces.change_root(self._base, readable, hidden)
            except OSError as error:  # half a root is no place to go on from: the judge starts another zygote
                wire.send(control, {"failed": "namespaces", "reason": str(error)})
                os._exit(0)
            self._own_root, self.scratch, box = True, namespaces.SCRATCH, namespaces.BOX
        else:
            os.makedirs(self.scratch, exist_ok=True)
        _tidy_environment(self.scratch, readable)
        rules = filesystem.landlock_rules(readable, hidden, box)
        self.confinement = confine.Confinement(
            ruleset=self._layer("landlock", lambda: landlock.Ruleset(rules)),
            filter=self._layer("seccomp", seccomp.Filter),
            limit_resources="rlimits" not in self._without,
            warm_bytes=warm_bytes,
            limit_tasks=limit_tasks or ("user+" in spaces),
            watch_memory=self.memory is not None,
        )
        if not self.confinement.limit_resources:
            self._missing.append(f"rlimits: {self._without['rlimits']}")
        child.prepare_interpreter()
        gc.collect()
        gc.freeze()  # the collector never touches, and so never copies, the pages shared with the children
        self._warm_memory = self.memory.own() if self.memory else 0
        self.report = probe.report(self, spaces, settings, self._missing)

    def _count_tasks(self) -> bool:
        return syscalls.SUPPORTED and os.geteuid() == 0 and confine.own_task_counter()

    def _layer(self, name: str, build):
        if name in self._without:
            self._missing.append(f"{name}: {self._without[name]}")
            return None
        if not syscalls.SUPPORTED:
            self._missing.append(f"{name}: not available on {sys.platform} {syscalls.MACHINE}")
            return None
        try:
            return build()
        except OSError as error:
            self._missing.append(f"{name}: {error}")
            return None

    def _enter_namespaces(self, settings: dict) -> str:
        """Go on as process 1 of new namespaces, where the kernel lets us; the original waits and ends with it."""
        if settings["wrapped"]:
            return ""
        if "namespaces" in self._without or not syscalls.SUPPORTED:
            self._missing.append(f"namespaces: {self._without.get('namespaces', 'not available on ' + sys.platform)}")
            return ""
        try:
            spaces = namespaces.enter()
        except OSError as error:
            self._missing.append(f"namespaces: {error}")
            return ""
        inner = os.fork()
        if inner:
            self._control.close()
            os.waitpid(inner, 0)
            os._exit(0)
        confine.die_with_parent()
        return spaces

    def serve(self) -> None:
        """Fork what the judge asks for, until it hangs up. Every request is answered once, then closed by one `end`."""
        while True:
            request, descriptors = self._receive()
            if request is None:
                self.clear_scratch()
                return
            report = self._run(request, descriptors)
            try:
                wire.send(self._control, report)
            except BrokenPipeError:
                return
            if wire.receive(self._control) is None:
                return

    def _receive(self) -> tuple[dict | None, list[int]]:
        """The next request; its descriptors come with the first bytes."""
        header, descriptors, _, _ = socket.recv_fds(self._control, wire.HEADER_BYTES, _MAX_DESCRIPTORS)
        return wire.receive(self._control, header), descriptors

    def _run(self, request: dict, descriptors: list[int]) -> dict:
        try:
            pid = os.fork()
        except OSError as error:
            _close(descriptors)
            return {"failed": f"fork: {error}"}
        if pid == 0:
            child.run(self.confinement, request, descriptors, self.scratch)
        _close(descriptors)
        status, usage, swollen = self._wait(pid, request["limits"])
        self.clear_scratch()
        return {"status": status, "swollen": swollen, "peak": 1024 * usage.ru_maxrss, **usage_of(usage)}

    def _wait(self, pid: int, limits: dict) -> tuple[int, resource.struct_rusage, bool]:
        """Reap the process once it has ended, killing it at a limit, or when the judge says so or hangs up.

        It is killed only while it is not reaped, so that its id cannot be another process's.

        Returns:
            Its status and usage, and whether it was killed because it held too much memory.
        """
        try:
            ended = os.pidfd_open(pid)
        except (AttributeError, OSError):  # no process descriptors: look again and again
            ended = None
        events = [self._control] if ended is None else [self._control, ended]
        watched = self.confinement.watch_memory and ended is not None
        headroom = limits["memory_bytes"]
        try:
            while True:
                left = limits["cpu_seconds"] - _cpu_seconds_of(pid)
                pause = left / _CPUS if not watched else min(left / _CPUS, memory.seconds_until(headroom))
                pause = _POLL_SECONDS if ended is None else max(pause, _POLL_SECONDS)
                ready, _, _ = select.select(events, [], [], pause)
                if watched and not ready:
                    headroom = self._warm_memory + limits["memory_bytes"] - self.memory.of(ended)
                exceeded = left <= 0 or headroom < 0
                if self._control in ready or exceeded:
                    os.kill(pid, signal.SIGKILL)
                reaped, status, usage = os.wait4(pid, 0 if ready or exceeded else os.WNOHANG)
                if reaped:
                    return status, usage, headroom < 0
        finally:
            if ended is not None:
                os.close(ended)

    def clear_scratch(self) -> None:
        """Leave an empty scratch folder to the next program."""
        if self._own_root:
            if os.listdir(self.scratch):
                namespaces.renew_scratch()
        else:
            filesystem.clear_folder(self.scratch)


def _cpu_seconds_of(pid: int) -> float:
    """CPU time of a child that is not reaped, all threads; 0 where the system has no clock for it."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock id that clock_getcpuclockid(3) returns
    except (AttributeError, OSError):
        return 0.0


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _tidy_environment(scratch: str, readable: list[str]) -> None:
    os.environ.update({"HOME": scratch, "TMPDIR": scratch})
    tempfile.tempdir = scratch
    sys.path[:] = [path for path in sys.path if any(filesystem.is_inside(path, folder) for folder in readable)]
    sys.path_importer_cache.clear()
