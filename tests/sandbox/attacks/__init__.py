"""Programs that try to fool, disturb or outlive the judge, one module per family.

Every program begins with a docstring that says what it tries. It is written so that it answers *rightly* only if that
has succeeded (a file read that must not be readable, a process started that must not start): a verdict "passed" is then
a hole. Where success would be damage instead, it answers wrongly, and the test looks for the damage.

The programs are safe to run where a layer is broken: whatever would hit processes of others sends SIGURG, which the
kernel permits or refuses like SIGKILL and which nobody dies of; forks, memory and files are bounded; only files planted
for the purpose are overwritten. `@NAME@` in a program is replaced by the test (see `test_attacks.py`).
"""

from dataclasses import dataclass

from wmtp.sandbox import AssertionJob, Limits, StdioJob, StdioTest

ADD = ("assert solve(2, 3) == 5",)
SORT = ("assert solve([3, 1, 2]) == [1, 2, 3]",)
SECRET = ("assert secret() == 914273",)  # a value that only a leak could reveal

# What a program of a model can earn. "harness_error" is not among them: it is never the model's fault.
FAULTS = frozenset({"wrong_answer", "exception", "timeout", "memory", "output_limit", "violation"})
DIED = frozenset({"exception", "violation"})  # the process ended without an answer

QUICK = Limits(cpu_seconds=1.0, wall_seconds=10.0)
SLEEPER = Limits(cpu_seconds=1.0, wall_seconds=0.4)  # for programs that wait instead of computing


@dataclass(frozen=True)
class Attack:
    """A program, the job it is judged in, and the verdicts that are right for it.

    fools_naive: the program passes where code and tests run in one interpreter and the exit code is the verdict.
    stdio: (input, expected output) pairs; the job is then a StdioJob.
    """

    name: str
    program: str
    tests: tuple[str, ...] = ADD
    verdicts: frozenset[str] = FAULTS
    setup: str = ""
    preamble: str = ""
    entry_point: str | None = None
    stdio: tuple[tuple[str, str], ...] = ()
    limits: Limits = QUICK
    fools_naive: bool = False

    def job(self, places: dict[str, str]) -> AssertionJob | StdioJob:
        """The job, with `@NAME@` in the program replaced by places[NAME]."""
        program = self.program.lstrip("\n")
        for name, value in places.items():
            program = program.replace(f"@{name}@", value)
        if self.stdio:
            return StdioJob(program, tuple(StdioTest(*pair) for pair in self.stdio), limits=self.limits)
        return AssertionJob(
            program=program,
            tests=self.tests,
            setup=self.setup,
            preamble=self.preamble,
            entry_point=self.entry_point,
            limits=self.limits,
        )


# Raw system calls for the programs below: `syscall("clone3", ...)` raises OSError like the functions of `os`.
SYSCALLS = r"""
import ctypes, os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
_X86_64, _AARCH64 = range(2)
_NUMBERS = {
    "ioctl": (16, 29), "mremap": (25, 216), "shmget": (29, 194), "clone": (56, 220), "fork": (57, None),
    "vfork": (58, None), "execve": (59, 221), "exit_group": (231, 94), "kill": (62, 129), "semget": (64, 190),
    "msgget": (68, 186), "fcntl": (72, 25), "ptrace": (101, 117), "syslog": (103, 116), "rt_sigqueueinfo": (129, 138),
    "personality": (135, 92), "setpriority": (141, 140), "pivot_root": (155, 41), "mount": (165, 40),
    "sethostname": (170, 161), "tkill": (200, 130), "sched_setaffinity": (203, 122), "tgkill": (234, 131),
    "mq_open": (240, 180), "waitid": (247, 95), "add_key": (248, 217), "keyctl": (250, 219), "ioprio_set": (251, 30),
    "unshare": (272, 97), "move_pages": (279, 239), "fallocate": (285, 47), "rt_tgsigqueueinfo": (297, 240),
    "perf_event_open": (298, 241), "prlimit64": (302, 261), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "setns": (308, 268), "process_vm_readv": (310, 270), "kcmp": (312, 272),
    "seccomp": (317, 277), "memfd_create": (319, 279), "bpf": (321, 280), "execveat": (322, 281),
    "userfaultfd": (323, 282), "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "open_tree": (428, 428),
    "fsopen": (430, 430), "pidfd_open": (434, 434), "clone3": (435, 435), "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440), "memfd_secret": (447, 447),
}


def syscall(name, *arguments):
    number = _NUMBERS[name][_AARCH64 if os.uname().machine == "aarch64" else _X86_64]
    if number is None:
        raise OSError(38, f"no {name} on this machine")
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


def parent():
    pid = os.getppid()
    if pid <= 1:  # a pid namespace hides it, and 0 would mean our own process group
        raise PermissionError("the parent cannot be seen")
    return pid
"""


def with_syscalls(program: str) -> str:
    """The program with `syscall`, `libc` and `parent` defined after its docstring."""
    docstring_end = program.index('"""', program.index('"""') + 3) + 3
    return program[:docstring_end] + "\n" + SYSCALLS + program[docstring_end:]


from attacks import (  # noqa: E402  (the families use the names above)
    answers,
    channel,
    exits,
    expression,
    files,
    forks,
    frames,
    lying_objects,
    memory,
    names,
    output,
    persistence,
    proc_and_secrets,
    signals,
    sockets,
    sources,
    stdio,
    tampering,
    threads,
    timeouts,
)

FAMILIES = (
    lying_objects,
    expression,
    frames,
    names,
    tampering,
    exits,
    answers,
    timeouts,
    signals,
    threads,
    forks,
    files,
    proc_and_secrets,
    sockets,
    memory,
    output,
    channel,
    persistence,
    stdio,
    sources,
)
ATTACKS = tuple(attack for family in FAMILIES for attack in family.ATTACKS)
