"""Attacks on what tests may do with a program's objects: operators, lengths, types, callbacks, contexts, exceptions."""

from attacks import FAULTS, SECRET, Attack, Limits
from attacks.channel import FIND

WRONG = frozenset({"wrong_answer"})
FAILED = frozenset({"wrong_answer", "exception", "violation"})
REFUSED = frozenset({"wrong_answer", "output_limit", "memory", "timeout", "violation", "exception"})
SLOW = Limits(cpu_seconds=1.0, wall_seconds=2.0)
SIX = "assert solve(2, 3) == 5"
CLOSE = "assert abs(solve(2, 3) - 7.5) < 1e-6"


def _attack(name: str, says: str, body: str, *tests: str, verdicts: frozenset = FAILED, **fields) -> Attack:
    return Attack(name, f'"""{says}"""\n{body.strip()}\n', tests or (SIX,), verdicts, **fields)


def _forged(name: str, says: str, value: str, *tests: str, verdicts: frozenset = REFUSED, **fields) -> Attack:
    """Sends `value`, an expression of the text of a tagged value, in place of its answer."""
    body = f"""{FIND}

def solve(*args):
    data = answer({value})
    for descriptor in channels():
        os.set_blocking(descriptor, True)
        os.write(descriptor, data)
    os._exit(0)
"""
    return _attack(name, says, body, *tests, verdicts=verdicts, **fields)


