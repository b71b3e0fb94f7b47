"""The fused token-weighted multi-token loss: linear + softmax cross-entropy, without [B, S, V] logits.

One pass over the tokens, a chunk at a time. A chunk's logits live in one reused buffer, and its gradients are taken
while they are there, so a training step costs three GEMMs a token (logits, d_hidden, d_unembedding) and never the
fourth that recomputing the logits in the backward pass would.

Notation (used throughout the library): B batch, S sequence, D embed_dim, V vocab_size, H future tokens (heads).
Head k in 1..H at position t predicts the token at t + k of the same document. Everything per token, `labels`,
`weights` and the returned `ce`, is indexed by the *target* position j = t + k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmtp.errors import UserError
from wmtp.loss.anchor import AnchorRows, AnchorStates
from wmtp.loss.soft_targets import SoftTargets, TopTokens
from wmtp.loss.target_logits import chunked_logits, default_chunk, of_each_target, rows_of
from wmtp.numerics.cross_entropy import cross_entropy_, cross_entropy_and_entropy_
from wmtp.numerics.products import add_mm_float32, operand
from wmtp.weighting.rows import LOOK_AT
from wmtp.weighting.targets import Targets, valid_targets


class MTPLoss(NamedTuple):
    """The result of :func:`weighted_mtp_cross_entropy`; only ``loss_sum`` carries a gradient.

    It is a tuple because FSDP2 hooks the backward pass onto the tensors that it finds in the root module's output.

    Divide sums of ``loss_sum`` by sums of ``num_targets``, once per optimizer step, over all ranks and micro-steps:
    the result depends neither on the world size nor on how the step is cut into micro-batches.
    """

    loss_sum: Tensor  # scalar, float32: sum_k b_k * sum_j w_j * CE_k(j), or with soft targets what they make of CE_k
    num_targets: Tensor  # scalar, float32: sum_k b_k * N_k
    ce: Tensor  # [H, B, S] float32: cross-entropy of head k for target j, 0 where it predicts none
    valid: Tensor  # [H, B, S] bool: where head k predicts target j
    weights: Tensor | None  # [B, S] or [H, B, S] as given, None for all ones
    divergence: Tensor | None = None  # [H] float32: sum of the divergences from soft targets; None without them
    anchor_kl: Tensor | None = None  # scalar, float32: sum of head 1's divergences from the anchor; None without one


def head_weight_tensor(
    values: Sequence[float] | None, num_heads: int, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Returns the head weights b_k as a tensor [H] float32; None, which means all ones, stays None.

    Raises:
        ValueError: not one number >= 0 per head, or all are 0.
    """
    if values is None:
        return None
    values = list(values)
    if len(values) != num_heads or any(v < 0 for v in values) or sum(values) == 0:
        raise UserError(f"head_weights must be {num_heads} numbers >= 0, not all 0, got {values}")
    return torch.tensor(values, dtype=torch.float32, device=device)


