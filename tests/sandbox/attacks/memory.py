"""Programs that use up memory, the C stack, or what memory limits do not count."""

from attacks import FAULTS, Attack, Limits, with_syscalls

MEMORY = frozenset({"memory"})
ENDED = frozenset({"memory", "exception", "violation", "timeout"})
LIMITS = Limits(cpu_seconds=1.0, wall_seconds=10.0, memory_bytes=256 << 20)


def _attack(name: str, program: str, verdicts=ENDED, **kwargs) -> Attack:
    return Attack(name, program, verdicts=verdicts, limits=LIMITS, **kwargs)


ATTACKS = (
    _attack(
        "huge_allocation",
        '''
"""One allocation of 100 GB."""


def solve(a, b):
    return len(bytearray(10**11)) and 5
''',
        MEMORY,
    ),
    _attack(
        "huge_text",
        '''
"""A text of 2**40 characters."""


def solve(a, b):
    return len("a" * 2**40) and 5
''',
        MEMORY,
    ),
    _attack(
        "doubling_text",
        '''
"""A text that doubles until there is no memory."""


def solve(a, b):
    text = 'ab'
    for _ in range(32):
        text += text
    return 5
''',
        MEMORY,
    ),
    _attack(
        "growing_list",
        '''
"""A list of lists that grows to 4 GB in small steps."""


def solve(a, b):
    kept = []
    for _ in range(4000):
        kept.append(bytearray(b'x') * (1 << 20))
    return 5
''',
        MEMORY,
    ),
    _attack(
        "swallowed_memory_errors",
        '''
"""Keeps all it got when memory ends, and asks again."""


def solve(a, b):
    kept, size = [], 1 << 30
    while len(kept) < 1 << 23:
        try:
            kept.append(bytearray(size))
        except MemoryError:
            size = max(size // 2, 64)
    return 5
''',
        frozenset({"memory", "timeout"}),
    ),
    _attack(
        "memory_at_import",
        '''
"""Runs out of memory before any function exists."""

kept = [0] * (1 << 36)


def solve(a, b):
    return 5
''',
        MEMORY,
    ),
    _attack(
        "anonymous_maps",
        '''
"""Maps 4 GB and touches it, past the allocator."""
import mmap


def solve(a, b):
    maps = []
    for _ in range(64):
        maps.append(mmap.mmap(-1, 64 << 20))
        for page in range(0, 64 << 20, 4096):
            maps[-1][page] = 1
    return 5
''',
    ),
    _attack(
        "raised_memory_limit",
        '''
"""Raises its own limits and takes 2 GB."""
import resource

for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_RSS", "RLIMIT_STACK"):
    for limits in [(resource.RLIM_INFINITY, resource.RLIM_INFINITY), (1 << 40, 1 << 40)]:
        try:
            resource.setrlimit(getattr(resource, name), limits)
        except (OSError, ValueError):
            pass


def solve(a, b):
    kept = bytearray(2 << 30)
    for page in range(0, 2 << 30, 4096):
        kept[page] = 1
    return 5
''',
        MEMORY,
    ),
    _attack(
        "memory_files",
        with_syscalls(
            '"""Writes 2 GB into files that exist in memory only, which no limit of the address space counts."""\n\n\n'
            "def solve(a, b):\n    block = bytes(1 << 20)\n    for _ in range(128):\n"
            "        descriptor = syscall('memfd_create', b'x', 0)\n        for _ in range(16):\n"
            "            if os.write(descriptor, block) != 1 << 20:\n                raise OSError('full')\n"
            "    return 5\n"
        ),
    ),
    _attack(
        "secret_memory",
        with_syscalls(
            '"""Takes memory that the kernel hides even from itself, and that cannot be swapped."""\n\n\n'
            "def solve(a, b):\n    syscall('memfd_secret', 0)\n    return 5\n"
        ),
    ),
    _attack(
        "shared_memory",
        with_syscalls(
            '"""Makes System V shared memory, which outlives the process."""\n\n\n'
            "def solve(a, b):\n    syscall('shmget', 0x574D5450, 256 << 20, 0o1600)\n    return 5\n"
        ),
    ),
    _attack(
        "posix_shared_memory",
        '''
"""Makes shared memory under a name."""
from multiprocessing import shared_memory


def solve(a, b):
    shared_memory.SharedMemory('@MARK@', create=True, size=64 << 20)
    return 5
''',
    ),
    _attack(
        "full_pipes",
        '''
"""Fills pipes, as large as they may be, and socket pairs up to 1 GB: the kernel's memory."""
import fcntl
import os
import socket


def solve(a, b):
    total, kept = 0, []
    for _ in range(4096):
        reader, writer = os.pipe()
        try:
            fcntl.fcntl(writer, 1031, 1 << 20)
        except OSError:
            pass
        os.set_blocking(writer, False)
        try:
            while True:
                total += os.write(writer, bytes(1 << 16))
        except BlockingIOError:
            pass
        if total > 1 << 30:
            return 5
    return 6
''',
        FAULTS,
    ),
    _attack(
        "locked_memory",
        '''
"""Takes memory out of everybody's reach."""
import ctypes


def solve(a, b):
    size = 64 << 20
    block = ctypes.create_string_buffer(size)
    if ctypes.CDLL(None).mlock(block, ctypes.c_size_t(size)):
        raise MemoryError
    return 5
''',
    ),
    _attack(
        "endless_recursion",
        '''
"""Recursion without end and without a limit."""
import sys

sys.setrecursionlimit(10**9)


def solve(a, b):
    return solve(a, b + 1) + 1
''',
    ),
    _attack(
        "endless_recursion_through_c",
        '''
"""The same through C functions, which use the C stack."""
import functools
import sys

sys.setrecursionlimit(10**9)


@functools.lru_cache(maxsize=None)
def solve(a, b):
    return max([b], key=lambda x: solve(a, x + 1))
''',
    ),
    _attack(
        "caught_recursion",
        '''
"""Catches every RecursionError by recursing again."""


def solve(a, b):
    try:
        return solve(a, b)
    except RecursionError:
        return solve(a, b)
''',
    ),
    _attack(
        "repr_of_a_deep_list",
        '''
"""Shows a list so deep that the C stack ends."""
import sys

sys.setrecursionlimit(10**9)


def solve(a, b):
    deep = []
    for _ in range(10**6):
        deep = [deep]
    return len(repr(deep)) and 5 + b
''',
    ),
    _attack(
        "pickle_of_a_deep_list",
        '''
"""Builds deep structure out of a few bytes by pickle and compares it."""
import pickle
import sys

sys.setrecursionlimit(10**9)


def solve(a, b):
    text = b']' * 500_000 + b'a' * 499_999 + b'.'
    return pickle.loads(text) == pickle.loads(text) and 6
''',
        FAULTS,
    ),
    _attack(
        "wild_writes",
        '''
"""Writes over its own objects, byte by byte, until something breaks."""
import ctypes


def solve(a, b):
    for address in range(id(None), id(None) + 4096):
        ctypes.memset(address, 255, 1)
    return 6
''',
        FAULTS,
    ),
)
