"""Scoring end to end: the column against a plain forward pass, kills, processes, and what a resumed run refuses."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from processes import start
from random_models import random_decoder
from score_configs import score_configs
from services import new_store

from recipes.score_reference import ScoreReferenceRecipe
from runs import ROOT
from wmtp.config import load
from wmtp.data import pack, prompt_completion, scored
from wmtp.loss import token_cross_entropy
from wmtp.models import export_hf, load_checkpoint, load_value_model
from wmtp.pretrained import byte_tokenizer

SIZES = OmegaConf.to_container(load(ROOT / "configs" / "tiny" / "score_reference.yaml").model)
SIZES.pop("_component_")
SEQ_LEN = 64
NO_MODEL = {"model": None, "checkpoint": None, "column": "values"}


@pytest.fixture
def score_config(tiny_config, models, tmp_path):
    """The shipped tiny config on 40 short text rows, one without a target and some longer than seq_len."""
    source = tmp_path / "rows.jsonl"
    if not source.exists():
        write_rows(source, 40)

    def config(**overrides):
        cfg = tiny_config(
            "score_reference", checkpoint=str(models / "reference"), seq_len=SEQ_LEN, documents_per_part=8
        )
        cfg.dataset = {"_component_": "wmtp.data.prompt_completion_stream", "source": str(source)}
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return cfg

    return config


def write_rows(path, number, change=None):
    rows = [
        {"prompt": f"def f{i}():\n", "completion": "    return 1\n" * (i % 9), "id": f"r{i}"} for i in range(number)
    ]
    rows[3]["prompt"] = "x" * SEQ_LEN  # no target within seq_len
    if change is not None:
        rows[change]["completion"] += "#"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory):
    """What score_config's rows give, for tests that begin with a scored dataset."""
    return tmp_path_factory.mktemp("once") / "scored"


@pytest.fixture
def scored_config(score_config, scored_once):
    """score_config, and what it scores is there already."""
    cfg = score_config()
    if not scored_once.exists():
        run_here(cfg)
        shutil.copytree(cfg.output_dir, scored_once)
    shutil.copytree(scored_once, cfg.output_dir, dirs_exist_ok=True)
    return score_config


def run_here(cfg):
    """Score in this process; the manifest."""
    recipe = ScoreReferenceRecipe(cfg)
    recipe.setup()
    manifest = recipe.report(recipe.score())
    recipe._log.close()
    return manifest


def files(output_dir):
    """Everything that makes up the scored dataset, byte for byte."""
    paths = [Path(output_dir) / "manifest.json", *sorted(Path(output_dir).glob("data/*"))]
    return {path.name: path.read_bytes() for path in paths}


def reference(models, dtype):
    model = random_decoder(**SIZES)
    load_checkpoint(model, models / "reference")
    return model.to(dtype).eval()


