"""k-step logits of a next-token model that must stay as it is: a baseline for evaluation, not trained heads."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wmtp.errors import UserError


class TeacherForced(nn.Module):
    """A next-token model seen as H heads: head k at position t gives the model's own logits at position t + k - 1.

    Head k thus predicts token t + k like any k-th head, but it has read the true tokens up to t + k - 1, which a
    trained head at t has not: its cross-entropy is a bound to compare with, and it has nothing to decode from.

    A pair (t, k) is valid where token t + k exists in t's document. Then position t + k - 1 lies in that document too
    (documents are contiguous), so no valid pair reads another document. For the last k - 1 positions of a row there is
    no such position and no target either: their hidden states and logits are zeros, finite, never the prediction of a
    valid pair (`wmtp.loss.valid_targets` leaves them out).

    Args:
        model: gives [B, S, V] or [1, B, S, V] logits, bare or as ``.logits``, when called with tokens.
        num_future_tokens: H.
    """

    def __init__(self, model: nn.Module, num_future_tokens: int) -> None:
        super().__init__()
        if num_future_tokens < 1:
            raise UserError(f"num_future_tokens must be >= 1, got {num_future_tokens}")
        self.model = model
        self.num_future_tokens = num_future_tokens

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self.model.max_seq_len

    def forward(self, tokens: Tensor, *, loss_fn: Callable | None = None, **inputs: Any) -> Any:
        """Logits [H, B, S, V], or ``loss_fn`` of the shifted hidden states, if the model is an MTPDecoder with H = 1.

        Args:
            tokens: [B, S].
            loss_fn: as in :meth:`wmtp.models.MTPDecoder.forward`.
            **inputs: passed on to the model.
        """
        if loss_fn is None:
            logits = self.model(tokens, **inputs)
            return self._shifted(getattr(logits, "logits", logits))

        def shifted_loss(hidden: Tensor, unembedding: Tensor, **kwargs: Any) -> Any:
            return loss_fn(self._shifted(hidden), unembedding, **kwargs)

        return self.model(tokens, loss_fn=shifted_loss, **inputs)

    def _shifted(self, x: Tensor) -> Tensor:
        """[B, S, X] or [1, B, S, X] -> [H, B, S, X], row k - 1 moved k - 1 positions towards the start."""
        if x.dim() == 4 and x.shape[0] == 1:
            x = x[0]
        if x.dim() != 3:
            raise UserError(f"teacher_forced needs a model that gives [B, S, V] or [1, B, S, V], got {tuple(x.shape)}")
        heads = x.new_zeros((self.num_future_tokens, *x.shape))
        for shift in range(min(self.num_future_tokens, x.shape[1])):
            heads[shift, :, : x.shape[1] - shift] = x[:, shift:]
        return heads


def teacher_forced(model: nn.Module, num_future_tokens: int) -> TeacherForced:
    """``model`` with H = ``num_future_tokens`` teacher-forced heads; its weights are shared, not copied."""
    return TeacherForced(model, num_future_tokens)
