import pytest
from mlflow.tracking import MlflowClient
from services import new_store
from tracked_runs import Runs, run_promote


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A sqlite store with artifacts of its own."""
    folder = tmp_path_factory.mktemp("store")
    return Runs(MlflowClient(new_store(folder)), folder, (folder / "artifacts").as_uri())


@pytest.fixture
def promote(store, tmp_path, monkeypatch):
    """Run the recipe on the tiny config with overrides, here."""
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.client.tracking_uri)
    return run_promote
