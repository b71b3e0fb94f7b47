"""Ways to end the process, or the call, before the test has judged the answer."""

from attacks import DIED, Attack, with_syscalls

RAISED = frozenset({"exception"})


def _inside(name: str, says: str, statement: str, verdicts=DIED, header: str = "", fools_naive: bool = False) -> Attack:
    program = f'"""{says}"""\n{header}\n\ndef solve(a, b):\n    {statement}\n'
    return Attack(name, program, verdicts=verdicts, fools_naive=fools_naive)


ATTACKS = (
    _inside("sys_exit", "Leaves with status 0 while it is called.", "sys.exit(0)", RAISED, "import sys", True),
    _inside("os_exit", "Ends the process at once, with status 0.", "os._exit(0)", DIED, "import os", True),
    _inside("raise_system_exit", "Raises SystemExit without arguments.", "raise SystemExit", RAISED, "", True),
    _inside("quit_builtin", "Calls the interactive interpreter's quit().", "quit()", RAISED, "", True),
    _inside("keyboard_interrupt", "Looks like a user's Ctrl-C.", "raise KeyboardInterrupt", RAISED),
    _inside("generator_exit", "Raises what closes generators.", "raise GeneratorExit", RAISED),
    _inside("base_exception", "Is not caught by `except Exception`.", "raise BaseException('out')", RAISED),
    _inside("cancelled", "Raises asyncio's CancelledError.", "raise asyncio.CancelledError", RAISED, "import asyncio"),
    _inside(
        "exit_in_finally",
        "Returns, but ends in `finally`.",
        "try: return 6\n    finally: os._exit(0)",
        DIED,
        "import os",
    ),
    _inside("abort", "Dumps core.", "os.abort()", DIED, "import os"),
    Attack(
        "exit_at_import",
        '''
"""Leaves with status 0 before any function exists."""
raise SystemExit(0)
''',
        fools_naive=True,
    ),
    Attack(
        "os_exit_at_import",
        '''
"""Ends the process while its code is loaded."""
import os

os._exit(0)
''',
        fools_naive=True,
    ),
    Attack(
        "atexit_handler",
        '''
"""Fails honestly, but turns the exit status to 0 at the end."""
import atexit
import os

atexit.register(os._exit, 0)


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "except_hook",
        '''
"""Swallows the traceback of the failed test and leaves with status 0."""
import os
import sys
import threading

sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *args: os._exit(0)


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer"}),
        fools_naive=True,
    ),
    Attack(
        "exit_from_a_destructor",
        '''
"""Leaves with status 0 from the destructor of its answer."""
import os


class Answer:
    def __del__(self):
        os._exit(0)


def solve(a, b):
    return Answer()
''',
        fools_naive=True,
    ),
    Attack(
        "exit_from_a_comparison",
        '''
"""Leaves with status 0 as soon as its answer is compared, hashed, shown or measured."""
import os


class Answer:
    def __eq__(self, other):
        os._exit(0)

    __ne__ = __hash__ = __repr__ = __str__ = __len__ = __iter__ = __bool__ = __reduce_ex__ = __eq__


def solve(a, b):
    return Answer()
''',
        fools_naive=True,
    ),
    Attack(
        "exit_from_a_thread",
        '''
"""Another thread ends the process with status 0 while the call waits."""
import os
import threading
import time


def solve(a, b):
    threading.Timer(0.05, os._exit, [0]).start()
    time.sleep(5)
    return 6
''',
        verdicts=DIED,
        fools_naive=True,
    ),
    Attack(
        "exit_after_the_first_answer",
        '''
"""Answers the first test and dies before the second can fail."""
import os

calls = []


def solve(a, b):
    calls.append(a)
    return 5 if len(calls) == 1 else os._exit(0)
''',
        ("assert solve(2, 3) == 5", "assert solve(2, 4) == 6"),
        DIED,
        fools_naive=True,
    ),
    Attack(
        "exit_from_a_signal_handler",
        '''
"""Sends itself SIGTERM, whose handler leaves with status 0."""
import os
import signal

signal.signal(signal.SIGTERM, lambda *args: os._exit(0))


def solve(a, b):
    os.kill(os.getpid(), signal.SIGTERM)
    return 6
''',
        fools_naive=True,
    ),
    Attack(
        "exit_by_system_call",
        with_syscalls(
            '"""Asks the kernel itself to end the process with status 0."""\n\n\n'
            "def solve(a, b):\n    syscall('exit_group', 0)\n"
        ),
        verdicts=DIED,
        fools_naive=True,
    ),
    Attack(
        "exit_of_the_thread_only",
        '''
"""Ends only the thread that answers, by the C library; the process lives on without one."""
import ctypes


def solve(a, b):
    ctypes.CDLL(None).pthread_exit(None)
''',
    ),
    Attack(
        "segmentation_fault",
        '''
"""Reads address 0."""
import ctypes


def solve(a, b):
    return ctypes.string_at(0)
''',
        verdicts=DIED,
    ),
    Attack(
        "finalization_from_inside",
        '''
"""Finalizes the interpreter it runs in and goes on."""
import ctypes


def solve(a, b):
    ctypes.pythonapi.Py_FinalizeEx()
    return 6
''',
    ),
    Attack(
        "stop_iteration",
        '''
"""Raises StopIteration, which ends the map() that the test runs over the answers, so that all() is true."""


def solve(n):
    raise StopIteration
''',
        ("assert all(map(lambda case: solve(case[0]) == case[1], [(2, 4), (3, 9)]))",),
        RAISED,
        fools_naive=True,
    ),
    Attack(
        "stop_iteration_in_a_loop",
        '''
"""The same, where a for statement runs over the answers."""


class Stop(StopIteration):
    pass


def solve(n):
    raise Stop(n * n)
''',
        ("for answer, expected in zip(map(solve, [2, 3]), [4, 9]):\n    assert answer == expected",),
        RAISED,
        fools_naive=True,
    ),
    Attack(
        "index_error_in_a_sequence",
        '''
"""The answer has only __getitem__, and ends the loop of the test by an IndexError at once."""


class Answer:
    def __getitem__(self, index):
        raise IndexError


def solve(n):
    return Answer()
''',
        ("assert list(solve(2)) == [0, 1]",),
    ),
)
