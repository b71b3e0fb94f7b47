"""A run's records in a real SQLite store: what arrives, once, whatever was tried before."""

import json
import math
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from services import new_store

from wmtp.tracking import FOLDER, MLflowLogger
from wmtp.tracking.delivery import RUN_KEY, deliver
from wmtp.tracking.replay import replay
from wmtp.tracking.spool import Spool, read_run


@pytest.fixture
def store(tmp_path):
    return new_store(tmp_path / "store")


@pytest.fixture
def begin(store, tmp_path):
    """A logger that has begun; what it said is in `said`."""

    def make(output_dir=tmp_path / "run", *, resumed=False, run_id=None, training_run_id=None, **section):
        section = {"experiment": "e", "artifact_location": str(tmp_path / "artifacts"), **section}
        logger = MLflowLogger(tracking_uri=store, **section)
        logger.said = []
        names = {"method": "m", "dataset": "d", "training_run_id": training_run_id, "log": logger.said.append}
        logger.connect(output_dir, resumed=resumed, run_id=run_id, **names)
        logger.start()
        return logger

    return make


def history(store, run_id, key):
    return [(m.step, m.value) for m in MlflowClient(store).get_metric_history(run_id, key)]


def test_every_kind_of_record_arrives_and_odd_values_do_not_stop_it(begin, store, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-token-0123")
    logger = begin(experiment="{method}/{dataset}", run_name="named")
    cfg = {"lr": 0.1, "list": [{"a": 1}, 2], "none": None, "long": "x" * 7000, "url": "https://planted-token-0123/x"}
    logger.log_config(OmegaConf.create(cfg))
    logger.log_tags({"wmtp.recipe": "test", "long": "y" * 9000})
    for step in range(3):
        logger.log_dict({"train/loss": 1 / (step + 3), "pass@1": math.nan}, step)
    logger.log("big", 10**400, 0)
    logger.log("big", -math.inf, 1)
    (tmp_path / "run" / "pages" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "pages" / "deep" / "a.html").write_text("page")
    (tmp_path / "outside.md").write_text("report")
    logger.log_artifact(tmp_path / "run" / "pages")
    logger.log_artifact(tmp_path / "outside.md", "reports")
    logger.close()

    client = MlflowClient(store)
    run = client.get_run(logger.run_id)
    assert client.get_experiment(run.info.experiment_id).name == "m/d"
    assert (run.info.run_name, run.info.status) == ("named", "FINISHED")
    params = run.data.params
    assert {k: params[k] for k in ("lr", "list.0.a", "list.1", "none")} == {
        "lr": "0.1", "list.0.a": "1", "list.1": "2", "none": "None",
    }  # fmt: skip
    assert params["long"] == "x" * 6000 and params["url"] == "https://***/x"
    assert run.data.tags["wmtp.recipe"] == "test" and run.data.tags["long"] == "y" * 8000
    assert history(store, logger.run_id, "train/loss") == [(step, 1 / (step + 3)) for step in range(3)]
    assert [math.isnan(value) for _, value in history(store, logger.run_id, "pass_at_1")] == [True] * 3
    largest = 1.7976931348623157e308  # SQL knows no infinity
    assert history(store, logger.run_id, "big") == [(0, largest), (1, -largest)]
    files = tmp_path / "artifacts" / logger.run_id / "artifacts"
    assert (files / "pages" / "deep" / "a.html").read_text() == "page"
    assert (files / "reports" / "outside.md").read_text() == "report"
    assert "planted" not in (files / "config.yaml").read_text() and "x" * 7000 in (files / "config.yaml").read_text()
    assert sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir()) == [
        "run.json",
        "sent.json",
        "spool.lock",
    ]
    assert logger.said == []


