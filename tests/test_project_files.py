"""Workflows, hooks and guides say what is true of the project."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from wmtp.config import build
from wmtp.weighting import Signals

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


def make_targets(text):
    return {word for line in re.findall(r"\bmake ([a-z -]+)", text) for word in line.split()}


@pytest.fixture(scope="module")
def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_actions_are_pinned_by_commit_with_their_version_beside():
    lines = re.findall(r"uses: (.+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert lines
    assert [line for line in lines if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_jobs_can_read_the_code_and_nothing_else():
    assert WORKFLOW["permissions"] == {}
    assert [job["permissions"] for job in WORKFLOW["jobs"].values()] == [{"contents": "read"}] * len(WORKFLOW["jobs"])


def test_workflow_runs_what_can_be_run_at_home(targets):
    commands = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
    assert [command for command in commands if not re.fullmatch(r"make [a-z-]+", command)] == []
    used = make_targets("\n".join(commands))
    assert {"lint", "types", "test", "test-long", "lock-check", "actionlint"} == used
    assert used <= targets


def test_workflow_runs_the_tests_on_every_python_that_the_project_allows():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (low,), (high,) = re.findall(r">=3\.(\d+)", allowed), re.findall(r"<3\.(\d+)", allowed)
    wanted = [f"3.{minor}" for minor in range(int(low), int(high))]
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == wanted


def test_required_checks_of_the_guide_are_the_jobs():
    names = []
    for job in WORKFLOW["jobs"].values():
        for python in job.get("strategy", {}).get("matrix", {}).get("python", [None]):
            names.append(job["name"].replace("${{ matrix.python }}", str(python)))
    line = re.search(r"required checks: (.+)", GUIDE)[1]
    assert re.findall(r"`([^`]+)`", line) == names


def test_hooks_run_the_pinned_ruff():
    (pin,) = [
        pin for pin in tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["dev"] if "ruff" in pin
    ]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    commands = [hook["entry"].split()[:3] for hook in hooks]
    assert commands[:2] == [["uvx", pin.replace("==", "@"), "check"], ["uvx", pin.replace("==", "@"), "format"]]
    # Those for files are of one release, and types are checked as `make types` does.
    assert {tuple(command[1:]) for command in commands[2:-1]} == {("--from", "pre-commit-hooks==6.0.0")}
    assert commands[-1] == ["make", "types"]


def test_owned_paths_and_files_named_in_the_guides_exist(targets):
    owned = re.findall(r"^(/\S+)", (ROOT / "CODEOWNERS").read_text(), re.MULTILINE)
    named = [path for path in re.findall(r"`((?:tests|wmtp|benchmarks|docker)/[\w./]+)`", GUIDE)]
    assert owned
    assert named
    assert [path for path in owned + named if not (ROOT / path.strip("/")).exists()] == []
    text = "".join((ROOT / name).read_text() for name in ("CONTRIBUTING.md", ".github/pull_request_template.md"))
    code = " ; ".join(re.findall(r"`([^`\n]+)`", text) + re.findall(r"^make .+$", text, re.MULTILINE))
    assert make_targets(re.sub(r"#.*| [A-Z_]+=\S+", "", code)) <= targets


def test_the_guides_weighting_method_is_one(tmp_path, monkeypatch):
    (tmp_path / "my_weighting.py").write_text(re.search(r"```python\n(.+?)```", GUIDE, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    section = yaml.safe_load(re.search(r"```yaml\n(.+?)```", GUIDE, re.DOTALL)[1])["weighting"]
    weighting = build(OmegaConf.create(section), where="weighting")
    labels = torch.tensor([[-100, 5, 6, 7, 8]])
    policy_ce = torch.tensor([[[9.0, 0.0, 1.0, 1.5, 8.0]]])
    weights = weighting(Signals(labels, (labels != -100)[None], named={"policy_ce": policy_ce}))
    # By hand: log w = -2, 0, -1/2 and -98, of which the last is cut to 0.1; s (e^-2 + 1 + e^-1/2) = 3.9.
    scale = 3.9 / (torch.exp(torch.tensor(-2.0)) + 1 + torch.exp(torch.tensor(-0.5)))
    by_hand = torch.tensor(
        [[0.0, scale * torch.exp(torch.tensor(-2.0)), scale, scale * torch.exp(torch.tensor(-0.5)), 0.1]]
    )
    torch.testing.assert_close(weights, by_hand, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="width must be > 0"):
        build(OmegaConf.create({**section, "width": 0}), where="weighting")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["push", "IMAGE=wmtp"], "IMAGE=wmtp names no registry"),
        (["push", "IMAGE=registry.example.org/wmtp", "TAG=1-dirty"], "TAG=1-dirty is of uncommitted files"),
        (["image", "BUILDER="], "no working docker, podman or buildah"),
    ],
    ids=["no registry", "uncommitted", "no builder"],
)
def test_image_and_push_refuse_in_one_line(arguments, message):
    done = subprocess.run(["make", "--silent", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [
        line for line in done.stderr.splitlines() if message in line
    ]
    assert message in done.stderr
