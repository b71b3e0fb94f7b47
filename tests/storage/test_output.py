"""What a run writes is in S3 when it ends, or somebody is told; a folder with a manifest there is complete."""

import json
import os
import shutil
import sys
import threading

import pytest

from wmtp.files import verify_manifest, write_manifest
from wmtp.storage import Output, StorageError, local_copy
from wmtp.storage.__main__ import main as upload_by_hand
from wmtp.storage.transfer import upload
from wmtp.training.output_dir import open_output

MB = 1 << 20


@pytest.fixture
def output(bucket):
    made = open_output(f"{bucket.uri}/run")
    made.folder.mkdir(parents=True, exist_ok=True)
    (made.folder / "config.yaml").write_text("a: 1\n")
    return made


def save(output, step, body=b"weights"):
    """What a Checkpointer does: a complete checkpoint, its pointer, and the word that it is there."""
    folder = output.folder / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "shard.bin").write_bytes(body + str(step).encode())
    write_manifest(folder)
    (folder.parent / "latest").write_text(folder.name)
    output.upload(folder)
    return folder


def complete(bucket):
    return [key for key in bucket.keys("run/checkpoints/") if key.endswith("manifest.json")]


@pytest.mark.parametrize("fault", ["cut", "corrupt", "refuse", 500, 503])
def test_an_upload_survives_a_passing_fault(bucket, fault, tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", 5 * MB)
    body = os.urandom(11 * MB)  # three parts
    (tmp_path / "x").write_bytes(body)
    (tmp_path / "small").write_bytes(b"y" * 2000)
    bucket.proxy.mode, bucket.proxy.faults_left = fault, 2
    bucket.proxy.matches = lambda method, path: method == "PUT"
    upload(tmp_path / "x", f"{bucket.uri}/x")
    bucket.proxy.faults_left = 1
    upload(tmp_path / "small", f"{bucket.uri}/small")
    assert bucket.proxy.faults == 3
    assert bucket.get("x") == body and bucket.get("small") == b"y" * 2000
    assert local_copy(f"{bucket.uri}/x").read_bytes() == body  # with its SHA-256 as metadata


def test_a_failed_upload_leaves_no_parts_behind(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", 5 * MB)
    (tmp_path / "x").write_bytes(bytes(11 * MB))
    bucket.proxy.mode = 403
    bucket.proxy.matches = lambda method, path: "partNumber=2" in path
    with pytest.raises(StorageError, match=r"x cannot be written.*AccessDenied"):
        upload(tmp_path / "x", f"{bucket.uri}/x")
    assert not bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads")
    assert bucket.keys() == []


@pytest.mark.parametrize("event", ["replaced", "removed"])
def test_a_file_that_loses_its_name_during_its_upload_arrives_whole(bucket, tmp_path, monkeypatch, event):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", 5 * MB)
    file, newer, body = tmp_path / "x", tmp_path / "newer", os.urandom(21 * MB)  # more parts than are read ahead
    file.write_bytes(body)
    newer.write_bytes(bytes(len(body)))

    def lose(method, path):
        if "partNumber=1" in path and newer.exists():
            newer.replace(file)
            if event == "removed":
                file.unlink()
        return False

    bucket.proxy.mode, bucket.proxy.matches = 403, lose
    upload(file, f"{bucket.uri}/x")
    assert not newer.exists()
    assert bucket.get("x") == body


def test_saves_during_one_round_of_uploads_share_the_next(output, monkeypatch):
    begun, go_on, rounds = threading.Event(), threading.Event(), []

    def slow(*_):
        rounds.append(1)
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(output, "_round", slow)
    output.upload()
    assert begun.wait(60)
    for _ in range(12):
        output.upload()
    go_on.set()
    output.wait()
    assert len(rounds) == 2
    output.close()


def test_everything_is_there_at_the_end_and_old_checkpoints_are_not(bucket, output):
    save(output, 1)
    output.close()
    shutil.rmtree(output.folder / "checkpoints" / "step_00000001")
    newest = save(output, 2)
    (output.folder / "checkpoints" / "step_00000003.tmp").mkdir()
    (output.folder / "checkpoints" / "step_00000003.tmp" / "shard.bin").write_bytes(b"torn")
    output.close()
    step = f"run/checkpoints/{newest.name}"
    assert bucket.keys() == ["run/checkpoints/latest", f"{step}/manifest.json", f"{step}/shard.bin", "run/config.yaml"]
    assert bucket.get("run/checkpoints/latest") == newest.name.encode()


def test_an_old_checkpoint_stays_until_a_newer_one_is_complete(bucket, output):
    save(output, 1)
    output.close()
    shutil.rmtree(output.folder / "checkpoints" / "step_00000001")
    bucket.proxy.mode = 500
    bucket.proxy.matches = lambda method, path: method == "PUT" and "step_00000002/manifest" in path
    save(output, 2)
    with pytest.raises(StorageError, match="not everything could be uploaded"):
        output.close()
    assert complete(bucket) == ["run/checkpoints/step_00000001/manifest.json"]
    bucket.proxy.reset()
    output.close()
    assert complete(bucket) == ["run/checkpoints/step_00000002/manifest.json"]


def test_nothing_is_removed_on_the_word_of_a_damaged_listing(bucket, output):
    """Step 2 is not complete; a listing that calls step 1's manifest another's would make step 1 an old one."""
    save(output, 1)
    output.close()
    shutil.rmtree(output.folder / "checkpoints" / "step_00000001")
    save(output, 2)
    output.wait()
    bucket.client.delete_object(Bucket=bucket.name, Key="run/checkpoints/step_00000002/manifest.json")
    bucket.put("run/checkpoints/step_00000001/manifest.json", b"{}")
    bucket.put("run/checkpoints/step_00000001/shard.bin", b"kept")
    bucket.proxy.mode, bucket.proxy.faults_left = "corrupt", 1
    bucket.proxy.damage = lambda body: body.replace(b"step_00000001/manifest", b"step_00000007/manifest")
    bucket.proxy.matches = lambda method, path: "list-type=2" in path
    (output.folder / "checkpoints" / "latest").write_text("step_00000002 again")
    output.close()
    assert bucket.proxy.faults == 1
    assert bucket.get("run/checkpoints/step_00000001/shard.bin") == b"kept"


def test_a_failed_upload_is_loud_tried_again_and_loses_nothing(bucket, output, capsys):
    output.close()
    bucket.proxy.mode = 503
    save(output, 1)  # does not raise
    output.wait()
    said = capsys.readouterr().err
    assert "UPLOAD FAILED" in said and "SlowDown" in said
    with pytest.raises(StorageError, match=r"python -m wmtp\.storage upload .*/outputs/.* s3://"):
        output.close()
    bucket.proxy.reset()
    folder = save(output, 2)
    output.close()
    verify_manifest(folder)
    assert len(complete(bucket)) == 2


def test_a_rewritten_checkpoint_never_looks_complete_with_mixed_files(bucket, output):
    folder = save(output, 1)
    output.close()
    shutil.rmtree(folder)
    bucket.proxy.mode = 500
    bucket.proxy.matches = lambda method, path: method == "PUT" and path.endswith("/shard.bin")
    save(output, 1, b"other weights")
    output.close(fail=False)
    assert complete(bucket) == []
    bucket.proxy.reset()
    output.close()
    assert bucket.get("run/checkpoints/step_00000001/shard.bin") == b"other weights1"
    assert len(complete(bucket)) == 1


def test_an_export_gets_a_manifest_and_is_verified_where_it_is_read(bucket, output):
    export = output.folder / "export"
    export.mkdir()
    (export / "model.bin").write_bytes(b"weights")
    output.upload(export)
    output.close()
    assert set(json.loads(bucket.get("run/export/manifest.json"))) == {"model.bin"}
    assert (local_copy(f"{bucket.uri}/run/export") / "model.bin").read_bytes() == b"weights"
    bucket.put("run/export/model.bin", b"changed")
    with pytest.raises(StorageError, match=r"model\.bin is not the file"):
        local_copy(f"{bucket.uri}/run/export")


def test_an_empty_machine_goes_on_from_the_newest_complete_checkpoint(bucket, output, monkeypatch, tmp_path):
    save(output, 1)
    folder = save(output, 2)
    output.close()
    bucket.put("run/checkpoints/step_00000003/shard.bin", b"its manifest never came")
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "another machine"))
    there = open_output(f"{bucket.uri}/run", resume="auto")
    names = sorted(path.name for path in (there.folder / "checkpoints").iterdir())
    assert names == [folder.name]
    verify_manifest(there.folder / "checkpoints" / folder.name)
    assert (there.folder / "config.yaml").read_text() == "a: 1\n"
    save(there, 3)
    there.close()
    assert [key.split("/")[2] for key in complete(bucket)] == ["step_00000002", "step_00000003"]
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "a third"))
    fresh = open_output(f"{bucket.uri}/run", resume="no")
    assert list(fresh.folder.iterdir()) == []
    assert "config.yaml" in fresh.remote_names  # enough to refuse
    fresh.begin(["checkpoints"])
    fresh.close()
    assert bucket.keys("run/checkpoints") == []


