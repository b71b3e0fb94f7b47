"""The micro-batches of a step: when the last one is known, and what each of them makes the processes exchange."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from counted import Counted
from processes import start
from random_models import random_decoder
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from wmtp.data import BatchStream, Document, Documents, pack
from wmtp.distributed import all_reduce_sum, start_world
from wmtp.models import shard_model
from wmtp.training.accumulation import Accumulation
from wmtp.weighting import weight_statistics
from wmtp.weighting.statistics import order_statistics
from wmtp.weighting.targets import valid_targets

SIZES = {"vocab_size": 20, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 8, "intermediate_dim": 12}
SIZES |= {"max_seq_len": 16, "num_future_tokens": 2}


def collectives_of_a_step_on_two_times_two_ranks():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard_model(random_decoder(**SIZES), mesh, param_dtype=torch.float32)
    tokens = torch.arange(8)[None]
    with Counted() as collectives:
        for number in (1, 2, 3):
            loss = model(tokens).sum()
            model.set_requires_all_reduce(number == 3)
            loss.backward()
    counts, groups = collectives.operations, 6  # three blocks, embedding, unembedding and the root
    assert counts["allreduce_"] == groups
    assert counts["_reduce_scatter_base_"] == 3 * groups
    assert all(p.grad is not None for p in model.parameters())
    dist.destroy_process_group()


def test_replicas_add_up_gradients_once_a_step_and_shards_in_each_micro_batch(tmp_path):
    start(collectives_of_a_step_on_two_times_two_ranks, log=tmp_path / "log.txt").join()


def test_the_last_micro_batch_is_known_on_every_rank_before_its_loss():
    """Rows of 4 tokens have 3 targets: on two ranks a micro-batch of one row each has 6."""
    rows = [Document(np.full(4, i, np.int32), np.full(4, i, np.int32), f"d{i}") for i in range(7)]
    data = pack(Documents("made up", tuple(rows)), 6, packed=False, pad_id=99)
    streams = [BatchStream(data, batch_size=1, rank=rank, world_size=2, seed=0) for rank in (0, 1)]
    for target_tokens, micro_batches, expected in ((15, None, 3), (12, None, 2), (1, None, 1), (None, 4, 4)):
        steps = [Accumulation(stream, micro_batches, target_tokens) for stream in streams]
        taken, targets = 0, 0
        while not steps[0].full:
            assert not steps[1].full
            for step in steps:
                batch = step.next_batch()
                targets += int(valid_targets(batch["labels"], 1, batch["document_ids"]).sum())
            taken += 1
        assert steps[1].full and (taken, targets) == (expected, 6 * expected)


def figures_of_all_ranks():
    """Each of three ranks has its own targets, one of them none; together they are the numbers of one process."""
    rank = start_world("cpu").rank
    generator = torch.Generator().manual_seed(3)
    everything = torch.randn(1000, 3, generator=generator).abs()  # weight, CE, place
    everything[::4, 0] = 0
    everything[7] = torch.tensor([0.0, -1e-8, 1.0])  # a CE that rounding made negative
    for part in (everything, everything[:1], torch.ones_like(everything), everything[:0]):
        mine = part[(0, len(part) // 3, len(part))[rank] : (len(part) // 3, len(part), len(part))[rank]]
        named = [{"policy_ce": table[:, 1], "position": table[:, 2]} for table in (mine, part)]
        ours = weight_statistics(mine[:, 0], **named[0], all_reduce=all_reduce_sum)
        theirs = weight_statistics(part[:, 0], **named[1])
        assert ours == pytest.approx(theirs, rel=1e-12) and len(ours) == len(theirs)
        exact = [name for name in ours if name in ("p25", "p75", "p95", "max", "kept_share")]
        assert [ours[name] for name in exact] == [theirs[name] for name in exact]
    places = torch.arange(1000.0)
    column = everything[rank::3, 1][None]
    assert torch.equal(order_statistics(column, places, all_reduce_sum)[0], everything[:, 1].sort().values.double())


def test_ranks_that_see_only_their_own_targets_get_the_figures_of_all(tmp_path):
    start(figures_of_all_ranks, size=3, log=tmp_path / "log.txt").join()
