"""Held-out sets of a training run: their names, the CE of every document and head, the file of each evaluation."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from services import new_store
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from runs import read_metrics
from wmtp.config import ConfigError
from wmtp.data import python_functions
from wmtp.models import from_checkpoint, load_checkpoint
from wmtp.pretrained import byte_tokenizer
from wmtp.training.checkpoint import complete_checkpoints

CODE = {"split": "heldout", "max_functions": 12, "max_body_lines": 8}
OTHER = {"split": "reference", "max_functions": 7, "max_body_lines": 4}
NAMED = {name: {"_component_": "wmtp.data.python_functions", **keys} for name, keys in (("code", CODE), ("b-2", OTHER))}
COLUMNS = ["set", "document", "number", "head", "targets", "ce"]


@pytest.fixture
def named_config(tiny_config):
    def config(**overrides):
        cfg = tiny_config(max_steps=4, eval_every=2, save_every=2, seq_len=128, **overrides)
        cfg.eval_dataset = NAMED
        return cfg

    return config


def by_hand(document, logits):
    """The CE in nats of head 1, 2, ... at each of a document's targets, from logits [H, S, V]."""
    tokens, labels = (
        torch.from_numpy(column[: logits.shape[1]]).long() for column in (document.tokens, document.labels)
    )
    for k in range(1, len(logits) + 1):
        yield cross_entropy(logits[k - 1, :-k], torch.where(labels[k:] >= 0, tokens[k:], -100), reduction="none")


def test_every_document_of_every_set_has_the_ce_of_transformers_and_of_plain_logits(named_config, run_recipe):
    cfg = named_config()
    metrics = run_recipe(cfg)
    folder = Path(cfg.output_dir)
    assert sorted(path.name for path in (folder / "held_out").iterdir()) == [
        f"step_{step:08d}.parquet" for step in (0, 2, 4)
    ]
    table = pd.read_parquet(folder / "held_out" / "step_00000004.parquet")
    assert list(table) == COLUMNS
    assert table.equals(table.sort_values(["set", "number", "head"], ignore_index=True))
    ours = from_checkpoint(folder / "export")
    load_checkpoint(ours, folder / "export")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "export")
    for name, keys in (("code", CODE), ("b-2", OTHER)):
        of_set, documents = table[table.set == name], python_functions(byte_tokenizer(), **keys)
        with_targets = [i for i, document in enumerate(documents) if (document.labels[1:128] >= 0).any()]
        assert of_set.number.unique().tolist() == with_targets and len(with_targets) > 3
        for number, rows in of_set.groupby("number"):
            document = documents[number]
            assert set(rows.document) == {document.id}
            tokens = torch.from_numpy(document.tokens[:128]).long()[None]
            with torch.no_grad():
                logits = torch.cat([theirs(tokens).logits, ours(tokens)[1]])  # head 1 by transformers
            for row, ce in zip(rows.itertuples(), by_hand(document, logits), strict=True):
                assert row.targets == (ce > 0).sum()
                assert row.ce == pytest.approx(float(ce.sum()) / row.targets, rel=1e-4)
        for head in (1, 2):
            rows = of_set[of_set["head"] == head]
            mean = (rows.ce * rows.targets).sum() / rows.targets.sum()
            assert metrics[-1][f"eval/{name}/ce_head{head}"] == pytest.approx(mean, rel=1e-12)
    assert not [key for key in metrics[-1] if key.startswith("eval/ce_")]


def test_one_set_without_a_name_is_a_set_all_the_same(named_config, run_recipe):
    metrics = run_recipe(named_config(output_dir="named"))
    cfg = named_config(output_dir="alone")
    cfg.eval_dataset = NAMED["code"]
    alone = run_recipe(cfg)
    assert [line["eval/ce_head2"] for line in alone if "eval/ce_head2" in line] == [
        line["eval/code/ce_head2"] for line in metrics if "eval/code/ce_head2" in line
    ]
    named = pd.read_parquet("named/held_out/step_00000002.parquet")
    file = "alone/held_out/step_00000002.parquet"
    assert pd.read_parquet(file).equals(named[named.set == "code"].assign(set="").reset_index(drop=True))
    sha256 = [
        json.loads(pq.read_schema(f"{name}/held_out/step_00000002.parquet").metadata[b"sha256"])
        for name in ("alone", "named")
    ]
    assert sha256[0][""] == sha256[1]["code"] != sha256[1]["b-2"]


