"""From logits to tokens: distributions, keyed random numbers, and the verification of drafts."""

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wmtp.errors import UserError
from wmtp.numerics.keyed import splitmix64, top53


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when a completion ends.

    Args:
        max_new_tokens: a completion's longest length, in tokens.
        temperature: 0 takes the most probable token (greedy); else logits are divided by it.
        top_p: sample from the smallest set of most probable tokens that holds this probability (Holtzman et al. 2020,
            arXiv 1904.09751); 1 is all of them. Tokens as probable as the set's last one belong to it.
        stop: strings that end a completion; they and what follows are cut off.

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
    """Probabilities that ``sampling`` gives the next token: float32 [..., V] from logits [..., V]; not for greedy."""
    logits = logits.float()
    # Divided after the maximum is gone: a tiny temperature cannot overflow.
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    return probs if sampling.top_p == 1 else _nucleus(probs, sampling.top_p)


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """``probs`` [..., V] with all but its nucleus set to zero, and normalised again."""
    # A token less probable than (1 - top_p) / V, with all those below it, holds less than 1 - top_p: it is outside. So
    # few tokens need sorting. Half of that bound, for the sum of float32 probabilities is only nearly one.
    candidates = int((probs >= 0.5 * (1 - top_p) / probs.shape[-1]).sum(-1).max())
    top = probs.topk(candidates).values
    before = top.double().cumsum(-1) - top  # what the more probable tokens hold together
    size = (before < top_p).sum(-1, keepdim=True)
    # The set is defined by the least probability in it, so the order in which equal tokens are sorted does not matter.
    kept = probs.where(probs >= top.gather(-1, size - 1), 0.0)
    return kept / kept.sum(-1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers that depend on (key, position) alone


@dataclass(frozen=True)
class Numbers:
    """The random numbers of one position of one completion."""

    token: int  # signed, 64 bits: seed of the choice among the vocabulary
    draft: int  # the same for a draft
    accept: float  # uniform in [0, 1): whether a draft is accepted


def key_digest(key: tuple) -> bytes:
    """A request's key as 32 bytes; equal keys, and only those, give the same.

    Raises:
        ValueError: the key holds something other than strings, numbers and None.
    """
    try:
        text = json.dumps(key)
    except TypeError as error:
        raise ValueError(f"a request's key must be a tuple of strings and numbers, got {key!r}") from error
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def numbers_at(digest: bytes, position: int) -> Numbers:
    """The numbers of the ``position``-th token of the completion whose key has this digest.

    A position is drafted and refused any number of times before it is decided, always with the same numbers. That is
    sound: a refused draft that was never compared with the model has influenced nothing, and one that was compared
    decides the position.
    """
    bits = hashlib.blake2b(position.to_bytes(8, "little"), digest_size=24, key=digest).digest()
    token, draft = (int.from_bytes(bits[i : i + 8], "little", signed=True) for i in (0, 8))
    return Numbers(token, draft, (int.from_bytes(bits[16:], "little") >> 11) * 2.0**-53)


def sample(probs: Tensor, seeds: Tensor) -> Tensor:
    """One token each, [...], drawn from probs [..., V] (which need not sum to one) with int64 seeds [...].

    The draw is a race: argmax of p_i / E_i with exponential E_i, which is the Gumbel-max trick without logarithms of p.
    An inverse CDF would need one number instead of V, but there rounding moves every later boundary, and in a tail of
    thousands of narrow intervals that changes the token far more often than the rounding itself is large; in a race
    only the two leaders matter. E_i comes from output i of SplitMix64 (Steele, Lea and Flood 2014), integer arithmetic
    that is the same on every device.
    """
    return (probs / _exponential(seeds, probs.shape[-1])).argmax(-1)


def _exponential(seeds: Tensor, count: int) -> Tensor:
    """Float32 [..., count] standard exponential numbers; int64 arithmetic wraps, as the generator wants."""
    bits = top53(splitmix64(seeds, count))
    # Uniform in (0, 1). float32 keeps small values finely graded, which are those of the winners.
    uniform = (bits.float() + 0.5).mul_(2.0**-53).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


# ----------------------------------------------------------------------------------------------------------------------
# Verification of drafts


def verify_greedy(logits: Tensor, drafts: Tensor, useful: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafts of each row are what greedy decoding says, [B], and the token that it says next, [B].

    Args:
        logits: [B, W, V], the model's at the last accepted token and at each of the W - 1 drafts.
        drafts: [B, W - 1].
        useful: [B], how many of a row's drafts count.
    """
    choice = logits.argmax(-1)  # [B, W]
    accepted = _leading(choice[:, :-1] == drafts, useful)
    return accepted, choice.gather(1, accepted[:, None])[:, 0]


def verify_sampled(
    p: Tensor, q: Tensor | None, drafts: Tensor, useful: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Rejection sampling of drafts: the tokens are distributed as if the model had drawn each of them.

    Leviathan et al. 2023 (arXiv 2211.17192, appendix A.1) and Chen et al. 2023 (arXiv 2302.01318, theorem 1): a draft
    d ~ q is accepted with probability min(1, p(d) / q(d)); after the first rejection the token comes from
    max(0, p - q), and after none from p.

    Args:
        p: [B, W, V], the model's distribution (head 1) at the last accepted token and at each of the W - 1 drafts.
        q: [B, W - 1, V], the distribution that each draft was drawn from (heads 2 to W); None without drafts.
        drafts: [B, W - 1].
        useful: [B], how many of a row's drafts count.
        uniforms: [B, W - 1] in [0, 1).

    Returns:
        accepted drafts [B], and the distribution [B, V] of the token after them, not normalised.
    """
    if drafts.shape[1] == 0:
        return torch.zeros_like(useful), p[:, 0]
    rows = torch.arange(len(p), device=p.device)
    p_draft, q_draft = (x[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0] for x in (p, q))
    accepted = _leading(uniforms * q_draft < p_draft, useful)
    next_p = p[rows, accepted]
    residual = (next_p - q[rows, accepted.clamp(max=drafts.shape[1] - 1)]).clamp_(min=0)
    # A draft is refused only where p(d) < q(d), so p > q elsewhere, except where that much is lost to rounding.
    from_residual = (accepted < useful) & (residual.sum(-1) > 0)
    return accepted, residual.where(from_residual[:, None], next_p)


def _leading(accept: Tensor, useful: Tensor) -> Tensor:
    """The number of True before the first False, [B], of the first ``useful`` [B] entries of each row."""
    counts = torch.arange(accept.shape[1], device=accept.device) < useful[:, None]
    return (accept & counts).cumprod(1).sum(1)
