"""Packing: no token lost, no document split, and every column stays beside its token."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wmtp.data import Document, Documents, pack
from wmtp.weighting.targets import valid_targets

PAD = 7


def make_documents(lengths, *, scored: bool = False, prompts=None) -> Documents:
    """Documents whose token and reference values are all different, so that any mix-up shows."""
    items, start = [], 100
    for i, length in enumerate(lengths):
        tokens = np.arange(start, start + length, dtype=np.int32)
        labels = tokens.copy()
        labels[: 0 if prompts is None else prompts[i]] = -100
        items.append(Document(tokens, labels, f"d{i}", {"reference_ce": tokens / np.float32(8)} if scored else {}))
        start += length
    return Documents("made up", tuple(items))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=60), st.integers(2, 48), st.booleans())
def test_every_token_within_seq_len_is_there_once_with_its_label_and_reference(lengths, seq_len, packed):
    documents = make_documents(lengths, scored=True, prompts=[n // 3 for n in lengths])
    assume(any((d.labels[1:seq_len] >= 0).any() for d in documents))
    dataset = pack(documents, seq_len, packed=packed, pad_id=PAD)
    found = {}
    for row in range(len(dataset)):
        ids = dataset.document_ids[row]
        number = int(ids.max()) + 1
        assert number == len(dataset.row_ids(row))
        assert ids[ids >= 0].tolist() == sorted(
            ids[ids >= 0].tolist()
        )  # each document in one piece, padding at the end
        assert (ids[int((ids >= 0).sum()) :] == -1).all()
        for k, name in enumerate(dataset.row_ids(row)):
            assert name not in found
            here = ids == k
            found[name] = [
                column[row][here].numpy()
                for column in (dataset.tokens, dataset.labels, dataset.signals["reference_ce"])
            ]
        assert (dataset.tokens[row][ids < 0] == PAD).all()
        assert (dataset.labels[row][ids < 0] == -100).all()
        assert (dataset.signals["reference_ce"][row][ids < 0] == 0).all()
    for document in documents:
        if (document.labels[1:seq_len] >= 0).any():
            tokens, labels, reference_ce = found.pop(document.id)
            np.testing.assert_array_equal(tokens, document.tokens[:seq_len])
            np.testing.assert_array_equal(labels, document.labels[:seq_len])
            np.testing.assert_array_equal(reference_ce, document.signals["reference_ce"][:seq_len])
    assert not found


@given(st.lists(st.integers(2, 64), min_size=1, max_size=80))
def test_no_two_rows_would_fit_into_one(lengths):
    """Best fit opens a row only where no open row has room: any two rows together hold more than one row's worth."""
    dataset = pack(make_documents(lengths), 64, pad_id=PAD)
    used = sorted((dataset.document_ids >= 0).sum(dim=1).tolist())
    assert len(used) == 1 or used[0] + used[1] > 64


def test_many_documents_fill_their_rows():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 3000).astype(int) + 2
    dataset = pack(make_documents(lengths), 1024, pad_id=PAD)
    assert (dataset.document_ids >= 0).double().mean() > 0.99
    one_each = pack(make_documents(lengths), 1024, packed=False, pad_id=PAD)
    assert (one_each.document_ids >= 0).double().mean() < 0.2


def test_a_worked_example():
    dataset = pack(make_documents([3, 6, 5, 2], prompts=[1, 2, 0, 0]), 8, pad_id=PAD)
    assert [dataset.row_ids(row) for row in (0, 1)] == [("d0", "d2"), ("d1", "d3")]
    assert dataset.tokens.tolist() == [
        [100, 101, 102, 109, 110, 111, 112, 113],
        [103, 104, 105, 106, 107, 108, 114, 115],
    ]
    assert dataset.labels.tolist() == [
        [-100, 101, 102, 109, 110, 111, 112, 113],
        [-100, -100, 105, 106, 107, 108, 114, 115],
    ]
    assert dataset.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0] * 6 + [1, 1]]
    assert dataset.num_targets == 2 + 4 + 4 + 1  # a document's first token has nothing before it
    assert (dataset.seq_len, dataset.max_token_id) == (8, 115)
    assert dataset.summary() == (
        "made up: 2 rows of 8 tokens, 4 documents, 11 targets, 0 cut, 0 dropped (no target within seq_len), 100.0% full"
    )


def test_the_targets_are_those_the_loss_counts():
    lengths = np.random.default_rng(1).integers(2, 40, 50)
    dataset = pack(make_documents(lengths, prompts=lengths // 2), 64, pad_id=PAD)
    valid = valid_targets(dataset.labels.long(), 1, dataset.document_ids.long())
    assert dataset.num_targets == int(valid.sum())


def test_cut_and_left_out_documents_are_counted():
    dataset = pack(make_documents([4, 20, 20], prompts=[1, 3, 9]), 8, pad_id=PAD)
    assert (dataset.num_cut, dataset.num_dropped) == (1, 1)
    assert [dataset.row_ids(row) for row in range(len(dataset))] == [("d0",), ("d1",)]
    assert dataset.summary().endswith("2 documents, 8 targets, 1 cut, 1 dropped (no target within seq_len), 75.0% full")
    with pytest.raises(ValueError, match="made up: no document has a target within seq_len 8 tokens; raise seq_len"):
        pack(make_documents([20], prompts=[9]), 8, pad_id=PAD)
    with pytest.raises(ValueError, match="seq_len must be >= 2, got 1"):
        pack(make_documents([20]), 1, pad_id=PAD)


def test_the_fingerprint_binds_data_and_packing():
    documents = make_documents([3, 6, 5])
    prints = [
        pack(documents, 8, pad_id=PAD).fingerprint,
        pack(documents, 9, pad_id=PAD).fingerprint,
        pack(documents, 8, packed=False, pad_id=PAD).fingerprint,
        pack(make_documents([3, 6, 6]), 8, pad_id=PAD).fingerprint,
        pack(make_documents([3, 6, 5], prompts=[1, 0, 0]), 8, pad_id=PAD).fingerprint,
    ]
    assert len(set(prints)) == 5
    assert pack(make_documents([3, 6, 5]), 8, pad_id=PAD).fingerprint == prints[0]


def test_the_packing_of_earlier_releases_is_kept_so_that_their_runs_resume():
    """As it was before documents could come from files, when rows were found in another way."""
    lengths = np.random.default_rng(0).lognormal(3.5, 0.8, 500).astype(int) + 2
    dataset = pack(make_documents(lengths, scored=True, prompts=lengths // 3), 128, pad_id=PAD)
    assert dataset.fingerprint == "fe40a6c0b6c0a0cc0183a3f9dd8e6f2eaace3bf9e2f72924e24ac76761338e63"
    assert dataset.rows_sha256 == "e72b722813902b5671792a3cbec131e1dbadfda1d1596b4486d22fe577be923d"
    assert (len(dataset), dataset.max_token_id, dataset.num_targets) == (171, 23156, 14401)
    one_each = pack(make_documents(lengths, prompts=lengths // 3), 128, packed=False, pad_id=PAD)
    assert one_each.fingerprint == "e91ffbcb94adb50aadb38371ca17a2801bc651cd297f0c4f90cecc53de65edaf"
    assert one_each.rows_sha256 == "576f0c9de97fc42dffec8e40e48eb24bc57cf1b140864da7a6d51c01a759f6bb"


def test_no_documents_is_one_clear_line():
    with pytest.raises(ValueError, match=r"^nothing: the dataset is empty$"):
        Documents("nothing", ())
