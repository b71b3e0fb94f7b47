"""Each statistic of a comparison beside SciPy's or statsmodels', and what no library has on cases worked by hand."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats import multitest, power, weightstats

from wmtp.errors import UserError
from wmtp.numerics.paired import crossed_bootstrap, effect_size, holm, mean_difference, sign_flip, signed_rank


def sample(seeds, units, shift=0.3):
    return np.random.default_rng(0).normal(shift, 1.0, (seeds, units))


@pytest.mark.parametrize("shape", [(1, 9), (9, 1)])
def test_one_seed_or_one_unit_is_the_paired_t_test(shape):
    d = sample(*shape)
    ours, theirs = mean_difference(d), stats.ttest_1samp(d.ravel(), 0.0)
    assert ours.p_value() == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.9)
    assert (ours.interval(0.9).low, ours.interval(0.9).high) == pytest.approx((low, high))
    equal = weightstats.DescrStatsW(d.ravel()).ttost_mean(-1.0, 1.0)
    assert ours.p_equivalent(1.0) == pytest.approx(equal[0])


def test_differences_by_seed_alone_are_judged_over_seeds():
    """Every document moves by its seed's luck: what counts is three numbers, however many documents there are."""
    luck = np.array([[0.1], [0.3], [0.5]])
    ours = mean_difference(np.repeat(luck, 100, axis=1))
    assert ours.p_value() == pytest.approx(stats.ttest_1samp(luck.ravel(), 0.0).pvalue)
    assert ours.interval().estimate == pytest.approx(0.3)


def test_the_two_errors_by_hand():
    """Rows' means 2 and 4, columns' means 2, 3, 4, no rest: MS_seed = 3 * 2, MS_unit = 2 * 1."""
    ours = mean_difference(np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]))
    assert ours.mean == 3.0
    (both, freedom), (over_seeds, seeds_freedom) = ours.errors
    assert both == pytest.approx(((6 + 2 - 0) / 6) ** 0.5)
    assert freedom == pytest.approx(8**2 / (6**2 / 1 + 2**2 / 2))  # Satterthwaite, below 3 (S - 1)
    assert (over_seeds, seeds_freedom) == (pytest.approx((6 / 6) ** 0.5), 1)


def test_units_of_heavy_tails_say_less_about_their_variance():
    d = sample(4, 60) + np.where(np.arange(60) == 7, 20.0, 0.0)
    kurtosis = stats.kurtosis(d.mean(axis=0), fisher=False)
    assert mean_difference(d).units_freedom == pytest.approx(2 * 59 / (kurtosis - 1)) and kurtosis > 20
    assert mean_difference(np.array([[0.0, 1.0], [2.0, 4.0]])).units_freedom == 1  # two units have no tails


def test_more_seeds_or_a_wider_level_find_smaller_effects():
    few, many = (mean_difference(sample(seeds, 40)) for seeds in (3, 8))
    assert many.smallest_effect(0.8, 0.01) < few.smallest_effect(0.8, 0.01) / 2
    assert few.smallest_effect(0.8, 0.05) < few.smallest_effect(0.8, 0.01) < few.smallest_effect(0.9, 0.01)


def test_long_documents_count_as_their_tokens_do():
    d, tokens = sample(3, 5), np.array([10, 20, 30, 400, 50])
    assert mean_difference(d, tokens).mean == pytest.approx((d * tokens).sum() / (3 * tokens.sum()))
    same = np.full(5, 7)
    assert np.allclose(mean_difference(d, same).errors, mean_difference(d).errors)


@pytest.mark.parametrize("number", [4, 20])
def test_the_smallest_effect_is_found_as_often_as_it_says_by_statsmodels(number):
    """Of one seed: statsmodels' power at true errors, averaged over those that the estimate leaves open."""
    d = sample(1, number)
    found = mean_difference(d).smallest_effect(0.8, 0.05)
    quantiles = stats.chi2.ppf((np.arange(400) + 0.5) / 400, number - 1)
    errors = np.std(d, ddof=1) * np.sqrt((number - 1) / quantiles)
    powers = [power.TTestPower().power(found / error, number, 0.05) for error in errors]
    assert np.mean(np.nan_to_num(powers, nan=1.0)) == pytest.approx(0.8, abs=0.01)  # NaN far out, where it is 1


def test_the_smallest_effect_of_known_errors_is_statsmodels():
    d = sample(1, 5000)
    theirs = power.TTestPower().solve_power(nobs=5000, alpha=0.01, power=0.9)
    assert mean_difference(d).smallest_effect(0.9, 0.01) == pytest.approx(theirs * np.std(d, ddof=1), rel=0.01)


def test_rank_sign_and_holm_are_the_libraries():
    values = sample(1, 10)[0]
    assert signed_rank(values) == pytest.approx(stats.wilcoxon(values).pvalue)
    assert signed_rank(np.zeros(4)) == 1.0
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = np.mean(np.abs(values @ signs) >= abs(values.sum()) - 1e-12)
    assert sign_flip(values) == pytest.approx(exact)
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(p) == multitest.multipletests(p, method="holm")[1].tolist()
    assert holm([]) == []


def test_the_crossed_bootstrap_draws_seeds_units_and_clusters():
    d = sample(4, 30)
    found = crossed_bootstrap(d)
    assert found == crossed_bootstrap(d)
    assert found.estimate == pytest.approx(d.mean())
    assert found.low < found.estimate < found.high
    doubled = np.repeat(d, 2, axis=1)  # each document twice: no more is known than before
    clusters = np.repeat(np.arange(30), 2)
    by_cluster = crossed_bootstrap(doubled, groups=clusters)
    assert (by_cluster.low, by_cluster.high) == pytest.approx((found.low, found.high))
    assert crossed_bootstrap(doubled).high - found.estimate < found.high - found.estimate


def test_the_bootstrap_agrees_with_scipy_over_units():
    d, tokens = sample(1, 40), np.random.default_rng(1).integers(10, 300, 40)

    def ratio(total, size, axis):
        return total.sum(axis=axis) / size.sum(axis=axis)

    theirs = stats.bootstrap(
        (d[0] * tokens, tokens.astype(float)), ratio, paired=True, vectorized=True, n_resamples=10_000,
        method="percentile", rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    found = crossed_bootstrap(d, weights=tokens)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_cohen_s_d_by_hand():
    assert effect_size(np.array([1.0, 2.0, 3.0])) == 2.0
    assert np.isnan(effect_size(np.ones(3)))


def test_nothing_that_varies_is_no_error():
    same = mean_difference(np.zeros((3, 4)))
    assert (same.p_value(), same.interval().low, same.smallest_effect()) == (1.0, 0.0, 0.0)
    assert mean_difference(np.ones((3, 4))).p_value() == 0.0


@pytest.mark.parametrize("d", [np.zeros((1, 1)), np.array([[1.0, np.nan]])], ids=["one", "nan"])
def test_what_cannot_be_compared_is_refused(d):
    with pytest.raises(UserError, match=r"finite differences \[seeds, units\] of two pairs or more"):
        mean_difference(d)
