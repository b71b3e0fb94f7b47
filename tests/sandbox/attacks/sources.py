"""Texts that are no programs, or cost more to compile than to run. Some cannot begin with a docstring."""

from attacks import Attack

NO_PROGRAM = frozenset({"exception"})
BOMB = frozenset({"exception", "memory", "timeout", "violation", "wrong_answer", "output_limit"})
SOLVE = "\n\ndef solve(a, b):\n    return 6\n"


def _attack(name: str, program: str, verdicts=NO_PROGRAM, **kwargs) -> Attack:
    return Attack(name, program, verdicts=verdicts, **kwargs)


ATTACKS = (
    _attack("empty_source", ""),
    _attack(
        "prose",
        """
Here is the function you asked for:
""",
    ),
    _attack(
        "unbalanced_source",
        '''
"""Ends in the middle of a statement."""
def solve(a, b:
''',
    ),
    _attack(
        "wrong_name",
        '''
"""Defines another function than the asked one."""


def solved(a, b):
    return 5
''',
    ),
    _attack(
        "not_callable",
        '''
"""The asked name is no function."""
solve = 5
''',
    ),
    _attack("mixed_indentation", '"""Mixes tabs and spaces."""\ndef solve(a, b):\n        x = a\n\treturn 5\n'),
    _attack("null_in_the_source", '"""Holds a NUL."""\nx = "\0"' + SOLVE),
    _attack("lone_surrogate_in_the_source", '"""Holds half a character: \ud800"""' + SOLVE, BOMB),
    _attack("open_brackets", '"""Opens 100,000 brackets."""\nx = ' + "(" * 100_000 + SOLVE, BOMB),
    _attack(
        "closed_brackets",
        '"""Nests lists 90 deep, 1,000 times in a row."""\nx = '
        + ("[" * 90 + "]" * 90 + "\nx = ") * 1000
        + "0"
        + SOLVE,
        BOMB,
    ),
    _attack("many_signs", '"""Puts 500,000 signs before a number."""\nx = ' + "-" * 500_000 + "1" + SOLVE, BOMB),
    _attack(
        "many_attributes", '"""100,000 attributes of attributes."""\nx = lambda y: y' + ".a" * 100_000 + SOLVE, BOMB
    ),
    _attack("long_sum", '"""A sum of 200,000 terms."""\nx = lambda y: ' + "+".join(["y"] * 200_000) + SOLVE, BOMB),
    _attack("nested_functions", '"""Lambdas in lambdas."""\nx = ' + "lambda: " * 50_000 + "0" + SOLVE, BOMB),
    _attack(
        "nested_conditions",
        '"""A chain of 20,000 else-ifs."""\nif 0:\n    x = 0\n' + "elif 0:\n    x = 0\n" * 20_000 + SOLVE,
        BOMB,
    ),
    _attack(
        "folded_constants",
        '"""Constants that are huge once the compiler has folded them."""\nx = ((("a" * 4096) * 4096) * 4096) * 4096'
        + SOLVE,
        BOMB,
    ),
    _attack(
        "folded_powers",
        '"""A power of powers, and a shift."""\nx = lambda: 9**9**9**9\ny = lambda: 1 << (1 << 60)' + SOLVE,
        BOMB,
    ),
    _attack("long_line", '"""One string of 8 MB."""\nx = "' + "a" * (8 << 20) + '"' + SOLVE, BOMB),
    _attack("many_lines", '"""200,000 lines."""\n' + "x = 0\n" * 200_000 + SOLVE, BOMB),
    _attack(
        "many_names",
        '"""20,000 functions."""\n' + "".join(f"def f{i}(): pass\n" for i in range(20_000)) + SOLVE,
        BOMB,
    ),
    _attack(
        "formatted_strings", '"""Formats in formats."""\nx = 0\n' + "y = f'" + "{x:" * 20 + "}" * 20 + "'" + SOLVE, BOMB
    ),
    _attack(
        "escape_by_name",
        '"""100,000 characters by their names."""\nx = "' + "\\N{BLACK HEART SUIT}" * 100_000 + '"' + SOLVE,
        BOMB,
    ),
    _attack(
        "bidirectional_text",
        '"""Characters that reverse the order of what is shown: \u202e"""\nx = "\u2066"' + SOLVE,
        BOMB,
    ),
    _attack(
        "await_at_top",
        '''
"""A coroutine instead of an answer."""
async def solve(a, b):
    return 5
''',
        frozenset({"wrong_answer"}),
    ),
    _attack(
        "future_of_the_language",
        '"""Changes what != means, for tests compiled with it too."""\nfrom __future__ import barry_as_FLUFL\n' + SOLVE,
        frozenset({"wrong_answer"}),
    ),
    _attack("endless_decorators", '"""50,000 decorators."""\n' + "@staticmethod\n" * 50_000 + SOLVE.lstrip(), BOMB),
)
