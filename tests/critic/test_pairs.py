"""Pairs of correct and incorrect programs: what the builders keep, the split by problem, the balance of lengths."""

import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import DATA, needs

from wmtp.critic import (
    Pair,
    Pairs,
    balance_lengths,
    code_contests_pairs,
    condefects_pairs,
    encode_pairs,
    jsonl_pairs,
    packaged_pairs,
    pair_splits,
    split_by_problem,
)
from wmtp.critic.pairs import _combinations
from wmtp.data import IGNORE
from wmtp.pretrained import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def to_file(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return to_file


def condefects_row(**changes):
    return {
        "task": "abc1_a",
        "faulty": "a = 1\nprint(b)\n",
        "correct": "a = 1\nprint(a)\n",
        "fault_location": "2",
    } | changes


def contest_row(name="p", good=("print(1)",), bad=("print(2)",), language=3):
    columns = {"solutions": good, "incorrect_solutions": bad}
    found = {k: {"language": [language] * len(v), "solution": list(v)} for k, v in columns.items()}
    return {"name": name, "description": "Print one.\n", **found}


# ----------------------------------------------------------------------------------------------------------------------
# Builders


def test_packaged_pairs_know_the_faulty_line():
    pairs = packaged_pairs()
    assert len(pairs.problems) == 48
    functions = [pair for pair in pairs if pair.problem.startswith("function/")]
    assert len(functions) == 36
    for pair in functions:
        lines = [text.split("\n") for text in (pair.correct, pair.incorrect)]
        differ = [n for n, (a, b) in enumerate(zip(*lines, strict=True), start=1) if a != b]
        assert differ == [pair.fault_line]
    assert {pair.correct_reward for pair in pairs} == {1.0} and {pair.incorrect_reward for pair in pairs} == {0.0}


def test_condefects_rows_become_pairs_and_their_lines_are_lines_of_the_faulty_program(write):
    rows = [
        condefects_row(),
        condefects_row(fault_location="3"),  # beyond the last line: something is missing there; and the same programs
        condefects_row(task="abc1_b", fault_location="0", faulty="print(c)\r\nb\t= 2\r"),
        condefects_row(task="abc1_b", faulty=" \n"),
        condefects_row(task="abc1_b", faulty="a = 1\nprint(a)\n\n"),
    ]
    pairs = condefects_pairs(write(*rows))
    assert pairs[0] == Pair("abc1_a", "", "a = 1\nprint(a)\n", "a = 1\nprint(b)\n", 2)
    assert [pair.fault_line for pair in pairs] == [2, None]
    assert pairs[1].incorrect == "print(c)\nb\t= 2\n"  # LF, and the tab stays
    assert pairs.skipped == {"repeated programs or pairs": 1, "empty programs": 1, "pairs of the same program": 1}


@needs("condefects")
def test_the_real_condefects():
    pairs = condefects_pairs(str(DATA / "condefects"))
    assert len(pairs) == 2635 and len(pairs.problems) == 913
    with_line = [pair for pair in pairs if pair.fault_line is not None]
    assert len(with_line) > 2500
    assert all(1 <= pair.fault_line <= len(pair.incorrect.split("\n")) for pair in with_line)
    changed = [p.incorrect.split("\n")[p.fault_line - 1] not in p.correct.split("\n") for p in with_line]
    assert np.mean(changed) > 0.85  # 0.88; of the others the line is still there, elsewhere or twice


def test_contest_programs_are_paired_evenly_and_only_those_of_the_language(write):
    row = contest_row(good=("a\r\n", "b", "a\n", ""), bad=("x", "y", "z", "b"))
    row["solutions"]["language"][1] = 2
    pairs = code_contests_pairs(write(row), max_pairs_per_problem=100)
    # "a" is there twice and "" is no program, so one correct program is left; "b" is incorrect in Python 3.
    assert {(pair.correct, pair.incorrect) for pair in pairs} == {("a\n", bad) for bad in "xyzb"}
    assert pairs.skipped == {"repeated programs or pairs": 1, "empty programs": 1}
    assert "# Print one." in pairs[0].prompt
    rows = [contest_row(str(n), [f"g{i}" for i in range(6)], [f"b{i}" for i in range(4)]) for n in range(3)]
    pairs = code_contests_pairs(write(*rows), max_pairs_per_problem=12, max_problems=2)
    assert len(pairs) == 24 and pairs.problems == ("0", "1")
    assert set(Counter((p.problem, p.correct) for p in pairs).values()) == {2}
    assert set(Counter((p.problem, p.incorrect) for p in pairs).values()) == {3}
    assert code_contests_pairs(write(*rows), seed=1).items != code_contests_pairs(write(*rows)).items


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 150))
def test_combinations_are_distinct_and_even(first, second, limit):
    chosen = list(_combinations(first, second, limit))
    assert len(set(chosen)) == len(chosen) == min(limit, first * second)
    for side, size in ((0, first), (1, second)):
        used = Counter(pair[side] for pair in chosen)
        assert max(used.values()) - min(used.values() if len(used) == size else [0]) <= 1


