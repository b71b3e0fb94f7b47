"""The parts of a report on what a study found: claims, the table of cells, curves, the axes, quality against cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.report import figures
from wmtp.report.claims import Comparison
from wmtp.report.comparison import (
    Arms,
    compare_levels,
    compare_runs,
    evaluation_arms,
    evaluations_of,
    held_out_arms,
    sets_and_heads,
)
from wmtp.report.costs import cost
from wmtp.report.figures import Curve
from wmtp.report.parts import (
    NAMED,
    Cell,
    Part,
    Shown,
    Table,
    ce_name,
    cost_cells,
    curve_of,
    curve_table,
    curves,
    interval,
    number,
)
from wmtp.report.studies import Study, held_out_interval, numbers_first, over_seeds, parse_ce
from wmtp.report.study_models import acceptance, pass_rates

_STATISTICS = {
    "p": "p", "p_holm": "p (Holm)", "smallest_found": "smallest that would be found", "p_tost": "TOST",
    "bootstrap_interval": "bootstrap [95 %]", "wilcoxon_p_over_units": "Wilcoxon, units",
    "wilcoxon_p_over_seeds": "Wilcoxon, seeds", "sign_flip_p_over_units": "sign flips, units",
    "sign_flip_p_over_seeds": "sign flips, seeds", "effect_size_over_units": "Cohen's d, units",
    "effect_size_over_seeds": "Cohen's d, seeds",
}  # fmt: skip


def claims(study: Study) -> list[Part]:
    """The study's claims: on the objective, on other held-out sets, and on each evaluation, adjusted for them all."""
    title, (held_out_set, head) = "What the study may claim", study.target
    runs = [run for run in study.compared if run.held_out is not None]
    if not runs:
        return [Part("claims", title, missing="No claim: no run has the CE of single held-out documents (held_out/).")]
    if len(study.cells) == 1:
        return [Part("claims", title, missing=f"No claim: there is nothing to hold {study.baseline} against.")]
    if lacking := study.design.keys() - {run.cell for run in runs}:
        cells = ", ".join(sorted(lacking))
        return [Part("claims", title, missing=f"No claim: factors names cells without runs to compare, {cells}.")]
    metrics, refused, margin = [], {}, study.sweep.get("margin")
    for name in evaluations_of(runs):
        try:
            metrics.append(evaluation_arms(runs, name))
            if study.factors and not metrics[-1].sample:
                metrics.append(evaluation_arms(runs, name, "tokens_per_forward"))
        except UserError as error:
            refused[name] = f"No claim: {error}."
    try:
        known = sets_and_heads(runs)
        others = [(name, k) for name, k in known if study.factors and name == held_out_set and k != head]
        others += [(name, k) for name, k in known if k == head and name != held_out_set]
        metrics = [*(held_out_arms(runs, *key) for key in ((held_out_set, head), *others)), *metrics]
        if study.factors:
            found = compare_levels(runs, metrics, study.factors, study.design, margin=margin)
        else:
            found = compare_runs(runs, metrics, baseline=study.baseline, margin=margin, controls=study.controls)
    except UserError as error:
        return [Part("claims", title, missing=f"No claim: {error}.")]
    apart = ", ".join(sorted({run.cell for run in study.runs if run not in runs}))
    lead = f" Apart, since they cannot be compared with the baseline: {apart}." if apart else ""
    if sum(map(bool, found)) > 1:
        names = ", ".join(metric.title for metric, of in zip(metrics, found, strict=True) if of)
        lead = f" All {sum(map(len, found))} comparisons of this page are adjusted together: {names}.{lead}"
    if study.factors:
        lead = f" Each level is the mean of all cells that have it, against those that differ in nothing else.{lead}"
    parts = [_claims_on(study, metrics[0], found[0], "claims", title, lead)]
    for place, (metric, of) in enumerate(zip(metrics[1:], found[1:], strict=True), 2):
        if metric.unit and metric.name.startswith(f"{held_out_set} head ".lstrip()):
            title, lead = f"Claims on {metric.title}", ""
        elif metric.unit:
            title = f"Claims on what was forgotten: {metric.title}"
            lead = " Worse than the baseline: more forgotten than by it, or less learnt; better: less forgotten."
        elif metric.sample:
            title, lead = f"Claims on {metric.name}", " Each task counts alike; more is better."
        else:
            title = f"Claims on {metric.name}"
            lead = " Runs keep the totals of their prompts: seeds alone are compared, by a paired t test."
        parts.append(_claims_on(study, metric, of, f"claims_{place}", title, lead))
    for name, reason in refused.items():
        parts.append(Part(f"claims_{len(parts) + 1}", f"Claims on {name}", missing=reason))
    return parts


