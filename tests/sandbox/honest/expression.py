"""Tests that use a program's objects in all ways that can be judged from outside: operators, callbacks, contexts."""

from honest import Honest

PROGRAMS = (
    Honest(
        "functions_of_the_test",
        """
import threading
from functools import reduce


def apply(function, *values):
    return [function(value) for value in values]


def fold(function, values):
    return reduce(function, values)


def same(function):
    return function


def guarded(function):
    try:
        return function()
    except KeyError as error:
        return error.args[0]


def in_threads(function, n):
    found = []
    threads = [threading.Thread(target=lambda i=i: found.append(function(i))) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)
""",
        (
            "calls = []\ndef cb(x, *, k=1):\n    calls.append(x)\n    return x * k\n"
            "assert apply(cb, 1, 'a') == [1, 'a'] and calls == [1, 'a']",
            "assert apply(lambda x: apply(lambda y: x + y, 1, 2), 10, 20) == [[11, 12], [21, 22]]",
            "import operator\nassert fold(operator.add, [1, 2, 3]) == 6 and fold(lambda a, b: a * b, [2, 3, 4]) == 24",
            "import math\n"
            "assert apply(math.sqrt, 4) == [2.0] and apply(str.lower, 'A') == ['a'] and apply(int, '7') == [7]",
            "f = lambda x: x\nassert same(f) is f and same(len)([1]) == 1",
            "def fails():\n    raise KeyError('why')\nassert guarded(fails) == 'why'",
            "def fails(x):\n    raise ValueError('from the test')\ntry:\n    apply(fails, 1)\n    assert False\n"
            "except ValueError as error:\n    assert str(error) == 'from the test'",
            "assert in_threads(lambda i: i * i, 5) == [0, 1, 4, 9, 16]",
            "d = {}\napply(d.setdefault, 'a', 'b')\nassert d == {'a': None, 'b': None}",
        ),
    ),
    Honest(
        "objects_that_are_gone_through_again",
        """
class Bag:
    def __init__(self, *items):
        self.items = list(items)

    def add(self, item):
        self.items.append(item)

    def __iter__(self):
        return iter(self.items)


class Item:
    size = 1


class Fibonacci:
    def __iter__(self):
        a, b = 0, 1
        while True:
            yield a
            a, b = b, a + b
""",
        (
            "bag = Bag(2, 1)\nassert [*bag] == [2, 1] and sorted(bag) == [1, 2] and 2 in bag and next(iter(bag)) == 2",
            "bag = Bag()\nassert list(bag) == []\nbag.add(1)\nassert list(bag) == [1] == list(bag)\n"
            "bag.add(2)\nassert [*bag] == [1, 2]",
            "bag = Bag(Item(), {'a': {1, 2}}, float('nan'))\nassert len(list(bag)) == 3 and list(bag)[0].size == 1\n"
            "assert list(bag)[1] == {'a': {1, 2}}",
            "import itertools\nfound = Fibonacci()\nassert list(itertools.islice(found, 5)) == [0, 1, 1, 2, 3]\n"
            "assert list(itertools.islice(found, 7)) == [0, 1, 1, 2, 3, 5, 8]",
        ),
    ),
    Honest(
        "arrays_in_a_list_of_its_own_class",
        """
import numpy as np


class Rows(list):
    pass


def rows(n):
    return Rows(np.arange(n) + i for i in range(n))
""",
        ("found = rows(2)\nassert len(found) == 2 and (found[1] == [1, 2]).all() and found[-1].sum() == 3",),
    ),
    Honest(
        "iterators_and_views_of_the_test",
        """
import itertools


def solve(values):
    return sorted(values)


def first(n, values):
    return list(itertools.islice(values, n))


def swap(mapping):
    return {value: key for key, value in mapping}
""",
        (
            "d = {'b': 1, 'a': 2}\nassert solve(d.keys()) == ['a', 'b'] and solve(d.values()) == [1, 2]",
            "assert swap(d.items()) == {1: 'b', 2: 'a'}",
            "assert solve(x * x for x in [2, -1]) == [1, 4] and solve(map(abs, [-3, 2])) == [2, 3]",
            "assert solve(zip([2, 1], 'ab')) == [(1, 'b'), (2, 'a')] and solve(iter([2, 1])) == [1, 2]",
            "from itertools import count\nnumbers = count(5)\nassert first(3, numbers) == [5, 6, 7]\n"
            "assert next(numbers) == 8",
            "assert solve(range(3, 0, -1)) == [1, 2, 3] and solve(reversed([1, 2])) == [1, 2]",
        ),
    ),
    Honest(
        "builtins_first_in_the_tests",
        """
def f(x):
    return [3, 1]


def g(x):
    return (a for a in (3, 1))
""",
        (
            "assert all(a == b for a, b in zip(f(1), [3, 1])) and any(x == 1 for x in f(1))",
            "assert sum(v * v for v in f(1)) == 10 and dict(zip(f(1), 'ab')) == {3: 'a', 1: 'b'}",
            "assert set(f(1)) == {1, 3} and tuple(f(1)) == (3, 1) and list(map(str, f(1))) == ['3', '1']",
            "assert max(g(1)) == 3 and 3 in g(1) and sorted(g(1), key=lambda x: -x) == [3, 1]",
        ),
        entry_point="f",
    ),
    Honest(
        "objects_and_their_operators",
        """
class Vector:
    def __init__(self, *parts):
        self.parts = parts

    def __add__(self, other):
        return Vector(*(a + b for a, b in zip(self.parts, other.parts)))

    def __neg__(self):
        return Vector(*(-a for a in self.parts))

    def __matmul__(self, other):
        return sum(a * b for a, b in zip(self.parts, other.parts))

    def __len__(self):
        return len(self.parts)

    def __getitem__(self, index):
        return self.parts[index]

    def __setitem__(self, index, value):
        self.parts = (*self.parts[:index], value, *self.parts[index + 1 :])

    def __iter__(self):
        return iter(self.parts)

    def __repr__(self):
        return f'Vector{self.parts}'

    def __format__(self, spec):
        return '|'.join(format(part, spec) for part in self.parts)

    def __hash__(self):
        return hash(self.parts)

    def __bool__(self):
        return any(self.parts)

    def __float__(self):
        return float(self @ self) ** 0.5

    def __call__(self, x):
        return [part * x for part in self.parts]


class Countdown:
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n


class Point(tuple):
    @property
    def x(self):
        return self[0]

    def __add__(self, other):
        return Point(a + b for a, b in zip(self, other))
""",
        (
            "v, w = Vector(1, 2), Vector(3, 4)\nassert (v + w).parts == (4, 6) and (-v)[1] == -2 and v @ w == 11",
            "assert repr(v) == 'Vector(1, 2)' and str(w) == 'Vector(3, 4)' and f'{v:.1f}' == '1.0|2.0'",
            "assert len(v) == 2 and list(v) == [1, 2] and 2 in v and 5 not in v and [*w] == [3, 4]",
            "assert hash(v) == hash((1, 2)) and float(w) == 5.0 and w(2) == [6, 8] and bool(v) and not Vector(0)",
            "v[0] = 7\nassert list(v) == [7, 2] and v[0] == 7\nv.parts = (1, 2, 3)\nassert len(v) == 3",
            "assert v != 5 and not v == (1, 2) and v is v and v is not None and [v] == [v]",
            "assert type(v).__name__ == 'Vector' and v.__class__.__name__ == 'Vector' and isinstance(v, Vector)",
            "assert callable(v) and not callable(Countdown(1)) and len(Countdown(3)) == 3 and not Countdown(0)",
            "p = Point((1, 2)) + Point((3, 4))\nassert p == (4, 6) and p.x == 4 and isinstance(p, tuple)",
            "import copy\nu = copy.deepcopy(v)\nu.parts = ()\nassert len(v) == 3 and len(u) == 0",
        ),
    ),
    Honest(
        "subclasses_of_containers",
        """
from collections import Counter, OrderedDict, UserDict, defaultdict


class Stack(list):
    def push(self, x):
        self.append(x)
        return self

    def peek(self):
        return self[-1]


class Bag(Counter):
    def size(self):
        return sum(self.values())


class Table(dict):
    def __missing__(self, key):
        return key * 2


class Names(UserDict):
    pass


def nested(n):
    tree = lambda: defaultdict(tree)
    t = tree()
    t['a']['b'] = n
    return t
""",
        (
            "s = Stack()\ns.push(1).push(2)\ns.append(3)\nassert s == [1, 2, 3] and s.peek() == 3 and len(s) == 3",
            "assert s.pop() == 3 and s == [1, 2] and sum(s) == 3 and [0] + s == [0, 1, 2] and isinstance(s, list)",
            "s.extend([5, 4])\nassert sorted(s) == [1, 2, 4, 5] and s[1:] == [2, 5, 4] and 5 in s and s",
            "b = Bag('aab')\nassert b == {'a': 2, 'b': 1} and b.size() == 3 and b['z'] == 0",
            "t = Table(a=1)\nassert t['a'] == 1 and t['b'] == 'bb' and t == {'a': 1} and dict(t) == {'a': 1}",
            "n = Names(a=1)\nassert len(n) == 1 and n['a'] == 1 and list(n) == ['a']",
            "assert nested(5) == {'a': {'b': 5}} and nested(5)['a']['b'] == 5",
        ),
    ),
    Honest(
        "enums_of_numbers_and_texts",
        """
import enum
import http


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Colour(str, enum.Enum):
    RED = 'r'


class Right(enum.IntFlag):
    READ = 1
    WRITE = 2


def level(n):
    return Level(n)


def status():
    return http.HTTPStatus(404)
""",
        (
            "assert level(2) == 2 and level(2) == Level.HIGH and level(1).name == 'LOW' and level(1) < Level.HIGH",
            "assert Colour.RED == 'r' and Colour.RED.name == 'RED' and Colour.RED.value == 'r'",
            "assert (Right.READ | Right.WRITE) == 3 and status() == 404 and status().phrase == 'Not Found'",
            "assert [member.name for member in Level] == ['LOW', 'HIGH']",
        ),
    ),
    Honest(
        "exceptions_with_what_they_carry",
        """
import warnings


class Bank:
    class Poor(Exception):
        pass

    def pay(self, amount):
        raise Bank.Poor(amount)


class Bad(ValueError):
    def __init__(self, code, **more):
        super().__init__(code)
        self.code, self.more = code, more

    def __str__(self):
        return f'bad {self.code}'

    @property
    def doubled(self):
        return self.code * 2


class Worse(Bad):
    pass


def f(code):
    if code == 0:
        open('/nonexistent')
    if code < 0:
        try:
            {}['missing']
        except KeyError as error:
            raise Worse(code) from error
    raise Bad(code, why={'a': [1]})


def old():
    warnings.warn('old', DeprecationWarning)
    return 1


def leave(code):
    raise SystemExit(code)
""",
        (
            "try:\n    f(7)\nexcept Bad as e:\n"
            "    assert e.code == 7 and e.more == {'why': {'a': [1]}} and e.args == (7,)\n"
            "    assert str(e) == 'bad 7' and e.doubled == 14 and isinstance(e, ValueError)\nelse:\n    assert False",
            "try:\n    f(-1)\nexcept (KeyError, Bad) as e:\n"
            "    assert type(e).__name__ == 'Worse' and isinstance(e, Worse)\n"
            "    assert isinstance(e.__cause__, KeyError) and e.__cause__.args == ('missing',)\nelse:\n"
            "    assert False",
            "try:\n    f(0)\n    assert False\nexcept FileNotFoundError as e:\n"
            "    assert e.errno == 2 and e.filename == '/nonexistent'",
            "try:\n    Bank().pay(5)\nexcept Bank.Poor as e:\n    assert e.args[0] == 5\nelse:\n    assert False",
            "import unittest\nwith unittest.TestCase().assertRaisesRegex(Bad, 'bad 3') as raised:\n    f(3)\n"
            "assert raised.exception.code == 3",
            "unittest.TestCase().assertRaises(Worse, f, -2)\n"
            "assert issubclass(Worse, Bad) and issubclass(Bad, ValueError)",
            "import warnings\nwith warnings.catch_warnings(record=True) as w:\n    warnings.simplefilter('always')\n"
            "    assert old() == 1\n"
            "assert len(w) == 1 and w[0].category is DeprecationWarning and str(w[0].message) == 'old'",
            "try:\n    leave(3)\nexcept SystemExit as e:\n    assert e.code == 3\nelse:\n    assert False",
            "assert Bad(5).code == 5",
        ),
    ),
    Honest(
        "contexts_and_coroutines",
        """
import asyncio
import contextlib

log = []


class Session:
    def __enter__(self):
        log.append('in')
        return self

    def __exit__(self, *args):
        log.append(args[0] is None)

    async def __aenter__(self):
        return 5

    async def __aexit__(self, *args):
        log.append('out')


@contextlib.contextmanager
def number():
    yield 5


async def double(x):
    await asyncio.sleep(0)
    return 2 * x


async def numbers(n):
    for i in range(n):
        yield i
""",
        (
            "with number() as v:\n    assert v == 5",
            "with Session() as s:\n    assert log == ['in'] and isinstance(s, Session)\nassert log == ['in', True]",
            "try:\n    with Session():\n        raise KeyError\nexcept KeyError:\n    pass\nassert log[-1] is False",
            "import asyncio\nassert asyncio.run(double(4)) == 8",
            "async def main():\n    assert await double(1) == 2\n"
            "    assert await asyncio.gather(double(2), double(3)) == [4, 6]\n"
            "    assert [i async for i in numbers(3)] == [0, 1, 2]\n    async with Session() as v:\n"
            "        assert v == 5\n"
            "asyncio.run(main())\nassert log[-1] == 'out'",
        ),
    ),
    Honest(
        "values_of_the_library",
        """
import array, datetime, pathlib, uuid, zoneinfo
from collections import defaultdict


def kinds(x):
    return type(x), slice(1, 3), ..., NotImplemented


def times(text):
    there = datetime.datetime.fromisoformat(text).replace(tzinfo=zoneinfo.ZoneInfo('Europe/Berlin'))
    return there, datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


def odd():
    return pathlib.Path('a') / 'b.txt', uuid.UUID(int=1), array.array('i', [1, 2]), memoryview(b'ab')


def groups(words):
    found = defaultdict(list)
    for word in words:
        found[len(word)].append(word)
    return found


def views(mapping):
    return mapping.keys(), mapping.items()


def deep(n):
    answer = []
    for _ in range(n):
        answer = [answer]
    return answer
""",
        (
            "assert kinds(1)[0] is int and kinds('a') == (str, slice(1, 3), ..., NotImplemented)",
            "assert kinds(None)[0] is type(None)",
            "import datetime\nt, u = times('2024-07-01T12:00')\nassert t.utcoffset() == datetime.timedelta(hours=2)\n"
            "assert t.tzinfo.key == 'Europe/Berlin' and u.tzinfo is datetime.timezone.utc",
            "p, i, a, m = odd()\n"
            "assert p.name == 'b.txt' and str(i).endswith('1') and list(a) == [1, 2] and bytes(m) == b'ab'",
            "g = groups(['a', 'bc'])\nassert g == {1: ['a'], 2: ['bc']} and g[9] == []",
            "k, i = views({'b': 1, 'a': 2})\nassert k == {'a', 'b'} and list(i) == [('b', 1), ('a', 2)] and 'a' in k",
            "d = deep(300)\nn = 0\nwhile d:\n    d, n = d[0], n + 1\nassert n == 300",
        ),
    ),
    Honest(
        "named_tuples_in_full",
        """
from collections import namedtuple
from typing import NamedTuple

Point = namedtuple('Point', 'x y')


class Item(NamedTuple):
    name: str
    count: int = 1

    def total(self):
        return self.count * 2


def move(p, dx):
    return p._replace(x=p.x + dx)
""",
        (
            "p = move(Point(1, 2), 3)\n"
            "assert p == (4, 2) and p._asdict() == {'x': 4, 'y': 2} and p._fields == ('x', 'y')",
            "assert repr(p) == 'Point(x=4, y=2)' and p._replace(y=0) == (4, 0)",
            "assert isinstance(p, Point) and p == Point(4, 2)",
            "assert move(move(Point(0, 0), 1), 2).x == 3",
            "i = Item('a', 3)\nassert i.count == 3 and i.total() == 6 and i == ('a', 3) and i < ('b', 0)",
        ),
    ),
    Honest(
        "classes_that_only_the_test_has",
        """
def reversed_list(node):
    before = None
    while node:
        after = node.successor
        node.successor = before
        before, node = node, after
    return before


def reachable(start, goal):
    seen, queue = set(), [start]
    while queue:
        node = queue.pop()
        if node is goal:
            return True
        if node not in seen:
            seen.add(node)
            queue.extend(node.successors)
    return False


def weights(nodes):
    return [node.weight(2) for node in nodes]
""",
        (
            "class Node:\n    def __init__(self, value, successor=None, successors=()):\n"
            "        self.value, self.successor, self.successors = value, successor, successors\n"
            "    def weight(self, k):\n        return self.value * k\n"
            "a = Node(1)\nb = Node(2, a)\nc = Node(3, b)\nout = reversed_list(c)\n"
            "assert [out.value, out.successor.value, out.successor.successor.value] == [1, 2, 3]",
            "a, b = Node(1), Node(2)\nc = Node(3, successors=[a])\na.successors = [c, b]\n"
            "assert reachable(c, b) and not reachable(b, c)",
            "assert weights([a, b]) == [2, 4]",
        ),
    ),
    Honest(
        "signatures_and_attributes",
        """
def f(a, b=2, *args, key=None, **more):
    'what it does'
    return a


f.attr = 5


class A:
    'a class'
    limit = 3
""",
        (
            "import inspect\nassert list(inspect.signature(f).parameters) == ['a', 'b', 'args', 'key', 'more']",
            "assert inspect.signature(f).parameters['b'].default == 2",
            "assert f.__doc__ == 'what it does' and f.attr == 5 and f.__name__ == 'f' and A.__doc__ == 'a class'",
            "assert A.limit == 3 and A().limit == 3 and hasattr(f, 'attr') and not hasattr(f, 'other')",
        ),
    ),
    Honest(
        "order_of_a_set",
        """
def as_list(values):
    return list(set(values))


def as_set(values):
    return set(values)


def as_tuple(values):
    return tuple(values)
""",
        (
            "for n in range(40):\n    numbers = [i * 7 % 41 for i in range(n)]\n"
            "    assert as_list(numbers) == list(set(numbers)) == list(as_set(numbers))",
            "assert as_tuple({12, 13, 14, 15, 16}) == tuple({12, 13, 14, 15, 16})",
            "for n in range(30):\n    s = frozenset(i * i for i in range(n)) | {3}\n    assert as_tuple(s) == tuple(s)",
        ),
    ),
    Honest(
        "numpy_arrays",
        """
import numpy as np


def double(x):
    return np.asarray(x) * 2


def pick(x, indices):
    return x[indices]


def stats(x):
    return x.mean(), x > 1, x.astype('f4'), np.array([None, {1: 2}], dtype=object)
""",
        (
            "import numpy as np\nassert (double([1, 2, 3]) == np.array([2, 4, 6])).all() and double(3) == 6",
            "assert double(np.eye(2)).tolist() == [[2.0, 0.0], [0.0, 2.0]]",
            "assert double([1]).dtype == np.array([1]).dtype",
            "a = np.arange(6).reshape(2, 3)\nassert (pick(a, (1, slice(None))) == a[1]).all()\n"
            "assert (pick(a, np.array([[True, False, True]] * 2)) == a[:, ::2].ravel()).all()",
            "mean, above, small, odd = stats(np.array([0.1, 2.5]))\n"
            "assert isinstance(mean, np.float64) and above.tolist() == "
            "[False, True]\nassert small[0] == np.float32(0.1) and odd[1] == {1: 2}",
            "np.testing.assert_allclose(double(np.array([0.1, 0.2])), [0.2, 0.4])",
        ),
        needs="numpy",
    ),
)
