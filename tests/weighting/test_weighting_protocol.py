"""The one class every method is composed of: what it asks for, what it refuses, and a method of one's own."""

import pytest
import torch
from random_signals import METHODS, one_row, random_signals, with_named

from wmtp.weighting import Weighting, clipped_mean_one


def test_a_method_of_one_s_own_is_one_builder():
    def short_targets(strength=1.0):
        return Weighting(
            lambda signals: -signals.labels[None].float(),
            lambda scores, mask: clipped_mean_one(scores, mask, 0.0, 5.0),
            needs=(),
            strength=strength,
            bounds=(0.0, 5.0),
        )

    signals = one_row(policy_ce=[0.0, 0.0])
    signals.labels[0, 2] = 2  # labels 1 and 2: weights in the ratio of e to 1
    e = torch.e
    assert short_targets()(signals)[0].tolist() == pytest.approx([0, 2 * e / (e + 1), 2 / (e + 1)])
    assert short_targets(0.5).bounds == (0.5, 3.0)


NEEDS = {
    "rho1_select": {"policy_ce", "reference_ce"},
    "rho1_select_reference": {"reference_ce"},
    "dft": {"policy_ce"},
    "entropy_soft": {"policy_entropy"},
    "critic_gae": {"values"},
}


@pytest.mark.parametrize(("name", "needs"), NEEDS.items())
def test_a_method_needs_what_it_reads_and_says_how_to_give_it(name, needs):
    weighting, signals = METHODS[name](), random_signals(0)
    assert weighting.needs == needs
    unread = {"policy_ce", "policy_entropy", "reference_ce", "values"} - needs
    weighting(with_named(signals, **dict.fromkeys(unread)))
    for signal in needs:
        with pytest.raises(ValueError, match=f"the weighting needs {signal}, got none: (set|wmtp)"):
            weighting(with_named(signals, **{signal: None}))
        with pytest.raises(ValueError, match=rf"{signal} must have the labels' \[B, S\] = \(3, 24\), got"):
            weighting(with_named(signals, **{signal: getattr(signals, signal)[..., 1:]}))


def test_per_head_weights_from_the_ce_of_one_head_are_refused():
    signals = random_signals(0)
    with pytest.raises(ValueError, match="need policy_ce of all 3 heads, got 1"):
        METHODS["dft_per_head"]()(with_named(signals, policy_ce=signals.policy_ce[:1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scope": "rank"}, "^scope must be one of sequence, batch, got 'rank'"),
        ({"strength": 1.5}, r"^strength must be in \[0, 1\]"),
    ],
)
def test_what_a_builder_of_one_s_own_gets_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Weighting(lambda s: s.labels, lambda scores, mask: mask, **{"needs": (), **change})
