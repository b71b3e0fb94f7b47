"""Runs read back from folders and from MLflow, and python -m wmtp.report over several of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from scipy import stats
from services import new_store
from statsmodels.stats.multitest import multipletests

from wmtp.errors import UserError
from wmtp.report.__main__ import main
from wmtp.report.comparison import compare_runs, evaluation_arms, held_out_arms, table_text
from wmtp.report.runs import load_run, require_comparable
from wmtp.training.validation import HeldOut

RHO1 = {"_component_": "wmtp.weighting.rho1", "percentile": 0.3}
METHODS = {
    "uniform": {"_component_": "wmtp.weighting.uniform"},
    "rho1": RHO1,
    "shuffled": {"_component_": "wmtp.weighting.shuffled", "method": RHO1},
}
SHIFTS = {"uniform": 0.0, "rho1": -0.2, "shuffled": 0.0}
NUMBERS = range(1, 31)


def held_out(method, seed, sets=("code", "prose")):
    """CE of thirty documents of each set by a run, which its seed's luck moves, and its method."""
    rng = np.random.default_rng([seed, len(method)])
    luck, columns = rng.normal(0, 0.005), {name: [] for name in ("set", "document", "number", "head", "targets", "ce")}
    for name in sets:
        for number in NUMBERS:
            for head in (1, 2):
                ce = 2 + number / 10 + head + luck + rng.normal(0, 0.01) + (SHIFTS[method] if name == "code" else 0)
                row = (name, f"{name}.py:{number}:f", number, head, 10 * number, ce)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
    return HeldOut({}, columns, {name: f"sha of {name}" for name in sets})


@pytest.fixture
def run(tmp_path):
    """Write the folder of a run as a recipe leaves it."""

    def run(method="uniform", seed=0, *, targets=5000, data="d", of_set=None, folder=None, **config):
        folder = tmp_path / (folder or f"{method}_{seed}")
        found = of_set or held_out(method, seed)
        frame = pd.DataFrame(found.documents)
        metrics = {}
        for (name, head), rows in frame.groupby(["set", "head"]):
            prefix = f"eval/{name}/" if name else "eval/"
            metrics[f"{prefix}ce_head{head}"] = np.average(rows.ce, weights=rows.targets)
        found.write(folder / "held_out" / "step_00000004.parquet")
        lines = [{"step": 0, "time": 1.0, **metrics}, {"step": 4, "time": 2.0, "train/targets": targets}]
        lines.append({"step": 4, "time": 2.0, **metrics})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "torn')
        config = {"seed": seed, "output_dir": str(folder), "weighting": METHODS[method], "max_steps": 4, **config}
        OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
        tags = {"wmtp.method": method, "wmtp.rows_sha256": data, "wmtp.git_commit": "c0ffee"}
        (folder / "tags.json").write_text(json.dumps(tags))
        return str(folder)

    return run


@pytest.fixture
def study(run):
    return [run(method, seed) for method in METHODS for seed in range(3)]


def test_a_folder_is_read_as_it_was_written(run):
    folder = run("rho1", 2)
    Path(folder, "evaluations", "mbpp").mkdir(parents=True)
    Path(folder, "evaluations", "mbpp", "results.json").write_text('{"pass@1": 0.5}')
    found = load_run(folder)
    assert (found.seed, found.method, found.state, found.run_id, found.targets) == (2, "rho1", "FINISHED", None, 5000)
    assert found.facts["git_commit"] == "c0ffee" and found.config["weighting"] == RHO1
    assert found.evaluations == {"mbpp": {"pass@1": 0.5}}
    assert [step for step, _ in found.metrics["eval/code/ce_head1"]] == [0, 4]
    assert found.held_out.to_dict("list") == held_out("rho1", 2).documents
    assert found.cell == load_run(run("rho1", 3)).cell != load_run(run("uniform", 2)).cell
    assert load_run(run(folder="cells/l0.1/seed-0")).cell == "l0.1"


