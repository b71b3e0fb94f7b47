"""The text of each token, and tokens side by side in a terminal."""

import unicodedata
from collections.abc import Mapping, Sequence

_LOOK_AHEAD = 8  # tokens: a character has at most four bytes, so its last byte is never further away
_WIDTH = 100  # characters of a line, unless a single token is longer


def token_pieces(tokenizer, tokens: Sequence[int]) -> list[str]:
    """Returns the text of each token, such that their concatenation is exactly ``tokenizer.decode(tokens)``.

    Tokens cannot be decoded one by one: the bytes of a character may lie in several tokens, each of which is invalid
    UTF-8. A piece ends where both sides, decoded apart, give the text of the whole; tokens before get an empty piece.
    """
    whole = tokenizer.decode(tokens)
    for look_ahead in (_LOOK_AHEAD, len(tokens)):  # a long run of invalid bytes may need all of its tokens
        pieces: list[str] = []
        start = 0
        for end in range(1, len(tokens) + 1):
            after = tokens[end : end + look_ahead]
            piece = tokenizer.decode(tokens[start:end])
            if piece + tokenizer.decode(after) == tokenizer.decode([*tokens[start:end], *after]):
                pieces.append(piece)
                start = end
            else:
                pieces.append("")
        if "".join(pieces) == whole:
            break
    return pieces


def token_table(pieces: Sequence[str], figures: Mapping[str, Sequence[str]]) -> str:
    """Returns tokens in plain text with their figures below them; each line of code begins a new line.

    Spaces appear as a dot, line ends and invisible characters as escapes, and a token with only the first bytes of a
    character as ~.

    Args:
        pieces: the tokens' texts.
        figures: name to a text for each token, "" if it has none; the names begin the lines.
    """
    rows = {"token": [_shown(piece) for piece in pieces], **figures}
    margin = max(map(len, rows)) + 1
    lines, start, used = [], 0, 0
    widths = [max(_columns(texts[i]) for texts in rows.values()) + 1 for i in range(len(pieces))]
    for i, piece in enumerate(pieces):
        used += widths[i]
        full = i + 1 < len(pieces) and margin + used + widths[i + 1] > _WIDTH
        if full or "\n" in piece or i + 1 == len(pieces):
            for name, texts in rows.items():
                part = texts[start : i + 1]
                cells = (text + " " * (wide - _columns(text)) for text, wide in zip(part, widths[start:], strict=False))
                if name == "token" or any(part):
                    lines.append(f"{name:<{margin}}{''.join(cells)}".rstrip())
            start, used = i + 1, 0
    return "\n".join(lines)


def _shown(piece: str) -> str:
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return "".join(escaped).replace(" ", "·") or "~"


def _columns(text: str) -> int:
    """Returns the terminal columns that a text takes: characters of East Asian scripts take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
