"""recipes/report.py: what its page holds, that it stands alone, is the same again, and what it refuses."""

import datetime
import html
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import product

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.tracking import MlflowClient
from services import new_store
from study_folders import ROOT, SETS, write_run, write_study

from recipes.full_finetune_distributed_wmtp import FullFinetuneRecipeWMTP
from recipes.report import ReportRecipe
from wmtp.config import ConfigError, load
from wmtp.errors import UserError
from wmtp.numerics.paired import mean_difference
from wmtp.report import study_parts
from wmtp.report.comparison import compare_runs, held_out_arms
from wmtp.report.figures import Curve, curves, looks, short
from wmtp.report.parts import curve_table
from wmtp.report.studies import load_study
from wmtp.report.study_report import study_report
from wmtp.report.token_views import TokenView
from wmtp.report.token_weights import read_token_weights, token_weights_html

DAY = datetime.date(2026, 1, 1)
CLAIMS = ["claims", "claims_2", "claims_3", "claims_4"]
PARTS = [*CLAIMS, "cells", "learning", "axes", "pareto", "heads", "weights", "tokens"]
PARTS += ["failures", "forgetting", "cost", "configs"]
LOST = ("eval/code/ce_head1", "eval/prose/ce_head1")
VOID = {"meta", "br", "link", "img", "input"}


