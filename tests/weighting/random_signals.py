"""Random micro-batches for properties that hold for every weighting, and the weightings they are tested on."""

import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from wmtp.weighting import (
    Signals,
    critic,
    dft,
    eaft,
    entropy,
    infosft,
    prift,
    profit,
    random_matched,
    rho1,
    shuffled,
    sstoken,
    talr,
)
from wmtp.weighting.targets import valid_targets

# Each takes min_weight, max_weight, strength and scope.
METHODS = {
    "rho1_select": lambda **common: rho1("select", percentile=0.4, **common),
    "rho1_soft": lambda **common: rho1("soft", **common),
    "rho1_soft_cold": lambda **common: rho1("soft", temperature=0.001, **common),
    "rho1_emphasis_abs": lambda **common: rho1("emphasis", "abs_excess", **common),
    "rho1_soft_relative": lambda **common: rho1("soft", "relative_excess", **common),
    "rho1_select_reference": lambda **common: rho1("select", "reference", **common),
    "rho1_select_per_head": lambda **common: rho1("select", per_head=True, **common),
    "rho1_soft_per_head": lambda **common: rho1("soft", per_head=True, **common),
    "dft": lambda **common: dft(**common),
    "dft_per_head": lambda **common: dft(temperature=2.0, per_head=True, **common),
    "entropy_select": lambda **common: entropy(**common),
    "entropy_soft": lambda **common: entropy("soft", **common),
    "critic_td": lambda **common: critic(**common),
    "critic_gae": lambda **common: critic("gae", gamma=0.9, map="exp", beta=0.5, **common),
    "critic_running": lambda **common: critic("gae", whiten="running", warmup_steps=1, **common),
    "critic_raw": lambda **common: critic(gamma=0.5, whiten="none", **common),
}
# Each takes normalize, strength and scope.
PUBLISHED = {"eaft": eaft, "profit": profit, "infosft": infosft, "talr": talr, "prift": prift}
PUBLISHED |= {"prift_mass": partial(prift, "mass")}
# One threshold for the data set: take strength and percentile.
OVER_DATA = {
    "rho1": partial(rho1, scope="dataset"),
    "rho1_reference": partial(rho1, score="reference", scope="dataset"),
    "entropy": partial(entropy, scope="dataset"),
    "sstoken": partial(sstoken, scope="dataset"),
}
METHODS |= {
    "sstoken": lambda min_weight=0, max_weight=1, **common: sstoken(**common),
}
CONTROLS = {"itself": lambda method: method, "shuffled": shuffled, "random_matched": random_matched}
CLIPLESS = ("sstoken", "rho1_select", "rho1_select_reference", "rho1_select_per_head", "entropy_select")


def random_signals(seed, heads=3, batch=3, seq=24, scale=1.0):
    """Packed rows with prompts and padding, and every signal a method may need."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    labels = torch.randint(0, 9, (batch, seq), generator=g)
    labels[rand(batch, seq) < 0.3] = -100
    document_ids = (rand(batch, seq) < 0.15).long().cumsum(1)
    padding = torch.arange(seq) >= seq - torch.randint(0, 5, (batch, 1), generator=g)
    labels[padding], document_ids[padding] = -100, -1
    valid = valid_targets(labels, heads, document_ids)
    named = {
        "policy_ce": rand(heads, batch, seq) * 5 * scale,
        "policy_entropy": rand(1, batch, seq) * 5 * scale,
        "policy_top20_entropy": rand(1, batch, seq) * min(3.0, 5 * scale),
        "reference_ce": rand(batch, seq) * 5 * scale,
        "values": rand(batch, seq) * scale,
        "reference_mass": rand(batch, seq),
    }
    return Signals(labels, valid, document_ids, named, step=7)


def changed(signals, fn):
    """The signals with fn(tensor, name) in place of each tensor."""
    tensors = {name: fn(getattr(signals, name), name) for name in ("labels", "valid", "document_ids")}
    return replace(signals, named={name: fn(signal, name) for name, signal in signals.named.items()}, **tensors)


def with_named(signals, **given):
    """The signals with others in place of some, or with None, without them."""
    named = {name: signal for name, signal in (signals.named | given).items() if signal is not None}
    return replace(signals, named=named)


def ready(weighting, signals):
    """The weighting after a step on these signals: past the warm-up of the one that has any."""
    with quiet():
        weighting(signals)
    weighting.end_step(lambda sums: sums)
    return weighting


@contextmanager
def quiet():
    """Small random documents often have scores without spread; that warning has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without spread")
        yield


def documents(signals):
    """(row, [positions]) of each document, padding left out."""
    found = []
    for row, ids in enumerate(signals.document_ids.tolist()):
        for number in sorted(set(ids) - {-1}):
            found.append((row, [j for j, i in enumerate(ids) if i == number]))
    return found


def scopes(signals, head, scope):
    """Boolean masks [B, S]: the targets over which a head's mean weight must be one."""
    valid = signals.valid[head]
    masks = []
    for row, places in documents(signals):
        mask = torch.zeros_like(valid)
        mask[row, places] = valid[row, places]
        masks.append(mask)
    masks = masks if scope == "sequence" else [valid]
    return [mask for mask in masks if mask.any()]


def one_row(*, policy_ce=None, reference_ce=None, entropy=None, values=None, heads=1):
    """One document: a prompt token, then a target per number given (values: one more, of the prompt token)."""
    given = next(x for x in (policy_ce, reference_ce, entropy, values and values[1:]) if x is not None)
    labels = torch.tensor([[-100] + [1] * len(given)])

    def row(numbers):
        return None if numbers is None else torch.tensor([[0.0, *numbers]])

    return with_named(
        Signals(labels, valid_targets(labels, heads)),
        policy_ce=None if policy_ce is None else row(policy_ce)[None],
        policy_entropy=None if entropy is None else row(entropy)[None],
        reference_ce=row(reference_ce),
        values=None if values is None else torch.tensor([values]),
    )
