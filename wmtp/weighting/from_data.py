"""Weights that the data carry (wmtp.data.weights), alone or times those of a method."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.weighting.base import NORMALIZE, AnyWeighting, Signals, any_weighting, check_choice, is_checked
from wmtp.weighting.rows import SCOPES, ScopeRows, is_flat, mean_one_unless_zero, weigh_rows


def given(
    combine: str = "replace",
    method: Callable[[Signals], Tensor | None] | None = None,
    normalize: str = "raw",
    scope: str = "sequence",
) -> "Given":
    """Weights that the data give: of a row, a turn, a character or a token, and of prompts (prompt_weight).

    Args:
        combine: ``replace``: the data's weights alone. ``multiply``: those times the weights of ``method``.
        method: with ``multiply``: any weighting, a section with a ``_component_``.
        normalize: ``raw``: as they are, so that a row of weight 2 counts twice; weights of 2 throughout double the
            loss. ``mean``: the weights, or the products, are scaled to mean 1 over the targets of each scope; where
            all are 0 they stay 0.
        scope: of ``mean``: ``sequence`` (a document), in which a row's weight cancels out, or ``batch`` (all documents
            of a micro-batch on one process).

    Raises:
        ValueError: an unknown choice, or a method without ``multiply`` or the reverse.
    """
    check_choice("combine", combine, ("replace", "multiply"))
    check_choice("normalize", normalize, NORMALIZE)
    check_choice("scope", scope, SCOPES)
    if (combine == "multiply") != (method is not None):
        raise UserError(
            f"method must be set with combine=multiply and only there (a section with a _component_), got "
            f"combine={combine} and method={'null' if method is None else 'a weighting'}"
        )
    return Given(method, normalize, scope)


class Given(AnyWeighting):
    """A weighting that reads the signal ``weight``, and multiplies it with a method's weights.

    Args:
        method: a weighting, or any callable from signals to weights: its needs, its state and its end of a step are
            passed through. None: there are none but the data's.
        normalize, scope: as in :func:`given`.
    """

    def __init__(self, method: Callable[[Signals], Tensor | None] | None, normalize: str, scope: str) -> None:
        inner = any_weighting((lambda signals: None) if method is None else method)
        super().__init__(inner)
        self.needs = inner.needs | {"weight"}
        self.name = "given" if method is None else f"given({inner.name})"
        self.scope, self.bounds = scope, (0.0, float("inf"))
        self.mean_one = "unless_zero" if normalize == "mean" else "never"

    @torch.no_grad()
    def __call__(self, signals: Signals) -> Tensor:
        """Returns weights of the method's shape, [B, S] or [H, B, S].

        Raises:
            ValueError: the data have no weights, or a weight is not finite.
        """
        signals.require(self.needs)
        weights = self._rule(signals)
        by_head = weights is not None and weights.dim() == 3
        valid = signals.valid if by_head else signals.valid[:1]
        product = torch.where(valid, signals.weight.detach().float(), 0.0)
        if weights is not None:
            product = product * (weights if by_head else weights[None])
        if self.mean_one != "never":
            rows = signals.rows(len(valid), self.scope)
            if weights is None and self.scope == "sequence" and is_checked(signals.step) and len(rows.row):
                _warn_of_lost(rows.lay(product[rows.place]), rows)
            product = weigh_rows(product, rows, mean_one_unless_zero)
        return product if by_head else product[0]


def _warn_of_lost(weights: Tensor, rows: ScopeRows) -> None:
    lost = is_flat(weights, rows.mask) & (weights[:, :1] != 0) & ((weights[:, :1] - 1).abs() > 1e-6)
    if bool(lost.any()):
        warnings.warn(
            f"given: {int(lost.sum())} of {len(lost)} documents have one weight for all their targets, which mean 1 "
            "over a sequence removes; use normalize=raw, or scope=batch",
            stacklevel=3,
        )
