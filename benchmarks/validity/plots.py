"""The figures of docs/validity.md and docs/methods.md, as small SVG files."""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

from .methods import METHODS

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, and they can be searched
    "svg.hashsalt": "wmtp",  # the same bytes for the same figures
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
_COLORS = {
    "excess": "#0b6e4f",
    "abs_excess": "#c1121f",
    "relative_excess": "#5fa777",
    "reference": "#1d4e89",
    "dft": "#7b4ea3",
    "entropy": "#d98e04",
}


def noise(result: dict, path: Path) -> None:
    """AUC of each raw score over how far the policy is behind its reference on clean tokens."""
    policies = sorted(result["policies"].items(), key=lambda item: _gap(item[1]))
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for name, color in _COLORS.items():
            points = [found["auc"]["score"][name]["all"] for _, found in policies]
            x, y = [_gap(found) for _, found in policies], [p[0] for p in points]
            error = [[p[0] - p[1] for p in points], [p[2] - p[0] for p in points]]
            axes.errorbar(x, y, yerr=error, marker="o", markersize=4, linewidth=1.4, color=color, label=name)
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.axhline(0.9, color="black", linewidth=0.8, linestyle="--")
        axes.set_xlabel("policy's CE minus reference's CE on the tokens that were kept (nats)")
        axes.set_ylabel("AUC: low score finds noise")
        axes.set_ylim(0, 1.02)
        axes.legend(ncols=3, frameon=False, loc="lower right")
        _save(figure, path)


def learning(result: dict, path: Path) -> None:
    """Clean held-out CE of each method minus that of uniform weights, with its interval over seeds."""
    policies = result["policies"]
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, len(policies), figsize=(3.6 + 3.2 * len(policies), 4.2), layout="constrained", squeeze=False
        )
        for axes, (policy, found) in zip(panels[0], policies.items(), strict=True):
            methods = {name: m for name, m in found["methods"].items() if name != "uniform"}
            gaps = {name: m["minus_uniform_over_seeds"] for name, m in methods.items()}
            _dots(axes, dict(sorted(gaps.items(), key=lambda item: -item[1][0])))
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xscale("symlog", linthresh=0.25, linscale=2)  # one method that fails must not hide the others
            axes.set_xticks([-0.2, -0.1, 0, 0.1, 0.2, 1], ["-0.2", "-0.1", "0", "0.1", "0.2", "1"])
            axes.set_title(f"policy {policy}", fontsize=9)
            axes.set_xlabel("clean CE minus uniform's (nats); left is better")
        _save(figure, path)


def faults(result: dict, path: Path) -> None:
    """AUC of the faulty line's rank, by what ranks the lines."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        aucs = {name: found["auc"] for name, found in result["methods"].items()}
        _dots(axes, dict(sorted(aucs.items(), key=lambda item: item[1][0])))
        axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("AUC of the faulty line among the non-blank lines")
        _save(figure, path)


def side_by_side(facts: dict, path: Path) -> None:
    """What each method learnt against what it forgot, both minus uniform, with intervals."""
    marked = {"oracle": "#1d4e89", "rho1": "#0b6e4f", "protect": "#5fa777", "controls": "#c1121f"}
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 5.2), layout="constrained")
        for name, found in facts["methods"].items():
            if name == "uniform":
                continue
            x, y = (found[f"{text} minus uniform"]["mean"] for text in ("code", "prose"))
            color = marked.get(METHODS[name].section, "#777777")
            spread = {"xerr": [[x[0] - x[1]], [x[2] - x[0]]], "yerr": [[y[0] - y[1]], [y[2] - y[0]]]}
            axes.errorbar([x[0]], [y[0]], **spread, marker="o", markersize=4, linewidth=0.7, color=color)
            if METHODS[name].section != "controls":  # a dozen that lie close together, and by colour alone
                axes.annotate(name, (x[0], y[0]), xytext=(4, 3), textcoords="offset points", fontsize=7, color=color)
        for line in (axes.axhline, axes.axvline):
            line(0, color="black", linewidth=0.8)
        axes.plot([], [], "o", color=marked["controls"], markersize=4, label="controls")
        axes.legend(loc="upper left", frameon=False, fontsize=7)
        axes.set_xscale("symlog", linthresh=0.1, linscale=2)  # methods that fail must not hide the others
        axes.set_yscale("symlog", linthresh=0.1, linscale=2)
        axes.set_xlabel("clean code: CE minus uniform's (nats); left is better")
        axes.set_ylabel("prose: CE minus uniform's (nats); below is better")
        _save(figure, path)


def _dots(axes, triples: dict[str, list[float]]) -> None:
    for row, (name, (value, low, high)) in enumerate(triples.items()):
        bold = name.startswith(("select excess", "critic, chosen")) and "swapped" not in name
        color = "#0b6e4f" if bold else "#555555"
        axes.errorbar([value], [row], xerr=[[value - low], [high - value]], marker="o", markersize=4, color=color)
    axes.set_yticks(range(len(triples)), list(triples))


def _gap(found: dict) -> float:
    return found["ce"]["kept"]["policy"] - found["ce"]["kept"]["reference"]


def _save(figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
