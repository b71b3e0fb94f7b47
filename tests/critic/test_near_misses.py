"""Right programs as training data, weighed where a near miss differs."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.critic import Pair, Pairs, condefects_pairs, near_misses, packaged_pairs
from wmtp.critic.differences import differing_tokens
from wmtp.errors import UserError
from wmtp.pretrained import byte_tokenizer

BYTES = byte_tokenizer()


def marked(right, wrong):
    """The bytes of the right text that are marked, by place, with $ for EOS."""
    return "".join(c if m else "." for c, m in zip(right + "$", differing_tokens(BYTES, right, wrong), strict=True))


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("return a + b", "return a - b", ".........+..." ),
        ("x = 1\ny = 2\n", "x = 1\ny = 3\n", "..........2.."),
        ("a = 1\nb = 2\n", "a = 1\n", "......b = 2\n."),  # lines that the near miss lacks
        ("a\n", "a\nb\n", "..$"),  # one that it has more: the right program ends instead
        ("if x:\n  y\n", "if not x:\n  y\n", ".. ........"),  # of " not" too much, what is there instead
        ("f(a, b)\ng()\n", "f(a, b)\nh()\ng()\n", "........g...."),
        ("a\nb\nc\n", "c\nb\na\n", "a.b\nc\n."),
        ("same", "same", "....."),
    ],
)  # fmt: skip
def test_the_tokens_at_which_a_near_miss_parts(right, wrong, expected):
    assert marked(right, wrong) == expected


@settings(max_examples=200, deadline=None)
@given(st.text("ab\n é", max_size=30), st.text("ab\n é", max_size=30))
def test_of_two_texts_something_is_marked_unless_they_are_one(right, wrong):
    marks = differing_tokens(BYTES, right, wrong)
    assert len(marks) == len(right.encode()) + 1 and marks.any() == (right != wrong)
    # What is not marked is in the other text too, in this order.
    kept, rest = [i for i, m in zip(BYTES.encode(right), marks, strict=False) if not m], iter(BYTES.encode(wrong))
    assert all(any(i == other for other in rest) for i in kept)


def test_documents_are_the_right_programs_with_the_mean_of_their_near_misses_weights():
    same = {"problem": "p", "prompt": "add\n", "correct": "a + b"}
    pairs = Pairs(
        "made up", (Pair(**same, incorrect="a - b"), Pair(**same, incorrect="a + c"), Pair("q", "", "x", "y"))
    )
    first, second = near_misses(BYTES, pairs=pairs, boost=3.0)
    assert first.labels.tolist() == [-100] * 4 + first.tokens[4:].tolist()
    assert first.signals["weight"].tolist() == [1] * 4 + [1, 1, 2, 1, 2, 1]
    assert second.signals["weight"].tolist() == [3, 1]
    ones = near_misses(BYTES, pairs=pairs, boost=1.0)
    assert all((d.signals["weight"] == 1).all() for d in ones)


def test_condefects_rows_and_the_packaged_pairs(tmp_path):
    row = {"task": "abc1_a", "faulty": "a = 1\nprint(b)\n", "correct": "a = 1\nprint(a)\n", "fault_location": "2"}
    again = row | {"faulty": row["correct"]}
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (row, again)))
    [document] = found = near_misses(BYTES, pairs=condefects_pairs(str(tmp_path / "c.jsonl")))
    assert np.flatnonzero(document.signals["weight"] == 4).tolist() == [12]
    assert found.skipped == {"pairs of the same program": 1}
    parts = {split: near_misses(BYTES, pairs=packaged_pairs(), split=split) for split in ("all", "train", "heldout")}
    assert len(parts["train"]) + len(parts["heldout"]) == len(parts["all"]) >= 48
    assert not {d.id for d in parts["train"]} & {d.id for d in parts["heldout"]}
    assert all((d.signals["weight"] > 1).any() for d in parts["all"])


def test_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"task": "t", "faulty": "a\n", "correct": "a\n", "fault_location": "1"}) + "\n"
    )
    with pytest.raises(UserError, match=r"there is no pair.*1 pairs of the same program"):
        condefects_pairs(str(tmp_path / "c.jsonl"))
    for options, message in (
        ({"boost": 0.5}, "boost must be a number >= 1, got 0.5"),
        ({"split": "test"}, "split must be one of all, train, heldout, got 'test'"),
        ({"pairs": "c.jsonl"}, "pairs must be a section that builds pairs, .*, got 'c.jsonl'"),
        ({"split": "heldout", "heldout_fraction": 1.5}, r"heldout_fraction must be in \(0, 1\), got 1.5"),
    ):
        with pytest.raises(UserError, match=message):
            near_misses(BYTES, **{"pairs": packaged_pairs(), **options})
