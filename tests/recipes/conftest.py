import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch
from omegaconf import OmegaConf
from processes import start
from random_models import random_decoder
from run_configs import run_configs
from services import postgres_server

from runs import ROOT, read_metrics
from wmtp.config import load
from wmtp.models import ValueModel, export_hf, save_value_model
from wmtp.pretrained import byte_tokenizer


@pytest.fixture
def tiny_config(tmp_path, monkeypatch):
    """The shipped tiny configs, writing below tmp_path, with overrides by dotted key."""
    monkeypatch.chdir(tmp_path)

    def config(job="uniform", **overrides):
        cfg = load(ROOT / "configs" / "tiny" / f"{job}.yaml")
        cfg.output_dir = str(tmp_path / job)
        cfg.tracking = None
        if job in ("uniform", "reference", "rho1", "rho1_scored", "lora_rho1"):
            cfg.data_cache = str(tmp_path / "data_cache")
        cfg.device = os.environ.get("WMTP_TEST_DEVICE", "cpu")
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return config


@pytest.fixture
def run_recipe():
    """Run the full fine-tuning recipe in this process and return its metrics."""
    from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP

    def run(cfg):
        recipe = FullFinetuneRecipeWMTP(cfg)
        recipe.setup()
        recipe.train()
        recipe.export()
        return read_metrics(cfg.output_dir)

    return run


@pytest.fixture
def run_distributed(tmp_path):
    """Run several configs, one after the other, in one group of so many processes: forked ones, or torchrun's."""

    def run(processes, *configs, torchrun=False):
        folder = tmp_path / f"world{processes}"
        folder.mkdir(exist_ok=True)
        paths = []
        for number, cfg in enumerate(configs):
            paths.append(str(folder / f"{number}.yaml"))
            OmegaConf.save(cfg, paths[-1])
        if torchrun:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
            command += [str(processes), str(ROOT / "tests" / "recipes" / "run_configs.py"), *paths]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            start(run_configs, *paths, size=processes, log=folder / "log.txt").join()
        return [read_metrics(cfg.output_dir) for cfg in configs]

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A reference and a value model of the tiny configs' shape, random, as their folders."""
    sizes = OmegaConf.to_container(load(ROOT / "configs" / "tiny" / "score_reference.yaml").model)
    sizes.pop("_component_")
    folder = tmp_path_factory.mktemp("models")
    export_hf(random_decoder(**sizes), folder / "reference", tokenizer_source=byte_tokenizer())
    value_model = ValueModel(random_decoder(**sizes), "mlp")
    torch.nn.init.normal_(value_model.value_head.out.weight)
    save_value_model(value_model, folder / "value_model", tokenizer=byte_tokenizer(), settings={})
    return folder


@pytest.fixture
def postgres():
    """An empty PostgreSQL: the URL of a database, and a function that stops the server before the test ends."""
    with ExitStack() as server:
        try:
            url = server.enter_context(postgres_server())
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield url, server.close
