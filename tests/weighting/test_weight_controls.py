"""Controls: random weights with a method's own distribution, the same wherever a document lies."""

from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from random_signals import METHODS, changed, documents, one_row, quiet, random_signals, ready

from wmtp.weighting import Signals, random_matched, rho1, shuffled
from wmtp.weighting.targets import valid_targets


def rows_of(*labels):
    """A batch of documents of one prompt token and these labels each."""
    labels = torch.tensor([[-100, *row] for row in labels])
    return Signals(labels=labels, valid=valid_targets(labels, 1))


def fixed(*numbers, **attributes):
    """A weighting that gives every document of a batch the same weights."""

    def method(signals):
        return torch.tensor([0.0, *numbers]).expand(signals.labels.shape)

    vars(method).update(attributes)
    return method


def at_steps(control, signals, steps):
    return [control(replace(signals, step=step)) for step in steps]


@pytest.mark.parametrize("name", METHODS)
def test_shuffled_keeps_each_document_s_weights_and_moves_them(name):
    signals = random_signals(5, batch=4, seq=40)
    method = ready(METHODS[name](scope="batch"), signals)
    with quiet():
        own, new = method(signals), shuffled(method)(signals)
    assert not torch.equal(own, new)
    by_head = [w.reshape(-1, *w.shape[-2:]) for w in (own, new)]
    for w, v, valid in zip(*by_head, signals.valid[: len(by_head[0])], strict=True):
        for row, places in documents(signals):
            places = [j for j in places if valid[row, j]]
            assert w[row, places].sort().values.tolist() == v[row, places].sort().values.tolist()


def test_every_permutation_is_as_likely_over_documents_and_over_steps():
    method = fixed(0.5, 1.0, 1.5)
    many = rows_of(*[[i, 0, i % 7] for i in range(1200)])  # different labels
    counts = {"documents": Counter(map(tuple, shuffled(method, seed=3)(many)[:, 1:].tolist()))}
    steps = at_steps(shuffled(method), rows_of([4, 5, 6]), range(600))
    counts["steps"] = Counter(tuple(w[0, 1:].tolist()) for w in steps)
    for count in counts.values():
        assert set(count) == set(permutations((0.5, 1.0, 1.5)))
        share = [n / count.total() for n in count.values()]
        assert all(abs(x - 1 / 6) < 0.06 for x in share)  # standard deviation 0.015 or less


def test_matched_draws_are_of_the_document_s_own_weights_at_mean_one():
    # two of four targets have weight 2. The number of kept ones among four draws is binomial; the mean comes back by
    # scaling, within the bounds: one kept target can be no more than 3, so the zeros share the fourth.
    expected = {0: [1, 1, 1, 1], 1: [1 / 3, 1 / 3, 1 / 3, 3], 2: [0, 0, 2, 2], 3: [0, 4 / 3, 4 / 3, 4 / 3], 4: [1] * 4}
    control = random_matched(fixed(0.0, 2.0, 2.0, 0.0, bounds=(0.0, 3.0)))
    drawn = control(rows_of(*[[i, 2, 3, 4] for i in range(800)]))[:, 1:].sort(dim=1).values.tolist()
    counts = [sum(row == pytest.approx(e, abs=1e-6) for row in drawn) for e in list(expected.values())[:4]]
    # one in 16 for none and all four (the same weights), 4 and 6 of 16 between
    for count, sixteenths in zip(counts, (2, 4, 6, 4), strict=True):
        assert abs(count - 50 * sixteenths) < 60
    assert sum(counts) == 800


def test_without_bounds_a_single_kept_draw_takes_the_whole_mean():
    control = random_matched(fixed(0.0, 2.0, 2.0, 0.0))
    assert any(
        sorted(w[0, 1:].tolist()) == pytest.approx([0, 0, 0, 4])
        for w in at_steps(control, rows_of([1, 2, 3, 4]), range(50))
    )


@pytest.mark.parametrize("control", [shuffled, random_matched])
def test_a_new_draw_at_each_step_seed_document_and_the_same_when_asked_again(control):
    numbers = torch.linspace(0.1, 1.9, 12).tolist()
    signals = rows_of(range(12), range(12), [11, *range(11)])
    same, twin, other = control(fixed(*numbers))(signals)
    assert torch.equal(same, twin) and not torch.equal(same, other)
    assert torch.equal(control(fixed(*numbers))(signals)[0], same)
    assert not torch.equal(control(fixed(*numbers))(replace(signals, step=1))[0], same)
    assert not torch.equal(control(fixed(*numbers), seed=1)(signals)[0], same)


@pytest.mark.parametrize("control", [shuffled, random_matched])
def test_heads_are_drawn_independently(control):
    signals = one_row(policy_ce=range(12), heads=2)
    both = torch.tensor([0.0, 0.0, *torch.linspace(0.1, 1.9, 11).tolist()]).expand(2, 1, 13)
    valid = signals.valid[1:].expand(2, 1, 13)  # the same targets for both
    first, second = control(lambda signals: both)(replace(signals, valid=valid))
    assert not torch.equal(first, second)


def test_matched_weights_keep_the_mean_a_document_has_within_its_batch():
    signals = random_signals(6, heads=1, batch=4, seq=40)
    method = rho1("soft", scope="batch")
    own, new = method(signals), random_matched(method)(signals)
    means = []
    for row, places in documents(signals):
        places = [j for j in places if signals.valid[0, row, j]]
        if places:
            means.append(own[row, places].mean().item())
            assert new[row, places].mean().item() == pytest.approx(means[-1], rel=1e-5)
    assert max(means) > 1.1  # documents do differ


@pytest.mark.parametrize("control", [shuffled, random_matched])
def test_a_control_is_as_its_method_towards_the_loss(control):
    method = METHODS["rho1_soft_per_head"](strength=0.5)
    wrapped = control(method)
    assert wrapped.needs == {"policy_ce", "reference_ce"} and wrapped.per_head and wrapped.bounds == method.bounds
    plain = control(fixed(1.0, 1.0))  # a plain function
    plain.end_step(None)
    plain.load_state_dict(plain.state_dict())
    assert plain.needs == set() and not plain.per_head and plain.state_dict() == {}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1.0, float("nan"), 2.0), "1 of 3 weights of the method are not finite"),
        ((1.0, -1.0, 3.0), "1 of 3 .* below 0"),
    ],
)
def test_weights_that_are_none_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        random_matched(fixed(*numbers))(rows_of([1, 2, 3]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("control", [shuffled, random_matched])
def test_cuda_draws_what_the_cpu_draws(control):
    signals = random_signals(7)
    on_cuda = changed(signals, lambda x, n: x.cuda())
    weighting = control(rho1("soft"))
    torch.testing.assert_close(weighting(on_cuda).cpu(), weighting(signals), rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^method must be a weighting"):
        shuffled("rho1")
    with pytest.raises(ValueError, match=r"^seed must be .*, got -1"):
        random_matched(rho1(), seed=-1)
