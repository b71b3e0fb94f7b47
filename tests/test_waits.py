"""Ranks that wait for a slower one, and what they tell each other at a failure."""

import hashlib
import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import start
from services import free_port

from wmtp.config import ConfigError
from wmtp.distributed import SharedCounters, gather_objects, on_rank_0, share_out, start_world, wait_for_all
from wmtp.errors import UserError, line_for_user
from wmtp.files import write_manifest
from wmtp.storage import Output
from wmtp.training.checkpoint import checkpoint_to_resume, verify_together
from wmtp.training.output_dir import check_output_dir


def wait_beyond_the_timeout():
    dist.init_process_group("gloo")
    # Instead of half an hour, and only now: both have met, and gloo is connected.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(2)
    assert gather_objects(rank) == [0, 1]
    if rank == 1:
        time.sleep(2)
    wait_for_all()

    def work():
        time.sleep(2)
        return {"rank": rank}

    assert on_rank_0(work) == {"rank": 0}

    def refuse():
        raise UserError("no such bucket")

    with pytest.raises(UserError, match=r"^no such bucket$"):
        on_rank_0(refuse)

    def break_down():
        raise RuntimeError("a fault of code")

    with pytest.raises(RuntimeError if rank == 0 else UserError, match="a fault of code"):
        on_rank_0(break_down)


def wait_for_one_that_does_not_come():
    world = start_world("cpu", replicas=2, timeout_minutes=7)
    store = dist.PrefixStore("test", dist.distributed_c10d._get_default_store())
    for group in (dist.group.WORLD, *world.mesh.get_all_groups()):
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=7)
    wait_for_all()
    if world.rank == 0:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
        with pytest.raises(RuntimeError) as late:
            dist.all_reduce(torch.ones(1))
        said = line_for_user(late.value)
        assert said.startswith("another rank did not come to a collective operation in time (") and "1000ms" in said
        store.set("given_up", "")
    store.wait(["given_up"])


def work_in_one_order():
    world = start_world("cpu", deterministic=True)
    assert world.size == 1 and torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # one that can have none


def verify_a_checkpoint(folder):
    """Each file is read by one rank; what one of them finds, all say."""
    dist.init_process_group("gloo")
    rank, folder = dist.get_rank(), Path(folder)
    if rank == 0:
        for number in range(6):
            (folder / f"{number}.distcp").write_bytes(os.urandom(1000))
        write_manifest(folder)
    wait_for_all()
    verify_together(folder)
    done = []
    share_out(range(6), done.append)
    assert sorted(number for numbers in gather_objects(done) for number in numbers) == list(range(6))
    if rank == 0:
        (folder / "3.distcp").write_bytes(os.urandom(1000))
    wait_for_all()
    with pytest.raises(UserError, match=r"^checkpoint file .*3\.distcp is corrupt"):
        verify_together(folder)
    if rank == 0:
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        verify_together(folder)


def test_a_checkpoint_is_verified_by_all_ranks_together(tmp_path):
    start(verify_a_checkpoint, str(tmp_path), size=2, log=tmp_path.with_suffix(".txt")).join()


def what_rank_0_sees(folder):
    """On a file system that is slow to show rank 1 what is there; here it never does."""
    dist.init_process_group("gloo")
    own = Path(folder) / f"seen_by_{dist.get_rank()}"
    checkpoint = Path("run/checkpoints/step_00000001")
    if dist.get_rank() == 0:
        (own / checkpoint).mkdir(parents=True)
        (own / checkpoint / "manifest.json").write_text("{}")
        (own / "run" / "config.yaml").touch()
    else:
        (own / "run").mkdir(parents=True)
    os.chdir(own)
    named = {"results": ("checkpoints",), "overwrite": False}
    assert check_output_dir(Output("run"), "a run", resume="yes", **named) is True
    assert checkpoint_to_resume(Path("run"), "yes") == checkpoint
    with pytest.raises(ConfigError, match="already holds a run; set resume=true to go on"):
        check_output_dir(Output("run"), "a run", resume="no", **named)
    large = on_rank_0(lambda: os.urandom(20 << 20))  # of an evaluation's journals
    assert len(large) == 20 << 20 and len(set(gather_objects(hashlib.sha256(large).hexdigest()))) == 1


def test_what_there_is_to_go_on_from_is_what_rank_0_sees(tmp_path):
    start(what_rank_0_sees, str(tmp_path), size=2, log=tmp_path / "log.txt").join()


def test_a_rank_that_does_not_come_ends_a_collective_with_one_line(tmp_path):
    start(wait_for_one_that_does_not_come, size=2, log=tmp_path / "log.txt").join()


def test_deterministic_operations_are_asked_for_before_anything_is_computed(tmp_path):
    start(work_in_one_order, log=tmp_path / "log.txt").join()


@pytest.mark.slow
def test_a_wait_ends_when_the_slow_rank_comes_not_at_the_groups_timeout(tmp_path):
    start(wait_beyond_the_timeout, size=2, log=tmp_path / "log.txt").join()


def outlive_rank_0(port):
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("localhost", port, 2, is_master=rank == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    wait_for_all()
    if rank == 0:
        while store.add("rank 1 has arrived", 0) == 0:
            time.sleep(0.01)
        os._exit(0)
    store.add("rank 1 has arrived", 1)
    for wait in (lambda: on_rank_0(lambda: 0), wait_for_all, lambda: SharedCounters().add("judged", 1)):
        with pytest.raises(UserError, match=r"^rank 0 has ended, and this rank cannot go on"):
            wait()


def test_ranks_without_a_launcher_say_that_rank_0_has_ended(tmp_path):
    start(outlive_rank_0, free_port(), size=2, log=tmp_path / "log.txt").join()
