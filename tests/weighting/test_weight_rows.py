"""The building blocks of weights, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.weighting import clipped_mean, clipped_mean_one, spread, top_share, weigh_rows, z_score
from wmtp.weighting.rows import scope_rows

INF = math.inf


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def everywhere(scores):
    return torch.ones_like(scores, dtype=torch.bool)


def test_top_share_z_score_and_spread_see_only_real_entries():
    scores, mask = torch.tensor([[3.0, 1.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert top_share(scores, mask, 0.4).tolist() == [[1, 0, 0, 0]]  # a tie goes to the earlier position
    assert spread(scores, mask).tolist() == [[2]]
    assert z_score(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]])).tolist() == [[-1, 1, 0]]


def test_clip_and_mean_one_together():
    # exp(logs) = 1, 1, 1, 97 in a clip of [0.5, 2]: the last is 2, the others share what is missing of 4: 2/3 each
    logs = row(0.0, 0.0, 0.0, math.log(97))
    assert clipped_mean_one(logs, everywhere(logs), 0.5, 2.0)[0].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_clip_of_scores_a_float32_softmax_would_underflow():
    logs = row(0.0, 500.0, 1000.0)
    assert clipped_mean_one(logs, everywhere(logs), 0.25, 1.5)[0].tolist() == pytest.approx([0.25, 1.25, 1.5])


def test_a_zero_weight_rises_only_where_the_mean_needs_it():
    logs = row(-INF, 0.0, math.log(3), 0.0)
    # 1, 3, 1 scaled to a sum of 4; then with a clip of 1.2, three times 1.2 leave 0.4 for the zero
    assert clipped_mean_one(logs, everywhere(logs), 0.0, 9.0)[0].tolist() == pytest.approx([0, 0.8, 2.4, 0.8])
    assert clipped_mean_one(logs, everywhere(logs), 0.0, 1.2)[0].tolist() == pytest.approx([0.4, 1.2, 1.2, 1.2])
    nothing = row(-INF, -INF)
    assert clipped_mean_one(nothing, everywhere(nothing), 0.0, 9.0)[0].tolist() == [1, 1]


@settings(max_examples=60, deadline=None)
@given(
    logs=st.lists(st.floats(-1e4, 1e4) | st.just(-INF), min_size=1, max_size=8),
    low=st.floats(0, 1),
    high=st.floats(1, 50),
    part=st.floats(0, 1),
)
def test_any_mean_inside_the_clip_is_reached(logs, low, high, part):
    mean = low + part * (high - low)
    mask = torch.tensor([[True] * len(logs) + [False]])
    w = clipped_mean(row(*logs, 7.0), mask, low, high, row(mean))[0]
    assert w[-1] == 0
    assert w[:-1].mean().item() == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert bool(((w[:-1] >= low) & (w[:-1] <= high)).all())
    for i, j in zip(range(len(logs)), range(1, len(logs)), strict=False):  # a higher score never weighs less
        assert (w[i] - w[j]) * (1 if logs[i] >= logs[j] else -1) >= -1e-12


def test_scopes_are_kept_apart_whatever_the_document_ids():
    """Ids as large as a dataset's numbering, and the same id in two rows of the batch."""
    valid = torch.ones(2, 2, 3, dtype=torch.bool)
    document_ids = torch.tensor([[5_000_000, 5_000_000, 7], [7, 7, 5_000_000]])
    sums = weigh_rows(
        torch.arange(12.0).view(2, 2, 3), scope_rows(valid, document_ids, "sequence"),
        lambda scores, mask: (scores * mask).sum(1, keepdim=True) * mask,
    )  # fmt: skip
    assert sums.tolist() == [[[1, 1, 2], [7, 7, 5]], [[13, 13, 8], [19, 19, 11]]]
