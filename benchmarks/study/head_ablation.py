"""Plan 5 of docs/study.md: what the training of the extra heads did, in tables, tests and a figure.

    python benchmarks/study/head_ablation.py runs/study/heads [--figure docs/figures/study_heads.svg]

Reads the sweep of configs/study/heads.yaml. An effect is the mean difference of matched cells on the same seeds and
documents (wmtp.numerics.paired), accept length over seeds alone; Holm adjusts over all tests. A weighting of which a
cell has not ended with every seed is left out, and named.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from wmtp.numerics.paired import MeanDifference, holm, mean_difference
from wmtp.report.comparison import Arms, evaluation_arms, held_out_arms
from wmtp.report.studies import Study, load_study

matplotlib.use("svg")
from matplotlib import pyplot as plt

MARGIN = 0.01  # nats
TRAININGS = ("joint_hard", "joint_soft", "detached_hard", "detached_soft")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "wmtp", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25,
         "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
COLORS = ("#333333", "#0b6e4f", "#c1621b")

Contrast = dict[str, float]  # cell to its coefficient


@dataclass(frozen=True)
class Test:
    """A hypothesis: of an effect's sign (``-`` or ``+``), or that it lies within the margin (``=``)."""

    name: str
    metric: str
    effect: str
    contrast: Contrast
    expected: str


def tests(weightings: list[str]) -> list[Test]:
    """Returns the plan's tests that these weightings allow, uniform among them."""
    detached, joint = (mean(weightings, trunk, ("hard", "soft")) for trunk in ("detached", "joint"))
    soft, hard = (plus(mean(weightings, "joint", [t]), mean(weightings, "detached", [t])) for t in ("soft", "hard"))
    trunk, targets = minus(detached, joint), scaled(minus(soft, hard), 0.5)
    in_trunk = {t: minus(mean(weightings, t, ["soft"]), mean(weightings, t, ["hard"])) for t in ("joint", "detached")}
    found = [Test("A1", "code head 1", "detached - joint", trunk, "-")]
    found += [Test(f"A{k}", f"code head {k}", "detached - joint", trunk, "+") for k in (2, 3, 4)]
    found += [Test("A5", "accept length", "soft - hard", targets, "+")]
    found += [Test(f"A{k + 4}", f"code head {k}", "soft - hard", targets, "-") for k in (2, 3, 4)]
    found += [
        Test("A9", "code head 1", "soft - hard, detached heads", in_trunk["detached"], "="),
        Test("A10", "code head 1", "soft - hard, joint heads", in_trunk["joint"], "-"),
    ]
    gain = {w: {t: minus(mean([w], t, ("hard", "soft")), mean(["uniform"], t, ("hard", "soft")))
                for t in ("joint", "detached")} for w in weightings if w != "uniform"}  # fmt: skip
    of = {w: scaled(plus(*by_trunk.values()), 0.5) for w, by_trunk in gain.items()}
    if "select" in weightings:
        selects = gain["select"]
        found += [
            Test("A11", "code head 1", "select - uniform, detached heads", selects["detached"], "-"),
            Test("A12", "code head 1", "that, detached - joint", minus(selects["detached"], selects["joint"]), "="),
        ]
    for w in (w for w in gain if w != "select"):
        found.append(Test("A13", "code head 1", f"{w} - uniform", of[w], "-"))
    if "select" in weightings:
        found.append(Test("A14", "accept length", "select - uniform", of["select"], "-"))
    found += [
        Test("A15", "accept length", "detached - joint", trunk, "-"),
        Test("A16", "prose head 1", "detached - joint", trunk, "-"),
        Test("A17", "prose head 1", "soft - hard", targets, "="),
    ]
    if "select" in weightings:
        found.append(Test("A18", "prose head 1", "select - uniform", of["select"], "-"))
    return found


def mean(weightings: list[str], trunk: str, targets: list[str] | tuple[str, ...]) -> Contrast:
    cells = [f"{w}_{trunk}_{t}" for w in weightings for t in targets]
    return dict.fromkeys(cells, 1 / len(cells))


def plus(a: Contrast, b: Contrast) -> Contrast:
    return {cell: a.get(cell, 0.0) + b.get(cell, 0.0) for cell in {**a, **b}}


def minus(a: Contrast, b: Contrast) -> Contrast:
    return plus(a, scaled(b, -1.0))


def scaled(a: Contrast, factor: float) -> Contrast:
    return {cell: factor * value for cell, value in a.items()}


def effect(arms: Arms, contrast: Contrast) -> MeanDifference:
    """Returns a contrast of the arms, over their seeds and units."""
    return mean_difference(sum(c * arms.arms[cell] for cell, c in contrast.items()), arms.weights)


def metrics_of(study: Study) -> dict[str, Arms]:
    """Returns every metric of the runs by name."""
    found = {f"code head {k}": held_out_arms(study.runs, "code", k) for k in (1, 2, 3, 4)}
    found["prose head 1"] = held_out_arms(study.runs, "prose", 1)
    of_head = {f"acceptance of head {k}": evaluation_arms(study.runs, "heads", f"acceptance_head{k}") for k in (2, 3)}
    return found | {"accept length": evaluation_arms(study.runs, "heads", "tokens_per_forward")} | of_head


