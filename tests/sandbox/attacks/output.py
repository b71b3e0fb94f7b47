"""Floods of output, on the standard streams and on every other descriptor."""

from attacks import Attack, Limits

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=10.0, output_bytes=1 << 20)
FLOOD = frozenset({"output_limit", "timeout", "exception", "violation"})
EMPTY = (("", "1"),)


def _attack(name: str, program: str, verdicts=FLOOD, **kwargs) -> Attack:
    return Attack(name, program, verdicts=verdicts, limits=LIMITS, **kwargs)


ATTACKS = (
    _attack(
        "print_for_ever",
        '''
"""Prints without end while it is called."""


def solve(a, b):
    while True:
        try:
            print('x' * 100_000)
        except Exception:
            pass
''',
    ),
    _attack(
        "print_at_import",
        '''
"""Prints without end before any function exists."""
while True:
    print("passed" * 10_000)
''',
    ),
    _attack(
        "write_for_ever",
        '''
"""Writes to the descriptors of stdout and stderr past Python's streams."""
import os


def solve(a, b):
    while True:
        for descriptor in (1, 2):
            try:
                os.write(descriptor, b'x' * 100_000)
            except OSError:
                pass
''',
    ),
    _attack(
        "write_everywhere",
        r'''
"""Writes to every descriptor that takes it, the answer channel too."""
import os


def solve(a, b):
    while True:
        for descriptor in range(256):
            try:
                os.set_blocking(descriptor, False)
                os.write(descriptor, b'{"answer": 5}\n' * 1000)
            except OSError:
                pass
''',
    ),
    _attack(
        "flood_by_threads",
        '''
"""Twenty threads print, the call itself waits."""
import sys
import threading


def flood():
    while True:
        sys.stderr.write('x' * 10_000)


def solve(a, b):
    threads = [threading.Thread(target=flood) for _ in range(20)]
    [t.start() for t in threads]
    [t.join() for t in threads]
''',
    ),
    _attack(
        "warnings_and_tracebacks",
        '''
"""Lets the interpreter itself write: a warning and a dump of all frames, without end."""
import faulthandler
import sys
import warnings

warnings.simplefilter("always")


def solve(a, b):
    while True:
        warnings.warn('x' * 1000)
        faulthandler.dump_traceback(sys.__stderr__)
''',
    ),
    _attack(
        "stdio_flood",
        '''
"""A contest program that prints without end."""
while True:
    print(1)
''',
        frozenset({"output_limit"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_flood_in_one_write",
        r'''
"""64 MB in one write, with the right answer before it."""
import os

os.write(1, b"1\n" + b" " * (64 << 20))
''',
        frozenset({"output_limit"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_flood_of_stderr",
        '''
"""Floods stderr, whose text nobody judges, and never prints."""
import sys

while True:
    sys.stderr.write("x" * 10_000)
''',
        frozenset({"output_limit", "timeout"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_slow_flood",
        '''
"""A byte at a time, flushed, for the judge that reads byte by byte."""
import os

while True:
    os.write(1, b"1 ")
''',
        frozenset({"output_limit", "timeout", "wrong_answer"}),
        stdio=EMPTY,
    ),
)
