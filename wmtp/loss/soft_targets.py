"""Soft targets: a head learns another one's distribution of the same token, beside the data's token or in its place.

    loss_k(j) = hard * CE_k(j) + soft * KL(q_j || p_k(j))        for the heads k = 2..H, at the same target position j

q_j is the teacher's distribution of target j, without a gradient, cut to its ``top_k`` likeliest tokens and scaled to
sum 1; p_k is head k's over the whole vocabulary. The teacher is the policy's own head 1, one to H - 1 positions later
(MTP-D, arXiv 2603.23911, which also cuts p_k to these tokens), or a frozen model (Kirchenbauer et al., 2602.06019).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.cross_entropy import cross_entropy_

TEACHERS = ("head1", "reference")


class TopTokens(NamedTuple):
    """The likeliest tokens of each target's distribution."""

    probabilities: Tensor  # [B, S, N] float32, sum 1
    ids: Tensor  # [B, S, N] int64


class SoftTargets:
    """What heads 2 to H learn; the function of a config's `head_targets`.

    Args:
        soft: factor of the divergence, >= 0.
        hard: factor of the cross-entropy of the data's tokens, >= 0; 0 is soft targets alone.
        top_k: tokens of the teacher's distribution that are kept. They take 12 bytes each and target.
        temperature: of the teacher's distribution, >= 0; 1 is as it is, 0 its likeliest token alone.
        teacher: ``head1``: the policy's own; ``reference``: the frozen `reference_model`.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        soft: float = 1.0,
        hard: float = 0.0,
        top_k: int = 64,
        temperature: float = 1.0,
        teacher: str = "head1",
    ) -> None:
        for name, value, least in (("soft", soft, 0), ("hard", hard, 0), ("temperature", temperature, 0)):
            if not least <= value < math.inf:
                raise UserError(f"{name} must be a number >= {least}, got {value}")
        if not soft + hard > 0:
            raise UserError("soft and hard are both 0: the heads would learn nothing; give one of them a factor")
        if top_k < 1:
            raise UserError(f"top_k must be a whole number >= 1, got {top_k!r}")
        if teacher not in TEACHERS:
            raise UserError(f"teacher must be one of {', '.join(TEACHERS)}, got {teacher!r}")
        self.soft, self.hard, self.teacher = float(soft), float(hard), teacher
        self.top_k, self.temperature = top_k if temperature else 1, float(temperature)

    def and_top_tokens(
        self, figures: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
        """Returns a function for `of_each_target` that gives the figures and then the fields of :class:`TopTokens`."""

        def both(logits: Tensor, label: Tensor) -> tuple[Tensor, ...]:
            values, ids = logits.topk(min(self.top_k, logits.shape[1]))  # the figures may overwrite the logits
            probabilities = torch.softmax(values / (self.temperature or 1.0), dim=1)
            return *figures(logits, label), probabilities, ids

        return both

    def of_rows(self, tokens: TopTokens, place: Tensor) -> "SoftRows":
        """Returns the soft targets of rows at ``place`` [N], each of a target of a head, in [H*B*S]."""
        count = tokens.ids[..., 0].numel()
        extra = place >= count  # of a head other than the first
        hard, soft = (torch.where(extra, factor, first) for factor, first in ((self.hard, 1.0), (self.soft, 0.0)))
        return SoftRows(tokens.probabilities.flatten(0, 1), tokens.ids.flatten(0, 1), place % count, hard, soft)


@dataclass(frozen=True)
class SoftRows:
    """The soft targets of the N rows of the fused loss."""

    probabilities: Tensor  # [B*S, top_k]
    ids: Tensor
    target: Tensor  # [N] place of each row's target in [B*S]
    hard: Tensor  # [N] factor of the cross-entropy; 1 for head 1
    soft: Tensor  # [N] factor of the divergence; 0 for head 1

    def losses_(
        self, logits: Tensor, label: Tensor, weight: Tensor | None, part: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes CE, divergence, and the gradient of w (hard CE + soft KL) in the logits: [C], [C], [C, V] or None.

        Args:
            logits, label, weight, dtype: of a chunk, as in :func:`wmtp.numerics.cross_entropy.cross_entropy_`.
            part: which of the N rows the chunk has.
        """
        target, hard, soft = self.target[part], self.hard[part], self.soft[part]
        ids, q = self.ids[target], self.probabilities[target]
        z, z_label = logits.gather(1, ids), logits.gather(1, label[:, None])
        # w ((hard + soft) p - hard onehot - soft q)
        ce, gradient = cross_entropy_(logits, label, None if weight is None else weight * (hard + soft), dtype)
        if weight is not None and gradient is not None:
            pull = (weight * soft)[:, None]
            gradient.scatter_add_(1, label[:, None], pull.to(dtype)).scatter_add_(1, ids, (-pull * q).to(dtype))
        kl = torch.xlogy(q, q).sum(1) + ce + z_label.squeeze(1) - (q * z).sum(1)  # ce + z_label is the logsumexp
        return ce, kl * (soft > 0), gradient
