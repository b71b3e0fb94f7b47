"""Text from anywhere as Markdown that shows it as it is: what a model or a config says cannot become a heading."""

import re

# Everything that could move a terminal's cursor, hide text or end a line that does not look like an end.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def fenced(text: str, *, language: str = "text", limit: int = 20_000, tail: bool = False) -> str:
    """Returns a code block that the text cannot end: its fence is longer than any run of backticks in the text.

    Args:
        limit: characters shown; of longer text the first so many, or with ``tail`` the last, and how many are left out.
    """
    left_out = len(text) - limit
    if left_out > 0:
        note = f"[... {left_out} characters left out ...]"
        text = f"{note}\n{text[-limit:]}" if tail else f"{text[:limit]}\n{note}"
    text = _CONTROL.sub(lambda found: f"\\u{ord(found.group()):04x}", text.replace("\r\n", "\n"))
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def cell(text: object) -> str:
    """Returns a text as one line of Markdown that shows as it is."""
    flat = _CONTROL.sub("?", " ".join(str(text).split()))
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", flat)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