def test_what_was_uploaded_is_not_uploaded_again(bucket, output):
    save(output, 1)
    output.close()
    bucket.proxy.reset()
    again = open_output(f"{bucket.uri}/run", resume="auto")
    again.close()
    put = [path for method, path in bucket.proxy.log if method == "PUT"]
    assert [path for path in put if "can_write" not in path and "run.lock" not in path] == []


def test_an_upload_by_hand_sends_what_is_lacking_and_takes_nothing_away(bucket, output, monkeypatch, tmp_path):
    save(output, 1)
    output.close()
    bucket.proxy.mode = 503
    save(output, 2)
    with pytest.raises(StorageError, match=r"python -m wmtp\.storage upload"):
        output.close()
    bucket.proxy.reset()
    moved = output.folder.rename(tmp_path / "elsewhere")
    monkeypatch.setattr("sys.excepthook", sys.excepthook)
    monkeypatch.setattr("sys.argv", ["wmtp.storage", "upload", str(moved), f"{bucket.uri}/run"])
    monkeypatch.setattr("wmtp.storage.lease._EXPIRY", 0.2)  # of the run's lease, which it could not give back
    monkeypatch.setattr("wmtp.storage.lease._HEARTBEAT", 0.2)
    upload_by_hand()
    sent = [path.partition("/run/")[2] for method, path in bucket.proxy.log if method == "PUT" and "/run/" in path]
    assert sorted(name for name in sent if name.startswith("checkpoints/step")) == [
        f"checkpoints/step_00000002/{name}" for name in ("manifest.json", "shard.bin")
    ]
    assert len(complete(bucket)) == 2
    taken = [path for method, path in bucket.proxy.log if method == "DELETE"]
    assert not [path for path in taken if "step_00000001" in path] and bucket.keys("run/run.lock") == []
    monkeypatch.setattr("sys.argv", ["wmtp.storage", "upload", str(moved), "runs/not-in-s3"])
    with pytest.raises(StorageError, match="must be s3://bucket/key"):
        upload_by_hand()


