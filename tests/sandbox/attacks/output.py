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
        '"""Prints without end while it is called."""\n\n\n'
        "def solve(a, b):\n    while True:\n        try:\n            print('x' * 100_000)\n        except Exception:\n            pass\n",
    ),
    _attack(
        "print_at_import",
        '"""Prints without end before any function exists."""\nwhile True:\n    print("passed" * 10_000)\n',
    ),
    _attack(
        "write_for_ever",
        '"""Writes to the descriptors of stdout and stderr past Python\'s streams."""\nimport os\n\n\n'
        "def solve(a, b):\n    while True:\n        for descriptor in (1, 2):\n            try:\n"
        "                os.write(descriptor, b'x' * 100_000)\n            except OSError:\n                pass\n",
    ),
    _attack(
        "write_everywhere",
        '"""Writes to every descriptor that takes it, the answer channel too."""\nimport os\n\n\n'
        "def solve(a, b):\n    while True:\n        for descriptor in range(256):\n            try:\n"
        "                os.set_blocking(descriptor, False)\n                os.write(descriptor, b'{\"answer\": 5}\\n' * 1000)\n"
        "            except OSError:\n                pass\n",
    ),
    _attack(
        "flood_by_threads",
        '"""Twenty threads print, the call itself waits."""\nimport sys\nimport threading\n\n\n'
        "def flood():\n    while True:\n        sys.stderr.write('x' * 10_000)\n\n\n"
        "def solve(a, b):\n    threads = [threading.Thread(target=flood) for _ in range(20)]\n"
        "    [t.start() for t in threads]\n    [t.join() for t in threads]\n",
    ),
    _attack(
        "warnings_and_tracebacks",
        '"""Lets the interpreter itself write: a warning and a dump of all frames, without end."""\nimport faulthandler\nimport sys\nimport warnings\n\nwarnings.simplefilter("always")\n\n\n'
        "def solve(a, b):\n    while True:\n        warnings.warn('x' * 1000)\n        faulthandler.dump_traceback(sys.__stderr__)\n",
    ),
    _attack(
        "stdio_flood",
        '"""A contest program that prints without end."""\nwhile True:\n    print(1)\n',
        frozenset({"output_limit"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_flood_in_one_write",
        '"""64 MB in one write, with the right answer before it."""\nimport os\n\nos.write(1, b"1\\n" + b" " * (64 << 20))\n',
        frozenset({"output_limit"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_flood_of_stderr",
        '"""Floods stderr, whose text nobody judges, and never prints."""\nimport sys\n\nwhile True:\n    sys.stderr.write("x" * 10_000)\n',
        frozenset({"output_limit", "timeout"}),
        stdio=EMPTY,
    ),
    _attack(
        "stdio_slow_flood",
        '"""A byte at a time, flushed, for the judge that reads byte by byte."""\nimport os\n\nwhile True:\n    os.write(1, b"1 ")\n',
        frozenset({"output_limit", "timeout", "wrong_answer"}),
        stdio=EMPTY,
    ),
)
