"""The way of a model into production, on a real sqlite store; every refusal is one line and changes nothing."""

import itertools
import json
import multiprocessing
import re
from dataclasses import replace

import pytest

from wmtp.registry.versions import (
    Choice,
    RegistryError,
    aliased,
    last_move,
    move_alias,
    moves,
    open_store,
    versions,
)

GOOD, WORSE = ["p"] * 12, ["w"] * 12
ALIKE = ["p"] * 11 + ["w"]


def state(store, name):
    """All that a promotion can change."""
    model = store.client.get_registered_model(name)
    aliases = {alias: str(version) for alias, version in model.aliases.items()}
    return aliases, dict(model.tags), versions(store.client, name)


@pytest.fixture(scope="module")
def trained(store):
    """Three models and their evaluations: good, alike, worse."""
    made = []
    for letters in (GOOD, ALIKE, WORSE):
        training = store.training()
        made.append((training, store.evaluation(training, letters), store.sha256()))
    return made


def test_a_models_way_in_and_back(store, promote, trained, capsys):
    name = "whole-way"
    (training, good, sha256), (_, alike, _), (_, worse, _) = trained
    promote(name, evaluation_run=good)
    (version,) = versions(store.client, name)
    assert version.tags["wmtp.model_sha256"] == sha256 and version.run_id == training
    assert version.tags["wmtp.git_commit"] == "c0ffee" and version.evaluations == {"tiny_tasks": good}
    assert version.source.endswith(f"{training}/artifacts/export")
    assert state(store, name)[0] == {"staging": "1"}

    promote(name, "production", good)
    assert state(store, name)[0] == {"staging": "1", "production": "1"}
    first = last_move(moves(store.client, name), "production")
    assert (first.number, first.before, first.after, first.decision) == (2, None, "1", "first in production")
    assert first.by == "someone" and first.evaluation_run == good and first.figures["pass_at_1"] == 1.0

    promote(name, evaluation_run=alike)
    promote(name, "production", alike)
    second = last_move(moves(store.client, name), "production")
    assert (second.before, second.after) == ("1", "2") and second.figures["theirs_run"] == good
    assert second.figures["difference"]["estimate"] == pytest.approx(-1 / 12)
    assert second.figures["difference"]["low"] < 0 == second.figures["difference"]["high"]

    promote(name, evaluation_run=worse)
    before = state(store, name)
    with pytest.raises(ValueError, match="version 3 does not replace version 2 in production: worse beyond the inter"):
        promote(name, "production", worse)
    assert state(store, name) == before

    promote(name, "rollback")
    assert aliased(store.client, name, "production") == "1"
    promote(name, "rollback")  # a rollback is a move: it is undone like any other
    assert aliased(store.client, name, "production") == "2"
    promote(name, "rollback", move=2)  # to before the first promotion
    assert aliased(store.client, name, "production") is None
    record = moves(store.client, name)
    assert [(m.number, m.action, m.alias, m.before, m.after) for m in record] == [
        (1, "register", "staging", None, "1"),
        (2, "production", "production", None, "1"),
        (3, "register", "staging", "1", "2"),
        (4, "production", "production", "1", "2"),
        (5, "register", "staging", "2", "3"),
        (6, "rollback", "production", "2", "1"),
        (7, "rollback", "production", "1", "2"),
        (8, "rollback", "production", "2", None),
    ]
    assert {m.state for m in record} == {"done"}
    capsys.readouterr()
    promote(name, "show")
    shown = capsys.readouterr()
    assert re.search(r"^3 +staging +rho1 +tiny_tasks ", shown.out, re.MULTILINE) and "undoes move 2" in shown.out
    assert len(shown.out.splitlines()) == 1 + 3 + 1 + 1 + 8 and "WARNING" not in shown.err


def test_a_second_evaluation_of_a_model_goes_to_its_version(store, promote, trained):
    name = "two-evaluations"
    training, good, sha256 = trained[0]
    promote(name, evaluation_run=good)
    other = store.evaluation(training, ALIKE, name="other_tasks", model_sha256=sha256)
    promote(name, evaluation_run=other)
    promote(name, evaluation_run=other)  # twice is once
    (version,) = versions(store.client, name)
    assert version.evaluations == {"tiny_tasks": good, "other_tasks": other}
    assert "### other\\_tasks" in version.description and "### tiny\\_tasks" in version.description
    assert len(moves(store.client, name)) == 1


