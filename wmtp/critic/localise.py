"""The line of a program that each of its tokens is on."""

import numpy as np


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
