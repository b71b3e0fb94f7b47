"""What a program could leave behind for the next one: in files, in the kernel, in the interpreter it was forked from.

Every program here answers wrongly; what it left is what the next program's own probe (`test_attacks.py`) finds.
"""

from attacks import Attack, with_syscalls

FAILED = frozenset({"wrong_answer", "exception", "violation"})


def _attack(name: str, says: str, body: str, verdicts=FAILED) -> Attack:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    program = f'"""{says}"""\nimport os, site, struct, sys, sysconfig\n\n\ndef solve(a, b):\n{lines}    return 6\n'
    return Attack(name, with_syscalls(program) if "syscall(" in body else program, verdicts=verdicts)


# Each of these lines is tried by itself.
def _damaging(name: str, says: str, body: str) -> Attack:
    tries = "".join(
        f"try:\n    {line}\nexcept (OSError, ImportError):\n    pass\n" for line in body.strip().splitlines()
    )
    return _attack(name, says, tries)


ATTACKS = (
    _damaging(
        "start_up_files",
        "Plants files that every later interpreter would run at its start.",
        """
open(os.path.join(sysconfig.get_paths()["purelib"], "@MARK@.pth"), "w").write("import os")
open(os.path.join(sysconfig.get_paths()["purelib"], "sitecustomize.py"), "x").write("# @MARK@")
open(os.path.join(site.getusersitepackages(), "usercustomize.py"), "x").write("# @MARK@")
open("sitecustomize.py", "w").write("raise SystemExit(0)")
open("../sitecustomize.py", "x").write("# @MARK@")
""",
    ),
    _damaging(
        "poisoned_caches",
        "Plants compiled modules in the caches of the library and of the sandbox.",
        """
open(os.path.join(os.path.dirname(os.__file__), "__pycache__", "@MARK@.pyc"), "wb").write(b"x")
open(os.path.join("@PROJECT@", "wmtp", "sandbox", "__pycache__", "@MARK@.pyc"), "wb").write(b"x")
os.utime(os.__file__)
""",
    ),
    _damaging(
        "shadowing_modules",
        "Leaves modules named like the library's in its folder.",
        """
open("random.py", "w").write("raise SystemExit(0)")
open("heapq.py", "w").write("raise SystemExit(0)")
os.mkdir("statistics")
os.mkdir("__pycache__")
""",
    ),
    _damaging(
        "process_settings",
        "Changes what a forked process inherits: folder, file mask, priority, processors, limits.",
        """
os.chdir("/")
os.umask(0o777)
os.nice(19)
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.environ["PYTHONSTARTUP"] = "@MARK@"
os.putenv("PYTHONPATH", "@MARK@")
__import__("resource").setrlimit(__import__("resource").RLIMIT_NOFILE, (3, 3))
__import__("signal").alarm(1)
""",
    ),
    _damaging(
        "module_state",
        "Changes the state of the library's modules, which a program run in the same interpreter would see.",
        """
import math; math.pi = 3; math.sqrt = None
import json; json.dumps = None
import random; random.seed(0); random.random = lambda: 4
import decimal; decimal.getcontext().prec = 1
import collections; collections.Counter = None
import builtins; builtins.len = lambda thing: 5; builtins.print = None
sys.path.insert(0, "@MARK@"); sys.setrecursionlimit(60); sys.modules["heapq"] = None
import locale; locale.setlocale(locale.LC_ALL, "C")
import gc; gc.disable()
""",
    ),
    _attack("message_queue", "Makes a System V message queue.", "syscall('msgget', 0x574D5450, 0o1600)"),
    _attack("semaphores", "Makes System V semaphores.", "syscall('semget', 0x574D5450, 1, 0o1600)"),
    _attack(
        "posix_message_queue", "Makes a message queue under a name.", "syscall('mq_open', b'@MARK@', 0o102, 0o600, 0)"
    ),
    _attack(
        "shared_offsets",
        "Moves the offset and the flags of every descriptor it has: they may be shared with who forked it.",
        """
import fcntl
for descriptor in range(256):
    for change in (
        lambda: fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND | os.O_ASYNC),
        lambda: os.lseek(descriptor, 1 << 40, os.SEEK_SET),
        lambda: os.ftruncate(descriptor, 0),
        lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB),
        lambda: fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getppid()),
    ):
        try:
            change()
        except OSError:
            pass
""",
    ),
)
