"""Scored datasets: columns stay beside their tokens, and nothing is read that its manifest does not vouch for."""

import errno
import gzip
import json
import resource
import signal
import weakref

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data import (
    Document,
    Documents,
    DocumentStream,
    pack,
    prompt_completion,
    prompt_completion_stream,
    save_tokenized,
    scored,
    tokenized,
    tokenized_stream,
)
from wmtp.data.document_files import in_files
from wmtp.data.documents import collecting
from wmtp.data.parts import PartReader, column_of, prefetch, require_finite, rows_to_score
from wmtp.data.scored_dataset import (
    COLUMNS,
    part_path,
    read_part,
    require_same_binding,
    write_column_manifest,
    write_part,
)
from wmtp.errors import UserError
from wmtp.models import llama_mtp
from wmtp.models.export import export_hf
from wmtp.pretrained import byte_tokenizer

TOKENIZER = byte_tokenizer()
LENGTHS = [5, 9, 2, 7]


def make_documents(lengths=LENGTHS, **columns):
    """Documents whose tokens differ by place; a column is a function of a document's number and length."""
    items = []
    for i, length in enumerate(lengths):
        tokens = np.arange(length, dtype=np.int32) + 10 * i
        labels = np.where(np.arange(length) < 2, -100, tokens).astype(np.int32)
        extra = {name: make(i, length).astype(np.float32) for name, make in columns.items()}
        items.append(Document(tokens, labels, f"d{i}", extra))
    return Documents("made up", tuple(items))


def scores(documents):
    return [np.arange(len(d), dtype=np.float32) / 8 + i for i, d in enumerate(documents)]


@pytest.fixture
def folder(tmp_path):
    """A scored dataset of two parts, two documents each."""
    return write_scored(tmp_path / "scored")


def write_scored(
    folder, column="reference_ce", seq_len=8, vocab_hash=None, checkpoint="0" * 64, values=None, documents=None
):
    binding = {
        "column": column,
        "tokenizer": {"vocab_hash": vocab_hash or TOKENIZER.vocab_hash()},
        "model": {"checkpoint_sha256": checkpoint, "section": None},
        "seq_len": seq_len,
    }
    documents = documents or make_documents()
    values = scores(documents) if values is None else values
    entries = [
        write_part(
            part_path(folder, number), documents.items[place], {n: values[place] for n in COLUMNS[column]}, binding
        )
        for number, place in enumerate((slice(0, 2), slice(2, 4)))
    ]
    write_column_manifest(folder, binding, entries)
    return folder


@pytest.mark.parametrize("column", COLUMNS)
def test_a_scored_dataset_comes_back_bit_for_bit(tmp_path, column):
    read = scored(TOKENIZER, source=str(write_scored(tmp_path / "s", column)))
    expected = make_documents(**dict.fromkeys(COLUMNS[column], lambda i, n: np.arange(n) / 8 + i))
    assert read.fingerprint == expected.fingerprint
    assert [d.id for d in read] == [d.id for d in expected]
    assert read.signals == COLUMNS[column] and read[3].tokens.dtype == np.int32
    packed = pack(read, 8, pad_id=0)
    assert set(packed.signals) == set(COLUMNS[column])
    assert packed.fingerprint == pack(expected, 8, pad_id=0).fingerprint


def test_what_the_data_had_for_each_token_stays_beside_the_column(tmp_path):
    """A second model's column beside the first one's, under its new name, and a weight; each bound by its hash."""
    first = make_documents(reference_ce=lambda i, n: np.arange(n) * i, weight=lambda i, n: np.full(n, i))
    write_scored(tmp_path / "first", documents=first)
    renamed = scored(TOKENIZER, source=str(tmp_path / "first"), rename={"reference_ce": "base_ce"})
    assert renamed.signals == ("base_ce", "weight")
    both = scored(TOKENIZER, source=str(write_scored(tmp_path / "second", documents=renamed)))
    columns = {"base_ce": lambda i, n: np.arange(n) / 8 + i, "weight": lambda i, n: np.full(n, i)}
    assert both.fingerprint == make_documents(**columns, reference_ce=columns["base_ce"]).fingerprint
    path = tmp_path / "second" / "data" / "part-00001.parquet"
    table = pyarrow.parquet.read_table(path)
    lists = [[0.0] * 2, [1.0] * 7]
    lists = pyarrow.array(lists, pyarrow.list_(pyarrow.float32()))
    pyarrow.parquet.write_table(table.set_column(table.column_names.index("base_ce"), "base_ce", lists), path)
    with pytest.raises(ValueError, match="its tokens and labels are not those that its record names"):
        read_part(path)
    for rename in ({"values": "base_ce"}, {"reference_ce": "weight"}):
        with pytest.raises(ValueError, match=r"rename: .* to .*, but .* has the columns reference_ce, weight"):
            scored(TOKENIZER, source=str(tmp_path / "first"), rename=rename)


def test_any_parquet_reader_reads_the_parts(folder, tmp_path):
    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / "data" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert rows.column_names == ["id", "tokens", "labels", "reference_ce"]
    assert rows[1]["tokens"] == list(range(10, 19)) and rows[1]["reference_ce"] == [1 + n / 8 for n in range(9)]


