"""Weights of other papers: worked examples, and what must hold of the published form and of the one with mean 1."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_signals import CONTROLS, PUBLISHED, changed, one_row, quiet, random_signals, ready, scopes

from wmtp.errors import UserError
from wmtp.loss import ReferenceReading, mtp_loss
from wmtp.weighting import Signals, dft, eaft, infosft, prift, profit, sstoken, talr
from wmtp.weighting.targets import valid_targets

seeds, names = st.integers(0, 2**31), st.sampled_from(list(PUBLISHED))


def weights(weighting, signals):
    return weighting(signals)[0].tolist()[1:]


def of(*probabilities):
    """Signals of a policy that gives the targets these probabilities."""
    return one_row(policy_ce=[-math.log(p) for p in probabilities])


def test_profit_keeps_what_is_likelier_than_the_threshold():
    assert weights(profit(), of(0.5, 0.11, 0.09, 1.0)) == [1, 1, 0, 1]
    assert weights(profit(normalize="mean"), of(0.5, 0.11, 0.09, 1.0)) == pytest.approx([4 / 3, 4 / 3, 0, 4 / 3])
    assert weights(profit(normalize="mean"), of(0.01, 0.02)) == [0, 0], "a scope whose weights are all 0 stays so"


def test_infosft_peaks_where_the_policy_half_knows():
    logit = math.log(0.93 / 0.07)
    expected = [p * max(0, 1 - math.log(p / (1 - p)) / logit) for p in (0.568, 0.5, 0.93, 0.99, 1e-3)]
    assert weights(infosft(), of(0.568, 0.5, 0.93, 0.99, 1e-3)) == pytest.approx(expected, abs=1e-6)
    assert expected[0] == pytest.approx(0.508, abs=1e-3) and expected[1] == 0.5
    assert weights(infosft(), one_row(policy_ce=[0.0, 60.0])) == pytest.approx([0, 0], abs=1e-6)


def test_prift_is_the_initial_models_probability():
    signals = one_row(reference_ce=[-math.log(p) for p in (0.25, 1.0, 0.5)])
    assert weights(prift(), signals) == pytest.approx([0.25, 1.0, 0.5])
    assert weights(prift(normalize="mean"), signals) == pytest.approx([3 / 7, 12 / 7, 6 / 7])


def test_prift_mass_keeps_what_few_tokens_crowd_out():
    """The docstring's example, from the logits: the third of four tokens has mass 0.2 + 0.1, the second 0.3 + 0.3."""
    unembedding = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[:, None]
    labels = torch.tensor([[0, 2, 1, 0, 3]])
    read = ReferenceReading({"reference_mass"})(torch.ones(1, 1, 5, 1), unembedding, labels)["signals"]
    assert read["reference_mass"][0].tolist() == pytest.approx([0, 0.3, 0.6, 1.0, 0.1])
    signals = Signals(labels, valid_targets(labels, 1), None, read)
    assert weights(prift("mass"), signals) == [0, 1, 1, 0]
    assert weights(prift("mass", threshold=0.25), signals) == [1, 1, 1, 0]


def test_the_published_dft_is_the_probability_itself():
    assert weights(dft(normalize="raw"), of(0.5, 0.25)) == pytest.approx([0.5, 0.25])
    assert weights(dft(2.0, normalize="raw"), of(0.25, 0.09)) == pytest.approx([0.5, 0.3])
    assert dft(normalize="raw", max_weight=7.0).bounds == (0.0, 1.0)
    with pytest.raises(UserError, match="normalize must be one of mean, raw"):
        dft(normalize="none")


def test_talr_takes_its_temperature_from_the_median_document():
    # One document: tau is its mean CE, (1 + 3) / 2; weights e^(-CE / 2).
    assert weights(talr(), one_row(policy_ce=[1.0, 3.0])) == pytest.approx([math.exp(-0.5), math.exp(-1.5)])
    assert weights(talr(floor=0.3), one_row(policy_ce=[1.0, 3.0])) == pytest.approx([math.exp(-0.5), 0.3])


def test_sstoken_keeps_what_has_been_learnt_most():
    signals = one_row(policy_ce=[1.0, 2.0, 0.5, 4.0], reference_ce=[3.0, 2.5, 0.4, 4.0])
    assert weights(sstoken(percentile=0.5), signals) == [2, 2, 0, 0]


def test_eaft_reads_the_entropy_of_the_20_likeliest_tokens():
    generator = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(2, 1, 9, 6, generator=generator), torch.randn(50, 6, generator=generator)
    labels = torch.randint(0, 50, (1, 9), generator=generator)
    out = mtp_loss(hidden, unembedding, labels, eaft(alpha=2.0), step=0)
    top = (hidden[0] @ unembedding.T).double().topk(20).values[0]  # of position t, for target t + 1
    p = F.softmax(top, -1)
    expected = ((-(p * p.log()).sum(-1) / 3.0) ** 2)[:-1]
    torch.testing.assert_close(out.weights[0, 1:].double(), expected, rtol=1e-5, atol=1e-6)
    assert mtp_loss(hidden, unembedding, labels, eaft(normalize="mean"), step=0).weights.sum() == pytest.approx(8.0)


