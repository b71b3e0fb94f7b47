"""The loss of a training step: weights from the signals that a weighting needs, then the fused loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from wmtp.loss.anchor import AnchorStates
from wmtp.loss.fused import (
    MTPLoss,
    token_cross_entropy,
    token_cross_entropy_and_entropy,
    weighted_mtp_cross_entropy,
)
from wmtp.loss.soft_targets import SoftTargets, TopTokens
from wmtp.loss.target_logits import of_each_target
from wmtp.numerics.cross_entropy import cross_entropy_
from wmtp.weighting.base import Signals, any_weighting, check_weights, is_checked
from wmtp.weighting.targets import Targets, valid_targets


def mtp_loss(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    weighting: Callable[[Signals], Tensor | None],
    *,
    document_ids: Tensor | None = None,
    head_weights: Tensor | None = None,
    signals: Mapping[str, Tensor] | None = None,
    targets: Targets | None = None,
    head_targets: SoftTargets | None = None,
    teacher: TopTokens | None = None,
    trunk_gradient: Sequence[float] | None = None,
    anchor: AnchorStates | None = None,
    step: int = 0,
) -> MTPLoss:
    """Computes the loss with the weights of ``weighting`` (see wmtp.weighting), which gets the signals that it needs.

    Weights that depend on the policy's own CE or entropy cost one more GEMM a token for each head that they read: for
    head 1 alone 3H + 1 in all. This CE is then not computed again for tokens of weight zero.

    Args:
        hidden, unembedding, labels, document_ids, head_weights: as in :func:`weighted_mtp_cross_entropy`.
        weighting: a callable from Signals to weights, with any or none of the attributes of
            :class:`~wmtp.weighting.AnyWeighting`; a plain function needs no CE of the policy.
        signals: columns of the data and figures of frozen models by name, [B, S], for the weighting to read. A
            ``policy_ce`` [B, S] or [1 or H, B, S] among them comes from an earlier pass (the epoch's start); the
            weights, and only they, read it in place of the present one.
        targets: of the same labels and document_ids on the host: of a step's rows nothing but the number that a
            weighting keeps is waited for.
        head_targets: what heads 2 to H learn; by default the labels alone. The distributions of head 1 cost one more
            GEMM a target of head 1, unless the weighting has its CE taken anyway.
        teacher: the distributions of a frozen model, in place of head 1's.
        trunk_gradient, anchor: as in :func:`weighted_mtp_cross_entropy`.
        step: optimizer step, for weightings that draw anew each step. In the first three and every 20th the weights
            are held against what the weighting promises (:func:`~wmtp.weighting.check_weights`).

    Raises:
        ValueError: for shapes that do not fit, weights that break the promise, and what the weighting refuses.
    """
    weighting = any_weighting(weighting)
    needs = weighting.needs
    heads = hidden if weighting.per_head else hidden[:1]
    named, ce = dict(signals or {}), None
    targets = targets or Targets(labels, document_ids)
    if "policy_entropy" in needs:
        ce, entropy = token_cross_entropy_and_entropy(heads, unembedding, labels, targets=targets)
        named["policy_entropy"] = entropy[:1]
    elif "policy_top20_entropy" in needs:
        ce = token_cross_entropy(heads, unembedding, labels, targets=targets) if weighting.per_head else None
        found, named["policy_top20_entropy"] = of_each_target(
            _ce_and_top_entropy, hidden[:1], unembedding, labels, targets
        )
        ce = found if ce is None else ce
    elif head_targets is not None and teacher is None and not weighting.per_head:
        ce, teacher = top_tokens(hidden, unembedding, labels, head_targets, targets=targets)
    elif "policy_ce" in needs and "policy_ce" not in named:
        ce = token_cross_entropy(heads, unembedding, labels, document_ids=document_ids, targets=targets)
    if head_targets is not None and teacher is None:
        teacher = top_tokens(hidden, unembedding, labels, head_targets, targets=targets)[1]
    if "policy_ce" in named:
        named["policy_ce"] = named["policy_ce"].reshape(-1, *labels.shape)
    elif ce is not None:
        named["policy_ce"] = ce
    valid, training = valid_targets(labels, hidden.shape[0], document_ids), torch.is_grad_enabled()
    seen = Signals(labels, valid, document_ids, named, step=step, training=training, targets=targets)
    with torch.no_grad():
        weights = weighting(seen)
    if is_checked(step):
        check_weights(weights, seen, weighting)
    return weighted_mtp_cross_entropy(
        hidden,
        unembedding,
        labels,
        weights,
        document_ids=document_ids,
        head_weights=head_weights,
        known_ce=ce,
        targets=targets,
        soft_targets=None if head_targets is None or teacher is None else (head_targets, teacher),
        trunk_gradient=trunk_gradient,
        anchor=anchor,
    )


@torch.no_grad()
def top_tokens(
    hidden: Tensor, unembedding: Tensor, labels: Tensor, head_targets: SoftTargets, *, targets: Targets
) -> tuple[Tensor, TopTokens]:
    """Computes CE [1, B, S] and the distributions of head 1 at each target, in one pass (one GEMM a target).

    Arguments as in :func:`mtp_loss`.
    """
    figures = head_targets.and_top_tokens(lambda logits, label: cross_entropy_(logits, label)[:1])
    ce, *tokens = of_each_target(figures, hidden[:1], unembedding, labels, targets)
    return ce, TopTokens(*(x[0] for x in tokens))


def _ce_and_top_entropy(logits: Tensor, label: Tensor, count: int = 20) -> tuple[Tensor, Tensor]:
    """Returns CE, and the entropy of the distribution cut to its likeliest tokens, of each row of logits: [C], [C]."""
    log_p = torch.log_softmax(logits.topk(min(count, logits.shape[1])).values, dim=1)
    return cross_entropy_(logits, label)[0], -(log_p.exp() * log_p).sum(1)
