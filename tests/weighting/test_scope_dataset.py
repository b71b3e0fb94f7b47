"""One threshold for a whole data set: from its columns exactly, or from the epoch before by a sketch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_signals import OVER_DATA, changed, quiet, random_signals

from wmtp.data import Document, Documents, pack
from wmtp.errors import UserError
from wmtp.weighting import Signals, check_weights, rho1, token_cleaning
from wmtp.weighting.over_data import _BUCKETS, _count, _key, _largest, _score
from wmtp.weighting.targets import valid_targets


class Data:
    """As much of a packed data set as a method asks that does not read it: its targets."""

    def __init__(self, targets, signals=()):
        self.num_targets, self.signals = targets, signals


def batches(number=4, seed=0, **options):
    return [random_signals(seed + i, **options) for i in range(number)]


def epoch(weighting, parts, ranks=1):
    """A step for each batch, or one for as many as there are ranks; the weights of each batch."""
    found = []
    for step in range(0, len(parts), ranks):
        gathered = []
        for signals in parts[step : step + ranks]:
            with quiet():
                found.append(weighting(signals))
            gathered.append(weighting._state._gathered)
            weighting._state._gathered = None
        weighting._state._gathered = gathered[0]
        weighting.end_step(lambda mine, all=gathered: sum(all))
    return found


def scores_of(name, signals):
    if name == "entropy":
        return signals.policy_entropy[0]
    excess = signals.policy_ce[0] - signals.reference_ce
    return {"rho1": excess, "sstoken": -excess, "rho1_reference": -signals.reference_ce}[name]


@pytest.mark.parametrize("name", OVER_DATA)
def test_an_epoch_keeps_what_is_above_the_threshold_of_the_epoch_before(name):
    share, parts = 0.43, batches()
    targets = sum(int(s.valid[0].sum()) for s in parts)
    weighting, batch = OVER_DATA[name](percentile=share), OVER_DATA[name].func
    weighting.prepare(None, Data(targets))
    warm_up = epoch(weighting, parts)
    options = {"score": "reference"} if name == "rho1_reference" else {}
    with quiet():
        expected = [batch(percentile=share, scope="batch", **options)(signals) for signals in parts]
    for ours, theirs in zip(warm_up, expected, strict=True):
        torch.testing.assert_close(ours, theirs)  # until a whole epoch has been seen
    ranked = torch.cat([scores_of(name, s)[s.valid[0]] for s in parts]).sort(descending=True).values
    wanted = max(1, round(share * len(ranked)))
    # The definition in numpy: the lower edge of the bucket of the wanted-th score.
    bits = np.array([ranked[wanted - 1].item()], np.float32).view(np.uint32)[0]
    edge = bits & 0xFFFF0000 if bits < 1 << 31 else bits | 0xFFFF
    threshold = np.array([edge], np.uint32).view(np.float32)[0].item()
    kept = int((ranked >= threshold).sum())
    assert kept >= wanted and (ranked[wanted - 1] - threshold).abs() <= 0.008 * ranked[wanted - 1].abs()
    second = epoch(weighting, parts)
    for signals, weights in zip(parts, second, strict=True):
        inside = scores_of(name, signals) >= threshold
        torch.testing.assert_close(weights, torch.where(inside & signals.valid[0], len(ranked) / kept, 0.0))
        check_weights(weights, signals, weighting)
    assert sum(w.sum().item() for w in second) == pytest.approx(len(ranked), rel=1e-5), "mean 1 over the data set"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(list(OVER_DATA)), strength=st.sampled_from([0.3, 1.0]))
def test_it_depends_on_no_order_rank_or_cut_keeps_its_bounds_and_resumes(seed, name, strength):
    parts = batches(4, seed % 10**6)
    targets = sum(int(s.valid[0].sum()) for s in parts)
    if min(int(s.valid[0].sum()) for s in parts) == 0:
        return
    build = lambda: OVER_DATA[name](percentile=0.5, strength=strength)
    one, two, permuted, resumed = (build() for _ in range(4))
    for weighting in (one, two, permuted, resumed):
        weighting.prepare(None, Data(targets))
    epoch(one, parts)
    epoch(two, parts, ranks=2)
    backwards = lambda s: changed(s, lambda x, n: x[..., torch.arange(len(s.labels) - 1, -1, -1), :])
    epoch(permuted, [backwards(s) for s in reversed(parts)])
    epoch(resumed, parts[:3])
    again = build()
    again.prepare(None, Data(targets))
    again.load_state_dict(resumed.state_dict())
    epoch(again, parts[3:])
    signals = changed(parts[0], lambda x, n: x.requires_grad_() if x.is_floating_point() else x)
    signals = replace(signals, training=False)
    weights = one(signals)
    assert not weights.requires_grad and torch.equal(weights, one(signals)), "looking leaves the state as it is"
    low, high = one.bounds
    inside = weights[signals.valid[0]]
    assert low - 1e-5 <= inside.min() and inside.max() <= high + 1e-5 and not weights[~signals.valid[0]].any()
    for other in (two, permuted, again):
        assert torch.equal(weights, other(signals))
        assert other.state_dict()["threshold"] == one.state_dict()["threshold"]
    read = {"policy_ce": signals.valid, "policy_entropy": signals.valid[:1], "reference_ce": signals.valid[0]}
    junk = changed(signals, lambda x, n: torch.where(read[n], x, torch.nan) if n in read else x)
    assert torch.equal(one(junk), weights)


def test_a_column_gives_it_exactly_and_keeps_no_state():
    rng, items = np.random.default_rng(0), []
    for i, length in enumerate((9, 30, 4, 17, 25)):
        tokens = rng.integers(0, 50, length, dtype=np.int32)
        column = {"reference_ce": (1 + 1e-3 * rng.normal(size=length)).astype(np.float32)}  # all in a few buckets
        items.append(Document(tokens, tokens.copy(), f"d{i}", column))
    data = pack(Documents("scored", tuple(items)), 32, pad_id=0)
    weighting = rho1(score="reference", percentile=0.37, scope="dataset")
    weighting.prepare(None, data)
    batch = data.batch(list(range(len(data))))
    valid = valid_targets(batch["labels"], 1, batch["document_ids"])
    signals = Signals(batch["labels"], valid, batch["document_ids"], batch["signals"])
    scores = -batch["signals"]["reference_ce"][valid[0]]
    least = scores.sort(descending=True).values[round(0.37 * len(scores)) - 1]
    assert torch.equal(weighting(signals)[valid[0]] > 0, scores >= least)
    weighting.end_step(lambda mine: mine)
    assert weighting.state_dict() == {}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_keys_are_the_scores_in_their_order(numbers):
    scores = torch.tensor(numbers, dtype=torch.float32)
    keys = _key(scores)
    assert bool((keys >= 0).all()) and bool((keys < 2**32).all())
    assert torch.equal(keys[:, None] < keys, scores[:, None] < scores)
    assert torch.equal(torch.tensor([_score(k) for k in keys.tolist()]), scores)
    bucket, above = _largest(_count(keys >> 16), 1)
    assert above == 0 and _score(bucket << 16) <= scores.max() and len(_count(keys >> 16)) == _BUCKETS


def test_what_it_cannot_do_is_said():
    for options, message in (
        ({"mode": "soft"}, "scope dataset keeps a share of all targets .* got mode=soft"),
        ({"per_head": True}, "scope dataset keeps .* got per_head=true"),
        ({"percentile": 0.0}, r"percentile must be in \(0, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            rho1(scope="dataset", **options)
    weighting = rho1(scope="dataset")
    with quiet():
        weighting(random_signals(0))
    with pytest.raises(RuntimeError, match=r"call prepare\(tokenizer, data\) before training"):
        weighting.end_step(lambda mine: mine)
    with pytest.raises(RuntimeError, match="counts are not merged yet"):
        weighting.state_dict()
    told = rho1(scope="dataset")
    told.prepare(None, Data(10))
    with pytest.raises(
        UserError, match="needs the state of its threshold, got nothing; resume with the weighting and the data"
    ):
        told.load_state_dict({})
    with pytest.raises(UserError, match="has no column base_ce, reference_ce; score it"):
        token_cleaning().prepare(None, Data(10))
