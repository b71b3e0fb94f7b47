"""Claim lines: when a study may say what, and in which words."""

import numpy as np
import pytest

from wmtp.errors import UserError
from wmtp.report.claims import compare_all


def arms(**shifts):
    """Five seeds on forty documents, each arm's differences from the first with a little luck of each seed."""
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.5, (5, 40))
    return {"uniform": base} | {
        name: base + shift + rng.normal(0, 0.01, (5, 1)) + rng.normal(0, 0.02, (5, 40))
        for name, shift in shifts.items()
    }


def test_a_difference_beyond_the_luck_of_seeds_is_claimed_with_its_size_and_sample():
    one = compare_all(arms(rho1=-0.2), [("rho1", "uniform")])[0]
    assert one.found and one.better
    assert str(one).startswith("rho1 better than uniform by 0.2")
    assert str(one).endswith("nats [0.1902, 0.2185], p < 0.001, 5 seeds x 40 documents")


def test_the_sign_of_the_metric_decides_what_is_better():
    worse = compare_all(arms(dft=0.2), [("dft", "uniform")])[0]
    assert str(worse).startswith("dft worse than uniform by 0.1956 nats [")
    higher = compare_all(arms(dft=0.2), [("dft", "uniform")], unit="", lower_is_better=False)[0]
    assert str(higher).startswith("dft better than uniform by 0.1956 [") and " nats" not in str(higher)


def test_no_difference_says_what_would_have_been_seen():
    one = compare_all(arms(dft=0.0), [("dft", "uniform")])[0]
    assert not one.found
    assert str(one).startswith("no difference found between dft and uniform: ")
    assert str(one).endswith(f"{one.smallest:.4f} would have been found with a probability of 0.8")
    assert compare_all(arms(dft=0.0), [("dft", "uniform")], margin=0.05)[0].p_equivalent < 0.01
    assert "within +-0.05 of each other" in str(compare_all(arms(dft=0.0), [("dft", "uniform")], margin=0.05)[0])


def test_all_comparisons_of_a_study_count():
    study = arms(a=-0.02, **{f"b{k}": 0.0 for k in range(40)})
    alone = compare_all(study, [("a", "uniform")])[0]
    among = compare_all(study, [(name, "uniform") for name in study if name != "uniform"])[0]
    assert alone.found and not among.found and among.p > alone.p
    assert "after Holm over 41 comparisons" in str(among)
    assert among.smallest > alone.smallest


def test_a_winner_without_its_controls_is_uncontrolled():
    study = arms(rho1=-0.2, shuffled=0.0, matched=0.0)
    controls = {"rho1": ["shuffled", "matched"]}
    pairs = [("rho1", "uniform"), ("rho1", "shuffled")]
    missing = compare_all(study, pairs, controls=controls)[0]
    assert str(missing).endswith("uncontrolled: the study lacks matched")
    complete = compare_all(study, [*pairs, ("rho1", "matched")], controls=controls)
    assert "uncontrolled" not in str(complete[0])
    assert "uncontrolled" not in str(compare_all(arms(dft=0.2), [("dft", "uniform")], controls={"dft": ["x"]})[0])


def test_one_seed_says_so():
    study = {name: values[:1] for name, values in arms(rho1=-0.2).items()}
    assert str(compare_all(study, [("rho1", "uniform")])[0]).endswith("; one seed: its luck is part of the difference")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "at least one comparison"),
        ([("rho1", "unifrom")], "no arm is named 'unifrom'; there are rho1, short, uniform"),
        ([("rho1", "short")], r"rho1 has \[seeds, documents\] \(5, 40\) and short \(5, 39\): pair them first"),
    ],
)
def test_a_study_that_does_not_fit_is_refused(pairs, message):
    study = arms(rho1=0.0)
    study["short"] = study["rho1"][:, :39]
    with pytest.raises(UserError, match=message):
        compare_all(study, pairs)