def _claims_on(study: Study, metric: Arms, found: list[Comparison], key: str, title: str, lead: str) -> Part:
    """Returns claim lines on one metric, the differences behind them, and all their statistics."""
    if not found:
        return Part(key, title, missing=metric.why_no_claim())
    kinds = ["none" if not c.found else "better" if c.better else "worse" for c in found]
    kinds = ["uncontrolled" if k == "better" and c.missing_controls else k for k, c in zip(kinds, found, strict=True)]
    sign = 1 if metric.unit else -1
    order = {"better": 0, "uncontrolled": 1, "worse": 2, "none": 3}
    lines = sorted(zip(kinds, found, strict=True), key=lambda pair: (order[pair[0]], sign * pair[1].difference.mean))
    every = [c.statistics() for _, c in lines]
    names = [name for name in _STATISTICS if any(of.get(name) is not None for of in every)]
    rows, table = [], []
    for (_, c), statistics in zip(lines, every, strict=True):
        mean, low, high = c.difference.mean, c.interval.low, c.interval.high
        rows.append((f"{figures.short(c.arm)} - {figures.short(c.baseline)}", mean, low, high, c.found))
        shown = [interval(Interval(mean, *of)) if isinstance(of, list) else number(of)
                 for of in map(statistics.get, names)]  # fmt: skip
        table.append([f"{c.arm} - {c.baseline}", interval(c.interval), *shown])
    over = f"seeds and {metric.sample}s" if metric.sample else "seeds"
    side, what = "left" if metric.unit else "right", "level" if study.factors else "cell"
    caption = (
        f"Difference in {metric.title} of each {what} from what it is held against, with its 95 % interval over "
        f"{over}: {side} of zero is better. Filled: a difference was found after Holm's adjustment; hollow: none was. "
        "Of the numbers, p (Holm) alone makes a claim: the other tests see units or seeds alone."
    )
    x = "difference in held-out CE, nats per token" if metric.unit else f"difference in {metric.name}"
    svg = figures.forest(rows, x=x, label=f"Differences in {metric.title}")
    head = ["difference", f"{metric.unit} [95 %]".strip(), *(_STATISTICS[name] for name in names)]
    what = study.objective if key == "claims" else metric.title
    count = f"{sum(c.found for c in found)} of {len(found)} comparisons found a difference in {what}"
    lead = f"{count}, on the same {over}.{lead}"
    return Part(key, title, lead, [(k, str(c)) for k, c in lines], [Shown(svg, caption, Table(head, table))])