@torch.no_grad()
def test_the_column_is_the_plain_forward_of_each_document_alone(score_config, models):
    cfg = score_config()
    manifest = run_here(cfg)
    documents = scored(byte_tokenizer(), source=cfg.output_dir, checkpoint=str(models / "reference"))
    source = prompt_completion(byte_tokenizer(), source=cfg.dataset.source)
    model, total = reference(models, torch.float64), 0.0
    for document, original in zip(documents, source, strict=True):
        assert (document.id, document.tokens.tolist()) == (original.id, original.tokens.tolist())
        tokens = torch.from_numpy(document.tokens).long()[None, :SEQ_LEN]
        labels = torch.from_numpy(document.labels).long()[1:SEQ_LEN]
        expected = torch.zeros(len(document), dtype=torch.float64)
        logits = model(tokens)[0, 0, :-1]
        expected[1 : tokens.shape[1]] = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        np.testing.assert_allclose(document.signals["reference_ce"], expected, atol=2e-5, rtol=1e-5)
        total += expected.sum().item()
    assert manifest["mean"] == pytest.approx(total / manifest["data"]["targets"], rel=1e-6)
    assert manifest["data"]["cut_documents"] == sum(len(d) > SEQ_LEN for d in source) > 0

    # What training sees of the column is what the reference beside it would say.
    batch = pack(documents, SEQ_LEN, pad_id=0).batch([0, 1, 2])
    online = reference(models, torch.float32)(
        batch["tokens"], document_ids=batch["document_ids"], loss_fn=token_cross_entropy, labels=batch["labels"]
    )
    torch.testing.assert_close(batch["signals"]["reference_ce"], online[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_the_mass_comes_with_the_ce_in_one_pass_and_earlier_columns_stay(score_config, models, tmp_path):
    run_here(score_config())
    base = {
        "_component_": "wmtp.data.scored",
        "source": score_config().output_dir,
        "rename": {"reference_ce": "base_ce"},
    }
    cfg = score_config(column="reference_mass", output_dir=str(tmp_path / "both"), dataset=base)
    manifest = run_here(cfg)
    documents = scored(byte_tokenizer(), source=cfg.output_dir)
    assert documents.signals == ("base_ce", "reference_ce", "reference_mass")
    model, total = reference(models, torch.float64), 0.0
    for document in documents:
        tokens = torch.from_numpy(document.tokens).long()[None, :SEQ_LEN]
        p = model(tokens)[0, 0, :-1].softmax(-1)
        of_target = p.gather(1, tokens[0, 1:, None])
        mass = of_target[:, 0] + torch.where(p < of_target, p, 0.0).sum(1)
        expected = torch.zeros(len(document), dtype=torch.float64)
        expected[1 : tokens.shape[1]] = torch.where(torch.from_numpy(document.labels[1:SEQ_LEN]) == -100, 0.0, mass)
        np.testing.assert_allclose(document.signals["reference_mass"], expected, atol=2e-5)
        np.testing.assert_allclose(document.signals["reference_ce"], document.signals["base_ce"], atol=2e-5)
        total += float(document.signals["reference_ce"].sum(dtype=np.float64))
    assert manifest["mean"] == pytest.approx(total / manifest["data"]["targets"], rel=1e-6)
    with pytest.raises(ValueError, match="was scored with seq_len 64; lower seq_len to it"):
        run_here(score_config(output_dir="longer", dataset=base, seq_len=65))


@torch.no_grad()
def test_values_are_scored_at_every_position_of_every_document(score_config, models):
    cfg = score_config(**NO_MODEL, value_model=str(models / "value_model"))
    run_here(cfg)
    model = load_value_model(models / "value_model")
    for document in scored(byte_tokenizer(), source=cfg.output_dir):
        expected = torch.zeros(len(document))
        values = model(torch.from_numpy(document.tokens).long()[None, :SEQ_LEN])[0]
        expected[: len(values)] = values
        np.testing.assert_allclose(document.signals["values"], expected, atol=2e-5, rtol=1e-5)
        assert document.signals["values"][0] != 0


@pytest.mark.long
def test_processes_sharding_and_kills_do_not_change_a_byte(score_config, tmp_path):
    """Scored by one process, by two, by two that share one model, and by two that SIGKILL ends, resumed by one."""
    write_rows(Path(score_config().dataset.source), 240)
    common = {"documents_per_part": 4, "batch_size": 1}
    alone, two, shared, killed = (
        score_config(output_dir=str(tmp_path / name), fully_shard=name == "shared", **common)
        for name in ("alone", "two", "shared", "killed")
    )
    paths = []
    for cfg in (two, shared, killed):
        paths.append(str(tmp_path / f"{Path(cfg.output_dir).name}.yaml"))
        OmegaConf.save(cfg, paths[-1])
    processes = start(score_configs, *paths, size=2, log=tmp_path / "log.txt")
    while len(complete(killed)) < 6:
        assert processes.running(), processes.log.read_text()[-2000:]
        time.sleep(0.002)
    for process in processes.members:
        process.kill()
    for process in processes.members:
        process.join()
    there = complete(killed)
    assert 6 <= len(there) < 60
    assert not (Path(killed.output_dir) / "manifest.json").exists()
    with pytest.raises(ValueError, match="its scoring is not complete"):
        scored(byte_tokenizer(), source=killed.output_dir)

    run_here(alone)
    expected = files(alone.output_dir)
    assert files(two.output_dir) == expected
    assert files(shared.output_dir).keys() == expected.keys()
    theirs, ours = (scored(byte_tokenizer(), source=cfg.output_dir) for cfg in (shared, alone))
    for a, b in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(a.signals["reference_ce"], b.signals["reference_ce"], atol=2e-5, rtol=1e-5)
    before = {path: path.stat().st_mtime_ns for path in there}
    killed.resume = True
    run_here(killed)
    assert files(killed.output_dir) == expected
    assert {path: path.stat().st_mtime_ns for path in there} == before  # kept, not written again


def complete(cfg):
    return sorted(Path(cfg.output_dir).glob("data/part-*.parquet"))


def test_a_resumed_run_scores_only_what_is_missing_or_torn(scored_config):
    cfg = scored_config()
    expected, parts = files(cfg.output_dir), complete(cfg)
    parts[1].unlink()
    parts[2].write_bytes(expected[parts[2].name][:-9])
    content = bytearray(expected[parts[3].name])
    content[len(content) // 3] ^= 1  # inside the data, so that the file still opens
    parts[3].write_bytes(content)
    (Path(cfg.output_dir) / "data" / "part-00009.parquet.tmp").write_text("torn")
    (Path(cfg.output_dir) / "manifest.json").unlink()
    kept = parts[0].stat().st_mtime_ns
    cfg.resume = "auto"
    run_here(cfg)
    assert files(cfg.output_dir) == expected
    assert parts[0].stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seq_len": 128}, "cannot resume with seq_len 64 -> 128 since"),
        ({"dtype": "bf16"}, "cannot resume with dtype fp32 -> bf16 since"),
        ({"documents_per_part": 4}, "cannot resume with documents_per_part 8 -> 4 since"),
        ({"model__max_seq_len": 128}, "cannot resume with model.section.max_seq_len 256 -> 128 since"),
        ({"changed": 20}, "cannot resume: documents r16 to r23 of"),
        ({"rows": 41}, "has more documents than when"),
        ({"rows": 32}, "ends before the documents of"),
        ({"resume": False}, "already holds a scored dataset; set resume=true to go on with it"),
    ],
)
def test_another_scoring_is_refused_and_nothing_is_lost(scored_config, overrides, message):
    cfg = scored_config()
    expected = files(cfg.output_dir)
    rows, changed = overrides.pop("rows", 40), overrides.pop("changed", None)
    write_rows(Path(cfg.dataset.source), rows, changed)
    with pytest.raises(ValueError, match=message) as error:
        run_here(scored_config(**{"resume": True, **overrides}))
    assert "\n" not in str(error.value)
    assert files(cfg.output_dir) == expected


def test_another_reference_or_tokenizer_is_refused(scored_config, tmp_path):
    cfg = scored_config()
    other = tmp_path / "other"
    model = random_decoder(**SIZES)
    with torch.no_grad():
        model.norm.scale.mul_(2)
    export_hf(model, other, tokenizer_source=byte_tokenizer())
    with pytest.raises(ValueError, match=r"cannot resume with model\.checkpoint_sha256"):
        run_here(scored_config(resume=True, checkpoint=str(other)))
    with pytest.raises(ValueError, match="scored by another model"):
        scored(byte_tokenizer(), source=cfg.output_dir, checkpoint=str(other))
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="token ids, checked by value"):
        run_here(scored_config(output_dir="elsewhere", checkpoint=str(other)))


