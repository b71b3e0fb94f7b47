"""When a model may take another's place: worked numbers, and evaluations that must not be compared."""

import pytest
from tracked_runs import results_of

from wmtp.registry.promotion import Evaluation, RunRecord, not_worse


def evaluation(letters, run_id="a", **settings):
    run = RunRecord(run_id, "name", "wmtp/data/tasks", "FINISHED", {}, {}, {})
    return Evaluation(run, "tasks", "0" * 64, results_of(letters, **settings))


def test_a_difference_that_chance_explains_passes_and_a_sure_one_does_not():
    """20 tasks, one sample each. Of the resampled means, m tasks of 20 that differ by d give about m * d / 20 with a
    spread of sqrt(m (20 - m)) / 20 / sqrt(20): 1 in 20 lies inside two of them, 19 in 20 far outside."""
    production = evaluation(["p"] * 20, "b")
    accepted, why, figures = not_worse(evaluation(["p"] * 19 + ["w"]), production)
    assert accepted and figures["difference"]["estimate"] == pytest.approx(-1 / 20)
    assert figures["difference"]["high"] == 0 and figures["ours"] == 0.95 and figures["theirs"] == 1.0
    assert why.startswith("not worse beyond the interval: pass@1 95.0 against 100.0 %, difference -5.0 (")
    accepted, why, figures = not_worse(evaluation(["w"] * 19 + ["p"]), production)
    assert not accepted and figures["difference"]["high"] < 0 and why.startswith("worse beyond the interval")


def test_the_interval_is_that_of_the_tasks_in_pairs():
    """Both models solve half of the tasks. Where it is the same half there is no doubt; where it is the other half the
    difference is 0 as well, but each task differs by 1."""
    half = ["p", "w"] * 20
    same = not_worse(evaluation(half), evaluation(half, "b"))[2]["difference"]
    assert same == {"estimate": 0.0, "low": 0.0, "high": 0.0}
    other = not_worse(evaluation(half), evaluation(["w", "p"] * 20, "b"))[2]["difference"]
    # 40 differences of +-1: the mean's standard error is 1 / sqrt(40) = 0.158, two of them 0.31.
    assert other["estimate"] == 0 and other["low"] == pytest.approx(-0.31, abs=0.05)


def test_max_drop_asks_for_evidence_where_few_tasks_cannot_show_a_loss():
    ours, theirs = evaluation(["w", "p", "p", "p"]), evaluation(["p"] * 4, "b")
    assert not_worse(ours, theirs)[0]
    accepted, why, _ = not_worse(ours, theirs, max_drop=0.1)
    assert not accepted and why.startswith("the interval reaches below -max_drop = -10.0")
    assert not_worse(theirs, ours, max_drop=0.1)[0]


def test_pass_at_k_is_the_one_asked_for():
    ours, theirs = evaluation(["pw"] * 30), evaluation(["pp"] * 30, "b")
    assert not not_worse(ours, theirs, k=1)[0] and not_worse(ours, theirs, k=2)[0]


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"letters": ["p"] * 3}, "tasks_sha256"),
        ({"letters": ["pp"] * 4}, r"samples_per_task \[1, 1\] and \[2, 2\]"),
        ({"temperature": 0.2}, "fixed_temperature 0.8 and 0.2; evaluate alike"),
        ({"top_p": 1.0}, "top_p 0.95 and 1.0"),
        ({"max_new_tokens": 65}, "max_new_tokens 64 and 65"),
        ({"limits": {}}, "limits"),
        ({"protocol": {"_component_": "wmtp.eval.chat_protocol"}}, "protocol"),
        ({"protocol": {"_component_": "wmtp.eval.docstring_protocol", "x": 1}, "prompts_sha256": "q"}, "protocol"),
    ],
)
def test_other_tasks_or_another_protocol_are_not_compared(theirs, message):
    letters = theirs.pop("letters", ["p"] * 4)
    with pytest.raises(ValueError, match=f"evaluations a and b .tasks. cannot be compared: {message}"):
        not_worse(evaluation(["p"] * 4), evaluation(letters, "b", **theirs))


def test_what_does_not_change_the_question_may_differ():
    """Another seed, dtype, checkpoint or tokenizer; and a path in the protocol, where the prompts are the same."""
    moved = {"_component_": "wmtp.eval.docstring_protocol", "examples_source": "/elsewhere"}
    other = evaluation(["p"] * 4, "b", seed=1, dtype="bf16", checkpoint="x", tokenizer={}, protocol=moved)
    assert not_worse(evaluation(["p"] * 4), other)[0]


def test_a_task_that_the_judge_failed_on_cannot_be_paired():
    with pytest.raises(ValueError, match=r"needs the same tasks in both runs.* task t/1 is in one of them only"):
        not_worse(evaluation(["p", "h"]), evaluation(["p", "p"], "b"))
