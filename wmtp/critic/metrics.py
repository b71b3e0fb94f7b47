"""How well scores tell correct programs from incorrect ones, and the length-only rule to compare with.

Scores and lengths are [P, 2]: column 0 the correct program of each pair, column 1 the incorrect one. Everything runs in
float64 on the host.
"""

import numpy as np

CALIBRATION_BINS = 10


def pair_wins(scores: np.ndarray) -> np.ndarray:
    """[P] 1 where the correct program scores higher, 0 where lower, 1/2 for a tie; scores [P, 2]."""
    difference = scores[:, 0] - scores[:, 1]
    return np.where(difference == 0, 0.5, difference > 0).astype(np.float64)


def auc(scores: np.ndarray) -> float:
    """Area under the ROC curve: how often a correct program scores above an incorrect one of whatever pair.

    Ties count one half (the Mann-Whitney statistic over all P x P comparisons); scores [P, 2].
    """
    correct, incorrect = scores[:, 0].astype(np.float64), np.sort(scores[:, 1].astype(np.float64))
    below = np.searchsorted(incorrect, correct, side="left")
    not_above = np.searchsorted(incorrect, correct, side="right")
    return float((below + not_above).sum() / (2 * len(correct) * len(incorrect)))


def brier(probability: np.ndarray) -> float:
    """Mean squared error of the probability of being correct; [P, 2]."""
    return float(((1 - probability[:, 0]) ** 2 + probability[:, 1] ** 2).mean() / 2)


def expected_calibration_error(probability: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Mean gap between probability and share of correct programs, over bins of equal width weighted by their size.

    Naeini et al. 2015, "Obtaining well calibrated probabilities using Bayesian binning", eq. 1 (ECE); [P, 2].
    """
    predicted = probability.T.reshape(-1).astype(np.float64)
    is_correct = np.repeat([1.0, 0.0], len(probability))
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    gaps = [abs(predicted[index == b].sum() - is_correct[index == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(predicted))


def bootstrap_interval(
    values: np.ndarray, problems: np.ndarray, *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean of values [P], drawing whole problems with replacement.

    Pairs of one problem are not independent, so problems are what is drawn (Efron and Tibshirani 1993, chapter 13).
    None for a single problem: there is no spread to see.
    """
    _, index = np.unique(problems, return_inverse=True)
    count = index.max() + 1
    if count < 2:
        return None
    sums, sizes = np.bincount(index, weights=values, minlength=count), np.bincount(index, minlength=count)
    generator = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(samples)
    for start in range(0, samples, 200):  # a matrix of 200 draws at a time
        rows = min(200, samples - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), size=rows)  # [rows, problems]
        means[start : start + rows] = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def score_report(
    scores: np.ndarray, problems: np.ndarray, probability: np.ndarray | None, *, seed: int = 0
) -> dict[str, float]:
    """pairwise_accuracy with its 95 % interval (`_low`, `_high`), auc, and, given probabilities, brier and ece."""
    wins = pair_wins(scores)
    report = {"pairwise_accuracy": float(wins.mean()), "auc": auc(scores)}
    interval = bootstrap_interval(wins, problems, seed=seed)
    if interval is not None:
        report |= dict(zip(("pairwise_accuracy_low", "pairwise_accuracy_high"), interval, strict=True))
    if probability is not None:
        report |= {"brier": brier(probability), "ece": expected_calibration_error(probability)}
    return report


def fit_length_baseline(lengths: np.ndarray) -> tuple[float, float]:
    """(weight, bias) of a logistic regression of being correct on the log length of the response; lengths [P, 2].

    Fitted by Newton's method with a ridge of 1e-3 on the weight, which keeps it finite where length alone separates.
    """
    x = np.log(lengths.T.reshape(-1).astype(np.float64))
    y = np.repeat([1.0, 0.0], len(lengths))
    centre = x.mean()
    features = np.stack([x - centre, np.ones_like(x)], axis=1)  # [2P, 2]
    ridge = np.diag([1e-3, 0.0])
    theta = np.zeros(2)
    for _ in range(100):
        p = _sigmoid(features @ theta)
        gradient = features.T @ (p - y) + ridge @ theta
        hessian = (features * (p * (1 - p))[:, None]).T @ features + ridge
        step = np.linalg.solve(hessian, gradient)
        theta -= step
        if np.abs(step).max() < 1e-10:
            break
    return float(theta[0]), float(theta[1] - theta[0] * centre)


def length_scores(lengths: np.ndarray, weight: float, bias: float) -> np.ndarray:
    """Log-odds of being correct by length alone, [P, 2]."""
    return weight * np.log(lengths.astype(np.float64)) + bias


def length_report(train_lengths: np.ndarray, lengths: np.ndarray, problems: np.ndarray, *, seed: int = 0) -> dict:
    """:func:`score_report` of the length-only rule, fitted on training pairs and applied to others."""
    scores = length_scores(lengths, *fit_length_baseline(train_lengths))
    return score_report(scores, problems, _sigmoid(scores), seed=seed)


def probabilities(mean: np.ndarray, last: np.ndarray, loss: str) -> np.ndarray:
    """The probability of being correct that values imply, [P, 2].

    ``pairwise`` trains log-odds up to a constant: sigmoid of the response mean. ``mse`` on labels regresses the
    probability itself, and every spread's target at the last response token is the label: the value there, clipped to
    [0, 1].
    """
    return _sigmoid(mean) if loss == "pairwise" else np.clip(last.astype(np.float64), 0, 1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))  # does not overflow
