"""The fall of the value over the lines of a program: the critic's guess at the faulty line."""

import numpy as np

from wmtp.errors import UserError

RULES = ("end", "token")


def value_drop_by_line(
    values: np.ndarray,
    line_of_token: np.ndarray,
    *,
    before: float | None = None,
    rule: str = "end",
    num_lines: int | None = None,
) -> np.ndarray:
    """Computes the fall of the value over each line of a program: [L] float64, larger is more suspicious.

        end      V at the end of the line before, minus V at the line's own end
        token    the largest fall from one token to the next, V_{t-1} - V_t over the line's tokens t

    Lines without a token of their own (mostly blank ones) are NaN.

    Args:
        values: [T] V_t of each token t of the program (no prompt, no EOS).
        line_of_token: [T] each token's line, from 1, never falling: see :func:`line_of_tokens`.
        before: value of the prompt's last token; without a prompt the program's first token stands for it.
        rule: ``end`` or ``token``.
        num_lines: L; by default the last token's line.

    Raises:
        ValueError: lengths that differ, no token, lines that fall or lie outside 1 to L, or an unknown rule.
    """
    values, lines = np.asarray(values, np.float64), np.asarray(line_of_token)
    if rule not in RULES:
        raise UserError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if values.ndim != 1 or values.shape != lines.shape or not len(values):
        raise ValueError(f"values and line_of_token must be [T], T >= 1, got {values.shape} and {lines.shape}")
    num_lines = int(lines[-1]) if num_lines is None else num_lines
    if (np.diff(lines) < 0).any() or lines[0] < 1 or lines[-1] > num_lines:
        raise ValueError(f"line_of_token must rise from 1 to at most {num_lines}, got {lines.tolist()!s:.80}")
    previous = np.concatenate([[values[0] if before is None else before], values[:-1]])
    falls = previous - values  # [T]
    drops = np.full(num_lines, np.nan)
    starts = np.flatnonzero(np.diff(lines, prepend=0))  # the first token of each line that has one
    # The falls over a line's tokens add up to the fall from the end of the line before to its own end.
    drops[lines[starts] - 1] = (np.add if rule == "end" else np.maximum).reduceat(falls, starts)
    return drops


def line_of_tokens(tokenizer, text: str) -> np.ndarray:
    """Returns the line, from 1, of each token of ``tokenizer.encode(text)``: [T]; the text has LF line ends.

    A token belongs to the line of its first character that is no white space. White space alone belongs to the line of
    its first character, so a line end belongs to the line that it ends. Tokens that are bytes of one character share
    its line.
    """
    line_of_character = np.cumsum([1, *(letter == "\n" for letter in text)])[:-1] if text else np.ones(0, int)
    lines = []
    for start, end in tokenizer.offsets(text):
        piece = text[start:end]
        solid = start + len(piece) - len(piece.lstrip())
        at = solid if solid < end else start
        lines.append(int(line_of_character[at]))
    return np.array(lines, int)