def cells(study: Study) -> Part:
    """The table of all cells: quality, evaluations, cost, state."""
    ces = sorted({m for run in study.runs for m in run.metrics if parse_ce(m)}, key=lambda m: (m != study.objective, m))
    evaluated = pass_rates(study)
    accepted = acceptance(study)
    head = ["cell", "seeds", *(ce_name(metric) for metric in ces), *evaluated, "acceptance of head 2", "tokens",
            "seconds", "FLOPs", "device hours", "state", "not finished"]  # fmt: skip
    unfinished: dict[str, list[str]] = defaultdict(list)
    for row in study.unfinished:
        unfinished[row["cell"]].append(f"seed {row['seed']} {row['state']}" + f": {row['error']}" * bool(row["error"]))
    rows = []
    for cell, runs in study.cells.items():
        line: list[Cell] = [cell, (str(len(runs)), len(runs))]
        for metric in ces:
            line.append(interval(held_out_interval(runs, metric)))
        line += [interval(of.get(cell), 3) for of in evaluated.values()]
        line.append(interval(accepted.get(cell, {}).get(2), 3))
        line += cost_cells(cost(runs))
        states = sorted({run.state for run in runs})
        rows.append([*line, ", ".join(states).lower(), "; ".join(unfinished.pop(cell, []))])
    for cell, why in unfinished.items():
        rows.append([cell, ("0", 0), *[number(None)] * (len(head) - 4), "no run", "; ".join(why)])
    lead = (
        "Held-out CE in nats per token, with 95 % intervals over seeds and documents where the runs keep them, else "
        "the range over seeds. Pass rates and acceptance: mean and range over seeds. Cost: of training, summed."
    )
    return Part("cells", "Every cell", lead, table=Table(head, rows))


def learning(study: Study) -> Part:
    """Curves of the objective, of its difference from the baseline's, and of training CE."""
    y = f"held-out {ce_name(study.objective)}, nats"
    looks = figures.looks(study.shown(NAMED))
    drawn = [
        ("difference", _differences(study), f"{y}, minus {figures.short(study.baseline)}'s",
         "each run minus the baseline's of its seed, mean and range over seeds; below zero is better"),
        ("curve", curves(study, study.objective), y,
         "mean over seeds, and their range as a band; lower is better, and the first steps may lie above the frame"),
        ("training", curves(study, "train/ce_head1"), "training CE head 1, nats", "the same for training data"),
    ]  # fmt: skip
    shown = []
    for kind, of, title, what in drawn:
        if of:
            rest = len(of) - len(looks.keys() & of.keys())
            others = f". Thin lines: {rest} other cells" if rest else ""
            caption = f"{title[0].upper()}{title[1:]}, by step: {what}{others}."
            label, zero = f"Learning curves: {title}", kind == "difference"
            y = "difference, nats" if zero else title
            svg = figures.curves(of, looks, x="optimizer step", y=y, label=label, zero=zero)
            shown.append(Shown(svg, caption, curve_table(of)))
    missing = "" if shown else "No run has logged held-out or training CE."
    return Part("learning", "Learning curves", shown=shown, missing=missing)


def _differences(study: Study) -> dict[str, Curve]:
    """Returns the objective of each cell minus the baseline's on the same seed, over steps."""
    base = {run.seed: dict(run.metrics.get(study.objective, ())) for run in study.cells[study.baseline]}
    found = {}
    for cell, runs in study.cells.items():
        if cell != study.baseline:
            of = [
                [(s, v - base[run.seed][s]) for s, v in run.metrics.get(study.objective, ()) if s in base[run.seed]]
                for run in runs if run.seed in base
            ]  # fmt: skip
            if curve := curve_of(of):
                found[cell] = curve
    return found


def axes(study: Study) -> Part:
    """Heatmaps over two axes, one for each value of a third: of the objective, and of a design's other metrics."""
    title = "The axes"
    if not study.axes:
        return Part("axes", title, missing="This study varies no config key over several values (axes of its sweep).")
    keys = list(study.axes) if study.factors else sorted(study.axes, key=lambda key: -len(study.axes[key]))
    keys, rest = [*keys[:3], *[""] * (3 - len(keys))], keys[3:]  # an axis that is not there has one value
    means = {study.objective: {cell: over_seeds(runs, study.objective) for cell, runs in study.cells.items()}}
    if study.factors:
        ours, head = study.target
        for metric in sorted({m for run in study.runs for m in run.metrics}):
            if (of := parse_ce(metric)) and (of[0] == ours or of[1] == head):
                means[metric] = {cell: over_seeds(runs, metric) for cell, runs in study.cells.items()}
        accepted = acceptance(study)
        means |= {
            f"acceptance of head {k}": {cell: of.get(k) for cell, of in accepted.items()} for k in (2,) if accepted
        }
    shown = [_heatmaps(study, metric, of, keys, rest) for metric, of in means.items()]
    found = [one for one in shown if one is not None]
    if not found:
        return Part("axes", title, missing=f"No cell with values of {', '.join(study.axes)} has the objective yet.")
    return Part("axes", title, shown=found)


