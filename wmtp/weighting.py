"""Token weights: which target tokens the loss should care about.

A weight belongs to a target token j, the same for every head that predicts it (DESIGN section 2). A weighting is an
object with

    needs_policy_ce: None | "head1" | "all"     which of the policy's own CE it reads, computed without a gradient
    needs_reference: bool                       whether it reads the reference model's CE
    __call__(labels, valid, document_ids, policy_ce, reference_ce) -> weights [B, S] or [H, B, S], or None for all ones

To add a method, subclass nothing: write a function from scores to log-weights and pass it through :func:`weigh_rows`,
or write a class with the attributes above and name it as `_component_` in a config.

Weights have mean 1 over the valid targets of their scope, lie in [min_weight, max_weight], are 0 where there is no
target, finite, and carry no gradient. The scope `sequence` is one document (so packing changes nothing), `batch` all
documents of one micro-batch on one rank.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_SPREAD = 1e-6  # scores closer together than this say nothing: float32 noise of two equal models' CE
_NEG_INF = float("-inf")


class Uniform:
    """Plain multi-token prediction: every target token counts the same."""

    needs_policy_ce = None
    needs_reference = False

    def __call__(self, labels, valid, document_ids=None, policy_ce=None, reference_ce=None) -> None:
        return None


class Rho1:
    """Weights from the excess of the policy's loss over a reference model's (Rho-1, Lin et al. 2024, arXiv 2404.07965).

    score_j = CE_policy,head1(j) - CE_ref(j), signed (their eq. 3): tokens the reference finds learnable and the policy
    has not learnt yet. Scores without spread (a policy equal to its reference) give weight 1 everywhere and a warning.

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
        scope: ``sequence`` or ``batch``.
        per_head: score every head by its own CE, weights [H, B, S]. For k > 1 this also measures context that the
            head does not have.
    """

    needs_reference = True

    def __init__(
        self,
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
    ) -> None:
        _one_of("mode", mode, ("select", "soft", "emphasis"))
        _one_of("score", score, tuple(_SCORES))
        _one_of("scope", scope, ("sequence", "batch"))
        _inside("percentile", percentile, 0 < percentile <= 1, "in (0, 1]")
        _inside("temperature", temperature, 0 < temperature < math.inf, "> 0")
        _inside("boost", boost, 1 <= boost < math.inf, ">= 1")
        _inside("min_weight", min_weight, 0 <= min_weight <= 1, "in [0, 1]")
        _inside("max_weight", max_weight, 1 <= max_weight < math.inf, ">= 1 and finite")
        _inside("strength", strength, 0 <= strength <= 1, "in [0, 1] (lambda)")
        self.mode, self.score, self.percentile, self.temperature, self.boost = (
            mode, score, percentile, temperature, boost,
        )  # fmt: skip
        self.min_weight, self.max_weight, self.strength = min_weight, max_weight, strength
        self.scope, self.per_head = scope, per_head
        # With lambda = 0 no weight is computed, so the run is plain MTP bit for bit and as fast.
        self.needs_reference = strength > 0
        self.needs_policy_ce = None if strength == 0 or score == "reference" else "all" if per_head else "head1"

    def __call__(self, labels, valid, document_ids=None, policy_ce=None, reference_ce=None) -> Tensor | None:
        """Weights [B, S], or [H, B, S] with ``per_head``.

        Args:
            labels: [B, S], unused by this method.
            valid: [H, B, S] bool from :func:`wmtp.loss.valid_targets`.
            document_ids: [B, S] or None.
            policy_ce: [1 or H, B, S] CE of the policy's heads.
            reference_ce: [B, S] CE of the reference for each target.
        """
        if self.strength == 0:
            return None
        if reference_ce is None:
            raise ValueError("rho1 weighting needs a reference model or a reference_ce column, got neither")
        heads = valid.shape[0] if self.per_head else 1
        policy = torch.zeros_like(reference_ce)[None] if policy_ce is None else policy_ce[:heads].detach().float()
        scores = _SCORES[self.score](policy, reference_ce.detach().float())  # [heads, B, S]
        weights = weigh_rows(scores.expand(heads, *labels.shape), valid[:heads], document_ids, self.scope, self._rows)
        weights = (1 - self.strength) * valid[:heads] + self.strength * weights
        return weights if self.per_head else weights[0]

    def _rows(self, scores: Tensor, mask: Tensor) -> Tensor:
        """[G, L] scores and mask of G scopes -> [G, L] weights; every row with a target has at least one True."""
        if self.mode == "select":
            top = top_share(scores, mask, self.percentile)
            weights = top * (mask.sum(1, keepdim=True) / top.sum(1, keepdim=True).clamp(min=1))
        else:
            log_weights = z_score(scores, mask) / self.temperature
            if self.mode == "emphasis":
                log_weights = log_weights + math.log(self.boost) * top_share(scores, mask, self.percentile)
            weights = clipped_mean_one(log_weights, mask, self.min_weight, self.max_weight)
        flat = spread(scores, mask) <= _SPREAD  # [G, 1]
        several = flat & (mask.sum(1, keepdim=True) > 1)
        if bool(several.any()):
            warnings.warn(
                f"rho1: scores without spread in {int(several.sum())} of {len(mask)} scopes (the policy equals its "
                "reference there): these get weight 1 everywhere",
                stacklevel=2,
            )
        return torch.where(flat, mask.to(weights.dtype), weights)


_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "excess": lambda policy, reference: policy - reference,
    "abs_excess": lambda policy, reference: (policy - reference).abs(),
    # A reference CE near zero would make any excess infinite; 1e-3 nats is below what a float32 CE resolves usefully.
    "relative_excess": lambda policy, reference: (policy - reference) / reference.clamp(min=1e-3),
    "reference": lambda policy, reference: -reference[None],
}


# ----------------------------------------------------------------------------------------------------------------------
# Building blocks: pure functions over rows. A row [L] holds the scores of one scope; mask says which are real.


def weigh_rows(
    scores: Tensor,
    valid: Tensor,
    document_ids: Tensor | None,
    scope: str,
    rows_fn: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Gather each scope's scores into a padded row, apply ``rows_fn(scores [G, L], mask [G, L])``, scatter back.

    Args:
        scores, valid: [H, B, S]; heads never share a scope.
        scope: ``sequence`` (one document) or ``batch`` (all of [B, S]).

    Returns:
        [H, B, S] float32, 0 where not valid.

    Raises:
        ValueError: if a valid score is not finite.
    """
    heads, batch, seq = valid.shape
    device = valid.device
    scope_id = torch.arange(heads, device=device).view(-1, 1, 1)
    if scope == "sequence":
        scope_id = scope_id * batch + torch.arange(batch, device=device).view(1, -1, 1)
        if document_ids is not None:
            scope_id = scope_id * (seq + 2) + (document_ids.clamp(min=-1) + 1)
    scope_id = scope_id.expand(heads, batch, seq)[valid]  # [N], in order of position
    values = scores[valid].float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{int((~torch.isfinite(values)).sum())} of {values.numel()} token scores are not finite")
    weights = torch.zeros(valid.shape, dtype=torch.float32, device=device)
    if values.numel() == 0:
        return weights
    _, group, count = torch.unique(scope_id, return_inverse=True, return_counts=True)
    order = torch.argsort(group, stable=True)
    column = torch.arange(order.numel(), device=device) - (count.cumsum(0) - count)[group[order]]
    rows = values.new_zeros(count.numel(), int(count.max()))
    mask = torch.zeros_like(rows, dtype=torch.bool)
    rows[group[order], column] = values[order]
    mask[group[order], column] = True
    weighed = torch.empty_like(values)
    weighed[order] = rows_fn(rows, mask)[group[order], column].float()
    weights[valid] = weighed
    return weights