def test_a_score_that_is_no_number_names_the_document_and_keeps_earlier_parts(score_config, models, tmp_path):
    model = random_decoder(**{**SIZES, "tie_word_embeddings": False})
    with torch.no_grad():
        model.tok_embeddings.weight[ord("x")] = float("nan")  # only r3 has an x: no target, so it is not scored
        model.tok_embeddings.weight[ord("9")] = float("nan")  # r9 is the first with a 9
    export_hf(model, tmp_path / "nan", tokenizer_source=byte_tokenizer())
    cfg = score_config(checkpoint=str(tmp_path / "nan"), model__tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"document r9: reference_ce of token \d+ is nan; look at the document"):
        run_here(cfg)
    assert [path.name for path in complete(cfg)] == ["part-00000.parquet"]
    assert not (Path(cfg.output_dir) / "manifest.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batchsize": 3}, "unknown key 'batchsize' in config; did you mean 'batch_size'"),
        ({"seq_len": 512}, "seq_len 512 is longer than model.max_seq_len 256"),
        ({"checkpoint": None}, "column=reference_ce needs model and checkpoint"),
        ({"column": "values"}, "column=values needs value_model, and model=null"),
        ({"column": "ce"}, "column must be one of reference_ce, reference_mass, values, got 'ce'"),
        ({"checkpoint": "no/such/model"}, "no/such/model does not exist"),
        ({"dataset__source": "no/such.jsonl"}, "no/such.jsonl does not exist"),
        ({"dataset__source": "empty.jsonl"}, "empty.jsonl: the dataset is empty"),
        ({"dataset__prompt_column": "question"}, "rows.jsonl:1: field 'question' is missing; the row has"),
        ({**NO_MODEL, "value_model": "no/such/model"}, "no/such/model does not exist"),
        ({**NO_MODEL, "value_model": "models/reference"}, "holds no value model"),
        ({"resume": True}, "holds no scored dataset"),
        ({"model__vocab_size": 128}, "tok_embeddings"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_no_trace(score_config, models, tmp_path, overrides, message):
    (tmp_path / "empty.jsonl").touch()
    shutil.copytree(models, tmp_path / "models")
    cfg = score_config(**overrides)
    with pytest.raises((ValueError, OSError)) as error:
        run_here(cfg)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not Path(cfg.output_dir).exists()


def test_mlflow_holds_the_totals_and_the_manifest_and_a_resumed_run_goes_on_in_it(tiny_config, models, tmp_path):
    """Also the one run of the shipped config on its own dataset, which is in memory."""
    uri = new_store(tmp_path)
    cfg = tiny_config("score_reference", checkpoint=str(models / "reference"))
    cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "tracking_uri": uri}
    cfg.tracking.artifact_location = str(tmp_path / "artifacts")
    cfg.resume = "auto"
    manifest = run_here(cfg)
    assert manifest["data"]["documents"] == cfg.dataset.max_functions and len(manifest["parts"]) == 4
    cfg.resume = True
    run_here(cfg)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("wmtp/python_functions")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["score/targets"] == manifest["data"]["targets"]
    assert run.data.metrics["score/mean_ce"] == manifest["mean"]
    first, second = client.get_metric_history(run.info.run_id, "score/tokens_per_second")
    assert first.value > 0 and second.value == 0  # all parts were there
    assert run.data.tags["wmtp.data_sha256"] == manifest["data"]["sha256"] and "wmtp.git_commit" in run.data.tags
    assert "score_reference" in run.data.tags["mlflow.note.content"]  # of the first start, which found nothing
    assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"config.yaml", "manifest.json"}
