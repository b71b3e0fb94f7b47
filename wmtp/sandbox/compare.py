"""When two outputs of a program are the same."""

import re
from collections.abc import Callable
from decimal import Decimal

_INT = re.compile(rb"[+-]?[0-9]+")
_DOUBLE = re.compile(rb"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf|infinity|nan)")
_MAX_NUMBER_LENGTH = 1000  # longer tokens are compared as text
LENIENT_TOLERANCE = 1e-5


def exact_match(output: bytes, expected: bytes) -> bool:
    """Returns whether both have the same tokens, split at ASCII whitespace: no number is rounded, no case folded."""
    return output.split() == expected.split()


def decimal_match(output: bytes, expected: bytes) -> bool:
    """Applies LiveCodeBench's rule, but for line breaks: tokens equal, or the same decimal number, as 1 and 1.0 are."""
    return _tokens_match(output, expected, _same_decimal)


def lenient_match(output: bytes, expected: bytes) -> bool:
    """Applies DeepMind's rule for CodeContests (Li et al. 2022): lower-case, tokens equal, or numbers within 1e-5.

    Two tokens that both fit a 32-bit integer must be equal; otherwise both are read as doubles, so that
    9007199254740993 "equals" 9007199254740992.
    """
    return _tokens_match(output.lower(), expected.lower(), _near)


def _tokens_match(output: bytes, expected: bytes, alike: Callable[[bytes, bytes], bool]) -> bool:
    left, right = output.split(), expected.split()
    return len(left) == len(right) and all(
        a == b or (max(len(a), len(b)) <= _MAX_NUMBER_LENGTH and alike(a, b)) for a, b in zip(left, right, strict=True)
    )


def _same_decimal(left: bytes, right: bytes) -> bool:
    numbers = _DOUBLE.fullmatch(left.lower()) and _DOUBLE.fullmatch(right.lower())
    return bool(numbers) and Decimal(left.decode()) == Decimal(right.decode())


def _near(left: bytes, right: bytes) -> bool:
    if _is_int32(left) and _is_int32(right):
        return int(left) == int(right)
    numbers = _DOUBLE.fullmatch(left) and _DOUBLE.fullmatch(right)
    return bool(numbers) and abs(float(left) - float(right)) <= LENIENT_TOLERANCE


def _is_int32(token: bytes) -> bool:
    return bool(_INT.fullmatch(token)) and -(1 << 31) <= int(token) < 1 << 31


def difference(output: bytes, expected: bytes) -> str:
    """Says where two outputs first differ, for people."""
    left, right = output.split(), expected.split()
    for index, (got, wanted) in enumerate(zip(left, right, strict=False)):
        if got != wanted:
            return f"token {index} is {got[:80]!r}, expected {wanted[:80]!r}"
    return f"{len(left)} tokens, expected {len(right)}"