def z_score(scores: Tensor, mask: Tensor) -> Tensor:
    """(score - mean) / standard deviation of each row's real entries, zeros without spread: [G, L] float64."""
    x = scores.double()
    count = mask.sum(1, keepdim=True).clamp(min=1)
    x = (x - (x * mask).sum(1, keepdim=True) / count) * mask
    std = (x.square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(std > _SPREAD, x / std.clamp(min=_SPREAD), torch.zeros_like(x))


def spread(scores: Tensor, mask: Tensor) -> Tensor:
    """Largest minus smallest real score of each row: [G, 1]."""
    high = scores.masked_fill(~mask, _NEG_INF).amax(1, keepdim=True)
    low = scores.masked_fill(~mask, math.inf).amin(1, keepdim=True)
    return (high - low).clamp(min=0)


def top_share(scores: Tensor, mask: Tensor, share: float) -> Tensor:
    """The round(share * n) >= 1 highest of each row's n real entries, ties to the earlier position: [G, L] float."""
    keep = (mask.sum(1, keepdim=True) * share).round().clamp(min=1)
    order = scores.masked_fill(~mask, _NEG_INF).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return ((rank < keep) & mask).to(scores.dtype)


def clipped_mean_one(log_weights: Tensor, mask: Tensor, min_weight: float, max_weight: float) -> Tensor:
    """clip(exp(log_weights + c), min, max) with the c of each row that makes the mean over the real entries 1.

    Clipping and normalising in turn would break one of the two; the mean of the clipped weights grows with c, so c is
    found by bisection between -max(log_weights), where all weights are at most 1, and -min(log_weights), where all are
    at least 1. Then the entries inside the clip are scaled once more, exactly.

    Args:
        log_weights: [G, L], any finite values; working in logs, weights never underflow before they are scaled.
        mask: [G, L] bool.
        min_weight, max_weight: 0 <= min <= 1 <= max.

    Returns:
        [G, L] float64, 0 where masked out.
    """
    logs = log_weights.double()
    count = mask.sum(1, keepdim=True).clamp(min=1)
    low = -logs.masked_fill(~mask, _NEG_INF).amax(1, keepdim=True).nan_to_num(neginf=0.0)
    high = -logs.masked_fill(~mask, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)

    def clipped(shift: Tensor) -> Tensor:
        return (logs + shift).exp().clamp(min_weight, max_weight) * mask

    for _ in range(60):
        middle = (low + high) / 2
        below = clipped(middle).sum(1, keepdim=True) < count
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    weights = clipped(high)
    free = (weights > min_weight) & (weights < max_weight) & mask
    missing = count - (weights * ~free).sum(1, keepdim=True)
    scale = missing / (weights * free).sum(1, keepdim=True).clamp(min=1e-300)
    exact = torch.where(free & (scale > 0), weights * scale, weights).clamp(min_weight, max_weight)
    return exact * mask


def weight_statistics(weights: Tensor, targets: Tensor) -> dict[str, float]:
    """Percentiles, kept share and effective sample size of the weights of the real targets.

    Args:
        weights, targets: same shape; ``targets`` is bool.

    Returns:
        ``p25, p75, p95, max, kept_share`` (share of targets with weight > 0) and ``effective_sample_size``
        = (sum w)^2 / (N * sum w^2), the share of the targets that the weights amount to (Kish 1965), in (0, 1].
        Empty when there is no target.
    """
    w = weights[targets].double()
    if w.numel() == 0:
        return {}
    quantiles = torch.quantile(w, torch.tensor([0.25, 0.75, 0.95], dtype=w.dtype, device=w.device)).tolist()
    return {
        **dict(zip(("p25", "p75", "p95"), quantiles, strict=True)),
        "max": w.max().item(),
        "kept_share": (w > 0).double().mean().item(),
        "effective_sample_size": (w.sum().square() / (w.numel() * w.square().sum()).clamp(min=1e-300)).item(),
    }


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"weighting.{name} must be one of {', '.join(allowed)}, got {value!r}")


def _inside(name: str, value: float, ok: bool, allowed: str) -> None:
    if not ok:
        raise ValueError(f"weighting.{name} must be {allowed}, got {value}")
