"""The parts of a report on the models and their training: heads, weights, failures, forgetting, cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from wmtp.numerics.bootstrap import Interval
from wmtp.report import figures
from wmtp.report.comparison import acceptance as accepted_drafts
from wmtp.report.costs import cost
from wmtp.report.figures import Curve
from wmtp.report.parts import NAMED, Cell, Part, Shown, Table, cost_cells, curves, interval
from wmtp.report.runs import Run
from wmtp.report.studies import Study, over, over_seeds, parse_ce

_VERDICTS = "passed wrong_answer exception timeout memory output_limit violation harness_error"
_WEIGHTS = {
    "kept_share": "share of targets kept", "effective_sample_size": "effective sample size (share)",
    "max": "largest weight", "entropy": "entropy of the weights (1: equal)",
}  # fmt: skip


def heads(study: Study) -> Part:
    """CE and acceptance of each head."""
    title, shown = "The heads", []
    held_out_set = study.target[0]
    ce: dict[str, dict[int, Interval]] = {}
    for cell, runs in study.cells.items():
        metrics = [m for m in runs[0].metrics if (parse_ce(m) or ("", 0))[0] == held_out_set and parse_ce(m)]
        ce[cell] = {parse_ce(m)[1]: found for m in metrics if (found := over_seeds(runs, m))}  # type: ignore[index]
    looks, accepted = figures.looks(study.shown(NAMED)), acceptance(study)
    for name, of, what in (("CE", ce, "held-out CE"), ("Acceptance", accepted, "share of drafts accepted")):
        of = {cell: heads for cell, heads in of.items() if heads}
        if not of:
            continue
        drawn = {cell: head_curve(found) for cell, found in of.items()}
        label = f"{name} of each head"
        y = f"{what}, nats" if name == "CE" else what
        svg = figures.dots(drawn, looks, x="head", y=y, label=label)
        begin = f"{what[0].upper()}{what[1:]} of head k"
        caption = f"{begin}, which predicts the k-th next token: mean and range over seeds."
        ks = sorted({k for found in of.values() for k in found})
        rows = [[cell, *(interval(found.get(k)) for k in ks)] for cell, found in of.items()]
        shown.append(Shown(svg, caption, Table(["cell", *(f"head {k}" for k in ks)], rows)))
    lead = "Acceptance: no evaluation by recipes/eval_heads.py of a model with several heads in this study."
    lead, lengths = "" if accepted else lead, accept_lengths(study)
    if lengths is not None:
        lead += (
            " Accept length: tokens that a forward pass yields on held-out prompts, greedy, before and after training, "
            "mean and range over seeds; longer and shorter: runs whose 95 % interval over prompts leaves out no change."
        )
    missing = "" if shown else "No run has held-out CE of its heads."
    return Part("heads", title, lead.strip(), shown=shown, table=lengths, missing=missing)


def accept_lengths(study: Study) -> Table | None:
    """Returns each cell's accept length before and after training, where runs have measured it (`accept_prompts`)."""
    name = study.target[0]
    metric = f"eval/{name}/accept_length" if name else "eval/accept_length"
    rows: list[list[Cell]] = []
    for cell, runs in study.cells.items():
        known = [run.metrics for run in runs if run.metrics.get(f"{metric}_change")]
        if known:
            before, after = (over([of[metric][place][1] for of in known]) for place in (0, -1))
            low, high = (np.array([of[f"{metric}_change_{end}"][-1][1] for of in known]) for end in ("low", "high"))
            change = over([of[f"{metric}_change"][-1][1] for of in known])
            signs = int((low > 0).sum()), int((high < 0).sum())
            counts: list[Cell] = [(f"{n} of {len(known)}", n) for n in signs]
            rows.append([cell, *(interval(found, 3) for found in (before, after, change)), *counts])
    return Table(["cell", "accept length before", "after", "change", "longer", "shorter"], rows) if rows else None


def weights(study: Study) -> Part:
    """What the weights were over time."""
    title = "The weights over time"
    looks = figures.looks(study.shown(NAMED))
    panels, rows = {}, []
    for name, what in _WEIGHTS.items():
        of = {cell: curve for cell, curve in curves(study, f"weights/{name}").items() if cell in looks}
        if of:
            panels[what] = of
    if not panels:
        return Part("weights", title, missing="No run has logged figures of its weights (weights/...).")
    for cell, runs in study.cells.items():
        rows.append([cell, *(interval(over_seeds(runs, f"weights/{name}"), 3) for name in _WEIGHTS)])
    caption = (
        "How the weights of a step's targets are spread, mean and range over seeds: plain training keeps every target "
        "at weight 1 (share 1, effective sample size 1, entropy 1). The table has the last step of every cell."
    )
    svg = figures.small_curves(panels, looks, x="optimizer step", label="Weights over time")
    return Part("weights", title, shown=[Shown(svg, caption, Table(["cell", *_WEIGHTS.values()], rows))])


