"""The fields of a contest's problem, as deepmind/code_contests names them (Li et al. 2022, arXiv 2203.07814)."""

from collections.abc import Sequence

from wmtp.data.rows import take, take_texts
from wmtp.errors import UserError

PYTHON3 = 3  # the dataset's number of the language


def programs_of(row: dict, where: str, column: str, language: int) -> tuple[str, ...]:
    """Returns a problem's `solutions` or `incorrect_solutions` in one language, given by the dataset's number.

    Raises:
        ValueError: the field is missing, or its numbers of languages and texts differ.
    """
    found, inside = take(row, where, column, dict), f"{where}: field {column!r}"
    languages, sources = take(found, inside, "language", list), take_texts(found, inside, "solution")
    if len(languages) != len(sources):
        raise UserError(f"{where}: {column} has {len(languages)} languages and {len(sources)} programs")
    return tuple(source for number, source in zip(languages, sources, strict=True) if number == language)


def whole_number(row: dict, where: str, column: str) -> int:
    """Returns a field's whole number >= 0; 0 stands for unknown."""
    value = 0 if row.get(column) is None else take(row, where, column, int)
    if value < 0:
        raise UserError(f"{where}: field {column!r} must be >= 0 (0: unknown), got {value}")
    return value


def topics(row: dict, where: str, column: str) -> tuple[str, ...]:
    """Returns the topics that a field lists, without the empty ones."""
    return tuple(filter(None, take_texts(row, where, column)))


def alphacode_prompt(description: str, *, rating: int = 0, tags: Sequence[str] = (), correct: bool = True) -> str:
    """Returns the text before a solution, in training and sampling (Li et al. 2022, appendix: metadata conditioning).

    Args:
        rating, tags: the line is left out for 0 and for no tags.
        correct: states that the solution is correct, or that it is not.
    """
    lines = [f"RATING: {rating}"] * bool(rating) + [f"TAGS: {','.join(tags)}"] * bool(tags)
    lines += ["LANGUAGE IS python3", "CORRECT SOLUTION" if correct else "INCORRECT SOLUTION"]
    return "".join(f"# {line}".rstrip() + "\n" for line in [*lines, *description.splitlines()])
