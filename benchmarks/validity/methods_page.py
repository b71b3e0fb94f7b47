"""docs/methods.md from the results: one table of all weightings, and what each of them did here.

What it and the fifth section of docs/validity.md show is kept in
`docs/figures/validity_methods.json`, so that a test holds both pages against it without a run.
"""

import json
from pathlib import Path

from .marked_blocks import with_blocks
from .methods import METHODS

FACTS = "validity_methods.json"
SETTINGS = ("far behind, 20 steps", "far behind, 60 steps", "between, 240 steps", "close")
_COLUMNS = {"code": "code minus uniform", "prose": "prose minus uniform"}


def write(side_by_side: dict, noise: dict | None, docs: Path) -> dict:
    """Keeps the facts, fills docs/methods.md, returns the facts; without the noise stage they lack its column."""
    facts = facts_of(side_by_side, noise)
    (docs / "figures" / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    page = docs / "methods.md"
    page.write_text(filled(page.read_text(encoding="utf-8"), facts), encoding="utf-8")
    return facts


def facts_of(side_by_side: dict, noise: dict | None) -> dict:
    """What the pages show: figures rounded to five digits behind the point."""
    aucs = (
        {}
        if noise is None
        else {
            name: {policy: noise["policies"][policy]["auc"]["weight"][name]["all"] for policy in SETTINGS}
            for name in METHODS
            if name in noise["policies"][SETTINGS[0]]["auc"]["weight"]
        }
    )
    return _rounded({**side_by_side, "noise": aucs})


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value


def filled(page: str, facts: dict) -> str:
    """The page with its marked blocks written anew.

    Raises:
        ValueError: a block is missing or twice there.
    """
    sections = dict.fromkeys(method.section for method in METHODS.values())
    blocks = {"table": table(facts)}
    blocks |= {f"here {section}": here(facts, section) for section in sections}
    return with_blocks(page, blocks, "methods.md")


def show(triple: list[float], digits: int = 3, *, sign: bool = True) -> str:
    kind = f"{'+' if sign else ''}.{digits}f"
    return f"{triple[0]:{kind}} [{triple[1]:{kind}}, {triple[2]:{kind}}]"


def gap(difference: dict) -> str:
    """A difference with its interval, bold where a difference is found after Holm's adjustment."""
    return f"**{show(difference['mean'])}**" if difference["p"] < 0.05 else show(difference["mean"])


def ordered(facts: dict) -> list[str]:
    """The methods, the best on clean code first."""
    return sorted(facts["methods"], key=lambda name: facts["methods"][name]["code"][0])


def table(facts: dict) -> str:
    head = ["method", "clean code", "minus `uniform`", "prose, minus `uniform`", "tokens a forward", "to the limit"]
    head += ["noise AUC in training", *(["noise AUC, four settings"] if facts["noise"] else [])]
    rows = []
    for name in ordered(facts):
        found = facts["methods"][name]
        gaps = ["", ""] if name == "uniform" else [gap(found[column]) for column in _COLUMNS.values()]
        own = [f"{auc[0]:.2f}" for auc in found.get("auc", [])]
        elsewhere = facts["noise"].get(name, {})
        rows.append(
            [
                f"`{name}`",
                f"{found['code'][0]:.3f}",
                *gaps,
                show(found["accept length"], 2, sign=False) if "accept length" in found else "no drafts",
                f"{found['to the limit'][0]:.0%}",
                " to ".join(own),
                *([" ".join(f"{auc[0]:.2f}" for auc in elsewhere.values())] if facts["noise"] else []),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    most = len(facts["settings"]["seeds"])
    fewer = [f"`{name}` {n}" for name in ordered(facts) if (n := len(facts["methods"][name]["code by seed"])) < most]
    if fewer:
        lines += ["", f"Of fewer than {most} seeds, the first ones: {', '.join(fewer)}."]
    left = [f"`{name}`" for name, method in METHODS.items() if method.trains and name not in facts["methods"]]
    if left:
        lines += ["", f"Not measured yet, the full form goes on with them: {', '.join(left)}."]
    return "\n".join(lines)


def here(facts: dict, section: str) -> str:
    """One line on what the methods of a section did."""
    parts = []
    for name in ordered(facts):
        if METHODS[name].section != section:
            continue
        found = facts["methods"][name]
        if name == "uniform":
            before = facts["before"]
            after = {key: found.get(key, [0.0])[0] for key in before}
            parts.append(
                f"clean code goes from {before['code']:.3f} nats to {after['code']:.3f}, "
                f"prose from {before['prose']:.3f} to {after['prose']:.3f}; "
                f"a forward gives {before['accept length']:.2f} tokens and then {after['accept length']:.2f}; "
                f"{before['to the limit']:.0%} of the texts run to the limit and then {after['to the limit']:.0%}"
            )
            continue
        code, prose = (gap(found[column]) for column in _COLUMNS.values())
        tokens = (
            gap(found["accept length minus uniform"]) if "accept length" in found else "none, its texts end at once"
        )
        auc = f", noise AUC {found['auc'][0][0]:.2f} to {found['auc'][1][0]:.2f}" if "auc" in found else ""
        parts.append(f"`{name}`: code {code}, prose {prose}, tokens a forward {tokens}{auc}")
    return "- **Here**: " + ("; ".join(parts) or "not measured yet") + "."
