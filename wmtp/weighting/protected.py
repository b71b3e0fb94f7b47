"""Tokens that a method must not starve, such as the end of a text."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import AnyWeighting, Signals, any_weighting
from wmtp.weighting.rows import clipped_mean


def protect(method: Callable[[Signals], Tensor | None], tokens: Sequence[int | str] = ("eos",)) -> "Protected":
    """Weights of a method, of which those of some tokens never fall below 1.

    A method that keeps a share of the tokens often drops the end of a text, which is easy to predict; a model trained
    so may no longer stop. Of a scope with mean 1 all weights are scaled down, those tokens' to 1 at least, so that the
    mean stays 1:

        w' = max(c w, 1) for the tokens, c w for others, 0 <= c <= 1

    Args:
        method: any weighting, a section with a ``_component_``.
        tokens: token ids, and ``eos`` and ``bos`` for the tokenizer's.

    Raises:
        ValueError: no token, or something else than ids and these names.
    """
    names = (tokens,) if isinstance(tokens, str | int) else tuple(tokens)
    for name in names:
        if isinstance(name, bool) or not (name in ("eos", "bos") or (isinstance(name, int) and name >= 0)):
            raise UserError(f"tokens must be token ids, eos or bos, got {name!r}")
    if not names:
        raise UserError("tokens is empty: nothing would be protected; give ids, or eos")
    return Protected(method, names)


class Protected(AnyWeighting):
    """A weighting around ``method``, see :func:`protect`; its needs, state and end of a step are the method's."""

    def __init__(self, method: Callable[[Signals], Tensor | None], tokens: tuple[int | str, ...]) -> None:
        inner = any_weighting(method)
        super().__init__(inner)
        self.name = f"protect({inner.name})"
        self.scope, self.mean_one = inner.scope, inner.mean_one if inner.mean_one == "always" else "never"
        self.bounds = (0.0, max(1.0, inner.bounds[1]))
        self._tokens = tokens
        self._ids: Tensor | None = None
        if not any(isinstance(token, str) for token in tokens):
            self._ids = torch.tensor(tokens)

    def prepare(self, tokenizer: Any, data: Any) -> None:
        """Looks up the names among the tokens."""
        ids = [getattr(tokenizer, f"{token}_id") if isinstance(token, str) else token for token in self._tokens]
        lacking = [token for token, id in zip(self._tokens, ids, strict=True) if id is None]
        if lacking:
            raise UserError(f"{self.name}: the tokenizer has no {lacking[0]}; give the token's id")
        self._ids = torch.tensor(ids)
        super().prepare(tokenizer, data)

    def rehearse(self) -> None:
        """Protects a token of a vocabulary, in a plan."""
        self._ids = torch.zeros(1, dtype=torch.int64) if self._ids is None else self._ids
        super().rehearse()

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor | None:
        """Returns weights of the method's shape; None where the method gives None (all ones)."""
        weights = self._rule(signals)
        if weights is None:
            return None
        if self._ids is None:
            raise ValueError(f"{self.name} has not been told the tokenizer; call prepare(tokenizer, data) first")
        own = weights if weights.dim() == 3 else weights[None]
        valid = signals.valid[: len(own)]
        kept = valid & torch.isin(signals.labels, self._ids.to(signals.labels.device))
        raised = torch.where(kept, own.clamp(min=1.0), own)
        if self.mean_one == "always":
            rows = signals.rows(len(own), self.scope)
            least = rows.lay(kept[rows.place].to(own.dtype)).double()
            one = torch.ones_like(least[:, :1])
            logs, most = rows.lay(own[rows.place]).double().log(), torch.full_like(least, math.inf)
            scaled = rows.pick(clipped_mean(logs, rows.mask, least, most, one))
            raised = raised.clone()
            raised[rows.place] = scaled.to(raised.dtype)
        return raised if weights.dim() == 3 else raised[0]
