"""The report of a value model's training, for people: report.md."""

_FIGURES = (
    ("pairwise_accuracy", "pairwise accuracy"),
    ("auc", "AUC"),
    ("brier", "Brier score"),
    ("ece", "expected calibration error"),
)


def critic_report(
    value: dict[str, float], length_only: dict[str, float], facts: dict[str, object], *, chosen_on_these: bool
) -> str:
    """Writes Markdown: facts of the training, then a table of the value model and the length-only rule.

    Args:
        value, length_only: of :func:`wmtp.critic.score_report`.
        facts: lines of the list at the top.
        chosen_on_these: the step was chosen by its accuracy on the pairs reported on; the report says so.
    """
    lines = ["# Value model", "", *(f"- {name}: {fact}" for name, fact in facts.items()), ""]
    lines += ["| | value model | length only |", "|---|---|---|"]
    for key, name in _FIGURES:
        if key in value or key in length_only:
            cells = [_figure(report, key) for report in (value, length_only)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Pairwise accuracy: share of pairs in which the correct program scores higher, ties count half; in brackets "
        "its 95 % bootstrap interval over problems. AUC: the same over all correct and incorrect programs, of whatever "
        "pair. Brier score and calibration error: of the probability of being correct. Length only: a logistic "
        "regression on the log length of the program, fitted on the training pairs.",
    ]
    if chosen_on_these:
        lines += ["", "The step was chosen on these same pairs, which flatters the value model; set test_fraction."]
    return "\n".join(lines) + "\n"


def _figure(report: dict[str, float], key: str) -> str:
    if key not in report:
        return "-"
    interval = f" [{report[f'{key}_low']:.3f}, {report[f'{key}_high']:.3f}]" if f"{key}_low" in report else ""
    return f"{report[key]:.3f}{interval}"
