"""All that is done to a process before it may run a model's program, in one place and in the right order."""

import math
import os
import resource
import signal
import struct
from dataclasses import dataclass

from wmtp.sandbox import syscalls, usage
from wmtp.sandbox.landlock import Ruleset
from wmtp.sandbox.seccomp import Filter

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_STACK_BYTES = 256 << 20  # deep recursion through C (sort keys, lru_cache) needs more than the usual 8 MiB
_SYSTEM_TASKS = 4  # zygote, main thread and a margin, beside the threads a program may start
_CAPABILITY_VERSION = 0x20080522
_NO_CAPABILITIES = struct.pack("=Ii", _CAPABILITY_VERSION, 0), bytes(24)  # header and data of capset(2)


@dataclass
class Confinement:
    """The layers to apply; `apply` is called in the forked child and cannot be undone."""

    ruleset: Ruleset | None = None
    filter: Filter | None = None
    limit_resources: bool = False
    warm_bytes: int = 0  # address space of the warm interpreter, which a program's own memory comes on top of
    limit_tasks: bool = False  # whether RLIMIT_NPROC counts this process's own user (see `own_task_counter`)
    # Whether the zygote ends a process that holds too much memory. Rlimits then leave room for what is asked for and
    # never used, and bound what could be taken before the zygote looks.
    watch_memory: bool = False

    def apply(self, limits: dict) -> None:
        """Confines this process for good; raises OSError or ValueError where any step fails (then nothing may run)."""
        if self.limit_resources:
            self._set_rlimits(limits)
        syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if self.ruleset is not None:
            self.ruleset.restrict()
        # Without any capability; NO_NEW_PRIVS and the ban on execve keep them from coming back.
        syscalls.call("capset", *_NO_CAPABILITIES)
        die_with_parent()
        if self.filter is not None:
            self.filter.install()

    def _set_rlimits(self, limits: dict) -> None:
        lower(resource.RLIMIT_STACK, _STACK_BYTES)
        lower(resource.RLIMIT_CORE, 0)
        lower(resource.RLIMIT_FSIZE, limits["file_bytes"])
        lower(resource.RLIMIT_NOFILE, limits["open_files"])
        # The zygote kills on the exact count; this one goes by timer ticks. Soft = hard: SIGKILL, not SIGXCPU.
        lower(resource.RLIMIT_CPU, math.ceil(limits["cpu_seconds"]) + 1)
        if self.limit_tasks:
            lower(resource.RLIMIT_NPROC, limits["threads"] + _SYSTEM_TASKS)
        lower(resource.RLIMIT_MSGQUEUE, 0)
        lower(resource.RLIMIT_MEMLOCK, 0)
        lower(resource.RLIMIT_RTPRIO, 0)
        lower(resource.RLIMIT_SIGPENDING, 256)
        if self.warm_bytes:
            allowed = self.warm_bytes + limits["memory_bytes"]
            if self.watch_memory:
                lower(resource.RLIMIT_DATA, allowed + usage.UNTOUCHED_BYTES)
                allowed += usage.MAPPED_BYTES
            lower(resource.RLIMIT_AS, allowed)


def lower(kind: int, value: int) -> None:
    """Sets a resource limit, soft and hard, to `value`, or to the present hard limit where that is less."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY and hard < value:
        value = hard
    resource.setrlimit(kind, (value, value))


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent ends."""
    syscalls.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def own_task_counter() -> bool:
    """Has root's tasks counted under a real user id of this process's own; the effective id, which opens files, stays.

    RLIMIT_NPROC never binds user 0. Returns False where the id cannot be changed.
    """
    for uid in (1_879_048_192 + os.getpid(), 60_000 + os.getpid() % 1_000):  # the second: containers with few ids
        try:
            os.setresuid(uid, 0, 0)
            return True
        except OSError:
            continue
    return False


def address_space() -> int:
    """Returns the bytes of address space of this process, 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:
        return 0
