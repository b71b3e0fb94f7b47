"""The statistics of the validity benchmark: AUC with ties, falls by line, intervals by bootstrap and Student's t."""

import math

import numpy as np
from scipy.stats import t as student_t


def auc(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray | float:
    """Probability that a positive has a higher score than a negative, ties counting half (Mann-Whitney U / nm).

    Args:
        scores: [N]; only their order matters, infinities are allowed.
        positive: [N] bool.
        counts: [N] or [R, N], how often each entry counts, for resampling; None is once.

    Returns:
        A float, or [R] for counts [R, N].

    Raises:
        ValueError: a score is NaN, or one of the two classes is empty.
    """
    scores, positive = np.asarray(scores, float), np.asarray(positive, bool)
    counts = np.ones(len(scores)) if counts is None else np.asarray(counts, float)
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN")
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0]) if len(order) else np.zeros(0, int)
    weights, is_positive = counts[..., order], positive[order]
    ties = [np.add.reduceat(weights * kind, starts, axis=-1) for kind in (is_positive, ~is_positive)]  # [..., ties]
    positives, negatives = (x.sum(-1) for x in ties)
    if not (np.all(positives > 0) and np.all(negatives > 0)):
        raise ValueError(f"an AUC needs both classes, got {positive.sum()} positives among {len(positive)}")
    below = np.cumsum(ties[1], axis=-1) - ties[1] / 2
    area = (ties[0] * below).sum(-1) / (positives * negatives)
    return float(area) if area.ndim == 0 else area


def resamples(groups: np.ndarray, repeats: int, seed: int) -> np.ndarray:
    """How often each entry counts when whole groups are drawn with replacement: [repeats, N].

    Entries of a group (the tokens of a document, the programs of a task) depend on each other, so groups are what is
    drawn (cluster bootstrap). The same groups and seed give the same draws: differences of two figures are then paired.
    """
    names, member = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=repeats)  # [repeats, G]
    return drawn[:, member].astype(np.float32)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def weighted_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values [N] under counts [R, N]: [R]."""
    return (counts @ np.asarray(values, np.float64)) / counts.sum(-1)


def t_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high end of Student's t interval over independent repeats (seeds).

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"a t interval needs at least two values, got {len(values)}")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(student_t.ppf((1 + level) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return mean, mean - half, mean + half


def hit_ranks(scores: np.ndarray, hit: int, ks: tuple[int, ...] = (1, 3, 5)) -> list[float]:
    """How a ranking places the one entry that counts: top-k chances, then the AUC.

    Ties are broken at random in expectation: with h entries above the hit and e equal to it (itself included), top-k is
    min(1, max(0, k - h) / e). The AUC is the share of the other entries below the hit, ties counting half.

    Args:
        scores: [L], L >= 2; higher ranks first, NaN ranks last.
        hit: index of the entry that counts.
    """
    scores = np.where(np.isnan(scores), -np.inf, np.asarray(scores, float))
    if len(scores) < 2:
        raise ValueError(f"a ranking needs at least two entries, got {len(scores)}")
    above, equal = int((scores > scores[hit]).sum()), int((scores == scores[hit]).sum())
    below = len(scores) - above - equal
    return [min(1.0, max(0, k - above) / equal) for k in ks] + [(below + (equal - 1) / 2) / (len(scores) - 1)]


def value_drop_by_line(
    values: np.ndarray,
    line_of_token: np.ndarray,
    *,
    before: float | None = None,
    rule: str = "end",
    num_lines: int | None = None,
) -> np.ndarray:
    """Computes the fall of the value over each line of a program: [L] float64, larger is more suspicious.

        end      V at the end of the line before, minus V at the line's own end
        token    the largest fall from one token to the next, V_{t-1} - V_t over the line's tokens t

    Lines without a token of their own (mostly blank ones) are NaN.

    Args:
        values: [T] V_t of each token t of the program (no prompt, no EOS).
        line_of_token: [T] each token's line, from 1, never falling: see :func:`wmtp.critic.line_of_tokens`.
        before: value of the prompt's last token; without a prompt the program's first token stands for it.
        rule: ``end`` or ``token``.
        num_lines: L; by default the last token's line.

    Raises:
        ValueError: lengths that differ, no token, or lines that fall or lie outside 1 to L.
    """
    values, lines = np.asarray(values, np.float64), np.asarray(line_of_token)
    if values.ndim != 1 or values.shape != lines.shape or not len(values):
        raise ValueError(f"values and line_of_token must be [T], T >= 1, got {values.shape} and {lines.shape}")
    num_lines = int(lines[-1]) if num_lines is None else num_lines
    if (np.diff(lines) < 0).any() or lines[0] < 1 or lines[-1] > num_lines:
        raise ValueError(f"line_of_token must rise from 1 to at most {num_lines}, got {lines.tolist()!s:.80}")
    previous = np.concatenate([[values[0] if before is None else before], values[:-1]])
    falls = previous - values  # [T]
    drops = np.full(num_lines, np.nan)
    starts = np.flatnonzero(np.diff(lines, prepend=0))  # the first token of each line that has one
    # The falls over a line's tokens add up to the fall from the end of the line before to its own end.
    drops[lines[starts] - 1] = (np.add if rule == "end" else np.maximum).reduceat(falls, starts)
    return drops
