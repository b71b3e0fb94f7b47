"""Metrics of scores that tell correct programs from incorrect ones, and the length-only rule as a baseline.

Scores and lengths are [P, 2]: column 0 the correct program of each pair, column 1 the incorrect one. Everything runs in
float64 on the host. scikit-learn is imported inside functions because that takes a second.
"""

import numpy as np

from wmtp.numerics.bootstrap import bootstrap_interval

_BINS = 10  # of a calibration curve
RESAMPLES = 2000  # of an interval: every evaluation during training has one


def pair_wins(scores: np.ndarray) -> np.ndarray:
    """Returns 1 where the correct program scores higher, 0 where lower, 1/2 for a tie: [P]; scores [P, 2]."""
    difference = scores[:, 0] - scores[:, 1]
    return np.where(difference == 0, 0.5, difference > 0).astype(np.float64)


def auc(scores: np.ndarray) -> float:
    """Returns the area under the ROC curve: the share of all P x P comparisons that the correct program wins.

    Ties count one half (the Mann-Whitney statistic); scores [P, 2].
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(_is_correct(scores), _flat(scores)))


def brier(probability: np.ndarray) -> float:
    """Returns the mean squared error of the probability [P, 2] of being correct."""
    from sklearn.metrics import brier_score_loss

    return float(brier_score_loss(_is_correct(probability), _flat(probability)))


def expected_calibration_error(probability: np.ndarray) -> float:
    """Returns the mean gap between probability and share of correct programs, over bins weighted by their size.

    The ten bins of the probability [P, 2] have equal width. Source: Naeini et al. 2015, "Obtaining well calibrated
    probabilities using Bayesian binning", eq. 1 (ECE).
    """
    from sklearn.calibration import calibration_curve

    predicted = _flat(probability)
    is_correct, mean_predicted = calibration_curve(_is_correct(probability), predicted, n_bins=_BINS)
    # The curve leaves empty bins out, and puts a probability on an edge into the bin below.
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], predicted))
    return float(np.average(np.abs(is_correct - mean_predicted), weights=sizes[sizes > 0]))


def score_report(
    scores: np.ndarray, problems: np.ndarray, probability: np.ndarray | None, *, seed: int = 0
) -> dict[str, float]:
    """Returns pairwise_accuracy with its 95 % interval (`_low`, `_high`), auc, and, given probabilities, brier and ece.

    The interval is a bootstrap over problems; a single problem has none.
    """
    accuracy = bootstrap_interval(pair_wins(scores), seed, groups=problems, resamples=RESAMPLES)
    report = {"pairwise_accuracy": accuracy.estimate, "auc": auc(scores)}
    if len(np.unique(problems)) > 1:
        report |= {"pairwise_accuracy_low": accuracy.low, "pairwise_accuracy_high": accuracy.high}
    if probability is not None:
        report |= {"brier": brier(probability), "ece": expected_calibration_error(probability)}
    return report


def fit_length_baseline(lengths: np.ndarray) -> tuple[float, float]:
    """Fits (weight, bias) of a logistic regression of being correct on the log length of the response [P, 2].

    A ridge of 1e-3 keeps the weight finite where length alone separates the two classes.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1e3, solver="newton-cholesky", tol=1e-10)
    model.fit(np.log(_flat(lengths))[:, None], _is_correct(lengths))
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def length_report(train_lengths: np.ndarray, lengths: np.ndarray, problems: np.ndarray, *, seed: int = 0) -> dict:
    """Returns :func:`score_report` of the length-only rule, fitted on training pairs and applied to others."""
    weight, bias = fit_length_baseline(train_lengths)
    scores = weight * np.log(lengths.astype(np.float64)) + bias  # [P, 2]: log-odds of being correct
    return score_report(scores, problems, _sigmoid(scores), seed=seed)


def probabilities(mean: np.ndarray, last: np.ndarray, loss: str) -> np.ndarray:
    """Returns the probability of being correct that values imply, [P, 2].

    ``pairwise`` trains log-odds up to a constant, so it is the sigmoid of the response mean. ``mse`` on labels
    regresses the probability itself, and at the last response token every spread's target is the label: there it is the
    value, clipped to [0, 1].
    """
    return _sigmoid(mean) if loss == "pairwise" else np.clip(last.astype(np.float64), 0, 1)


def _flat(pairs: np.ndarray) -> np.ndarray:
    """Flattens [P, 2] to [2P]: the correct programs, then the incorrect ones."""
    return pairs.T.reshape(-1).astype(np.float64)


def _is_correct(pairs: np.ndarray) -> np.ndarray:
    return np.repeat([1, 0], len(pairs))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x.astype(np.float64)))  # does not overflow
