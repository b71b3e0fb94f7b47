"""What a frozen reference model says of each target, in one forward pass beside the policy's."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from wmtp.loss.anchor import Anchor
from wmtp.loss.soft_targets import SoftTargets, TopTokens
from wmtp.loss.target_logits import default_chunk, of_each_target
from wmtp.numerics.cross_entropy import cross_entropy_, cross_entropy_and_mass_
from wmtp.weighting.targets import Targets

SIGNALS = ("reference_ce", "reference_mass")


class ReferenceReading:
    """The ``loss_fn`` of the reference model's forward pass: one GEMM a target of its head 1, no [B, S, V].

        reference_ce     CE of the target, in nats
        reference_mass   p0(y) + the sum of p0(v) over the tokens v with p0(v) < p0(y), for the target y: in (0, 1]

    Tokens of exactly y's logit, other than y, are not part of the mass.

    Args:
        needs: names of signals; those of the reference among them are read.
        soft_targets: read its distributions too, where the reference is the teacher.
        anchor: hand on its states, for the loss.

    Attributes:
        asked: whether there is anything to read.
    """

    def __init__(
        self, needs: Collection[str], soft_targets: SoftTargets | None = None, anchor: Anchor | None = None
    ) -> None:
        self._teaches = soft_targets if soft_targets is not None and soft_targets.teacher == "reference" else None
        self._names = [name for name in SIGNALS if name in needs]
        self._anchor = anchor
        self._scores = bool(self._names) or self._teaches is not None
        self.asked = self._scores or anchor is not None

    @torch.no_grad()
    def __call__(
        self,
        hidden: Tensor,
        unembedding: Tensor,
        labels: Tensor,
        *,
        document_ids: Tensor | None = None,
        targets: Targets | None = None,
    ) -> dict[str, Any]:
        """Returns ``signals``, those asked for, [B, S] float32, 0 where no target; and ``teacher`` and ``anchor``, for
        :func:`wmtp.loss.mtp_loss`, None where it is not that.

        Arguments as in :func:`wmtp.loss.token_cross_entropy`.
        """
        hidden, targets = hidden[:1], targets or Targets(labels, document_ids)
        anchor = None if self._anchor is None else self._anchor.of_model(hidden, unembedding)
        if not self._scores:
            return {"signals": {}, "teacher": None, "anchor": anchor}
        mass, size = "reference_mass" in self._names, default_chunk(hidden, unembedding)
        figures: Callable[[Tensor, Tensor], tuple[Tensor, ...]] = cross_entropy_and_mass_ if mass else _cross_entropy_
        if self._teaches is not None:
            figures = self._teaches.and_top_tokens(figures)
        size = max(1, size // 2) if mass else size  # it has a second buffer
        found = [x[0] for x in of_each_target(figures, hidden, unembedding, labels, targets, size)]
        read = dict(zip(SIGNALS[: 1 + mass], found, strict=False))
        teacher = None if self._teaches is None else TopTokens(*found[len(read) :])
        return {"signals": {name: read[name] for name in self._names}, "teacher": teacher, "anchor": anchor}


def _cross_entropy_(logits: Tensor, label: Tensor) -> tuple[Tensor, ...]:
    return cross_entropy_(logits, label)[:1]
