"""Hand-computed examples of the methods that look at the policy and a reference."""

import math

import pytest
from random_signals import one_row

from wmtp.weighting import dft, entropy, rho1


def excess(scores):
    """Signals whose excess is the scores: reference CE 5 everywhere."""
    return one_row(policy_ce=[s + 5 for s in scores], reference_ce=[5.0] * len(scores))


def weights(weighting, signals):
    w = weighting(signals)[0].tolist()
    assert w[0] == 0  # the prompt token
    return w[1:]


def test_select_keeps_the_top_share():
    # the top 2 of 5: 5 / 2 each
    assert weights(rho1("select", percentile=0.4), excess([0.5, -1.0, 2.0, 0.1, -3.0])) == [2.5, 0, 2.5, 0, 0]


def test_signed_excess_puts_unlearnable_tokens_last_and_abs_excess_first():
    signals = excess([0.5, -4.0, 1.0])
    assert weights(rho1("select", percentile=0.34), signals) == [0, 0, 3]
    assert weights(rho1("select", "abs_excess", percentile=0.34), signals) == [0, 3, 0]


def test_soft_is_a_softmax_of_z_scores():
    # scores -1, 1: z-scores -1, 1; softmax at T = 2 times N: 2 e^{-1/2} / (e^{-1/2} + e^{1/2}), and the rest
    low = 2 * math.exp(-0.5) / (math.exp(-0.5) + math.exp(0.5))
    soft = rho1("soft", temperature=2.0, min_weight=0.0, max_weight=10.0)
    assert weights(soft, excess([-1.0, 1.0])) == pytest.approx([low, 2 - low], rel=1e-6)


def test_emphasis_boosts_the_top_share():
    # As above with T = 2, the top half doubled before scaling.
    low, high = math.exp(-0.5), 2 * math.exp(0.5)
    emphasis = rho1("emphasis", percentile=0.5, temperature=2.0, boost=2.0, min_weight=0.0, max_weight=10.0)
    expected = [2 * low / (low + high), 2 * high / (low + high)]
    assert weights(emphasis, excess([-1.0, 1.0])) == pytest.approx(expected, rel=1e-6)


def test_relative_excess_and_reference():
    # policy CE 6 and 6, reference CE 2 and 3: relative excess 2 and 1, reference score -2 and -3
    signals = one_row(policy_ce=[6.0, 6.0], reference_ce=[2.0, 3.0])
    for score in ("relative_excess", "reference"):
        assert weights(rho1("select", score, percentile=0.5), signals) == [2, 0]


def test_per_head_scores_each_head_by_its_own_ce():
    # excess of head 1: 1, 3, 2; of head 2, which has no first target: -, 1, 2
    signals = one_row(policy_ce=[1.0, 3.0, 2.0], reference_ce=[0.0, 0.0, 0.0], heads=2)
    signals.policy_ce.resize_(2, 1, 4)[1, 0] = signals.policy_ce.new_tensor([0.0, 9.0, 1.0, 2.0])
    w = rho1("select", percentile=0.5, per_head=True)(signals)
    # round(0.5 * 3) = 2 of head 1's three, 1 of head 2's two
    assert w[:, 0].tolist() == [[0, 0, 1.5, 1.5], [0, 0, 0, 2]]


def test_dft_is_proportional_to_the_probability_of_the_target():
    # p = 0.5, 0.25, 0.25; N p / sum p = 1.5, 0.75, 0.75
    signals = one_row(policy_ce=[math.log(2), math.log(4), math.log(4)])
    assert weights(dft(), signals) == pytest.approx([1.5, 0.75, 0.75], rel=1e-6)
    # sqrt p = 0.7071, 0.5, 0.5
    root = [3 * x / (math.sqrt(0.5) + 1) for x in (math.sqrt(0.5), 0.5, 0.5)]
    assert weights(dft(temperature=2.0), signals) == pytest.approx(root, rel=1e-6)


def test_dft_of_probabilities_that_float32_cannot_hold():
    # p = e^-200, e^-201: their ratio is e
    signals = one_row(policy_ce=[200.0, 201.0])
    assert weights(dft(), signals) == pytest.approx([2 * math.e / (math.e + 1), 2 / (math.e + 1)], rel=1e-5)


def test_entropy_selects_where_the_policy_is_least_certain():
    # a fifth of five
    assert weights(entropy(), one_row(entropy=[0.1, 2.0, 3.0, 0.5, 1.0])) == [0, 0, 5, 0, 0]
    # z-scores of 0 and 2: -1 and 1
    low = 2 * math.exp(-1) / (math.exp(-1) + math.exp(1))
    soft = entropy("soft", min_weight=0.0)
    assert weights(soft, one_row(entropy=[0.0, 2.0])) == pytest.approx([low, 2 - low], rel=1e-6)


@pytest.mark.parametrize("mode", ["select", "soft", "emphasis"])
def test_scores_without_spread_give_ones_and_a_warning(mode):
    with pytest.warns(UserWarning, match=r"rho1: scores without spread in 1 of 1 scopes \(the policy equals its ref"):
        assert weights(rho1(mode), excess([0.0, 0.0, 0.0])) == [1, 1, 1]
    with pytest.warns(UserWarning, match="entropy: scores without spread"):
        assert weights(entropy(mode), one_row(entropy=[2.0, 2.0])) == [1, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "hard"), ("score", "loss"), ("scope", "world"), ("percentile", 0.0), ("percentile", 1.5),
        ("temperature", 0.0), ("boost", 0.5), ("min_weight", 1.5), ("max_weight", 0.5), ("strength", -0.1),
        ("temperature", math.nan), ("max_weight", math.inf),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key, value):
    for builder in (rho1, entropy, dft):
        if key in builder.__code__.co_varnames[: builder.__code__.co_argcount]:
            with pytest.raises(ValueError, match=f"^{key} must be .*, got {value!r}"):
                builder(**{key: value})