def test_evaluations_that_cannot_be_promoted_are_refused(store, promote, trained, tmp_path):
    name = "refused"
    training, good, sha256 = trained[0]
    promote(name, evaluation_run=good)
    promote(name, "production", good)
    before = state(store, name)

    def refused(message, *args, **overrides):
        with pytest.raises(ValueError, match=message) as error:
            promote(name, *args, **overrides)
        assert "\n" not in str(error.value)
        assert state(store, name) == before

    of_good = {"model_sha256": sha256}
    refused("run 0123abcd cannot be read: .*0123abcd", evaluation_run="0123abcd")
    refused("needs evaluation_run=", evaluation_run=None)
    refused(f"run {training} .training1. is no evaluation", evaluation_run=training)
    refused("is RUNNING, not FINISHED", evaluation_run=store.evaluation(training, GOOD, status="RUNNING", **of_good))
    random = store.evaluation(training, GOOD, model_sha256=None)
    refused("does not name its model", evaluation_run=random)
    orphan = store.evaluation(None, GOOD, **of_good)
    refused("names no training run", evaluation_run=orphan)
    other_model = store.evaluation(training, GOOD)  # the hash of another export
    refused("is not the model of evaluation run .*: SHA-256 .*; evaluate this export", evaluation_run=other_model)
    refused("is not the model of", evaluation_run=good, training_run=trained[1][0])
    refused("has no version of the model of evaluation run .*: register it first", "production", trained[1][1])
    with pytest.raises(ValueError, match="name 'a/b:c' cannot be a registered model's: use letters, digits"):
        promote("a/b:c", evaluation_run=good)
    refused("max_drop must be a number >= 0 and <= 1, got -1", "production", good, max_drop=-1)
    refused("has no move 7 of production; there are 2", "rollback", move=7)
    with pytest.raises(ValueError, match="has no recorded move of production: there is nothing to roll back to"):
        promote("two-evaluations", "rollback")
    with pytest.raises(ValueError, match="there is no registered model nobody: register an evaluated export first"):
        promote("nobody", "show")
    absent = f"sqlite:///{tmp_path}/absent.db"
    with pytest.raises(ValueError, match=f"the MLflow store {absent} does not exist; set MLFLOW_TRACKING_URI"):
        promote(name, "show", tracking_uri=absent)
    assert not (tmp_path / "absent.db").exists()

    # An evaluation that nothing in production can be held against, and one of other tasks.
    training2 = store.training()
    other = store.evaluation(training2, GOOD, name="other_tasks")
    promote(name, evaluation_run=other)
    fewer = store.evaluation(training2, ["p"] * 5)
    promote(name, evaluation_run=fewer)
    before = state(store, name)
    refused("version 1, in production, has no evaluation 'other_tasks' to compare with", "production", other)
    refused("cannot be compared: tasks_sha256", "production", fewer)


def test_an_alias_that_was_moved_by_hand_is_said_and_not_rolled_back(store, promote, trained, capsys):
    name = "by-hand"
    for _, evaluation, _ in trained[:2]:
        promote(name, evaluation_run=evaluation)
    promote(name, "production", trained[0][1])
    store.client.set_registered_model_alias(name, "production", "2")
    with pytest.raises(ValueError, match="points at version 2, though its last recorded move, 3, set it to version 1"):
        promote(name, "rollback")
    promote(name, "show")
    assert "WARNING: production points at version 2, which no recorded move explains" in capsys.readouterr().err


def _promote_many(uri, name, versions, worker):
    client = open_store(uri)
    for version in versions:
        choose = lambda before, record, to=version: Choice(to, f"from {before}")
        move_alias(client, name, "production", choose, action="production", by=worker)


def test_no_move_is_lost_when_processes_promote_at_once(store):
    """Each move begins where the one before it ended, and all of them are on record."""
    name, client = "at-once", store.client
    client.create_registered_model(name)
    for _ in range(4):
        client.create_model_version(name, "file:///nowhere")
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_promote_many, args=(client.tracking_uri, name, [mine, other, mine], mine))
        for mine, other in (("1", "2"), ("3", "4"), ("2", "3"))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    record = moves(client, name)
    assert [move.number for move in record] == list(range(1, len(record) + 1)) and len(record) >= 5
    assert {move.state for move in record} == {"done"}
    assert record[0].before is None
    for earlier, later in itertools.pairwise(record):
        assert later.before == earlier.after and later.decision == f"from {later.before}"
    assert aliased(client, name, "production") == record[-1].after


def test_what_a_killed_process_left_under_way_is_closed_by_what_it_did(store):
    name, client = "killed", store.client
    client.create_registered_model(name)
    for _ in range(2):
        client.create_model_version(name, "file:///nowhere")
    move_alias(client, name, "production", lambda *_: Choice("1", "x"), action="production", by="a")
    (done,) = moves(client, name)
    for number, after in ((2, "2"), (3, "1")):  # killed before the alias was moved, and after
        left = replace(done, number=number, after=after, state="intended", key=f"wmtp.move.{number:06d}.dead")
        value = {k: v for k, v in vars(left).items() if k != "key"}
        client.set_registered_model_tag(name, left.key, json.dumps(value))
        roll = lambda: move_alias(
            client, name, "production", lambda *_: Choice("1", "x"), action="production", by="b", patience=0.1
        )
        assert roll() is None  # it is there already
        assert moves(client, name)[-1].state == {"2": "abandoned", "1": "done"}[after]
    with pytest.raises(RegistryError, match="killed has no version 9"):
        move_alias(client, name, "staging", lambda *_: Choice("9", "x"), action="register", by="a")
    with pytest.raises(RegistryError, match="alias must be one of staging, production, got 'best'"):
        move_alias(client, name, "best", lambda *_: Choice("1", "x"), action="register", by="a")
    client.set_registered_model_tag(name, "wmtp.move.000009.bad", "{}")
    with pytest.raises(RegistryError, match=r"tag wmtp\.move\.000009\.bad is no record of a move"):
        moves(client, name)