def test_the_data_are_the_runs_input_once_and_nothing_secret_with_them(begin, store, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-token-0123")
    logger = begin()
    digest = "0123456789abcdef" * 4
    for section in ({"source": "s3://bucket/planted-token-0123.jsonl"}, {"_component_": "my.rows"}) * 2:
        name = "files" if "source" in section else "code"
        logger.log_dataset(name, digest, section, "training")
    logger.close()
    inputs = MlflowClient(store).get_run(logger.run_id).inputs.dataset_inputs
    found = {i.dataset.name: (i.dataset.source_type, json.loads(i.dataset.source), i.dataset.digest) for i in inputs}
    assert len(inputs) == 2 and found == {
        "files": ("s3", {"uri": "s3://bucket/***.jsonl"}, digest[:36]),
        "code": ("code", {"tags": {"mlflow.source.name": "my.rows"}}, digest[:36]),
    }
    assert json.loads(inputs[0].dataset.profile) == {"sha256": digest}
    assert [(tag.key, tag.value) for tag in inputs[0].tags] == [("mlflow.data.context", "training")]


def test_a_resumed_run_goes_on_in_the_same_run_and_a_changed_param_is_a_tag(begin, store):
    first = begin()
    first.log_config(OmegaConf.create({"max_steps": 4, "lr": 1}))
    first.log_dict({"loss": 1.0}, 4)
    first.close("FAILED")
    second = begin(resumed=True)  # the spool knows the run
    second.log_config(OmegaConf.create({"max_steps": 8, "lr": 1, "new": 2}))
    second.log_dict({"loss": 0.5}, 8)
    second.close()
    assert second.run_id == first.run_id
    run = MlflowClient(store).get_run(first.run_id)
    assert run.data.params == {"max_steps": "4", "lr": "1", "new": "2"}
    assert run.data.tags["wmtp.resumed_with.max_steps"] == "8" and "wmtp.resumed_with.lr" not in run.data.tags
    assert history(store, first.run_id, "loss") == [(4, 1.0), (8, 0.5)]
    assert run.info.status == "FINISHED"
    third = begin(resumed=True)  # back to the first values, without one of the keys
    third.log_config(OmegaConf.create({"max_steps": 4, "new": 2}))
    third.close()
    tags = MlflowClient(store).get_run(first.run_id).data.tags
    said = {key.removeprefix("wmtp.resumed_with."): v for key, v in tags.items() if key.startswith("wmtp.resumed_")}
    assert said == {"max_steps": "4", "lr": "None"}


def test_a_checkpoint_alone_leads_to_its_run_and_one_that_is_gone_is_refused(begin, tmp_path):
    first = begin()
    first.close()
    again = begin(tmp_path / "other_machine", resumed=True, run_id=first.run_id)
    again.close()
    assert again.run_id == first.run_id
    with pytest.raises(ValueError, match=r"cannot be used: Run with id=0+ not found"):
        begin(tmp_path / "third", resumed=True, run_id="0" * 32)
    assert not (tmp_path / "third").exists()


def test_runs_can_be_nested(begin, store, tmp_path):
    parent = begin()
    parent.close()
    child = begin(tmp_path / "child", parent_run_id=parent.run_id)
    child.close()
    evaluation = begin(tmp_path / "evaluation", parent_run_id="training", training_run_id=parent.run_id)
    evaluation.close()
    client = MlflowClient(store)
    for run in (child, evaluation):
        assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    with pytest.raises(ValueError, match=r"parent_run_id is training, but the model's folder has no wmtp_run\.json"):
        begin(tmp_path / "untracked", parent_run_id="training")


def test_the_machines_figures_are_logged(begin, store):
    logger = begin(system_metrics_seconds=0.1)
    spool = logger._spool
    while not any(name.startswith("system/") for record, _ in spool.unsent(100) for name in record.get("metrics", ())):
        assert logger._system.is_alive()
        logger._system.join(0.05)
    logger.close()
    names = set(MlflowClient(store).get_run(logger.run_id).data.metrics)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= names
    assert any(name.startswith("system/disk") for name in names)
    assert any(name.startswith("system/network") for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# The spool


def left_behind(output_dir, records, **facts):
    """A spool as a killed process leaves it, which never reached the store."""
    spool = Spool(output_dir)
    spool.set_run(experiment="e", key="k1", started=1000, run_id=None, uri_in_config=False, **facts)
    for record in records:
        spool.append(record)
    os.close(spool._lock)


METRICS = [
    {"kind": "metrics", "time": 1000 + step, "step": step, "metrics": {"loss": 1 / 3 + step}} for step in range(5)
]


def test_replay_sends_what_a_killed_run_left_and_twice_changes_nothing(store, tmp_path):
    left_behind(tmp_path / "run", [{"kind": "tags", "time": 1, "tags": {"t": "1"}}, *METRICS])
    with (tmp_path / "run" / FOLDER / "records.jsonl").open("a") as torn:
        torn.write('{"kind": "metrics", "ti')  # the kill came while this was written
    copy = {path.name: path.read_bytes() for path in (tmp_path / "run" / FOLDER).iterdir()}
    said = replay(tmp_path / "run", store)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("e").experiment_id
    (run,) = client.search_runs([experiment])
    assert said.startswith("sent 6 records") and run.info.run_id in said
    assert (run.info.status, run.info.start_time, run.info.end_time) == ("KILLED", 1000, 1004)
    assert replay(tmp_path / "run", store).startswith("nothing to send")
    for name, content in copy.items():  # as if nothing had been noted down: not even the run's id
        (tmp_path / "run" / FOLDER / name).write_bytes(content)
    replay(tmp_path / "run", store)
    assert [run.info.run_id for run in client.search_runs([experiment])] == [run.info.run_id]
    assert history(store, run.info.run_id, "loss") == [(step, 1 / 3 + step) for step in range(5)]
    assert run.data.tags[RUN_KEY] == "k1"


def test_a_resumed_run_sends_first_what_its_killed_process_left(begin, store, tmp_path):
    left_behind(tmp_path / "run", METRICS)
    logger = begin(resumed=True)
    logger.log_dict({"loss": 9.0}, 9)
    logger.close()
    assert read_run(tmp_path / "run")["key"] == "k1"
    (run,) = MlflowClient(store).search_runs([MlflowClient(store).get_experiment_by_name("e").experiment_id])
    assert history(store, run.info.run_id, "loss") == [*((step, 1 / 3 + step) for step in range(5)), (9, 9.0)]
    assert (run.info.run_id, run.info.status) == (logger.run_id, "FINISHED")


def test_metrics_are_sent_from_the_runs_own_file_and_a_step_that_happens_again_is_the_same(begin, store, tmp_path):
    """Killed after step 3, of which the store knows; gone on with from step 1; replayed as if nothing was noted."""
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    lines = [{"step": step, "time": 1000.5 + step, "loss": 1 / 3 + step, "speed": 7.0} for step in range(1, 4)]
    write = lambda lines: file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(lines)
    first = begin()
    first.close("FAILED")
    assert [value for _, value in history(store, first.run_id, "loss")] == [1 / 3 + step for step in (1, 2, 3)]
    write([lines[0], {**lines[1], "speed": 8.0}, lines[2], {"step": 4, "time": 1010.0, "loss": 0.5}])
    write_all = file.read_text()
    write(lines[:1])
    second = begin(resumed=True)  # which finds the file cut
    file.write_text(write_all + '{"step": 5, "ti')
    second.close()
    (tmp_path / "run" / FOLDER / "sent.json").unlink()
    replay(tmp_path / "run", store)
    assert history(store, first.run_id, "loss") == [*((step, 1 / 3 + step) for step in (1, 2, 3)), (4, 0.5)]
    assert sorted(history(store, first.run_id, "speed")) == [(1, 7.0), (2, 7.0), (2, 8.0), (3, 7.0)]
    assert MlflowClient(store).get_metric_history(first.run_id, "loss")[0].timestamp == 1_001_500


def test_a_record_that_the_store_never_takes_holds_up_no_other(begin, store, tmp_path):
    logger = begin()
    logger.log_artifact(tmp_path / "run" / "gone.txt")
    logger._spool.append({"kind": "metrics", "time": -1, "step": "no number", "metrics": {"loss": 1.0}})
    logger.log_dict({"loss": 2.0}, 2)
    logger.close()
    assert history(store, logger.run_id, "loss") == [(2, 2.0)]
    refused = [json.loads(line) for line in (tmp_path / "run" / FOLDER / "refused.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in refused] == ["artifact", "metrics"] and all(r["why"] for r in refused)
    assert logger.said == [f"tracking: the store refused 2 records, kept in {tmp_path / 'run' / FOLDER}/refused.jsonl"]


def test_artifacts_that_cannot_be_stored_do_not_hold_up_metrics(begin, store, tmp_path):
    (tmp_path / "artifacts").write_text("a file where the folder would be")
    logger = begin(flush_seconds=8)  # the others have passed by then, also on a busy machine
    logger.log_text("text", "note.txt")
    logger.log_dict({"loss": 2.0}, 2)
    logger.close()
    assert history(store, logger.run_id, "loss") == [(2, 2.0)]
    assert MlflowClient(store).get_run(logger.run_id).info.status == "FINISHED"
    assert "1 records have not reached" in logger.said[-1] and "tracking replay" in logger.said[-1]
    (tmp_path / "artifacts").unlink()
    replay(tmp_path / "run")
    assert (tmp_path / "artifacts" / logger.run_id / "artifacts" / "note.txt").read_text() == "text"
    assert MlflowClient(store).get_run(logger.run_id).info.status == "FINISHED"


def test_a_full_disk_leaves_whole_records_and_names_its_file(tmp_path):
    spool = Spool(tmp_path)
    spool.append({"kind": "text", "text": "first"})
    file = tmp_path / FOLDER / "records.jsonl"
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, before[1]))  # a part of the next one fits
    try:
        with pytest.raises(OSError) as error:
            spool.append({"kind": "text", "text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path(error.value.filename) == file
    spool.append({"kind": "text", "text": "third"})
    assert [record["text"] for record, _ in spool.unsent(10)] == ["first", "third"]
    spool.close()


def test_a_run_whose_end_cannot_be_recorded_is_closed_all_the_same(begin, store):
    logger = begin()
    logger.log_dict({"loss": 1.0}, 1)
    logger._spool._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 - the spool closes it
    logger.close()
    assert any("that the run is FINISHED could not be recorded: [Errno 28]" in line for line in logger.said)
    assert history(store, logger.run_id, "loss") == [(1, 1.0)]
    begin(resumed=True).close()  # the spool is free


def test_no_part_of_a_secret_is_written_of_a_refused_record(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED_TOKEN", "planted-token-0123")

    def send(records):
        raise FileNotFoundError("x" * 292 + "planted-token-0123")

    spool = Spool(tmp_path)
    spool.append({"kind": "tags", "tags": {}})
    assert deliver(spool, SimpleNamespace(send=send)) == 1
    assert json.loads((spool.folder / "refused.jsonl").read_text())["why"] == "x" * 292 + "***"
    spool.close()


def test_two_processes_never_write_into_one_spool(begin, tmp_path):
    logger = begin()
    with pytest.raises(ValueError, match="is in use by another process"):
        replay(tmp_path / "run")
    logger.close()


def test_a_closed_spool_takes_nothing_since_another_process_may_have_it(tmp_path):
    spool = Spool(tmp_path)
    spool.close()
    with pytest.raises(ValueError, match="is closed"):
        spool.append({"kind": "tags", "tags": {}})
    assert not (tmp_path / FOLDER / "records.jsonl").exists()


def test_a_model_exported_before_its_run_had_an_id_is_told_it(store, tmp_path):
    file = tmp_path / "run" / "export" / "wmtp_run.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"run_id": null, "step": 3}')
    left_behind(tmp_path / "run", [{"kind": "run_file", "time": 1, "path": "export/wmtp_run.json"}])
    replay(tmp_path / "run", store)
    assert json.loads(file.read_text()) == {"run_id": read_run(tmp_path / "run")["run_id"], "step": 3}


def test_a_deleted_experiment_is_refused(begin, store, tmp_path):
    begin().close()
    client = MlflowClient(store)
    client.delete_experiment(client.get_experiment_by_name("e").experiment_id)
    with pytest.raises(ValueError, match="experiment 'e' is deleted in"):
        begin(tmp_path / "second")
    assert not (tmp_path / "second").exists()
