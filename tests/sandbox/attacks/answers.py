"""Answers made to break the judge that reads them: too big, too deep, without end, or costly to compare."""

from attacks import FAULTS, QUICK, SECRET, SORT, Attack, Limits

WRONG = frozenset({"wrong_answer"})
REFUSED = frozenset({"wrong_answer", "output_limit", "memory", "timeout"})
SLOW = Limits(cpu_seconds=1.0, wall_seconds=2.0)
ENDLESS = Limits(cpu_seconds=1.0, wall_seconds=1.0)


def _evil_exception(name: str, says: str, body: str) -> Attack:
    return Attack(name, f'"""{says}"""\n{body}', verdicts=frozenset({"exception", "memory", "timeout", "output_limit"}))


ATTACKS = (
    Attack(
        "million_digits",
        '''
"""An int of a million digits, which str() refuses to show."""


def solve(a, b):
    return 10 ** (10**6)
''',
        verdicts=frozenset({"wrong_answer", "output_limit"}),
    ),
    Attack(
        "million_digits_in_a_list",
        '''
"""The same inside containers, as key and as element."""


def solve(values):
    return [{10 ** (10**5): (-(10 ** (10**5)),)}]
''',
        SORT,
        WRONG,
    ),
    Attack(
        "tower_of_powers",
        '''
"""An int that no computer finishes."""


def solve(a, b):
    return 9**9**9
''',
        verdicts=frozenset({"timeout", "memory"}),
    ),
    Attack(
        "int_shown_by_the_test",
        '''
"""An int whose decimal digits take minutes to make, where the test calls str() on the answer."""


def solve(a, b):
    return 1 << 50_000_000
''',
        ("assert str(solve(2, 3)) == '5'",),
        REFUSED,
    ),
    Attack(
        "exponent_for_the_test",
        '''
"""A small answer that is costly where the test computes with it."""


def solve(a, b):
    return 10**9
''',
        ("assert 7 ** solve(2, 3) == 16807",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "decimal_exponent",
        '''
"""A Decimal of few digits that is a huge int once the test rounds it."""
from decimal import Decimal


def solve(a, b):
    return Decimal('1E+99999999999')
''',
        ("assert round(solve(2, 3)) == 5",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "fraction_of_huge_ints",
        '''
"""A Fraction that takes for ever to reduce when it is built anew."""
from fractions import Fraction


def solve(a, b):
    f = Fraction(1, 3)
    f._numerator, f._denominator = 3**3_000_000, 2**4_000_000 + 1
    return f
''',
        verdicts=REFUSED,
        limits=SLOW,
    ),
    Attack(
        "endless_range",
        '''
"""A range, tiny as a value, that the test turns into a list."""


def solve(values):
    return range(10**12)
''',
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "endless_generator",
        '''
"""A generator that never ends, consumed by the test."""
import itertools


def solve(values):
    return itertools.count()
''',
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"timeout", "memory", "output_limit"}),
        limits=ENDLESS,
    ),
    Attack(
        "endless_handles",
        '''
"""An iterator that never ends, of objects that the judge can only hold by name."""


class Thing:
    pass


def solve(values):
    while True:
        yield Thing()
''',
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"timeout", "memory", "output_limit", "violation"}),
        limits=ENDLESS,
    ),
    Attack(
        "lazy_membership",
        '''
"""The test looks for a value in an iterator that never yields it."""
import itertools


def solve(a, b):
    return itertools.repeat(0)
''',
        ("assert 5 in solve(2, 3)",),
        frozenset({"timeout", "memory", "output_limit"}),
        limits=ENDLESS,
    ),
    Attack(
        "colliding_hashes",
        '''
"""A cheap list of ints with one hash; a set of them, which the test makes, takes quadratic time in C."""


def solve(a, b):
    return [i * (2**61 - 1) for i in range(400_000)]
''',
        ("assert set(solve((3, 4), (5, 6))) == set((4, 5))",),
        REFUSED,
        limits=SLOW,
    ),
    Attack(
        "colliding_hashes_in_a_dict",
        '''
"""A dict subclass that claims to hold colliding keys, for the judge to rebuild."""


class Keys(dict):
    def items(self):
        return [(i * (2**61 - 1), 0) for i in range(400_000)]

    def __iter__(self):
        return iter([i * (2**61 - 1) for i in range(400_000)])

    keys = __iter__

    def __len__(self):
        return 400_000


def solve(a, b):
    return Keys(a=1)
''',
        limits=SLOW,
    ),
    Attack(
        "costly_sort_order",
        '''
"""A list of long equal lists: sorting it, as the test does, compares their ends again and again."""


def solve(values):
    head = [0] * 20_000
    return [head + [i] for i in range(60, 0, -1)]
''',
        ("assert sorted(solve([3, 1, 2])) == [1, 2, 3]",),
        REFUSED | {"violation"},
        limits=SLOW,
    ),
    Attack(
        "deep_nesting",
        '''
"""A list 200,000 levels deep."""


def solve(values):
    answer = []
    for _ in range(200_000):
        answer = [answer]
    return answer
''',
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "deep_nesting_of_many_kinds",
        '''
"""Alternates tuples, dicts, sets and lists to the depth that a counter of one kind misses."""


def solve(values):
    answer = ()
    for i in range(3_000):
        answer = [(answer,), {0: answer}, [answer, i]][i % 3]
    return answer
''',
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "answer_that_contains_itself",
        '''
"""A list and a dict that contain themselves."""


def solve(values):
    answer = [1, 2, 3]
    answer.append({'self': answer})
    return answer
''',
        SORT,
        frozenset({"wrong_answer", "output_limit", "violation", "exception"}),
    ),
    Attack(
        "exponential_sharing",
        '''
"""A list of 60 objects in memory that is 2**60 elements when written out."""


def solve(values):
    answer = [0]
    for _ in range(60):
        answer = [answer, answer]
    return answer
''',
        SORT,
        frozenset({"output_limit", "timeout", "memory", "violation"}),
    ),
    Attack(
        "huge_bytes",
        '''
"""An answer above the limit for one answer."""


def solve(a, b):
    return bytes(64 << 20)
''',
        verdicts=frozenset({"output_limit"}),
    ),
    Attack(
        "huge_str",
        r'''
"""The same as text, 4 bytes a character."""


def solve(a, b):
    return "\U0001f600" * (30 << 20)
''',
        verdicts=frozenset({"output_limit", "memory"}),
    ),
    Attack(
        "many_small_elements",
        '''
"""Three million small ints: many times the size in the judge that they have on the wire."""


def solve(values):
    return [[] for _ in range(3_000_000)]
''',
        SORT,
        frozenset({"output_limit", "wrong_answer", "timeout", "memory"}),
    ),
    Attack(
        "many_records",
        '''
"""200,000 namedtuples of 1,000 kinds, each of which the judge must be able to read by name."""
from collections import namedtuple

kinds = [namedtuple('Kind', f'a{i} b') for i in range(1000)]


def solve(values):
    return [kinds[i % 1000](i, 0) for i in range(200_000)]
''',
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
        '''
"""Lengths, indices and hashes that overflow C's integers."""


class Answer:
    __len__ = lambda self: 2**63 - 1
    __hash__ = lambda self: -1
    __index__ = lambda self: 2**100
    __length_hint__ = lambda self: 2**62
    __iter__ = lambda self: iter([3, 1, 2])
    __getitem__ = lambda self, index: 2**100


def solve(values):
    return Answer()
''',
        ("answer = solve([3, 1, 2])\nassert len(answer) == 3 and list(answer) == [1, 2, 3]",),
        frozenset({"wrong_answer", "exception", "memory"}),
    ),
    Attack(
        "memory_by_length_hint",
        '''
"""Announces 2**40 items so that list() reserves memory for them in the judge."""


class Answer:
    __length_hint__ = __len__ = lambda self: 2**40
    __iter__ = lambda self: iter([3, 1, 2])


def solve(values):
    return Answer()
''',
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        frozenset({"wrong_answer", "exception", "memory"}),
    ),
    Attack(
        "repetition_by_the_test",
        '''
"""A number that the test multiplies a text with."""


def solve(a, b):
    return 1 << 38
''',
        ("assert 'x' * solve(2, 3) == 'xxxxx'",),
        REFUSED,
    ),
    Attack(
        "surrogates_and_nulls",
        r'''
"""Text that UTF-8 cannot hold, NULs and control characters, as answer and as key."""


def solve(text):
    return {'\ud800\x00\x1b[2J\r\n': ['\udfff', b'\x00\xff']}
''',
        ("assert solve('ab') == 'ba'",),
        WRONG,
    ),
    Attack(
        "nan_that_equals_itself",
        '''
"""One and the same NaN twice: `==` of lists takes identity for equality."""
nan = float('nan')


def solve(values):
    return [nan, nan]
''',
        ("answer = solve([1])\nassert answer == [1.0, 1.0] or answer[0] == answer[1]",),
        WRONG,
    ),
    Attack(
        "same_name_as_the_judges_errors",
        '''
"""Raises exceptions named like what a judge may use for its own purposes."""
names = "HarnessError Violation OutputLimit Timeout TestStuck TestBroken RemoteError Ended Hangup ZygoteLost".split()
calls = []


def solve(a, b):
    calls.append(a)
    name = names[a % len(names)]
    raise type(name, (Exception,), {"__module__": "wmtp.sandbox.judge"})("passed")
''',
        (
            "for number in range(10):\n    try:\n        solve(number, 0)\n    except Exception:\n        pass\n"
            "assert solve(2, 3) == 5",
        ),
        frozenset({"exception"}),
    ),
    Attack(
        "assertion_error_of_its_own",
        '''
"""Raises AssertionError itself, which is not a wrong answer by the test but an exception of the program."""


def solve(a, b):
    raise AssertionError('passed')
''',
        verdicts=frozenset({"exception", "wrong_answer"}),
    ),
    _evil_exception(
        "exception_without_text",
        "An exception whose text, name and arguments cannot be shown.",
        """
class Meta(type):
    __name__ = property(lambda cls: 1 / 0)
    __repr__ = __str__ = lambda cls: 1 / 0


class Bad(Exception, metaclass=Meta):
    __str__ = __repr__ = lambda self: 1 / 0
    args = property(lambda self: 1 / 0)


def solve(a, b):
    raise Bad
""",
    ),
    _evil_exception(
        "exception_with_endless_text",
        "An exception whose text is never finished.",
        """
class Bad(Exception):
    def __str__(self):
        while True:
            pass

    __repr__ = __str__


def solve(a, b):
    raise Bad
""",
    ),
    _evil_exception(
        "exception_with_huge_text",
        "A message of 100 MB, with line breaks and escape sequences.",
        r"""
def solve(a, b):
    raise ValueError('\x1b[2J\n\r\x00' * (20 << 20))
""",
    ),
    _evil_exception(
        "exception_that_is_a_chain",
        "100,000 exceptions, each the cause of the next.",
        """
def solve(a, b):
    error = ValueError()
    for _ in range(100_000):
        new = ValueError()
        new.__cause__ = new.__context__ = error
        error = new
    raise error
""",
    ),
    Attack(
        "exception_group",
        '''
"""A group that nests other groups, and a KeyboardInterrupt in them."""


def solve(a, b):
    group = BaseExceptionGroup('g', [KeyboardInterrupt()])
    for _ in range(500):
        group = BaseExceptionGroup('g', [group])
    raise group
''',
        verdicts=frozenset({"exception"}),
    ),
    Attack(
        "handle_with_every_attribute",
        '''
"""An object that answers every attribute, __class__ and the judge's likely own names too."""


class Everything:
    def __getattribute__(self, name):
        return Everything()

    def __call__(self, *args, **kwargs):
        return Everything()


secret = Everything()
''',
        SECRET,
        WRONG,
    ),
    Attack(
        "attribute_that_exits",
        '''
"""Looking at any attribute of the answer ends the process."""
import os


class Mine:
    def __getattribute__(self, name):
        os._exit(0)


def solve(a, b):
    return Mine()
''',
        verdicts=FAULTS,
        limits=QUICK,
    ),
)