class Structure(HTMLParser):
    """Elements that are not closed in order, the ids, and what refers to ids."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.ids, self.references = [], [], Counter(), set()
        self.sections = {}

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            self.ids[found["id"]] += 1
        for name, value in found.items():
            if name == "aria-labelledby":
                self.references.add(value)
            if name in ("href", "xlink:href"):
                self.references.add(value)
            self.references |= {f"#{i}" for i in re.findall(r"url\(#([^)]+)\)", value or "")}
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))


def parts_of(page):
    """The page cut at its sections."""
    return dict(re.findall(r'<section id="(\w+)".*?>(.*?)</section>', page, flags=re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("studies") / "small", seeds=3, grid=False)


@pytest.fixture(scope="module")
def pages(folder):
    return study_report(load_study([str(folder)]), date=DAY)


def test_every_part_is_there_with_figures_and_their_numbers(pages):
    sections = parts_of(pages[0])
    assert list(sections) == PARTS
    for key in (
        "claims",
        "claims_2",
        "claims_3",
        "claims_4",
        "learning",
        "pareto",
        "heads",
        "weights",
        "failures",
        "forgetting",
    ):
        drawn = [sections[key].count(text) for text in ("<svg", "<figcaption>", "The numbers")]
        assert len(set(drawn)) == 1 and drawn[0] > 0
    assert [key for key, text in sections.items() if "missing" in text] == ["axes"]
    assert "varies no config key" in sections["axes"]
    # Accept length of training's own evaluations: of rho1 every run's interval over prompts lies above zero.
    lengths = [line for line in pages[1].splitlines() if line.endswith(" of 3 |")]
    assert "| uniform | 1.200 | 1.300 | 0.100 | 0 of 3 | 0 of 3 |" in lengths
    assert any(line.startswith("| rho1 |") and line.endswith("| 3 of 3 | 0 of 3 |") for line in lengths)


def test_claims_are_held_against_the_sweeps_controls(pages):
    claims = parts_of(pages[0])["claims"]
    assert len(re.findall(r"rho1 better than (uniform|shuffled|random_matched) by 0\.\d+ nats", claims)) == 3
    assert "uncontrolled" not in claims
    assert "no difference found between shuffled and uniform" in claims and "shuffled and uniform" in pages[1]


def test_other_sets_tasks_and_acceptance_are_claimed_in_one_family(pages):
    prose, heads, mbpp = (parts_of(pages[0])[key] for key in CLAIMS[1:])
    assert len(re.findall(r"rho1 worse than \w+ in CE of prose head 1 by 0\.\d+ nats", prose)) == 3
    assert "rho1 better than uniform in acceptance of head 2 (heads) by 0.0" in heads and "3 seeds alone" in heads
    assert "a paired t test" in heads
    assert "no difference found between rho1 and uniform in mbpp pass@1: 0.0" in mbpp and "3 seeds x 65 tasks" in mbpp
    assert "All 20 comparisons of this page are adjusted together: CE of code head 1, CE of prose head 1" in pages[0]
    assert pages[1].count("after Holm over 20 comparisons") == 20


def test_all_statistics_stand_behind_each_claim(folder, pages):
    metrics = parts_of(pages[0])["claims"]
    runs = load_study([str(folder)]).compared
    one = compare_runs(runs, [held_out_arms(runs, "code")], baseline="uniform")[0][0].statistics()
    head = re.findall(r'<th scope="col".*?>(.*?)</th>', metrics)
    row = re.findall(r"<td.*?>(.*?)</td>", re.search(rf"<tr>.*?{one['arm']} - uniform</th>(.*?)</tr>", metrics)[1])
    shown = dict(zip(head[1:], row, strict=True))
    for name, key in [
        ("p", "p"),
        ("Wilcoxon, units", "wilcoxon_p_over_units"),
        ("Cohen&#39;s d, seeds", "effect_size_over_seeds"),
        ("sign flips, seeds", "sign_flip_p_over_seeds"),
    ]:
        assert shown[name] == f"{one[key]:.4f}"
    low, high = one["bootstrap_interval"]
    assert shown["bootstrap [95 %]"].endswith(f"[{low:.4f}, {high:.4f}]")


def test_no_program_passed_and_other_tasks_are_no_claims(tmp_path):
    for number, method in enumerate(("uniform", "rho1")):
        run = tmp_path / method
        write_run(run, seed=0, method=method, gain=0.02 * number, documents=5)
        for name, count, sha256 in (("zero", 0, "a"), ("other", 1, method)):
            table = {"metrics": {}, "per_task": [{"task_id": "t", "n": 2, "correct": count}]}
            results = {"settings": {"tasks_sha256": sha256}, "fixed_temperature": "0.2", "temperatures": {"0.2": table}}
            (run / "evaluations" / name).mkdir()
            (run / "evaluations" / name / "results.json").write_text(json.dumps(results))
    found = study_parts.claims(load_study([str(tmp_path / "uniform"), str(tmp_path / "rho1")]))
    missing = "\n".join(part.missing for part in found)
    assert "No claim: no program passed in any arm (zero pass@1)." in missing
    assert re.search(r"No claim: \S+ and \S+ cannot be compared by other: tasks_sha256 rho1 and uniform", missing)
    assert "takes two seeds in common" in missing  # acceptance


def test_a_design_of_factors_is_compared_by_levels_over_its_matched_cells(tmp_path):
    gains = {"uniform_joint": 0.0, "uniform_detached": 0.02, "rho1_joint": 0.03, "rho1_detached": 0.05}
    for (cell, gain), seed in product(gains.items(), range(3)):
        place = tmp_path / "cells" / cell / f"seed-{seed}"
        write_run(place, seed=seed, method=cell.partition("_")[0], gain=gain)
    factors = {"weights": ["uniform", "rho1"], "heads": ["joint", "detached"]}
    sweep = {"study": "factors", "baseline": "uniform_joint", "objective": "eval/code/ce_head1", "margin": None}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"factors": factors}, sort_keys=False))
    (tmp_path / "table.json").write_text(json.dumps({"rows": []}))
    study = load_study([str(tmp_path)])
    sections = parts_of(study_report(study)[0])
    claims, second = sections["claims"], sections["claims_2"]
    arms = held_out_arms(study.runs, "code")
    by_hand = sum(arms.arms[f"{w}_detached"] - arms.arms[f"{w}_joint"] for w in factors["weights"]) / 2
    found = mean_difference(by_hand, arms.weights)
    assert f"heads detached better than heads joint by {-found.mean:.4f} nats [{-found.interval().high:.4f}" in claims
    assert re.search("weights rho1 better than weights uniform by .*; uncontrolled: the study lacks a shuffled", claims)
    assert "heads detached better than heads joint in CE of code head 2" in second and "10 comparisons" in claims
    assert "Claims on CE of code head 2" in second and "detached" in sections["axes"]
    assert sections["axes"].count("<svg") == 4, "both heads, prose, acceptance"
    assert study.shown(3) == ["uniform_joint", "uniform_detached", "rho1_joint"]
    shutil.rmtree(tmp_path / "cells" / "rho1_joint")
    claims = parts_of(study_report(load_study([str(tmp_path)]))[0])["claims"]
    assert "No claim: factors names cells without runs to compare, rho1_joint." in claims
    with pytest.raises(UserError, match="factors must name two levels or more of each factor, got"):
        study_report(load_study([str(tmp_path)], factors={"heads": "joint"}))


def test_a_win_without_controls_is_uncontrolled(folder):
    names = [str(folder / "cells" / cell / f"seed-{seed}") for cell in ("uniform", "rho1") for seed in range(3)]
    kind, line = study_parts.claims(load_study(names))[0].lines[0]
    assert kind == "uncontrolled" and re.search("rho1.* better than uniform.*; uncontrolled: the study lacks", line)


def test_the_table_has_every_cell_its_figures_and_what_is_not_finished(pages):
    cells = parts_of(pages[0])["cells"]
    rows = re.findall(r"<tr>(.*?)</tr>", cells[cells.index("<tbody>") :])
    assert [re.search(r'<th scope="row">(.*?)</th>', row)[1] for row in rows] == [
        "uniform", "random_matched", "rho1", "shuffled", "dft",
    ]  # fmt: skip
    assert all(f"CE {name} head {k}" in cells for name in SETS for k in (1, 2))
    assert "mbpp pass@1" in cells and "seed 0 failed: loss nan" in rows[-1]
    assert cells.count('aria-sort="none"') == cells.count('<button type="button">')
    tokens = re.search(r">(30,000)<", rows[0])  # 3 seeds x 20 steps x 500
    assert tokens


def test_a_run_that_is_not_finished_is_left_out_of_its_study(tmp_path):
    study = write_study(tmp_path / "study", seeds=2, grid=False, documents=3)
    metrics = study / "cells" / "rho1" / "seed-1" / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if json.loads(line)["step"] < 15))
    found = load_study([str(study)])
    assert [run.seed for run in found.cells["rho1"]] == [0] and len(found.cells["uniform"]) == 2


def test_the_same_runs_give_the_same_bytes(folder, pages):
    other = study_report(load_study([str(folder)]), date=datetime.date(2027, 2, 3))
    assert [page.replace("2027-02-03", "2026-01-01") for page in other] == list(pages)


def test_figures_do_not_depend_on_pythons_hashes():
    """Thin lines of cells without a name once stood in the order of a set."""
    of = {f"cell {i}": Curve([0, 1], [i, 2], [i, 2], [i, 2]) for i in range(9)}
    svg = curves(of, looks(["cell 0"]), x="step", y="CE", label="nine")
    thin = re.findall(r'd="M [\d.]+ ([\d.]+)\s*\nL [\d.]+ [\d.]+\s*\n?" clip-path[^>]*opacity', svg)
    starts = list(map(float, thin))
    assert len(starts) == 8 and starts == sorted(starts, reverse=True)


def test_names_that_look_like_the_figures_own_are_left_alone():
    names = ["#0f0f55", "url(#x)", 'id="1.23456']
    of = {name: Curve([0, 1], [1, 2], [1, 2], [1, 2]) for name in names}
    svg = html.unescape(curves(of, looks(names), x="step", y="CE", label="names"))
    assert all(f">{name}</text>" in svg for name in names)


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    "values", [([1, 1], [1, 0.5]), (None, 0.1), ("batch", 2), (True, False), ({"_component_": "a.b"}, None)], ids=str
)
def test_an_axis_may_have_any_values(tmp_path, values):
    study = write_study(tmp_path / "study", seeds=1, grid=False, documents=3)
    own = dict(zip(("uniform", "rho1"), values, strict=True))

    def change(table):
        for row in table["rows"]:
            row["axes"] = {"a.key": own[row["cell"]]} if row["cell"] in own else {}
        return table

    rewrite(study / "table.json", change)
    table = study_parts.axes(load_study([str(study)])).shown[0].table
    assert table.head[0] == "a.key" and len(table.rows) == 2


def test_controls_of_a_grid_are_those_of_the_nearer_name(tmp_path):
    study = load_study([str(write_study(tmp_path / "study", seeds=1, documents=3))])
    study.sweep["controls"] = {"rho1": ["far"], "rho1_strength-0.1": ["near"]}
    found = {cell.partition("_t")[0]: of for cell, of in study.controls.items()}
    assert (found["rho1_strength-0.1"], found["rho1_strength-0.3"]) == (["near"], ["far"])


def test_a_cell_whose_data_are_its_treatment_is_compared(tmp_path):
    place = write_study(tmp_path / "study", seeds=2, grid=False, documents=4)
    for run in (place / "cells" / "shuffled").iterdir():
        rewrite(run / "tags.json", lambda tags: tags | {"wmtp.rows_sha256": "e" * 64})
    with pytest.raises(UserError, match="their training data differ"):
        load_study([str(place)])
    sweep = yaml.safe_load((place / "sweep.yaml").read_text()) | {"other_data": ["shuffled", "later"]}
    (place / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    study = load_study([str(place)])  # of the cell "later" no run has ended
    assert study.other_data == ("shuffled",) and len(study.groups) == 1
    with pytest.raises(UserError, match="other_data: 'later' is no cell with a run"):
        load_study([str(place)], other_data=["later"])


def test_a_run_that_diverged_stands_apart_and_last(tmp_path):
    place = write_study(tmp_path / "study", seeds=2, grid=False, documents=4)
    for run in (place / "cells" / "rho1").iterdir():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        next(line for line in reversed(lines) if LOST[0] in line).update(dict.fromkeys(LOST, float("nan")))
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        file = next((run / "held_out").iterdir())
        table = pq.read_table(file)
        lost = table.set_column(5, "ce", [[float("nan")] * len(table)])
        pq.write_table(lost, file)
    study = load_study([str(place)])
    assert study.ranked()[-1] == "rho1"
    claims, cells = study_parts.claims(study)[0], study_parts.cells(study)
    assert "cannot be compared with the baseline: rho1." in claims.lead
    assert any("between shuffled and uniform" in line for _, line in claims.lines)
    assert ("nan", None) in next(row for row in cells.table.rows if row[0] == "rho1")


def test_curves_of_other_lengths_name_their_own_steps():
    of = {"short": Curve([0, 5], [1, 2], [1, 2], [1, 2]), "long": Curve([0, 9], [1, 2], [1, 2], [1, 2])}
    table = curve_table(of)
    assert table.head[-1] == "at steps" and [row[-1] for row in table.rows] == ["0, 0, 0, 5, 5", "0, 0, 0, 9, 9"]
    assert curve_table({"short": of["short"]}).head[-1] == "last (step 5)"


def test_the_page_needs_no_network_and_is_sound_html(pages):
    page = pages[0]
    assert set(re.findall(r'https?://[^"\s<]+', page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<link|<img|@import|\bsrc=", page)
    structure = Structure()
    structure.feed(page)
    assert structure.wrong == [] and structure.open == []
    assert [name for name, count in structure.ids.items() if count > 1] == []
    assert {r.lstrip("#") for r in structure.references} <= structure.ids.keys()


def test_names_of_runs_cannot_become_markup(tmp_path):
    evil = '<img src=x onerror="alert(1)">&'
    for number, cell in enumerate(("uniform", evil)):
        place = tmp_path / str(number)
        write_run(place, seed=0, method="uniform" if number == 0 else "rho1", gain=0.02 * number, documents=5)
        config = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(yaml.safe_dump(config | {"tracking": {"tags": {"wmtp.cell": cell}}}))
    page, text = study_report(load_study([str(tmp_path / "0"), str(tmp_path / "1")]), title=evil, date=DAY)
    assert "<img" not in page and "&lt;img src=x" in page
    assert not re.search(r"(?<!\\)<img", re.sub(r"```sh.*?```", "", text, flags=re.DOTALL))


@pytest.mark.long
def test_the_axes_and_sixty_runs_in_less_than_three_megabytes(tmp_path):
    study = load_study([str(write_study(tmp_path / "grid", documents=10))])
    page, _ = study_report(study, date=DAY)
    assert len(study.runs) == 60 and len(page.encode()) < 3e6
    axes = parts_of(page)["axes"]
    assert axes.count("<tr>") == 1 + 27
    best = study.ranked()[0]
    assert best == "rho1_strength-1.0_temperature-0.7_percentile-0.2"
    lowest = min(re.findall(r'data-sort="([\d.]+)"', axes), key=float)
    assert float(lowest) == sum(run.metrics[study.objective][-1][1] for run in study.cells[best]) / 2
    assert f"{float(lowest):.4f}</text>" in axes


def test_empty_parts_say_why(tmp_path):
    run = tmp_path / "run"
    write_run(run, seed=0, method="uniform", heads=1, documents=5)
    for file in run.rglob("*.json"):
        if file.parent.parent.name == "evaluations":
            file.unlink()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    gone = ("weights/", "train/", "eval/prose")
    kept = [{k: v for k, v in line.items() if not k.startswith(gone)} for line in metrics]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    sections = parts_of(study_report(load_study([str(run)]), date=DAY)[0])
    reasons = {
        "claims": "there is nothing to hold uniform", "axes": "varies no config key", "pareto": "what it cost",
        "weights": "figures of its weights", "tokens": "pages of its token weights",
        "failures": "No evaluation that runs", "forgetting": "One held-out set only", "cost": "what its steps cost",
    }  # fmt: skip
    for key, reason in reasons.items():
        assert 'class="missing"' in sections[key] and reason in sections[key].replace("&#39;", "'"), key
    assert "Acceptance: no evaluation by recipes/eval_heads.py" in sections["heads"]


def test_token_pages_are_read_back():
    pieces, weights = ["a <", "\n  ", "&b", ""], [9.0, 0.0, 1.0, 3.0]
    view = TokenView("x & y", pieces, [1, 2, 3, 4], [False, True, True, True], {"this run": weights, "dft": weights})
    found = read_token_weights(token_weights_html([view], title="t"))
    tokens = [("", "a <"), ("w0", "\n  "), ("w4", "&b"), ("w6", "")]
    assert found == {"x & y": {"this run": tokens, "dft": tokens}}


def test_figures_follow_the_page_and_do_not_rest_on_colour():
    of = {name: Curve([0, 1], [1, 2], [1, 2], [1, 2]) for name in ("a", "b <&>")}
    svg = curves(of, looks(list(of)), x="step", y="$CE$", label="A & B")
    assert "var(--ink)" in svg and "#0f0f" not in svg and 'aria-label="A &amp; B"' in svg
    assert "b &lt;&amp;&gt;" in svg and "$CE$" in svg and "stroke-dasharray" in svg
    assert curves(of, looks(list(of)), x="step", y="$CE$", label="A & B") == svg
    assert short("rho1_strength-0.3_temperature-0.5") == "rho1_s0.3_t0.5"
    assert len({(look.marker, look.hatch) for look in looks(list("abcdefgh")).values()}) == 8


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def report(tmp_path, **keys):
    cfg = load(ROOT / "configs/eval/report.yaml")
    cfg.update({"output_dir": str(tmp_path / "report"), **keys})
    recipe = ReportRecipe(cfg)
    recipe.load()
    recipe.write()
    recipe.log()
    return recipe


def test_bad_input_is_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    uniform = str(folder / "cells/uniform/seed-0")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "sweep.yaml").write_text("study: later\n")
    cases = [
        ({}, ConfigError, "give study="),
        ({"study": "a", "runs": ["b"]}, ConfigError, "give study="),
        ({"study": "nowhere"}, UserError, "does not exist"),
        ({"study": str(empty)}, UserError, "study later has no finished run yet"),
        (
            {"runs": [uniform], "baseline": "rho1"},
            UserError,
            "baseline 'rho1' is no cell with a run; there are uniform",
        ),
        ({"runs": [uniform], "objective": "eval/ce_head9"}, UserError, "no run has the objective 'eval/ce_head9'"),
        ({"runs": [uniform, uniform]}, UserError, "give one of them"),
    ]
    for keys, kind, line in cases:
        with pytest.raises(kind, match=re.escape(line)) as error:
            report(tmp_path, **keys)
        assert "\n" not in str(error.value)
    MlflowClient().create_experiment("x")
    with pytest.raises(UserError, match=r"nowhere is no folder, and .* has no run or study of that name"):
        report(tmp_path, study="nowhere")


def test_runs_that_cannot_be_compared_are_refused_or_stand_apart(tmp_path, folder):
    other = tmp_path / "cells" / "other" / "seed-0"
    write_run(other, seed=0, gain=0.01, documents=7)
    file = next((other / "held_out").iterdir())
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"sha256": json.dumps({name: "0" * 64 for name in SETS})}), file)
    runs = [str(folder / "cells" / cell / "seed-0") for cell in ("uniform", "rho1")] + [str(other)]
    with pytest.raises(UserError, match=r"cannot be compared: .*allow_mixed=true"):
        report(tmp_path, runs=runs)
    claims = study_parts.claims(load_study(runs, allow_mixed=True))[0]
    assert "Apart, since they cannot be compared with the baseline: other" in claims.lead
    assert claims.lines and not any("other" in line.split(":")[0] for _, line in claims.lines)


@pytest.mark.long
def test_real_runs_in_mlflow_by_the_studys_name_or_id(tmp_path, monkeypatch):
    """Trained here, found by name, by id and by folder; the page becomes an artifact of the sweep's run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path))
    client = MlflowClient()
    parent = client.create_run(client.create_experiment("wmtp/tiny"), tags={"wmtp.sweep": "two methods"}).info.run_id
    client.log_text(parent, yaml.safe_dump({"study": "two methods", "baseline": "uniform"}), "sweep.yaml")
    for method in ("uniform", "dft"):
        for seed in (0, 1):
            cfg = load(ROOT / "configs/tiny/uniform.yaml")
            cfg.update({"output_dir": f"cells/{method}/seed-{seed}", "seed": seed, "max_steps": 3, "eval_every": None})
            cfg.update({"save_every": None, "export_dtype": "none", "device": "cpu"})
            cfg.weighting = {"_component_": f"wmtp.weighting.{method}"}
            cfg.token_view = {"_component_": "wmtp.report.TokenWeightPages", "every": 3}
            cfg.tracking = {"_component_": "wmtp.tracking.MLflowLogger", "parent_run_id": parent}
            recipe = FullFinetuneRecipeWMTP(cfg)
            recipe.setup()
            recipe.train()
            recipe.export()
            recipe._log.close()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for child in client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'"):
        client.set_tag(child.info.run_id, "wmtp.cell", child.data.tags["wmtp.method"])
    report(tmp_path, study="two methods")
    page = (tmp_path / "report" / "report.html").read_bytes()
    logged = [item.path for item in client.list_artifacts(parent, "report")]
    assert sorted(logged) == ["report/report.html", "report/report.md"]
    report(tmp_path, study=parent, log_artifact=False)
    assert (tmp_path / "report" / "report.html").read_bytes() == page
    sections = parts_of(page.decode())
    assert "dft" in sections["claims"] and "2 seeds x" in sections["claims"]
    assert sections["tokens"].count("<article>") == 2
    assert "mlflow artifacts download --run-id" in sections["configs"]
    assert 'class="missing"' not in "".join(sections[key] for key in ("learning", "pareto", "heads", "weights", "cost"))
    folders = [f"cells/{method}/seed-{seed}" for method in ("uniform", "dft") for seed in (0, 1)]
    tracked, local = load_study([parent]), load_study(folders)
    for part in (study_parts.learning, lambda study: study_parts.claims(study)[0]):
        assert part(tracked) == part(local)
