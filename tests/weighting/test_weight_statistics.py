"""Statistics of weights by hand, and the table of targets that they are computed from."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp.weighting import target_table, weight_statistics
from wmtp.weighting.targets import valid_targets


def test_by_hand():
    s = weight_statistics(torch.tensor([0.0, 0.0, 2.0, 2.0]))
    assert s["p25"] == 0 and s["p75"] == s["p95"] == s["max"] == 2 and s["mean"] == 1
    # half the targets, each twice: half the sample, and log 2 of log 4 nats
    assert s["kept_share"] == s["effective_sample_size"] == 0.5
    assert s["entropy"] == pytest.approx(0.5)
    # percentiles between order statistics: 0.25 * 4 = 1, 0.75 * 4 = 3, 0.95 * 4 = 3.8
    s = weight_statistics(torch.tensor([4.0, 0.0, 3.0, 1.0, 2.0]))
    assert (s["p25"], s["p75"], s["p95"], s["max"]) == pytest.approx((1, 3, 3.8, 4))
    # 100 / (5 * 30)
    assert s["effective_sample_size"] == pytest.approx(2 / 3)
    p = [0.1, 0.2, 0.3, 0.4]
    assert s["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(5))
    assert "ce_correlation" not in s


def test_correlations_by_hand():
    w = torch.tensor([0.0, 1.0, 2.0])
    s = weight_statistics(w, policy_ce=torch.tensor([5.0, 3.0, 1.0]), position=torch.tensor([0.0, 1.0, 0.5]))
    assert s["ce_correlation"] == pytest.approx(-1)
    assert s["position_correlation"] == pytest.approx(0.5)  # (-1, 0, 1) . (-1/2, 1/2, 0) / (sqrt 2 * sqrt 1/2)


@pytest.mark.parametrize(("w", "ce"), [([1.0, 1.0 + 1e-7, 1.0], [1.0, 2.0, 3.0]), ([0.0, 1.0, 2.0], [4.0, 4.0, 4.0])])
def test_a_side_without_spread_has_no_correlation(w, ce):
    assert "ce_correlation" not in weight_statistics(torch.tensor(w), policy_ce=torch.tensor(ce))


def test_equal_weights_one_weight_none_and_only_zeros():
    for n in (1, 7):
        s = weight_statistics(torch.ones(n), policy_ce=torch.arange(n), position=torch.arange(n))
        assert s["effective_sample_size"] == pytest.approx(1) and s["entropy"] == pytest.approx(1)
        assert len(s) == 8 and s["entropy"] <= 1
    assert weight_statistics(torch.zeros(0)) == {}
    assert set(weight_statistics(torch.zeros(3), position=torch.arange(3)).values()) == {0.0}


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=40))
def test_percentiles_and_correlations_are_numpy_s(values):
    w = torch.tensor(values)
    ce = torch.arange(len(values)).square().float()
    s = weight_statistics(w, policy_ce=ce)
    exact = np.quantile(w.double().numpy(), (0.25, 0.75, 0.95, 1.0))
    assert [s[name] for name in ("p25", "p75", "p95", "max")] == pytest.approx(exact, rel=1e-12)
    if "ce_correlation" in s:
        assert s["ce_correlation"] == pytest.approx(np.corrcoef(w.double(), ce.double())[0, 1], abs=1e-9)


def table(weights, heads=2):
    labels = torch.tensor([[-100, 1, -100, 1, 1, -100, 1, -100]])
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]])
    valid = valid_targets(labels, heads, document_ids)
    ce = torch.stack([torch.arange(8.0), torch.arange(8.0) + 100])[:, None] * valid
    return target_table(ce, valid, weights, document_ids).tolist()


def test_table_of_weight_ce_and_place_of_each_target():
    # targets 1, 3, 4 of the first document (places 0, 1/2, 1), 6 of the second, its only one
    w = torch.tensor([[9.0, 0.1, 9, 0.3, 0.4, 9, 0.6, 9]])
    places = [(1, 0), (3, 0.5), (4, 1), (6, 0)]
    assert table(None) == [[1, j, place] for j, place in places]
    assert table(w) == [pytest.approx([j / 10, j, place]) for j, place in places]


def test_table_of_weights_by_head_has_every_pair_with_head_one_s_ce():
    # head 2 predicts targets 3 and 4: it has no token two before the others in their documents
    weights = torch.stack([torch.full((1, 8), 2.0), torch.full((1, 8), 3.0)])
    assert table(weights) == [[2, 1, 0], [2, 3, 0.5], [2, 4, 1], [2, 6, 0], [3, 3, 0.5], [3, 4, 1]]
