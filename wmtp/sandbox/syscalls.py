"""Raw Linux system calls through ctypes, with the numbers of x86-64 and aarch64.

The table holds what a confined program may call (`PROGRAM`) and what confining needs (`SETUP`); each entry is name,
number on x86-64, number on aarch64, with `-` where the architecture has no such call.
"""

import ctypes
import os
import platform
import sys

_PROGRAM = """
read 0 63 | write 1 64 | readv 19 65 | writev 20 66 | pread64 17 67 | pwrite64 18 68 | preadv 295 69
pwritev 296 70 | preadv2 327 286 | pwritev2 328 287 | lseek 8 62 | open 2 - | openat 257 56 | creat 85 -
close 3 57 | close_range 436 436 | stat 4 - | fstat 5 80 | lstat 6 - | newfstatat 262 79 | statx 332 291
statfs 137 43 | fstatfs 138 44 | access 21 - | faccessat 269 48 | faccessat2 439 439 | readlink 89 -
readlinkat 267 78 | getcwd 79 17 | chdir 80 49 | fchdir 81 50 | getdents 78 - | getdents64 217 61 | mkdir 83 -
mkdirat 258 34 | rmdir 84 - | unlink 87 - | unlinkat 263 35 | rename 82 - | renameat 264 38 | renameat2 316 276
symlink 88 - | symlinkat 266 36 | ftruncate 77 46 | fallocate 285 47 | fsync 74 82 | fdatasync 75 83
fadvise64 221 223 | flock 73 32 | umask 95 166 | dup 32 23 | dup2 33 - | dup3 292 24 | pipe 22 - | pipe2 293 59
fcntl 72 25 | ioctl 16 29 | sendfile 40 71 | copy_file_range 326 285
poll 7 - | ppoll 271 73 | select 23 - | pselect6 270 72 | epoll_create 213 - | epoll_create1 291 20
epoll_ctl 233 21 | epoll_wait 232 - | epoll_pwait 281 22 | epoll_pwait2 441 441 | eventfd 284 - | eventfd2 290 19
timerfd_create 283 85 | timerfd_settime 286 86 | timerfd_gettime 287 87 | signalfd 282 - | signalfd4 289 74
socketpair 53 199 | sendto 44 206 | recvfrom 45 207 | sendmsg 46 211 | recvmsg 47 212 | sendmmsg 307 269
recvmmsg 299 243 | shutdown 48 210 | getsockopt 55 209 | setsockopt 54 208 | getsockname 51 204 | getpeername 52 205
mmap 9 222 | mprotect 10 226 | munmap 11 215 | mremap 25 216 | madvise 28 233 | brk 12 214 | msync 26 227
mincore 27 232
clone 56 220 | futex 202 98 | futex_waitv 449 449 | set_robust_list 273 99 | set_tid_address 218 96
rseq 334 293 | membarrier 324 283 | arch_prctl 158 - | sched_yield 24 124 | sched_getaffinity 204 123
sched_getparam 143 121 | sched_getscheduler 145 120 | sched_get_priority_max 146 125
sched_get_priority_min 147 126 | getpriority 140 141 | getcpu 309 168
rt_sigaction 13 134 | rt_sigprocmask 14 135 | rt_sigreturn 15 139 | rt_sigpending 127 136 | rt_sigsuspend 130 133
rt_sigtimedwait 128 137 | sigaltstack 131 132 | kill 62 129 | tgkill 234 131 | pause 34 - | restart_syscall 219 128
nanosleep 35 101 | clock_nanosleep 230 115 | clock_gettime 228 113 | clock_getres 229 114 | gettimeofday 96 169
time 201 - | times 100 153 | alarm 37 - | getitimer 36 102 | setitimer 38 103 | timer_create 222 107
timer_settime 223 110 | timer_gettime 224 108 | timer_getoverrun 225 109 | timer_delete 226 111
getpid 39 172 | getppid 110 173 | gettid 186 178 | getuid 102 174 | geteuid 107 175 | getgid 104 176
getegid 108 177 | getresuid 118 148 | getresgid 120 150 | getgroups 115 158 | getpgid 121 155 | getpgrp 111 -
getsid 124 156 | getrlimit 97 163 | setrlimit 160 164 | prlimit64 302 261 | getrusage 98 165 | sysinfo 99 179
uname 63 160 | prctl 157 167 | getrandom 318 278 | wait4 61 260 | waitid 247 95 | exit 60 93 | exit_group 231 94
"""
_SETUP = """
capset 126 91 | landlock_create_ruleset 444 444 | landlock_add_rule 445 445 | landlock_restrict_self 446 446
pivot_root 155 41 | mount_setattr 442 442 | clone3 435 435 | openat2 437 437
"""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*, which a seccomp filter sees


def table(text: str, machine: str) -> dict[str, int]:
    """Returns numbers on `machine` by name; names that it lacks are left out."""
    column = 1 + list(ARCHITECTURES).index(machine)
    entries = [entry.split() for line in text.splitlines() for entry in line.split("|") if entry.strip()]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


MACHINE = {"arm64": "aarch64", "amd64": "x86_64"}.get(platform.machine().lower(), platform.machine())
SUPPORTED = sys.platform == "linux" and MACHINE in ARCHITECTURES
PROGRAM = table(_PROGRAM, MACHINE) if SUPPORTED else {}
SETUP = table(_SETUP, MACHINE) if SUPPORTED else {}
_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> int:
    """Makes the system call `name` of `SETUP`; raises OSError where it fails."""
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    return _check(name, _libc.syscall(ctypes.c_long(SETUP[name]), *converted))


def prctl(option: int, *args: object) -> int:
    """Calls prctl(2); raises OSError where it fails."""
    padded = [*args, 0, 0, 0, 0][:4]
    converted = [ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in padded]
    return _check(f"prctl {option}", _libc.prctl(ctypes.c_int(option), *converted))


def unshare(flags: int) -> None:
    """Calls unshare(2); raises OSError where it fails."""
    _check("unshare", _libc.unshare(ctypes.c_int(flags)))


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, options: str = "") -> None:
    """Calls mount(2); raises OSError where it fails."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(options) or None)
    _check(f"mount {target}", result)


def umount(target: str, flags: int = 0) -> None:
    """Calls umount2(2); raises OSError where it fails."""
    _check(f"umount {target}", _libc.umount2(os.fsencode(target), ctypes.c_int(flags)))


def _check(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result
