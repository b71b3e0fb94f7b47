"""Threads: thousands, and ones that go on behind an answer."""

from attacks import FAULTS, Attack, Limits

ATTACKS = (
    Attack(
        "ten_thousand_threads",
        '''
"""Starts as many threads as it is given."""
import threading
import time

for _ in range(10_000):
    try:
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    except (RuntimeError, MemoryError):
        break


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer", "memory", "exception", "timeout"}),
        limits=Limits(cpu_seconds=3.0, wall_seconds=10.0),
    ),
    Attack(
        "threads_that_start_threads",
        '''
"""Every thread starts two more."""
import threading
import time


def breed():
    for _ in range(2):
        threading.Thread(target=breed, daemon=True).start()
    time.sleep(60)


threading.excepthook = lambda *args: None
breed_first = threading.Thread(target=breed, daemon=True)
breed_first.start()


def solve(a, b):
    return 6
''',
        verdicts=FAULTS,
    ),
    Attack(
        "thread_that_changes_the_answer",
        '''
"""Answers with a list and changes it afterwards, until it is equal to something."""
import itertools
import threading

answer = [0, 0, 0]


def change():
    for answer[:] in itertools.cycle(itertools.permutations([1, 2, 3])):
        pass


threading.Thread(target=change, daemon=True).start()


def solve(values):
    return answer
''',
        tuple("assert solve([3, 1, 2]) == [1, 2, 3]" for _ in range(200)),
        frozenset({"wrong_answer", "timeout"}),
    ),
    Attack(
        "thread_that_redefines_the_function",
        '''
"""Replaces the function, the builtins and the output stream while tests are running."""
import builtins
import sys
import threading


class Liar:
    __eq__ = lambda self, other: True


def meddle():
    while True:
        globals()["solve"] = lambda *args: Liar()
        builtins.len = builtins.isinstance = builtins.type = lambda *args: True
        sys.stdout = sys.stderr = None


threading.Thread(target=meddle, daemon=True).start()


def solve(a, b):
    return 6
''',
        tuple("assert solve(2, 3) == 5" for _ in range(20)),
    ),
    Attack(
        "exceptions_into_the_main_thread",
        '''
"""Raises SystemExit in the main thread, from another one, at every point where it runs Python code."""
import ctypes
import threading

main = threading.main_thread().ident


def throw():
    while True:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(SystemExit))


threading.Thread(target=throw, daemon=True).start()


def solve(a, b):
    return 6
''',
    ),
    Attack(
        "huge_thread_stacks",
        '''
"""Threads with stacks of 512 MB each, used to the bottom."""
import threading
import time

threading.stack_size(512 << 20)
for _ in range(64):
    try:
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
    except (RuntimeError, MemoryError):
        break


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer", "memory", "exception"}),
    ),
)