ATTACKS = (
    _attack(
        "exception_that_catches_the_tests_failure",
        "Its own exception is AssertionError, which the test catches together with its own failed assertion.",
        "Bad = AssertionError\ndef solve(n): return 0",
        "try:\n    solve(1)\n    assert False\nexcept Bad:\n    pass",
        verdicts=WRONG,
    ),
    _attack(
        "exception_that_is_every_exception",
        "The same with a base of it, in `suppress`.",
        "Bad = Exception\ndef solve(n): return 0",
        "from contextlib import suppress\nwith suppress(Bad):\n    assert solve(1) == 1",
        verdicts=WRONG,
    ),
    _attack(
        "exception_among_others_of_an_attribute",
        "A tuple of classes under an attribute, one of which is AssertionError.",
        "class solve:\n    Errors = (ValueError, AssertionError)",
        "try:\n    assert solve() == 1\nexcept solve.Errors:\n    pass",
    ),
    _attack(
        "class_of_every_error",
        "No class, but what `suppress` asks whether a failed assertion is one of its own.",
        "class Kind(type):\n    def __subclasscheck__(cls, other): return True\n"
        "class Bad(metaclass=Kind): pass\ndef solve(n): return 0",
        "from contextlib import suppress\nwith suppress(Bad):\n    assert solve(1) == 1",
    ),
    _attack(
        "number_that_changes",
        "`float` gives another number each time it is asked.",
        "class Number:\n    def __init__(self): self.reads = 0\n    def __float__(self):\n        self.reads += 1\n"
        "        return 3.0 if self.reads % 2 else 4.0\n\ndef solve(): return Number()",
        "import math\na = solve()\nassert math.isclose(float(a), 3.0) and math.isclose(float(a), 4.0)",
        verdicts=WRONG,
    ),
    _attack(
        "list_with_two_contents",
        "A list by its place gives what it does not hold.",
        "class Two(list):\n    def __getitem__(self, key): return key\n\ndef solve(): return Two([2, 0, 1])",
        "a = solve()\nassert all(a[i] <= a[i + 1] for i in range(2)) and set(a) == {0, 1, 2}",
        verdicts=WRONG,
    ),
    _attack(
        "one_awaitable_ten_times",
        "One object in ten places counts as ten.",
        "class A:\n    def __await__(self): yield\n\ndef solve(n): return [A()] * n",
        "assert len(set(solve(10))) == 10",
    ),
    _attack(
        "classes_instead_of_answers",
        "Two exceptions, and nothing else that the test asks for: no failure of the judge's.",
        "class Animal(Exception): pass\nclass Dog(Exception): pass",
        "assert issubclass(Dog, Animal)",
        verdicts=WRONG,
    ),
    _attack(
        "same_list_that_should_be_a_copy",
        "Gives back its argument, where the test wants another list.",
        "def solve(a): return a",
        "a = [1]\nb = solve(a)\nassert b == a and b is not a",
        verdicts=FAILED,
    ),
    _attack(
        "builtin_of_the_entry_points_program",
        "Defines `set`, which is called first where everything else in the test is a builtin too.",
        "set = lambda *args: 0\ndef solve(a, b): pass",
        "assert set(solve(1, 2)) == set([1])",
        entry_point="solve",
        verdicts=WRONG,
    ),
    _attack(
        "builtin_that_reads_the_expected_value",
        "Defines `sorted`, to be handed the expected value and to recite it.",
        "got = []\ndef sorted(x):\n    got.append(x)\n    return 0\n\n\n"
        "def solve(x):\n    return got[-1] if len(got) > 1 else 0",
        "assert sorted(solve(1)) == sorted([914273])",
        "assert solve(1) == [914273]",
        entry_point="solve",
        verdicts=WRONG,
    ),
    _attack(
        "builtin_of_a_method",
        "A method with a builtin's name is the entry point; the test adds up with the builtin.",
        "class Solution:\n    def sum(self, *args):\n        return 5",
        "def check(candidate):\n    assert candidate([1]) == sum([2, 2])\n\n\ncheck(candidate)",
        entry_point="Solution().sum",
        verdicts=WRONG,
    ),
    _attack(
        "difference_that_is_zero",
        "An object whose difference to anything is 0.0: the operator is told the expected value.",
        "class Near:\n    __sub__ = __rsub__ = lambda self, other: 0.0\n\n\ndef solve(a, b):\n    return Near()",
        CLOSE,
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "float_whose_difference_is_zero",
        "A float that changes its subtraction.",
        "class Near(float):\n    __sub__ = __rsub__ = lambda self, other: 0.0\n\n\ndef solve(a, b):\n"
        "    return Near(1)",
        CLOSE,
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "list_that_adds_what_is_expected",
        "A list that turns into the other operand when something is added to it.",
        "class Any(list):\n    __add__ = __radd__ = lambda self, other: [5, *other]\n\n\n"
        "def solve(a, b):\n    return Any()",
        "assert solve(2, 3) + [1] == [5, 1]",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "length_without_items",
        "Three long and empty, for tests that compare item by item.",
        "class G:\n    def __len__(self): return 3\n    def __iter__(self): return iter(())\n\n\n"
        "def solve(a, b):\n    return G()",
        "got = solve(2, 3)\nassert len(got) == 3 and all(a == b for a, b in zip(got, [9, 8, 7]))",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "items_only_at_the_first_look",
        "Has three items while its length is asked, and none when they are compared.",
        "class G:\n    looks = 0\n    def __len__(self): return 3\n"
        "    def __iter__(self):\n        G.looks += 1\n        return iter([1, 2, 3] if G.looks == 1 else [])\n\n\n"
        "def solve(a, b):\n    return G()",
        "got = solve(2, 3)\nassert len(got) == 3 and all(a == b for a, b in zip(got, [9, 8, 7]))",
        verdicts=WRONG,
    ),
    _attack(
        "list_subclass_with_another_length",
        "A list that says it is three long.",
        "class G(list):\n    __len__ = lambda self: 3\n\n\ndef solve(a, b):\n    return G()",
        "got = solve(2, 3)\nassert len(got) == 3 and all(a == b for a, b in zip(got, [9, 8, 7]))",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "truth_against_length",
        "Iterates over nothing, is three long for len() and true for bool(); a loop over it asserts nothing.",
        "class G:\n    __len__ = lambda self: 3\n    __bool__ = lambda self: True\n"
        "    __getitem__ = lambda self, i: [][i]\n"
        "\n\ndef solve(a, b):\n    return G()",
        "got = solve(2, 3)\nassert got and len(got) == 3\nfor a, b in zip(got, [9, 8, 7]):\n    assert a == b",
        verdicts=WRONG,
    ),
    _attack(
        "contains_by_its_own_word",
        "Has nothing but a __contains__ that is true for all.",
        "class All:\n    __contains__ = lambda self, item: True\n\n\ndef solve(a, b):\n    return All()",
        "assert 5 in solve(2, 3)",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "own_objects_that_are_equal",
        "Makes whatever the test compares an object of its own.",
        "class P:\n    def __init__(self, *args): pass\n    __eq__ = lambda self, other: True\n"
        "    __hash__ = lambda self: 1"
        "\n\n\ndef solve(a, b):\n    return P(0, 0)",
        "assert solve(2, 3) == P(2, 3)",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "own_objects_in_a_set",
        "Objects of its own whose hashes and comparisons make one of two.",
        "class P:\n    def __init__(self, *args): pass\n    __eq__ = lambda self, other: True\n"
        "    __hash__ = lambda self: 1"
        "\n\n\ndef solve(a, b):\n    return [P(), P()]",
        "assert len(set(solve(2, 3))) == 1",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "own_objects_in_order",
        "Objects that are less than one another.",
        "class P:\n    __lt__ = __gt__ = lambda self, other: True\n\n\ndef solve(a, b):\n    return P()",
        "assert solve(2, 3) < solve(1, 2) and sorted([solve(1, 2), solve(2, 3)])",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "swallowed_assertion",
        "A context manager that swallows the failed assertion of its block.",
        "class Quiet:\n    __enter__ = lambda self: 6\n    __exit__ = lambda self, *args: True\n\n\n"
        "def solve(a, b):\n    return Quiet()",
        "with solve(2, 3) as v:\n    assert v == 5",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "assertion_turned_into_the_expected_exception",
        "Replaces the failed assertion by the exception that the test expects.",
        "class Quiet:\n    __enter__ = lambda self: 6\n    def __exit__(self, *args): raise ValueError\n\n\n"
        "def solve(a, b):\n    return Quiet()",
        "try:\n    with solve(2, 3) as v:\n        assert v == 5\nexcept ValueError:\n    pass",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "swallowed_exception_of_its_own",
        "Raises at the first look at its value, and swallows that, so that the block asserts nothing.",
        "class Value:\n    def __getitem__(self, index): raise KeyError\n\n\nclass Quiet:\n"
        "    __enter__ = lambda self: Value()\n"
        "    __exit__ = lambda self, *args: True\n\n\ndef solve(a, b):\n    return Quiet()",
        "with solve(2, 3) as v:\n    assert v[0] == 5",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "assertion_in_a_callback_swallowed",
        "Calls the test's function with a wrong value and swallows its AssertionError.",
        "def solve(check):\n    try:\n        check(6)\n    except BaseException:\n        pass",
        "def check(value):\n    assert value == 5\n\n\nsolve(check)",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "attributes_of_a_callback",
        "Looks for the expected value in the globals, defaults, constants and closure of the test's function.",
        "def secret(check):\n    found = [getattr(check, name, None) for name in\n"
        "             ('__defaults__', '__globals__', '__closure__', '__kwdefaults__', '__wrapped__', '__self__')]\n"
        "    numbers = [c for c in check.__code__.co_consts if type(c) is int and c > 10**5]\n"
        "    for thing in found:\n        things = thing.values() if isinstance(thing, dict) else thing or ()\n"
        "        numbers += [t for t in things if type(t) is int and t > 10**5]\n"
        "    return numbers[0] if numbers else 0",
        "expected = 914273\ndef check(value, expected=expected): return value == 914273\n"
        "assert secret(check) == expected",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "forged_callback_numbers",
        "Asks the judge for attributes of what the test has handed over, and for what it has not, by forged calls.",
        FIND
        + """

def ask(number, operation, args):
    for descriptor in channels():
        caller = sys._getframe()
        nonces = []
        while caller:
            request = caller.f_locals.get("request")
            nonces += [request["nonce"]] if isinstance(request, dict) and "nonce" in request else []
            caller = caller.f_back
        os.set_blocking(descriptor, True)
        os.write(descriptor, frame(json.dumps({"nonce": nonces[0], "call": [number, operation, args, {}]})))
        return os.read(descriptor, 1 << 16)


def secret(check):
    seen = b"".join(ask(*call) for call in [(0, "attr", ["__globals__"]), (0, "attr", ["__code__"]), (9, "call", [])])
    return 914273 if b"914273" in seen else 0
""",
        "expected = 914273\ndef check(value, expected=expected): return value\nassert secret(check) == expected",
        verdicts=frozenset({"violation"}),
    ),
    _attack(
        "calls_after_the_answer",
        "Keeps the test's function and calls it from a thread when the call is over.",
        "import threading, time\n\n\ndef solve(cb):\n    def later():\n        time.sleep(0.05)\n        while True:\n"
        "            try:\n                cb(1)\n            except Exception:\n                pass\n"
        "    threading.Thread(target=later, daemon=True).start()\n    return 6",
        "calls = []\nassert solve(calls.append) == 6",
        "for _ in range(50):\n    assert solve(calls.append) == 5",
        verdicts=FAULTS,
    ),
    _attack(
        "callback_without_end",
        "Calls the test's function for ever.",
        "def solve(cb):\n    while True:\n        cb(1)",
        "assert solve(lambda x: x) == 5",
        verdicts=frozenset({"timeout", "output_limit", "memory"}),
        limits=SLOW,
    ),
    _attack(
        "callback_into_callback",
        "Calls a function of the test that calls the program, and so on.",
        "import sys\nsys.setrecursionlimit(10**6)\n\n\ndef solve(cb):\n    return cb(cb)",
        "assert solve(lambda cb: solve(cb)) == 5",
        verdicts=REFUSED,
        limits=SLOW,
    ),
    _attack(
        "costly_call_of_a_callback",
        "Hands the test's function a number that it computes with for ever.",
        "def solve(cb):\n    return cb(10**9)",
        "assert solve(lambda n: 7**n) == 5",
        verdicts=frozenset({"timeout", "memory"}),
        limits=SLOW,
    ),
    _attack(
        "assertion_error_as_its_own_class",
        "Raises a class of its own that is an AssertionError, and one named like the judge's.",
        "class Ended(AssertionError):\n    verdict = 'passed'\n    detail = ''\n\n\n"
        "def solve(a, b):\n    raise Ended('passed')",
        verdicts=frozenset({"exception"}),
    ),
    _attack(
        "class_that_says_what_it_is",
        "Raises an exception whose metaclass and class claim to be what the test expects.",
        "class Meta(type):\n    __instancecheck__ = __subclasscheck__ = lambda cls, other: True\n"
        "    mro = type.mro\n\n\n"
        "class Any(Exception, metaclass=Meta):\n    __class__ = ValueError\n\n\ndef solve(a, b):\n    raise Any",
        "try:\n    solve(2, 3)\n    assert False\nexcept ValueError:\n    pass",
        verdicts=frozenset({"exception"}),
    ),
    _attack(
        "attributes_of_an_exception_that_compare",
        "Puts an object that equals everything into an exception.",
        "class All:\n    __eq__ = lambda self, other: True\n\n\nclass Bad(Exception):\n    code = All()\n"
        "    def __init__(self): self.args = (All(),)\n"
        "\n\ndef solve(a, b):\n    raise Bad",
        "try:\n    solve(2, 3)\nexcept Bad as e:\n    assert e.code == 7 or e.args == (7,)\nelse:\n    assert False",
        verdicts=WRONG,
        fools_naive=True,
    ),
    _attack(
        "flood_of_warnings",
        "Warns without end and with long messages, for a judge that keeps them all.",
        "import warnings\n\n\ndef solve(a, b):\n    for i in range(30_000):\n"
        "        warnings.warn(str(i) * 50_000)\n    return 6",
        verdicts=REFUSED,
        limits=SLOW,
    ),
    _attack(
        "warning_class_without_end",
        "Warns with a class that has hundreds of base classes.",
        "import warnings\n\nkinds = [type(f'W{i}', (UserWarning,), {}) for i in range(300)]\n\n\n"
        "def solve(a, b):\n    warnings.warn('x', type('W', tuple(kinds), {}))\n    return 6",
        verdicts=FAILED,
    ),
    _attack(
        "values_that_are_other_than_they_say",
        "A number whose attributes and text say what is expected, while its value is another.",
        "class Int(int):\n    real = 5\n    __str__ = __repr__ = __format__ = lambda self, *args: '5'\n"
        "    __index__ = __int__ = lambda self: 5\n\n\ndef solve(a, b):\n    return Int(6)",
        "got = solve(2, 3)\nassert str(got) == '5' and got == 5",
        verdicts=WRONG,
    ),
    _attack(
        "set_of_one_hash",
        "A set that it took no time to make and that the judge would take for ever to put in order.",
        "class Cheap(int):\n    def __hash__(self): return id(self)\n\n\n"
        "def solve(values):\n    return {Cheap(i * (2**61 - 1)) for i in range(60_000)}",
        "assert solve([3, 1, 2]) == {1, 2, 3}",
        verdicts=REFUSED,
        limits=SLOW,
    ),
    _attack(
        "harness_error_by_depth",
        "Raises the codec's limit and answers so deep that the judge cannot hand it back.",
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('wmtp'):\n"
        "        vars(module).update(MAX_DEPTH=10**6)\n\n\n"
        "def solve(x):\n    if type(x) is list: return 0\n    for _ in range(x): x = [x]\n    return x",
        *(f"assert solve(solve({depth})) == 5" for depth in (150, 390, 450, 900, 3000)),
        verdicts=REFUSED,
    ),
    _attack(
        "harness_error_by_what_cannot_be_sent",
        "Answers with what a test cannot hand on.",
        "def solve(x):\n    return solve",
        "import threading\nassert solve([solve(1), threading.Lock()]) == 5",
        verdicts=WRONG,
    ),
    _attack(
        "modules_of_the_sandbox_replaced",
        "Replaces every function of the sandbox's modules in its process, the table of operations too.",
        "import sys\nfor name, module in list(sys.modules.items()):\n    if name.startswith('wmtp.sandbox.'):\n"
        "        for key, value in list(vars(module).items()):\n"
        "            if isinstance(value, dict) and key.isupper():\n"
        "                value.update(dict.fromkeys(value, lambda *args, **kwargs: True))\n\n\n"
        "def secret():\n    return 0",
        *SECRET,
        "assert abs(secret() - 914273) < 1e-6",
        verdicts=FAILED,
    ),
    _forged(
        "type_that_runs_code",
        "Names `eval`, `exec` and a module in place of a class.",
        """'[{"type":["eval"]},{"type":["wmtp.sandbox.judge"]}]'""",
        "assert solve(2, 3)[0]('5') == 5",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "path_of_a_function",
        "Answers with a library function by its path, as only the judge may.",
        """'{"p":"builtins:eval"}'""",
        "assert solve(2, 3)('5') == 5",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "array_that_is_a_bomb",
        "An array of a shape that its data do not fill.",
        """'{"numpy":["<f8",[1000000,1000000],{"b":"00"}]}'""",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "array_without_size",
        "An array of no elements that is large along one side, which the test sums up along the other.",
        """'{"numpy":["<f8",[0,1000000000000],{"b":""}]}'""",
        "assert solve(2, 3).sum(axis=0).tolist() == [5]",
    ),
    _forged(
        "array_type_of_the_program",
        "An array of a type that describes itself.",
        """'{"numpy":["O,O",[1],{"b":"00"}]}'""",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "abilities_of_nothing",
        "A handle of nothing, with every ability and an odd base.",
        """'{"h":[10000000,"lincwaANWbz\\\\u0000",["eval"],[5],[]]}'""",
        "got = solve(2, 3)\nassert got == 5 or len(got) == 5 or got + got == 5",
    ),
    _forged(
        "value_of_an_odd_class",
        "A subclass instance whose value is of no class that can have subclasses, or has one already.",
        """'{"h":[0,"","x",["eq","hash","sub"],true]}'""",
        "assert solve(2, 3) == 5",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "operators_that_are_no_operators",
        "A float that claims to have changed its comparisons, so that they are put to the program.",
        """'{"h":[0,"","x",["eq","lt","hash","getattribute","sub"],6.0]}'""",
        "got = solve(2, 3)\nassert got == 5 or abs(got - 5) < 1e-6",
        verdicts=WRONG,
    ),
    _forged(
        "digits_that_are_slow_to_read",
        "A frame full of integers of many decimal digits, which take quadratic time.",
        "'[' + ','.join(['9' * 90_000] * 100) + ']'",
        verdicts=frozenset({"violation", "output_limit"}),
    ),
    _forged(
        "set_that_is_slow_to_order",
        "A set whose order and table size fit nothing, so that every way of filling it is tried.",
        """'[%s]' % ','.join('{"set":[33000,[%s,"x",-1,-2]]}' % str([*range(i, i + 400)])[1:-1] for i in range(60))""",
        "assert solve(2, 3) == 5",
        limits=SLOW,
    ),
    _forged(
        "factory_of_the_test",
        "A defaultdict whose factory is a function of the test's, by a number that was never given out.",
        """'{"defaultdict":[{"j":0}]}'""",
        "assert solve(2, 3)[1] == 5",
        verdicts=frozenset({"violation"}),
    ),
    _forged(
        "record_with_other_methods",
        "A named tuple whose fields and name are those of a tuple's own methods.",
        """'{"record":[["__eq__","__class__","_replace","_asdict","__len__"],[1,2,3,4,5],"int"]}'""",
        "got = solve(2, 3)\nassert got == 5 or len(got) == 1 or got._asdict == 4",
        verdicts=WRONG,
    ),
)
