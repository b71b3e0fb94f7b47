"""Your own data: text rows and token rows, and an error for each way a file can be wrong, with its line."""

import gzip
import json

import numpy as np
import pytest

from wmtp.data import prompt_completion, read_rows, save_tokenized, tokenized
from wmtp.pretrained import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id


def write(path, *lines) -> str:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def test_a_row_becomes_prompt_completion_eos_as_it_stands(tmp_path):
    source = write(
        tmp_path / "d.jsonl", {"prompt": " a\n", "completion": "  b"}, "", {"prompt": "", "completion": "c", "id": "x"}
    )
    first, second = prompt_completion(TOKENIZER, source=source)
    assert first.tokens.tolist() == [*b" a\n", *b"  b", EOS]
    assert first.labels.tolist() == [-100] * 3 + [*b"  b", EOS]
    assert (first.id, second.id) == (f"{source}:1", "x")
    assert second.labels.tolist() == second.tokens.tolist() == [*b"c", EOS]


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.json.gz", "array.json", "d.parquet"])
def test_every_file_kind_gives_the_same_documents(name, tmp_path):
    rows = [{"question": f"q{i}", "answer": "é\n" * i} for i in range(5)]
    path = tmp_path / name
    if name == "array.json":
        path.write_text("\n  " + json.dumps(rows, indent=1))
    elif name == "d.parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write(path, *rows)
    options = {"prompt_column": "question", "completion_column": "answer"}
    expected = [[*f"q{i}".encode(), *("é\n" * i).encode(), EOS] for i in range(5)]
    documents = prompt_completion(TOKENIZER, source=str(path), **options)
    assert [d.tokens.tolist() for d in documents] == expected
    split = path.name.split(".")[0]
    from_folder = prompt_completion(TOKENIZER, source=str(tmp_path), split=split, **options)
    assert from_folder.fingerprint == documents.fingerprint


def test_reference_ce_comes_along_and_binds_the_fingerprint(tmp_path):
    plain = {"prompt": "a", "completion": "b"}
    scored = prompt_completion(TOKENIZER, source=write(tmp_path / "s.jsonl", {**plain, "reference_ce": [0, 1.5, 2]}))
    assert scored[0].signals["reference_ce"].tolist() == [0, 1.5, 2]
    assert scored[0].signals["reference_ce"].dtype == np.float32
    prints = {scored.fingerprint}
    for name, row in {"p": plain, "q": {**plain, "reference_ce": [0, 1.5, 2.5]}}.items():
        prints.add(prompt_completion(TOKENIZER, source=write(tmp_path / f"{name}.jsonl", row)).fingerprint)
    assert len(prints) == 3


def test_saved_documents_come_back_bit_for_bit(tmp_path):
    rows = [{"prompt": "a" * i, "completion": "b", "id": f"r{i}", "reference_ce": [0.1] * (i + 2)} for i in range(4)]
    documents = prompt_completion(TOKENIZER, source=write(tmp_path / "d.jsonl", *rows))
    for name in ("t.jsonl", "sub/t.jsonl.gz"):
        save_tokenized(documents, tmp_path / name, TOKENIZER)
        again = tokenized(TOKENIZER, source=str(tmp_path / name))
        assert again.fingerprint == documents.fingerprint
        assert [d.id for d in again] == [d.id for d in documents]
        assert not list(tmp_path.rglob("*.tmp"))


