"""python -m wmtp.report: what a run's metrics say."""

import json
import runpy

import pytest

from wmtp.errors import UserError


def test_the_summary_gives_held_out_ce_at_both_ends_and_the_median_speed(tmp_path, monkeypatch, capsys):
    lines = [{"step": 0, "eval/ce_head1": 5.5, "eval/ce_head2": 6.25}]
    lines += [{"step": step, "train/tokens_per_second": speed} for step, speed in ((1, 10.0), (2, 300.0), (3, 200.0))]
    lines += [
        {"step": 2, "eval/ce_head1": 9.0, "eval/ce_head2": 9.0},
        {"step": 3, "eval/ce_head1": 2.125, "eval/ce_head2": 3.0},
    ]
    lines[0]["eval/accept_length"] = 1.25
    change = {"": 0.125, "_low": -0.0625, "_high": 0.3125}
    lines[-1] |= {"eval/accept_length": 1.375} | {f"eval/accept_length_change{end}": x for end, x in change.items()}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    runpy.run_module("wmtp.report", run_name="__main__")
    first, _, *heads = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}: 3 steps, 200 tokens/s"
    length = heads.pop()
    assert length.split() == ["accept_length", "1.2500", "1.3750", "change", "[-0.0625,", "+0.3125]"]
    assert [head.split() for head in heads] == [["head1", "5.5000", "2.1250"], ["head2", "6.2500", "3.0000"]]


def test_a_folder_without_a_run_ends_it_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(UserError, match=r"holds no metrics.jsonl: give the output_dir of a run"):
        runpy.run_module("wmtp.report", run_name="__main__")
