"""Every command of docs/tutorial.md runs, with the files that the page shows, and does what the page says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "tutorial.md").read_text()


@pytest.mark.long
def test_the_commands_run_as_they_stand(tmp_path):
    for name in ("recipes", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    files = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.S))
    assert files.keys() == {"mine.py", "mine.yaml"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    set_up, *blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
    assert "make setup" in set_up and len(blocks) == 3  # the test's own environment is set up
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    output = []
    for block in blocks:
        command = ["bash", "-e", "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        output.append(done.stdout + done.stderr)
    runs = {run.name: run for run in (tmp_path / "runs" / "mine").iterdir()}
    assert runs.keys() == {"uniform", "rare", "shuffled", "random"}
    first, last = {}, {}
    for name, run in runs.items():
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [row["eval/ce_head1"] for row in rows if "eval/ce_head1" in row]
        first[name], last[name] = losses[0], losses[-1]
        assert (run / "export" / "config.json").exists()
    assert len(set(first.values())) == 1, "all begin with the same model and the same held-out rows"
    assert len(set(last.values())) == 4 and all(last[name] < first[name] for name in runs)
    assert "each with its weight below it" in output[1]  # preview=1
    assert [path.read_text() for path in (runs["rare"] / "code").rglob("mine.py")] == [files["mine.py"]]
    methods = ("uniform", "rare_tokens", "shuffled", "random_matched")
    assert all(method in output[2] for method in methods), output[2][-3000:]
    assert "one seed: its luck is part of the difference" in output[2], output[2][-3000:]
