"""Every weighting that is measured, a line each: `METHODS`. A new one is one more line; docs/methods.md speaks of it.

The noise stage reads the weights of those that its models' signals suffice for; the side-by-side stage trains with all.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wmtp.weighting import (
    Weighting,
    dft,
    eaft,
    entropy,
    given,
    infosft,
    prift,
    profit,
    protect,
    random_matched,
    rho1,
    shuffled,
    sstoken,
    talr,
    token_cleaning,
    uniform,
)
from wmtp.weighting.rows import mean_one_unless_zero

RHO1_SCORES = ("excess", "abs_excess", "relative_excess", "reference")


@dataclass(frozen=True)
class Method:
    """A weighting and what it is trained on.

    Attributes:
        weighting: builds it.
        section: of docs/methods.md.
        reference: whose CE `reference_ce` is: of the model ``trained`` on clean code, or of the ``initial`` policy.
        data: ``noisy``, ``clean`` (the same documents before the noise), or ``prompts`` (noisy, prompts are targets).
        anchor: weight of the KL to the initial policy (:class:`wmtp.loss.Anchor`); None: none.
        trains: False: measured on noise alone.
        detects: False: not measured on noise, as what it would say there is chance.
    """

    weighting: Callable[[], Any]
    section: str
    reference: str = "trained"
    data: str = "noisy"
    anchor: float | None = None
    trains: bool = True
    detects: bool = True


def oracle() -> Weighting:
    """Weights 0 for the replaced tokens, which it is told, and one same weight for all others."""
    return Weighting(
        lambda signals: 1 - signals.noise[None],
        mean_one_unless_zero,
        needs={"noise"},
        scope="batch",
        mean_one="unless_zero",
    )


METHODS: dict[str, Method] = {
    "uniform": Method(uniform, "uniform"),
    "clean data, uniform": Method(uniform, "oracle", data="clean"),
    "oracle": Method(oracle, "oracle"),
    **{f"select {s}": Method(lambda s=s: rho1("select", s), "rho1") for s in RHO1_SCORES},
    "select excess, 0.7": Method(lambda: rho1("select", percentile=0.7), "rho1", trains=False),
    **{f"soft {s}": Method(lambda s=s: rho1("soft", s), "rho1", trains=s == "excess") for s in RHO1_SCORES},
    **{f"emphasis {s}": Method(lambda s=s: rho1("emphasis", s), "rho1", trains=s == "excess") for s in RHO1_SCORES},
    "select excess, scope dataset": Method(lambda: rho1("select", scope="dataset"), "rho1"),
    "protect(select excess)": Method(lambda: protect(rho1("select")), "protect"),
    "dft, raw": Method(lambda: dft(normalize="raw"), "dft"),
    "dft": Method(dft, "dft"),
    "asft 0.1": Method(lambda: dft(normalize="raw"), "asft", anchor=0.1),
    "entropy, top 0.2": Method(lambda: entropy("select", percentile=0.2), "entropy"),
    "entropy, soft": Method(lambda: entropy("soft"), "entropy", trains=False),
    "eaft, raw": Method(eaft, "eaft"),
    "eaft": Method(lambda: eaft(normalize="mean"), "eaft"),
    "profit, raw": Method(profit, "profit"),
    "profit": Method(lambda: profit(normalize="mean"), "profit"),
    "infosft, raw": Method(infosft, "infosft"),
    "infosft": Method(lambda: infosft(normalize="mean"), "infosft"),
    "talr, raw": Method(talr, "talr"),
    "talr": Method(lambda: talr(normalize="mean"), "talr"),
    "prift, raw": Method(prift, "prift", reference="initial"),
    "prift": Method(lambda: prift(normalize="mean"), "prift", reference="initial"),
    "prift mass, raw": Method(lambda: prift("mass"), "prift", reference="initial"),
    "prift mass": Method(lambda: prift("mass", normalize="mean"), "prift", reference="initial"),
    "sstoken": Method(sstoken, "sstoken", reference="initial"),
    "token_cleaning": Method(token_cleaning, "token_cleaning"),
    "wit, 0.3 and 1": Method(given, "wit", data="prompts"),
}

# Methods that a claim is made of, and the one whose weights their controls draw anew. `select` gives a document of n
# targets the same weights whatever it ranks by, n / kept and 0, so that its controls are those of the ratio as well.
CONTROLLED = {"select relative_excess": "select excess"} | {
    name: name
    for name in (
        "select excess",
        "select excess, scope dataset",
        "protect(select excess)",
        "emphasis excess",
        "soft excess",
        "token_cleaning",
    )
}
_DETECTS = ("shuffled(select excess)", "random_matched(select excess)", "random_matched(soft excess)")


def controls(name: str) -> tuple[str, str]:
    """The names of a controlled method's two controls."""
    return f"shuffled({CONTROLLED[name]})", f"random_matched({CONTROLLED[name]})"


CONTROL_PAIRS = tuple((name, control) for name in CONTROLLED for control in controls(name))
METHODS |= {
    control: Method(lambda of=METHODS[name].weighting, r=redraw: r(of()), "controls", detects=control in _DETECTS)
    for name in CONTROLLED
    if CONTROLLED[name] == name
    for control, redraw in zip(controls(name), (shuffled, random_matched), strict=True)
}
