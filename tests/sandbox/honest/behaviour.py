"""Programs that are slow, recursive, threaded, noisy or written in an unusual form, judged by asserts."""

from honest import Honest
from wmtp.sandbox import Limits

ADD = ("assert solve(2, 3) == 5",)

PROGRAMS = (
    Honest(
        "two_seconds_of_computing",
        """
import time


def solve(a, b):
    start = time.process_time()
    total = 0
    while time.process_time() - start < 2:
        total += sum(range(1000)) * 0
    return a + b + total
""",
        ADD,
    ),
    Honest(
        "deep_recursion",
        """
import sys

sys.setrecursionlimit(10**6)


def solve(n):
    return 0 if n == 0 else 1 + solve(n - 1)
""",
        ("assert solve(5000) == 5000", "assert solve(50_000) == 50_000"),
    ),
    Honest(
        "recursion_through_c",
        """
import functools
import sys

sys.setrecursionlimit(100_000)


@functools.lru_cache(maxsize=None)
def solve(n):
    return 0 if n == 0 else 1 + solve(n - 1)
""",
        ("assert solve(5000) == 5000",),
    ),
    Honest(
        "state_across_calls",
        """
count = 0


def tick():
    global count
    count += 1
    return count


def collect(item, seen=[]):
    seen.append(item)
    return seen
""",
        (
            "assert tick() == 1",
            "assert tick() == 2 and tick() == 3",
            "assert collect('a') == ['a']",
            "assert collect('b') == ['a', 'b']",
        ),
    ),
    Honest(
        "cached_and_decorated",
        """
import functools

calls = []


def logged(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return run


@logged
@functools.lru_cache(maxsize=None)
def solve(n):
    return n if n < 2 else solve(n - 1) + solve(n - 2)
""",
        ("assert solve(80) == 23416728348467685", "assert solve.__name__ == 'solve'"),
    ),
    Honest(
        "threads_that_compute",
        """
import threading


def solve(n):
    results, lock = [], threading.Lock()

    def work(i):
        with lock:
            results.append(i * i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return sorted(results)
""",
        ("assert solve(10) == [i * i for i in range(10)]",),
    ),
    Honest(
        "thread_pool",
        """
from concurrent.futures import ThreadPoolExecutor


def solve(values):
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(lambda x: x + 1, values))
""",
        ("assert solve(range(50)) == list(range(1, 51))",),
    ),
    Honest(
        "thread_with_a_big_stack",
        """
import sys
import threading

sys.setrecursionlimit(10**6)
threading.stack_size(2**26)


def depth(n):
    return 0 if n == 0 else 1 + max([n - 1], key=lambda x: 0) * 0 + depth(n - 1)


def solve(n):
    result = []
    thread = threading.Thread(target=lambda: result.append(depth(n)))
    thread.start()
    thread.join()
    return result[0]
""",
        ("assert solve(20_000) == 20_000",),
    ),
    Honest(
        "asyncio_program",
        """
import asyncio


async def square(x):
    await asyncio.sleep(0.001)
    return x * x


async def gather(values):
    return await asyncio.gather(*map(square, values))


def solve(values):
    return asyncio.run(gather(values))
""",
        ("assert solve([1, 2, 3]) == [1, 4, 9]", "assert solve([]) == []"),
    ),
    Honest(
        "daemon_thread_that_goes_on",
        """
import threading
import time

threading.Thread(target=time.sleep, args=[1000], daemon=True).start()


def solve(a, b):
    return a + b
""",
        ADD,
    ),
    Honest(
        "noise_on_stdout_and_stderr",
        r"""
import logging
import sys
import warnings

print('loading', flush=True)
logging.warning('careful')
warnings.warn('old')


def solve(a, b):
    print('{"value": 6}', a, b)
    print('debug', file=sys.stderr)
    sys.stdout.buffer.write(b'\x00\xff' * 1000)
    return a + b
""",
        ADD,
    ),
    Honest(
        "replaced_stdout",
        """
import contextlib
import io
import sys


def solve(text):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print(text)
    sys.stdout = io.StringIO()
    return out.getvalue()
""",
        ("assert solve('a') == 'a\\n'", "assert solve('b') == 'b\\n'"),
    ),
    Honest(
        "main_guard",
        """
def solve(a, b):
    return a + b


if __name__ == '__main__':
    print(solve(1, 2))
""",
        ADD,
    ),
    Honest(
        "asserts_of_its_own",
        """
def solve(a, b):
    assert isinstance(a, int), 'only ints'
    return a + b


assert solve(1, 1) == 2


def test_solve():
    assert solve(0, 0) == 0


test_solve()
""",
        ADD,
    ),
    Honest(
        "heavy_imports",
        """
import collections, dataclasses, decimal, enum, fractions, heapq, inspect, itertools, json, logging, operator, random
import re, statistics, string, typing, unittest, urllib.parse, uuid, xml.etree.ElementTree
from math import *


def solve(a, b):
    return int(statistics.mean([a, b]) * 2 + sin(0))
""",
        ADD,
    ),
    Honest(
        "random_numbers",
        """
import random
import secrets
import uuid


def solve(seed):
    random.seed(seed)
    return [random.randint(0, 9) for _ in range(5)] and secrets.randbelow(1) + len(uuid.uuid4().hex)
""",
        ("assert solve(1) == 32",),
    ),
    Honest(
        "files_in_its_folder",
        """
import os
import pathlib
import tempfile


def solve(text):
    with open('data.txt', 'w') as file:
        file.write(text)
    os.makedirs('a/b', exist_ok=True)
    pathlib.Path('a/b/c.txt').write_text(text)
    with tempfile.NamedTemporaryFile('w+') as file:
        file.write(text)
        file.seek(0)
        again = file.read()
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / 'd').write_text(text)
    os.rename('data.txt', 'moved.txt')
    return [again, open('moved.txt').read(), sorted(os.listdir('a/b'))]
""",
        ("assert solve('wörd') == ['wörd', 'wörd', ['c.txt']]",),
    ),
    Honest(
        "time_and_clocks",
        """
import datetime
import time


def solve():
    start = time.perf_counter()
    time.sleep(0.01)
    now = datetime.datetime.now()
    return time.perf_counter() - start >= 0.01 and now.year > 2000 and time.localtime().tm_year == now.year
""",
        ("assert solve() is True",),
    ),
    Honest(
        "windows_line_ends",
        "def solve(a, b):\r\n\ttotal = 0\r\n\tfor x in (a, b):\r\n\t\ttotal += x\r\n\treturn total\r\n",
        ADD,
    ),
    Honest("tabs_and_form_feeds", "import math\n\x0c\ndef solve(a, b):\n\tif a:\n\t\treturn a + b\n\treturn b\n", ADD),
    Honest("byte_order_mark", "\ufeffdef solve(a, b):\n    return a + b\n", ADD),
    Honest("no_line_end", "solve = lambda a, b: a + b", ADD),
    Honest(
        "non_ascii_source",
        """
# größe, 漢字, 😀
def solve(größe, b):
    名 = größe + b
    return 名
""",
        ADD,
    ),
    Honest(
        "encoding_comment",
        """
# -*- coding: latin-1 -*-
def solve(text):
    return text + 'é漢'
""",
        ("assert solve('a') == 'aé漢'",),
    ),
    Honest(
        "annotations_from_the_future",
        """
from __future__ import annotations

from typing import *


def solve(a: Unknown, b: list[Later] | None) -> Dict[str, Unknown]:
    return a + b
""",
        ADD,
    ),
    Honest(
        "type_hints",
        """
from typing import Dict, Generic, List, Optional, Tuple, TypeVar

T = TypeVar('T')


class Stack(Generic[T]):
    def __init__(self) -> None:
        self.items: List[T] = []

    def push(self, item: T) -> 'Stack[T]':
        self.items.append(item)
        return self


def solve(values: List[int], default: Optional[int] = None) -> Tuple[int, Dict[str, int]]:
    return max(values, default=default), {'n': len(values)}
""",
        (
            "assert solve([1, 3]) == (3, {'n': 2})",
            "assert solve([], default=0) == (0, {'n': 0})",
            "assert Stack().push(1).push(2).items == [1, 2]",
        ),
    ),
    Honest(
        "new_syntax",
        """
def solve(command):
    match command.split():
        case ['go', where]:
            return where
        case [*words] if (n := len(words)) > 2:
            return n
    return None
""",
        ("assert solve('go north') == 'north'", "assert solve('a b c') == 3", "assert solve('') is None"),
    ),
    Honest(
        "solution_class",
        """
class Solution:
    def twoSum(self, nums, target):
        seen = {}
        for i, x in enumerate(nums):
            if target - x in seen:
                return [seen[target - x], i]
            seen[x] = i
""",
        (
            "def check(candidate):\n    assert candidate(nums=[2, 7, 11], target=9) == [0, 1]\n"
            "    assert candidate([3, 3], 6) == [0, 1]\n\n\ncheck(candidate)",
        ),
        entry_point="Solution().twoSum",
    ),
    Honest(
        "humaneval_shape",
        """
from typing import List


def helper(x):
    return x * 2


def double(values: List[int]) -> List[int]:
    return [helper(x) for x in values]
""",
        (
            "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
            "    for n in range(20):\n        assert candidate(list(range(n))) == [helper(x) for x in range(n)]\n\n\n"
            "check(candidate)",
        ),
        preamble="from typing import List\n\n\ndef helper(x):\n    return x * 2\n\n\n"
        "def double(values: List[int]) -> List[int]:\n    pass\n",
        entry_point="double",
    ),
    Honest(
        "expected_exceptions",
        """
class Broke(Exception):
    pass


def solve(n):
    if n < 0:
        raise ValueError(f'negative: {n}')
    if n > 9:
        raise Broke
    return [0][n]
""",
        (
            "try:\n    solve(-1)\nexcept ValueError as error:\n    assert 'negative: -1' in str(error)\n"
            "else:\n    assert False",
            "try:\n    solve(3)\n    assert False\nexcept IndexError:\n    pass",
            "try:\n    solve(10)\nexcept Exception:\n    pass\nelse:\n    assert False",
            "assert solve(0) == 0",
        ),
    ),
    Honest(
        "arguments_of_every_type",
        """
def solve(*args, **kwargs):
    return args, kwargs
""",
        (
            "assert solve(1, None, 2.5, 'a', b'b', (1,), [2], {3}, {'k': {4: ()}}, x=frozenset({5}), y=10**30) == "
            "((1, None, 2.5, 'a', b'b', (1,), [2], {3}, {'k': {4: ()}}), {'x': frozenset({5}), 'y': 10**30})",
            "values = [3, 1, 2]\nassert solve(*values, **{'z': values}) == ((3, 1, 2), {'z': [3, 1, 2]})",
        ),
    ),
    Honest(
        "name_of_a_builtin",
        """
def sum(a, b):
    return a + b
""",
        ("assert sum(2, 3) == 5",),
        entry_point="sum",
    ),
    Honest(
        "recursion_error_that_is_caught",
        """
def endless(n):
    return endless(n + 1)


def solve():
    try:
        endless(0)
    except RecursionError:
        return 'deep'
""",
        ("assert solve() == 'deep'",),
    ),
    Honest(
        "memory_within_the_limit",
        """
def solve(n):
    table = [[0] * 1000 for _ in range(n)]
    block = bytearray(200 << 20)
    return len(table) * 1000 + block[-1]
""",
        ("assert solve(5000) == 5_000_000",),
    ),
    Honest(
        "many_calls",
        """
def solve(n):
    return n * n
""",
        ("for n in range(3000):\n    assert solve(n) == n * n",),
    ),
    Honest(
        "exit_in_an_unused_branch",
        """
import os
import sys


def solve(a, b):
    if a is None:
        sys.exit(1)
        os._exit(1)
    return a + b
""",
        ADD,
    ),
    Honest(
        "signals_and_timers_of_its_own",
        """
import signal


def solve(a, b):
    def late(*args):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        while True:
            pass
    except TimeoutError:
        return a + b
    finally:
        signal.alarm(0)
""",
        ADD,
        limits=Limits(cpu_seconds=2.0),
    ),
    Honest(
        "its_own_frames_and_collector",
        """
import gc
import inspect
import sys


def solve(a, b):
    gc.collect()
    name = inspect.currentframe().f_code.co_name
    return a + b if name == sys._getframe(0).f_code.co_name == 'solve' else None
""",
        ADD,
    ),
    Honest(
        "pickled_and_copied_objects",
        """
import copy
import pickle
from dataclasses import asdict, dataclass


@dataclass
class Point:
    x: int
    y: int


def solve(x, y):
    return asdict(pickle.loads(pickle.dumps(copy.deepcopy(Point(x, y)))))
""",
        ("assert solve(1, 2) == {'x': 1, 'y': 2}",),
    ),
)
