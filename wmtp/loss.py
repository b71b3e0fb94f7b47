"""The fused token-weighted multi-token loss: linear + softmax cross-entropy, without [B, S, V] logits.

One pass over the tokens, a chunk at a time. A chunk's logits live in one reused buffer, and its gradients are taken
while they are there, so a training step costs three GEMMs a token (logits, d_hidden, d_unembedding) and never the
fourth that recomputing the logits in the backward pass would.

Notation (used throughout the library): B batch, S sequence, D embed_dim, V vocab_size, H future tokens (heads).
Head k in 1..H at position t predicts the token at t + k of the same document. Everything per token, `labels`,
`weights` and the returned `ce`, is indexed by the *target* position j = t + k.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wmtp.errors import UserError
from wmtp.numerics.cross_entropy import cross_entropy_, cross_entropy_and_entropy_
from wmtp.numerics.products import add_mm_float32, mm_float32, on_cuda, operand
from wmtp.weighting.base import Signals, any_weighting, check_weights, is_checked
from wmtp.weighting.rows import LOOK_AT
from wmtp.weighting.targets import Targets, valid_targets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

# Bytes of float32 logits alive at a time. On CPU small enough to leave the peak to the [V, D] gradient accumulator,
# on CUDA large enough to fill the device with one GEMM. Each chunk reads and writes that accumulator, which a GPU's
# memory is too slow for with fewer rows.
_CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}
_CHUNK_ROWS = {"cpu": 16, "cuda": 2048}


class MTPLoss(NamedTuple):
    """The result of :func:`weighted_mtp_cross_entropy`; only ``loss_sum`` carries a gradient.

    It is a tuple because FSDP2 hooks the backward pass onto the tensors that it finds in the root module's output.

    Divide sums of ``loss_sum`` by sums of ``num_targets``, once per optimizer step, over all ranks and micro-steps:
    the result depends neither on the world size nor on how the step is cut into micro-batches.
    """

    loss_sum: Tensor  # scalar, float32: sum_k b_k * sum_j w_j * CE_k(j)
    num_targets: Tensor  # scalar, float32: sum_k b_k * N_k
    ce: Tensor  # [H, B, S] float32: cross-entropy of head k for target j, 0 where it predicts none
    valid: Tensor  # [H, B, S] bool: where head k predicts target j
    weights: Tensor | None  # [B, S] or [H, B, S] as given, None for all ones


def head_weight_tensor(
    values: "Sequence[float] | None", num_heads: int, device: torch.device | str = "cpu"
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
    if weights is None and head_weights is None and known_ce is None:
        place = (targets or Targets(labels, document_ids)).place(num_heads, labels.device)
        num_gradient_rows = len(place)
    else:
        # The valid (head, target) pairs become rows: first those with a gradient, so that chunks are of one kind, then
        # those whose CE alone is still to be found. The host waits for the device once, for how many there are of each.
        has_gradient = valid & (row_weight != 0)
        wanted = valid
        if known_ce is not None:
            known = known_ce.detach().float().reshape(-1, batch, seq)
            ce[: len(known)] = known * valid[: len(known)]
            wanted = has_gradient.clone()
            wanted[len(known) :] = valid[len(known) :]
        bad = valid & ~row_weight.isfinite()
        num_gradient_rows, num_rows, num_bad = torch.stack([x.sum() for x in (has_gradient, wanted, bad)]).tolist()
        if num_bad:
            raise UserError(f"{num_bad} weights of targets are not finite; {LOOK_AT}")
        kind = torch.where(has_gradient, 0, torch.where(wanted, 1, 2)).to(torch.int8)
        place = kind.flatten().argsort(stable=True)[:num_rows]  # [N], in [H*B*S]

    if chunk_tokens is None:
        chunk_tokens = _default_chunk(hidden, unembedding)
    loss_sum, row_ce = _FusedLinearCrossEntropy.apply(
        hidden,
        unembedding,
        _source(place, labels),
        labels.flatten()[place % labels.numel()],
        row_weight.expand(valid.shape).flatten()[place],
        num_gradient_rows,
        chunk_tokens,
    )
    ce.view(-1)[place] = row_ce
    return MTPLoss(loss_sum, num_targets, ce, valid, weights)


def mtp_loss(
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    weighting: "Callable[[Signals], Tensor | None]",
    *,
    document_ids: Tensor | None = None,
    head_weights: Tensor | None = None,
    signals: "Mapping[str, Tensor] | None" = None,
    targets: Targets | None = None,
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
    elif "policy_ce" in needs and "policy_ce" not in named:
        ce = token_cross_entropy(heads, unembedding, labels, document_ids=document_ids, targets=targets)
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
    )


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
    size = chunk_tokens or max(1, _default_chunk(hidden, unembedding) // 2)  # two buffers of float32 a chunk
    targets = targets or Targets(labels, document_ids)
    ce, entropy = of_each_target(cross_entropy_and_entropy_, hidden, unembedding, labels, targets, size)
    return ce, entropy


@torch.no_grad()
def of_each_target(
    figures: "Callable[[Tensor, Tensor], tuple[Tensor, ...]]",
    hidden: Tensor,
    unembedding: Tensor,
    labels: Tensor,
    targets: Targets,
    chunk_tokens: int | None = None,
) -> list[Tensor]:
    """Computes figures of each target from its logits, a chunk at a time: each [H, B, S], 0 where no target.

    Args:
        figures: ``figures(logits [C, V] float32, label [C])`` returns them, each [C], and may write into the logits.
        hidden, unembedding, labels, chunk_tokens: as in :func:`weighted_mtp_cross_entropy`.
        targets: of the labels and their documents.
    """
    place = targets.place(len(hidden), labels.device)  # [N], in [H*B*S]
    label = labels.flatten()[place % labels.numel()]
    size = chunk_tokens or _default_chunk(hidden, unembedding)
    chunks = chunked_logits(hidden, unembedding, _source(place, labels), size)
    # Without any target, the figures of zero rows give their number and dtypes.
    found = [figures(logits, label[part]) for part, _, logits in chunks] or [
        figures(hidden.new_empty((0, len(unembedding)), dtype=torch.float32), label)
    ]
    results = []
    for column in zip(*found, strict=True):
        result = column[0].new_zeros(hidden.shape[:3])
        result.view(-1)[place] = torch.cat(column)
        results.append(result)
    return results


def chunked_logits(
    hidden: Tensor, unembedding: Tensor, source: Tensor, size: int, split: int = 0
) -> "Iterator[tuple[slice, Tensor, Tensor]]":
    """Yields the rows of the hidden states in chunks of at most ``size``: (slice of ``source``, h [C, D], logits).

    The logits [C, V], float32, are in one reused buffer: the next chunk overwrites them.

    Args:
        source: [N] the rows, as places in hidden [H*B*S, D].
        split: a chunk ends before this row, so that all rows of a chunk are on one side of it.
    """
    rows, matrix = hidden.reshape(-1, hidden.shape[-1]), operand(unembedding)
    buffer = rows.new_empty((min(size, len(source)), len(matrix)), dtype=torch.float32)
    for begin, stop in ((0, split), (split, len(source))):
        for start in range(begin, stop, size):
            part = slice(start, min(start + size, stop))
            h = operand(rows[source[part]])
            yield part, h, mm_float32(h, matrix.T, out=buffer[: len(h)])


def _source(place: Tensor, labels: Tensor) -> Tensor:
    """Returns the positions t = j - k in hidden [H*B*S, D] from which heads k predict the targets at ``place``: [N].

    Args:
        place: [N], of target j of head k in [H*B*S].
    """
    return place - place // labels.numel() - 1


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """The sum of weighted CE and the CE of each row; the forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx, hidden, unembedding, source, label, weight, num_gradient_rows, chunk_tokens):
        flat_hidden = hidden.reshape(-1, hidden.shape[-1])  # [H*B*S, D]
        needs_hidden, needs_unembedding = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(flat_hidden) if needs_hidden else None
        d_unembedding = None  # [V, D] float32
        # The first rows take gradients, the others only their CE.
        split = num_gradient_rows if needs_hidden or needs_unembedding else 0
        row_ce = torch.empty(source.numel(), dtype=torch.float32, device=hidden.device)
        matrix = operand(unembedding)  # [V, D]

        for part, h, logits in chunked_logits(hidden, unembedding, source, chunk_tokens, split):
            w = weight[part] if part.start < split else None
            # d loss / d logits = w * (softmax - onehot), in float32; rounded once where the operands are bfloat16.
            row_ce[part], d_logits = cross_entropy_(logits, label[part], w, h.dtype)
            if d_logits is None:
                continue
            if needs_hidden:
                d_hidden[source[part]] = (d_logits @ matrix).to(d_hidden.dtype)
            if needs_unembedding:
                d_unembedding = add_mm_float32(d_unembedding, d_logits.T, h)

        if needs_unembedding and d_unembedding is None:
            d_unembedding = torch.zeros_like(unembedding, dtype=torch.float32)
        ctx.gradients = None if d_hidden is None else d_hidden.view(hidden.shape), d_unembedding, unembedding.dtype
        ctx.mark_non_differentiable(row_ce)
        return (row_ce[:num_gradient_rows] * weight[:num_gradient_rows]).sum(), row_ce

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.gradients is None:
            raise RuntimeError("the fused loss gives its gradients once: call backward() once, without retain_graph")
        d_hidden, d_unembedding, dtype = ctx.gradients
        ctx.gradients = None
        # In place, or in one pass into the dtype of the operand: the buffers belong to this node alone.
        d_hidden = None if d_hidden is None else d_hidden.mul_(grad_loss)
        if d_unembedding is not None:
            scaled = d_unembedding if dtype == torch.float32 else torch.empty_like(d_unembedding, dtype=dtype)
            d_unembedding = torch.mul(d_unembedding, grad_loss, out=scaled)
        return d_hidden, d_unembedding, None, None, None, None, None


def _default_chunk(hidden: Tensor, unembedding: Tensor) -> int:
    """Returns the rows per chunk, by device and V."""
    kind = "cuda" if on_cuda(hidden) else hidden.device.type
    return max(_CHUNK_ROWS.get(kind, 16), _CHUNK_BYTES.get(kind, 2**26) // (4 * unembedding.shape[0]))
