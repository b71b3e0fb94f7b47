"""Invariants of every weighting over random inputs, and hand-computed examples of its formulas."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.loss import valid_targets
from wmtp.weighting import Rho1, Uniform, clipped_mean_one, top_share, weight_statistics, z_score


def random_inputs(seed, heads=3, batch=3, seq=24, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 9, (batch, seq), generator=g)
    labels[torch.rand(batch, seq, generator=g) < 0.3] = -100
    document_ids = (torch.rand(batch, seq, generator=g) < 0.15).long().cumsum(1)
    valid = valid_targets(labels, heads, document_ids)
    policy_ce = torch.rand(heads, batch, seq, generator=g) * 5 * scale * valid
    reference_ce = torch.rand(batch, seq, generator=g) * 5 * scale * valid[0]
    return labels, valid, document_ids, policy_ce, reference_ce


def scopes(valid, document_ids, scope):
    """The masks [B, S] over which a mean must be one, for one head's valid targets."""
    if scope == "batch":
        return [valid]
    pairs = {(b, int(d)) for b in range(len(valid)) for d in document_ids[b].unique()}
    masks = []
    for b, d in pairs:
        mask = torch.zeros_like(valid)
        mask[b] = valid[b] & (document_ids[b] == d)
        masks.append(mask)
    return masks


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(["select", "soft", "emphasis"]),
    score=st.sampled_from(["excess", "abs_excess", "relative_excess", "reference"]),
    scope=st.sampled_from(["sequence", "batch"]),
    per_head=st.booleans(),
    percentile=st.floats(0.01, 1),
    temperature=st.floats(0.001, 100),
    min_weight=st.floats(0, 1),
    max_weight=st.floats(1, 100),
    strength=st.floats(0.01, 1),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_mean_one_clip_mask_finite_no_gradient(
    seed, mode, score, scope, per_head, percentile, temperature, min_weight, max_weight, strength, scale
):
    labels, valid, document_ids, policy_ce, reference_ce = random_inputs(seed, scale=scale)
    rho1 = Rho1(mode, score, percentile, temperature, 2.0, min_weight, max_weight, strength, scope, per_head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = rho1(labels, valid, document_ids, policy_ce.requires_grad_(), reference_ce)
    assert w.shape == (valid.shape if per_head else labels.shape)
    assert w.dtype == torch.float32 and not w.requires_grad and bool(torch.isfinite(w).all())
    for head, weights in enumerate(w if per_head else [w]):
        assert bool((weights[~valid[head]] == 0).all())
        for mask in scopes(valid[head], document_ids, scope):
            if not mask.any():
                continue
            values = weights[mask].double()
            assert values.mean().item() == pytest.approx(1, abs=1e-5)
            raw = (values - (1 - strength)) / strength  # back from w~ to w
            if mode != "select":
                assert raw.min() >= min_weight - 1e-4 / strength and raw.max() <= max_weight + 1e-4 / strength


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), mode=st.sampled_from(["select", "soft", "emphasis"]))
def test_permuting_sequences_permutes_weights_and_padding_has_no_influence(seed, mode):
    labels, valid, document_ids, policy_ce, reference_ce = random_inputs(seed)
    rho1 = Rho1(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = rho1(labels, valid, document_ids, policy_ce, reference_ce)
        perm = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        permuted = rho1(labels[perm], valid[:, perm], document_ids[perm], policy_ce[:, perm], reference_ce[perm])
        assert torch.equal(permuted, w[perm])
        noise = torch.randn(labels.shape) * 1e6
        elsewhere = rho1(
            labels,
            valid,
            document_ids,
            torch.where(valid, policy_ce, noise),
            torch.where(valid[0], reference_ce, noise),
        )
    assert torch.equal(elsewhere, w)


def one_row(scores):
    """A row of len(scores) targets after one prompt token: (labels, valid, document_ids, policy_ce, reference_ce)."""
    n = len(scores)
    labels = torch.tensor([[-100] + [1] * n])
    ce = torch.tensor([[[0.0, *scores]]]) + 5.0
    return labels, valid_targets(labels, 1), None, ce, torch.full((1, n + 1), 5.0)


def test_select_by_hand():
    w = Rho1("select", percentile=0.4)(*one_row([0.5, -1.0, 2.0, 0.1, -3.0]))
    assert w[0].tolist() == pytest.approx([0, 2.5, 0, 2.5, 0, 0])  # top 2 of 5: 5 / 2 each


def test_signed_excess_puts_unlearnable_tokens_last_and_abs_excess_first():
    inputs = one_row([0.5, -4.0, 1.0])
    assert Rho1("select", percentile=0.34)(*inputs)[0].argmax() == 3
    assert Rho1("select", "abs_excess", percentile=0.34)(*inputs)[0].argmax() == 2


def test_soft_by_hand():
    # scores -1, 1: z-scores -1, 1; softmax at T = 2 times N: 2 e^{-1/2} / (e^{-1/2} + e^{1/2}), and the rest
    w = Rho1("soft", temperature=2.0, min_weight=0.0, max_weight=10.0)(*one_row([-1.0, 1.0]))
    low = 2 * math.exp(-0.5) / (math.exp(-0.5) + math.exp(0.5))
    assert w[0, 1:].tolist() == pytest.approx([low, 2 - low], rel=1e-6)


def test_emphasis_by_hand():
    # As above with T = 2, the top half doubled before scaling.
    w = Rho1("emphasis", percentile=0.5, temperature=2.0, boost=2.0, min_weight=0.0, max_weight=10.0)(
        *one_row([-1.0, 1.0])
    )
    low, high = math.exp(-0.5), 2 * math.exp(0.5)
    assert w[0, 1:].tolist() == pytest.approx([2 * low / (low + high), 2 * high / (low + high)], rel=1e-6)


def test_relative_excess_and_reference_by_hand():
    labels, valid, _, policy, _ = one_row([1.0, 1.0])  # policy CE 6, 6
    reference = torch.tensor([[0.0, 2.0, 3.0]])
    # relative excess 2 and 1, reference score -2 and -3: the first target wins both times
    for score in ("relative_excess", "reference"):
        w = Rho1("select", score, percentile=0.5)(labels, valid, None, policy, reference)
        assert w[0].tolist() == [0, 2, 0]


def test_clip_and_mean_one_together_by_hand():
    # exp(logs) = 1, 1, 1, 97 in a clip of [0.5, 2]: the last is 2, the others share what is missing of 4: 2/3 each
    logs = torch.tensor([[0.0, 0.0, 0.0, math.log(97)]])
    w = clipped_mean_one(logs, torch.ones_like(logs, dtype=torch.bool), 0.5, 2.0)
    assert w[0].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2.0])