def test_the_manifest_counts_documents_tokens_targets_and_cut_ones(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    # Two prompt tokens each; d1 is cut from 9 to 8 tokens, d2 has no target.
    assert manifest["data"] == {
        "sha256": manifest["data"]["sha256"],
        "documents": 4, "tokens": 23, "targets": 3 + 6 + 0 + 5, "cut_documents": 1, "scores": 14,
    }  # fmt: skip


def flip(path, at=-200):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), r"no manifest.json: its scoring is not complete \(2 parts are"),
        (lambda f: (f / "manifest.json").write_text("{"), "is not the manifest of a scored dataset"),
        (lambda f: part_path(f, 1).unlink(), r"part-00001.parquet is missing"),
        (lambda f: flip(part_path(f, 0)), r"part-00000.parquet has changed: its SHA-256 is not"),
        (lambda f: edit(f, lambda m: m["parts"].pop()), "its parts do not make up its data hash"),
        (lambda f: edit(f, lambda m: m["parts"][0].update(documents=1)), "records other hashes or counts"),
        (lambda f: edit(f, lambda m: m["tokenizer"].update(vocab_hash="ab" * 32)), "another vocabulary .vocab_hash ab"),
    ],
)  # fmt: skip
def test_what_the_manifest_does_not_vouch_for_is_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        scored(TOKENIZER, source=str(folder))
    assert "\n" not in str(error.value)


