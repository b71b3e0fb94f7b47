"""Weights inside the full recipe: where their signals come from, what a run keeps of them, and what it shows."""

import json
import re
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from services import new_store

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.score_reference import ScoreReferenceRecipe
from runs import series, write_own_rules
from wmtp.errors import UserError
from wmtp.training.checkpoint import complete_checkpoints

RHO1, SHUFFLED = ({"_component_": f"wmtp.weighting.{name}"} for name in ("rho1", "shuffled"))
MASS = {"_component_": "wmtp.weighting.prift", "signal": "mass"}
PAGES = {"_component_": "wmtp.report.TokenWeightPages"}
BRIEF = {"save_every": None, "eval_every": None, "eval_dataset": None, "export_dtype": "none", "token_view": None}


@pytest.fixture
def train(tiny_config, run_recipe, models):
    """Run the full recipe on a tiny config; its training metrics without the speed."""

    def run(job, name, **overrides):
        known = {"reference_checkpoint": str(models / "reference"), "value_model": str(models / "value_model")}
        cfg = tiny_config(job, output_dir=name, **BRIEF)
        cfg.update({key: path for key, path in known.items() if key in cfg})
        for key, value in overrides.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, merge=False)
        lines = [line for line in run_recipe(cfg) if "train/loss" in line]
        return series(lines)

    return run


def score(cfg):
    recipe = ScoreReferenceRecipe(cfg)
    recipe.setup()
    recipe.report(recipe.score())
    return {"_component_": "wmtp.data.scored", "source": str(cfg.output_dir)}


def assert_close(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("column", "weighting"), [("reference_ce", RHO1 | {"mode": "soft"}), ("reference_mass", MASS)], ids=["ce", "mass"]
)
def test_a_scored_column_trains_as_the_reference_beside_the_policy(train, tiny_config, models, column, weighting):
    dataset = score(tiny_config("score_reference", checkpoint=str(models / "reference"), column=column))
    dataset["checkpoint"] = str(models / "reference")
    beside = train("rho1", "beside", max_steps=3, weighting=weighting)
    column = train("rho1_scored", "column", max_steps=3, weighting=weighting, dataset=dataset)
    assert_close(column, beside)
    assert beside[0]["weights/effective_sample_size"] < 0.95  # there is something to agree about


def test_cached_values_train_as_the_value_model_beside_the_policy(train, tiny_config, models):
    where = {"model": None, "checkpoint": None, "column": "values", "value_model": str(models / "value_model")}
    dataset = score(tiny_config("score_reference", **where))
    gae = {"weighting__delta": "gae", "weighting__map": "exp"}
    beside = train("critic", "beside", max_steps=3, **gae)
    cached = train("critic", "cached", max_steps=3, **gae, dataset=dataset, value_model=None)
    assert_close(cached, beside)
    assert beside[0]["weights/effective_sample_size"] < 0.95


def test_the_epochs_ce_is_that_of_its_first_weights(train):
    """One row a step: within an epoch the weights are those of its start, whatever the split; then they are new."""
    options = {"batch_size": 1, "dataset__max_functions": 12, "seq_len": 128, "weighting__mode": "soft"}
    steps = train("rho1", "step", max_steps=5, **options)
    epochs = train("rho1", "epoch", max_steps=5, **options, refresh_policy_ce="epoch")
    assert epochs[0] == steps[0]  # the policy is still the epoch's first one
    assert epochs[1] != steps[1]  # which has moved at the first step
    halves = {**options, "gradient_accumulation_steps": 2, "refresh_policy_ce": "epoch", "max_steps": 3}
    pairs = train("rho1", "1x2", **halves)
    assert_close(train("rho1", "2x1", **{**halves, "batch_size": 2, "gradient_accumulation_steps": 1}), pairs)