@settings(max_examples=80, deadline=None)
@given(
    seed=seeds,
    name=names,
    control=st.sampled_from(list(CONTROLS)),
    normalize=st.sampled_from(["mean", "raw"]),
    scope=st.sampled_from(["sequence", "batch"]),
    strength=st.sampled_from([0.3, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_bounds_mask_mean_and_no_gradient(seed, name, control, normalize, scope, strength, scale):
    signals = random_signals(seed, scale=scale)
    signals = changed(signals, lambda x, n: x.requires_grad_() if x.is_floating_point() else x)
    method = PUBLISHED[name](normalize=normalize, scope=scope, strength=strength)
    weighting = ready(CONTROLS[control](method), signals)
    with quiet():
        w = weighting(signals)
    assert w.dtype == torch.float32 and not w.requires_grad and bool(torch.isfinite(w).all())
    assert bool((w[~signals.valid[0]] == 0).all())
    low, high = weighting.bounds
    for mask in scopes(signals, 0, scope):
        values = w[mask].double()
        assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5
        if normalize == "mean":
            mean = values.mean().item()
            assert mean == pytest.approx(1, abs=1e-5) or mean == pytest.approx(1 - strength, abs=1e-6)


def on_paper(name, document, every):
    """The raw weights of a document's targets, in Python's own float64: rows of (CE, top-20 entropy, CE_ref, mass)."""
    means = sorted(sum(ce for ce, *_ in other) / len(other) for other in every)
    tau = means[(len(means) - 1) // 2]
    logit = lambda p: math.log(p / (1 - p)) if p < 1 else math.inf
    rules = {
        "eaft": lambda ce, top, ref, mass: top / 3.0,
        "profit": lambda ce, top, ref, mass: float(math.exp(-ce) > 0.1),
        "infosft": lambda ce, top, ref, mass: math.exp(-ce) * max(0.0, 1 - logit(math.exp(-ce)) / logit(0.93)),
        "talr": lambda ce, top, ref, mass: max(0.01, math.exp(-ce) ** (1 / tau)),
        "prift": lambda ce, top, ref, mass: math.exp(-ref),
        "prift_mass": lambda ce, top, ref, mass: float(mass >= 0.5),
        "dft": lambda ce, top, ref, mass: math.exp(-ce),
    }
    return [rules[name](*row) for row in document]


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    name=st.sampled_from([*PUBLISHED, "dft"]),
    normalize=st.sampled_from(["mean", "raw"]),
    scope=st.sampled_from(["sequence", "batch"]),
)
def test_weights_are_those_of_the_formula_in_float64(seed, name, normalize, scope):
    signals = random_signals(seed, scale=0.6)
    columns = (signals.policy_ce[0], signals.policy_top20_entropy[0], signals.reference_ce, signals.reference_mass)
    groups = scopes(signals, 0, "sequence")
    every = [torch.stack([column[mask] for column in columns], dim=1).double().tolist() for mask in groups]
    found = {id(mask): on_paper(name, document, every) for mask, document in zip(groups, every, strict=True)}
    build = partial(dft, max_weight=1e6) if name == "dft" else PUBLISHED[name]
    weights = build(normalize=normalize, scope=scope)(signals)
    for mask in groups:
        expected = found[id(mask)]
        if normalize == "mean":
            among = expected if scope == "sequence" else [w for document in found.values() for w in document]
            mean = sum(among) / len(among)
            expected = [w / mean if mean else 0.0 for w in expected]
        assert weights[mask].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, name=names, scope=st.sampled_from(["sequence", "batch"]))
def test_neither_order_nor_what_is_no_target_counts(seed, name, scope):
    signals = random_signals(seed)
    weighting = PUBLISHED[name](scope=scope)
    order = torch.randperm(len(signals.labels), generator=torch.Generator().manual_seed(seed))
    w = weighting(signals)
    torch.testing.assert_close(
        weighting(changed(signals, lambda x, n: x[..., order, :])), w[order], rtol=1e-5, atol=1e-6
    )
    first = signals.valid[0]
    read = {"policy_ce": signals.valid, "policy_top20_entropy": first[None]}
    read |= {"reference_ce": first, "reference_mass": first}
    junk = changed(signals, lambda x, n: torch.where(read[n], x, torch.nan) if n in read else x)
    assert torch.equal(weighting(junk), w)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: profit(threshold=1.0), r"threshold must be in \[0, 1\), got 1.0"),
        (lambda: infosft(ceiling=0.5), r"ceiling must be in \(0.5, 1\), got 0.5"),
        (lambda: talr(floor=-0.1), r"floor must be in \[0, 1\]"),
        (lambda: eaft(alpha=0), "alpha must be > 0, got 0"),
        (lambda: prift("rank"), "signal must be one of prob, mass, got 'rank'"),
        (lambda: prift("mass", threshold=0), r"threshold must be in \(0, 1\], got 0"),
        (lambda: prift(normalize="sum"), "normalize must be one of mean, raw, got 'sum'"),
        (lambda: sstoken(percentile=0), r"percentile must be in \(0, 1\]"),
    ],
)
def test_wrong_values_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()