def failures(study: Study) -> Part:
    """What became of the programs that evaluations judged."""
    title, shown = "Failures of the written programs", []
    for name in sorted({name for run in study.runs for name, found in run.evaluations.items() if "verdicts" in found}):
        counts: dict[str, dict[str, int]] = {}
        for cell, runs in study.cells.items():
            of = [run.evaluations[name]["verdicts"] for run in runs if "verdicts" in run.evaluations.get(name, {})]
            if of:
                counts[cell] = {v: sum(one.get(v, 0) for one in of) for v in _VERDICTS.split()}
        kinds = [v for v in _VERDICTS.split() if any(of[v] for of in counts.values())]
        drawn = [cell for cell in study.shown(2 * NAMED) if cell in counts]
        rest = f"; the {len(counts) - len(drawn)} others are in the table" * (len(counts) > len(drawn))
        share = {cell: {v: counts[cell][v] / (sum(counts[cell].values()) or 1) for v in kinds} for cell in drawn}
        svg = figures.shares(share, kinds, x="share of samples", label=f"Verdicts of {name}")
        caption = f"What became of the samples of {name}, passed on the left, then by cause of failure{rest}."
        rows: list[list[Cell]] = [[cell, *((str(of[v]), of[v]) for v in kinds)] for cell, of in counts.items()]
        shown.append(Shown(svg, caption, Table(["cell", *kinds], rows)))
    missing = "" if shown else "No evaluation that runs programs (MBPP, HumanEval, CodeContests) in this study."
    return Part("failures", title, shown=shown, missing=missing)


def forgetting(study: Study) -> Part:
    """What was lost on other held-out sets beside the gain on the objective's."""
    title, shown = "What was forgotten", []
    ours, head = study.target
    others = sorted({s[0] for run in study.runs for m in run.metrics if (s := parse_ce(m)) and s[0] != ours})
    looks = figures.looks(study.shown(NAMED))
    gain = {cell: change(runs, study.objective) for cell, runs in study.cells.items()}
    for name in others:
        lost = {cell: change(runs, f"eval/{name}/ce_head{head}") for cell, runs in study.cells.items()}
        points = {c: (x.estimate, y.estimate) for c, x in gain.items() if x and (y := lost[c])}
        if not points:
            continue
        label = f"Forgetting of {name}"
        x_name, y_name = (f"change of CE on {s or 'the held-out set'}, nats" for s in (ours, name))
        svg = figures.scatter(points, looks, x=x_name, y=y_name, label=label, zero=True)
        caption = (
            f"Change of head {head}'s CE from before the first step to the last: above the line {name} was forgotten; "
            "further left, more was learnt."
        )
        rows = [[cell, interval(gain[cell]), interval(lost[cell])] for cell in points]
        shown.append(Shown(svg, caption, Table(["cell", x_name, y_name], rows)))
    missing = "" if shown else "One held-out set only: a second one (eval_dataset.prose) would show what was forgotten."
    return Part("forgetting", title, shown=shown, missing=missing)


def costs(study: Study) -> Part:
    """What each cell and the whole study cost."""
    rows: list[Sequence[Cell]] = [
        [cell, (str(len(runs)), len(runs)), *cost_cells(cost(runs))] for cell, runs in study.cells.items()
    ]
    total = cost(study.runs)
    rows.append(["all", (str(len(study.runs)), len(study.runs)), *cost_cells(total)])
    known = total.seconds is not None
    lead = (
        "Training alone, all seeds together, without start-up, evaluation and checkpoints: tokens and seconds of "
        "the logged steps, carried over to those between; FLOPs that the models need (docs/operations.md)."
    )
    missing = "" if known else "No run says what its steps cost (train/tokens, train/tokens_per_second)."
    head = ["cell", "runs", "tokens", "seconds", "FLOPs", "device hours"]
    return Part("cost", "Cost", lead if known else "", table=Table(head, rows) if known else None, missing=missing)


def head_curve(found: Mapping[int, Interval]) -> Curve:
    ks = sorted(found)
    return Curve(ks, [found[k].estimate for k in ks], [found[k].low for k in ks], [found[k].high for k in ks])


def change(runs: Sequence[Run], metric: str) -> Interval | None:
    both = [[value for _, value in run.metrics[metric]] for run in runs if run.metrics.get(metric)]
    return over([values[-1] - values[0] for values in both]) if both else None


def acceptance(study: Study) -> dict[str, dict[int, Interval]]:
    """Returns the share of each head's drafts that verification accepts, with all heads drafting."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in study.runs:
        for evaluation in run.evaluations.values():
            for name, share in accepted_drafts(evaluation).items():
                found[run.cell][int(name.removeprefix("acceptance_head"))].append(share)
    return {cell: {k: over(values) for k, values in sorted(of.items())} for cell, of in found.items()}


def pass_rates(study: Study) -> dict[str, dict[str, Interval]]:
    """Returns pass@1 and the other figures of each evaluation, by name and by cell."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in study.runs:
        for name, found in run.evaluations.items():
            if "temperatures" in found:
                for metric, figure in found["temperatures"][found["fixed_temperature"]]["metrics"].items():
                    values[f"{name} {metric.replace('_at_', '@')}"][run.cell].append(figure["estimate"])
    return {name: {cell: over(of) for cell, of in cells.items()} for name, cells in values.items()}
