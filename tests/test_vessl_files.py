"""The VESSL run files are what the service understands, and start recipes with keys that these read."""

import copy
import importlib
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torchtune._cli.tune import TuneCLIParser
from vessl_files import BadRunFile, check_run_file, read, recorded_commands

from wmtp.config import load, read_command_line

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "vessl.yaml", *sorted((ROOT / "vessl").glob("*.yaml"))]
by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@by_name
def test_run_file_is_what_the_client_describes(path):
    check_run_file(read(path))


@by_name
def test_credentials_are_secrets_by_name(path):
    env = read(path)["env"]
    credentials = {key: value for key, value in env.items() if re.search("KEY|SECRET|TOKEN|PASSWORD", key)}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(credentials)
    assert all(isinstance(value, dict) and set(value) == {"secret"} for value in credentials.values())


SLURM = {"run": [{"command": (ROOT / "slurm" / "sweep.sbatch").read_text()}], "env": {"SLURM_JOB_ID": ""}}
SPECS = {path.stem: read(path) for path in FILES} | {"slurm": SLURM}


@pytest.mark.parametrize("name", SPECS)
def test_commands_start_recipes_that_read_their_keys(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    calls = recorded_commands(SPECS[name], tmp_path)
    assert calls
    for call in calls:
        arguments = TuneCLIParser()._parser.parse_args(call)
        module = importlib.import_module(arguments.recipe.removesuffix(".py").replace("/", "."))
        config_file = load(arguments.recipe_args[arguments.recipe_args.index("--config") + 1])
        overrides = [argument.split("=")[0] for argument in arguments.recipe_args if "=" in argument]
        # Every key is in its config, commented: one that is not would be a misspelling.
        assert [key for key in overrides if not _has(config_file, key)] == []
        recipe = next(
            value for name, value in vars(module).items() if "Recipe" in name and value.__module__ == module.__name__
        )
        recipe(read_command_line(arguments.recipe_args))  # reads every key, and refuses one that it does not know


def test_two_nodes_are_one_training_whose_processes_find_each_other(tmp_path):
    specs = [read(ROOT / f"vessl/two_nodes_node{rank}.yaml") for rank in (0, 1)]
    nodes = []
    for rank, spec in enumerate(specs):
        (tmp_path / str(rank)).mkdir()
        (call,) = recorded_commands(spec, tmp_path / str(rank))
        nodes.append(TuneCLIParser()._parser.parse_args(call))
    assert [node.node_rank for node in nodes] == [0, 1]
    assert {node.nnodes for node in nodes} == {"2"}
    # Without an endpoint `tune run` would start each node as a training of its own.
    assert [node.rdzv_endpoint for node in nodes] == ["127.0.0.1:29400", "10.0.0.1:29400"]
    assert nodes[0].recipe_args == nodes[1].recipe_args
    assert specs[0]["mount"] == specs[1]["mount"]


def _garbage():
    """Changes after which a good run file is none."""

    def change(path, value):
        def apply(spec):
            *parents, last = path
            for key in parents:
                spec = spec[key]
            if value is None:
                del spec[last]
            else:
                spec[last] = value

        return apply

    yield "unknown key", change(["comand"], "tune run"), "comand"
    yield "unknown key inside", change(["resources", "gpus"], 4), "gpus"
    yield "key of several nodes", change(["resources", "nnodes"], 2), "nnodes"
    yield "no image", change(["image"], None), "image"
    yield "no preset", change(["resources", "preset"], None), "preset"
    yield "preset of another type", change(["resources", "preset"], 4), "preset"
    yield "command of another type", change(["run", 0, "command"], ["tune", "run"]), "command"
    yield "run as a mapping", change(["run"], {"command": "tune run"}), "list"
    yield "unknown scheme", change(["import", "/data"], "ftp://host/data"), "ftp"
    yield "bucket alone", change(["import", "/data"], "s3://wmtp-data"), "/data"
    yield "local path", change(["import", "/data"], "data/mbpp"), "/data"
    yield "secret without a name", change(["env", "TOKEN"], {"secret": None}), "secret"
    yield "value and secret", change(["env", "TOKEN"], {"secret": "a", "value": "b"}), "TOKEN"
    yield "tags as text", change(["tags"], "wmtp"), "tags"
    yield "unknown port type", change(["ports"], [{"name": "a", "type": "quic", "port": 1}]), "type"
    yield "a list", lambda spec: spec.clear(), "lacks"


@pytest.mark.parametrize(("change", "named"), [g[1:] for g in _garbage()], ids=[g[0] for g in _garbage()])
def test_garbage_is_refused_by_name(change, named):
    spec = copy.deepcopy(read(ROOT / "vessl.yaml"))
    change(spec)
    with pytest.raises(BadRunFile, match=re.escape(named)):
        check_run_file(spec)


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(BadRunFile, match="twice"):
        read(tmp_path / "twice.yaml")


def _has(cfg, key: str) -> bool:
    *parents, last = key.split(".")
    section = OmegaConf.select(cfg, ".".join(parents)) if parents else cfg
    return section is not None and last in section
