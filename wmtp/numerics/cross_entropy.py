"""The cross-entropy of rows of logits with its gradient or the entropy, in the logits' own memory.

On CUDA one Triton kernel reads each row twice, the second time mostly from the cache, and writes the gradient rounded
once to the operands' dtype: 10 bytes a bfloat16 logit. On a CPU torch's softmax does most of it in one pass over a row.
"""

import torch
from torch import Tensor

from wmtp.numerics.products import on_cuda


def cross_entropy_(
    logits: Tensor, label: Tensor, weight: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor | None]:
    """Computes CE = logsumexp(z) - z[label] of each row and, with weights, the gradient w * (softmax(z) - onehot).

    Args:
        logits: [C, V] float32, each row contiguous. They are overwritten.
        label: [C] column of each row.
        weight: [C] float32; None: no gradient.
        dtype: of the gradient, which is computed in float32 and rounded once; float32 or half precision.

    Returns:
        (ce [C] float32, gradient [C, V] or None); the gradient lies in the memory of the logits.
    """
    if on_cuda(logits):
        gradient = None
        if weight is not None:  # a narrower one in the first half of each row
            gradient = logits if dtype == torch.float32 else logits.view(dtype)[:, : logits.shape[1]]
        return softmax_rows(logits, label, weight, gradient)[0], gradient
    picked = label[:, None]
    target_logit, top = logits.gather(1, picked), logits.amax(dim=1, keepdim=True)
    p = torch.softmax(logits, dim=1, out=logits)
    ce = (top - p.amax(dim=1, keepdim=True).log() - target_logit).squeeze(1)  # the greatest p is 1 / sum exp(z - top)
    if weight is None:
        return ce, None
    gradient = p.mul_(weight[:, None]).scatter_add_(1, picked, -weight[:, None])
    return ce, gradient.to(dtype)


def cross_entropy_and_entropy_(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Computes CE and entropy, logsumexp(z) - sum_v p_v z_v with p = softmax(z), of each row: [C] float32, in nats.

    Arguments as in :func:`cross_entropy_`.
    """
    if on_cuda(logits):
        ce, entropy = softmax_rows(logits, label, entropy=True)
        assert entropy is not None
        return ce, entropy
    target_logit = logits.gather(1, label[:, None]).squeeze(1)  # [C]
    top = logits.amax(dim=1)
    shifted = logits.sub_(top[:, None])
    exp = shifted.exp()
    exp_sum = exp.sum(dim=1)
    # sum_v p_v z_v as one product of rows: no third buffer. Rounding must not make a certain token negative.
    mean = torch.bmm(exp[:, None], shifted[:, :, None]).view(-1) / exp_sum
    return exp_sum.log() + top - target_logit, (exp_sum.log() - mean).clamp(min=0)


def cross_entropy_and_mass_(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Computes CE, and p[label] + the sum of p over the columns where it is less, p = softmax(z): [C] float32 each.

    Columns with the very logit of the label, other than it, are not counted. Arguments as in :func:`cross_entropy_`.
    """
    below = logits < logits.gather(1, label[:, None])
    exp = (logits - logits.amax(dim=1, keepdim=True)).exp_()
    total, own = exp.sum(dim=1), exp.gather(1, label[:, None]).squeeze(1)
    mass = (exp.mul_(below).sum(dim=1) + own) / total
    return cross_entropy_(logits, label)[0], mass.clamp(max=1.0)


def softmax_rows(
    logits: Tensor,
    label: Tensor,
    weight: Tensor | None = None,
    gradient: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Runs the kernel: CE [C], the entropy [C] if wanted, and the gradient, written where it is given."""
    from wmtp.numerics import softmax_kernel  # Triton comes with torch's builds for CUDA, and not with all others

    return softmax_kernel.softmax_rows(logits, label, weight, gradient, entropy)