@pytest.mark.parametrize(
    ("job", "overrides"),
    [
        ("rho1", {"refresh_policy_ce": "epoch"}),
        ("rho1", {"weighting__scope": "dataset"}),
        ("critic", {"weighting__whiten": "running", "weighting__warmup_steps": 2}),
    ],
)
def test_what_a_weighting_remembers_survives_a_kill(train, job, overrides):
    options = {"max_steps": 6, "save_every": 2, "dataset__max_functions": 12, "seq_len": 128, **overrides}
    whole = train(job, "whole", **options)
    train(job, "cut", **options)
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])  # as if killed after step 4
    assert train(job, "cut", **options, resume=True) == whole
    if "weighting__scope" in overrides:  # a threshold of the data set keeps more of some steps than of others
        assert len({round(line["weights/kept_share"], 3) for line in whole[-3:]}) > 1
    if job == "critic":  # weights are 1 until there are statistics
        assert [line["weights/effective_sample_size"] for line in whole[:2]] == [1, 1]
        assert whole[2]["weights/effective_sample_size"] < 1


@pytest.mark.parametrize(
    "section", [{"_component_": "my_rules.fewer_spaces", "least": 0.25}, {"_component_": "my_rules.surprise"}]
)
def test_a_plain_function_trains_and_resumes(train, section):
    write_own_rules()
    options = {"max_steps": 4, "save_every": 2, "dataset__max_functions": 12, "seq_len": 128, "weighting": section}
    whole = train("uniform", "whole", **options)
    assert all(line["weights/mean"] == pytest.approx(1, abs=1e-5) for line in whole)
    assert all(line["weights/max"] > 1.01 for line in whole)
    train("uniform", "cut", **options)
    shutil.rmtree(complete_checkpoints(Path("cut/checkpoints"))[-1])
    assert train("uniform", "cut", **options, resume=True) == whole


def prior_rows(path, *names, numbers=lambda token: token % 3.0):
    """Rows of text with columns of one number for each token, made from the token's place."""
    text = {"prompt": "def f():\n", "completion": "    return 1\n"}
    column = [numbers(token) for token in range(sum(map(len, text.values())) + 1)]
    path.write_text("".join(json.dumps(text | dict.fromkeys(names, column)) + "\n" for _ in range(64)))
    return {"_component_": "wmtp.data.prompt_completion", "source": str(path)}


def test_a_column_of_the_data_is_a_signal_for_a_method_that_names_it(train, tmp_path):
    """Nothing but the method and the data knows `prior_ce`, and it trains as the column that everything knows."""
    write_own_rules()
    rule = {"_component_": "my_rules.over_prior"}
    both = prior_rows(tmp_path / "both.jsonl", "prior_ce", "reference_ce")
    options = {"max_steps": 2, "seq_len": 64, "dataset": both, "token_view": PAGES | {"every": 2}, "preview": 1}
    own = train("uniform", "own", **options, weighting=rule)
    assert own == train("uniform", "known", **options, weighting=rule | {"prior": "reference_ce"})
    assert own[0]["weights/effective_sample_size"] < 0.95
    page = Path("own/token_weights/step_00000002.html").read_text()
    assert "prior_ce" in page
    packed = train("uniform", "saved", **options, weighting=rule, packed=False)
    assert packed[0]["weights/max"] == pytest.approx(own[0]["weights/max"], rel=1e-4)


@pytest.mark.parametrize(
    ("columns", "prior", "message"),
    [
        ((), "prior_ce", "needs prior_ce: use a dataset with a prior_ce column, a number for each token"),
        (("prior_ce",), "piror_ce", "a piror_ce column, a number for each token; did you mean prior_ce?"),
        ((), "polcy_ce", "did you mean policy_ce?"),
        ((), "reference_ce", "needs reference_ce: set reference_model, or use a dataset with a reference_ce column"),
        (("policy_ce",), "policy_ce", "the dataset has a policy_ce column, which the loss computes; rename the column"),
    ],
)
def test_a_signal_that_nothing_gives_is_named(train, tmp_path, columns, prior, message):
    write_own_rules()
    rule = {"_component_": "my_rules.over_prior", "prior": prior}
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train("uniform", "x", max_steps=1, seq_len=64, dataset=prior_rows(tmp_path / "d", *columns), weighting=rule)
    assert f"did you mean {prior}?" not in str(error.value)


def test_a_column_with_a_gap_is_no_signal_and_is_named(train, tmp_path):
    write_own_rules()
    rows = prior_rows(tmp_path / "d", "prior_ce", numbers=lambda token: None if token == 5 else 1.0)
    with pytest.raises(UserError, match="its column prior_ce has not one finite number for each token in every row"):
        train("uniform", "x", max_steps=1, seq_len=64, dataset=rows, weighting={"_component_": "my_rules.over_prior"})


