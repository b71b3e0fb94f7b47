"""The parts of a report on what a study found: claims, the table of cells, curves, the axes, quality against cost."""

from collections import defaultdict

import numpy as np

from wmtp.errors import UserError
from wmtp.numerics.bootstrap import Interval
from wmtp.report import figures
from wmtp.report.comparison import compare_runs
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


def claims(study: Study) -> Part:
    """The study's claim lines, and the differences behind them with their intervals."""
    title, (held_out_set, head) = "What the study may claim", study.target
    runs = [run for run in study.compared if run.held_out is not None]
    apart = ", ".join(sorted({run.cell for run in study.runs if run not in runs}))
    if not runs:
        return Part("claims", title, missing="No claim: no run has the CE of single held-out documents (held_out/).")
    try:
        found = compare_runs(
            runs, baseline=study.baseline, set_name=held_out_set, head=head, margin=study.sweep.get("margin"),
            controls=study.controls,
        )  # fmt: skip
    except UserError as error:
        return Part("claims", title, missing=f"No claim: {error}.")
    if not found:
        return Part("claims", title, missing=f"No claim: there is nothing to hold {study.baseline} against.")
    kinds = ["none" if not c.found else "better" if c.better else "worse" for c in found]
    kinds = ["uncontrolled" if k == "better" and c.missing_controls else k for k, c in zip(kinds, found, strict=True)]
    order = {"better": 0, "uncontrolled": 1, "worse": 2, "none": 3}
    lines = sorted(zip(kinds, found, strict=True), key=lambda pair: (order[pair[0]], pair[1].difference.mean))
    rows, table = [], []
    for _, c in lines:
        name = f"{figures.short(c.arm)} - {figures.short(c.baseline)}"
        rows.append((name, c.difference.mean, c.interval.low, c.interval.high, c.found))
        ends = interval(Interval(c.difference.mean, c.interval.low, c.interval.high))
        table.append([f"{c.arm} - {c.baseline}", ends, number(c.p), number(c.effect, 2), number(c.smallest)])
    names = ["difference", "nats [95 %]", "p (Holm)", "Cohen's d", "smallest that would be found"]
    caption = (
        "Difference in held-out CE of each cell from what it is held against, with its 95 % interval over seeds and "
        "documents: left of zero is better. Filled: a difference was found after Holm's adjustment; hollow: none was."
    )
    label = "Differences from the baseline and the controls"
    svg = figures.forest(rows, x="difference in held-out CE, nats per token", label=label)
    return Part(
        "claims", title,
        f"{sum(c.found for c in found)} of {len(found)} comparisons found a difference in {study.objective}, on the "
        "same seeds and documents, adjusted for all of them."
        + f" Apart, since they cannot be compared with the baseline: {apart}." * bool(apart),
        lines=[(kind, str(c)) for kind, c in lines], shown=[Shown(svg, caption, Table(names, table))],
    )  # fmt: skip


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
            caption = f"{title[0].upper()}{title[1:]}, by step: {what}" + f". Thin lines: {rest} other cells" * bool(
                rest
            )
            label, zero = f"Learning curves: {title}", kind == "difference"
            svg = figures.curves(
                of, looks, x="optimizer step", y="difference, nats" if zero else title, label=label, zero=zero
            )
            shown.append(Shown(svg, f"{caption}.", curve_table(of)))
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
    """Heatmaps of the objective over two axes, one for each value of a third."""
    title = "The axes"
    if not study.axes:
        return Part("axes", title, missing="This study varies no config key over several values (axes of its sweep).")
    keys = sorted(study.axes, key=lambda key: -len(study.axes[key]))[:3]
    keys += [""] * (3 - len(keys))  # an axis that is not there has one value
    values = [study.axes.get(key, [None]) for key in keys]
    grid: dict[tuple, list[float]] = defaultdict(list)
    for cell, runs in study.cells.items():
        own = study.axes_of(cell)
        place = tuple(own.get(key) if key else None for key in keys)
        found = over_seeds(runs, study.objective)
        if found is not None and all(v in of for v, of in zip(place, values, strict=True)):
            grid[place].append(found.estimate)
    mean = {place: float(np.mean(of)) for place, of in grid.items()}
    last = [key.rpartition(".")[2] for key in keys]
    panels = {}
    for panel in values[2]:
        name = f"{last[2]} {panel}" if keys[2] else ""
        panels[name] = np.array([[mean.get((a, b, panel), np.nan) for a in values[0]] for b in values[1]])
    if not mean:
        return Part("axes", title, missing=f"No cell with values of {', '.join(study.axes)} has the objective yet.")
    names = [[figures.short(str(value)) for value in of] for of in values]
    rest = [key for key in study.axes if key not in keys]
    over_all = f" and over {', '.join(rest)}" if rest else ""
    caption = (
        f"Mean of {study.objective} over seeds{over_all}, by {', '.join(filter(None, last))}; "
        "the frame marks the lowest, bright is better."
    )
    svg = figures.heatmaps(
        panels, names[0], names[1] if keys[1] else [""], x=last[0], y=last[1], label=f"Heatmaps of {study.objective}"
    )
    rows = [
        [*(str(v) for v, key in zip(place, keys, strict=True) if key), number(value)]
        for place, value in sorted(mean.items(), key=lambda found: [*map(numbers_first, found[0])])
    ]
    return Part("axes", title, shown=[Shown(svg, caption, Table([*filter(None, keys), study.objective], rows))])


def pareto(study: Study) -> Part:
    """Quality against cost, with the cells that no other beats in both."""
    title = "Quality against cost"
    costs = {cell: cost(runs[:1]) for cell, runs in study.cells.items()}
    unit = next(
        (name for name in ("flops", "seconds", "tokens") if any(getattr(c, name) for c in costs.values())), None
    )
    quality = {cell: over_seeds(runs, study.objective) for cell, runs in study.cells.items()}
    points = {
        c: (getattr(costs[c], unit), q.estimate) for c, q in quality.items() if unit and q and getattr(costs[c], unit)
    }
    if unit is None or not points:
        return Part("pareto", title, missing="No run says what it cost (train/tokens, train/tokens_per_second).")
    front: list[str] = []
    for cell in sorted(points, key=points.__getitem__):
        if not front or points[cell][1] < points[front[-1]][1]:
            front.append(cell)
    names = {"flops": "FLOPs", "seconds": "seconds", "tokens": "tokens"}
    looks = figures.looks(list(dict.fromkeys([*study.shown(NAMED - 1), *front]))[: NAMED + 2])
    label = f"Pareto front of {study.objective} against {names[unit]}"
    svg = figures.scatter(
        points,
        looks,
        front,
        x=f"{names[unit]} of one seed's training",
        y=ce_name(study.objective) + ", nats",
        label=label,
    )
    caption = f"Down and left is better. The dashed steps join the cells that none beats in both: {', '.join(front)}."
    rows = [[cell, (f"{x:.3e}", x), number(y), "yes" if cell in front else ""] for cell, (x, y) in points.items()]
    return Part(
        "pareto",
        title,
        shown=[Shown(svg, caption, Table(["cell", names[unit], study.objective, "on the front"], rows))],
    )
