"""Contest programs whose output must not count as right."""

from attacks import DIED, QUICK, SLEEPER, Attack

WRONG = frozenset({"wrong_answer"})
RAISED = frozenset({"exception"})
TIMEOUT = frozenset({"timeout"})
SUM = (("2 3\n", "5\n"),)
THOUSAND = (("1000\n", "1000\n"),)


def _attack(name: str, program: str, verdicts, stdio=SUM, limits=QUICK) -> Attack:
    return Attack(name, program, verdicts=verdicts, stdio=stdio, limits=limits)


ATTACKS = (
    _attack(
        "prints_nothing",
        '''
"""Prints nothing and leaves with status 0."""
raise SystemExit(0)
''',
        WRONG,
    ),
    _attack(
        "right_on_stderr",
        '''
"""Prints the right answer on stderr."""
import sys

print(5, file=sys.stderr)
''',
        WRONG,
    ),
    _attack(
        "several_answers",
        '''
"""Prints every answer it can think of."""
print(*range(10))
''',
        WRONG,
    ),
    _attack(
        "answer_and_more",
        '''
"""Prints the right answer and another word."""
print(5, "or so")
''',
        WRONG,
    ),
    _attack(
        "raises_after_output",
        '''
"""Prints the right answer and then fails."""
print(5, flush=True)
raise ValueError
''',
        RAISED,
    ),
    _attack(
        "raises_in_a_deep_frame",
        '''
"""Prints the right answer and then recurses without end."""
print(5, flush=True)


def f():
    f()


f()
''',
        RAISED,
    ),
    _attack(
        "crashes_after_output",
        '''
"""Prints the right answer and then reads address 0."""
import ctypes

print(5, flush=True)
ctypes.string_at(0)
''',
        DIED,
    ),
    _attack(
        "loops_after_output",
        '''
"""Prints the right answer and then loops for ever."""
print(5, flush=True)
while True:
    pass
''',
        TIMEOUT,
    ),
    _attack(
        "waits_in_a_thread",
        '''
"""Prints the right answer, and a thread that is no daemon keeps it alive."""
import threading
import time

print(5, flush=True)
threading.Thread(target=time.sleep, args=[10**6]).start()
''',
        TIMEOUT,
        limits=SLEEPER,
    ),
    _attack(
        "waits_at_exit",
        '''
"""Prints the right answer and waits in atexit."""
import atexit
import time

print(5, flush=True)
atexit.register(time.sleep, 10**6)
''',
        TIMEOUT,
        limits=SLEEPER,
    ),
    _attack(
        "wrong_at_exit",
        '''
"""Prints the right answer, and more at its very end."""
import atexit

atexit.register(print, 6)
print(5)
''',
        WRONG,
    ),
    _attack(
        "killed_after_output",
        '''
"""Prints the right answer and kills itself."""
import os
import signal

print(5, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
''',
        DIED,
    ),
    _attack(
        "failing_status",
        '''
"""Prints a wrong answer and leaves with a status other than 0."""
print(6)
raise SystemExit(7)
''',
        frozenset({"wrong_answer", "exception"}),
    ),
    _attack(
        "underscores_in_an_int",
        '''
"""Prints an int as Python, but no checker, reads it."""
print("1_000")
''',
        WRONG,
        THOUSAND,
    ),
    _attack(
        "digits_of_another_script",
        r'''
"""Prints digits that int() takes for 1000."""
print("\u0661\u0660\u0660\u0660")
''',
        WRONG,
        THOUSAND,
    ),
    _attack(
        "full_width_digits",
        r'''
"""The same with full-width digits."""
print("\uff11\uff10\uff10\uff10")
''',
        WRONG,
        THOUSAND,
    ),
    _attack(
        "float_for_an_int",
        '''
"""Prints a float where an int is expected."""
print("1000.0")
''',
        WRONG,
        THOUSAND,
    ),
    _attack(
        "exponent_for_an_int",
        '''
"""Prints 1e3."""
print("1e3")
''',
        WRONG,
        THOUSAND,
    ),
    _attack(
        "off_by_one_beyond_doubles",
        '''
"""Prints a large int that is equal to the right one as a double only."""
print(9007199254740992)
''',
        WRONG,
        (("", "9007199254740993"),),
    ),
    _attack(
        "not_a_number",
        '''
"""Prints nan, which is within every tolerance if it is compared carelessly."""
print("nan")
''',
        WRONG,
        (("", "0.5"),),
    ),
    _attack(
        "infinity",
        '''
"""Prints an infinity where a number is expected."""
print("inf")
''',
        WRONG,
        (("", "1e308"),),
    ),
    _attack(
        "no_text",
        r'''
"""Prints bytes that are no text, and NULs."""
import os

os.write(1, b"5\x00\xff\xfe\n")
''',
        WRONG,
    ),
    _attack(
        "null_before",
        r'''
"""Hides another answer behind a NUL."""
import os

os.write(1, b"5\x006\n")
''',
        WRONG,
    ),
    _attack(
        "long_digits",
        '''
"""Prints an int of 100,000 digits, more than int() reads."""
print("1" * 100_000)
''',
        WRONG,
    ),
    _attack(
        "digits_and_a_letter",
        '''
"""Prints a word that looks like a number for a long time, for a pattern that tries every way to read it."""
print('1' * 400_000 + 'x')
''',
        WRONG,
    ),
    _attack(
        "digits_of_a_double",
        '''
"""Prints as many digits of a number as it may."""
print("1" * 4_000_000 + "." + "3" * 4_000_000)
''',
        WRONG,
    ),
    _attack(
        "closed_stdout",
        '''
"""Closes its output before it prints."""
import os

os.close(1)
print(5)
''',
        frozenset({"wrong_answer", "exception"}),
    ),
    _attack(
        "output_into_input",
        '''
"""Writes the answer into the file it reads from, and cuts it."""
import os

for change in (lambda: os.pwrite(0, b"5 5", 0), lambda: os.ftruncate(0, 0)):
    try:
        change()
    except OSError:
        pass
print(6)
''',
        WRONG,
        (("2 3\n", "5\n"), ("2 4\n", "6\n")),
    ),
    _attack(
        "state_between_tests",
        '''
"""Counts, in a file, how often it was run, to know later tests by their number."""
import os

name = "count"
count = len(open(name).read()) if os.path.exists(name) else 0
open(name, "a").write("x")
print([5, 6][count])
''',
        WRONG,
        (("", "5"), ("", "6")),
    ),
    _attack(
        "looks_for_the_expected_output",
        '''
"""Searches every module and every open file for the expected output."""
import gc
import os
import sys

found = set()
for thing in gc.get_objects():
    try:
        text = repr(thing) if isinstance(thing, (dict, list, tuple)) else ''
    except BaseException:
        continue
    if 'wmtp-' + 'expected-' in text:
        found.add(text.split('wmtp-' + 'expected-')[1][:6])
for descriptor in range(64):
    try:
        os.set_blocking(descriptor, False)
        text = os.read(descriptor, 1 << 16)
    except OSError:
        continue
    if b'wmtp-' + b'expected-' in text:
        found.add(text.split(b'wmtp-' + b'expected-')[1][:6].decode())
print(*['wmtp-' + 'expected-' + f for f in found])
''',
        WRONG,
        (("", "wmtp-expected-914273\n"),),
    ),
    _attack(
        "verdict_by_descriptor",
        r'''
"""Writes what a harness may take for a verdict to every descriptor but its output."""
import json
import os

for descriptor in range(3, 256):
    for text in (b"passed\n", json.dumps({"verdict": "passed", "ok": True}).encode(), bytes(64)):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, text)
        except OSError:
            pass
print(6)
''',
        frozenset({"wrong_answer", "violation", "exception", "output_limit"}),
    ),
    _attack(
        "closed_descriptors",
        '''
"""Closes every descriptor but its output, and then prints a wrong answer."""
import os

os.closerange(2, 1024)
os.close(0)
print(6)
''',
        frozenset({"wrong_answer", "violation", "exception"}),
    ),
    _attack(
        "replaced_descriptors",
        '''
"""Puts its output in the place of every other descriptor."""
import os

for descriptor in range(2, 256):
    os.dup2(1, descriptor)
print(6)
''',
        frozenset({"wrong_answer", "violation", "exception"}),
    ),
    _attack(
        "exit_in_a_thread",
        '''
"""A thread ends the process with status 0 in the middle of the output."""
import os
import threading

print(6, flush=True)
threading.Thread(target=os._exit, args=[0]).start()
''',
        frozenset({"wrong_answer", "exception"}),
    ),
    _attack(
        "stops_itself",
        '''
"""Prints the right answer and stops itself."""
import os
import signal

print(5, flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
raise ValueError
''',
        frozenset({"timeout", "exception"}),
        limits=SLEEPER,
    ),
    _attack(
        "nested_report",
        '''
"""Prints the right answer and reports an error whose text is nested deeper than any text can be written out."""
import os

data = b'{"raised":{"text":' + b"[" * 3000 + b"]" * 3000 + b"}}"
data = len(data).to_bytes(4, "big") + data
while data:
    data = data[os.write(3, data) :]
print(5, flush=True)
os._exit(0)
''',
        RAISED,
    ),
)