def test_clip_of_scores_a_float32_softmax_would_underflow():
    logs = torch.tensor([[0.0, 500.0, 1000.0]])
    w = clipped_mean_one(logs, torch.ones_like(logs, dtype=torch.bool), 0.25, 1.5)
    assert w[0].tolist() == pytest.approx([0.25, 1.25, 1.5])


def test_policy_equal_to_its_reference_gives_ones_and_a_warning():
    with pytest.warns(UserWarning, match="without spread"):
        w = Rho1("select")(*one_row([0.0, 0.0, 0.0]))
    assert w[0].tolist() == [0, 1, 1, 1]


def test_uniform_gives_no_weights_and_needs_nothing():
    uniform = Uniform()
    assert uniform(torch.zeros(1, 2), None) is None
    assert not uniform.needs_reference and uniform.needs_policy_ce is None


def test_building_blocks():
    scores, mask = torch.tensor([[3.0, 1.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert top_share(scores, mask, 0.4).tolist() == [[1, 0, 0, 0]]  # a tie goes to the earlier position
    assert z_score(torch.tensor([[1.0, 3.0, 7.0]]), torch.tensor([[True, True, False]])).tolist() == [[-1, 1, 0]]


def test_weight_statistics_by_hand():
    s = weight_statistics(torch.tensor([0.0, 0.0, 2.0, 2.0, 9.0]), torch.tensor([True, True, True, True, False]))
    assert s == {"p25": 0, "p75": 2, "p95": 2, "max": 2, "kept_share": 0.5, "effective_sample_size": 0.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "hard"), ("score", "loss"), ("scope", "world"), ("percentile", 0.0), ("percentile", 1.5),
        ("temperature", 0.0), ("boost", 0.5), ("min_weight", 1.5), ("max_weight", 0.5), ("strength", -0.1),
        ("temperature", math.nan), ("max_weight", math.inf),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ValueError, match=f"weighting.{key} must be"):
        Rho1(**{key: value})


def test_missing_reference_and_non_finite_scores_are_errors():
    labels, valid, document_ids, policy_ce, reference_ce = one_row([1.0, 2.0])
    with pytest.raises(ValueError, match="needs a reference"):
        Rho1()(labels, valid, document_ids, policy_ce)
    reference_ce[0, 1] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        Rho1()(labels, valid, document_ids, policy_ce, reference_ce)