def test_mlflow_gives_the_same_run_as_its_folder(run, tmp_path, monkeypatch):
    folder, uri = Path(run("rho1", 1)), new_store(tmp_path / "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    experiment = client.create_experiment("e", str(tmp_path / "artifacts"))
    logged = client.create_run(experiment)
    for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]:
        values = json.loads(line)
        for key in values.keys() - {"step", "time"}:
            client.log_metric(logged.info.run_id, key, values[key], step=values["step"])
    for key, value in json.loads((folder / "tags.json").read_text()).items():
        client.set_tag(logged.info.run_id, key, value)
    client.log_artifact(logged.info.run_id, str(folder / "config.yaml"))
    client.log_artifacts(logged.info.run_id, str(folder / "held_out"), "held_out")
    client.set_terminated(logged.info.run_id)
    tags = {"mlflow.parentRunId": logged.info.run_id, "wmtp.evaluation": "mbpp"}
    for start, share in ((2, 0.5), (1, 0.1)):  # the later one took the earlier one's place in the folder
        evaluation = client.create_run(experiment, start_time=start, tags=tags).info.run_id
        client.log_text(evaluation, json.dumps({"pass@1": share}), "results.json")
    here, there = map(load_run, [str(folder), logged.info.run_id])
    assert there.held_out.equals(here.held_out) and there.held_out.attrs == here.held_out.attrs
    assert {key: there.metrics[key] for key in here.metrics} == here.metrics
    assert (there.config, there.facts, there.cell, there.state) == (here.config, here.facts, here.cell, here.state)
    assert (there.run_id, there.evaluations) == (logged.info.run_id, {"mbpp": {"pass@1": 0.5}})
    assert require_comparable([here, there]) == [[here, there]]