def test_a_resumed_run_writes_the_same_bytes_and_mlflow_has_them(named_config, tmp_path):
    uri = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    tracking["artifact_location"] = str(tmp_path / "artifacts")
    cfg = named_config(tracking=tracking, output_dir=str(tmp_path / "run"), export_dtype="none")

    def run():
        recipe = FullFinetuneRecipeWMTP(cfg)
        recipe.setup()
        recipe.train()
        recipe._log.close()
        files = {file.name: file.read_bytes() for file in (tmp_path / "run" / "held_out").iterdir()}
        return files, [line.get("train/targets") for line in read_metrics(tmp_path / "run")]

    first = run()
    shutil.rmtree(complete_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    (tmp_path / "run" / "held_out" / "step_00000004.parquet").unlink()
    cfg.resume = True
    assert run() == first  # targets are counted from the run's beginning
    client = MlflowClient(uri)
    (logged,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    kept = Path(client.download_artifacts(logged.info.run_id, "held_out"))
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == first[0]


def test_an_evaluation_before_the_first_step_is_no_work_to_be_kept(named_config, run_recipe):
    cfg = named_config(output_dir="run", export_dtype="none")
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe.evaluate()  # and the process is killed
    assert run_recipe(cfg)[-1]["step"] == 4


@pytest.mark.slow
def test_processes_and_rows_of_a_batch_change_no_figure(named_config, run_distributed):
    here = Path.cwd()
    cut = lambda name, rows: named_config(
        output_dir=str(here / name), batch_size=rows, gradient_accumulation_steps=4 // rows
    )
    run_distributed(1, cut("one", 4), cut("rows", 1))
    two = cut("two", 2)
    two.gradient_accumulation_steps = 1
    run_distributed(2, two)
    one, *others = (pd.read_parquet(f"{name}/held_out/step_00000004.parquet") for name in ("one", "rows", "two"))
    for other in others:
        assert other[COLUMNS[:-1]].equals(one[COLUMNS[:-1]])
        assert other.ce.to_numpy() == pytest.approx(one.ce.to_numpy(), rel=1e-4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"a/b": NAMED["code"]}, r"eval_dataset has a set named 'a/b'; use letters, digits, _ and -$"),
        (
            {"split": "heldout"},
            r"eval_dataset.split must be the section of a set of that name, got 'heldout'; for one set",
        ),
        ({"code": {"split": "heldout"}}, r"eval_dataset.code has no _component_"),
        ({"code": {**NAMED["code"], "splt": 1}}, r"unknown key 'splt' in eval_dataset.code; did you mean 'split'"),
        ({}, r"eval_dataset has no _component_"),
    ],
)
def test_a_set_that_cannot_be_built_is_named(tiny_config, run_recipe, section, message):
    cfg = tiny_config()
    cfg.eval_dataset = section
    with pytest.raises(ConfigError, match=message):
        run_recipe(cfg)


def test_acceptance_and_accuracy_are_those_of_eval_heads(named_config, run_recipe, tiny_config):
    from recipes.eval_heads import EvalHeadsRecipe

    cfg = named_config(output_dir="run", accept_prompts=6, accept_tokens=20, optimizer__lr=1e-3)
    cfg.model.num_future_tokens, cfg.eval_dataset = 3, {"code": NAMED["code"]}
    trained = run_recipe(cfg)[-1]
    of_heads = tiny_config("eval_heads", checkpoint="run/export", seq_len=128, speed_prompts=6, max_new_tokens=20)
    of_heads.dataset, of_heads.model = NAMED["code"], {**cfg.model, "max_seq_len": 4096}
    recipe = EvalHeadsRecipe(of_heads)
    recipe.setup()
    heads, speed = recipe.evaluate()["heads"], recipe.measure_speed()["drafts_2"]
    assert trained["eval/code/accept_length"] == speed["tokens_per_forward"]
    for k in (1, 2, 3):
        assert trained[f"eval/code/accuracy_head{k}"] == heads[f"accuracy_head{k}"]
        if k > 1:
            assert trained.get(f"eval/code/acceptance_head{k}") == speed.get(f"acceptance_head{k}")
            assert heads[f"accuracy_head{k}"] <= trained[f"eval/code/agreement_head{k}"] + heads["accuracy_head1"] <= 2
