"""Programs that redefine the names the trusted tests use: the tests' own meaning of a name must win."""

from attacks import Attack

WRONG = frozenset({"wrong_answer"})
FAILED = frozenset({"wrong_answer", "exception"})

ATTACKS = (
    Attack(
        "shadowed_builtins",
        '''
"""Defines its own set, sorted, abs, len and all, which make both sides of every comparison equal."""
set = sorted = lambda *args, **kwargs: 0
abs = sum = round = lambda *args, **kwargs: 0
len = lambda *args: 3
all = any = isinstance = lambda *args, **kwargs: True


def solve(values):
    return "wrong"
''',
        (
            "assert set(solve([3, 1, 2])) == set([1, 2, 3])",
            "assert sorted(solve([3, 1, 2])) == sorted([1, 2, 3])",
            "assert len(solve([3, 1, 2])) == 3 and all(a == b for a, b in zip(solve([3, 1, 2]), [1, 2, 3]))",
        ),
        WRONG,
        fools_naive=True,
    ),
    Attack(
        "shadowed_module_of_the_preamble",
        '''
"""Defines a `math` whose isclose is always true, under the name that the tests import."""
class math:
    isclose = staticmethod(lambda *args, **kwargs: True)


def solve(a, b):
    return 0.0
''',
        ("assert math.isclose(solve(2, 3), 5.0)",),
        WRONG,
        preamble="import math",
    ),
    Attack(
        "poisoned_module_of_the_setup",
        '''
"""Replaces `math` in sys.modules, so that the data set's `import math` gets the fake."""
import sys


class Fake:
    isclose = staticmethod(lambda *args, **kwargs: True)


sys.modules["math"] = Fake


def solve(a, b):
    return 0.0
''',
        ("assert math.isclose(solve(2, 3), 5.0)",),
        FAILED,
        setup="import math",
        fools_naive=True,
    ),
    Attack(
        "patched_class_of_the_setup",
        '''
"""Replaces collections.Counter, which the data set's set-up imports for both sides of the comparison."""
import collections

collections.Counter = lambda *args: 0


def solve(values):
    return [1, 1, 1, 1]
''',
        ("assert Counter(solve([3, 1, 2])) == Counter([1, 2, 3])",),
        FAILED,
        setup="from collections import Counter",
        fools_naive=True,
    ),
    Attack(
        "fake_module_under_a_free_name",
        '''
"""Defines a fake `sys` where the test takes the expected value from the real one."""
class sys:
    getsizeof = staticmethod(lambda value: 0)


def solve(value):
    return 0
''',
        ("assert solve((1, 2)) == sys.getsizeof((1, 2))",),
        FAILED,
        fools_naive=True,
    ),
    Attack(
        "shadowed_reference",
        '''
"""Redefines the helper function and the constant that the trusted preamble gives to the tests."""
EXPECTED = 0
tolerance = 1e99


def reference(n):
    return 0


def solve(n):
    return 0
''',
        ("assert solve(4) == reference(4)", "assert abs(solve(4) - EXPECTED) < tolerance"),
        WRONG,
        preamble="EXPECTED, tolerance = 16, 1e-9\n\n\ndef reference(n):\n    return n * n",
    ),
    Attack(
        "own_check_function",
        '''
"""Defines `check`, `candidate` and METADATA itself, as HumanEval's tests do."""
METADATA = {}
candidate = lambda *args: 5


def check(candidate):
    pass


def solve(a, b):
    return 6
''',
        ("def check(candidate):\n    assert candidate(2, 3) == 5\n\n\ncheck(candidate)",),
        WRONG,
        entry_point="solve",
    ),
    Attack(
        "check_that_deletes_itself",
        '''
"""Waits until it is called and then looks for the `check` function to replace its code."""
import gc
import sys
import types


def solve(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing.__name__ == "check":
            thing.__code__ = (lambda candidate: None).__code__
    return 6
''',
        ("def check(candidate):\n    candidate(0, 0)\n\n\ncheck(candidate)\nassert candidate(2, 3) == 5",),
        WRONG,
        entry_point="solve",
    ),
    Attack(
        "dunder_names",
        '''
"""Sets the module variables that Python itself reads: __builtins__, __name__, __debug__ by way of the namespace."""
globals()["__debug__"] = False
globals()["__builtins__"] = {"AssertionError": StopIteration, "set": lambda *args: 0, "__build_class__": None}


def solve(a, b):
    return 6
''',
        ("assert solve(2, 3) == 5", "assert set([solve(2, 3)]) == set([5])"),
        FAILED,
    ),
)