def test_the_table_and_the_claims_of_a_study(study, capsys):
    main([*study, "set=code"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["cell", "seeds", "targets", "code"]
    assert [line.split()[1:5] for line in lines[2:5]] == [["0", "1", "2", "5000"]] * 3
    uniform, rho1, shuffled = (line.split()[0] for line in lines[2:5])
    mean = np.average([held_out("uniform", s).documents["ce"][:60:2] for s in range(3)], axis=1, weights=NUMBERS).mean()
    assert lines[2].split()[5] == f"{mean:.4f}"
    assert lines[5].startswith(f"{rho1} better than {uniform} by 0.") and "3 seeds x 30 documents" in lines[5]
    assert lines[5].endswith("uncontrolled: the study lacks random_matched")
    assert lines[6].startswith(f"no difference found between {shuffled} and {uniform}: ")
    assert lines[7].startswith(f"{rho1} better than {shuffled} by 0.")
    main([*study, "set=prose", "head=2", "margin=0.1"])
    assert capsys.readouterr().out.splitlines()[5].startswith(f"no difference found between {rho1} and {uniform}: ")


@pytest.fixture
def evaluated(study):
    """The study, with ten samples of each of forty tasks by each run, and totals of its drafts."""
    for folder in study:
        method, seed = Path(folder).name.rsplit("_", 1)
        rng = np.random.default_rng([int(seed), len(method)])
        chance = np.linspace(0.1, 0.5, 40) + rng.normal(0, 0.01) + (0.3 if method == "rho1" else 0)
        counts = [{"task_id": f"t/{i}", "n": 10, "correct": int(rng.binomial(10, p))} for i, p in enumerate(chance)]
        results = {"settings": {}, "fixed_temperature": "0.2", "temperatures": {"0.2": {"metrics": {"pass_at_1": {}}}}}
        results["temperatures"]["0.2"]["per_task"] = counts
        accepted = {f"drafts_{k}": {"acceptance_head2": 0.5 + rng.normal(0, 0.01)} for k in (1, 2)}
        for name, file, found in (("mbpp", "results", results), ("heads", "heads", {"speed": accepted})):
            place = Path(folder, "evaluations", name, f"{file}.json")
            place.parent.mkdir(parents=True)
            place.write_text(json.dumps(found))
    return study


def test_tasks_are_compared_as_documents_are_and_more_is_better(evaluated, capsys):
    main([*evaluated, "evaluation=mbpp"])
    lines = capsys.readouterr().out.splitlines()
    uniform, rho1, shuffled = (line.split()[0] for line in lines[2:5])
    values = {run: load_run(run).evaluations["mbpp"]["temperatures"]["0.2"]["per_task"] for run in evaluated}
    rates = np.array([[task["correct"] / 10 for task in tasks] for tasks in values.values()]).reshape(3, 3, 40)
    assert lines[1].endswith("mbpp pass@1") and f"{rates[0].mean():.4f} [" in lines[2]
    difference = rates[1].mean() - rates[0].mean()
    assert lines[5].startswith(f"{rho1} better than {uniform} in mbpp pass@1 by {difference:.4f} [")
    assert "after Holm over 3 comparisons, 3 seeds x 40 tasks; uncontrolled: the study lacks random" in lines[5]
    assert lines[6].startswith(f"no difference found between {shuffled} and {uniform} in mbpp pass@1: ")
    main([*evaluated, "evaluation=mbpp", "figure=pass_at_10", "details=true"])
    one = json.loads(capsys.readouterr().out.splitlines()[5])
    solved = (rates[1] > 0).mean() - (rates[0] > 0).mean()
    assert one["metric"] == "mbpp pass@10" and one["difference"] == pytest.approx(solved)


def test_totals_are_compared_over_seeds_alone(evaluated, capsys):
    main([*evaluated, "evaluation=heads", "details=true"])
    one = json.loads(capsys.readouterr().out.splitlines()[5])
    shares = np.array(
        [load_run(run).evaluations["heads"]["speed"]["drafts_2"]["acceptance_head2"] for run in evaluated]
    )
    assert one["p"] == pytest.approx(stats.ttest_rel(shares[3:6], shares[:3]).pvalue)
    assert "in acceptance of head 2 (heads)" in one["claim"] and "3 seeds alone" in one["claim"]
    main([*evaluated[::3], "evaluation=heads"])
    assert "takes two seeds in common" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(UserError, match="no figure 'acceptance_head3'; there are acceptance_head2"):
        main([*evaluated, "evaluation=heads", "figure=acceptance_head3"])


def test_metrics_of_one_call_are_one_family(evaluated):
    runs = [*map(load_run, evaluated)]
    metrics = [held_out_arms(runs, "code"), held_out_arms(runs, "prose"), evaluation_arms(runs, "mbpp")]
    found = compare_runs(runs, metrics)
    alone = compare_runs(runs, metrics[:1])[0]
    assert [len(of) for of in found] == [3, 3, 3]
    assert all(c.comparisons == 9 and "over 9 comparisons" in str(c) for of in found for c in of)
    assert sorted(c.p for of in found for c in of) == sorted(
        multipletests([c.difference.p_value() for of in found for c in of], method="holm")[1]
    )
    assert found[0][0].p > alone[0].p and found[0][0].difference == alone[0].difference
    assert "in CE of prose head 1" in str(found[1][0]) and " in CE" not in str(found[0][0])


def test_evaluations_that_cannot_be_paired_are_refused(evaluated, run):
    for evaluation, figure, message in [
        ("humaneval", None, "no run has evaluation 'humaneval' with figures of tasks or drafts; there are heads, mbpp"),
        ("mbpp", "pass_at_k", "these results have no figure 'pass_at_k'; there are pass_at_1"),
        ("mbpp", "1_at_10", "these results have no figure '1_at_10'; there are pass_at_1"),
        ("mbpp", "pass_at_11", "no task of mbpp has pass_at_11 in all runs"),
    ]:
        with pytest.raises(UserError, match=message):
            evaluation_arms([*map(load_run, evaluated)], evaluation, figure)
    heads = Path(evaluated[-1], "evaluations", "heads", "heads.json")
    heads.write_text(json.dumps(json.loads(heads.read_text()) | {"settings": {"speed_prompts": 9}}))
    with pytest.raises(UserError, match="cannot be compared by heads: speed_prompts null -> 9"):
        evaluation_arms([*map(load_run, evaluated)], "heads")
    results = Path(evaluated[-1], "evaluations", "mbpp", "results.json")
    found = json.loads(results.read_text())
    results.write_text(json.dumps(found | {"settings": {"top_p": 0.9}}))
    with pytest.raises(UserError, match=r"cannot be compared by mbpp: top_p None and 0\.9; evaluate alike"):
        evaluation_arms([*map(load_run, evaluated)], "mbpp")
    found["temperatures"]["0.2"]["per_task"][7]["n"] = 0  # the judge failed on its samples
    results.write_text(json.dumps(found))
    assert len(evaluation_arms([*map(load_run, evaluated)], "mbpp").units) == 39


def test_the_baseline_is_a_run_or_a_cell(study, capsys):
    for named in (study[-1], load_run(study[-1]).cell):
        main([*study, "set=code", f"baseline={named}"])
        lines = capsys.readouterr().out.splitlines()
        assert f"no difference found between {load_run(study[0]).cell} and {load_run(study[-1]).cell}: " in lines[5]
        assert f"{load_run(study[3]).cell} better than {load_run(study[-1]).cell} by " in lines[6]


def test_details_are_all_statistics_of_each_comparison(study, capsys):
    main([*study, "set=code", "details=true", "margin=0.3"])
    one = json.loads(capsys.readouterr().out.splitlines()[5])
    assert one["p_holm"] > one["p"] and one["p_tost"] < 0.05 and one["found"]
    assert one["bootstrap_interval"][0] < one["difference"] < one["bootstrap_interval"][1]
    ours, base = (np.array([held_out(m, s).documents["ce"][:60:2] for s in range(3)]) for m in ("rho1", "uniform"))
    assert one["difference_by_seed"] == pytest.approx(np.average(ours - base, axis=1, weights=NUMBERS).tolist())
    names = {
        f"{test}_over_{what}" for test in ("wilcoxon_p", "sign_flip_p", "effect_size") for what in ("units", "seeds")
    }
    assert names <= one.keys()


def test_seeds_that_one_arm_lacks_are_left_out_and_told(study, run, capsys):
    main([*study, run("uniform", 7), "set=code"])
    assert "3 seeds x 30 documents (1 more seed that only one of them has)" in capsys.readouterr().out
    runs = [load_run(study[0]), load_run(run("rho1", 8))]
    with pytest.raises(UserError, match=r"rho1-\w+ and uniform-\w+ have no seed in common"):
        compare_runs(runs, [held_out_arms(runs, "code")])
    arms = held_out_arms([*map(load_run, study[:4])], "code")
    assert np.isnan(arms.arms[load_run(study[3]).cell][1:]).all() and arms.seeds == (0, 1, 2)


def test_cells_with_fewer_heads_are_compared_by_those_they_have(run):
    alone = held_out("rho1", 0)
    kept = [i for i, head in enumerate(alone.documents["head"]) if head == 1]
    alone = HeldOut({}, {name: [values[i] for i in kept] for name, values in alone.documents.items()}, alone.sha256)
    runs = [*map(load_run, [run(), run("rho1", of_set=alone)])]
    both, alone = compare_runs(runs, [held_out_arms(runs, "code", head) for head in (1, 2)])
    assert len(both) == 1 and alone == []
    assert [line.count("[") for line in table_text(runs).splitlines()[2:]] == [4, 2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"targets": 6000}, "they have been trained on 5000 and 6000 target tokens"),
        ({"data": "e"}, r"their training data differ \(SHA-256 d and e\)"),
        ({"of_set": held_out("rho1", 0, ("code",))}, "their held-out sets are code prose and code"),
        (
            {"of_set": HeldOut({}, held_out("rho1", 0).documents, {"code": "x", "prose": "sha of prose"})},
            r"their held-out set code, its tokens or its packing differ \(SHA-256 sha of c and x\)",
        ),
    ],
    ids=["tokens", "data", "sets", "documents"],
)
def test_runs_that_cannot_be_compared_are_refused_and_shown_apart_on_request(run, capsys, other, message):
    names = [run(), run("rho1", **other)]
    with pytest.raises(UserError, match=f"uniform_0 and .*rho1_0 cannot be compared: {message}; allow_mixed=true"):
        main([*names, "set=code"])
    main([*names, "set=code", "allow_mixed=true"])
    assert capsys.readouterr().out.count("held-out CE, nats per target") == 2


