"""Answers made to break the judge that reads them: too big, too deep, without end, or costly to compare."""

from attacks import FAULTS, QUICK, SECRET, SORT, Attack, Limits

WRONG = frozenset({"wrong_answer"})
REFUSED = frozenset({"wrong_answer", "output_limit", "memory", "timeout"})
SLOW = Limits(cpu_seconds=1.0, wall_seconds=2.0)


def _evil_exception(name: str, says: str, body: str) -> Attack:
    return Attack(name, f'"""{says}"""\n{body}', verdicts=frozenset({"exception", "memory", "timeout", "output_limit"}))


ATTACKS = (
    Attack(
        "million_digits",
        '"""An int of a million digits, which str() refuses to show."""\n\n\ndef solve(a, b):\n    return 10 ** (10**6)\n',
        verdicts=frozenset({"wrong_answer", "output_limit"}),
    ),
    Attack(
        "million_digits_in_a_list",
        '"""The same inside containers, as key and as element."""\n\n\n'
        "def solve(values):\n    return [{10 ** (10**5): (-(10 ** (10**5)),)}]\n",
        SORT,
        WRONG,
    ),
    Attack(
        "tower_of_powers",
        '"""An int that no computer finishes."""\n\n\ndef solve(a, b):\n    return 9**9**9\n',
        verdicts=frozenset({"timeout", "memory"}),
    ),
    Attack(
        "int_shown_by_the_test",
        '"""An int whose decimal digits take minutes to make, where the test calls str() on the answer."""\n\n\n'
        "def solve(a, b):\n    return 1 << 50_000_000\n",
        ("assert str(solve(2, 3)) == '5'",),
        REFUSED,
    ),
    Attack(
        "exponent_for_the_test",
        '"""A small answer that is costly where the test computes with it."""\n\n\ndef solve(a, b):\n    return 10**9\n',
        ("assert 7 ** solve(2, 3) == 16807",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "decimal_exponent",
        '"""A Decimal of few digits that is a huge int once the test rounds it."""\nfrom decimal import Decimal\n\n\n'
        "def solve(a, b):\n    return Decimal('1E+99999999999')\n",
        ("assert round(solve(2, 3)) == 5",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "fraction_of_huge_ints",
        '"""A Fraction that takes for ever to reduce when it is built anew."""\nfrom fractions import Fraction\n\n\n'
        "def solve(a, b):\n    f = Fraction(1, 3)\n"
        "    f._numerator, f._denominator = 3**3_000_000, 2**4_000_000 + 1\n    return f\n",
        verdicts=REFUSED,
        limits=SLOW,
    ),
    Attack(
        "endless_range",
        '"""A range, tiny as a value, that the test turns into a list."""\n\n\ndef solve(values):\n    return range(10**12)\n',
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "endless_generator",
        '"""A generator that never ends, consumed by the test."""\nimport itertools\n\n\n'
        "def solve(values):\n    return itertools.count()\n",
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"timeout", "memory", "output_limit"}),
        limits=SLOW,
    ),
    Attack(
        "endless_handles",
        '"""An iterator that never ends, of objects that the judge can only hold by name."""\n\n\n'
        "class Thing:\n    pass\n\n\ndef solve(values):\n    while True:\n        yield Thing()\n",
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"timeout", "memory", "output_limit", "violation"}),
        limits=SLOW,
    ),
    Attack(
        "lazy_membership",
        '"""The test looks for a value in an iterator that never yields it."""\nimport itertools\n\n\n'
        "def solve(a, b):\n    return itertools.repeat(0)\n",
        ("assert 5 in solve(2, 3)",),
        frozenset({"timeout", "memory", "output_limit"}),
        limits=SLOW,
    ),
    Attack(
        "colliding_hashes",
        '"""A cheap list of ints with one hash; a set of them, which the test makes, takes quadratic time in C."""\n\n\n'
        "def solve(a, b):\n    return [i * (2**61 - 1) for i in range(400_000)]\n",
        ("assert set(solve((3, 4), (5, 6))) == set((4, 5))",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "colliding_hashes_in_a_dict",
        '"""A dict subclass that claims to hold colliding keys, for the judge to rebuild."""\n\n\n'
        "class Keys(dict):\n    def items(self):\n        return [(i * (2**61 - 1), 0) for i in range(400_000)]\n\n"
        "    def __iter__(self):\n        return iter([i * (2**61 - 1) for i in range(400_000)])\n\n"
        "    keys = __iter__\n\n    def __len__(self):\n        return 400_000\n\n\n"
        "def solve(a, b):\n    return Keys(a=1)\n",
        limits=SLOW,
    ),
    Attack(
        "costly_sort_order",
        '"""A list of long equal lists: sorting it, as the test does, compares their ends again and again."""\n\n\n'
        "def solve(values):\n    head = [0] * 20_000\n    return [head + [i] for i in range(60, 0, -1)]\n",
        ("assert sorted(solve([3, 1, 2])) == [1, 2, 3]",),
        REFUSED | {"violation"},
        limits=SLOW,
    ),
    Attack(
        "deep_nesting",
        '"""A list 200,000 levels deep."""\n\n\n'
        "def solve(values):\n    answer = []\n    for _ in range(200_000):\n        answer = [answer]\n    return answer\n",
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "deep_nesting_of_many_kinds",
        '"""Alternates tuples, dicts, sets and lists to the depth that a counter of one kind misses."""\n\n\n'
        "def solve(values):\n    answer = ()\n    for i in range(3_000):\n"
        "        answer = [(answer,), {0: answer}, [answer, i]][i % 3]\n    return answer\n",
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "answer_that_contains_itself",
        '"""A list and a dict that contain themselves."""\n\n\n'
        "def solve(values):\n    answer = [1, 2, 3]\n    answer.append({'self': answer})\n    return answer\n",
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "exponential_sharing",
        '"""A list of 60 objects in memory that is 2**60 elements when written out."""\n\n\n'
        "def solve(values):\n    answer = [0]\n    for _ in range(60):\n        answer = [answer, answer]\n    return answer\n",
        SORT,
        frozenset({"output_limit", "timeout", "memory", "violation"}),
    ),
    Attack(
        "huge_bytes",
        '"""An answer above the limit for one answer."""\n\n\ndef solve(a, b):\n    return bytes(64 << 20)\n',
        verdicts=frozenset({"output_limit"}),
    ),
    Attack(
        "huge_str",
        '"""The same as text, 4 bytes a character."""\n\n\ndef solve(a, b):\n    return "\\U0001f600" * (30 << 20)\n',
        verdicts=frozenset({"output_limit", "memory"}),
    ),
    Attack(
        "many_small_elements",
        '"""Three million small ints: many times the size in the judge that they have on the wire."""\n\n\n'
        "def solve(values):\n    return [[] for _ in range(3_000_000)]\n",
        SORT,
        frozenset({"output_limit", "wrong_answer", "timeout", "memory"}),
    ),
    Attack(
        "many_records",
        '"""200,000 namedtuples of 1,000 kinds, each of which the judge must be able to read by name."""\n'
        "from collections import namedtuple\n\nkinds = [namedtuple('Kind', f'a{i} b') for i in range(1000)]\n\n\n"
        "def solve(values):\n    return [kinds[i % 1000](i, 0) for i in range(200_000)]\n",
        SORT,
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "changing_while_it_is_read",
        '''
"""A list that another thread changes while it is encoded."""
import threading

answer = [[0]] * 100


def churn():
    while True:
        answer.append(answer[:50])
        del answer[100:]


def solve(values):
    threading.Thread(target=churn, daemon=True).start()
    return answer
''',
        SORT,
    ),
    Attack(
        "numbers_of_the_c_side",
        '"""Lengths, indices and hashes that overflow C\'s integers."""\n\n\n'
        "class Answer:\n    __len__ = lambda self: 2**63 - 1\n    __hash__ = lambda self: -1\n"
        "    __index__ = lambda self: 2**100\n    __length_hint__ = lambda self: 2**62\n"
        "    __iter__ = lambda self: iter([3, 1, 2])\n    __getitem__ = lambda self, index: 2**100\n\n\n"
        "def solve(values):\n    return Answer()\n",
        ("answer = solve([3, 1, 2])\nassert len(answer) == 3 and list(answer) == [1, 2, 3]",),
        frozenset({"wrong_answer", "exception", "memory"}),
    ),
    Attack(
        "memory_by_length_hint",
        '"""Announces 2**40 items so that list() reserves memory for them in the judge."""\n\n\n'
        "class Answer:\n    __length_hint__ = __len__ = lambda self: 2**40\n    __iter__ = lambda self: iter([3, 1, 2])\n\n\n"
        "def solve(values):\n    return Answer()\n",
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"wrong_answer", "exception", "memory"}),
    ),
    Attack(
        "repetition_by_the_test",
        '"""A number that the test multiplies a text with."""\n\n\ndef solve(a, b):\n    return 1 << 38\n',
        ("assert 'x' * solve(2, 3) == 'xxxxx'",),
        REFUSED,
    ),
    Attack(
        "surrogates_and_nulls",
        '"""Text that UTF-8 cannot hold, NULs and control characters, as answer and as key."""\n\n\n'
        "def solve(text):\n    return {'\\ud800\\x00\\x1b[2J\\r\\n': ['\\udfff', b'\\x00\\xff']}\n",
        ("assert solve('ab') == 'ba'",),
        WRONG,
    ),
    Attack(
        "nan_that_equals_itself",
        '"""One and the same NaN twice: `==` of lists takes identity for equality."""\n'
        "nan = float('nan')\n\n\ndef solve(values):\n    return [nan, nan]\n",
        ("answer = solve([1])\nassert answer == [1.0, 1.0] or answer[0] == answer[1]",),
        WRONG,
    ),
    Attack(
        "same_name_as_the_judges_errors",
        '''
"""Raises exceptions named like what a judge may use for its own purposes."""
names = "HarnessError Violation OutputLimit Timeout TimeoutError RemoteError Died ChannelError WrongAnswer Passed".split()
calls = []


def solve(a, b):
    calls.append(a)
    name = names[a % len(names)]
    raise type(name, (Exception,), {"__module__": "wmtp.sandbox.judge"})("passed")
''',
        (
            "for number in range(10):\n    try:\n        solve(number, 0)\n    except Exception as error:\n        last = error\n"
            "assert solve(2, 3) == 5",
        ),
        frozenset({"exception"}),
    ),
    Attack(
        "assertion_error_of_its_own",
        '"""Raises AssertionError itself, which is not a wrong answer by the test but an exception of the program."""\n\n\n'
        "def solve(a, b):\n    raise AssertionError('passed')\n",
        verdicts=frozenset({"exception", "wrong_answer"}),
    ),
    _evil_exception(
        "exception_without_text",
        "An exception whose text, name and arguments cannot be shown.",
        "class Meta(type):\n    __name__ = property(lambda cls: 1 / 0)\n    __repr__ = __str__ = lambda cls: 1 / 0\n\n\n"
        "class Bad(Exception, metaclass=Meta):\n    __str__ = __repr__ = lambda self: 1 / 0\n"
        "    args = property(lambda self: 1 / 0)\n\n\ndef solve(a, b):\n    raise Bad\n",
    ),
    _evil_exception(
        "exception_with_endless_text",
        "An exception whose text is never finished.",
        "class Bad(Exception):\n    def __str__(self):\n        while True:\n            pass\n\n    __repr__ = __str__\n\n\n"
        "def solve(a, b):\n    raise Bad\n",
    ),
    _evil_exception(
        "exception_with_huge_text",
        "A message of 100 MB, with line breaks and escape sequences.",
        "def solve(a, b):\n    raise ValueError('\\x1b[2J\\n\\r\\x00' * (20 << 20))\n",
    ),
    _evil_exception(
        "exception_that_is_a_chain",
        "100,000 exceptions, each the cause of the next.",
        "def solve(a, b):\n    error = ValueError()\n    for _ in range(100_000):\n        new = ValueError()\n"
        "        new.__cause__ = new.__context__ = error\n        error = new\n    raise error\n",
    ),
    Attack(
        "exception_group",
        '"""A group that nests other groups, and a KeyboardInterrupt in them."""\n\n\n'
        "def solve(a, b):\n    group = BaseExceptionGroup('g', [KeyboardInterrupt()])\n    for _ in range(500):\n"
        "        group = BaseExceptionGroup('g', [group])\n    raise group\n",
        verdicts=frozenset({"exception"}),
    ),
    Attack(
        "handle_with_every_attribute",
        '"""An object that answers every attribute, __class__ and the judge\'s likely own names too."""\n\n\n'
        "class Everything:\n    def __getattribute__(self, name):\n        return Everything()\n\n"
        "    def __call__(self, *args, **kwargs):\n        return Everything()\n\n\nsecret = Everything()\n",
        SECRET,
        WRONG,
    ),
    Attack(
        "attribute_that_exits",
        '"""Looking at any attribute of the answer ends the process."""\nimport os\n\n\n'
        "class Mine:\n    def __getattribute__(self, name):\n        os._exit(0)\n\n\ndef solve(a, b):\n    return Mine()\n",
        verdicts=FAULTS,
        limits=QUICK,
    ),
)