def test_a_disk_that_has_no_room_for_what_is_read_is_no_fault_of_the_source(folder, tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with collecting(1, in_files(tmp_path / "kept", "data")), pytest.raises(OSError) as error:
            scored(TOKENIZER, source=str(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert error.value.errno == errno.EFBIG and not isinstance(error.value, UserError)
    with collecting(2, in_files(tmp_path / "kept", "data")):
        kept = scored(TOKENIZER, source=str(folder))
    assert kept.fingerprint == scored(TOKENIZER, source=str(folder)).fingerprint


def test_a_number_that_is_not_finite_is_refused_with_its_document(tmp_path):
    values = scores(make_documents())
    values[2][1] = np.nan
    with pytest.raises(ValueError, match=r"part-00001.parquet: reference_ce of document d2 must be finite"):
        scored(TOKENIZER, source=str(write_scored(tmp_path / "s", values=values)))
    with pytest.raises(ValueError, match="document d2: reference_ce of token 1 is nan"):
        require_finite(make_documents().items, values, "reference_ce")


def test_another_reference_model_is_refused(tmp_path):
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8, "intermediate_dim": 8}
    export_hf(llama_mtp(vocab_size=259, max_seq_len=8, **sizes), tmp_path / "model")
    with pytest.raises(ValueError, match=r"scored by another model \(SHA-256 0000"):
        scored(TOKENIZER, source=str(write_scored(tmp_path / "s")), checkpoint=str(tmp_path / "model"))
    random = write_scored(tmp_path / "r", checkpoint=None)
    with pytest.raises(ValueError, match=r"scored by another model \(SHA-256 none: random weights, that of"):
        scored(TOKENIZER, source=str(random), checkpoint=str(tmp_path / "model"))
    with pytest.raises(FileNotFoundError, match=r"does not exist; score it with recipes/score_reference\.py"):
        scored(TOKENIZER, source=str(tmp_path / "absent"))


def test_documents_cut_when_scored_cannot_fill_longer_rows(folder):
    documents = scored(TOKENIZER, source=str(folder))
    assert pack(documents, 8, pad_id=0).num_cut == 1
    with pytest.raises(ValueError, match=r"1 documents were cut to 8 tokens when they were scored, and seq_len is 9"):
        pack(documents, 9, pad_id=0)
    whole = Documents("whole", tuple(d for d in documents if len(d) < 9), scored_len=8)
    assert pack(whole, 32, pad_id=0).num_cut == 0


def test_parts_of_two_scorings_are_not_mixed():
    found = {"seq_len": 8, "model": {"checkpoint_sha256": "a"}}
    require_same_binding(found, found, "part")
    with pytest.raises(
        ValueError, match=r"cannot resume with model.checkpoint_sha256 a -> b since part was scored; restore it"
    ):
        require_same_binding(found, {"seq_len": 8, "model": {"checkpoint_sha256": "b"}}, "part")


# ----------------------------------------------------------------------------------------------------------------------
# Columns


def test_columns_are_packed_beside_their_tokens_and_bind_the_fingerprint():
    both = {"reference_ce": lambda i, n: np.arange(n) + 1, "values": lambda i, n: -np.arange(n) - 1.0}
    packed = pack(make_documents(**both), 12, pad_id=3)
    batch = packed.batch([0, 1], size=3)
    document = batch["document_ids"] >= 0
    values, reference_ce = (batch["signals"][name] for name in ("values", "reference_ce"))
    assert (values == -reference_ce).all() and (values[document] < 0).all() and (values[~document] == 0).all()
    subsets = ((), ("reference_ce",), ("values",), tuple(both))
    prints = {make_documents(**{name: both[name] for name in names}).fingerprint for names in subsets}
    prints.add(make_documents(values=both["reference_ce"]).fingerprint)  # the same numbers under another name
    assert len(prints) == 5


def test_a_column_that_only_some_documents_have_is_refused():
    [first, *others] = make_documents(values=lambda i, n: np.zeros(n)).items
    with pytest.raises(ValueError, match="1 of 4 documents have no values, the first is bare"):
        Documents("half", (Document(first.tokens, first.labels, "bare"), *others))


def test_token_rows_keep_both_columns(tmp_path):
    documents = make_documents(reference_ce=lambda i, n: np.ones(n) * i, values=lambda i, n: np.arange(n) / 3)
    save_tokenized(documents, tmp_path / "t.jsonl", TOKENIZER)
    assert tokenized(TOKENIZER, source=str(tmp_path / "t.jsonl")).fingerprint == documents.fingerprint


@pytest.mark.parametrize("column", ["reference_ce", "values"])
def test_scores_of_rows_go_back_to_their_documents(column):
    documents = make_documents().items  # d2 has no target: a reference has nothing to say of it, a value model has
    rows = rows_to_score(documents, column, 8, pad_id=0)
    scores = rows.tokens.numpy().astype(np.float32)  # each position scores its own token id
    for i, (document, values) in enumerate(zip(documents, column_of(documents, rows, scores), strict=True)):
        expected = np.where(np.arange(len(document)) < 8, document.tokens, 0)
        assert values.tolist() == (np.zeros(2) if column == "reference_ce" and i == 2 else expected).tolist()
    assert rows_to_score(documents[2:3], "reference_ce", 8, pad_id=0) is None
    assert column_of(documents[2:3], None, None)[0].tolist() == [0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Streams and parts


class CountingTokenizer:
    """The byte tokenizer, counting what it encodes."""

    def __init__(self):
        self.encoded = 0

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text):
        self.encoded += 1
        return TOKENIZER.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet", "array.json"])
def test_a_stream_reads_what_the_builder_reads_and_makes_only_what_is_kept(name, tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "é" * i, "id": f"r{i}"} for i in range(700)]  # parquet: three batches
    path = tmp_path / name
    text = "\n\n".join(map(json.dumps, rows)) + "\n"
    if name == "d.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name == "array.json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    tokenizer = CountingTokenizer()
    stream = prompt_completion_stream(tokenizer, source=str(path))
    assert stream.count() == (None if name == "array.json" else 700)
    some = dict(stream.read(lambda index: index % 100 == 7))
    assert [index for index, document in some.items() if document] == list(range(7, 700, 100)) and len(some) == 700
    assert tokenizer.encoded == 7
    whole = Documents(stream.name, tuple(document for _, document in stream.read()))
    assert whole.fingerprint == prompt_completion(TOKENIZER, source=str(path)).fingerprint


def test_a_stream_of_token_rows_is_the_builders(tmp_path):
    save_tokenized(make_documents(), tmp_path / "t.jsonl", TOKENIZER)
    stream = tokenized_stream(TOKENIZER, source=str(tmp_path / "t.jsonl"))
    assert Documents("", tuple(d for _, d in stream.read())).fingerprint == make_documents().fingerprint
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        tokenized_stream(TOKENIZER, source=str(tmp_path / "absent.jsonl"))


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 5))
def test_the_parts_of_all_ranks_are_the_dataset_at_any_world_size(total, size, world_size):
    [document] = make_documents([3])
    stream = DocumentStream("s", lambda: ((lambda i=i: (i, document)) for i in range(total)), lambda: total)
    parts = {}
    for rank in range(world_size):
        reader = PartReader(stream, size, lambda number, rank=rank: number % world_size == rank)
        for part in prefetch(reader):
            assert part.number % world_size == rank and part.number not in parts
            parts[part.number] = [i for i, _ in part.documents]
        assert reader.num_documents == total
    assert [parts[number] for number in sorted(parts)] == [
        list(range(total))[i : i + size] for i in range(0, total, size)
    ]


def test_reading_in_parts_holds_three_parts_at_most():
    made, peak = [], 0

    def make():
        document = Document(np.zeros(4, np.int32), np.zeros(4, np.int32), "d")
        made.append(weakref.ref(document))
        return document

    stream = DocumentStream("s", lambda: (make for _ in range(400)), lambda: 400)
    for part in prefetch(PartReader(stream, 10, lambda number: True)):
        peak = max(peak, sum(reference() is not None for reference in made))
        del part
    assert 10 <= peak <= 30 and len(made) == 400


def test_a_torn_part_is_told_from_a_whole_one(folder):
    documents, _, header = read_part(part_path(folder, 0))
    assert header["documents"] == len(documents) == 2
    part_path(folder, 0).write_bytes(part_path(folder, 0).read_bytes()[:-9])
    with pytest.raises(ValueError, match="is no complete part of a scored dataset"):
        read_part(part_path(folder, 0))
