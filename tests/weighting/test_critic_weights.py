"""Weights from a critic's values: formulas by hand, generalised advantages, running whitening."""

import json
import math
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_signals import changed, documents, one_row, random_signals

from wmtp.weighting import critic, gae, random_matched, value_deltas

WIDE = {"min_weight": 0.0, "max_weight": 100.0}
VALUES = [0.5, 0.6, 0.4, 0.9]  # of the prompt's last token, then of three targets


def mean_one(raw):
    return [0, *(len(raw) * x / sum(raw) for x in raw)]


def test_td_by_hand():
    # gamma 1: 0.1, -0.2, 0.5; gamma 0.5: 0.6 - 0.25, 0.4 - 0.3, 0.9 - 0.2
    signals = one_row(values=VALUES)
    for gamma, deltas in ((1.0, [0.1, -0.2, 0.5]), (0.5, [0.35, 0.1, 0.7])):
        found = value_deltas(signals.values, signals.valid[0], gamma)[0]
        assert found.tolist() == pytest.approx([0, *deltas], abs=1e-7)
        w = critic(gamma=gamma, map="exp", beta=0.5, whiten="none", **WIDE)(signals)
        assert w[0].tolist() == pytest.approx(mean_one([math.exp(d / 0.5) for d in deltas]), rel=1e-6)


def test_softmax_after_a_z_score_by_hand():
    # two deltas, 0.1 and 0.5: z-scores -1 and 1, softmax at T = 2
    w = critic(temperature=2.0, **WIDE)(one_row(values=[0.0, 0.1, 0.6]))
    assert w[0].tolist() == pytest.approx(mean_one([math.exp(-0.5), math.exp(0.5)]), rel=1e-5)


def test_a_delta_within_the_clip_by_hand():
    # exp(1000), 1, 1 in [0.5, 2]: 2, and 0.5 for the others
    w = critic(whiten="none", min_weight=0.5, max_weight=2.0)(one_row(values=[0.0, 1000.0, 1000.0, 1000.0]))
    assert w[0].tolist() == pytest.approx([0, 2, 0.5, 0.5])


def test_gae_by_hand():
    # decay 0.5, deltas 0.1, -0.2, 0.5: 0.1 + 0.5 * 0.05 = 0.125, -0.2 + 0.5 * 0.5 = 0.05, 0.5
    assert gae(torch.tensor([[0.1, -0.2, 0.5]]), 0.5)[0].tolist() == pytest.approx([0.125, 0.05, 0.5])
    w = critic("gae", gamma=1.0, gae_lambda=0.5, map="exp", whiten="none", **WIDE)(one_row(values=VALUES))
    assert w[0].tolist() == pytest.approx(mean_one([math.exp(a) for a in (0.125, 0.05, 0.5)]), rel=1e-6)
    # gamma 0.5, lambda 0.5, decay 0.25: deltas 0.35, 0.1, 0.7 (above); 0.1 + 0.25 * 0.7 = 0.275, 0.35 + 0.25 * 0.275
    w = critic("gae", gamma=0.5, gae_lambda=0.5, map="exp", whiten="none", **WIDE)(one_row(values=VALUES))
    assert w[0].tolist() == pytest.approx(mean_one([math.exp(a) for a in (0.41875, 0.275, 0.7)]), rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), gamma=st.floats(0, 1), gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_equals_a_double_loop_and_stays_inside_the_document(seed, gamma, gae_lambda):
    signals = random_signals(seed, heads=1, seq=37)
    valid = signals.valid[0]
    is_target, values = valid.tolist(), signals.values.double().tolist()
    expected = torch.zeros_like(signals.values, dtype=torch.float64)
    for row, places in documents(signals):
        v = values[row]
        for j in places:
            later = [p for p in places if p >= j and is_target[row][p]]
            expected[row, j] = sum((gamma * gae_lambda) ** (p - j) * (v[p] - gamma * v[p - 1]) for p in later)
    deltas = value_deltas(signals.values, valid, gamma)
    found = gae(deltas, gamma * gae_lambda, signals.document_ids)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-12, atol=1e-12)


def test_lambda_one_and_gamma_one_telescope_to_what_is_still_to_come():
    # A_j = V_last - V_{j-1}
    signals = one_row(values=VALUES)
    found = gae(value_deltas(signals.values, signals.valid[0], 1.0), 1.0)
    assert found[0, 1:].tolist() == pytest.approx([0.9 - 0.5, 0.9 - 0.6, 0.9 - 0.4], abs=1e-7)


@pytest.mark.parametrize("whiten", ["sequence", "none"])
def test_values_that_never_change_give_ones_and_a_warning(whiten):
    with pytest.warns(UserWarning, match="critic: 3 value differences without spread"):
        w = critic(whiten=whiten)(one_row(values=[0.7] * 4))
    assert w[0].tolist() == pytest.approx([0, 1, 1, 1])


# ----------------------------------------------------------------------------------------------------------------------
# Running whitening


def running(**kwargs):
    return critic(map="exp", whiten="running", **WIDE, **kwargs)


def alone(sums):
    return sums


def with_deltas(*deltas):
    return one_row(values=[0.0, *torch.tensor(deltas).cumsum(0).tolist()])


