"""Values at line ends become a column: by hand, through the weighting `critic`, and in the lines that people read."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.validity.statistics import value_drop_by_line
from wmtp.critic.localise import line_of_tokens
from wmtp.critic.rollouts import line_ends, line_row, prefix_id, rollout_report, value_column
from wmtp.data import Documents, document_from_text, pack
from wmtp.errors import UserError
from wmtp.eval import packaged_function_tasks
from wmtp.eval.task_programs import packaged_function_programs, paired_programs, solutions
from wmtp.pretrained import byte_tokenizer
from wmtp.weighting import Signals, critic
from wmtp.weighting.targets import valid_targets

PROMPT, PROGRAM = "Q\n", "a\n\nbc\nd\n"  # bytes: 2 of the prompt, then a \n \n | b c \n | d \n, then EOS
PLACES, VALUES = [1, 4, 7, 9], (0.5, 0.8, 0.2, 0.0)


@pytest.fixture
def document():
    return document_from_text(byte_tokenizer(), PROMPT, PROGRAM, "p")


def test_line_ends_take_blank_lines_in_and_prefixes_end_with_them(document):
    ends = line_ends(byte_tokenizer(), document, PROGRAM)
    assert ends.places.tolist() == PLACES and ends.lines.tolist() == [1, 3, 4]
    texts = [byte_tokenizer().decode(list(tokens)) for tokens in ends.prefixes(document)]
    assert texts == ["Q\n", "Q\na\n\n", "Q\na\n\nbc\n"]
    # The same beginning of another program is the same prefix; another task's is not.
    assert prefix_id("t", (1, 2)) == prefix_id("t", np.array([1, 2])) != prefix_id("u", (1, 2))


def test_columns_by_hand(document):
    linear = value_column(document, PLACES, VALUES)
    expected = [0.5, 0.5, 0.6, 0.7, 0.8, 0.6, 0.4, 0.2, 0.1, 0.0, 0.0]
    np.testing.assert_allclose(linear, expected, atol=1e-6)
    end = value_column(document, PLACES, VALUES, "end")
    np.testing.assert_allclose(end, [0.5] * 4 + [0.8] * 3 + [0.2] * 2 + [0.0] * 2, atol=1e-6)
    # Either way the fall over a line is that between its two ends.
    lines = line_of_tokens(byte_tokenizer(), PROGRAM)
    for column in (linear, end):
        drops = value_drop_by_line(column[2:-1], lines, before=column[1])
        np.testing.assert_allclose([drops[0] + drops[1], drops[2], drops[3]], [-0.3, 0.6, 0.2], atol=1e-6)


def test_the_weighting_critic_finds_the_fall_on_every_token_of_its_line(document):
    """delta is +0.1 three times, -0.2 three times, -0.1 twice, and 0 at EOS; weights are exp(delta), of mean 1."""
    column = value_column(document, PLACES, VALUES)
    documents = Documents("d", (replace(document, signals={"values": column}),))
    batch = pack(documents, 16, pad_id=0).batch([0])
    valid = valid_targets(batch["labels"], 1, batch["document_ids"])
    signals = Signals(batch["labels"], valid, batch["document_ids"], named=batch["signals"])
    weights = critic(map="exp", whiten="none", min_weight=0.0)(signals)[0]
    deltas = np.array([0.1] * 3 + [-0.2] * 3 + [-0.1] * 2 + [0.0])
    expected = np.exp(deltas) / np.exp(deltas).mean()
    np.testing.assert_allclose(weights[2:11].numpy(), expected, atol=1e-5)
    assert (weights[11:] == 0).all() and weights[5:8].max() < weights[[2, 3, 4, 8, 9, 10]].min()


def test_the_report_ranks_the_faulty_line_with_ties_at_half(document):
    ends = line_ends(byte_tokenizer(), document, PROGRAM)
    rows = [line_row(document, ends, VALUES, 3), line_row(document, ends, (0.5, 0.5, 0.5, 0.0), 1)]
    metrics, page = rollout_report(
        rows, [{"new_tokens": 7, "seconds": 2.0}, {"new_tokens": 5, "seconds": 3.0}], 4, 0.25
    )
    assert rows[0] == {
        "program": "p", "fault_line": 3, "passes": False, "prompt_value": 0.5,
        "lines": [1, 3, 4], "values": [0.8, 0.2, 0.0], "tokens": 9,
    }  # fmt: skip
    assert metrics["rollouts/fault_first"] == 0.5 and metrics["rollouts/fault_mean_rank"] == (1 + 2.5) / 2
    assert metrics["rollouts/new_tokens"] == 12 and metrics["rollouts/seconds"] == 3.0
    assert metrics["rollouts/cut_off"] == 0.25 and "25% of the completions were cut off" in page
    assert "standard error of one is at most 0.25" in page


def test_programs_of_tasks_and_of_files_as_people_have_them(tmp_path):
    tasks = packaged_function_tasks(limit=3)
    assert [p.id for p in solutions(tasks)] == [f"packaged/{n} solution" for n in (1, 2, 3)]
    both = packaged_function_programs(tasks)
    assert len(both) == 6 and all(p.fault_line for p in both if p.id.endswith("faulty"))
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"problem": 1, "correct": "a\\r\\nb", "incorrect": "a\\nc\\n", "fault_line": 2}\n'  # a pair
        '{"task": "packaged/2", "faulty": "x", "fault_location": "1"}\n'  # ConDefects' names
        '{"task_id": "packaged/1", "completion": "a\\nb\\n", "is_correct": true}\n'  # the first program again
        '{"task_id": "3", "faulty": "x", "fault_location": "9"}\n'  # a line that is not there
    )
    found = [(p.task.task_id, p.text, p.fault_line) for p in paired_programs(tasks, source=str(file))]
    assert found == [
        ("packaged/1", "a\nb", None), ("packaged/1", "a\nc\n", 2), ("packaged/2", "x", 1), ("packaged/3", "x", None)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"task_id": 1}', r"p.jsonl:1: needs a task .* and a program .*; the row has task_id"),
        ('{"task_id": 9, "code": "x"}', "p.jsonl:1: task_id 9 is none of the 3 tasks"),
        ('{"task_id": 1, "code": " \\n"}', "packaged/1 correct 1: the program is blank; leave it out"),
        ('{"task_id": 1, "faulty": "x", "fault_line": "two"}', "p.jsonl:1: field 'fault_line' must be a line number"),
        ("", "programs: there is none"),
    ],
)
def test_a_bad_file_of_programs_is_one_line(tmp_path, row, words):
    file = tmp_path / "p.jsonl"
    file.write_text(row + "\n" * bool(row))
    with pytest.raises(UserError, match=words):
        paired_programs(packaged_function_tasks(limit=3), source=str(file))


def test_a_blank_program_and_an_unknown_spread_are_refused(document):
    with pytest.raises(UserError, match="p: an empty prompt"):
        line_ends(byte_tokenizer(), document_from_text(byte_tokenizer(), "", "a", "p"), "a")
    with pytest.raises(UserError, match="within_line must be one of linear, end, got 'start'"):
        value_column(document, PLACES, VALUES, "start")
