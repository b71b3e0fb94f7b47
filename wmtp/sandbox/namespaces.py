"""Linux namespaces around the zygote: a file system, process table, network and IPC of its own.

They are a layer beside Landlock and seccomp, not instead of them: containers often forbid them.
"""

import os
import struct

from wmtp.sandbox import filesystem, syscalls

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_ALL_BUT_USER = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_MAX_LOCKED_FLAGS = 0b1111 | 1024 | 2048  # of statvfs, where they equal mount's

BOX = "/.box"  # holds the scratch mount; a Landlock rule on it outlives the mount
SCRATCH = BOX + "/scratch"
FENCED = "/.fenced"  # a readable file that no Landlock rule grants, for the probe


def enter() -> str:
    """Moves this (single-threaded) process into new namespaces; its next child is process 1 of the new process table.

    Returns:
        The kinds entered. Root needs no user namespace where it may do without; raises OSError where none work.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        try:
            syscalls.unshare(_ALL_BUT_USER)
            return "mount+pid+net+ipc+uts+cgroup"
        except PermissionError:
            pass  # root without CAP_SYS_ADMIN: as an ordinary user
    syscalls.unshare(_NEWUSER | _ALL_BUT_USER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return "user+mount+pid+net+ipc+uts+cgroup"


def change_root(base: str, readable: list[str], hidden: list[str]) -> None:
    """Makes a new root of read-only views of `readable` without `hidden`, and a scratch tmpfs; the old tree is gone.

    The empty folder `base` only serves as a mount point.
    """
    syscalls.mount("none", "/", flags=_MS_REC | _MS_PRIVATE)
    syscalls.mount("wmtp", base, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=4m,mode=755")
    readable = filesystem.with_real(readable)
    for path in readable:
        _bind(path, base + path)
        _make_read_only(base + path)
    for path in filesystem.DEVICES:
        if os.path.exists(path):
            _bind(path, base + path)
    for path in filesystem.hidden_within(readable, hidden):
        syscalls.mount("wmtp", base + path, "tmpfs", _MS_NOSUID | _MS_NODEV | _MS_RDONLY, "size=4k,mode=755")
    os.makedirs(base + SCRATCH)
    if not os.path.exists(base + "/tmp"):
        os.symlink(SCRATCH, base + "/tmp")
    with open(base + FENCED, "w") as file:
        file.write("readable, but not granted")
    mount_scratch(base + SCRATCH)
    syscalls.mount("none", base, flags=_MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)
    os.chdir(base)
    syscalls.call("pivot_root", b".", b".")  # stacks the old root on the new one, at the same place
    syscalls.umount(".", _MNT_DETACH)
    os.chdir("/")


def mount_scratch(path: str) -> None:
    """Mounts an empty scratch tmpfs of bounded size and number of files at `path`.

    Its mode lets the real user id, which may be another than the effective one, pass access(2).
    """
    options = f"size={filesystem.SCRATCH_BYTES},nr_inodes={filesystem.SCRATCH_FILES},mode=777"
    syscalls.mount("wmtp", path, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def renew_scratch() -> None:
    """Replaces the scratch tmpfs by an empty one: nothing that a program left can survive."""
    syscalls.umount(SCRATCH, _MNT_DETACH)
    mount_scratch(SCRATCH)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    syscalls.mount(source, target, flags=_MS_BIND | _MS_REC)


def _make_read_only(target: str) -> None:
    try:
        attributes = struct.pack("=4Q", _MS_RDONLY | _MS_NOSUID | _MS_NODEV, 0, 0, 0)
        syscalls.call("mount_setattr", _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attributes, len(attributes))
    except OSError:  # before Linux 5.12: not recursive; flags inherited from outside must stay as they are
        locked = os.statvfs(target).f_flag & _MAX_LOCKED_FLAGS
        flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV | locked
        syscalls.mount("none", target, flags=flags)
