"""The k-step logits of an unchanged next-token model: a baseline for evaluation, not trained heads."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wmtp.errors import UserError


class TeacherForced(nn.Module):
    """A next-token model as H heads: head k at position t gives the model's own logits at position t + k - 1.

    So head k predicts token t + k like any k-th head, but it has read the true tokens up to t + k - 1, which a trained
    head at t has not. Its cross-entropy is a bound to compare with; nothing can be decoded from it.

    A pair (t, k) is valid where token t + k exists in t's document. Then position t + k - 1 lies in that document too
    (documents are contiguous), so no valid pair reads another document. The last k - 1 positions of a row have neither
    such a position nor a target: their hidden states and logits are zeros, and `valid_targets` of
    wmtp.weighting.targets leaves them out.

    Args:
        model: returns [B, S, V] or [1, B, S, V] logits, bare or as ``.logits``, when called with tokens.
        num_future_tokens: H.
    """

    model: Any

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
        """Computes logits [H, B, S, V], or, of an MTPDecoder with H = 1, ``loss_fn`` of the shifted hidden states."""
        if loss_fn is None:
            logits = self.model(tokens, **inputs)
            return self._shifted(getattr(logits, "logits", logits))

        def shifted_loss(hidden: Tensor, unembedding: Tensor, **kwargs: Any) -> Any:
            return loss_fn(self._shifted(hidden), unembedding, **kwargs)

        return self.model(tokens, loss_fn=shifted_loss, **inputs)

    def _shifted(self, x: Tensor) -> Tensor:
        """Shifts [B, S, X] or [1, B, S, X] to [H, B, S, X]: row k - 1 is moved k - 1 positions towards the start."""
        if x.dim() == 4 and x.shape[0] == 1:
            x = x[0]
        if x.dim() != 3:
            raise UserError(f"teacher_forced needs a model that gives [B, S, V] or [1, B, S, V], got {tuple(x.shape)}")
        heads = x.new_zeros((self.num_future_tokens, *x.shape))
        for shift in range(min(self.num_future_tokens, x.shape[1])):
            heads[shift, :, : x.shape[1] - shift] = x[:, shift:]
        return heads
