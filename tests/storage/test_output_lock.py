"""One writer of an output folder: refused seconds, killed holders, separate disks, leases in S3."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start
from torch.distributed.device_mesh import init_device_mesh

from wmtp.distributed import start_world
from wmtp.errors import UserError
from wmtp.models import llama_mtp, shard_model
from wmtp.storage import StorageError
from wmtp.storage.lease import Lease
from wmtp.storage.lock import FolderLock
from wmtp.training.checkpoint import Checkpointer, latest_checkpoint
from wmtp.training.output_dir import open_output

WAIT = "wmtp.storage.lock._SECONDS_TO_END"


def hold(folder):
    start_world("cpu")
    output = open_output(str(folder))
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / f"here{dist.get_rank()}").touch()
    time.sleep(600)
    output.close()


def held(folder, log, size=1):
    process = start(hold, folder, size=size, log=log)
    while not all((folder / f"here{rank}").exists() for rank in range(size)):
        assert process.running(), log.read_text()
        time.sleep(0.02)
    return process


def test_a_second_writer_is_refused_with_the_firsts_name_until_it_is_dead(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = held(folder, tmp_path / "log.txt", size=2)
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.setattr(WAIT, 0.2)
    for name in (folder, link):  # another name of the same folder
        with pytest.raises(
            StorageError, match=rf"is being written by process {first.pids[0]} on .*, since 20.* UTC; end"
        ):
            open_output(str(name))
    os.kill(first.pids[0], signal.SIGKILL)
    first.members[0].join()
    with pytest.raises(StorageError, match="is being written by"):  # rank 1 of it may still write
        open_output(str(folder))
    os.kill(first.pids[1], signal.SIGKILL)
    monkeypatch.setattr(WAIT, 60)  # the kernel may still be taking it apart
    output = open_output(str(folder))
    again = open_output(str(folder))  # the process that has it may ask again
    output.close()
    again.close()
    assert sorted(p.name for p in folder.iterdir()) == ["here0", "here1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "log.txt", "run"]


def on_separate_disks(tmp_path):
    """Two ranks whose relative output_dir is not the same folder."""
    world = start_world("cpu")
    import wmtp.storage.lock
    import wmtp.training.checkpoint

    wmtp.training.checkpoint._SECONDS_TO_APPEAR = wmtp.storage.lock._SECONDS_TO_END = 0.3
    own = Path(tmp_path) / f"node{world.rank}"
    own.mkdir()
    os.chdir(own)
    with pytest.raises(
        StorageError, match=r"^run is not one folder for all processes: rank 1 on .* does not see what rank"
    ):
        open_output("run")

    model = llama_mtp(
        vocab_size=64, num_layers=2, num_heads=1, num_kv_heads=1, embed_dim=8, intermediate_dim=8, max_seq_len=8,
        num_future_tokens=2,
    )  # fmt: skip
    shard_model(model, init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)), param_dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Path("run/checkpoints/step_00000001.tmp").mkdir(parents=True)
    checkpointer = Checkpointer(Path("run"))
    checkpointer.save(1, model, optimizer, {})
    if world.is_main:
        with pytest.raises(
            UserError, match=r"lacks __1_0.distcp, or a part of it, which another process wrote: output_d"
        ):
            checkpointer.wait()
    else:
        checkpointer.wait()
    assert latest_checkpoint(Path("run")) is None
    assert not Path("run/checkpoints/latest").exists()


def test_without_locks_of_the_kernel_the_holder_before_may_live(tmp_path):
    path = tmp_path / ".run.run.lock"
    first = FolderLock(tmp_path / "run", path)
    first.take()
    left = path.read_bytes()
    first.release()
    for locks in (True, False):  # as where the file system answers ENOLCK
        path.write_bytes(left)
        second = FolderLock(tmp_path / "run", path)
        second._locks = locks
        second.take()
        assert (second.previous is not None) == locks  # its lease in S3 is taken over at once only where it is dead
        second.release()


def test_ranks_without_a_common_folder_are_refused_and_publish_nothing(tmp_path):
    start(on_separate_disks, str(tmp_path), size=2, log=tmp_path / "log.txt").join()


@pytest.fixture
def lease(bucket, tmp_path, monkeypatch):
    """A lease on one folder, of a machine of that name."""
    monkeypatch.setattr("wmtp.storage.lease._HEARTBEAT", 0.2)
    monkeypatch.setattr("wmtp.storage.lease._EXPIRY", 30)  # never, under any load, while it is renewed
    monkeypatch.setattr("wmtp.storage.s3._FIRST_WAIT", 0.02)
    locks = []

    def make(machine):
        lock = FolderLock(tmp_path / machine, tmp_path / f".{machine}.run.lock")
        locks.append(lock)
        return Lease(f"{bucket.uri}/run", lock.take(), lock.previous), lock

    return make


def test_a_living_lease_is_refused_a_dead_one_is_taken_over(lease, bucket, tmp_path, monkeypatch, capsys):
    first, lock = lease("one")
    first.take()
    assert bucket.keys("run/") == ["run/run.lock"]
    with pytest.raises(StorageError, match=rf"{bucket.uri}/run is being written by process {os.getpid()} on .*; end"):
        lease("two")[0].take()
    assert "waiting up to 30 s to see if it lives" in capsys.readouterr().err
    first._end.set()  # as if killed
    first._thread.join()
    monkeypatch.setattr("wmtp.storage.lease._EXPIRY", 0.5)
    second, _ = lease("two_again")
    second.take()  # on another machine after a while
    second._end.set()
    second._thread.join()
    monkeypatch.setattr("wmtp.storage.lease._EXPIRY", 10_000)
    third = Lease(f"{bucket.uri}/run", lock.holder, second._holder.id)
    third.take()  # where it is known that the process has ended: at once
    third.release()
    assert bucket.keys("run/") == []


def lose_a_lease(uri, folder):
    import wmtp.storage.lease

    wmtp.storage.lease._HEARTBEAT = 0.1
    lock = FolderLock.of(Path(folder))
    lease = Lease(uri, lock.take(), None)
    lease.take()
    Path(f"{folder}.taken").touch()
    time.sleep(600)


def test_a_lost_lease_ends_the_run(lease, bucket, tmp_path):
    process = start(lose_a_lease, f"{bucket.uri}/run", str(tmp_path / "lost"), log=tmp_path / "log.txt")
    while not (tmp_path / "lost.taken").exists():
        assert process.running(), (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    other, _ = lease("other")
    while process.running():  # it renews between our reading and our writing
        other._write(IfMatch=other._there()[0])
        time.sleep(0.02)
    process.join(code=1)
    assert re.search(
        "error: s3://.*/run was taken over by process .*: this run ends", (tmp_path / "log.txt").read_text()
    )
