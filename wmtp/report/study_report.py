"""The report of a study: one HTML page that needs nothing else, and Markdown with the same numbers."""

import datetime
from collections import Counter
from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from wmtp.eval.markdown import cell as escaped
from wmtp.eval.markdown import fenced, table
from wmtp.report import study_models, study_parts
from wmtp.report.parts import Part, Table
from wmtp.report.studies import Study
from wmtp.report.study_details import configs, tokens
from wmtp.report.token_weights import scale

PARTS: tuple[Callable[[Study], Part], ...] = (
    study_parts.cells, study_parts.learning, study_parts.axes, study_parts.pareto,
    study_models.heads, study_models.weights, tokens, study_models.failures, study_models.forgetting,
    study_models.costs, configs,
)  # fmt: skip


def study_report(study: Study, *, title: str | None = None, date: datetime.date | None = None) -> tuple[str, str]:
    """Returns a study's page as HTML, and as Markdown; equal studies of one day give equal texts.

    Args:
        title: of the page; None is the study's name.
        date: that the page bears; None is today's.
    """
    parts = [*study_parts.claims(study), *(part(study) for part in PARTS)]
    about = {
        "study": study, "title": title or study.name, "parts": parts, "facts": _facts(study), "scale": scale(),
        "date": (date or datetime.date.today()).isoformat(),
    }  # fmt: skip
    pages = Environment(
        loader=PackageLoader("wmtp.report", "study_page"), autoescape=lambda name: name == "page.html",
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    pages.filters |= {"md": escaped, "fenced": fenced, "md_table": _markdown_table}
    pages.globals["raw"] = lambda name: Markup(pages.get_template(name).render())
    pages.tests["number"] = lambda cell: not isinstance(cell, str)
    return tuple(pages.get_template(name).render(about) for name in ("page.html", "page.md"))  # type: ignore[return-value]


def _facts(study: Study) -> dict[str, str]:
    """Returns what stands below the title: how much was run, of what, with which code."""
    seeds = sorted({run.seed for run in study.runs})
    states = Counter(row["state"] for row in study.unfinished)
    found = {
        "runs": f"{len(study.runs)} in {len(study.cells)} cells, seeds {', '.join(map(str, seeds))}",
        "baseline": study.baseline,
        "objective": f"{study.objective} (lower is better)",
        "not finished": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
        "margin": f"differences up to {study.sweep['margin']:g} do not matter" if study.sweep.get("margin") else "",
    }
    if study.other_data:
        found["other data"] = f"{', '.join(study.other_data)}: trained on other data on purpose"
    for name, title in (("dataset", "trained on"), ("data_sha256", "data"), ("git_commit", "code")):
        values = sorted({str(run.facts[name])[:12] for run in study.runs if run.facts.get(name)})
        found[title] = ", ".join(values)
    return {name: text for name, text in found.items() if text}


def _markdown_table(of: Table) -> str:
    rows = [[escaped(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in of.rows]
    return table(list(map(escaped, of.head)), rows)