def test_running_whitening_by_hand():
    weighting = running(momentum=0.5, warmup_steps=1)
    weighting(with_deltas(1.0, 3.0))
    weighting.end_step(alone)
    # mean 2, variance 1: -1 and 2 are -3 and 0 standard deviations away
    w = weighting(with_deltas(-1.0, 2.0))
    assert w[0].tolist() == pytest.approx(mean_one([math.exp(-3), 1]), rel=1e-6)

    weighting = running(momentum=0.5, warmup_steps=1)
    for deltas in ((1.0, 3.0), (5.0, 7.0)):
        weighting(with_deltas(*deltas))
        weighting.end_step(alone)
    # a third of the weight on the first step: mean (2 + 2 * 6) / 3 = 14/3, square (5 + 2 * 37) / 3 = 79/3
    std = math.sqrt(79 / 3 - (14 / 3) ** 2)
    w = weighting(with_deltas(4.0, 8.0))
    assert w[0].tolist() == pytest.approx(mean_one([math.exp((x - 14 / 3) / std) for x in (4, 8)]), rel=1e-5)


def test_warm_up_gives_ones_for_so_many_steps():
    weighting = running(warmup_steps=3)
    for _ in range(3):
        assert weighting(with_deltas(1.0, 3.0))[0].tolist() == [0, 1, 1]
        weighting.end_step(alone)
    assert weighting(with_deltas(1.0, 3.0))[0].tolist() != [0, 1, 1]


def on_two_ranks(*weightings):
    """end_step of each in a thread of its own, with a real sum between them."""
    barrier, parts = threading.Barrier(2, timeout=300), []

    def all_reduce_sum(sums):
        parts.append(sums)
        barrier.wait()
        return parts[0] + parts[1]

    threads = [threading.Thread(target=w.end_step, args=(all_reduce_sum,)) for w in weightings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_ranks_and_three_micro_batches_whiten_as_one():
    weightings = one, a, b = [running(delta="gae", warmup_steps=2, momentum=0.8) for _ in range(3)]
    for step in range(4):
        signals = random_signals(step, batch=6)
        parts = [changed(signals, lambda x, n, i=i: x[..., i : i + 1, :]) for i in range(6)]
        whole = one(signals)
        split = torch.cat([weighting(part) for part, weighting in zip(parts, (a, a, a, b, b, b), strict=True)])
        torch.testing.assert_close(split, whole)
        one.end_step(alone)
        on_two_ranks(a, b)
    assert not torch.equal(whole, signals.valid[0].float())  # past the warm-up
    states = [w.state_dict() for w in weightings]
    assert states[1] == states[2] and states[1]["steps"] == states[0]["steps"] == 4
    assert states[1]["sums"] == pytest.approx(states[0]["sums"], rel=1e-12)


def test_a_forward_that_runs_twice_changes_nothing():
    once, twice = running(warmup_steps=1), running(warmup_steps=1)
    signals = random_signals(3)
    once(signals)
    twice(signals), twice(signals)
    for weighting in (once, twice):
        weighting.end_step(alone)
    torch.testing.assert_close(once(signals), twice(signals))


def test_looking_at_weights_leaves_the_statistics_alone():
    weighting = running(warmup_steps=1)
    weighting(with_deltas(1.0, 3.0))
    weighting(replace(with_deltas(1e6, -1e6), training=False))
    weighting.end_step(alone)
    assert weighting.state_dict()["sums"] == pytest.approx([0.02, 0.04, 0.1])  # (1 - 0.99) * (2, 4, 10)


@pytest.mark.parametrize("wrap", [lambda w: w, random_matched])
def test_state_round_trip_is_exact(wrap):
    trained = wrap(running(delta="gae", warmup_steps=2))
    for step in range(3):
        trained(random_signals(step))
        trained.end_step(alone)
    resumed = wrap(running(delta="gae", warmup_steps=2))
    resumed.load_state_dict(json.loads(json.dumps(trained.state_dict())))
    for step in range(3, 5):
        assert torch.equal(trained(random_signals(step)), resumed(random_signals(step)))
        trained.end_step(alone), resumed.end_step(alone)
    assert trained.state_dict() == resumed.state_dict()


def test_a_step_that_is_not_merged_cannot_be_saved_or_forgotten():
    weighting = running()
    with pytest.raises(RuntimeError, match="no weights were computed"):
        weighting.end_step(alone)
    weighting(with_deltas(1.0, 3.0))
    with pytest.raises(RuntimeError, match="call end_step first"):
        weighting.state_dict()


def test_another_method_s_state_is_refused():
    with pytest.raises(ValueError, match="must hold sums and steps, got nothing"):
        running().load_state_dict({})
    with pytest.raises(ValueError, match="keeps no state, got one with steps, sums"):
        critic().load_state_dict({"sums": [0, 0, 0], "steps": 3})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delta", "mc"), ("gamma", 1.1), ("gamma", -0.1), ("gae_lambda", 1.5), ("map", "linear"), ("temperature", 0.0),
        ("temperature", -1.0), ("beta", 0.0), ("beta", math.nan), ("whiten", "batch"), ("momentum", 1.0),
        ("warmup_steps", 0), ("min_weight", 2.0), ("max_weight", 0.5), ("strength", 2),
        ("scope", "row"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ValueError, match=f"^{key} must be .*, got {value!r}"):
        critic(**{key: value})
