"""What comes out of the cache is what is in S3, whatever happens on the way."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wmtp.data.rows import read_rows
from wmtp.pretrained import resolve_checkpoint
from wmtp.pretrained.config_files import CheckpointError
from wmtp.storage import StorageError, local_copy
from wmtp.storage.mirror import link_tree, make_room

MB = 1 << 20
FAULTS = ["cut", "delay", "corrupt", "refuse", 500, 503]


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def visible(cache):
    """Contents of all files that a reader could be given."""
    return [path.read_bytes() for path in (Path(cache) / "s3" / "trees").rglob("*") if path.is_file()]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_local_path_stays_itself_and_needs_no_s3(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    (tmp_path / "x").touch()
    assert local_copy(tmp_path / "x") == tmp_path / "x"
    assert local_copy(str(tmp_path / "absent")) == tmp_path / "absent"


def test_an_object_and_a_folder_are_mirrored_once(bucket):
    bucket.put("data/train.jsonl", b'{"a": 1}\n')
    bucket.put("data/deep/x.bin", b"")
    bucket.put("database", b"another folder's")
    folder = local_copy(f"{bucket.uri}/data")
    assert files_of(folder) == {"train.jsonl": b'{"a": 1}\n', "deep/x.bin": b""}
    assert [row for _, row in read_rows(f"{bucket.uri}/data/train.jsonl")] == [{"a": 1}]
    assert [row for _, row in read_rows(f"{bucket.uri}/data", "train")] == [{"a": 1}]
    assert resolve_checkpoint(f"{bucket.uri}/data/") == folder
    assert len(bucket.gets_of("data/train.jsonl")) == 1


def test_what_is_not_here_is_looked_for_in_the_mirror(bucket, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WMTP_MIRROR", f"{bucket.uri}/mirror/")
    bucket.put("mirror/models/tiny/config.json", b"{}")
    assert files_of(resolve_checkpoint("models/tiny")) == {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match="checkpoint models/other does not exist"):
        resolve_checkpoint("models/other")


def test_a_new_content_is_mirrored_anew_and_an_old_reader_keeps_its_own(bucket):
    bucket.put("x", b"one")
    first = local_copy(f"{bucket.uri}/x")
    bucket.put("x", b"two")
    assert local_copy(f"{bucket.uri}/x").read_bytes() == b"two"
    assert first.read_bytes() == b"one"


def test_a_damaged_cache_is_noticed_and_mended(bucket):
    bucket.put("x", b"whole content")
    path = local_copy(f"{bucket.uri}/x")
    path.chmod(0o644)
    path.write_bytes(b"wrong content")
    assert local_copy(f"{bucket.uri}/x").read_bytes() == b"whole content"
    os.utime(path)  # touched, but whole: hashed, not fetched
    bucket.proxy.reset()
    assert local_copy(f"{bucket.uri}/x").read_bytes() == b"whole content"
    assert not bucket.gets_of("x")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_gives_the_whole_content(bucket, monkeypatch, fault):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", MB)
    body = os.urandom(3 * MB + 17)
    bucket.put("model/weights.bin", body, sha256=sha256(body))
    bucket.proxy.mode, bucket.proxy.faults_left = fault, 2
    bucket.proxy.cut_after, bucket.proxy.seconds = 600_000, 0.2
    bucket.proxy.matches = lambda method, path: method == "GET" and path.startswith(f"/{bucket.name}/model")
    assert files_of(local_copy(f"{bucket.uri}/model")) == {"weights.bin": body}
    assert bucket.proxy.faults == 2


@pytest.mark.parametrize("fault", ["cut", "corrupt", "refuse", 403, 500])
def test_a_lasting_fault_is_one_clear_line_and_nothing_torn(bucket, monkeypatch, fault, tmp_path):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", MB)
    body = os.urandom(2 * MB)
    bucket.put("model/weights.bin", body)  # without a SHA-256: the ETag must do
    bucket.proxy.mode, bucket.proxy.cut_after = fault, 1000
    bucket.proxy.matches = lambda method, path: method == "GET" and "weights.bin" in path
    with pytest.raises(StorageError, match=r"weights\.bin") as error:
        local_copy(f"{bucket.uri}/model")
    assert "\n" not in str(error.value)
    assert visible(tmp_path / "cache") == []
    bucket.proxy.reset()
    assert files_of(local_copy(f"{bucket.uri}/model")) == {"weights.bin": body}


def test_a_corrupt_multipart_object_of_another_tool_is_noticed(bucket):
    parts = [os.urandom(5 * MB), os.urandom(5 * MB), os.urandom(1000)]
    at = {"Bucket": bucket.name, "Key": "big"}
    upload = bucket.client.create_multipart_upload(**at)["UploadId"]
    etags = [
        {"PartNumber": n, "ETag": bucket.client.upload_part(**at, UploadId=upload, PartNumber=n, Body=part)["ETag"]}
        for n, part in enumerate(parts, start=1)
    ]
    bucket.client.complete_multipart_upload(**at, UploadId=upload, MultipartUpload={"Parts": etags})
    bucket.proxy.mode = "corrupt"
    bucket.proxy.matches = lambda method, path: method == "GET" and path.startswith(f"/{bucket.name}/big")
    with pytest.raises(StorageError, match="arrived corrupt: its ETag"):
        local_copy(f"{bucket.uri}/big")
    bucket.proxy.reset()
    assert local_copy(f"{bucket.uri}/big").read_bytes() == b"".join(parts)


DAMAGES = {  # of a listing, none of which makes it unreadable
    "an early end": lambda body: body.replace(b"<IsTruncated>true<", b"<IsTruncated>trve<"),
    "another name": lambda body: body.replace(b"a.bin", b"e.bin"),
    "another size": lambda body: body.replace(b"<Size>4<", b"<Size>6<"),
    "another content": lambda body: re.sub(rb"<ETag>(&quot;|\")\w", rb"<ETag>\1x", body),
    "a file less": lambda body: re.sub(rb"<Contents>.*?</Contents>", b"", body, count=1),
    "no file": lambda body: re.sub(rb"<Contents>.*</Contents>", b"", body),
    "nothing to read": lambda body: body.replace(b"<Key>", b"\xff<Key>"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_listing_is_asked_again_and_a_folder_comes_whole(bucket, monkeypatch, damage):
    monkeypatch.setattr("wmtp.storage.s3._KEYS_PER_LISTING", 2)
    whole = {"a.bin": b"aaaa", "b.bin": b"bbbb", "c/d.bin": b"dddd"}
    for name, body in whole.items():
        bucket.put(f"model/{name}", body)
    changed = []

    def damaged(body):
        worse = DAMAGES[damage](body)
        changed.append(worse != body)
        return worse

    bucket.proxy.mode, bucket.proxy.damage = "corrupt", damaged
    listings = itertools.count()
    # Every second listing is damaged: the first page's second try, the next page's second try, ...
    bucket.proxy.matches = lambda method, path: "list-type=2" in path and next(listings) in (1, 4, 7)
    assert files_of(local_copy(f"{bucket.uri}/model")) == whole
    assert any(changed)


def test_listings_that_never_agree_are_one_clear_line(bucket):
    bucket.put("model/a.bin", b"aaaa")
    bucket.proxy.mode, sizes = "corrupt", itertools.count(5)
    bucket.proxy.damage = lambda body: body.replace(b"<Size>4<", b"<Size>%d<" % next(sizes))
    bucket.proxy.matches = lambda method, path: "list-type=2" in path
    with pytest.raises(StorageError, match=r"model cannot be read: no two listings in a row agree"):
        local_copy(f"{bucket.uri}/model")


def test_a_wrong_word_about_an_objects_content_is_asked_for_again(bucket):
    bucket.put("x", b"whole", sha256=sha256(b"whole"))
    bucket.proxy.mode, bucket.proxy.faults_left = "corrupt", 1
    bucket.proxy.matches = lambda method, path: method == "HEAD"
    assert local_copy(f"{bucket.uri}/x").read_bytes() == b"whole"
    assert bucket.proxy.faults == 1


def test_a_file_that_is_gone_after_the_listing_is_not_missed(bucket):
    bucket.put("model/a.bin", b"a")
    bucket.put("model/b.bin", b"b")

    def remove(method, path):
        if method == "HEAD":
            bucket.client.delete_object(Bucket=bucket.name, Key="model/b.bin")
        return False

    bucket.proxy.mode, bucket.proxy.matches = "delay", remove
    assert files_of(local_copy(f"{bucket.uri}/model")) == {"a.bin": b"a"}


def test_a_folder_that_another_process_mirrors_too_is_never_away(bucket, tmp_path):
    """Readers of a tree while others make the same one, which once took it away for a moment."""
    for name in "abc":
        bucket.put(f"model/{name}", name.encode())
    local_copy(f"{bucket.uri}/model")
    content = {file.read_text(): file for file in (tmp_path / "cache" / "s3" / "objects").glob("*/*")}
    lost, errors, together = [], [], threading.Barrier(3, timeout=120)

    def read(number):
        try:
            for turn in range(100):
                wanted = {f"{turn}/{name}": file for name, file in content.items()}
                together.wait()
                path = link_tree("model", wanted)
                for _ in range(20):
                    lost.extend((turn, name) for name in wanted if not (path / name).exists())
        except Exception as error:
            together.abort()  # the others need not wait for this one
            errors.append(repr(error))

    readers = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert errors == [] and lost == [] and sorted(content) == ["a", "b", "c"]


def test_a_folder_must_be_what_its_manifest_says(bucket):
    bucket.put("run/a.bin", b"a")
    bucket.put("run/manifest.json", json.dumps({"a.bin": {"bytes": 1, "sha256": sha256(b"other")}}).encode())
    with pytest.raises(StorageError, match=r"a\.bin is not the file that manifest.json names"):
        local_copy(f"{bucket.uri}/run")
    bucket.put("run/a.bin", b"other")
    bucket.put("run/export/manifest.json", json.dumps({"b.bin": {"bytes": 1, "sha256": sha256(b"b")}}).encode())
    with pytest.raises(StorageError, match=r"run/export/b\.bin is missing that export/manifest.json names"):
        local_copy(f"{bucket.uri}/run")


def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(bucket, monkeypatch):
    monkeypatch.setattr("wmtp.storage.transfer.PART_BYTES", 1000)
    monkeypatch.setattr("wmtp.storage.transfer.THREADS", 1)
    old, new = b"o" * 5000, b"n" * 5000
    bucket.put("x", old, sha256=sha256(old))
    seen = []

    def replace(method, path):
        if method == "GET" and path.startswith(f"/{bucket.name}/x"):
            seen.append(path)
            if len(seen) == 3:
                bucket.put("x", new, sha256=sha256(new))
        return False

    bucket.proxy.mode, bucket.proxy.matches = "delay", replace
    assert local_copy(f"{bucket.uri}/x").read_bytes() == new


def test_a_killed_download_goes_on_and_two_processes_fetch_once(bucket, tmp_path):
    """Real processes: one is killed in the middle, then two at once finish it, with no whole file fetched twice."""
    whole = {name: os.urandom(MB) for name in ("a.bin", "b.bin", "c.bin")}
    for name, body in whole.items():
        bucket.put(f"model/{name}", body, sha256=sha256(body))
    bucket.proxy.mode, bucket.proxy.seconds = "delay", 60
    bucket.proxy.matches = lambda method, path: method == "GET" and path.endswith("/c.bin")
    command = [sys.executable, "-c", f"from wmtp.storage import local_copy; print(local_copy('{bucket.uri}/model'))"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    objects = tmp_path / "cache" / "s3" / "objects"
    until = time.monotonic() + 300
    while time.monotonic() < until and first.poll() is None:
        if len(list(objects.glob("*/*"))) == 2 and bucket.gets_of("model/c.bin"):
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert visible(tmp_path / "cache") == []
    bucket.proxy.reset()
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert [files_of(path) == whole for path in paths] == [True]
    assert [len(bucket.gets_of(f"model/{name}")) for name in sorted(whole)] == [0, 0, 1]


def test_the_limit_removes_what_was_used_longest_ago_and_is_not_in_use(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("WMTP_CACHE_LIMIT", "2500B")
    for name in "abc":
        bucket.put(name, name.encode() * 1000)
    command = [sys.executable, "-c", f"from wmtp.storage import local_copy; local_copy('{bucket.uri}/a')"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    subprocess.run(command, env=environment, check=True)  # a process that has ended uses nothing
    kept = local_copy(f"{bucket.uri}/b")
    local_copy(f"{bucket.uri}/c")
    assert sorted(body[:1] for body in visible(tmp_path / "cache")) == [b"b", b"c"]
    make_room(2500)
    assert kept.exists()  # this process uses it
    monkeypatch.setenv("WMTP_CACHE_LIMIT", "plenty")
    with pytest.raises(StorageError, match="WMTP_CACHE_LIMIT must be a size such as 200GB, got plenty"):
        make_room()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://no-such-bucket-here/x", "has no bucket no-such-bucket-here"),
        ("{bucket}/absent", "no such object or folder"),
        ("s3://", "must be s3://bucket/key"),
        ("s3://UPPER_case/x", "bucket"),
    ],
)
def test_a_wrong_uri_is_one_clear_line(bucket, uri, message):
    with pytest.raises(StorageError, match=message):
        local_copy(uri.format(bucket=bucket.uri))


def test_no_credentials_names_the_variables(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        local_copy(f"{bucket.uri}/x")
