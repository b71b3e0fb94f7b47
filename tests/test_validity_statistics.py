"""The statistics under docs/validity.md's tables, against hand-worked numbers and plain counting."""

import numpy as np
import pytest

from benchmarks.validity.statistics import auc, hit_ranks, interval, resamples, t_interval, weighted_mean


def test_auc_counts_ties_half():
    # Positives 1 and 2, negatives 0 and 1: of four comparisons 1 > 0, 2 > 0, 2 > 1 win and 1 = 1 ties: 3.5 / 4.
    assert auc(np.array([1, 2, 0, 1]), np.array([1, 1, 0, 0], bool)) == 0.875
    assert auc(np.zeros(5), np.array([1, 0, 0, 1, 0], bool)) == 0.5
    assert auc(np.array([-np.inf, 3.0, np.inf]), np.array([0, 0, 1], bool)) == 1.0


def test_auc_equals_the_count_over_all_pairs_with_and_without_repeats():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 12, 60).astype(float)  # many ties
        positive, counts = rng.random(60) < 0.2, rng.integers(0, 4, (3, 60))
        wins = (scores[:, None] > scores) + (scores[:, None] == scores) / 2  # [positive, negative]
        for given, repeats in ((None, np.ones((1, 60))), (counts, counts)):
            pairs = (repeats * positive)[:, :, None] * (repeats * ~positive)[:, None, :]  # [R, N, N]
            expected = (pairs * wins).sum((1, 2)) / pairs.sum((1, 2))
            np.testing.assert_allclose(auc(scores, positive, given), np.squeeze(expected), atol=1e-12)


def test_auc_refuses_nan_and_a_missing_class():
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        auc(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ValueError, match="both classes, got 0 positives among 2"):
        auc(np.array([0.0, 1.0]), np.array([False, False]))


def test_resampling_draws_whole_groups_and_the_same_ones_for_the_same_seed():
    groups = np.array(["b", "a", "b", "c", "a"])
    counts = resamples(groups, 50, seed=1)
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()  # as many groups as there are
    assert (counts == resamples(groups, 50, seed=1)).all()
    assert (counts != resamples(groups, 50, seed=2)).any()


def test_the_bootstrap_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(weighted_mean(values, resamples(np.arange(400), 4000, seed=0)))
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_t_interval_of_three_values_by_hand():
    # Mean 0.25, deviation sqrt((0.05^2 + 0.15^2 + 0.1^2) / 2) = 0.132288, t of 2 degrees at 0.975 = 4.302653.
    half = 4.302653 * 0.132288 / 3**0.5
    assert t_interval([0.3, 0.1, 0.35]) == pytest.approx((0.25, 0.25 - half, 0.25 + half), abs=1e-5)
    with pytest.raises(ValueError, match="at least two values, got 1"):
        t_interval([1.0])


def test_a_rank_breaks_ties_in_expectation():
    assert hit_ranks(np.array([3.0, 1.0, 2.0, 0.0]), hit=2) == [0, 1, 1, 2 / 3]
    # Two share the first place: either may have it; of the three others one ties and two lie below.
    assert hit_ranks(np.array([2.0, 2.0, 1.0, 0.0]), hit=0, ks=(1, 2)) == [0.5, 1.0, 2.5 / 3]
    # All equal: a random ranking of six lines.
    assert hit_ranks(np.zeros(6), hit=4) == pytest.approx([1 / 6, 3 / 6, 5 / 6, 0.5])
    # Nothing is known of a NaN line: it ranks last.
    assert hit_ranks(np.array([np.nan, -5.0, -7.0]), hit=0) == [0, 1, 1, 0.0]
    with pytest.raises(ValueError, match="at least two entries, got 1"):
        hit_ranks(np.zeros(1), 0)
