"""An anchor keeps head 1 near a frozen model's distributions, whatever weights its tokens have (ASFT, 2509.23753).

    loss_1(j) = w_j CE_1(j) + weight * KL(p0_j || p_j)        for each target j of head 1

p is head 1's distribution and p0 the frozen model's, both over the whole vocabulary; no token weight scales the
divergence. With p0 = (0.5, 0.5), p = (0.8, 0.2) and weight 0.1 it adds 0.1 (0.5 ln(0.5 / 0.8) + 0.5 ln(0.5 / 0.2)),
which is 0.0223.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.cross_entropy import cross_entropy_
from wmtp.numerics.products import mm_float32, operand


class AnchorStates(NamedTuple):
    """What the frozen model gives of a batch: its logits are made a chunk at a time, in the loss."""

    hidden: Tensor  # [B, S, D'] normed states of its head 1
    unembedding: Tensor | None  # [V, D']; None: the policy's own, which is not trained
    weight: float


class Anchor:
    """A divergence from a frozen model beside the weighted loss; the function of a config's section `anchor`.

    Full fine-tuning holds head 1 against `reference_model`, LoRA against the model with its adapters off. It is
    multiplied by head 1's b_k and divided by the same number as the loss, so that of one head it is weight * mean KL.

    Args:
        weight: lambda, > 0; 0.05 or 0.1 in the paper, 0.03 in bfloat16 in its code.

    Raises:
        ValueError: a weight out of range.
    """

    def __init__(self, weight: float = 0.1) -> None:
        if not 0 < weight < math.inf:
            raise UserError(f"anchor: weight must be a number > 0, got {weight!r}; leave the section out to have none")
        self.weight = float(weight)
        self._unembedding: Tensor | None = None

    def require_model(self, reference_model: Any) -> None:
        """Refuses a config without the `reference_model` that full fine-tuning needs."""
        if reference_model is None:
            raise UserError("anchor needs the frozen model that head 1 stays near; set reference_model, or anchor=null")

    def require_adapters(self, adapters: Any) -> None:
        """Refuses LoRA's settings under which the model without its adapters is not what it began as, or all there is.

        Args:
            adapters: :class:`wmtp.models.lora.Adapters`.
        """
        trained = [key for key in ("train_norms", "train_unembedding") if getattr(adapters, key)]
        if adapters.trunk == "frozen":
            raise UserError(
                "anchor: adapters.trunk is frozen, so that head 1 never moves; set it to lora, or anchor=null"
            )
        if trained:
            raise UserError(f"anchor: {trained[0]} changes the model without its adapters too; set it to false")

    @torch.no_grad()
    def of_adapted(self, hidden: Tensor, unembedding: Tensor, **_: Any) -> AnchorStates:
        """Reads a model whose adapters are off, as the ``loss_fn`` of its forward pass."""
        return AnchorStates(hidden[0], None, self.weight)

    @torch.no_grad()
    def of_model(self, hidden: Tensor, unembedding: Tensor) -> AnchorStates:
        """Reads a frozen model, inside its forward pass: FSDP2 has its unembedding whole there. It is copied once."""
        if self._unembedding is None:
            self._unembedding = unembedding.detach().clone()
        return AnchorStates(hidden[0], self._unembedding, self.weight)


class AnchorRows:
    """The anchor of the rows of head 1 in the fused loss.

    Args:
        states: of the batch.
        unembedding: the policy's.
        factor: b_1, a scalar.
    """

    def __init__(self, states: AnchorStates, unembedding: Tensor, factor: Tensor) -> None:
        own = unembedding if states.unembedding is None else states.unembedding
        if len(own) != len(unembedding):
            raise ValueError(f"the anchor's model has {len(own)} tokens, the policy {len(unembedding)}")
        self._rows, self._matrix = states.hidden.flatten(0, 1), operand(own.detach())
        self.weight = states.weight * factor

    def losses_(
        self, logits: Tensor, label: Tensor, weight: Tensor | None, source: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes CE, divergence, and the gradient of w CE + weight KL in the logits: [C], [C], [C, V] or None.

        Args:
            logits, label, weight, dtype: of a chunk, as in :func:`wmtp.numerics.cross_entropy.cross_entropy_`.
            source: [C] positions in [B*S] from which head 1 predicts the targets.
        """
        frozen = mm_float32(operand(self._rows[source]), self._matrix.T)  # [C, V] logits
        shift = frozen.logsumexp(1) - logits.logsumexp(1)
        p0 = torch.softmax(frozen, dim=1)
        divergence = torch.bmm(p0[:, None], frozen.sub_(logits)[:, :, None]).view(-1) - shift
        if weight is None:
            return cross_entropy_(logits, label)[0], divergence, None
        # w (p - onehot) + a (p - p0) = (w + a) (p - onehot) + a (onehot - p0), rounded once
        ce, gradient = cross_entropy_(logits, label, weight + self.weight)
        assert gradient is not None
        p0.scatter_add_(1, label[:, None], torch.full_like(divergence, -1.0)[:, None])
        return ce, divergence, gradient.sub_(p0.mul_(self.weight)).to(dtype)
