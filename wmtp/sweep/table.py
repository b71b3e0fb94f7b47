"""The table of a sweep: in the terminal while it runs, and as table.json and table.md."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from wmtp.sweep.cells import Cell, SweepError
from wmtp.sweep.study import CELL, ERROR, STAGES, Study

STATES = {
    TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned", TrialState.FAIL: "failed",
}  # fmt: skip
_MOST_LINES = 30


def rows(
    tasks: Mapping[str, tuple[Cell, Sequence[int]]], counting: Mapping[str, FrozenTrial],
    value: Callable[[dict], float], command: Callable[[Cell, int], str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Returns a row for each cell and seed, in the order of `tasks`: nothing in it depends on when or where it ran.

    Args:
        tasks: a study's cells with their seeds, by the name of their trials.
        counting: the trials that count (:meth:`wmtp.sweep.study.Study.counting`).
        value: the objective of a seed's figures.
        command: what a training can be repeated with.
    """
    found = []
    for name, (cell, seeds) in tasks.items():
        trial = counting.get(name)
        state = "waiting" if trial is None else STATES[trial.state]
        stages: dict[str, dict] = {} if trial is None else trial.user_attrs.get(STAGES, {})
        for seed in seeds:
            own = {stage: figures for stage, figures in stages.items() if stage.split("/")[0] == f"seed-{seed}"}
            row = {"cell": cell.name, "seed": seed, "state": state, "axes": dict(cell.axes)}
            row["value"] = None
            if state == "done":
                with suppress(SweepError):  # of an objective or evaluation that came later (accept_changes)
                    row["value"] = value(own)
            row["figures"] = {s: {k: v for k, v in f.items() if k != "seconds"} for s, f in own.items()}
            row["error"] = None if trial is None else trial.user_attrs.get(ERROR)
            row["command"] = command(cell, seed)
            found.append(row)
    return found


def by_cell(rows: Sequence[Mapping[str, Any]], *, maximize: bool) -> list[dict[str, Any]]:
    """Returns mean, standard deviation and number of seeds of each cell, the best first, those without at the end."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    found = []
    for name, own in cells.items():
        values = [row["value"] for row in own if row["value"] is not None]
        states = [row["state"] for row in own]
        state = next((s for s in ("failed", "running", "waiting", "pruned") if s in states), "done")
        mean = statistics.fmean(values) if values else None
        sd = statistics.stdev(values) if len(values) > 1 else None
        found.append(
            {"cell": name, "axes": own[0]["axes"], "seeds": len(values), "mean": mean, "sd": sd, "state": state}
        )
    sign = -1 if maximize else 1
    return sorted(found, key=lambda cell: (cell["mean"] is None, sign * (cell["mean"] or 0), cell["cell"]))


def strict_json(content: Mapping[str, Any]) -> str:
    """Returns the table for programs. A figure that is no finite number is null, which JSON has and NaN is not."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(finite, indent=1, allow_nan=False) + "\n"


def markdown(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table for people: a line for each cell, then what failed and why."""
    axes = list(dict.fromkeys(key for cell in cells for key in cell["axes"]))
    head = ["cell", *axes, f"{facts['objective']} (mean)", "sd", "seeds", "state"]
    baseline = f"; baseline {facts['baseline']}" if facts["baseline"] else ""
    lines = [f"# {facts['study']}", "", f"{facts['objective']}, {facts['direction']}{baseline}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in cells:
        options = [json.dumps(cell["axes"][key]).strip('"') if key in cell["axes"] else "" for key in axes]
        figures = ["" if cell[key] is None else f"{cell[key]:.5f}" for key in ("mean", "sd")]
        lines.append("| " + " | ".join([cell["cell"], *options, *figures, str(cell["seeds"]), cell["state"]]) + " |")
    failed = [f"- {row['cell']}, seed {row['seed']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([*lines, *(["", "Failed:", "", *failed] if failed else [])]) + "\n"


class LiveTable:
    """The state of a sweep on stderr: a table that is drawn again, or lines where it is no terminal."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False) if self._console.is_terminal else None

    def __enter__(self) -> "LiveTable":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def line(self, text: str) -> None:
        """Prints a line, above the table."""
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, title: str, cells: Sequence[Mapping[str, Any]]) -> None:
        """Draws the table again; without a terminal, nothing."""
        if self._live is None:
            return
        order = {"running": 0, "failed": 1}
        drawn = Table(title=title, title_justify="left")
        for name in ("cell", "state", "mean", "sd", "seeds"):
            # Where the terminal is narrow, names fold and figures stay whole.
            drawn.add_column(
                name, justify="left" if name in ("cell", "state") else "right", no_wrap=name != "cell", overflow="fold"
            )
        for cell in sorted(cells, key=lambda cell: order.get(cell["state"], 2))[:_MOST_LINES]:
            figures = ["" if cell[key] is None else f"{cell[key]:.4f}" for key in ("mean", "sd")]
            drawn.add_row(cell["cell"], cell["state"], *figures, str(cell["seeds"]))
        self._live.update(drawn, refresh=True)


def progress(study: Study, planned: Sequence[float] = ()) -> str:
    """Returns how far a study is: how many cells are in which state, the best value, and the time left by what cells
    took; until one has ended, by the seconds that were planned of some."""
    trials = list(study.counting().values())
    states = [STATES[trial.state] for trial in trials]
    number = {state: states.count(state) for state in ("done", "pruned", "failed", "running")}
    text = ", ".join(f"{count} {state}" for state, count in number.items() if count or state == "done")
    text += f" of {study.size} cells"
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    values = [trial.value for trial in ended if trial.value is not None]
    if values:
        text += f"; best {max(values) if study.maximize else min(values):.4f}"
    left = study.size - len(ended) - number["failed"]
    took = [sum(f.get("seconds", 0) for f in trial.user_attrs.get(STAGES, {}).values()) for trial in ended] or planned
    if took and left:
        minutes = statistics.fmean(took) * left / max(1, number["running"]) / 60
        text += f"; about {minutes / 60:.1f} h left" if minutes > 90 else f"; about {minutes:.0f} min left"
    return text


def times(counting: Mapping[str, FrozenTrial]) -> dict[str, dict[str, float]]:
    """Returns the seconds of each run, which differ each time, by cell and run."""
    return {
        str(trial.user_attrs[CELL]): {stage: f["seconds"] for stage, f in trial.user_attrs.get(STAGES, {}).items()}
        for trial in counting.values()
    }
