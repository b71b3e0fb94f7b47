"""Landlock: the kernel's own fence around a process's files, TCP ports and signals, without privileges."""

import ctypes
import fcntl
import os
import stat
import struct
from collections.abc import Iterable

from wmtp.sandbox import syscalls

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _MAKE_SYM, _REFER, _TRUNCATE = 1 << 7, 1 << 8, 1 << 12, 1 << 13, 1 << 14
READ = _READ_FILE | _READ_DIR
LIST = _READ_DIR
SCRATCH = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SYM | _REFER | _TRUNCATE
DEVICE = _READ_FILE | _WRITE_FILE
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE  # what may be said of a path that is no folder
_TCP = 0b11  # bind, connect
_SCOPES = 0b11  # abstract unix sockets, signals
_ALL_FILES_BY_ABI = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 4: 1 << 15, 5: 1 << 16}  # first bit not known
_ABOVE = 32  # out of the way of descriptors that a child puts in place
_VERSION_FLAG, _PATH_BENEATH = 1, 1


class Ruleset:
    """A fence at the best ABI present: nothing but the given paths may be opened, no TCP, no signal to the outside.

    Args:
        rules: (path, rights); a path that does not exist is skipped.

    Raises:
        OSError: the kernel has no Landlock, or it is switched off.
    """

    def __init__(self, rules: Iterable[tuple[str, int]]) -> None:
        self.abi = syscalls.call("landlock_create_ruleset", None, 0, _VERSION_FLAG)
        handled = _ALL_FILES_BY_ABI.get(self.abi, _ALL_FILES_BY_ABI[5]) - 1
        values = [handled] + [_TCP] * (self.abi >= 4) + [_SCOPES] * (self.abi >= 6)
        attributes = struct.pack(f"={len(values)}Q", *values)
        descriptor = syscalls.call("landlock_create_ruleset", attributes, len(attributes), 0)
        self._descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
        os.close(descriptor)
        for path, rights in rules:
            self._add(path, rights & handled)

    def _add(self, path: str, rights: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                rights &= _FILE_RIGHTS
            rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
            syscalls.call("landlock_add_rule", self._descriptor, _PATH_BENEATH, rule, 0)
        finally:
            os.close(descriptor)

    def restrict(self) -> None:
        """Puts this process behind the fence, for good. Needs NO_NEW_PRIVS."""
        syscalls.call("landlock_restrict_self", self._descriptor, 0)
