"""Programs that do not come back, and swallow or disarm what should stop them."""

from attacks import QUICK, SLEEPER, Attack, Limits, with_syscalls

TIMEOUT = frozenset({"timeout"})


def _attack(name: str, program: str, limits: Limits = QUICK, verdicts=TIMEOUT, **kwargs) -> Attack:
    return Attack(name, program, verdicts=verdicts, limits=limits, **kwargs)


ATTACKS = (
    _attack(
        "catch_everything",
        '''
"""Loops for ever and catches whatever is raised to stop it."""
def solve(a, b):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
''',
    ),
    _attack(
        "loop_at_import",
        '''
"""Loops for ever before any function exists."""
while True:
    pass
''',
    ),
    _attack(
        "disarmed_alarms",
        '''
"""Switches off every alarm and timer, ignores every signal it can, and loops."""
import signal

signal.alarm(0)
for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
    signal.setitimer(timer, 0)
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def solve(a, b):
    while True:
        pass
''',
    ),
    _attack(
        "own_handlers",
        '''
"""Handles SIGALRM and SIGXCPU itself, by starting the loop again."""
import signal


def solve(*args):
    while True:
        pass


for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGVTALRM, signal.SIGPROF, signal.SIGTERM):
    signal.signal(number, solve)
''',
    ),
    _attack(
        "raised_cpu_limit",
        '''
"""Raises its own CPU limit, soft and hard, before it loops."""
import resource

for limits in [(resource.RLIM_INFINITY, resource.RLIM_INFINITY), (10**6, 10**6)]:
    try:
        resource.setrlimit(resource.RLIMIT_CPU, limits)
    except (OSError, ValueError):
        pass


def solve(a, b):
    while True:
        pass
''',
    ),
    _attack(
        "no_bytecode_between",
        '''
"""One call in C that no Python signal handler interrupts."""
import re


def solve(a, b):
    return re.match('(a|a)*b', 'a' * 100)
''',
    ),
    _attack(
        "sleep_for_ever",
        '''
"""Waits without using the processor, again and again."""
import time


def solve(a, b):
    while True:
        try:
            time.sleep(10**6)
        except BaseException:
            pass
''',
        SLEEPER,
    ),
    _attack(
        "sleep_in_finally",
        '''
"""Fails at once, and waits on the way out."""
import time


def solve(a, b):
    try:
        raise ValueError
    finally:
        time.sleep(10**6)
''',
        SLEEPER,
    ),
    _attack(
        "wait_for_a_lock",
        '''
"""Takes a lock that is never released."""
import threading


def solve(a, b):
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
''',
        SLEEPER,
    ),
    _attack(
        "many_short_waits",
        '''
"""Answers rightly, but each of many calls takes a while: the limit is the program's, not the call's."""
import time


def solve(a, b):
    time.sleep(0.1)
    return 5
''',
        SLEEPER,
        tests=("assert solve(2, 3) == 5",) * 40,
    ),
    _attack(
        "cpu_time_in_threads",
        '''
"""The call waits while four threads compute outside the interpreter's lock."""
import hashlib
import threading


def burn():
    while True:
        hashlib.pbkdf2_hmac('sha256', b'', b'', 1_000_000)


def solve(a, b):
    threads = [threading.Thread(target=burn) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
''',
    ),
    _attack(
        "spin_behind_the_answer",
        '''
"""Computes on in a thread while the test, by many calls, keeps the program alive."""
import threading
import time


def spin():
    while True:
        pass


for _ in range(3):
    threading.Thread(target=spin, daemon=True).start()


def solve(a, b):
    time.sleep(0.01)
    return 5
''',
        tests=("assert solve(2, 3) == 5",) * 2000,
    ),
    _attack(
        "stop_itself",
        '''
"""Stops itself with SIGSTOP, so that only SIGKILL reaches it."""
import os
import signal


def solve(a, b):
    os.kill(os.getpid(), signal.SIGSTOP)
    return 6
''',
        SLEEPER,
        verdicts=frozenset({"timeout", "exception", "wrong_answer"}),
    ),
    _attack(
        "wait_in_the_encoder",
        '''
"""The answer is there at once, but its items never come."""
import time


class Slow(list):
    def __iter__(self):
        time.sleep(10**6)
        yield 5


class Thing:
    def __iter__(self):
        time.sleep(10**6)
        yield 5


def solve(values):
    return Thing()
''',
        SLEEPER,
        tests=("assert list(solve([5])) == [5]",),
    ),
    _attack(
        "hang_at_exit",
        '''
"""Answers wrongly and waits in atexit, in a destructor and in a thread that is no daemon."""
import atexit
import threading
import time

atexit.register(time.sleep, 10**6)
threading.Thread(target=time.sleep, args=[10**6]).start()


class Slow:
    def __del__(self):
        time.sleep(10**6)


kept = Slow()


def solve(a, b):
    return 6
''',
        verdicts=frozenset({"wrong_answer"}),
    ),
    _attack(
        "asks_for_input",
        '''
"""Waits for a line on stdin that nobody types."""


def solve(a, b):
    return input()
''',
        verdicts=frozenset({"exception", "wrong_answer"}),
    ),
    _attack(
        "patched_clock",
        '''
"""Sets back every clock that Python offers, so that no deadline is ever reached."""
import time

start = time.time()
for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time", "time_ns", "monotonic_ns"):
    setattr(time, name, lambda: start)
time.sleep = lambda seconds: None


def solve(a, b):
    while True:
        pass
''',
    ),
    _attack(
        "lowest_priority",
        with_syscalls(
            '''"""Makes itself so slow that its CPU time hardly grows, and then stops that too by SCHED_IDLE."""
import time

for change in (lambda: os.nice(19), lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))):
    try:
        change()
    except OSError:
        pass


def solve(a, b):
    while True:
        time.sleep(0.001)
'''
        ),
        SLEEPER,
    ),
)