def test_cells_that_were_trained_on_other_data_on_purpose_are_compared(run, capsys):
    names = [run(seed=0), run(seed=1), run("rho1", 0, data="e"), run("rho1", 1, data="e"), run("shuffled", data="f")]
    cell = load_run(names[2]).cell
    main([*names[:4], "set=code", f"other_data=[{cell}]"])
    assert f"{cell} better than" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"their training data differ \(SHA-256 d and f\)"):
        main([*names, "set=code", f"other_data=[{cell}]"])
    with pytest.raises(UserError, match="other_data: 'clean' is no cell with a run; there are "):
        main([*names[:4], "set=code", "other_data=[clean]"])
    with pytest.raises(UserError, match=r"their training data differ \(SHA-256 e and g\)"):  # one cell has one
        main([*names[:4], run("rho1", 2, data="g"), "set=code", f"other_data=[{cell}]"])


def test_a_baseline_that_others_cannot_be_compared_with_makes_no_claim_about_them(run, capsys):
    names = [run(), run("rho1"), run("shuffled", data="e")]
    main([*names, "set=code", f"baseline={names[0]}", "allow_mixed=true"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(" than " in line for line in lines) == 1
    assert lines[-1] == f"no claim: these cannot be compared with {names[0]}"


def test_runs_of_two_sweeps_are_no_cell_for_their_names_alone(run):
    names = [run("rho1", 0, folder="a/cells/rho1/seed-0"), run("rho1", 1, folder="b/cells/rho1/seed-1", batch_size=2)]
    with pytest.raises(UserError, match=r"are both of rho1, but differ by more than their seeds: batch_size null -> 2"):
        main([*names, "set=code"])


def test_a_set_of_one_document_has_a_mean_without_an_interval(run, capsys):
    both = {method: held_out(method, 0).documents for method in ("uniform", "rho1")}
    first = {method: {key: values[:2] for key, values in columns.items()} for method, columns in both.items()}
    names = [run(method, of_set=HeldOut({}, columns, {"code": "x"})) for method, columns in first.items()]
    with pytest.raises(UserError, match="two pairs or more"):
        main([*names, "set=code"])
    assert capsys.readouterr().out.splitlines()[2].split()[3:] == [f"{ce:.4f}" for ce in first["uniform"]["ce"]]


def test_without_the_hash_of_the_data_their_configs_are_compared(run):
    names = [run(dataset="a"), run("rho1", dataset="a"), run("shuffled", dataset="b")]
    for name in names[1:]:
        Path(name, "tags.json").unlink()
    assert len(require_comparable([*map(load_run, names[:2])])) == 1
    for first in names[:2]:
        with pytest.raises(UserError, match="their training data differ"):
            require_comparable([*map(load_run, [first, names[2]])])


def test_a_run_that_diverged_is_named(run):
    lost = held_out("rho1", 0)
    lost.documents["ce"][5] = float("nan")
    names = [run(), run("rho1", of_set=lost)]
    with pytest.raises(UserError, match=r"rho1_0 has a held-out CE that is inf or nan"):
        main([*names, "set=code"])


def test_what_is_no_run_or_no_option_is_one_line(run, tmp_path, monkeypatch):
    first = run()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path / "store"))
    for names, message in [
        ([str(tmp_path)], "holds no metrics.jsonl: give the output_dir of a run"),
        (["runs/nowhere"], r"runs/nowhere is no folder and no MLflow run id \(32 digits"),
        (["0" * 32], f"run {'0' * 32} in sqlite:.*not found"),
        ([first, first], "are both of .* with seed 0; give one of them"),
        ([first, run("rho1"), "baseline=shuffled", "set=code"], "baseline 'shuffled' is no run and no cell of these"),
        (
            [first, run("rho1")],
            r"no run has the CE of head 1 of set ''; there are head 1 of set code, head 2 of set code",
        ),
        ([first, "beseline=x"], "unknown key 'beseline' in config; did you mean 'baseline'"),
        ([], "no run is given"),
        ([first, "figure=pass_at_1"], "figure=pass_at_1 is of an evaluation: say of which, evaluation=NAME"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            main(names)
        assert "\n" not in str(error.value)
    shutil.rmtree(Path(first) / "held_out")
    with pytest.raises(
        UserError, match=r"uniform_0 has no CE of held-out documents \(held_out/step_N.parquet\): train"
    ):
        main([first, run("rho1")])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=f"run {'0' * 32} in http://127.0.0.1:9: "):
        main(["0" * 32])