def test_a_rule_that_breaks_its_promise_does_not_train(train):
    write_own_rules()
    with pytest.raises(UserError, match=r"weighting thrice_ce gave \d+ weights outside its bounds \[0, 5\], the first"):
        train("uniform", "refused", max_steps=1, weighting={"_component_": "my_rules.thrice_ce"})
    misspelt = {"_component_": "my_rules.fewer_spaces", "most": 1}
    with pytest.raises(UserError, match="unknown key 'most' in weighting"):
        train("uniform", "misspelt", max_steps=1, weighting=misspelt)


@pytest.mark.parametrize("method", ["dft", "entropy", "shuffled", "random_matched"])
def test_every_method_trains_and_logs_its_statistics(train, method):
    section = {"_component_": f"wmtp.weighting.{method}"}
    if method in ("shuffled", "random_matched"):
        section["method"] = RHO1 | {"mode": "soft"}
    (line,) = train("rho1", method, max_steps=1, weighting=section)
    names = ("mean", "p25", "p75", "p95", "max", "kept_share", "effective_sample_size", "entropy", "ce_correlation")
    assert {f"weights/{name}" for name in (*names, "position_correlation")} <= line.keys()
    assert line["weights/p25"] < line["weights/p95"] <= line["weights/max"]


def test_the_token_view_is_written_every_so_many_steps_and_logged(tiny_config, models, tmp_path):
    uri = new_store(tmp_path)
    tracking = {"_component_": "wmtp.tracking.MLflowLogger", "experiment": "e", "tracking_uri": uri}
    cfg = tiny_config("rho1", max_steps=4, reference_checkpoint=str(models / "reference"), token_view__every=2)
    cfg.update(BRIEF | {"token_view": cfg.token_view})
    cfg.tracking = {**tracking, "artifact_location": str(tmp_path / "artifacts")}
    recipe = FullFinetuneRecipeWMTP(cfg)
    recipe.setup()
    recipe.train()
    recipe._log.close()
    pages = sorted(path.name for path in (Path(cfg.output_dir) / "token_weights").iterdir())
    assert pages == ["step_00000002.html", "step_00000004.html"]
    page = (Path(cfg.output_dir) / "token_weights" / pages[0]).read_text()
    assert all(word in page for word in ("this run", "dft", "reference CE"))
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    logged = [item.path for item in client.list_artifacts(run.info.run_id, "token_weights")]
    assert logged == [f"token_weights/{name}" for name in pages]


@pytest.mark.parametrize(
    ("job", "overrides", "message"),
    [
        ("critic", {"value_model": None}, "needs values: set value_model"),
        ("critic", {"value_model": "no/such/folder"}, "no/such/folder does not exist"),
        ("critic", {"weighting__beta": 0.0}, "weighting.beta must be > 0"),
        ("critic", {"weighting__temperature": -1.0}, "weighting.temperature must be > 0"),
        ("rho1", {"weighting__percentile": 1.2}, "weighting.percentile must be in (0, 1]"),
        ("rho1", {"refresh_policy_ce": "run"}, "refresh_policy_ce must be one of step, epoch"),
        ("rho1", {"reference_checkpoint": None}, "set reference_checkpoint"),
        ("rho1_scored", {"dataset__source": "no/such/data"}, "no/such/data does not exist"),
        (
            "rho1",
            {"weighting": SHUFFLED | {"method": RHO1 | {"mode": "x"}}},
            "weighting.method.mode must be one of",
        ),
        (
            "rho1",
            {"token_view": PAGES | {"every": 1, "beside": {"c": {"_component_": "wmtp.weighting.critic"}}}},
            "token_view.beside.c reads values",
        ),
        ("rho1", {"token_view": PAGES | {"every": 0}}, "every must be a whole"),
    ],
)  # fmt: skip
def test_is_refused_in_one_line_and_leaves_no_trace(train, tmp_path, job, overrides, message):
    with pytest.raises((ValueError, OSError)) as error:
        train(job, "refused", max_steps=1, **overrides)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "refused").exists()


def test_a_value_model_of_another_tokenizer_is_refused(train, models, tmp_path):
    other = shutil.copytree(models / "value_model", tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]  # same size, other ids
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="policy and value model must share the token ids"):
        train("critic", "refused", max_steps=1, value_model=str(other))