def weighted_mtp_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    document_ids: Tensor | None = None,
    head_weights: Tensor | None = None,
    known_ce: Tensor | None = None,
    targets: Targets | None = None,
    soft_targets: tuple[SoftTargets, TopTokens] | None = None,
    trunk_gradient: Sequence[float] | None = None,
    anchor: AnchorStates | None = None,
    chunk_tokens: int | None = None,
) -> MTPLoss:
    """Computes the sum of the weighted cross-entropies of all heads, and its gradients in the same pass.

        loss_sum = sum_k b_k * sum_{(t, k) valid} w_{t+k} * CE_k(t)        (docs/method.md: S_k)

    with CE_k(t) = logsumexp(z) - z[label_{t+k}], z = unembedding @ hidden[k, t]. Rows without a target take part in no
    GEMM, and rows of weight zero in neither of the two gradient GEMMs. An input that needs no gradient (a frozen
    unembedding) saves its GEMM. Logits and CE are float32 whatever the operands are (wmtp.numerics.products), and the
    gradient of the unembedding is accumulated in float32.

    Args:
        hidden: [H, B, S, D] normed hidden states, float32 or bfloat16.
        unembedding: [V, D], same dtype and device.
        labels: [B, S] token ids, -100 where a token is no target.
        weights: [B, S], a weight per target token, or [H, B, S], one per head and target; carries no gradient. None is
            plain multi-token prediction. Values where no head has a target are never read.
        document_ids: [B, S]; a head never predicts across a document's edge.
        head_weights: [H] b_k >= 0; None is all ones.
        known_ce: [B, S] or [H', B, S] CE of the first heads, if already computed: it saves the rows of weight zero.
        targets: of the same labels and document_ids on the host, so that plain prediction waits for no device.
        soft_targets: what heads 2 to H learn beside, or in place of, the labels, and the distributions; CE_k above is
            then hard * CE_k + soft * KL_k (:mod:`wmtp.loss.soft_targets`). The returned ``ce`` is that of the labels.
        trunk_gradient: H factors of the gradient that a head gives to the unembedding. Rows of a head with 0 take no
            part in its GEMM; a decoder applies the same factors to trunk and norm. Head 1's is not 0.
        anchor: adds a divergence to head 1's loss (:mod:`wmtp.loss.anchor`), for one more GEMM in the forward pass for
            each of its targets, all of which have a gradient then.
        chunk_tokens: rows per chunk; by default chosen by device and V.

    Raises:
        ValueError: for shapes that do not fit together, weights that require a gradient, or one that is not finite.
    """
    num_heads, batch, seq, _ = hidden.shape
    weights_shape = None if weights is None else tuple(weights.shape)
    if labels.shape != (batch, seq):
        raise ValueError(f"labels must be [B, S] = {(batch, seq)} like hidden [H, B, S, D], got {tuple(labels.shape)}")
    if weights is not None and weights_shape not in ((batch, seq), (num_heads, batch, seq)):
        raise ValueError(f"weights must be {(batch, seq)} or {(num_heads, batch, seq)}, got {weights_shape}")
    if weights is not None and weights.requires_grad:
        raise ValueError("weights must carry no gradient: detach them")
    if head_weights is not None and head_weights.shape != (num_heads,):
        raise ValueError(f"head_weights must have one value per head, {num_heads}, got {tuple(head_weights.shape)}")
    if hidden.shape[-1] != unembedding.shape[-1] or hidden.dtype != unembedding.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and unembedding {tuple(unembedding.shape)} "
            f"{unembedding.dtype} must share D and dtype"
        )

    if not torch.is_grad_enabled():  # an autograd.Function is told of requires_grad even under no_grad
        hidden, unembedding = hidden.detach(), unembedding.detach()
    valid = valid_targets(labels, num_heads, document_ids)
    b = torch.ones(num_heads, device=hidden.device) if head_weights is None else head_weights.float()
    num_targets = (b * valid.sum(dim=(1, 2))).sum()

    ce = hidden.new_zeros(valid.shape, dtype=torch.float32)
    row_weight = b[:, None, None] if weights is None else b[:, None, None] * weights.float()
    factors = tuple(trunk_gradient or (1.0,) * num_heads)
    if len(factors) != num_heads or not factors[0]:
        raise ValueError(f"trunk_gradient must have one factor per head, {num_heads}, head 1's > 0, got {factors}")
    if weights is None and head_weights is None and known_ce is None and all(factors):
        targets = targets or Targets(labels, document_ids)
        place = targets.place(num_heads, labels.device)
        ends = 0 if anchor is None else len(targets.place(1, labels.device)), len(place), len(place)
    else:
        # The valid (head, target) pairs become rows: first those with a gradient (before the others those that give the
        # unembedding one, of which head 1's come first), so that chunks are of one kind, then those whose CE alone is
        # still to be found. The host waits for the device once, for how many there are of each.
        has_gradient = valid & (row_weight != 0)
        if anchor is not None:
            has_gradient[0] = valid[0]
        wanted = valid
        if known_ce is not None:
            known = known_ce.detach().float().reshape(-1, batch, seq)
            known = known if soft_targets is None else known[:1]  # the divergence of the others is not known
            ce[: len(known)] = known * valid[: len(known)]
            wanted = has_gradient.clone()
            wanted[len(known) :] = valid[len(known) :]
        bad = valid & ~row_weight.isfinite()
        joint = has_gradient[[head for head, factor in enumerate(factors) if factor]]
        counts = torch.stack([x.sum() for x in (has_gradient[0], joint, has_gradient, wanted, bad)]).tolist()
        ends, num_rows, num_bad = (counts[0], counts[1], counts[2]), counts[3], counts[4]
        if num_bad:
            raise UserError(f"{num_bad} weights of targets are not finite; {LOOK_AT}")
        kind = torch.where(has_gradient, 0, torch.where(wanted, 2, 3)).to(torch.int8)
        for head, factor in enumerate(factors):
            if not factor:
                kind[head] += has_gradient[head]
        place = kind.flatten().argsort(stable=True)[:num_rows]  # [N], in [H*B*S]

    if chunk_tokens is None:  # an anchored row has three buffers of float32
        chunk_tokens = max(1, default_chunk(hidden, unembedding) // (1 if anchor is None else 2))
    row_factor = None
    if not set(factors) <= {0.0, 1.0}:
        row_factor = torch.tensor(factors, device=hidden.device)[place // labels.numel()]
    soft_rows = None if soft_targets is None else soft_targets[0].of_rows(soft_targets[1], place)
    anchored = None if anchor is None else AnchorRows(anchor, unembedding, b[0])
    loss_sum, row_ce, row_divergence, anchor_kl = _FusedLinearCrossEntropy.apply(
        hidden,
        unembedding,
        rows_of(place, labels),
        labels.flatten()[place % labels.numel()],
        row_weight.expand(valid.shape).flatten()[place],
        soft_rows,
        row_factor,
        anchored,
        ends,
        chunk_tokens,
    )
    ce.view(-1)[place] = row_ce
    by_head = None
    if soft_rows is not None:
        by_head = row_divergence.new_zeros(num_heads).index_add_(0, place // labels.numel(), row_divergence)
    return MTPLoss(loss_sum, num_targets, ce, valid, weights, by_head, anchor_kl)


@torch.no_grad()
def token_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    targets: Targets | None = None,
) -> Tensor:
    """Computes the CE of every head for every target, without a gradient: [H, B, S] float32, 0 where no target.

    It costs one GEMM a token. ``hidden`` may hold only the first heads; else as in :func:`weighted_mtp_cross_entropy`.
    """
    return weighted_mtp_cross_entropy(hidden, unembedding, labels, document_ids=document_ids, targets=targets).ce


@torch.no_grad()
def token_cross_entropy_and_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    targets: Targets | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the CE of every target and the entropy of its predicted distribution in one pass (one GEMM a token).

        entropy = -sum_v p_v log p_v = logsumexp(z) - sum_v p_v z_v,    p = softmax(z), in nats

    Arguments as in :func:`weighted_mtp_cross_entropy`; ``hidden`` may hold only the first heads.

    Returns:
        (ce, entropy), each [H, B, S] float32, indexed by the target's position, 0 where no target.
    """
    size = chunk_tokens or max(1, default_chunk(hidden, unembedding) // 2)  # two buffers of float32 a chunk
    targets = targets or Targets(labels, document_ids)
    ce, entropy = of_each_target(cross_entropy_and_entropy_, hidden, unembedding, labels, targets, size)
    return ce, entropy


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The sum of weighted CE and the CE of each row; the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx, hidden, unembedding, source, label, weight, soft, factor, anchor, ends, chunk_tokens):
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])  # [H*B*S, D]
        needs_hidden, needs_unembedding = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(flat_hidden) if needs_hidden else None
        d_unembedding = None  # [V, D] float32
        # The first rows give the unembedding a gradient too, the next the hidden states alone, the others their CE.
        first, joint, split = ends if needs_hidden or needs_unembedding else (ends[0], 0, 0)
        first = 0 if anchor is None else first  # rows that are anchored
        row_ce = torch.empty(source.numel(), dtype=torch.float32, device=hidden.device)
        row_divergence = None if soft is None else torch.zeros_like(row_ce)
        anchor_kl = None if anchor is None else row_ce.new_zeros(())
        matrix = operand(unembedding)  # [V, D]

        kinds = sorted((first, joint, split))
        for part, h, logits in chunked_logits(hidden, unembedding, source, chunk_tokens, kinds):
            w = weight[part] if part.start < split else None
            # d loss / d logits = w * (softmax - onehot), in float32; rounded once where the operands are bfloat16.
            if part.start < first:
                row_ce[part], divergence, d_logits = anchor.losses_(logits, label[part], w, source[part], h.dtype)
                anchor_kl += divergence.sum()
            elif soft is None:
                row_ce[part], d_logits = cross_entropy_(logits, label[part], w, h.dtype)
            else:
                row_ce[part], row_divergence[part], d_logits = soft.losses_(logits, label[part], w, part, h.dtype)
            if d_logits is None:
                continue
            if needs_hidden:
                d_hidden[source[part]] = (d_logits @ matrix).to(d_hidden.dtype)
            if needs_unembedding and part.start < joint:
                h = h if factor is None else h * factor[part, None].to(h.dtype)
                d_unembedding = add_mm_float32(d_unembedding, d_logits.T, h)

        if needs_unembedding and d_unembedding is None:
            d_unembedding = torch.zeros_like(unembedding, dtype=torch.float32)
        ctx.gradients = None if d_hidden is None else d_hidden.view(hidden.shape), d_unembedding, unembedding.dtype
        losses = row_ce if soft is None else soft.hard * row_ce + soft.soft * row_divergence
        ctx.mark_non_differentiable(*(x for x in (row_ce, row_divergence, anchor_kl) if x is not None))
        loss_sum = (losses[: ends[2]] * weight[: ends[2]]).sum()
        loss_sum = loss_sum if anchor is None else loss_sum + anchor.weight * anchor_kl
        return loss_sum, row_ce, row_divergence, anchor_kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the fused loss gives its gradients once: call backward() once, without retain_graph")
        d_hidden, d_unembedding, dtype = ctx.gradients
        ctx.gradients = None
        # In place, or in one pass into the dtype of the operand: the buffers belong to this node alone.
        d_hidden = None if d_hidden is None else d_hidden.mul_(grad_loss)
        if d_unembedding is not None:
            scaled = d_unembedding if dtype == torch.float32 else torch.empty_like(d_unembedding, dtype=dtype)
            d_unembedding = torch.mul(d_unembedding, grad_loss, out=scaled)
        return d_hidden, d_unembedding, *(None,) * 8
