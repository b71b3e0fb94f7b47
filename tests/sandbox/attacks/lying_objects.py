"""Answers that claim to equal whatever they are compared with."""

from attacks import SECRET, SORT, Attack

WRONG = frozenset({"wrong_answer"})

# Compares equal to, and orders well with, everything; survives arithmetic.
LIAR = """
class Liar:
    def _self(self, *args, **kwargs):
        return self

    def _true(self, *args, **kwargs):
        return True

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __bool__ = _true
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _self
    __abs__ = __neg__ = __round__ = __getitem__ = __call__ = _self

    def __hash__(self):
        return 1

    def __len__(self):
        return 3

    def __iter__(self):
        return iter([self, self, self])
"""

TURNS = """
class Turns:
    turn = 0

    def __init__(self, *turns):
        self.turns = turns

    def __iter__(self):
        self.turn += 1
        return iter(self.turns[min(self.turn, len(self.turns)) - 1])


"""

ATTACKS = (
    Attack(
        "always_equal_object",
        '"""Answers with an object whose every comparison is true."""' + LIAR + "def solve(a, b):\n    return Liar()\n",
        verdicts=WRONG,
        fools_naive=True,
    ),
    Attack(
        "always_equal_secret",
        '"""Passes a test of an unknown value by equality alone."""' + LIAR + "secret = Liar()\n",
        SECRET,
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "int_subclass",
        '''
"""An int, wrong by value, that overrides its comparisons."""
class Int(int):
    __eq__ = __le__ = __ge__ = lambda self, other: True
    __ne__ = __lt__ = __gt__ = lambda self, other: False
    __hash__ = int.__hash__
    __index__ = __int__ = lambda self: 5


def solve(a, b):
    return Int(6)
''',
        verdicts=WRONG,
        fools_naive=True,
    ),
    Attack(
        "int_subclass_on_the_right",
        '''
"""The same, where Python asks the right operand first because it is the subclass."""
class Int(int):
    __eq__ = lambda self, other: True
    __hash__ = int.__hash__


def solve(a, b):
    return Int(6)
''',
        ("assert 5 == solve(2, 3)",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "str_subclass",
        '''
"""A str that overrides its comparisons and its iteration."""
class Str(str):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = str.__hash__
    __iter__ = lambda self: iter("ba")
    __str__ = lambda self: self


def solve(text):
    return Str("wrong")
''',
        ("assert solve('ab') == 'ba'",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "list_subclass",
        '''
"""A list that overrides its comparisons and counts its accesses."""
class List(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __getitem__ = lambda self, index: 0
    __len__ = lambda self: 3


def solve(values):
    return List([9])
''',
        SORT,
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "dict_subclass",
        '''
"""A dict that overrides its comparisons and its views."""
class Dict(dict):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    items = keys = values = lambda self: [("a", 1)]


def solve(text):
    return Dict(wrong=0)
''',
        ("assert solve('a') == {'a': 1}",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "float_subclass_in_isclose",
        '''
"""A float whose arithmetic leads every tolerance check to true."""
class Float(float):
    __sub__ = __rsub__ = __abs__ = lambda self, *args: self
    __lt__ = __le__ = __eq__ = lambda self, other: True
    __hash__ = float.__hash__


def solve(a, b):
    return Float(1e9)
''',
        ("assert abs(solve(2, 3) - 5.0) < 1e-6",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "arithmetic_survivor",
        '"""An object that is its own difference and absolute value, and less than everything."""'
        + LIAR
        + "def solve(a, b):\n    return Liar()\n",
        ("assert abs(solve(2, 3) - 5.0) < 1e-6",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "class_property",
        '''
"""An object that is no int but says it is one when asked for its class."""
class Disguise:
    __class__ = int
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 5
    __int__ = __index__ = lambda self: 5
    bit_length = lambda self: 3


def solve(a, b):
    return Disguise()
''',
        ("answer = solve(2, 3)\nassert isinstance(answer, int) and answer == 5",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "metaclass_equality",
        '''
"""The answer is a class; its metaclass says that it equals everything."""
class Meta(type):
    __eq__ = lambda cls, other: True
    __hash__ = type.__hash__


class Answer(metaclass=Meta):
    pass


def solve(a, b):
    return Answer
''',
        verdicts=WRONG,
        fools_naive=True,
    ),
    Attack(
        "constructor_as_function",
        '"""The function is a class, so that calling it makes the liar."""' + LIAR + "class solve(Liar):\n"
        "    def __init__(self, *args):\n        pass\n",
        verdicts=WRONG,
        fools_naive=True,
    ),
    Attack(
        "liars_in_a_list",
        '"""An honest list of three dishonest elements."""' + LIAR + "def solve(values):\n    return [Liar()] * 3\n",
        SORT,
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "liars_in_nested_containers",
        '"""Liars as dict values, tuple items and at depth."""' + LIAR + "def solve(n):\n"
        "    return {'a': (Liar(), [Liar()]), 'b': Liar()}\n",
        ("assert solve(1) == {'a': (1, [2]), 'b': {3}}",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "liars_from_a_generator",
        '"""A generator whose items are liars."""' + LIAR + "def solve(values):\n"
        "    for _ in values:\n        yield Liar()\n",
        ("assert list(solve([3, 1, 2])) == [1, 2, 3]",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "liar_as_attribute",
        '"""An instance whose attributes are liars."""' + LIAR + "class Point:\n"
        "    def __init__(self, x, y):\n        self.x = self.y = Liar()\n\n\n"
        "def solve(a, b):\n    return Point(a, b)\n",
        ("point = solve(2, 3)\nassert point.x == 2 and point.y == 3",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "contains_everything",
        '"""An object that contains whatever is looked for."""' + LIAR + "def solve(a, b):\n    return Liar()\n",
        ("assert 5 in solve(2, 3)",),
        frozenset({"wrong_answer", "exception"}),
        fools_naive=True,
    ),
    Attack(
        "empty_at_first",
        '"""An object without a length that has no items where each is looked at, and has them to be counted."""'
        + TURNS
        + "def solve():\n    return Turns([], [9, 9, 9])\n",
        ("found = solve()\nassert all(item < 5 for item in found) and len(list(found)) == 3",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "empty_later",
        '"""The same the other way round."""' + TURNS + "def solve():\n    return Turns([9, 9, 9], [])\n",
        ("found = solve()\nassert len(list(found)) == 3 and all(item < 5 for item in found)",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "other_items_each_time",
        '"""The same items are not what it yields the second time."""'
        + TURNS
        + "def solve(items):\n    return Turns(items, [1, 1, 1])\n",
        (
            "found = solve([3, 1, 2])\nassert set(found) == {1, 2, 3}\nbefore = 0\n"
            "for item in found:\n    assert before <= item\n    before = item",
        ),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "keys_that_collide",
        '"""A set of liars with one hash, so that set equality asks them."""' + LIAR + "class One(int):\n"
        "    __hash__ = lambda self: hash(1)\n    __eq__ = lambda self, other: True\n\n\n"
        "def solve(values):\n    return {One(7)}\n",
        ("assert set(solve([1])) == {1}",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "decimal_and_fraction_subclasses",
        '''
"""Numbers of the standard library's own classes, with their comparisons overridden."""
import decimal
import fractions


class D(decimal.Decimal):
    __eq__ = lambda self, other: True
    __hash__ = decimal.Decimal.__hash__


class F(fractions.Fraction):
    __eq__ = lambda self, other: True
    __hash__ = fractions.Fraction.__hash__


def solve(a, b):
    return [D("1.5"), F(1, 3)]
''',
        ("assert solve(2, 3) == [5, 5]",),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "proxy_of_the_comparison",
        '''
"""An object that copies the value it is compared with out of the reflected comparison, and answers with it later."""
seen = []


class Thief:
    def __eq__(self, other):
        seen.append(other)
        return True


def secret():
    return seen[0] if seen else Thief()
''',
        ("assert secret() == 914273", "assert secret() == 914273"),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "different_at_every_look",
        '''
"""A handle whose iteration gives another length and other items at every look, so that one of the looks fits."""
class Shifting:
    looks = 0

    def __iter__(self):
        Shifting.looks += 1
        return iter([[1, 2, 3], [3, 2, 1], []][Shifting.looks % 3])

    def __eq__(self, other):
        return True


def solve(values):
    return Shifting()
''',
        ("answer = solve([3, 1, 2])\nassert answer == [1, 2, 3] and list(answer) == [1, 2, 3]",),
        WRONG,
    ),
    Attack(
        "equality_through_ne",
        '"""Passes `not (answer != expected)`."""'
        + LIAR.replace("__ne__ = ", "")
        + "    def __ne__(self, other):\n        return False\n\n\ndef solve(a, b):\n    return Liar()\n",
        ("assert not (solve(2, 3) != 5)",),
        WRONG,
        fools_naive=True,
    ),
)