def _heatmaps(
    study: Study, metric: str, of_cells: Mapping[str, Interval | None], keys: Sequence[str], rest: Sequence[str]
) -> Shown | None:
    """Returns a metric's means by the values of three keys, of which "" has one; None where no cell has any."""
    values = [study.axes.get(key, [None]) for key in keys]
    grid: dict[tuple, list[float]] = defaultdict(list)
    for cell, found in of_cells.items():
        own = study.axes_of(cell)
        place = tuple(own.get(key) if key else None for key in keys)
        if found is not None and all(v in of for v, of in zip(place, values, strict=True)):
            grid[place].append(found.estimate)
    mean = {place: float(np.mean(of)) for place, of in grid.items()}
    if not mean:
        return None
    last = [key.rpartition(".")[2] for key in keys]
    panels = {}
    for panel in values[2]:
        name = f"{last[2]} {panel}" if keys[2] else ""
        panels[name] = np.array([[mean.get((a, b, panel), np.nan) for a in values[0]] for b in values[1]])
    names = [[figures.short(str(value)) for value in of] for of in values]
    over_all, lower = f" and over {', '.join(rest)}" if rest else "", parse_ce(metric) is not None
    caption = (
        f"Mean of {metric} over seeds{over_all}, by {', '.join(filter(None, last))}; "
        f"the frame marks the {'lowest' if lower else 'highest'}, bright is better."
    )
    label, lines = f"Heatmaps of {metric}", names[1] if keys[1] else [""]
    svg = figures.heatmaps(panels, names[0], lines, x=last[0], y=last[1], label=label, lower=lower)
    count, places = len(list(filter(None, keys))), sorted(mean, key=lambda place: [*map(numbers_first, place)])
    rows = [[*map(str, place[:count]), number(mean[place])] for place in places]
    return Shown(svg, caption, Table([*filter(None, keys), metric], rows))


def pareto(study: Study) -> Part:
    """Quality against cost, with the cells that no other beats in both."""
    title = "Quality against cost"
    costs = {cell: cost(runs[:1]) for cell, runs in study.cells.items()}
    names = {"flops": "FLOPs", "seconds": "seconds", "tokens": "tokens"}
    unit = next((name for name in names if any(getattr(c, name) for c in costs.values())), "tokens")
    points = {}
    for cell, runs in study.cells.items():
        quality, spent = over_seeds(runs, study.objective), getattr(costs[cell], unit)
        if quality and spent:
            points[cell] = (spent, quality.estimate)
    if not points:
        return Part("pareto", title, missing="No run says what it cost (train/tokens, train/tokens_per_second).")
    front: list[str] = []
    for cell in sorted(points, key=points.__getitem__):
        if not front or points[cell][1] < points[front[-1]][1]:
            front.append(cell)
    looks = figures.looks(list(dict.fromkeys([*study.shown(NAMED - 1), *front]))[: NAMED + 2])
    label, y = f"Pareto front of {study.objective} against {names[unit]}", f"{ce_name(study.objective)}, nats"
    svg = figures.scatter(points, looks, front, x=f"{names[unit]} of one seed's training", y=y, label=label)
    caption = f"Down and left is better. The dashed steps join the cells that none beats in both: {', '.join(front)}."
    rows = [[cell, (f"{x:.3e}", x), number(y), "yes" if cell in front else ""] for cell, (x, y) in points.items()]
    table = Table(["cell", names[unit], study.objective, "on the front"], rows)
    return Part("pareto", title, shown=[Shown(svg, caption, table)])
