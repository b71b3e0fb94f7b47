"""Signals, and all that works like one, to the parent, the group and everybody else.

What reaches only the parent, a process of the pool, is sent as SIGKILL or SIGSTOP; what reaches a crowd, as SIGURG.
"""

from attacks import Attack, with_syscalls

REFUSED = frozenset({"exception", "violation"})


def _attack(name: str, says: str, body: str, verdicts=REFUSED) -> Attack:
    """A program that answers 5, rightly, if `body` raises nothing."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    header = f'"""{says}"""\nimport fcntl, os, resource, signal, socket, struct, time\n\n\ndef solve(a, b):\n'
    return Attack(name, with_syscalls(header + lines + "    return 5\n"), verdicts=verdicts)


ATTACKS = (
    _attack("kill_the_parent", "Kills the process it was forked from.", "os.kill(parent(), signal.SIGKILL)"),
    _attack("stop_the_parent", "Stops the process it was forked from.", "os.kill(parent(), signal.SIGSTOP)"),
    _attack("interrupt_the_parent", "Sends it SIGINT.", "os.kill(parent(), signal.SIGINT)"),
    _attack("kill_everybody", "Signals every process it may.", "os.kill(-1, signal.SIGURG)"),
    _attack(
        "kill_init",
        "Signals process 1.",
        """
if os.getpid() != 1: os.kill(1, signal.SIGURG)
else: parent()
""",
    ),
    _attack(
        "kill_the_group",
        "Signals its process group.",
        """
os.kill(0, signal.SIGURG)
os.killpg(0, signal.SIGURG)
""",
    ),
    _attack("kill_the_parents_group", "Signals the parent's group.", "os.killpg(os.getpgid(parent()), signal.SIGURG)"),
    _attack(
        "kill_the_neighbours",
        "Signals every process with a number near its own.",
        """
hits = 0
for pid in range(max(2, os.getpid() - 200), os.getpid() + 50):
    try:
        if pid != os.getpid():
            os.kill(pid, signal.SIGURG)
            hits += 1
    except OSError:
        pass
if not hits:
    raise PermissionError
""",
    ),
    _attack(
        "kill_from_c",
        "Kills the parent through the C library.",
        "if libc.kill(parent(), 9): raise OSError(ctypes.get_errno(), 'kill')",
    ),
    _attack("kill_by_system_call", "Kills the parent without the C library.", "syscall('kill', parent(), 9)"),
    _attack("kill_a_thread", "Kills the parent by its first thread.", "syscall('tgkill', parent(), parent(), 9)"),
    _attack("kill_a_task", "The same by the older call.", "syscall('tkill', parent(), 9)"),
    _attack(
        "queue_a_signal",
        "Kills the parent by a queued signal.",
        """
info = struct.pack('iii', 9, 0, -1) + bytes(116)
syscall('rt_sigqueueinfo', parent(), 9, info)
""",
    ),
    _attack(
        "queue_a_thread_signal",
        "Kills the parent by a signal queued for its first thread.",
        """
info = struct.pack('iii', 9, 0, -1) + bytes(116)
syscall('rt_tgsigqueueinfo', parent(), parent(), 9, info)
""",
    ),
    _attack(
        "kill_by_descriptor",
        "Kills the parent through a pidfd.",
        """
pidfd = syscall('pidfd_open', parent(), 0)
syscall('pidfd_send_signal', pidfd, 9, 0, 0)
""",
    ),
    _attack("see_by_descriptor", "Opens a pidfd of the parent.", "syscall('pidfd_open', parent(), 0)"),
    _attack(
        "signal_by_file_owner",
        "Lets the kernel send a fatal signal to the owner of a pipe that gets data: the parent.",
        """
reader, writer = os.pipe()
fcntl.fcntl(reader, fcntl.F_SETOWN, parent())
fcntl.fcntl(reader, 10, signal.SIGKILL)  # F_SETSIG
fcntl.fcntl(reader, fcntl.F_SETFL, fcntl.fcntl(reader, fcntl.F_GETFL) | os.O_ASYNC)
os.write(writer, b"x")
time.sleep(0.1)
return 6  # refused or not; that the parent is alive is seen by the next program
""",
        REFUSED | {"wrong_answer"},
    ),
    _attack(
        "signal_by_socket_owner",
        "The same through an ioctl on a socket.",
        """
left, right = socket.socketpair()
fcntl.ioctl(left, 0x8901, struct.pack("i", parent()))  # FIOSETOWN
fcntl.fcntl(left, 10, signal.SIGKILL)  # F_SETSIG
fcntl.ioctl(left, 0x5452, struct.pack("i", 1))  # FIOASYNC
right.send(b"x")
time.sleep(0.1)
return 6
""",
        REFUSED | {"wrong_answer"},
    ),
    _attack(
        "limit_the_parent",
        "Sets the parent's limit on open files to 0.",
        "resource.prlimit(parent(), resource.RLIMIT_NOFILE, (0, 0))",
    ),
    _attack(
        "limit_the_parents_cpu",
        "Sets the parent's CPU limit so low that the kernel kills it.",
        "resource.prlimit(parent(), resource.RLIMIT_CPU, (0, 1))",
    ),
    _attack(
        "slow_the_parent_down",
        "Gives the parent, then the whole user, the lowest priority.",
        """
os.setpriority(os.PRIO_PROCESS, parent(), 19)
os.setpriority(os.PRIO_PGRP, 0, 19)
""",
    ),
    _attack(
        "move_the_parent",
        "Binds the parent to one processor.",
        "os.sched_setaffinity(parent(), [min(os.sched_getaffinity(0))])",
    ),
    _attack(
        "idle_the_parent",
        "Lets the parent run only when nobody else does.",
        "os.sched_setscheduler(parent(), os.SCHED_IDLE, os.sched_param(0))",
    ),
    _attack(
        "idle_the_parents_disk", "Does the same to its input and output.", "syscall('ioprio_set', 1, parent(), 3 << 13)"
    ),
    _attack("trace_the_parent", "Seizes the parent as a debugger.", "syscall('ptrace', 0x4206, parent(), 0, 0)"),
    _attack(
        "read_the_parents_memory",
        "Reads a page of the parent's memory at an address that it shares since the fork.",
        """
buffer = ctypes.create_string_buffer(64)
local = struct.pack("QQ", ctypes.addressof(buffer), 64)
remote = struct.pack("QQ", id(os) & -16, 64)
syscall("process_vm_readv", parent(), local, 1, remote, 1, 0)
""",
    ),
    _attack(
        "take_the_parents_files",
        "Copies a file descriptor out of the parent.",
        """
pidfd = syscall('pidfd_open', parent(), 0)
syscall('pidfd_getfd', pidfd, 0, 0)
""",
    ),
    _attack(
        "move_the_parents_pages",
        "Asks where the parent's memory lies.",
        "syscall('move_pages', parent(), 0, 0, 0, 0, 0)",
    ),
    _attack(
        "compare_with_the_parent",
        "Compares kernel objects with the parent's.",
        "syscall('kcmp', os.getpid(), parent(), 1, 0, 0)",
    ),
    _attack(
        "join_the_parents_group",
        "Moves itself into another process group of the session, to be hit by its signals or to hide.",
        """
os.setpgid(0, os.getpgid(parent()))
if os.getpgid(0) == os.getpid(): raise PermissionError
return 6
""",
        REFUSED | {"wrong_answer"},
    ),
)
