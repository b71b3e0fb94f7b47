"""The plan of a run as one HTML page: bars of bytes and of seconds, and what each lever buys."""

from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined

from wmtp.training.planning.plan import Plan, short


def plan_page(title: str, plans: Mapping[str, Plan]) -> str:
    """Returns the page of a config's plans by name; the first is the config as it is."""
    pages = Environment(
        loader=PackageLoader("wmtp.training", "planning"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters["short"] = short
    card = next(iter(plans.values())).card
    kinds = list(dict.fromkeys(kind for plan in plans.values() for kind in _by_size(plan.held)))
    parts = list(dict.fromkeys(part for plan in plans.values() for part in _by_size(plan.seconds)))
    widest = max(card.memory, *(plan.memory for plan in plans.values()))
    longest = max(plan.step_seconds for plan in plans.values())
    bars = [
        ("Bytes of a card at the worst moment", "GB", kinds, {n: p.held for n, p in plans.items()}, widest, 1e9),
        ("Seconds of an optimizer step", "s", parts, {n: p.seconds for n, p in plans.items()}, longest, 1.0),
    ]
    return pages.get_template("page.html").render(title=title, plans=plans, card=card, bars=bars, widest=widest)


def _by_size(shares: Mapping[str, float]) -> list[str]:
    return sorted(shares, key=lambda name: -shares[name])
