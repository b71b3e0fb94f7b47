"""Methods that weigh a token by the policy's loss or entropy and a reference model's loss."""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import NORMALIZE, Signals, Weighting, check_choice, check_clip, check_range
from wmtp.weighting.over_data import DataThreshold
from wmtp.weighting.rows import SCOPES, clipped_mean_one, is_flat, top_share, z_score


def uniform() -> Weighting:
    """Plain multi-token prediction: every target token counts the same, and no weight is computed."""
    return Weighting(lambda signals: signals.labels[None], lambda scores, mask: mask, needs=(), strength=0.0)


def rho1(
    mode: str = "select",
    score: str = "excess",
    percentile: float = 0.6,
    temperature: float = 1.0,
    boost: float = 2.0,
    min_weight: float = 0.1,
    max_weight: float = 5.0,
    strength: float = 1.0,
    scope: str = "sequence",
    per_head: bool = False,
) -> Weighting:
    """Weights from the excess of the policy's loss over a reference model's (Rho-1, Lin et al. 2024, arXiv 2404.07965).

    score_j = CE_policy,head1(j) - CE_ref(j), signed (their eq. 3). It is high for tokens that the reference shows to be
    learnable and that the policy has not learnt yet. Scores without spread (a policy equal to its reference) give
    weight 1 everywhere and a warning.

    Args:
        mode: ``select``: the top ``percentile`` share of the scope's targets get 1 / kept share, the rest 0 (the
            paper's rule, their eq. 4-5; clip does not apply). ``soft``: N * softmax(z-score / temperature), clipped.
            ``emphasis``: soft, with the top share multiplied by ``boost`` before scaling.
        score: ``excess``, ``abs_excess`` = |excess|, ``relative_excess`` = excess / CE_ref, ``reference`` = -CE_ref.
        percentile: share of targets kept or boosted, in (0, 1]; 0.6 to 0.7 in the paper.
        temperature: of the softmax, > 0; large is uniform.
        boost: factor of the top share in ``emphasis``, >= 1.
        min_weight, max_weight: clip of the continuous modes, 0 <= min <= 1 <= max. Mean 1 and the clip hold together.
        strength: lambda in [0, 1]; the loss uses (1 - lambda) + lambda * w. 0 is plain MTP.
        scope: ``sequence`` or ``batch``; ``dataset``: one threshold over the whole data set, in mode ``select``: exact
            where a column gives the score (``reference``), else in each epoch that of the epoch before, and in the
            first one that of each micro-batch (:class:`wmtp.weighting.over_data.DataThreshold`).
        per_head: score every head by its own CE, weights [H, B, S]. For k > 1 the score also measures the context that
            the head lacks.

    Raises:
        ValueError: a value out of its range.
    """
    check_choice("score", score, tuple(_SCORES))
    needs = {"reference_ce"} if score == "reference" else {"policy_ce", "reference_ce"}
    rule = by_rank(mode, percentile, temperature, boost, min_weight, max_weight)
    why_flat = "the policy equals its reference there"
    ranked = ranked_in(scope, _SCORES[score], needs, rule, mode, percentile, why_flat, per_head=per_head)
    return Weighting(**ranked, strength=strength)


_SCORES: dict[str, Callable[[Signals], Tensor]] = {
    "excess": lambda s: s.policy_ce - s.reference_ce,
    "abs_excess": lambda s: (s.policy_ce - s.reference_ce).abs(),
    # A reference CE near zero would make any excess infinite; 1e-3 nats is below what a float32 CE resolves usefully.
    "relative_excess": lambda s: (s.policy_ce - s.reference_ce) / s.reference_ce.clamp(min=1e-3),
    "reference": lambda s: -s.reference_ce[None],
}


