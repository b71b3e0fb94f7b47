"""One tensor that several branches read, with a factor for each branch's gradient, and how well these agree."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fork(x: Tensor, factors: Sequence[float], agreement: Tensor | None = None) -> tuple[Tensor, ...]:
    """Returns x for each branch. The gradient of x is the sum of the branches', each times its factor.

    A branch with factor 0 reads x detached: its backward pass ends there.

    Args:
        factors: one for each branch.
        agreement: [2, branches] float32, to which the backward pass adds for each branch's gradient g its product with
            the first's, and with itself.
    """
    if (agreement is None and set(factors) == {1.0}) or not (torch.is_grad_enabled() and x.requires_grad):
        return (x,) * len(factors)
    joined = iter(_Fork.apply(x, tuple(factor for factor in factors if factor), agreement))
    return tuple(next(joined) if factor else x.detach() for factor in factors)


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """Returns x with its gradient times a factor; with 0, detached."""
    return fork(x, (factor,))[0]


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factors, agreement):
        ctx.factors, ctx.agreement = factors, agreement
        return tuple(x.view_as(x) for _ in factors)

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.agreement is not None:
            flat = [gradient.flatten().float() for gradient in gradients]
            ctx.agreement += torch.stack([torch.stack([g @ flat[0], g @ g]) for g in flat], dim=1)
        total = None
        for factor, gradient in zip(ctx.factors, gradients, strict=True):
            scaled = gradient if factor == 1 else gradient * factor
            total = scaled if total is None else total + scaled
        return total, None, None
