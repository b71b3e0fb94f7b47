"""The stream of batches: one number is its state, and the world size changes nothing."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data import BatchStream, Document, Documents, pack, validation_batches


def make_dataset(rows: int, *, scored: bool = False):
    items = []
    for i in range(rows):
        tokens = np.full(4, i, np.int32)
        items.append(
            Document(tokens, tokens, f"d{i}", {"reference_ce": np.full(4, i / 2, np.float32)} if scored else {})
        )
    return pack(Documents("made up", tuple(items)), 6, packed=False, pad_id=99)


def global_rows(dataset, count: int, *, batch_size: int, world_size: int, seed: int = 0, start: dict | None = None):
    """The rows of `count` global batches, each as all ranks together see it."""
    streams = [
        BatchStream(dataset, batch_size=batch_size, rank=r, world_size=world_size, seed=seed) for r in range(world_size)
    ]
    for stream in streams:
        if start is not None:
            stream.load_state_dict(start)
    return [[row for s in streams for row in s.next_batch()["rows"]] for _ in range(count)], streams[0].state_dict()


def test_a_batch_holds_its_rows_as_int64():
    dataset = make_dataset(10, scored=True)
    batch = BatchStream(dataset, batch_size=3, rank=0, world_size=1, seed=0).next_batch()
    for name in ("tokens", "labels", "document_ids"):
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], getattr(dataset, name)[batch["rows"]].long())
    assert batch["signals"]["reference_ce"].dtype == torch.float32
    assert torch.equal(batch["signals"]["reference_ce"], dataset.signals["reference_ce"][batch["rows"]])
    assert batch["tokens"][:, 0].tolist() == batch["rows"]
    assert [dataset.row_ids(row) for row in batch["rows"]] == [(f"d{row}",) for row in batch["rows"]]
    assert BatchStream(make_dataset(3), batch_size=1, rank=0, world_size=1, seed=0).next_batch()["signals"] == {}


def test_the_global_batch_is_the_same_at_any_world_size_and_accumulation():
    dataset = make_dataset(23)
    expected, _ = global_rows(dataset, 12, batch_size=8, world_size=1)
    for batch_size, world_size in ((4, 2), (2, 4), (1, 8)):
        assert global_rows(dataset, 12, batch_size=batch_size, world_size=world_size)[0] == expected
    halves, _ = global_rows(dataset, 24, batch_size=2, world_size=2)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == expected


@given(st.integers(1, 30), st.integers(0, 5), st.data())
def test_resuming_anywhere_equals_never_having_stopped(rows, seed, data):
    world_sizes = st.sampled_from([1, 2, 4]).filter(lambda w: w <= rows)
    before, after = data.draw(world_sizes), data.draw(world_sizes)
    stop = data.draw(st.integers(0, 20)) * 4  # rows; across several epochs where there are few
    dataset = make_dataset(rows)
    uninterrupted, _ = global_rows(dataset, stop + 20, batch_size=1, world_size=1, seed=seed)
    first, state = global_rows(dataset, stop // before, batch_size=1, world_size=before, seed=seed)
    second, _ = global_rows(dataset, 20 // after, batch_size=1, world_size=after, seed=seed, start=state)
    assert [*chain(*first, *second)] == [*chain(*uninterrupted)]


def test_every_epoch_is_another_permutation_of_all_rows():
    dataset = make_dataset(12)
    batches, state = global_rows(dataset, 9, batch_size=4, world_size=1)
    epochs = [[*chain(*batches[i : i + 3])] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert global_rows(dataset, 9, batch_size=4, world_size=1, seed=1)[0] != batches
    assert state["position"] == 36
    stream = BatchStream(dataset, batch_size=5, rank=0, world_size=1, seed=0)
    rows = [*chain(*(stream.next_batch()["rows"] for _ in range(5)))]
    assert sorted(rows[:12]) == sorted(rows[12:24]) == [*range(12)]  # batches go across the end of an epoch
    assert stream.epoch == 25 / 12


def test_targets_are_counted_as_they_are_consumed():
    items = [Document(np.zeros(n, np.int32), np.zeros(n, np.int32), f"d{n}") for n in (2, 3, 5, 6)]
    dataset = pack(Documents("made up", tuple(items)), 6, packed=False, pad_id=99)
    stream, counted = BatchStream(dataset, batch_size=3, rank=0, world_size=1, seed=0), 0
    for _ in range(4):  # across the ends of two epochs
        batch = stream.next_batch()
        counted += int(((batch["document_ids"] >= 0).sum(dim=1) - 1).sum())  # no document's first token is one
        assert stream.num_targets == counted


def test_the_order_of_rows_is_golden():
    stream = BatchStream(make_dataset(10), batch_size=10, rank=0, world_size=1, seed=3)
    assert [stream.next_batch()["rows"] for _ in range(2)] == [
        [9, 6, 0, 2, 1, 4, 7, 5, 3, 8],
        [4, 1, 2, 8, 5, 0, 7, 9, 6, 3],
    ]


def test_fewer_rows_than_one_batch_of_all_ranks():
    with pytest.raises(
        ValueError, match=r"has 7 rows of 6 tokens, fewer than batch_size 2 x world size 4 = 8; lower batch_"
    ):
        BatchStream(make_dataset(7), batch_size=2, rank=0, world_size=4, seed=0)
    with pytest.raises(ValueError, match="got batch_size 1, rank 2, world_size 2, seed 0"):
        BatchStream(make_dataset(7), batch_size=1, rank=2, world_size=2, seed=0)


def test_a_state_of_other_data_or_another_seed_is_refused():
    def stream(rows=8, **changes):
        return BatchStream(make_dataset(rows), **{"batch_size": 2, "rank": 0, "world_size": 1, "seed": 0, **changes})

    state = stream().state_dict()
    stream(batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"cannot resume: the data or its packing .* changed since the checkpoint"):
        stream(rows=9).load_state_dict(state)
    with pytest.raises(ValueError, match="seed changed since the checkpoint, seed was 0, now 1; restore it"):
        stream(seed=1).load_state_dict(state)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_held_out_rows_come_once_and_all_ranks_step_together(rows, batch_size, world_size):
    dataset = make_dataset(rows, scored=True)
    ranks = [list(validation_batches(dataset, batch_size, r, world_size)) for r in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for batch in batches for row in batch["rows"]) == list(range(rows))
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["tokens"].shape == batch["labels"].shape == batch["document_ids"].shape == (batch_size, 6)
        real = len(batch["rows"])
        assert batch["tokens"][:real, 0].tolist() == batch["rows"]
        assert (batch["tokens"][real:] == 99).all() and (batch["labels"][real:] == -100).all()
        assert (batch["document_ids"][real:] == -1).all() and (batch["signals"]["reference_ce"][real:] == 0).all()
