"""Weights of other papers, as published or scaled to mean 1; all from the target's probability and a reference's.

p = exp(-CE) is the policy's probability of the target, p0 the reference's, neither with a gradient. ``normalize: raw``
is the published form, sum_j w_j CE_j / N over all N targets: with weights below 1 it shrinks the loss, and with it the
step. ``mean`` scales the weights to mean 1 in each scope, so that only the choice of tokens differs from plain
training; a scope whose weights are all 0 stays so. A comparison runs both, or tunes the rate.
"""

import math
from typing import Any

import torch
from torch import Tensor

from wmtp.weighting.base import NORMALIZE, Signals, Weighting, check_choice, check_range
from wmtp.weighting.methods import by_rank, ranked_in
from wmtp.weighting.rows import mean_one_unless_zero


def eaft(alpha: float = 1.0, normalize: str = "raw", strength: float = 1.0, scope: str = "batch") -> Weighting:
    """Weights by the entropy of the policy's likeliest tokens (EAFT, arXiv 2601.02151).

        w = (H20 / 3)^alpha,    H20 the entropy, in nats, of head 1's 20 largest logits alone (at most log 20 = 3.0)

    The label plays no part: what is certain is muted, right or wrong.

    Args:
        alpha: > 0.
        normalize: ``raw`` (published) or ``mean``, see :mod:`wmtp.weighting.published`.
        strength: lambda in [0, 1]; the loss uses (1 - lambda) + lambda * w. 0 is plain MTP.
        scope: of ``mean``: ``sequence`` or ``batch``.

    Raises:
        ValueError: a value out of its range.
    """
    check_range("alpha", alpha, 0 < alpha < math.inf, "> 0")
    return Weighting(
        lambda signals: (signals.policy_top20_entropy / 3.0) ** alpha,
        needs={"policy_top20_entropy"},
        **_scaled(normalize, strength, scope, (math.log(20) / 3.0) ** alpha),
    )


def profit(threshold: float = 0.1, normalize: str = "raw", strength: float = 1.0, scope: str = "batch") -> Weighting:
    """Weights 1 for targets that the policy holds likely, 0 for others (ProFit, arXiv 2601.09195).

        w = 1 where p > threshold, else 0

    Args:
        threshold: in [0, 1); 0.1 in the paper, which divides by all targets (``raw``).
        normalize, strength, scope: as in :func:`eaft`.

    Raises:
        ValueError: a value out of its range.
    """
    check_range("threshold", threshold, 0 <= threshold < 1, "in [0, 1)")
    return Weighting(
        lambda signals: (signals.policy_ce < -math.log(max(threshold, 1e-38))).float(),
        needs={"policy_ce"},
        **_scaled(normalize, strength, scope, 1.0),
    )


def infosft(ceiling: float = 0.93, normalize: str = "raw", strength: float = 1.0, scope: str = "batch") -> Weighting:
    """Weights highest for targets that the policy half knows (InfoSFT, arXiv 2605.14967).

        w = p * max(0, 1 - logit(p) / logit(ceiling)),    logit(p) = log(p / (1 - p))

    It is 0 from the ceiling on, and at most 0.508, near p = 0.568, for the paper's ceiling.

    Args:
        ceiling: P, in (0.5, 1); 0.93 in the paper.
        normalize, strength, scope: as in :func:`eaft`.

    Raises:
        ValueError: a value out of its range.
    """
    check_range("ceiling", ceiling, 0.5 < ceiling < 1, "in (0.5, 1)")
    top = math.log(ceiling / (1 - ceiling))

    def score(signals: Signals) -> Tensor:
        ce = signals.policy_ce
        logit = -ce - torch.log(-torch.expm1(-ce.clamp(min=1e-7)))  # log p - log(1 - p)
        return torch.exp(-ce) * (1 - logit / top).clamp(min=0)

    # p (1 - logit(p) / top) <= p (1 + |logit(p)| / top), and p |log p| <= 1 / e.
    return Weighting(score, needs={"policy_ce"}, **_scaled(normalize, strength, scope, 1.0 + 1 / (math.e * top)))


