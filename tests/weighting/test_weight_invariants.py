"""What docs/method.md promises of weights, for every method and for both controls around it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_signals import CLIPLESS, CONTROLS, METHODS, changed, documents, quiet, random_signals, ready, scopes

from wmtp.weighting import uniform
from wmtp.weighting.targets import valid_targets

names = st.sampled_from(list(METHODS))
controls = st.sampled_from(list(CONTROLS))
seeds = st.integers(0, 2**31)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    seed=seeds,
    name=names,
    control=controls,
    scope=st.sampled_from(["sequence", "batch"]),
    min_weight=st.floats(0, 1),
    max_weight=st.floats(1, 100),
    strength=st.floats(0.01, 1),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_mean_one_clip_mask_finite_no_gradient(
    seed, name, control, scope, min_weight, max_weight, strength, scale, dtype
):
    signals = random_signals(seed, scale=scale)
    signals = changed(signals, lambda x, n: x.to(dtype).requires_grad_() if x.is_floating_point() else x)
    common = {"min_weight": min_weight, "max_weight": max_weight, "strength": strength, "scope": scope}
    method = METHODS[name](**common)
    weighting = ready(CONTROLS[control](method), signals)
    with quiet():
        w = weighting(signals)
    assert w.shape == (signals.valid.shape if weighting.per_head else signals.labels.shape)
    assert w.dtype == torch.float32 and not w.requires_grad and bool(torch.isfinite(w).all())
    low, high = weighting.bounds
    if name not in CLIPLESS:
        assert (low, high) == pytest.approx(
            (1 - strength + strength * min_weight, 1 - strength + strength * max_weight)
        )
    for head, weights in enumerate(w if weighting.per_head else [w]):
        assert bool((weights[~signals.valid[head]] == 0).all())
        for mask in scopes(signals, head, scope):
            values = weights[mask].double()
            assert values.mean().item() == pytest.approx(1, abs=1e-5)
            assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5


@settings(max_examples=60, deadline=None)
@given(seed=seeds, name=names, control=controls)
def test_permuting_sequences_permutes_weights(seed, name, control):
    signals = random_signals(seed)
    weighting = ready(CONTROLS[control](METHODS[name]()), signals)
    order = torch.randperm(len(signals.labels), generator=torch.Generator().manual_seed(seed))
    with quiet():
        w = weighting(signals)
        permuted = weighting(changed(signals, lambda x, n: x[..., order, :]))
    torch.testing.assert_close(permuted, w[..., order, :], rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, name=names, control=controls, scope=st.sampled_from(["sequence", "batch"]))
def test_what_is_no_target_has_no_influence(seed, name, control, scope):
    """NaN everywhere else; of the values, those of a target and of the token before it are read."""
    signals = random_signals(seed)
    first = signals.valid[0]
    read = {"policy_ce": signals.valid, "policy_entropy": first[None], "reference_ce": first}
    read["values"] = first | torch.cat([first[:, 1:], torch.zeros_like(first[:, :1])], dim=1)
    junk = changed(signals, lambda x, n: torch.where(read[n], x, torch.nan) if n in read else x)
    weighting = ready(CONTROLS[control](METHODS[name](scope=scope)), signals)
    with quiet():
        assert torch.equal(weighting(junk), weighting(signals))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, name=names, control=controls)
def test_a_packed_document_has_the_weights_it_has_alone(seed, name, control):
    """Each document in a row of its own, in another order, with padding behind it and no document_ids."""
    signals = random_signals(seed)
    weighting = ready(CONTROLS[control](METHODS[name]()), signals)
    found = documents(signals)[::-1]
    width = max(len(places) for _, places in found) + 2

    def alone(x, name):
        if name == "document_ids":
            return None
        rows = x.new_full((*x.shape[:-2], len(found), width), -100 if name == "labels" else 0)
        for i, (row, places) in enumerate(found):
            rows[..., i, : len(places)] = x[..., row, places]
        return rows

    apart = changed(signals, alone)
    apart = replace(apart, valid=valid_targets(apart.labels, len(signals.valid)))
    with quiet():
        packed, single = weighting(signals), weighting(apart)
    for i, (row, places) in enumerate(found):
        torch.testing.assert_close(single[..., i, : len(places)], packed[..., row, places], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_signals_are_read_in_float32(name):
    signals = changed(random_signals(4), lambda x, n: x.bfloat16() if x.is_floating_point() else x)
    exact = changed(signals, lambda x, n: x.float() if x.is_floating_point() else x)
    with quiet():
        assert torch.equal(ready(METHODS[name](), signals)(signals), ready(METHODS[name](), exact)(exact))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, name=names, strength=st.floats(0.01, 1))
def test_strength_mixes_the_weights_with_ones(seed, name, strength):
    signals = random_signals(seed)
    with quiet():
        full = ready(METHODS[name](), signals)(signals)
        mixed = ready(METHODS[name](strength=strength), signals)(signals)
    ones = signals.valid.float() if full.dim() == 3 else signals.valid[0].float()
    torch.testing.assert_close(mixed, (1 - strength) * ones + strength * full)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", METHODS)
def test_strength_zero_needs_nothing_and_gives_no_weights(name, control):
    weighting = CONTROLS[control](METHODS[name](strength=0.0))
    bare = replace(random_signals(0), named={})
    assert weighting(bare) is None and weighting.needs == set() and not weighting.per_head
    assert weighting.bounds == (1, 1) and weighting.state_dict() == {}


@pytest.mark.parametrize("control", CONTROLS)
def test_uniform_needs_nothing_and_gives_no_weights(control):
    weighting = CONTROLS[control](uniform())
    assert weighting(random_signals(0)) is None and weighting.needs == set()


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("name", METHODS)
def test_one_target_and_none_at_all(name, control):
    """A document of one target has weight 1; a batch without any gets zeros."""
    signals = random_signals(1)
    only = torch.zeros_like(signals.valid)
    only[:, 0, torch.where(signals.valid[-1, 0])[0][-1]] = True  # a target of every head
    weighting = ready(CONTROLS[control](METHODS[name]()), signals)
    with quiet():
        w = weighting(replace(signals, valid=only))
        assert torch.equal(w, only.float() if w.dim() == 3 else only[0].float())
        assert not weighting(replace(signals, valid=only & False)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", METHODS)
def test_a_signal_that_is_not_finite_is_an_error_with_its_count(name, bad):
    signals = random_signals(2, heads=1)
    weighting = ready(METHODS[name](), signals)
    row, place = signals.valid[0].nonzero()[-1].tolist()  # the last target: no target after it reads its value
    total = int(signals.valid[0].sum())

    def spoil(x, n):
        x = x.clone()
        if x.is_floating_point():
            x[..., row, place] = bad
        if n == "policy_ce":
            x[..., row, place] = 0.0 if weighting.needs != {"policy_ce"} else bad  # inf - inf is one case more
        return x

    with pytest.raises(ValueError, match=rf"1 of {total} .* are not finite"):
        weighting(changed(signals, spoil))
