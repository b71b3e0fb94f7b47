"""Answers of every type that a task may ask for, compared as the task's author wrote it."""

from honest import Honest

PROGRAMS = (
    Honest(
        "floats_are_exact",
        """
def solve(a, b):
    return a + b
""",
        (
            "assert solve(0.1, 0.2) == 0.30000000000000004",
            "assert solve(0.1, 0.2) != 0.3",
            "assert solve(1e308, 1e-324) == 1e308",
            "assert str(solve(-0.0, -0.0)) == '-0.0'",
        ),
    ),
    Honest(
        "nan_and_infinity",
        """
def solve(name):
    return float(name)
""",
        (
            "assert math.isnan(solve('nan')) and solve('nan') != solve('nan')",
            "assert solve('inf') == float('inf') and solve('-inf') == -math.inf",
        ),
        preamble="import math",
    ),
    Honest(
        "big_ints",
        """
def solve(n):
    return [2**n, -(3**n), [10**n]]
""",
        (
            "assert solve(20000) == [2**20000, -(3**20000), [10**20000]]",
            "assert solve(20000)[0] % 1_000_003 == pow(2, 20000, 1_000_003)",
        ),
    ),
    Honest(
        "big_int_as_text",
        """
def solve(n):
    return str(10**n)
""",
        ("assert solve(5000) == '1' + '0' * 5000",),
    ),
    Honest(
        "big_int_as_text_in_a_program_that_lifts_the_limit",
        """
import sys

sys.set_int_max_str_digits(0)


def solve(n):
    return len(str(3**n))
""",
        ("assert solve(20000) == 9543",),
    ),
    Honest(
        "sets_of_frozensets",
        """
def solve(groups):
    return {frozenset(group) for group in groups}
""",
        ("assert solve([[1, 2], [2, 1], [3]]) == {frozenset({1, 2}), frozenset({3})}",),
    ),
    Honest(
        "nested_tuples",
        """
def solve(pairs):
    return tuple(((b, a), [(a,), ()]) for a, b in pairs)
""",
        ("assert solve([(1, 'x'), (2, 'y')]) == ((('x', 1), [(1,), ()]), (('y', 2), [(2,), ()]))",),
    ),
    Honest(
        "tuple_and_list_differ",
        """
def solve(values):
    return tuple(values)
""",
        ("assert solve([1, 2]) == (1, 2)", "assert solve([1, 2]) != [1, 2]", "assert type(solve([])) is tuple"),
    ),
    Honest(
        "dict_with_tuple_keys",
        """
def solve(points):
    return {(x, y): {x: [y]} for x, y in points}
""",
        (
            "assert solve([(0, 1), (2, 3)]) == {(0, 1): {0: [1]}, (2, 3): {2: [3]}}",
            "assert list(solve([(5, 1), (2, 3)])) == [(5, 1), (2, 3)]",
        ),
    ),
    Honest(
        "none_bool_and_int",
        """
def solve(n):
    if n < 0:
        return None
    return n if n > 1 else bool(n)
""",
        (
            "assert solve(-1) is None",
            "assert solve(1) is True and solve(0) is False",
            "assert solve(1) == 1 and type(solve(1)) is bool",
            "assert type(solve(2)) is int and not isinstance(solve(2), bool)",
        ),
    ),
    Honest(
        "complex_numbers",
        """
def solve(a, b):
    return complex(a, b) ** 2
""",
        ("assert solve(1.0, 2.0) == complex(-3, 4)", "assert solve(0.0, 1.0).real == -1.0"),
    ),
    Honest(
        "bytes_and_bytearray",
        """
def solve(data):
    return bytes(reversed(data)), bytearray(data)
""",
        (
            "assert solve(b'\\x00\\xff') == (b'\\xff\\x00', bytearray(b'\\x00\\xff'))",
            "assert type(solve(b'')[1]) is bytearray",
        ),
    ),
    Honest(
        "unicode",
        r"""
def solve(text):
    return text[::-1] + '\U0001f600' + 'ß'.upper()
""",
        ("assert solve('aé漢') == '漢éa😀SS'", "assert len(solve('😀')) == 4"),
    ),
    Honest(
        "lone_surrogates",
        """
def solve(text):
    return text[::-1]
""",
        (
            "assert solve('\\ud83d\\ude00') == '\\ude00\\ud83d'",
            "assert solve(solve('\\ud83d\\ude00')) == '\\ud83d' + '\\ude00'",
        ),
    ),
    Honest(
        "control_characters",
        """
def solve(n):
    return ''.join(map(chr, range(n)))
""",
        ("assert solve(300) == ''.join(map(chr, range(300)))", "assert solve(1) == '\\x00'"),
    ),
    Honest(
        "generators_consumed_by_the_test",
        """
def solve(n):
    for i in range(n):
        yield i, str(i)
""",
        (
            "assert list(solve(3)) == [(0, '0'), (1, '1'), (2, '2')]",
            "assert [a for a, _ in solve(4)] == [0, 1, 2, 3]",
            "items = solve(2)\nassert next(items) == (0, '0') and next(items) == (1, '1')\n"
            "assert next(items, None) is None",
            "assert sum(a for a, _ in solve(100)) == 4950",
        ),
    ),
    Honest(
        "lazy_builtins",
        """
def solve(values):
    return map(str, filter(None, values))


def pairs(values):
    return zip(values, reversed(values))
""",
        (
            "assert list(solve([0, 1, 2])) == ['1', '2']",
            "assert dict(pairs([1, 2])) == {1: 2, 2: 1}",
            "assert tuple(solve([])) == ()",
        ),
    ),
    Honest(
        "dict_views_and_ranges",
        """
def keys(mapping):
    return mapping.keys()


def values(mapping):
    return mapping.values()


def solve(n):
    return range(1, n)
""",
        (
            "assert sorted(keys({'b': 1, 'a': 2})) == ['a', 'b']",
            "assert list(values({'b': 1})) == [1]",
            "assert solve(4) == range(1, 4) and list(solve(4)) == [1, 2, 3]",
        ),
    ),
    Honest(
        "counter_defaultdict_ordereddict",
        """
from collections import Counter, OrderedDict, defaultdict, deque


def count(text):
    return Counter(text)


def group(words):
    groups = defaultdict(list)
    for word in words:
        groups[len(word)].append(word)
    return groups


def order(pairs):
    return OrderedDict(pairs)


def queue(values):
    return deque(values, maxlen=2)
""",
        (
            "assert count('aab') == {'a': 2, 'b': 1}",
            "assert count('aab').most_common(1) == [('a', 2)] and count('x')['y'] == 0",
            "assert group(['a', 'bc', 'd']) == {1: ['a', 'd'], 2: ['bc']}",
            "assert order([('b', 1), ('a', 2)]) == {'a': 2, 'b': 1} and list(order([('b', 1)]).items()) == [('b', 1)]",
            "assert list(queue([1, 2, 3])) == [2, 3]",
        ),
    ),
    Honest(
        "decimal_and_fraction",
        """
from decimal import Decimal
from fractions import Fraction


def solve(a, b):
    return Decimal(a) / Decimal(b), Fraction(a, b)
""",
        (
            "assert solve(1, 3) == (Decimal('0.3333333333333333333333333333'), Fraction(1, 3))",
            "assert solve(1, 4) == (0.25, 0.25)",
        ),
        preamble="from decimal import Decimal\nfrom fractions import Fraction",
    ),
    Honest(
        "dates",
        """
import datetime


def solve(year, days):
    return datetime.date(year, 1, 1) + datetime.timedelta(days=days)


def span(a, b):
    return b - a
""",
        (
            "assert solve(2024, 59) == datetime.date(2024, 2, 29)",
            "a, b = datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 2, 0, 0, 1)\n"
            "assert span(a, b) == datetime.timedelta(days=1, seconds=1)",
        ),
        preamble="import datetime",
    ),
    Honest(
        "namedtuple",
        """
from collections import namedtuple
from typing import NamedTuple

Point = namedtuple('Point', 'x y')


class Named(NamedTuple):
    name: str
    rank: int = 1


def solve(a, b):
    return Point(a, y=b)


def named(name):
    return Named(name)
""",
        (
            "assert solve(1, 2) == (1, 2)",
            "assert solve(1, 2).x == 1 and solve(1, 2).y == 2 and solve(1, 2)[1] == 2",
            "x, y = solve(3, 4)\nassert x + y == 7",
            "assert named('a').rank == 1 and named('a') == ('a', 1)",
        ),
    ),
    Honest(
        "dataclass_through_attributes",
        """
from dataclasses import dataclass, field


@dataclass(order=True)
class Item:
    price: float
    name: str = 'x'
    tags: list = field(default_factory=list)


def solve(price):
    return Item(price, tags=['new'])
""",
        ("assert solve(2.5).price == 2.5 and solve(2.5).name == 'x'", "item = solve(1.0)\nassert item.tags == ['new']"),
    ),
    Honest(
        "enum_members",
        """
import enum


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1


def solve(n):
    return Colour(n)


def level():
    return Level.LOW
""",
        ("assert solve(1).name == 'RED' and solve(2).value == 2", "assert level() == 1"),
    ),
    Honest(
        "subclasses_of_builtin_types",
        """
class Text(str):
    pass


class Values(list):
    def total(self):
        return sum(self)


class Number(int):
    pass


def solve(values):
    return [Text('a'), Values(values), Number(7)]
""",
        ("assert solve([1, 2]) == ['a', [1, 2], 7]",),
    ),
    Honest(
        "stateful_object",
        """
class Account:
    def __init__(self, balance=0):
        self.balance = balance
        self.history = []

    def pay(self, amount):
        self.balance += amount
        self.history.append(amount)
        return self

    def __len__(self):
        return len(self.history)

    def __getitem__(self, index):
        return self.history[index]
""",
        (
            "account = Account(10)\naccount.pay(5).pay(-3)\n"
            "assert account.balance == 12 and account.history == [5, -3]\n"
            "assert len(account) == 2 and account[-1] == -3",
            "a, b = Account(), Account(1)\na.pay(1)\nassert a.balance == b.balance",
        ),
    ),
    Honest(
        "linked_nodes_of_the_setup",
        """
class Node:
    def __init__(self, data):
        self.data = data
        self.left = self.right = None


def height(node):
    return 0 if node is None else 1 + max(height(node.left), height(node.right))


def mirror(node):
    return node and mirror_of(node)


def mirror_of(node):
    node.left, node.right = mirror(node.right), mirror(node.left)
    return node
""",
        (
            "assert height(root) == 3",
            "assert height(root.left) == 2 and root.left.data == 2",
            "assert mirror(root).right.left is None and height(root) == 3",
        ),
        setup="root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(3)",
    ),
    Honest(
        "functions_as_answers",
        """
def adder(n):
    return lambda x: x + n


def compose(*functions):
    def run(x):
        for f in functions:
            x = f(x)
        return x

    return run
""",
        (
            "assert adder(2)(3) == 5",
            "plus, minus = adder(1), adder(-1)\nassert plus(minus(7)) == 7",
            "assert compose(adder(1), adder(2))(0) == 3",
        ),
    ),
    Honest(
        "long_answers",
        """
def solve(n):
    return list(range(n)), 'x' * n
""",
        ("numbers, text = solve(200_000)\nassert numbers[-1] == 199_999 and len(text) == 200_000",),
    ),
    Honest(
        "deeply_nested_answer",
        """
def solve(n):
    answer = []
    for _ in range(n):
        answer = [answer]
    return answer
""",
        ("answer = solve(60)\ndepth = 0\nwhile answer:\n    answer, depth = answer[0], depth + 1\nassert depth == 60",),
    ),
    Honest(
        "numpy_answers",
        """
import numpy as np


def mean(values):
    return np.mean(values)


def count(values):
    return np.int64(len(values))


def any_above(values, x):
    return np.any(np.array(values) > x)


def solve(values):
    return np.cumsum(values).tolist()


def product(n):
    a = np.arange(n * n, dtype=float).reshape(n, n)
    return float((a @ a).trace())
""",
        (
            "assert mean([1, 2, 4]) == 7 / 3",
            "assert count([1, 2]) == 2",
            "assert any_above([1, 5], 4) == True",
            "assert solve([1, 2, 3]) == [1, 3, 6]",
            "assert product(2) == 13.0",
            "n = 300  # large enough for BLAS to want its threads\n"
            "assert product(n) == sum((i * n + k) * (k * n + i) for i in range(n) for k in range(n))",
        ),
        needs="numpy",
    ),
)