def test_what_another_machine_added_to_a_run_without_checkpoints_comes_back(bucket, output, monkeypatch, tmp_path):
    """As of an evaluation, whose journals grow, or of a scoring, whose parts do."""
    journal = output.folder / "journals" / "journal-00000.jsonl"
    journal.parent.mkdir()
    journal.write_text("1\n2\n")
    (output.folder / "spool.jsonl").write_text("all sent")
    output.upload()
    output.close()
    (output.folder / "spool.jsonl").unlink()
    here = os.environ["WMTP_CACHE"]
    monkeypatch.setenv("WMTP_CACHE", str(tmp_path / "another machine"))
    there = open_output(f"{bucket.uri}/run", resume="auto")
    there.upload()
    with (there.folder / "journals" / journal.name).open("a") as file:
        file.write("3\n4\n")
    (there.folder / "journals" / "journal-00001.jsonl").write_text("5\n")
    there.close()
    monkeypatch.setenv("WMTP_CACHE", here)
    (output.folder / "mine.jsonl").write_text("not sent yet")
    again = open_output(f"{bucket.uri}/run", resume="auto")
    assert journal.read_text() == "1\n2\n3\n4\n"
    assert sorted(p.name for p in journal.parent.iterdir()) == ["journal-00000.jsonl", "journal-00001.jsonl"]
    assert not (output.folder / "spool.jsonl").exists()
    again.upload()
    again.close()
    assert bucket.get("run/journals/journal-00000.jsonl") == b"1\n2\n3\n4\n"
    assert bucket.get("run/mine.jsonl") == b"not sent yet"
    with journal.open("a") as file:  # more than what is there: stays
        file.write("6\n")
    open_output(f"{bucket.uri}/run", resume="auto").close()
    assert bucket.get("run/journals/journal-00000.jsonl") == journal.read_bytes() == b"1\n2\n3\n4\n6\n"


def test_a_local_output_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    output = Output(str(tmp_path))
    output.upload(tmp_path)
    output.begin(["x"])
    output.close()
    assert (output.folder, output.remote, list(tmp_path.iterdir())) == (tmp_path, None, [])


@pytest.mark.parametrize(("uri", "message"), [("s3://nowhere-at-all/x", "has no bucket"), ("{0}/run", "refuses it")])
def test_an_output_that_cannot_be_written_is_refused_at_the_start(bucket, uri, message):
    bucket.proxy.mode = "pass" if "nowhere" in uri else 403
    bucket.proxy.matches = lambda method, path: method == "PUT"
    with pytest.raises(StorageError, match=message):
        open_output(uri.format(bucket.uri))


def test_a_bad_input_is_named_by_its_key_at_the_start(bucket, tmp_path):
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"dataset": {"source": f"{bucket.uri}/absent.jsonl"}, "output_dir": str(tmp_path)})
    with pytest.raises(StorageError, match=r"^dataset\.source: .*absent\.jsonl does not exist"):
        open_output(str(tmp_path), cfg)
