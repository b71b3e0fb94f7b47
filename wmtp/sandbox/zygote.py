"""The zygote: a warm, single-threaded interpreter that forks one confined process per program.

It never sees a program, a test or an expected value. The judge sends a request with limits and descriptors, and later
an `end`, which kills what still runs; the zygote answers every request with one report of how the process ended.
"""

import gc
import importlib
import os
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from wmtp.sandbox import child, confine, filesystem, landlock, namespaces, probe, seccomp, wire
from wmtp.sandbox.usage import FASTEST_GROWTH, ResidentMemory, usage_of

# What programs import most; anything else is imported when a program asks, at its own cost.
_WARM_MODULES = """
    abc array bisect calendar cmath collections collections.abc contextlib copy ctypes dataclasses datetime decimal
    enum fractions functools heapq io itertools json math numbers operator queue random re statistics string
    struct textwrap threading time traceback types typing unicodedata
"""
_MAX_DESCRIPTORS = 4
_POLL_SECONDS = 0.002
_CPUS = os.cpu_count() or 1


def main(control: socket.socket, settings: dict) -> None:
    """Runs the process: see `Zygote`."""
    zygote = Zygote(control, settings)
    wire.send(control, zygote.report)
    zygote.serve()


class Zygote:
    """Sets up the layers once, then serves the judge.

    Args:
        settings: `base` (an empty folder), `without` (layers to leave out, each with the reason), `hidden` (folders
            that no program may see), `outside` (a file that none may be able to read), `wrapped` (inside bubblewrap),
            `address_space` (of an interpreter like this one, for where /proc cannot be read).
    """

    def __init__(self, control: socket.socket, settings: dict) -> None:
        self._control = control
        self._without: dict[str, str] = settings["without"]
        self._missing: list[str] = []
        limit_tasks = os.geteuid() == 0 and confine.own_task_counter()
        confine.die_with_parent()  # after the change of user, which would undo it
        self._memory = self._layer("resident memory", ResidentMemory)  # before /proc is out of sight
        spaces = self._enter_namespaces(settings)
        for name in _WARM_MODULES.split():
            importlib.import_module(name)
        warm_bytes = confine.address_space() or settings["address_space"]
        hidden = settings["hidden"]
        readable = filesystem.without_hidden(filesystem.readable_paths(), hidden)
        self._own_root = bool(spaces)
        if spaces:
            try:
                namespaces.change_root(settings["base"], readable, hidden)
            except OSError as error:  # half a root is no place to go on from: the judge starts another zygote
                wire.send(control, {"failed": "namespaces", "reason": str(error)})
                os._exit(0)
            self._scratch, box = namespaces.SCRATCH, namespaces.BOX
        else:
            self._scratch = box = os.path.join(settings["base"], "scratch")
            os.makedirs(self._scratch, exist_ok=True)
        os.environ.update({"HOME": self._scratch, "TMPDIR": self._scratch})
        tempfile.tempdir = self._scratch
        sys.path[:] = [path for path in sys.path if any(filesystem.is_inside(path, folder) for folder in readable)]
        sys.path_importer_cache.clear()
        rules = filesystem.landlock_rules(readable, hidden, box)
        self._confinement = confine.Confinement(
            ruleset=self._layer("landlock", lambda: landlock.Ruleset(rules)),
            filter=self._layer("seccomp", seccomp.Filter),
            limit_resources=self._layer("rlimits", lambda: True) is not None,
            warm_bytes=warm_bytes,
            limit_tasks=limit_tasks or ("user+" in spaces),
            watch_memory=self._memory is not None,
        )
        child.prepare_interpreter()
        gc.collect()
        gc.freeze()  # the collector never touches, and so never copies, the pages shared with the children
        self._warm_memory = self._memory.own() if self._memory else 0
        self.report = probe.report(self._confinement, self._scratch, self._memory, spaces, settings)
        self.report["missing"] = self._missing + self.report["missing"]

    def _layer(self, name: str, build: Callable):
        if (reason := self._without.get(name)) is None:
            try:
                return build()
            except OSError as error:
                reason = str(error)
        self._missing.append(f"{name}: {reason}")
        return None

    def _enter_namespaces(self, settings: dict) -> str:
        """Goes on as process 1 of new namespaces, where the kernel lets us; the original waits and ends with it."""
        spaces = None if settings["wrapped"] else self._layer("namespaces", namespaces.enter)
        if spaces is None:
            return ""
        inner = os.fork()
        if inner:
            self._control.close()
            os.waitpid(inner, 0)
            os._exit(0)
        confine.die_with_parent()
        return spaces

    def serve(self) -> None:
        """Forks what the judge asks for until it hangs up. Every request is answered once, then closed by one `end`."""
        while True:
            # Descriptors come with the first bytes.
            header, descriptors, _, _ = socket.recv_fds(self._control, wire.HEADER_BYTES, _MAX_DESCRIPTORS)
            request = wire.receive(self._control, header)
            if request is None:
                self._clear_scratch()
                return
            report = self._run(request, descriptors)
            try:
                wire.send(self._control, report)
            except BrokenPipeError:
                return
            if wire.receive(self._control) is None:
                return

    def _run(self, request: dict, descriptors: list[int]) -> dict:
        try:
            pid = os.fork()
        except OSError as error:
            _close(descriptors)
            return {"failed": f"fork: {error}"}
        if pid == 0:
            child.run(self._confinement, request, descriptors, self._scratch)
        _close(descriptors)
        report = self._wait(pid, request["limits"])
        self._clear_scratch()
        return report

    def _wait(self, pid: int, limits: dict) -> dict:
        """Reaps the process once it has ended, killing it at a limit, or when the judge says so or hangs up.

        It is killed only while it is not reaped, so that its id cannot be another process's.

        Returns:
            Its `status` and usage, and whether it was killed because it held too much memory (`swollen`).
        """
        try:
            ended = os.pidfd_open(pid)
        except (AttributeError, OSError):  # no process descriptors: look again and again
            ended = None
        events: list[Any] = [self._control] if ended is None else [self._control, ended]
        watched = self._confinement.watch_memory and ended is not None
        headroom = limits["memory_bytes"]
        try:
            while True:
                left = limits["cpu_seconds"] - _cpu_seconds_of(pid)
                pause = left / _CPUS if not watched else min(left / _CPUS, headroom / FASTEST_GROWTH)
                pause = _POLL_SECONDS if ended is None else max(pause, _POLL_SECONDS)
                ready, _, _ = select.select(events, [], [], pause)
                if watched and not ready:
                    headroom = self._warm_memory + limits["memory_bytes"] - self._memory.of(ended)
                exceeded = left <= 0 or headroom < 0
                if self._control in ready or exceeded:
                    os.kill(pid, signal.SIGKILL)
                waited = None
                if ended is not None and watched and (ready or exceeded):  # its last wait counts once it has ended
                    select.select([ended], [], [])
                    waited = self._memory.waited(ended)
                reaped, status, usage = os.wait4(pid, 0 if ready or exceeded else os.WNOHANG)
                if reaped:
                    report = {"status": status, "swollen": headroom < 0, "peak": 1024 * usage.ru_maxrss}
                    return report | usage_of(usage) | ({} if waited is None else {"waited": waited})
        finally:
            if ended is not None:
                os.close(ended)

    def _clear_scratch(self) -> None:
        if not self._own_root:
            filesystem.clear_folder(self._scratch)
        elif os.listdir(self._scratch):
            namespaces.renew_scratch()


def _cpu_seconds_of(pid: int) -> float:
    """Returns the CPU time of a child that is not reaped, all threads; 0 where the system has no clock for it."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock id that clock_getcpuclockid(3) returns
    except (AttributeError, OSError):
        return 0.0


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
