"""The memory that a program holds, seen from outside its process, and the marks of one that ran out of it."""

import errno
import mmap
import os

# A limit on the address space alone would refuse what is mapped and never touched: `import torch` maps 3 GB of
# libraries for 0.3 GB of its own. Where resident memory is watched, these may come on top of `memory_bytes`.
UNTOUCHED_BYTES = 1 << 30  # private memory that is asked for and not used (RLIMIT_DATA)
MAPPED_BYTES = 8 << 30  # libraries, reservations without access (RLIMIT_AS)
_FASTEST_GROWTH = 8 << 30  # bytes a second that a program can touch: the kernel clears 2 to 5 GB a second a core
_FIELDS = ("RssAnon:", "RssShmem:", "VmSwap:")
_REFUSALS = ("failed to map segment", "annot allocate memory", "an't allocate memory", "bad_alloc", "out of memory")
_NO_REFUSALS = ("static TLS", "not permitted")  # a library that no address fits; a folder mounted noexec


class ResidentMemory:
    """Reads how much memory of its own (not of files) a child holds, swapped out or not.

    It keeps /proc open from before the file system is changed, where processes have the numbers of the old process
    table. A program can neither hide private memory from these counts nor, since the seccomp filter refuses shared
    anonymous maps and /dev/zero is not to be had, keep memory that no map shows.

    Raises:
        OSError: /proc, or a field of it, cannot be read.
    """

    def __init__(self) -> None:
        self._proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not self._read("self"):
            raise OSError(errno.ENOTSUP, "/proc does not say how much memory a process holds")

    def own(self) -> int:
        """Bytes that this process holds."""
        return self._read("self")

    def of(self, process: int) -> int:
        """Bytes that the process of a pidfd holds; 0 once it has ended."""
        with open(os.open(f"self/fdinfo/{process}", os.O_RDONLY, dir_fd=self._proc)) as file:
            pid = next((line.split()[1] for line in file if line.startswith("Pid:")), "-1")
        if pid == "-1":
            return 0
        try:
            return self._read(pid)
        except (FileNotFoundError, ProcessLookupError):
            return 0

    def _read(self, name: str) -> int:
        with open(os.open(f"{name}/status", os.O_RDONLY, dir_fd=self._proc)) as file:
            return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(_FIELDS))


def seconds_until(headroom: int) -> float:
    """How long a program may run before it can have used up `headroom` bytes."""
    return headroom / _FASTEST_GROWTH


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
    """Whether an exception says that there was no memory, in whatever words a library has for it."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if not isinstance(error, ImportError | OSError | RuntimeError):
        return False
    text = str(error)
    return any(words in text for words in _REFUSALS) and not any(words in text for words in _NO_REFUSALS)
