"""What a process uses, seen from outside it: CPU time, memory, and whether it was the machine that kept it waiting."""

import errno
import functools
import mmap
import os
import resource

# A limit on the address space alone would refuse what is mapped and never touched: `import torch` maps 3 GB of
# libraries for 0.3 GB of its own. Where resident memory is watched, these may come on top of `memory_bytes`.
UNTOUCHED_BYTES = 1 << 30  # private memory that is asked for and not used (RLIMIT_DATA)
MAPPED_BYTES = 8 << 30  # libraries, reservations without access (RLIMIT_AS)
FASTEST_GROWTH = 8 << 30  # bytes a second that a program can touch: the kernel clears 2 to 5 GB a second a core
_FIELDS = ("RssAnon:", "RssShmem:", "VmSwap:")
_REFUSALS = ("failed to map segment", "annot allocate memory", "an't allocate memory", "bad_alloc", "out of memory")
_NO_REFUSALS = ("static TLS", "not permitted")  # a library that no address fits; a folder mounted noexec

_BLOCKS_A_READ = 256  # of 512 bytes: what the kernel reads ahead in a file
# The kernel says how long each thread waited for a CPU (/proc/PID/schedstat), under a quota too. Where that
# cannot be read, the times are counted that a process was put aside: one that wants to run and may not is, every 10 to
# 140 ms beside 5 to 15 busy processes on its CPU. One that computes first and then sleeps looks the same.
_PUT_ASIDE_SECONDS = 0.15
_READ_SECONDS = 0.02  # of a busy disk

Usage = dict[str, float]
_FIGURES = ("cpu", "preempted", "read", "waited", "stolen")


class ResidentMemory:
    """Reads how much memory of its own (not of files) a child holds, swapped out or not.

    It keeps /proc open from before the file system is changed; raises OSError where /proc, or a field of it, cannot be
    read. A program can neither hide private memory from these counts nor, since the seccomp filter refuses shared
    anonymous maps and /dev/zero is not to be had, keep memory that no map shows.
    """

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not self.own():
            raise OSError(errno.ENOTSUP, "/proc does not say how much memory a process holds")

    def own(self) -> int:
        """Returns the bytes that this process holds."""
        return self._read("self")

    def of(self, process: int) -> int:
        """Returns the bytes that the process of a pidfd holds; 0 once it has ended."""
        try:
            return self._read(self._pid(process))
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def waited(self, process: int) -> float | None:
        """Returns the seconds that the living threads of a pidfd's process waited for a CPU; None where unknown."""
        try:
            return _waited(f"{self._pid(process)}/task", self._proc)
        except OSError:
            return None

    def _pid(self, process: int) -> str:
        """Returns the number that /proc has for a pidfd's process; -1, which it has not, once that is reaped."""
        with open(os.open(f"self/fdinfo/{process}", os.O_RDONLY, dir_fd=self._proc)) as file:
            return next((line.split()[1] for line in file if line.startswith("Pid:")), "-1")

    def _read(self, name: str) -> int:
        with open(os.open(f"{name}/status", os.O_RDONLY, dir_fd=self._proc)) as file:
            return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(_FIELDS))


class PrivateMap(mmap.mmap):
    """`mmap.mmap` whose anonymous maps are private: the same thing in a process that cannot fork, and counted."""

    def __new__(
        cls,
        fileno: int,
        length: int,
        flags: int = mmap.MAP_SHARED,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        access: int = mmap.ACCESS_DEFAULT,
        **offset: int,
    ) -> "PrivateMap":
        if fileno == -1 and access != mmap.ACCESS_DEFAULT:
            access = mmap.ACCESS_COPY
        elif fileno == -1:
            flags = flags & ~mmap.MAP_SHARED | mmap.MAP_PRIVATE
        return super().__new__(cls, fileno, length, flags=flags, prot=prot, access=access, **offset)


def is_refused_memory(error: BaseException) -> bool:
    """Returns whether an exception says that there was no memory, in whatever words a library has for it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error) if isinstance(error, ImportError | OSError | RuntimeError) else ""
    return any(words in text for words in _REFUSALS) and not any(words in text for words in _NO_REFUSALS)


def usage_of(usage: resource.struct_rusage) -> Usage:
    """Returns CPU seconds (`cpu`), the times it was put aside for another (`preempted`), waited for a disk (`read`)."""
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "preempted": usage.ru_nivcsw,
        "read": usage.ru_majflt + usage.ru_inblock / _BLOCKS_A_READ,
    }


def own_usage() -> Usage:
    """Returns the usage of this process.

    Where the kernel says them, also the seconds that it waited for a CPU (`waited`), and those that a hypervisor took
    from all CPUs for others (`stolen`).
    """
    used = usage_of(resource.getrusage(resource.RUSAGE_SELF))
    try:
        return used | {"waited": _waited("/proc/self/task"), "stolen": _stolen() if _is_stolen_from() else 0.0}
    except (OSError, IndexError):
        return used


def _stolen() -> float:
    with open("/proc/stat") as file:
        return int(file.readline().split()[8]) / os.sysconf("SC_CLK_TCK")


@functools.cache
def _is_stolen_from() -> bool:
    """Returns whether there is a hypervisor that takes time: a machine of many CPUs is slow to say how much."""
    return _stolen() > 0


def _waited(tasks: str, folder: int | None = None) -> float:
    descriptor = os.open(tasks, os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
    try:
        seconds = 0.0
        for thread in os.listdir(descriptor):
            with open(os.open(f"{thread}/schedstat", os.O_RDONLY, dir_fd=descriptor)) as file:
                seconds += 1e-9 * int(file.read().split()[1])
        return seconds
    finally:
        os.close(descriptor)


def between(before: Usage, after: Usage) -> Usage:
    """Returns what was used from one time to another."""
    return {name: after[name] - before.get(name, 0.0) for name in _FIGURES if name in after}


def starved(wall: float, *usages: Usage) -> bool:
    """Returns whether the machine, and not the program, is to blame for what of `wall` seconds was not computed in.

    `usages` are of the processes that took turns meanwhile. Those that were kept from running for a tenth of the time
    or less would have been late without that too.
    """
    idle = wall - sum(usage["cpu"] for usage in usages)
    kept = 0.0
    for usage in usages:
        kept += usage.get("waited", _PUT_ASIDE_SECONDS * usage["preempted"]) + usage.get("stolen", 0.0)
        kept += _READ_SECONDS * usage["read"]
    return idle > 0.1 * wall and kept > 0.5 * idle
