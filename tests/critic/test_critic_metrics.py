"""Figures of a value model against numbers worked out by hand, and the length-only rule."""

import numpy as np
import pytest

from wmtp.critic import (
    auc,
    brier,
    critic_report,
    expected_calibration_error,
    fit_length_baseline,
    length_report,
    pair_wins,
    probabilities,
    score_report,
)
from wmtp.numerics.bootstrap import bootstrap_interval

# Three pairs: right, wrong, tied.
SCORES = np.array([[0.9, 0.2], [0.3, 0.4], [0.5, 0.5]])


def test_wins_auc_brier_and_calibration_by_hand():
    assert pair_wins(SCORES).tolist() == [1, 0, 0.5]
    # Of the nine comparisons 0.9 wins 3; 0.3 wins 1 (over 0.2); 0.5 wins 2 and ties 1: 6.5 / 9.
    assert auc(SCORES) == pytest.approx(6.5 / 9)
    # (0.1^2 + 0.7^2 + 0.5^2 + 0.2^2 + 0.4^2 + 0.5^2) / 6
    assert brier(SCORES) == pytest.approx((0.01 + 0.49 + 0.25 + 0.04 + 0.16 + 0.25) / 6)
    # Bins of width 0.1, each weighted by its size: 0.9 alone (gap 0.1), 0.2 (0.2), 0.3 (0.7), 0.4 (0.4), and 0.5 twice
    # with one correct (gap 0).
    assert expected_calibration_error(SCORES) == pytest.approx((0.1 + 0.2 + 0.7 + 0.4) / 6)
    assert expected_calibration_error(np.array([[1.0, 0.0]])) == 0


def test_auc_is_that_of_all_comparisons():
    scores = np.random.default_rng(0).integers(0, 9, (40, 2)) / 4
    slow = np.mean([[1.0 if c > i else 0.5 if c == i else 0.0 for i in scores[:, 1]] for c in scores[:, 0]])
    assert auc(scores) == pytest.approx(slow)


def test_the_interval_draws_problems_not_pairs():
    """Two problems, one always right, one always wrong: resamples are 0, 1/2 or 1, however many pairs each has."""
    wins, problems = np.repeat([1.0, 0.0], 500), np.repeat(["a", "b"], 500)
    both = bootstrap_interval(wins, groups=problems)
    assert (both.estimate, both.low, both.high) == (0.5, 0.0, 1.0)
    alone = bootstrap_interval(wins)  # as if all pairs were independent
    assert alone == bootstrap_interval(wins, groups=np.array([f"{i:03}" for i in range(1000)]))
    assert 0.45 < alone.low < 0.5 < alone.high < 0.55
    # Normal theory: 0.5 +- 1.96 sqrt(0.25 / 1000)
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * (0.25 / 1000) ** 0.5, rel=0.08)
    assert bootstrap_interval(wins, 3, groups=problems) == bootstrap_interval(wins, 3, groups=problems)
    report = score_report(np.array([[1.0, 0.0]] * 9), np.array(["a"] * 9), None)
    assert report == {"pairwise_accuracy": 1.0, "auc": 1.0}  # one problem shows no spread: no interval


def test_probabilities_are_those_the_loss_trains():
    mean, last = np.array([[0.0, 2.0]]), np.array([[1.3, -0.2]])
    assert probabilities(mean, last, "pairwise")[0] == pytest.approx([0.5, 1 / (1 + np.exp(-2))])
    assert probabilities(mean, last, "mse").tolist() == [[1.0, 0.0]]


def test_the_length_rule_finds_what_length_gives_away_and_nothing_where_it_gives_nothing():
    rng = np.random.default_rng(0)
    shorter = rng.integers(10, 100, 300)
    longer = shorter + rng.integers(1, 30, 300)
    problems = np.arange(300).astype(str)
    biased = np.stack([longer, shorter], axis=1)  # the correct one is always longer
    report = length_report(biased, biased, problems)
    assert report["pairwise_accuracy"] == 1.0 and report["auc"] > 0.6
    flipped = length_report(biased, biased[:, ::-1], problems)  # the rule is fitted on training pairs
    assert flipped["pairwise_accuracy"] == 0.0
    balanced = np.concatenate([biased, biased[:, ::-1]])
    weight, _ = fit_length_baseline(balanced)
    assert weight == pytest.approx(0, abs=1e-6)
    both = np.concatenate([problems, problems])
    assert length_report(balanced, balanced, both)["auc"] == pytest.approx(0.5)


def test_the_length_rule_is_the_maximum_likelihood_fit():
    """At the fit the gradient of the log-likelihood is zero: predicted and true counts and weighted sums agree."""
    lengths = np.random.default_rng(1).integers(5, 500, (80, 2))
    weight, bias = fit_length_baseline(lengths)
    x = np.log(lengths)
    p = 1 / (1 + np.exp(-(weight * x + bias)))
    assert p.sum() == pytest.approx(80, rel=1e-6)
    assert (p * x).sum() == pytest.approx(x[:, 0].sum(), rel=1e-4)


def test_the_report_shows_both_beside_each_other():
    problems = np.array(["a", "b", "c"])
    ours = score_report(SCORES, problems, SCORES)
    text = critic_report(ours, score_report(SCORES, problems, None), {"loss": "pairwise"}, chosen_on_these=True)
    assert "| pairwise accuracy | 0.500 [0.000, 1.000] | 0.500 [0.000, 1.000] |" in text
    assert f"| Brier score | {brier(SCORES):.3f} | - |" in text
    assert "- loss: pairwise" in text and "chosen on these same pairs" in text
