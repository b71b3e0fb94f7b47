"""Estimators: equal to brute force over all draws, right at large n, and intervals that cover what they claim."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.eval.estimators import n_at_k, oracle_temperature, paired_difference, pass_at_k
from wmtp.numerics.bootstrap import bootstrap_interval


def share_of_draws(n: int, k: int, solved) -> Fraction:
    """Mean of `solved(draw)` over all k-subsets of range(n)."""
    draws = list(itertools.combinations(range(n), k))
    return sum(map(Fraction, map(solved, draws)), Fraction()) / len(draws)


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for n in range(1, 9):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            expected = share_of_draws(n, k, lambda draw, c=c: min(draw) < c)  # samples 0 to c - 1 are right
            assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-14)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_pass_at_k_is_exact_for_large_n(data):
    n = data.draw(st.integers(1, 5000))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-13, abs=0)


def test_pass_at_k_keeps_its_digits_at_the_edges():
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-14)
    assert pass_at_k(10**6, 1, 10**5) == pytest.approx(0.1, rel=1e-14)
    assert pass_at_k(200, 0, 100) == 0.0 and pass_at_k(200, 101, 100) == 1.0
    assert [pass_at_k(n, c, 1) for n, c in ((10, 0), (10, 5), (5, 5))] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(("n", "c", "k"), [(10, 0, 11), (10, 0, 0), (10, -1, 1), (10, 11, 1), (0, 0, 1)])
def test_pass_at_k_refuses_what_it_cannot_estimate(n, c, k):
    with pytest.raises(ValueError, match="got") as error:
        pass_at_k(n, c, k)
    assert "\n" not in str(error.value)


def brute_force_n_at_k(num_samples: int, public: int, correct: int, n: int, k: int) -> Fraction:
    """Samples 0..correct-1 are right, 0..public-1 pass the public tests: all draws, then all choices of submissions."""

    def solved(draw) -> Fraction:
        candidates = [sample for sample in draw if sample < public]
        choices = list(itertools.combinations(candidates, min(n, len(candidates))))
        return Fraction(sum(any(sample < correct for sample in choice) for choice in choices), len(choices))

    return share_of_draws(num_samples, k, solved)


def test_n_at_k_is_the_mean_over_all_draws_and_all_choices_of_submissions():
    for num_samples in range(1, 7):
        for public in range(num_samples + 1):
            for correct, k in itertools.product(range(public + 1), range(1, num_samples + 1)):
                for n in range(1, k + 2):
                    expected = brute_force_n_at_k(num_samples, public, correct, n, k)
                    assert n_at_k(num_samples, public, correct, n, k) == pytest.approx(float(expected), rel=1e-13)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_n_at_k_against_pass_at_k(data):
    num_samples = data.draw(st.integers(1, 1000))
    public = data.draw(st.integers(0, num_samples))
    correct, k = data.draw(st.integers(0, public)), data.draw(st.integers(1, num_samples))
    chances = [n_at_k(num_samples, public, correct, n, k) for n in (1, 2, 10, k)]
    # Submitting all k draws is pass@k; a submission more never hurts; without a filter, n@k is pass@n.
    assert chances[3] == pytest.approx(pass_at_k(num_samples, correct, k), rel=1e-12, abs=1e-15)
    assert chances[0] <= chances[1] + 1e-15 <= chances[2] + 2e-15 <= pass_at_k(num_samples, correct, k) + 1e-12
    n = data.draw(st.integers(1, k))
    unfiltered = n_at_k(num_samples, num_samples, correct, n, k)
    assert unfiltered == pytest.approx(pass_at_k(num_samples, correct, n), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(
    "counts", [(10, 5, 6, 1, 5), (10, 11, 1, 1, 5), (10, 5, -1, 1, 5), (10, 5, 1, 0, 5), (9, 5, 1, 1, 10)]
)
def test_n_at_k_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="needs"):
        n_at_k(*counts)


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for experiment in range(300):
        interval = bootstrap_interval(rng.beta(2, 3, size=60), seed=experiment, resamples=1000, level=0.9)
        covered += interval.low <= 0.4 <= interval.high
    # 300 draws at 0.9: a standard deviation is 0.017; the percentile bootstrap with 60 tasks is a little narrow.
    assert 0.84 < covered / 300 < 0.95


def test_bootstrap_has_the_width_of_the_normal_approximation_and_depends_on_the_seed_alone():
    values = [1.0] * 150 + [0.0] * 350
    interval = bootstrap_interval(values, seed=1)
    assert interval.estimate == 0.3
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 500), rel=0.05)
    assert bootstrap_interval(values, seed=1) == interval != bootstrap_interval(values, seed=2)
    assert bootstrap_interval([0.25]).low == bootstrap_interval([0.25]).high == 0.25


def test_bootstrap_refuses_bad_input():
    for values in ([], [math.nan], [[1.0, 2.0]]):
        with pytest.raises(ValueError, match="finite value for each of at least one task"):
            bootstrap_interval(values)
    for options in ({"level": 1.0}, {"level": 0.0}, {"resamples": 0}):
        with pytest.raises(ValueError, match=r"level must be in \(0, 1\) and resamples >= 1"):
            bootstrap_interval([1.0], **options)


def test_a_paired_difference_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    theirs = {f"t{i}": value for i, value in enumerate(rng.uniform(size=200))}
    ours = {i: value + 0.02 + 0.01 * rng.standard_normal() for i, value in reversed(theirs.items())}
    alone = [bootstrap_interval(list(run.values())) for run in (ours, theirs)]
    assert alone[0].low < alone[1].high  # overlap
    difference = paired_difference(ours, theirs)
    assert 0.017 < difference.low < difference.estimate < difference.high < 0.023
    same = paired_difference(theirs, theirs)
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="which have 200 and 199: task t7 is in one of them only"):
        paired_difference(ours, {i: v for i, v in theirs.items() if i != "t7"})


def test_the_oracle_takes_the_best_score_and_of_equal_ones_the_lowest_temperature():
    assert oracle_temperature({0.8: 0.3, 0.2: 0.3, 0.1: 0.2}) == 0.2
    assert oracle_temperature({None: 0.5}) is None
    with pytest.raises(ValueError, match="at least one temperature"):
        oracle_temperature({})
