"""A run with a recipe and a method of the researcher's own, in a repository of their own, can be made again."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from services import new_store

from runs import ROOT
from wmtp.tracking import environment_tags
from wmtp.tracking.environment import code_sha256, own_code

FILES = {
    "my_methods/__init__.py": "",
    "my_methods/middle.py": """
from wmtp.weighting import Weighting, uniform
from .shares import SHARE
from my_constants import *


def middle(strength: float = 1.0) -> Weighting:
    import json, my_late_helper
    return uniform()
""",
    "my_methods/shares.py": "SHARE = 0.5\n",
    "my_methods/unused.py": "raise RuntimeError\n",
    "my_constants.py": "WIDTH = 2\n",
    "my_late_helper.py": "HELP = 'with planted-secret-0123'\n",
}
USED = {name for name in FILES if "unused" not in name} | {"my_recipe.py"}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A committed repository outside of WMTP's: methods, and a copy of the training recipe."""
    folder = tmp_path / "research"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    shutil.copy(ROOT / "recipes" / "full_finetune_distributed_wmtp.py", folder / "my_recipe.py")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def git(folder, *args):
    command = ("git", "-c", "user.name=n", "-c", "user.email=e", *args)
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def train(cfg):
    recipe = importlib.import_module("my_recipe").FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe.train()
    recipe.export()
    recipe._log.close()


@pytest.mark.long
def test_code_commit_data_and_description_are_kept_with_the_run(repository, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-secret-0123")
    uri = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "tracking_uri": uri}
    tracking["artifact_location"] = str(tmp_path / "artifacts")
    options = {"max_steps": 1, "save_every": None, "eval_every": None, "tracking": tracking}
    cfg = tiny_config(weighting={"_component_": "my_methods.middle.middle"}, **options)
    train(cfg)
    (repository / "my_constants.py").write_text("WIDTH = 3\n")  # changed and not committed
    again = tiny_config(weighting={"_component_": "my_methods.middle.middle"}, **{**options, "output_dir": "again"})
    train(again)
    train(tiny_config(**{**options, "output_dir": "other_method"}))

    client = MlflowClient(uri)
    page = client.get_experiment_by_name("wmtp/python_functions")  # methods to be compared are on one page
    other, second, first = client.search_runs([page.experiment_id])
    assert [run.data.tags["wmtp.method"] for run in (first, second, other)] == ["middle", "middle", "uniform"]

    kept = {run.info.run_id: run.data.tags["wmtp.own_code_sha256"] for run in (first, second, other)}
    assert len(set(kept.values())) == 3
    folder = Path(cfg.output_dir) / "code" / kept[first.info.run_id][:12]
    there = {str(path.relative_to(folder)): path for path in folder.rglob("*.py")}
    assert set(there) == USED and code_sha256(there) == kept[first.info.run_id]
    assert there["my_constants.py"].read_text() == "WIDTH = 2\n"
    assert there["my_recipe.py"].read_bytes() == (repository / "my_recipe.py").read_bytes()
    about = json.loads((Path(cfg.output_dir) / "export" / "wmtp_run.json").read_text())
    assert about["own_code_sha256"] == kept[first.info.run_id]
    artifacts = tmp_path / "artifacts" / second.info.run_id / "artifacts"
    code = artifacts / "code" / kept[second.info.run_id][:12]
    assert (code / "my_constants.py").read_text() == "WIDTH = 3\n"
    assert (code / "my_late_helper.py").read_text() == "HELP = 'with ***'\n"  # nothing secret leaves
    assert "-WIDTH = 2\n+WIDTH = 3\n" in (artifacts / "git_diff.patch").read_text()

    tags = second.data.tags
    commit = git(repository, "rev-parse", "HEAD")
    assert tags["wmtp.own_git_commit"] == f"research@{commit}" and tags["mlflow.source.git.commit"] == commit
    assert tags["wmtp.git_commit"] == git(ROOT, "rev-parse", "HEAD")
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == (str(repository / "my_recipe.py"), "LOCAL")
    assert tags["mlflow.user"] and "**middle** on **python_functions**" in tags["mlflow.note.content"]
    (data,) = second.inputs.dataset_inputs
    assert data.dataset.name == "python_functions"
    assert data.dataset.digest == tags["wmtp.data_sha256"][:36]


def test_uncommitted_code_of_ones_own_is_dirty(repository, monkeypatch):
    """Whether a file has changed, is not committed yet, is ignored, or lies in no repository."""
    monkeypatch.setattr("wmtp.tracking.environment._SOURCE", Path("/nowhere/wmtp.py"))  # WMTP's own checkout apart
    file = repository / "my_constants.py"
    assert environment_tags([file])["wmtp.git_dirty"] == "False"
    new = repository / "my_new.py"
    new.write_text("NEW = 1\n")
    assert environment_tags([file])["wmtp.git_dirty"] == "True"
    (repository / ".gitignore").write_text("my_new.py\n")
    git(repository, "add", ".gitignore")
    git(repository, "commit", "-qm", "second")
    assert environment_tags([file])["wmtp.git_dirty"] == "False"
    assert environment_tags([file, new])["wmtp.git_dirty"] == "True"
    alone = repository.parent / "alone.py"
    alone.write_text("ALONE = 1\n")
    tags = environment_tags([alone])
    assert tags["wmtp.git_dirty"] == "True" and "wmtp.own_git_commit" not in tags


def test_code_that_cannot_be_read_as_it_runs_is_kept_all_the_same(tmp_path, monkeypatch):
    """A script that tries a relative import first, and a module that was changed after it was imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_utils.py").write_text("")
    (tmp_path / "one_broken.py").write_text("")
    both = "try:\n    from .one_utils import f\nexcept ImportError:\n    import one_utils\nimport one_broken\n"
    (tmp_path / "one_script.py").write_text(both)
    importlib.import_module("one_script")
    (tmp_path / "one_broken.py").write_text("def f(:\n")
    kept = {f"one_{name}.py" for name in ("script", "utils", "broken")}
    try:
        assert set(own_code({"_component_": "one_script.f"}, "none")) == kept
    finally:
        for name in ("one_script", "one_utils", "one_broken"):
            sys.modules.pop(name)


def test_wmtps_own_and_installed_code_is_nobodys_own():
    import recipes.full_finetune_distributed_wmtp as recipe

    cfg = {"optimizer": {"_component_": "torch.optim.AdamW"}, "weighting": {"_component_": "wmtp.weighting.rho1"}}
    assert own_code(cfg, recipe.__name__.rpartition(".")[2]) == {}
