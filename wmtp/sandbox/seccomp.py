"""A seccomp-BPF filter: which system calls a confined program may make, and with which arguments.

Everything that is not listed fails with EPERM: no new process (fork, vfork, clone without CLONE_THREAD, execve), no
signal to another process, no socket but a connected pair, no ptrace, mount, namespace, bpf, keyctl, io_uring, perf, no
change of owner, mode or times of a file (Landlock does not watch those), no shared anonymous memory. `clone3` and
`openat2` say ENOSYS, because their flags lie in memory where a filter cannot look: libc then falls back to `clone` and
`openat`.
"""

import ctypes
import os
import struct
from dataclasses import dataclass

from wmtp.sandbox import syscalls

# Classic BPF: an instruction is (code, jump if true, jump if false, k).
Instruction = tuple[int, int, int, int]
_LOAD, _AND, _JUMP, _JUMP_EQ, _JUMP_GE, _RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGS = 0, 4, 16
_X32_BIT = 0x40000000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
OWN_PID = 0xFFFFFFF1  # placeholder, replaced by the process's own id when the filter is installed


@dataclass(frozen=True)
class When:
    """A condition on an argument: `(argument & mask) in values`, or, with `but_not`, the reverse.

    The kernel reads these arguments as 32-bit integers, so the upper half cannot change their meaning.
    """

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    but_not: bool = False


_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000  # user, pid, net, ipc, uts, cgroup and mount namespaces
_MAP_SHARED, _MAP_ANONYMOUS = 0x1, 0x20
_OPEN_MODE = os.O_WRONLY | os.O_RDWR | os.O_TRUNC

# Calls that are allowed under all of the conditions given; every other call of the table is allowed as it is.
_CONDITIONS: dict[str, tuple[When, ...]] = {
    "clone": (When(0, (_CLONE_THREAD,), mask=_CLONE_THREAD | _CLONE_NAMESPACES),),
    "kill": (When(0, (OWN_PID,)),),
    "tgkill": (When(0, (OWN_PID,)),),
    "prlimit64": (When(0, (0, OWN_PID)),),
    # AF_UNIX stream pairs (asyncio needs one); a datagram pair could be aimed at other addresses.
    "socketpair": (When(0, (1,)), When(1, (1,), mask=0xF)),
    "prctl": (When(0, (3, 15, 16, 21, 0x53564D41)),),  # dumpable?, set name, get name, seccomp?, name a mapping
    # terminal? (libc asks of every stdout), window size, bytes to read, non-blocking, close-on-exec
    "ioctl": (When(1, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    # no shared anonymous map: what it holds shows in no count of the process's memory once it is let go of
    "mmap": (When(3, (_MAP_SHARED | _MAP_ANONYMOUS,), mask=_MAP_SHARED | _MAP_ANONYMOUS, but_not=True),),
    # dup, descriptor and status flags, record locks; not F_SETOWN and F_SETSIG, which aim SIGIO at other processes
    "fcntl": (When(1, (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)),),
    # not truncating what is opened for reading: before Landlock's ABI 3 nothing else stops it
    "open": (When(1, (os.O_TRUNC,), mask=_OPEN_MODE, but_not=True),),
    "openat": (When(2, (os.O_TRUNC,), mask=_OPEN_MODE, but_not=True),),
}


def _condition(when: When) -> list[Instruction]:
    """Returns code that falls through where the condition holds, else returns EPERM."""
    code = [(_LOAD, 0, 0, _OFFSET_ARGS + 8 * when.argument)]
    if when.mask != 0xFFFFFFFF:
        code.append((_AND, 0, 0, when.mask))
    refuse = (_RETURN, 0, 0, _ERRNO | _EPERM)
    if when.but_not:
        for value in when.values:
            code += [(_JUMP_EQ, 0, 1, value), refuse]
        return code
    for index, value in enumerate(when.values):
        code.append((_JUMP_EQ, len(when.values) - index, 0, value))
    return [*code, refuse]


def program(allowed: dict[str, int], architecture: int, absent: tuple[int, ...]) -> list[Instruction]:
    """Returns the filter as BPF instructions; another architecture kills the process, `absent` calls say ENOSYS.

    The number is looked up by bisection: the kernel tries every number when a filter is installed, and a linear
    list would make that the dearest step of starting a program.
    """
    actions = {number: [(_RETURN, 0, 0, _ERRNO | _ENOSYS)] for number in absent}
    for name, number in allowed.items():
        conditions = [step for when in _CONDITIONS.get(name, ()) for step in _condition(when)]
        actions[number] = [*conditions, (_RETURN, 0, 0, _ALLOW)]
    refuse = [(_RETURN, 0, 0, _ERRNO | _EPERM)]
    ranges: list[tuple[int, list[Instruction]]] = []  # first number and what to do, up to the next range
    for number in range(max(actions) + 2):
        action = actions.get(number, refuse)
        if not ranges or ranges[-1][1] != action:
            ranges.append((number, action))
    return [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQ, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_JUMP_GE, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        *_bisect(ranges),
    ]


def _bisect(ranges: list[tuple[int, list[Instruction]]]) -> list[Instruction]:
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    below, above = _bisect(ranges[:middle]), _bisect(ranges[middle:])
    return [(_JUMP_GE, 0, 1, ranges[middle][0]), (_JUMP, 0, 0, len(below)), *below, *above]


class Filter:
    """The filter, assembled once; `install` costs a patch of the own process id and one system call."""

    def __init__(self) -> None:
        absent = tuple(syscalls.SETUP[name] for name in ("clone3", "openat2"))
        code = program(syscalls.PROGRAM, syscalls.ARCHITECTURES[syscalls.MACHINE], absent)
        self._buffer = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in code))
        self._own_pid_offsets = [8 * index + 4 for index, step in enumerate(code) if step[3] == OWN_PID]
        self._header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(self._buffer)))

    def install(self) -> None:
        """Puts this process under the filter, for good. Needs NO_NEW_PRIVS; raises OSError where the kernel refuses."""
        for offset in self._own_pid_offsets:
            struct.pack_into("<I", self._buffer, offset, os.getpid())
        syscalls.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._header)
