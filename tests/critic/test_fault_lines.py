"""Where the value falls, line by line, by hand; and which line each token is on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.validity.statistics import value_drop_by_line
from wmtp.critic import line_of_tokens
from wmtp.pretrained import byte_tokenizer

TOKENIZER = byte_tokenizer()
#                 line 1      line 2           (3: no token)  line 4
VALUES = np.array([0.6, 0.7, 0.4, 0.5, 0.1, 0.2])
LINES = np.array([1, 1, 2, 2, 2, 4])


def test_drops_by_hand():
    """end: 0.8 - 0.7, 0.7 - 0.1, 0.1 - 0.2. token: the largest of 0.2, -0.1; of 0.3, -0.1, 0.4; and -0.1."""
    end = value_drop_by_line(VALUES, LINES, before=0.8)
    np.testing.assert_allclose(end, [0.1, 0.6, np.nan, -0.1], atol=1e-12)
    token = value_drop_by_line(VALUES, LINES, before=0.8, rule="token", num_lines=5)
    np.testing.assert_allclose(token, [0.2, 0.4, np.nan, -0.1, np.nan], atol=1e-12)
    # Without a prompt nothing comes before the first token, which then cannot fall.
    np.testing.assert_allclose(value_drop_by_line(VALUES, LINES)[0], 0.6 - 0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"line_of_token": LINES[:3]}, r"must be \[T\]"),
        ({"line_of_token": LINES[::-1]}, "must rise"),
        ({"num_lines": 3}, "must rise from 1 to at most 3"),
        ({"values": VALUES[:0], "line_of_token": LINES[:0]}, "T >= 1"),
    ],
)
def test_what_is_no_program_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        value_drop_by_line(**({"values": VALUES, "line_of_token": LINES} | arguments))


@settings(deadline=None)
@given(st.text(alphabet="ab \n\tλ漢", max_size=30))
def test_a_byte_is_on_the_line_of_its_character(text):
    lines = line_of_tokens(TOKENIZER, text)
    expected = [1 + text[:i].count("\n") for i, letter in enumerate(text) for _ in letter.encode()]
    assert lines.tolist() == expected


def test_a_token_of_several_lines_is_on_that_of_its_first_solid_character():
    class Offsets:
        def offsets(self, text):
            # "if x:", the line end with the next line's indentation, "y", line ends, and one more with what follows
            return [(0, 5), (5, 10), (10, 11), (11, 13), (13, 17)]

    assert line_of_tokens(Offsets(), "if x:\n    y\n\n\n  z").tolist() == [1, 1, 2, 2, 5]
