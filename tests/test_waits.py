"""Ranks that wait for a slower one, and what they tell each other at a failure."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from processes import start

from wmtp.distributed import gather_objects, on_rank_0, wait_for_all
from wmtp.errors import UserError


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


@pytest.mark.slow
def test_a_wait_ends_when_the_slow_rank_comes_not_at_the_groups_timeout(tmp_path):
    start(wait_beyond_the_timeout, size=2, log=tmp_path / "log.txt").join()