def complete(study: Study, seeds: int) -> list[str]:
    """Returns the weightings of which every cell has ended with every seed, uniform first."""
    names = dict.fromkeys(re.sub("_(joint|detached)_(hard|soft)$", "", cell) for cell in study.cells)
    whole = [w for w in names if all(len(study.cells.get(f"{w}_{t}", ())) == seeds for t in TRAININGS)]
    return sorted(whole, key=lambda name: (name != "uniform", name != "select"))


def table(study: Study, metrics: Mapping[str, Arms], weightings: list[str]) -> str:
    """Returns the means of every cell over seeds, and the difference of head 1 from plain training."""
    lines = [f"| arm | {' | '.join(metrics)} | head 1 minus `{study.baseline}` |", "|---" * (len(metrics) + 2) + "|"]
    for cell in (f"{w}_{t}" for w in weightings for t in TRAININGS):
        values = [f"{arms.interval(cell).estimate:.3f}" if cell in arms.arms else "" for arms in metrics.values()]
        shown = ""
        if cell != study.baseline:
            difference = effect(metrics["code head 1"], {cell: 1.0, study.baseline: -1.0})
            shown = interval(difference)
        lines.append(f"| `{cell}` | {' | '.join(values)} | {shown} |")
    return "\n".join(lines)


def interval(difference: MeanDifference) -> str:
    found = difference.interval()
    return f"{found.estimate:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def results(metrics: Mapping[str, Arms], plan: list[Test]) -> str:
    """Returns the plan's tests as a table, adjusted for all of them."""
    effects = [effect(metrics[test.metric], test.contrast) for test in plan]
    raw = [d.p_equivalent(MARGIN) if t.expected == "=" else d.p_value() for t, d in zip(plan, effects, strict=True)]
    lines = [f"| | metric | effect | expected | found, with 95 % interval | p, Holm over {len(plan)} | verdict |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for test, difference, p in zip(plan, effects, holm(raw), strict=True):
        holds = p <= 0.05 and (test.expected == "=" or (difference.mean < 0) == (test.expected == "-"))
        verdict = "holds" if holds else "the other way" if p <= 0.05 else "not found"
        if test.expected == "=" and not holds:
            verdict = "not shown"
        elif not holds and p > 0.05:
            verdict += f"; {difference.smallest_effect(alpha=0.05 / len(plan)):.3f} would have been"
        expected = f"within {MARGIN:g}" if test.expected == "=" else {"-": "lower", "+": "higher"}[test.expected]
        shown = f"{p:.3f}" if p >= 0.001 else "< 0.001"
        cells = (test.name, test.metric, test.effect, expected, interval(difference), shown, verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(metrics: Mapping[str, Arms], weightings: list[str], baseline: str, path: Path) -> None:
    """Draws each cell's difference from plain training, with its interval: CE on code and prose, accept length."""
    extra = [metrics[f"code head {k}"] for k in (2, 3, 4)]
    panels = {
        "CE of head 1, code": lambda c: effect(metrics["code head 1"], c),
        "CE of heads 2 to 4, code (mean over seeds)": lambda c: mean_difference(
            sum(np.average(sum(v * a.arms[cell] for cell, v in c.items()), axis=1, weights=a.weights) for a in extra)[
                :, None
            ]
            / 3
        ),
        "CE of head 1, prose": lambda c: effect(metrics["prose head 1"], c),
        "accept length": lambda c: effect(metrics["accept length"], c),
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(7.4, 5.2), layout="constrained", sharex=True)
        for ax, (title, difference) in zip(axes.flat, panels.items(), strict=True):
            ax.axhline(0, color="black", linewidth=0.8)
            for number, (weighting, color) in enumerate(zip(weightings, COLORS, strict=False)):
                for place, training in enumerate(TRAININGS):
                    cell = f"{weighting}_{training}"
                    found = difference({cell: 1.0, baseline: -1.0}).interval() if cell != baseline else None
                    y, low, high = (0, 0, 0) if found is None else (found.estimate, found.low, found.high)
                    x = place + (number - 1) * 0.16
                    ax.errorbar(x, y, yerr=[[y - low], [high - y]], marker="osD"[number], ms=4, color=color,
                                label=weighting if place == 0 else None)  # fmt: skip
            ax.set_title(title, fontsize=9, loc="left")
            ax.set_xticks(range(4), [name.replace("_", "\n") for name in TRAININGS])
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", help="output_dir of the sweep")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    study = load_study([args.sweep])
    weightings = complete(study, len(study.sweep["seeds"]))
    metrics = metrics_of(study)
    apart = {re.sub("_(joint|detached)_.*", "", cell) for cell in study.cells} - set(weightings)
    if apart:
        print(f"left out, not every cell has ended: {', '.join(sorted(apart))}\n")
    print(table(study, metrics, weightings), "\n")
    print(results(metrics, tests(weightings)))
    if args.figure:
        draw(metrics, weightings, study.baseline, args.figure)


if __name__ == "__main__":
    main()