def dft(
    temperature: float = 1.0,
    min_weight: float = 0.0,
    max_weight: float = 5.0,
    strength: float = 1.0,
    scope: str = "sequence",
    per_head: bool = False,
    normalize: str = "mean",
) -> Weighting:
    """Weights proportional to the policy's own probability of the target (DFT, Wu et al. 2025, arXiv 2508.05629).

    w_j is proportional to p(target_j)^(1 / temperature), p = exp(-CE) of head 1, without a gradient. At temperature 1
    this is the paper's -sg(p) log p, but scaled to mean 1 and clipped: only the choice of tokens differs from plain
    MTP, not the size of the loss.

    Args:
        temperature: > 0; 1 is the paper's, large is uniform.
        min_weight, max_weight: clip, 0 <= min <= 1 <= max. Mean 1 and the clip hold together.
        strength: lambda in [0, 1]; 0 is plain MTP.
        scope: ``sequence`` or ``batch``.
        per_head: weigh every head's loss by its own probability, weights [H, B, S].
        normalize: ``mean``, or ``raw``: w_j = p(target_j)^(1 / temperature) as published, without clip. That shrinks
            the loss and the step (:mod:`wmtp.weighting.published`).

    Raises:
        ValueError: a value out of its range.
    """
    check_range("temperature", temperature, 0 < temperature < math.inf, "> 0")
    check_choice("normalize", normalize, NORMALIZE)
    bounds = check_clip(min_weight, max_weight)
    raw = normalize == "raw"
    return Weighting(
        lambda signals: -signals.policy_ce / temperature,
        lambda log_p, mask: log_p.exp() if raw else clipped_mean_one(log_p, mask, *bounds),
        needs={"policy_ce"},
        scope=scope,
        strength=strength,
        per_head=per_head,
        bounds=(0.0, 1.0) if raw else bounds,
        mean_one="never" if raw else "always",
    )


def entropy(
    mode: str = "select",
    percentile: float = 0.2,
    temperature: float = 1.0,
    boost: float = 2.0,
    min_weight: float = 0.1,
    max_weight: float = 5.0,
    strength: float = 1.0,
    scope: str = "sequence",
) -> Weighting:
    """Weights from the entropy of the policy's distribution (Wang et al. 2025, arXiv 2506.01939).

    score_j = entropy of head 1's distribution for target j, in nats. The paper trains on the fifth of the tokens where
    the policy is least certain: the forks of a text. Scores without spread give weight 1 everywhere and a warning.

    Args:
        mode, percentile, temperature, boost, min_weight, max_weight, strength, scope: as in :func:`rho1`; the paper
            selects with percentile 0.2.

    Raises:
        ValueError: a value out of its range.
    """
    rule = by_rank(mode, percentile, temperature, boost, min_weight, max_weight)
    score = lambda signals: signals.policy_entropy
    ranked = ranked_in(
        scope, score, {"policy_entropy"}, rule, mode, percentile, "the policy is equally certain there"
    )  # fmt: skip
    return Weighting(**ranked, strength=strength)


def ranked_in(
    scope: str,
    score: Callable[[Signals], Tensor],
    needs: Collection[str],
    rule: tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]],
    mode: str,
    percentile: float,
    why_flat: str,
    *,
    per_head: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a weighting that ranks scores in a scope by a rule of :func:`by_rank`, or over the data.

    Raises:
        ValueError: an unknown scope, or what one threshold for a data set cannot be.
    """
    check_choice("scope", scope, (*SCOPES, "dataset"))
    if scope != "dataset":
        to_weights, bounds = rule
        common = {"needs": needs, "scope": scope, "per_head": per_head, "why_flat": why_flat}
        return {"score": score, "to_weights": to_weights, "bounds": bounds, **common}
    if mode != "select" or per_head:
        said = "per_head=true" if per_head else f"mode={mode}"
        raise UserError(f"scope dataset keeps a share of all targets by one threshold: mode must be select, got {said}")
    threshold = DataThreshold(score, needs, percentile)
    return {"score": threshold.score, "to_weights": threshold.weigh, "needs": needs, **threshold.of_weighting}


def by_rank(
    mode: str,
    percentile: float,
    temperature: float = 1.0,
    boost: float = 1.0,
    min_weight: float = 0.0,
    max_weight: float = 1.0,
) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float]]:
    """Returns the rule of a mode ``select``, ``soft`` or ``emphasis`` (see :func:`rho1`) and its range of weights."""
    check_choice("mode", mode, ("select", "soft", "emphasis"))
    check_range("percentile", percentile, 0 < percentile <= 1, "in (0, 1]")
    check_range("temperature", temperature, 0 < temperature < math.inf, "> 0")
    check_range("boost", boost, 1 <= boost < math.inf, ">= 1")
    clip = check_clip(min_weight, max_weight)

    def to_weights(scores: Tensor, mask: Tensor) -> Tensor:
        if mode == "select":
            top = top_share(scores, mask, percentile)
            weights = top * (mask.sum(1, keepdim=True) / top.sum(1, keepdim=True).clamp(min=1))
        else:
            log_weights = z_score(scores, mask) / temperature
            if mode == "emphasis":
                log_weights = log_weights + math.log(boost) * top_share(scores, mask, percentile)
            weights = clipped_mean_one(log_weights, mask, *clip)
        return torch.where(is_flat(scores, mask), mask.to(weights.dtype), weights)

    # select gives n / max(1, round(percentile * n)), which is largest where percentile * n is just below 1.5.
    return to_weights, (0.0, 1.5 / percentile) if mode == "select" else clip
