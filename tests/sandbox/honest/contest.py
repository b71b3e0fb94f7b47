"""Contest programs: every way to read stdin and write stdout that is in use."""

from honest import Honest

SUM = (("2 3\n", "5\n"), ("-1 1", "0"), ("10 20\n\n", " 30 \n\n"))
LINES = (("3\n1 2\n3 4\n5 6\n", "3\n7\n11\n"), ("1\n10 20", "30"))
DEEP = (("5000\n", "5000\n"),)


def _sum(name: str, program: str, **kwargs) -> Honest:
    return Honest(name, program, stdio=SUM, **kwargs)


def _lines(name: str, program: str, **kwargs) -> Honest:
    return Honest(name, program, stdio=LINES, **kwargs)


PROGRAMS = (
    _lines(
        "input_line_by_line",
        """
for _ in range(int(input())):
    a, b = map(int, input().split())
    print(a + b)
""",
    ),
    _lines(
        "input_then_the_rest",
        """
import sys

n = int(input())
rest = sys.stdin.read().split()
for i in range(n):
    print(int(rest[2 * i]) + int(rest[2 * i + 1]))
""",
    ),
    _lines(
        "input_is_readline",
        r"""
import sys

input = sys.stdin.readline
print = sys.stdout.write
for _ in range(int(input())):
    print(str(sum(map(int, input().split()))) + '\n')
""",
    ),
    _lines(
        "stdin_buffer",
        """
import sys

data = sys.stdin.buffer.read().split()
for i in range(int(data[0])):
    print(int(data[2 * i + 1]) + int(data[2 * i + 2]))
""",
    ),
    _lines(
        "iteration_over_stdin",
        """
import sys

next(sys.stdin)
for line in sys.stdin:
    print(sum(map(int, line.split())))
""",
    ),
    _lines(
        "open_descriptor_zero",
        """
lines = open(0).read().splitlines()
for line in lines[1:]:
    print(sum(map(int, line.split())))
""",
    ),
    _lines(
        "fileinput_module",
        """
import fileinput

for number, line in enumerate(fileinput.input()):
    if number:
        print(sum(map(int, line.split())))
""",
    ),
    _lines(
        "read_by_size",
        """
import io
import os

input = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline
for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    ),
    _lines(
        "fast_io_template",
        """
import atexit
import io
import os
import sys

_INPUT_LINES = iter(sys.stdin.read().splitlines())
input = _INPUT_LINES.__next__
_OUTPUT_BUFFER = io.StringIO()
sys.stdout = _OUTPUT_BUFFER


@atexit.register
def write():
    sys.__stdout__.write(_OUTPUT_BUFFER.getvalue())


for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    ),
    _lines(
        "buffered_io_template",
        r"""
import os
import sys
from io import BytesIO, IOBase

BUFSIZE = 8192


class FastIO(IOBase):
    newlines = 0

    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = 'x' in file.mode or 'r' not in file.mode
        self.write = self.buffer.write if self.writable else None

    def readline(self):
        while self.newlines == 0:
            b = os.read(self._fd, max(os.fstat(self._fd).st_size, BUFSIZE))
            self.newlines = b.count(b'\n') + (not b)
            ptr = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(ptr)
        self.newlines -= 1
        return self.buffer.readline()

    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)


class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode('ascii'))
        self.readline = lambda: self.buffer.readline().decode('ascii')


sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip('\r\n')

for _ in range(int(input())):
    print(sum(map(int, input().split())))
""",
    ),
    _lines(
        "written_at_once",
        r"""
import sys

def main():
    data = list(map(int, sys.stdin.read().split()))
    out = [data[i] + data[i + 1] for i in range(1, len(data), 2)]
    sys.stdout.write('\n'.join(map(str, out)) + '\n')


main()
""",
    ),
    _lines(
        "thread_with_a_big_stack_and_recursion",
        """
import sys
import threading

sys.setrecursionlimit(10**6)
threading.stack_size(2**26)


def depth(n):
    return 0 if n == 0 else 1 + depth(n - 1)


def main():
    assert depth(20_000) == 20_000
    for _ in range(int(input())):
        print(sum(map(int, input().split())))


threading.Thread(target=main).start()
""",
    ),
    _sum(
        "stdout_buffer",
        r"""
import sys

a, b = map(int, sys.stdin.buffer.readline().split())
sys.stdout.buffer.write(b'%d\n' % (a + b))
sys.stdout.flush()
""",
    ),
    _sum(
        "text_and_buffer_mixed",
        """
import sys

a, b = map(int, input().split())
print(end='', flush=True)
sys.stdout.buffer.write(str(a + b).encode())
""",
    ),
    _sum(
        "flushed_prints",
        """
a, b = map(int, input().split())
print(a + b, flush=True)
""",
    ),
    _sum(
        "no_line_end_at_the_end",
        """
print(sum(map(int, input().split())), end='')
""",
    ),
    _sum(
        "exit_after_output",
        """
import sys


def main():
    print(sum(map(int, input().split())))
    sys.exit(0)


if __name__ == '__main__':
    main()
""",
    ),
    _sum(
        "exit_builtin",
        """
print(sum(map(int, input().split())))
exit()
""",
    ),
    _sum(
        "quit_and_system_exit",
        """
print(sum(map(int, input().split())))
try:
    quit()
finally:
    raise SystemExit
""",
    ),
    _sum(
        "os_exit_after_flush",
        """
import os

print(sum(map(int, input().split())), flush=True)
os._exit(0)
""",
    ),
    _sum(
        "noise_on_stderr",
        """
import sys

a, b = map(int, input().split())
print('debug', a, b, file=sys.stderr)
print(a + b)
""",
    ),
    _sum(
        "windows_line_ends_in_the_source",
        "a, b = map(int, input().split())\r\nif a:\r\n\tprint(a + b)\r\nelse:\r\n\tprint(b)\r\n",
    ),
    _sum("byte_order_mark_in_a_contest", "\ufeffprint(sum(map(int, input().split())))\n"),
    _sum(
        "main_module",
        """
import __main__
import sys

__main__.x = 1
assert __name__ == '__main__' and sys.modules['__main__'].x == 1
print(sum(map(int, input().split())))
""",
    ),
    _sum(
        "classes_and_pickles_in_main",
        """
import pickle
from dataclasses import dataclass


@dataclass
class P:
    x: int
    y: int


p = pickle.loads(pickle.dumps(P(*map(int, input().split()))))
print(p.x + p.y)
""",
    ),
    _sum(
        "arguments_of_the_command_line",
        """
import sys

assert len(sys.argv) == 1
print(sum(map(int, input().split())))
""",
    ),
    _sum(
        "end_of_file_is_caught",
        """
total = 0
while True:
    try:
        total += sum(map(int, input().split()))
    except EOFError:
        break
print(total)
""",
    ),
    _sum(
        "stdout_is_no_terminal",
        """
import sys

assert not sys.stdin.isatty() and not sys.stdout.isatty()
print(sum(map(int, input().split())))
""",
    ),
    _sum(
        "seek_in_stdin",
        """
import sys

sys.stdin.read()
sys.stdin.seek(0)
print(sum(map(int, sys.stdin.read().split())))
""",
    ),
    _sum(
        "numpy_in_a_contest",
        """
import sys

import numpy as np

print(int(np.array(sys.stdin.read().split(), np.int64).sum()))
""",
        needs="numpy",
    ),
    Honest(
        "windows_line_ends_in_the_input",
        """
n = int(input())
print(sum(int(input()) for _ in range(n)))
""",
        stdio=(("2\r\n3\r\n4\r\n", "7\r\n"),),
    ),
    Honest(
        "spaces_in_the_output",
        r"""
print('1 2', '', '3')
print()
print('4\t5 ')
""",
        stdio=(("", "1 2 3\n4 5\n"),),
    ),
    Honest(
        "unicode_output",
        """
print(input()[::-1])
""",
        stdio=(("aé漢😀\n", "😀漢éa\n"),),
    ),
    Honest(
        "bytes_that_are_no_text",
        """
import sys

sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])
""",
        stdio=(("ab\x00c\n", "\nc\x00ba"),),
    ),
    Honest(
        "recursion_in_a_contest",
        """
import sys

sys.setrecursionlimit(10**6)


def f(n):
    return 0 if n == 0 else 1 + f(n - 1)


print(f(int(input())))
""",
        stdio=DEEP,
    ),
    Honest(
        "much_output",
        """
n = int(input())
for i in range(n):
    print(i)
""",
        stdio=(("100000\n", "\n".join(map(str, range(100_000)))),),
    ),
    Honest(
        "much_input",
        """
import sys

input()
print(sum(map(int, sys.stdin)))
""",
        stdio=(("x\n" + "7\n" * 200_000, "1400000"),),
    ),
    Honest(
        "no_input_and_no_output",
        """
pass
""",
        stdio=(("", ""),),
    ),
    Honest(
        "thread_that_prints_at_the_end",
        """
import threading
import time


def late():
    time.sleep(0.05)
    print(input())


threading.Thread(target=late).start()
""",
        stdio=(("x\n", "x"),),
    ),
    Honest(
        "daemon_thread_at_the_end",
        """
import threading
import time

threading.Thread(target=time.sleep, args=[1000], daemon=True).start()
print(1)
""",
        stdio=(("", "1"),),
    ),
    Honest(
        "files_between_tests",
        """
import os

assert os.listdir('.') == [], os.listdir('.')
open('left', 'w').write(input())
print(open('left').read())
""",
        stdio=(("a\n", "a\n"), ("b\n", "b\n")),
    ),
    Honest(
        "answers_of_a_closed_class",
        """
class A:
    def __del__(self):
        print('gone')


A()
print('end')
""",
        stdio=(("", "gone\nend"),),
    ),
    Honest(
        "exit_with_a_message_of_none",
        """
import sys

print(1)
sys.exit(None)
""",
        stdio=(("", "1"),),
    ),
)
