import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from tracked_runs import ROOT, Runs

from recipes.promote import PromoteRecipe


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A sqlite store with artifacts of its own; making one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    return Runs(MlflowClient(f"sqlite:///{folder}/mlflow.db"), folder)


@pytest.fixture
def promote(store, tmp_path, monkeypatch):
    """Run the recipe on the tiny config with overrides."""
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))

    def run(name, action="register", evaluation_run=None, **overrides):
        cfg = OmegaConf.load(ROOT / "configs" / "tiny" / "promote.yaml")
        cfg.update({"name": name, "action": action, "evaluation_run": evaluation_run, "by": "someone"})
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.client.tracking_uri)
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        recipe = PromoteRecipe(cfg)
        recipe.setup()
        return recipe.run()

    return run
