"""What a weighting promises is checked, by name, in the first steps and in every 20th; a plain function will do."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_signals import CONTROLS, METHODS, quiet, random_signals, ready

from wmtp.errors import UserError
from wmtp.loss import mtp_loss
from wmtp.weighting import Weighting, any_weighting, check_weights, clipped_mean_one, shuffled

# Two documents in the one row of a batch, three heads: targets are tokens 1 to 3 and 5 to 7.
LABELS = torch.tensor([[-100, 1, 2, 3, -100, 4, 5, 6]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
TARGETS = (LABELS >= 0).float()


def loss_with(weighting, **options):
    g = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(3, 1, 8, 4, generator=g), torch.randn(9, 4, generator=g)
    return mtp_loss(hidden, unembedding, LABELS, weighting, document_ids=DOCUMENTS, **options)


def thrice_ce():
    return Weighting(
        lambda signals: signals.policy_ce, lambda ce, mask: 3 * ce * mask, needs={"policy_ce"}, bounds=(0.0, 5.0)
    )


def with_mean(first, second):
    """Weights of these means over the first and the second document."""
    return TARGETS * torch.where(DOCUMENTS == 0, first, second)


def at(position, value, weights=TARGETS):
    weights = weights.clone()
    weights[..., 0, position] = value
    return weights


def rule(weights, **attributes):
    def my_rule(signals):
        return weights

    vars(my_rule).update(attributes)
    return my_rule


BY_HEAD = torch.tensor([[[0.0, 1, 1, 1, 0, 1, 1, 1]], [[0, 0, 1, 1, 0, 0, 1, 1]], [[0, 0, 0, 2, 0, 0, 0, 1]]])
BROKEN = [
    (thrice_ce(), r"weighting thrice_ce gave 5 weights outside its bounds \[0, 5\], the first at row 0, token 2: 16.7"),
    (shuffled(thrice_ce()), r"weighting shuffled\(thrice_ce\) gave \d weights outside its bounds"),
    (rule(3 * TARGETS), "weighting rule gave weights of mean 3 over the 6 targets of the batch .1 of 1 scopes"),
    (rule(with_mean(0.5, 1.5), scope="sequence"), "mean 0.5 over the 3 targets of the document in row 0, from token 1"),
    (rule(with_mean(1.0, 1.002), scope="sequence"), "of mean 1.002 over the 3 .*row 0, from token 5 .*1 of 2 scopes"),
    (rule(BY_HEAD, scope="sequence"), "of mean 2 over the 1 targets of the document in head 3, row 0, from token 3 on"),
    (rule(at(2, math.nan)), "weighting rule gave 1 weights that are not finite, the first at row 0, token 2: nan"),
    (rule(at(7, math.inf)), "1 weights that are not finite, the first at row 0, token 7: inf"),
    (rule(at(3, 2.5, at(2, -0.5))), r"1 weights outside its bounds \[0, inf\], the first at row 0, token 2: -0.5"),
    (rule(at(3, 1.3, at(2, 0.7)), bounds=(0.0, 1.2)), r"1 weights outside its bounds \[0, 1.2\], .*token 3: 1.3"),
    (rule(TARGETS.roll(-1, 1)), "rule gave 2 weights not 0 where no target is, the first at row 0, token 0: 1"),
    (rule(at(0, math.nan)), "gave 1 weights not 0 where no target is, the first at row 0, token 0: nan"),
    (rule(TARGETS[0]), r"must return weights \[B, S\] = \(1, 8\) or \[H, B, S\] = \(3, 1, 8\), got shape \(8,\)"),
    (rule(1.0), "weighting rule must return weights .*, got float"),
    (rule(TARGETS.clone().requires_grad_()), "weighting rule returned weights that carry a gradient; detach them"),
    (rule(TARGETS, needs={"polcy_ce"}), "the weighting needs polcy_ce, got none: use a dataset with a polcy_ce column"),
    (rule(TARGETS, scope="rank"), "^scope must be one of sequence, batch, got 'rank'"),
    ("rho1", "^a weighting must be a callable from Signals to weights, got 'rho1'"),
]  # fmt: skip


@pytest.mark.parametrize(("weighting", "message"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_promise_is_refused_by_name_place_and_value(weighting, message):
    with pytest.raises(UserError, match=message) as error:
        loss_with(weighting)
    assert "\n" not in str(error.value)


def test_it_is_checked_in_the_first_three_steps_and_in_every_20th():
    refused = []
    for step in range(45):
        try:
            loss_with(thrice_ce(), step=step)
        except UserError:
            refused.append(step)
    assert refused == [0, 1, 2, 20, 40]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    name=st.sampled_from(list(METHODS)),
    control=st.sampled_from(list(CONTROLS)),
    scope=st.sampled_from(["sequence", "batch"]),
    heads=st.integers(1, 4),
    batch=st.integers(1, 3),
    seq=st.integers(6, 40),
    strength=st.floats(0, 1),
)
def test_the_shipped_methods_keep_their_promise(seed, name, control, scope, heads, batch, seq, strength):
    signals = random_signals(seed, heads, batch, seq)
    weighting = CONTROLS[control](METHODS[name](scope=scope, strength=strength))
    if bool(signals.valid[0].any()):
        weighting = ready(weighting, signals)
    with quiet():
        check_weights(weighting(signals), signals, any_weighting(weighting))


def test_a_plain_function_has_all_that_a_recipe_asks_for():
    def heavy(signals, factor):
        return clipped_mean_one(factor * signals.policy_ce[0], signals.valid[0], 0.0, 5.0)

    plain = any_weighting(rule(TARGETS))
    assert plain.needs == set() and not plain.per_head and plain.bounds == (0, math.inf) and plain.scope == "batch"
    assert plain.state_dict() == {} and plain.end_step(sum) is None and plain.load_state_dict({}) is None
    with pytest.raises(UserError, match="keeps no state, got one with sums"):
        plain.load_state_dict({"sums": 1})
    assert any_weighting(plain) is plain and any_weighting(thrice_ce()).name == "thrice_ce"

    heavy.needs = {"policy_ce"}
    weighting = any_weighting(functools.partial(heavy, factor=0.5))  # its attributes are the function's
    assert weighting.needs == {"policy_ce"} and "heavy" not in weighting.needs
    signals = replace(random_signals(0), document_ids=None)
    assert torch.equal(weighting(signals), heavy(signals, 0.5))


def test_a_rule_with_a_memory_keeps_it_across_a_resume():
    class Ramp:
        scope = "sequence"
        steps = 0

        def __call__(self, signals):
            return signals.valid[0].float()

        def end_step(self, all_reduce_sum):
            self.steps += 1

        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    for wrap in (any_weighting, shuffled):
        first, second = wrap(Ramp()), Ramp()
        first.end_step(sum)
        wrap(second).load_state_dict(first.state_dict())
        assert second.steps == 1 and first.scope == "sequence" and first.name.endswith(("Ramp", "Ramp)"))