def test_token_rows_need_no_labels(tmp_path):
    [document] = tokenized(TOKENIZER, source=write(tmp_path / "t.jsonl", {"tokens": [1, 2, 258]}))
    assert document.labels.tolist() == [1, 2, 258]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "malformed JSON: "),
        ("[1]", "a row must be a JSON object, got list"),
        ({"completion": "b"}, "field 'prompt' is missing; the row has completion"),
        ({}, "field 'prompt' is missing; the row has no fields"),
        ({"prompt": "a", "completion": None}, "field 'completion' is null; give it a value"),
        ({"prompt": "a", "completion": 3}, "field 'completion' must be a string, got int 3"),
        (
            {"prompt": "a", "completion": "b", "reference_ce": [1.0]},
            r"reference_ce has 1 values, the document has 3 tokens \(prompt, completion and EOS\)",
        ),
        ({"prompt": "a", "completion": "b", "reference_ce": 1}, "reference_ce must be a list of numbers, got int"),
        (
            {"prompt": "a", "completion": "b", "reference_ce": [0.0, float("nan"), 1.0]},
            r"reference_ce\[1\] must be a finite number, got nan",
        ),
        (
            {"prompt": "a", "completion": "b", "reference_ce": [0.0, 1.0, "2"]},
            r"reference_ce\[2\] must be a finite number, got '2'",
        ),
    ],
)
def test_a_wrong_text_row_is_named_by_file_and_line(line, message, tmp_path):
    good = [{"prompt": "a", "completion": "b"}] * 16
    source = write(tmp_path / "file.jsonl", *good, line)
    with pytest.raises(ValueError, match=rf"file\.jsonl:17: {message}") as error:
        prompt_completion(TOKENIZER, source=source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [1]}, "field 'tokens' is missing; the row has labels"),
        ({"tokens": []}, "field 'tokens' is empty"),
        ({"tokens": [1, 259]}, r"tokens\[1\] must be a whole number in \[0, 259\), got 259"),
        ({"tokens": [-1]}, r"tokens\[0\] must be a whole number in \[0, 259\), got -1"),
        ({"tokens": [1.0]}, r"tokens\[0\] must be a whole number in \[0, 259\), got 1.0"),
        ({"tokens": [1, 2], "labels": [1]}, "labels has 1 values, tokens has 2"),
        (
            {"tokens": [1, 2], "labels": [2, -100]},
            r"labels\[0\] must be -100 or tokens\[0\] = 1, got 2 \(labels are unsh",
        ),
        ({"tokens": [1, 2], "reference_ce": [0.5]}, "reference_ce has 1 values, the document has 2 tokens"),
        ({"tokens": [1], "vocab_hash": "0" * 64}, "tokenized with another vocabulary .*0000.*; use the tokenizer"),
    ],
)
def test_a_wrong_token_row_is_named_by_file_and_line(row, message, tmp_path):
    source = write(tmp_path / "t.jsonl", {"tokens": [1]}, row)
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: {message}"):
        tokenized(TOKENIZER, source=source)


def test_half_scored_data_is_refused(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "reference_ce": [0, 1, 1]},
        {"prompt": "a", "completion": "b", "id": "bare"},
    ]
    with pytest.raises(ValueError, match="1 of 2 documents have no reference_ce, the first is bare; score all"):
        prompt_completion(TOKENIZER, source=write(tmp_path / "d.jsonl", *rows))


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_an_empty_file_is_one_clear_line(text, tmp_path):
    (tmp_path / "d.json").write_text(text)
    for builder in (prompt_completion, tokenized):
        with pytest.raises(ValueError, match=r"d\.json: the dataset is empty$"):
            builder(TOKENIZER, source=str(tmp_path / "d.json"))


def test_malformed_arrays_and_torn_archives_are_named(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"prompt": "a"},\n{"prompt": }\n]')
    with pytest.raises(ValueError, match=r"a\.json:3: malformed JSON: Expecting value at column 12"):
        list(read_rows(tmp_path / "a.json"))
    source = write(tmp_path / "d.jsonl.gz", *[{"prompt": str(i), "completion": "b"} for i in range(999)])
    whole = (tmp_path / "d.jsonl.gz").read_bytes()
    (tmp_path / "d.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz: not readable as gzipped UTF-8 text"):
        prompt_completion(TOKENIZER, source=source)
    (tmp_path / "l.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"l\.jsonl: not readable as UTF-8 text: 'utf-8' codec can't decode byte 0xe9"):
        prompt_completion(TOKENIZER, source=str(tmp_path / "l.jsonl"))


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data/absent\.jsonl does not exist; give a file, a folder, or a hub name"
    ):
        read_rows("data/absent.jsonl")
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=r"for split 'test'; it holds train.jsonl"):
        read_rows(tmp_path, "test")
    with pytest.raises(ValueError, match="is a folder; set split"):
        read_rows(tmp_path)
    (tmp_path / "train.json").touch()
    with pytest.raises(ValueError, match=r"holds train.json and train.jsonl; set source to one"):
        read_rows(tmp_path, "train")
