"""When two outputs of a program are the same."""

import re
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
    left, right = output.split(), expected.split()
    return len(left) == len(right) and all(map(_same_decimal, left, right))


def _same_decimal(left: bytes, right: bytes) -> bool:
    if left == right:
        return True
    if max(len(left), len(right)) > _MAX_NUMBER_LENGTH:
        return False
    numbers = _DOUBLE.fullmatch(left.lower()) and _DOUBLE.fullmatch(right.lower())
    return bool(numbers) and Decimal(left.decode()) == Decimal(right.decode())


def lenient_match(output: bytes, expected: bytes) -> bool:
    """Applies DeepMind's rule for CodeContests (Li et al. 2022): lower-case, tokens equal, or numbers within 1e-5.

    Two tokens that both fit a 32-bit integer must be equal; otherwise both are read as doubles, so that
    9007199254740993 "equals" 9007199254740992.
    """
    left, right = output.lower().split(), expected.lower().split()
    return len(left) == len(right) and all(map(_tokens_match, left, right))


def _tokens_match(left: bytes, right: bytes) -> bool:
    if left == right:
        return True
    if max(len(left), len(right)) > _MAX_NUMBER_LENGTH:
        return False
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
