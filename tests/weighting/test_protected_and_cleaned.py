"""Tokens whose weight never falls below 1, and one threshold over a whole data set."""

import numpy as np
import pytest
import torch
from random_signals import METHODS, quiet, random_signals, scopes

from wmtp.data import Document, Documents, pack
from wmtp.errors import UserError
from wmtp.pretrained import byte_tokenizer
from wmtp.weighting import Signals, check_weights, dft, protect, rho1, token_cleaning, uniform
from wmtp.weighting.targets import valid_targets


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("name", ["rho1_select", "rho1_select_per_head", "dft"])
def test_a_protected_token_keeps_at_least_1_and_the_mean_stays(name, scope, seed):
    signals = random_signals(seed)
    method = METHODS[name](scope=scope)
    weighting = protect(method, [3, 7])
    with quiet():
        plain, w = method(signals), weighting(signals)
    check_weights(w, signals, weighting)
    shape = signals.valid[: 3 if weighting.per_head else 1]
    plain, w = (x.view(shape.shape) for x in (plain, w))
    kept = shape & ((signals.labels == 3) | (signals.labels == 7))
    assert bool((w[kept] >= 1).all()) and bool((w <= plain.maximum(kept.float()) + 1e-5).all())
    for head in range(len(w)):
        for mask in scopes(signals, head, scope):
            others = mask & ~kept[head]
            if others.any() and plain[head][others].sum() > 0:
                share = w[head][others] / plain[head][others].clamp(min=1e-9)
                used = plain[head][others] > 0
                torch.testing.assert_close(share[used], share[used][:1].expand(int(used.sum())), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_of_raw_weights_the_protected_ones_are_raised_and_the_others_stay(seed):
    signals = random_signals(seed)
    weighting = protect(dft(normalize="raw"), [3, 7])
    plain, w = dft(normalize="raw")(signals), weighting(signals)
    check_weights(w, signals, weighting)
    kept = signals.valid[0] & ((signals.labels == 3) | (signals.labels == 7))
    assert kept.any() and torch.equal(w, torch.where(kept, plain.clamp(min=1.0), plain))


def test_eos_is_the_tokenizers_and_plain_weights_stay_none():
    tokenizer = byte_tokenizer()
    labels = torch.tensor([[-100, 5, 6, tokenizer.eos_id]])
    signals = Signals(labels, valid_targets(labels, 1), None, {"policy_ce": torch.tensor([[[0.0, 0.1, 0.2, 9.0]]])})
    weighting = protect(dft(min_weight=0.0))
    with pytest.raises(ValueError, match="call prepare"):
        weighting(signals)
    weighting.prepare(tokenizer, None)
    w = weighting(signals)[0]
    assert w[3] == 1 and w.sum() == pytest.approx(3)
    assert protect(uniform(), ["eos"])(signals) is None
    for tokens, message in (([], "tokens is empty"), (["pad"], "got 'pad'"), ([-1], "got -1")):
        with pytest.raises(UserError, match=message):
            protect(dft(), tokens)


def scored(seed, lengths=(9, 30, 4, 17, 25), ties=False):
    rng, items = np.random.default_rng(seed), []
    for i, length in enumerate(lengths):
        tokens = rng.integers(0, 50, length, dtype=np.int32)
        labels = tokens.copy()
        labels[: length // 4] = -100
        drawn = rng.integers(0, 3, (2, length)) if ties else rng.normal(size=(2, length))
        signals = dict(zip(("base_ce", "reference_ce"), drawn.astype(np.float32), strict=True))
        items.append(Document(tokens, labels, f"d{i}", signals))
    return pack(Documents("scored", tuple(items)), 32, pad_id=0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("percentile", [0.01, 0.6, 1.0])
def test_the_threshold_is_the_data_sets_own(percentile, ties):
    data = scored(3, ties=ties)
    weighting = token_cleaning(percentile)
    weighting.prepare(None, data)
    batch = data.batch(list(range(len(data))))
    valid = valid_targets(batch["labels"], 1, batch["document_ids"])
    scores = (batch["signals"]["base_ce"] - batch["signals"]["reference_ce"])[valid[0]]
    w = weighting(Signals(batch["labels"], valid, batch["document_ids"], batch["signals"]))[valid[0]]
    least = scores.sort(descending=True).values[max(1, round(percentile * len(scores))) - 1]
    assert torch.equal(w > 0, scores >= least)
    assert w.sum().item() == pytest.approx(len(scores), rel=1e-5), "mean 1 over the data set"


def test_columns_that_the_data_lack_are_refused():
    with pytest.raises(UserError, match="has no column prior_ce"):
        token_cleaning(base="prior_ce").prepare(None, scored(0))
    with pytest.raises(UserError, match=r"percentile must be in \(0, 1\]"):
        token_cleaning(0)
    inside = protect(rho1("soft"), ["eos"])
    inside.prepare(byte_tokenizer(), None)
    assert inside.needs == rho1("soft").needs
