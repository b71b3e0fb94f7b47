"""Programs that are slow, recursive, threaded, noisy or written in an unusual form, judged by asserts."""

from honest import Honest
from wmtp.sandbox import Limits

ADD = ("assert solve(2, 3) == 5",)

PROGRAMS = (
    Honest(
        "two_seconds_of_computing",
        "import time\n\n\ndef solve(a, b):\n    start = time.process_time()\n    total = 0\n"
        "    while time.process_time() - start < 2:\n        total += sum(range(1000)) * 0\n    return a + b + total\n",
        ADD,
    ),
    Honest(
        "deep_recursion",
        "import sys\n\nsys.setrecursionlimit(10**6)\n\n\ndef solve(n):\n    return 0 if n == 0 else 1 + solve(n - 1)\n",
        ("assert solve(5000) == 5000", "assert solve(50_000) == 50_000"),
    ),
    Honest(
        "recursion_through_c",
        "import functools\nimport sys\n\nsys.setrecursionlimit(100_000)\n\n\n@functools.lru_cache(maxsize=None)\n"
        "def solve(n):\n    return 0 if n == 0 else 1 + solve(n - 1)\n",
        ("assert solve(5000) == 5000",),
    ),
    Honest(
        "state_across_calls",
        "count = 0\n\n\ndef tick():\n    global count\n    count += 1\n    return count\n\n\ndef collect(item, seen=[]):\n    seen.append(item)\n    return seen\n",
        ("assert tick() == 1", "assert tick() == 2 and tick() == 3", "assert collect('a') == ['a']", "assert collect('b') == ['a', 'b']"),
    ),
    Honest(
        "cached_and_decorated",
        "import functools\n\ncalls = []\n\n\ndef logged(function):\n    @functools.wraps(function)\n    def run(*args, **kwargs):\n        calls.append(args)\n"
        "        return function(*args, **kwargs)\n\n    return run\n\n\n@logged\n@functools.lru_cache(maxsize=None)\n"
        "def solve(n):\n    return n if n < 2 else solve(n - 1) + solve(n - 2)\n",
        ("assert solve(80) == 23416728348467685", "assert solve.__name__ == 'solve'"),
    ),
    Honest(
        "threads_that_compute",
        "import threading\n\n\ndef solve(n):\n    results, lock = [], threading.Lock()\n\n    def work(i):\n        with lock:\n            results.append(i * i)\n\n"
        "    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]\n    for t in threads:\n        t.start()\n    for t in threads:\n        t.join()\n"
        "    return sorted(results)\n",
        ("assert solve(10) == [i * i for i in range(10)]",),
    ),
    Honest(
        "thread_pool",
        "from concurrent.futures import ThreadPoolExecutor\n\n\ndef solve(values):\n    with ThreadPoolExecutor(max_workers=4) as pool:\n        return list(pool.map(lambda x: x + 1, values))\n",
        ("assert solve(range(50)) == list(range(1, 51))",),
    ),
    Honest(
        "thread_with_a_big_stack",
        "import sys\nimport threading\n\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n\n\n"
        "def depth(n):\n    return 0 if n == 0 else 1 + max([n - 1], key=lambda x: 0) * 0 + depth(n - 1)\n\n\n"
        "def solve(n):\n    result = []\n    thread = threading.Thread(target=lambda: result.append(depth(n)))\n    thread.start()\n    thread.join()\n    return result[0]\n",
        ("assert solve(20_000) == 20_000",),
    ),
    Honest(
        "asyncio_program",
        "import asyncio\n\n\nasync def square(x):\n    await asyncio.sleep(0.001)\n    return x * x\n\n\nasync def gather(values):\n    return await asyncio.gather(*map(square, values))\n\n\n"
        "def solve(values):\n    return asyncio.run(gather(values))\n",
        ("assert solve([1, 2, 3]) == [1, 4, 9]", "assert solve([]) == []"),
    ),
    Honest(
        "daemon_thread_that_goes_on",
        "import threading\nimport time\n\nthreading.Thread(target=time.sleep, args=[1000], daemon=True).start()\n\n\ndef solve(a, b):\n    return a + b\n",
        ADD,
    ),
    Honest(
        "noise_on_stdout_and_stderr",
        "import logging\nimport sys\nimport warnings\n\nprint('loading', flush=True)\nlogging.warning('careful')\nwarnings.warn('old')\n\n\n"
        "def solve(a, b):\n    print('{\"value\": 6}', a, b)\n    print('debug', file=sys.stderr)\n    sys.stdout.buffer.write(b'\\x00\\xff' * 1000)\n    return a + b\n",
        ADD,
    ),
    Honest(
        "replaced_stdout",
        "import contextlib\nimport io\nimport sys\n\n\ndef solve(text):\n    with contextlib.redirect_stdout(io.StringIO()) as out:\n        print(text)\n    sys.stdout = io.StringIO()\n    return out.getvalue()\n",
        ("assert solve('a') == 'a\\n'", "assert solve('b') == 'b\\n'"),
    ),
    Honest(
        "main_guard",
        "def solve(a, b):\n    return a + b\n\n\nif __name__ == '__main__':\n    print(solve(1, 2))\n",
        ADD,
    ),
    Honest(
        "asserts_of_its_own",
        "def solve(a, b):\n    assert isinstance(a, int), 'only ints'\n    return a + b\n\n\nassert solve(1, 1) == 2\n\n\n"
        "def test_solve():\n    assert solve(0, 0) == 0\n\n\ntest_solve()\n",
        ADD,
    ),
    Honest(
        "heavy_imports",
        "import collections, dataclasses, decimal, enum, fractions, heapq, inspect, itertools, json, logging, operator, random\n"
        "import re, statistics, string, typing, unittest, urllib.parse, uuid, xml.etree.ElementTree\nfrom math import *\n\n\n"
        "def solve(a, b):\n    return int(statistics.mean([a, b]) * 2 + sin(0))\n",
        ADD,
    ),
    Honest(
        "random_numbers",
        "import random\nimport secrets\nimport uuid\n\n\ndef solve(seed):\n    random.seed(seed)\n    return [random.randint(0, 9) for _ in range(5)] and secrets.randbelow(1) + len(uuid.uuid4().hex)\n",
        ("assert solve(1) == 32",),
    ),
    Honest(
        "files_in_its_folder",
        "import os\nimport pathlib\nimport tempfile\n\n\ndef solve(text):\n    with open('data.txt', 'w') as file:\n        file.write(text)\n    os.makedirs('a/b', exist_ok=True)\n"
        "    pathlib.Path('a/b/c.txt').write_text(text)\n    with tempfile.NamedTemporaryFile('w+') as file:\n        file.write(text)\n        file.seek(0)\n        again = file.read()\n"
        "    with tempfile.TemporaryDirectory() as folder:\n        (pathlib.Path(folder) / 'd').write_text(text)\n    os.rename('data.txt', 'moved.txt')\n"
        "    return [again, open('moved.txt').read(), sorted(os.listdir('a/b'))]\n",
        ("assert solve('wörd') == ['wörd', 'wörd', ['c.txt']]",),
    ),
    Honest(
        "time_and_clocks",
        "import datetime\nimport time\n\n\ndef solve():\n    start = time.perf_counter()\n    time.sleep(0.01)\n    now = datetime.datetime.now()\n    return time.perf_counter() - start >= 0.01 and now.year > 2000 and time.localtime().tm_year == now.year\n",
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
    Honest("non_ascii_source", "# größe, 漢字, 😀\ndef solve(größe, b):\n    名 = größe + b\n    return 名\n", ADD),
    Honest("encoding_comment", "# -*- coding: latin-1 -*-\ndef solve(text):\n    return text + 'é漢'\n", ("assert solve('a') == 'aé漢'",)),
    Honest(
        "annotations_from_the_future",
        "from __future__ import annotations\n\nfrom typing import *\n\n\ndef solve(a: Unknown, b: list[Later] | None) -> Dict[str, Unknown]:\n    return a + b\n",
        ADD,
    ),
    Honest(
        "type_hints",
        "from typing import Dict, Generic, List, Optional, Tuple, TypeVar\n\nT = TypeVar('T')\n\n\nclass Stack(Generic[T]):\n    def __init__(self) -> None:\n        self.items: List[T] = []\n\n"
        "    def push(self, item: T) -> 'Stack[T]':\n        self.items.append(item)\n        return self\n\n\n"
        "def solve(values: List[int], default: Optional[int] = None) -> Tuple[int, Dict[str, int]]:\n    return max(values, default=default), {'n': len(values)}\n",
        ("assert solve([1, 3]) == (3, {'n': 2})", "assert solve([], default=0) == (0, {'n': 0})", "assert Stack().push(1).push(2).items == [1, 2]"),
    ),
    Honest(
        "new_syntax",
        "def solve(command):\n    match command.split():\n        case ['go', where]:\n            return where\n        case [*words] if (n := len(words)) > 2:\n            return n\n    return None\n",
        ("assert solve('go north') == 'north'", "assert solve('a b c') == 3", "assert solve('') is None"),
    ),
    Honest(
        "solution_class",
        "class Solution:\n    def twoSum(self, nums, target):\n        seen = {}\n        for i, x in enumerate(nums):\n            if target - x in seen:\n                return [seen[target - x], i]\n            seen[x] = i\n",
        ("def check(candidate):\n    assert candidate(nums=[2, 7, 11], target=9) == [0, 1]\n    assert candidate([3, 3], 6) == [0, 1]\n\n\ncheck(candidate)",),
        entry_point="Solution().twoSum",
    ),
    Honest(
        "humaneval_shape",
        "from typing import List\n\n\ndef helper(x):\n    return x * 2\n\n\ndef double(values: List[int]) -> List[int]:\n    return [helper(x) for x in values]\n",
        ("METADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    for n in range(20):\n        assert candidate(list(range(n))) == [helper(x) for x in range(n)]\n\n\ncheck(candidate)",),
        preamble="from typing import List\n\n\ndef helper(x):\n    return x * 2\n\n\ndef double(values: List[int]) -> List[int]:\n    pass\n",
        entry_point="double",
    ),
    Honest(
        "expected_exceptions",
        "class Broke(Exception):\n    pass\n\n\ndef solve(n):\n    if n < 0:\n        raise ValueError(f'negative: {n}')\n    if n > 9:\n        raise Broke\n    return [0][n]\n",
        (
            "try:\n    solve(-1)\nexcept ValueError as error:\n    assert 'negative: -1' in str(error)\nelse:\n    assert False",
            "try:\n    solve(3)\n    assert False\nexcept IndexError:\n    pass",
            "try:\n    solve(10)\nexcept Exception:\n    pass\nelse:\n    assert False",
            "assert solve(0) == 0",
        ),
    ),
    Honest(
        "arguments_of_every_type",
        "def solve(*args, **kwargs):\n    return args, kwargs\n",
        (
            "assert solve(1, None, 2.5, 'a', b'b', (1,), [2], {3}, {'k': {4: ()}}, x=frozenset({5}), y=10**30) == "
            "((1, None, 2.5, 'a', b'b', (1,), [2], {3}, {'k': {4: ()}}), {'x': frozenset({5}), 'y': 10**30})",
            "values = [3, 1, 2]\nassert solve(*values, **{'z': values}) == ((3, 1, 2), {'z': [3, 1, 2]})",
        ),
    ),
    Honest(
        "name_of_a_builtin",
        "def sum(a, b):\n    return a + b\n",
        ("assert sum(2, 3) == 5",),
        entry_point="sum",
    ),
    Honest(
        "recursion_error_that_is_caught",
        "def endless(n):\n    return endless(n + 1)\n\n\ndef solve():\n    try:\n        endless(0)\n    except RecursionError:\n        return 'deep'\n",
        ("assert solve() == 'deep'",),
    ),
    Honest(
        "memory_within_the_limit",
        "def solve(n):\n    table = [[0] * 1000 for _ in range(n)]\n    block = bytearray(200 << 20)\n    return len(table) * 1000 + block[-1]\n",
        ("assert solve(5000) == 5_000_000",),
    ),
    Honest(
        "many_calls",
        "def solve(n):\n    return n * n\n",
        ("for n in range(3000):\n    assert solve(n) == n * n",),
    ),
    Honest(
        "exit_in_an_unused_branch",
        "import os\nimport sys\n\n\ndef solve(a, b):\n    if a is None:\n        sys.exit(1)\n        os._exit(1)\n    return a + b\n",
        ADD,
    ),
    Honest(
        "signals_and_timers_of_its_own",
        "import signal\n\n\ndef solve(a, b):\n    def late(*args):\n        raise TimeoutError\n\n    signal.signal(signal.SIGALRM, late)\n    signal.setitimer(signal.ITIMER_REAL, 0.01)\n"
        "    try:\n        while True:\n            pass\n    except TimeoutError:\n        return a + b\n    finally:\n        signal.alarm(0)\n",
        ADD,
        limits=Limits(cpu_seconds=2.0),
    ),
    Honest(
        "its_own_frames_and_collector",
        "import gc\nimport inspect\nimport sys\n\n\ndef solve(a, b):\n    gc.collect()\n    name = inspect.currentframe().f_code.co_name\n    return a + b if name == sys._getframe(0).f_code.co_name == 'solve' else None\n",
        ADD,
    ),
    Honest(
        "pickled_and_copied_objects",
        "import copy\nimport pickle\nfrom dataclasses import asdict, dataclass\n\n\n@dataclass\nclass Point:\n    x: int\n    y: int\n\n\n"
        "def solve(x, y):\n    return asdict(pickle.loads(pickle.dumps(copy.deepcopy(Point(x, y)))))\n",
        ("assert solve(1, 2) == {'x': 1, 'y': 2}",),
    ),
)
