"""From logits to tokens: distributions, keyed random numbers, and the verification of drafts."""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.keyed import splitmix64, top53
from wmtp.numerics.products import on_cuda


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token, and the ends of a completion.

    Args:
        max_new_tokens: maximum length of a completion.
        temperature: 0 takes the most probable token (greedy); otherwise logits are divided by it.
        top_p: sample from the smallest set of most probable tokens with this total probability (Holtzman et al. 2020,
            arXiv 1904.09751); 1 is all tokens. Tokens as probable as the set's last one belong to it.
        stop: strings that end a completion; they and the text after them are cut off.

    Raises:
        ValueError: for a value outside its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"max_new_tokens must be a whole number >= 1, got {count!r}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be >= 0 (0 is greedy), got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p!r}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(f"stop must be a tuple of non-empty strings, got {self.stop!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities of the next token: float32 [..., V] from logits [..., V]; not for greedy sampling."""
    logits = logits.float()
    # The maximum is subtracted before the division, so a tiny temperature cannot overflow.
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    return probs if sampling.top_p == 1 else _nucleus(probs, sampling.top_p)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Returns ``probs`` [..., V] with all but its nucleus set to zero, normalised again."""
    # Tokens less probable than (1 - top_p) / V add up to less than 1 - top_p, so they are outside and need no sorting.
    # Half of that bound is used, because the sum of float32 probabilities is only nearly one.
    least = 0.5 * (1 - top_p) / probs.shape[-1]
    # On CUDA the host would wait for their number; there a sort of all tokens takes less.
    candidates = probs.shape[-1] if on_cuda(probs) else int((probs >= least).sum(-1).max())
    top = probs.topk(candidates).values
    before = top.double().cumsum(-1) - top  # total probability of the more probable tokens
    size = (before < top_p).sum(-1, keepdim=True)
    # The set is defined by its smallest probability, so the order of equally probable tokens does not matter.
    kept = probs.where(probs >= top.gather(-1, size - 1), 0.0)
    return kept / kept.sum(-1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers that depend only on (key, position)


@dataclass(frozen=True)
class Numbers:
    """The random numbers of one position of one completion."""

    token: int  # signed, 64 bits: seed of the choice among the vocabulary
    draft: int  # the same for a draft
    accept: float  # uniform in [0, 1): whether a draft is accepted


def key_digest(key: tuple) -> bytes:
    """Returns a request's key as 32 bytes: equal for equal keys, different for different ones.

    Raises:
        ValueError: the key holds something other than strings, numbers and None.
    """
    try:
        text = json.dumps(key)
    except TypeError as error:
        raise ValueError(f"a request's key must be a tuple of strings and numbers, got {key!r}") from error
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def numbers_at(digest: bytes, position: int) -> Numbers:
    """Returns the numbers of the ``position``-th token of the completion whose key has this digest.

    A position may be drafted and dropped many times before it is decided, always with the same numbers. That is sound:
    a draft that was never compared with the model has influenced nothing, and one that was compared decides the
    position.
    """
    bits = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=24, key=digest).digest()
    token, draft = (int.from_bytes(bits[i : i + 8], "little", signed=True) for i in (0, 8))
    return Numbers(token, draft, (int.from_bytes(bits[16:], "little") >> 11) * 2.0**-53)


def sample(probs: Tensor, seeds: Tensor) -> Tensor:
    """Returns tokens [...] drawn from probs [..., V] (which need not sum to one) with int64 seeds [...].

    The draw is a race: argmax of p_i / E_i with exponential E_i, the Gumbel-max trick without logarithms of p. An
    inverse CDF would need one random number instead of V. But rounding would then move every later boundary, and change
    the token far more often than by its own size in a tail of thousands of narrow intervals. In a race only the two
    leaders matter. E_i comes from output i of SplitMix64 (Steele, Lea and Flood 2014), integer arithmetic that is the
    same on every device.
    """
    return (probs / _exponential(seeds, probs.shape[-1])).argmax(-1)


def _exponential(seeds: Tensor, count: int) -> Tensor:
    """Returns float32 [..., count] standard exponential numbers."""
    bits = top53(splitmix64(seeds, count))
    # Uniform in (0, 1). Winners have small values, where float32 is finest.
    uniform = (bits.float() + 0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


# ----------------------------------------------------------------------------------------------------------------------
# Verification of drafts


def verify_greedy(logits: Tensor, drafts: Tensor, useful: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of leading drafts that greedy decoding agrees with, [B], and its token after them, [B].

    Args:
        logits: [B, W, V], the model's at the last accepted token and at each of the W - 1 drafts.
        drafts: [B, W - 1].
        useful: [B], the number of a row's drafts that count.
    """
    choice = logits.argmax(-1)  # [B, W]
    accepted = _leading(choice[:, :-1] == drafts, useful)
    return accepted, choice.gather(1, accepted[:, None])[:, 0]


def verify_sampled(
    p: Tensor, q: Tensor | None, drafts: Tensor, useful: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Verifies drafts by rejection sampling: the tokens are distributed as if the model had drawn each of them.

    Leviathan et al. 2023 (arXiv 2211.17192, appendix A.1) and Chen et al. 2023 (arXiv 2302.01318, theorem 1): a draft
    d ~ q is accepted with probability min(1, p(d) / q(d)). After the first rejection the token is drawn from
    max(0, p - q); if all drafts are accepted, from p.

    Args:
        p: [B, W, V], the model's distribution (head 1) at the last accepted token and at each of the W - 1 drafts.
        q: [B, W - 1, V], the distribution that each draft was drawn from (heads 2 to W); None without drafts.
        drafts: [B, W - 1].
        useful: [B], the number of a row's drafts that count.
        uniforms: [B, W - 1] in [0, 1).

    Returns:
        The number of accepted drafts [B], and the distribution [B, V] of the token after them, not normalised.
    """
    if q is None or drafts.shape[1] == 0:
        return torch.zeros_like(useful), p[:, 0]
    rows = torch.arange(len(p), device=p.device)
    p_draft, q_draft = (x[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0] for x in (p, q))
    accepted = _leading(uniforms * q_draft < p_draft, useful)
    next_p = p[rows, accepted]
    residual = (next_p - q[rows, accepted.clamp(max=drafts.shape[1] - 1)]).clamp_(min=0)
    # A draft is refused only if p(d) < q(d), so p > q for another token, unless rounding hides the difference.
    from_residual = (accepted < useful) & (residual.sum(-1) > 0)
    return accepted, residual.where(from_residual[:, None], next_p)


def _leading(accept: Tensor, useful: Tensor) -> Tensor:
    """Returns the number of leading True among the first ``useful`` [B] entries of each row: [B]."""
    counts = torch.arange(accept.shape[1], device=accept.device) < useful[:, None]
    return (accept & counts).cumprod(1).sum(1)