def talr(floor: float = 0.01, normalize: str = "raw", strength: float = 1.0, scope: str = "batch") -> Weighting:
    """Weights by the target's probability at a temperature that follows the loss (TALR).

        w = max(floor, p^(1 / tau)),    tau = median over the micro-batch's documents of their mean CE

    Their own normalisation is not established; both are offered.

    Args:
        floor: least weight, in [0, 1].
        normalize, strength, scope: as in :func:`eaft`.

    Raises:
        ValueError: a value out of its range.
    """
    check_range("floor", floor, 0 <= floor <= 1, "in [0, 1]")

    def score(signals: Signals) -> Tensor:
        ce = signals.policy_ce
        rows = signals.rows(1, "sequence")
        if not len(rows.row):
            return torch.ones_like(ce)
        means = rows.lay(ce[rows.place]).sum(1) / rows.mask.sum(1)
        return torch.exp(-ce / means.median().clamp(min=1e-6)).clamp(min=floor)

    return Weighting(score, needs={"policy_ce"}, **_scaled(normalize, strength, scope, 1.0))


def prift(
    signal: str = "prob", normalize: str = "raw", strength: float = 1.0, scope: str = "batch", threshold: float = 0.5
) -> Weighting:
    """Weights by what the initial model held likely (PriFT, arXiv 2606.09396).

        prob    w = p0(y)
        mass    w = 1 where u >= threshold, else 0;    u = p0(y) + sum of p0(v) over the tokens v with p0(v) < p0(y)

    for the target y: u is 1 for the likeliest token and small for one that others crowd out. Of p0 = (0.4, 0.3, 0.2,
    0.1), the third token has u = 0.3 and weight 0, the second u = 0.6 and weight 1. Tokens exactly as likely as y are
    no part of u. The reference is the model that training starts from, frozen; weights from the policy itself would
    reinforce themselves, as its authors say of DFT.

    Args:
        signal: ``prob``, which reads ``reference_ce``, or ``mass``, which reads ``reference_mass``.
        normalize, strength, scope: as in :func:`eaft`.
        threshold: of ``mass``, in (0, 1]; 0.5 in the paper.

    Raises:
        ValueError: a value out of its range.
    """
    check_choice("signal", signal, ("prob", "mass"))
    check_range("threshold", threshold, 0 < threshold <= 1, "in (0, 1]")
    if signal == "mass":
        score, needs = lambda signals: (signals.reference_mass >= threshold).float()[None], {"reference_mass"}
    else:
        score, needs = lambda signals: torch.exp(-signals.reference_ce)[None], {"reference_ce"}
    return Weighting(score, needs=needs, **_scaled(normalize, strength, scope, 1.0))


def sstoken(percentile: float = 0.6, strength: float = 1.0, scope: str = "sequence") -> Weighting:
    """Weights that keep the targets which the policy has learnt most since an earlier self (ssToken, 2510.18250).

        score = CE_reference - CE_policy;  the top ``percentile`` share of a scope's targets is kept, with mean 1

    The reference is an earlier state of the same model, such as the one that training starts from. This is the paper's
    gamma = 1: its other half, the attention that a target pays to the prompt, is left out.

    Args:
        percentile: rho, in (0, 1]; 0.6 in the paper.
        strength, scope: as in :func:`wmtp.weighting.rho1`; the paper ranks in a sequence.

    Raises:
        ValueError: a value out of its range.
    """
    score = lambda signals: signals.reference_ce - signals.policy_ce
    needs, rule = {"policy_ce", "reference_ce"}, by_rank("select", percentile)
    ranked = ranked_in(scope, score, needs, rule, "select", percentile, "the policy equals its earlier self there")
    return Weighting(**ranked, strength=strength)


def _scaled(normalize: str, strength: float, scope: str, most: float) -> dict[str, Any]:
    """Returns the arguments of a weighting whose scores are its weights, at most ``most``, or those with mean 1."""
    check_choice("normalize", normalize, NORMALIZE)
    raw = normalize == "raw"
    return {
        "to_weights": (lambda scores, mask: scores) if raw else mean_one_unless_zero,
        "scope": scope,
        "strength": strength,
        "bounds": (0.0, most if raw else math.inf),
        "mean_one": "never" if raw or 0 < strength < 1 else "unless_zero",
    }