def test_a_program_in_both_classes_is_in_neither(write):
    pairs = code_contests_pairs(write(contest_row(good=("a", "b"), bad=("b", "c"))))
    assert [(pair.correct, pair.incorrect) for pair in pairs] == [("a", "c")]
    assert pairs.skipped == {"programs given as correct and as incorrect": 1}


def test_a_problem_of_one_class_is_refused_by_name_unless_told(write):
    source = write(contest_row("fine"), contest_row("lonely", bad=()))
    with pytest.raises(ValueError, match=r"rows.jsonl:2: problem 'lonely' has 1 correct and 0 incorrect .*skip_one"):
        code_contests_pairs(source)
    pairs = code_contests_pairs(source, skip_one_class=True)
    assert pairs.problems == ("fine",) and pairs.skipped == {"problems of one class": 1}
    with pytest.raises(ValueError, match=r"there is no pair \(left out: 1 problems of one class\)"):
        code_contests_pairs(write(contest_row("lonely", good=())), skip_one_class=True)


def test_your_own_rows_are_pairs_or_labelled_completions(write):
    source = write(
        {"problem": "p", "prompt": "# p\r\n", "correct": "a", "incorrect": "b\nc", "fault_line": 2},
        {"problem": 7, "prompt": "", "completion": "good", "is_correct": True},
        {"problem": 7, "prompt": "", "completion": "bad", "reward": 0.25},
        {"problem": 7, "prompt": "", "completion": "better", "reward": 0.9},
    )
    pairs = jsonl_pairs(source)
    assert pairs[0] == Pair("p", "# p\n", "a", "b\nc", 2)
    rewards = {(p.correct, p.incorrect): (p.correct_reward, p.incorrect_reward) for p in pairs if p.problem == "7"}
    assert rewards == {("good", "bad"): (1.0, 0.25), ("better", "bad"): (0.9, 0.25)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "correct": "a", "incorrect": "b"}, "field 'problem' is missing"),
        ({"problem": "p", "correct": "a", "incorrect": "b"}, "field 'prompt' is missing"),
        ({"problem": "p", "prompt": "", "correct": "a"}, "field 'incorrect' is missing"),
        ({"problem": "p", "prompt": "", "completion": "a"}, "neither is_correct nor reward"),
        (
            {"problem": "p", "prompt": "", "completion": "a", "reward": math.nan},
            "'reward' must be a finite number, got nan",
        ),
        ({"problem": "p", "prompt": "", "completion": "a", "is_correct": 1}, "'is_correct' must be true or false"),
        (
            {"problem": "p", "prompt": "", "correct": "a", "incorrect": "b", "fault_line": 2},
            "fault_line must be a line",
        ),
        ({"problem": "q", "prompt": "other", "completion": "a", "is_correct": True}, "problem 'q' has another prompt"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(write, row, message):
    good = [{"problem": "q", "prompt": "", "completion": text, "is_correct": text == "a"} for text in "ab"]
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{message}"):
        jsonl_pairs(write(*good, row))


def test_a_field_that_is_missing_or_no_number_is_named(write):
    for changes, message in (
        ({"faulty": None}, r"rows.jsonl:1: field 'faulty' is null"),
        ({"fault_location": "two"}, r"rows.jsonl:1: field 'fault_location' must be a line number, got 'two'"),
    ):
        with pytest.raises(ValueError, match=message):
            condefects_pairs(write(condefects_row(**changes)))
    row = contest_row()
    del row["incorrect_solutions"]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: field 'incorrect_solutions' is missing"):
        code_contests_pairs(write(row))


# ----------------------------------------------------------------------------------------------------------------------
# Split, tokens, balance


def pairs_of(lengths, name="pairs"):
    """A pair for each (correct, incorrect) length in bytes; four pairs share a problem."""
    letters = "abcdefghij"
    items = [
        Pair(f"problem {n // 4}", "> ", letters[n % 10] * good, "z" * (bad - 1) + letters[n // 10 % 10])
        for n, (good, bad) in enumerate(lengths)
    ]
    return Pairs(name, tuple(items))


def test_a_problem_falls_to_one_side_whatever_else_is_there():
    pairs = pairs_of([(5, 6)] * 800)
    train, heldout = split_by_problem(pairs, 0.3)
    assert not set(train.problems) & set(heldout.problems)
    assert len(train) + len(heldout) == len(pairs)
    assert 0.2 < len(heldout.problems) / len(pairs.problems) < 0.4
    some = Pairs("some", pairs.items[400:])
    assert set(split_by_problem(some, 0.3)[1].problems) == set(heldout.problems) & set(some.problems)
    wider = split_by_problem(pairs, 0.5)[1]
    assert set(heldout.problems) < set(wider.problems)  # a larger part keeps what a smaller one had


def test_a_side_without_a_problem_is_refused():
    for fraction, message in ((0.001, "no problem in the heldout part.*raise it"), (0.999, "outside .*lower it")):
        with pytest.raises(ValueError, match=message):
            split_by_problem(pairs_of([(5, 6)] * 8), fraction)
    with pytest.raises(ValueError, match=r"heldout_fraction must be in \(0, 1\), got 1.0"):
        split_by_problem(pairs_of([(5, 6)]), 1.0)


def test_documents_are_prompt_program_and_eos_and_long_pairs_are_left_out():
    data = encode_pairs(TOKENIZER, pairs_of([(5, 6), (9, 2), (3, 3)]), seq_len=10)
    assert len(data) == 2 and data.skipped == {"pairs longer than seq_len 10": 1}  # 2 + 9 + 1 tokens
    assert data.lengths.tolist() == [[6, 7], [4, 4]]  # EOS counts, the prompt does not
    document = data.documents[0][0]
    assert bytes(document.tokens[:-1].tolist()) == b"> aaaaa" and document.tokens[-1] == TOKENIZER.eos_id
    assert (document.labels[:2] == IGNORE).all() and (document.labels[2:] == document.tokens[2:]).all()
    with pytest.raises(ValueError, match=r"all 3 pairs are longer than seq_len 4 tokens; raise seq_len"):
        encode_pairs(TOKENIZER, pairs_of([(5, 6), (9, 2), (3, 3)]), seq_len=4)


def test_a_batch_is_padded_at_the_end_and_filled_up_with_nothing():
    data = encode_pairs(TOKENIZER, pairs_of([(5, 6), (3, 3)]), seq_len=10)
    batch = data.with_rewards(np.array([[0.5, 0.1], [2.0, -1.0]])).batch([1, 0], size=3)
    assert batch["tokens"].shape == (3, 2, 9) and batch["rows"] == [1, 0]
    assert batch["response"].sum(dim=2).tolist() == [[4, 4], [6, 7], [0, 0]]
    assert (batch["tokens"][2] == TOKENIZER.pad_id).all()
    np.testing.assert_allclose(batch["rewards"], [[2.0, -1.0], [0.5, 0.1], [0, 0]])
    row = batch["tokens"][0, 1]
    assert bytes(row[:5].tolist()) == b"> zza" and (row[6:] == TOKENIZER.pad_id).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60), st.integers(0, 5))
def test_length_alone_cannot_win_after_balancing(lengths, seed):
    data = encode_pairs(TOKENIZER, pairs_of(lengths), seq_len=64)
    difference = np.subtract(*data.lengths.T)
    try:
        balanced = balance_lengths(data, seed=seed)
    except ValueError as error:
        assert "no pair is left after balancing lengths" in str(error)
        assert not (difference == 0).any()
        return
    kept = np.subtract(*balanced.lengths.T)
    edges = [0, 1, 2, 4, 8, 16, 32, 64]
    for low, high in itertools.pairwise(edges):
        counts = [((side > low) & (side <= high)).sum() for side in (kept, -kept)]
        before = [((side > low) & (side <= high)).sum() for side in (difference, -difference)]
        assert counts == [min(before)] * 2
    assert (kept == 0).sum() == (difference == 0).sum()
    assert balanced.skipped["pairs left out to balance lengths"] == len(data) - len(balanced)
    # The same pairs, whatever order they come in.
    turned = balance_lengths(data.take(range(len(data))[::-1]), seed=seed)
    assert set(turned.pairs) == set(balanced.pairs) and len(turned) == len(balanced)


def test_parts_are_disjoint_and_balanced_each():
    rng = np.random.default_rng(0)
    pairs = pairs_of([(int(a), int(b)) for a, b in rng.integers(3, 30, (400, 2)) + np.array([4, 0])])
    parts = pair_splits(TOKENIZER, pairs, seq_len=64, heldout_fraction=0.3, test_fraction=0.3)
    problems = [set(parts[name].problems) for name in ("train", "heldout", "test")]
    assert all(problems) and not (problems[0] & problems[1] or problems[0] & problems[2] or problems[1] & problems[2])
    for part in parts.values():
        difference = np.subtract(*part.lengths.T)
        assert (difference > 0).sum() == (difference < 0).sum() > 5
    free = pair_splits(TOKENIZER, pairs, seq_len=64, heldout_fraction=0.3, test_fraction=0.3, balance=False)
    assert (np.subtract(*free["train"].lengths.T) > 0).mean() > 0.55
    assert set(free["test"].problems) >= problems[2]


def test_what_a_pair_data_set_is_shows_in_its_fingerprint():
    data = encode_pairs(TOKENIZER, pairs_of([(5, 6), (3, 3)]), seq_len=10)
    other = [data.take([1, 0]), data.with_rewards(data.rewards * 2), data.take([0])]
    assert len({d.fingerprint for d in (data, *other)}) == 4
    assert data.take([0, 1]).fingerprint == data.fingerprint
