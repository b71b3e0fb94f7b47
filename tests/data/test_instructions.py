"""Rows of instructions: Alpaca's prompts word for word, any template, and plain texts whole, in pieces and joined."""

import json

import numpy as np
import pytest

from wmtp.data import instruct, instruct_stream, pack, text, text_stream
from wmtp.data.document_files import in_files as stored_in
from wmtp.data.documents import collecting
from wmtp.pretrained import byte_tokenizer
from wmtp.pretrained.tokenizer import Tokenizer

BYTES = byte_tokenizer()
WITH_BOS = Tokenizer(BYTES.hf, name="bytes")
WITH_BOS._start = [256]
EOS, BOS = 257, 256


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def halves(document):
    prompt = bytes(document.tokens[document.labels == -100].tolist()).decode()
    *learnt, end = document.labels[document.labels != -100].tolist()
    assert end == EOS
    return prompt, bytes(learnt).decode()


def test_alpaca_s_columns_make_its_two_prompts(tmp_path):
    source = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add {them}.", "input": "1 2", "output": "3", "id": 7},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
        {"instruction": "Say ho.", "output": "Ho", "topic": "x"},
    )
    documents = instruct(BYTES, source=source)
    first, second, third = map(halves, documents)
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {them}.\n\n### Input:\n1 2\n\n"
        "### Response:\n",
        "3",
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:\n",
        "Hi",
    )
    assert third[1] == "Ho"
    assert documents[0].id == "7" and documents.unread == ("topic",)
    streamed = [document.tokens.tolist() for _, document in instruct_stream(BYTES, source=source).read()]
    assert streamed == [document.tokens.tolist() for document in documents]


def test_a_template_of_one_s_own_names_any_columns(tmp_path):
    row = {"question": "Why?", "hint": "é", "answer": "So.", "weights": [{"start": 0, "end": 2, "weight": 3}]}
    source = write(tmp_path / "q.jsonl", row)
    options = {"template": "{{Q}} {question} ({hint})\nA: ", "completion_column": "answer"}
    [document] = instruct(BYTES, source=source, **options)
    assert halves(document) == ("{Q} Why? (é)\nA: ", "So.")
    assert document.signals["weight"][document.labels != -100].tolist() == [3, 3, 1, 1]
    [counted] = instruct(BYTES, source=source, prompt_weight=0.5, **options)
    assert counted.signals["weight"].tolist() == [1] + [0.5] * (len(document.prompt) - 1) + [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"template": "Q: {question"}, {}, "template 'Q: {question' is malformed: .*; braces are {{ and }}"),
        ({"template": "Q: {question!r}"}, {}, r"a column is written {column}, got {question!r}"),
        ({"template": "Q: {}"}, {}, "a column is written {column}, got {}"),
        ({"template": "Q: "}, {}, "template must name a column as {column}, got 'Q: '"),
        (
            {"template": "{qestion}"},
            {},
            r"i\.jsonl:1: the template names the column 'qestion'; did you mean 'question'",
        ),
        ({"template": "{hint}"}, {"hint": 3}, r"i\.jsonl:1: field 'hint' must be a string, got int 3"),
        ({}, {}, r"i\.jsonl:1: the template names the column 'instruction'; "),
        ({}, {"instruction": "a", "imput": "b"}, "nobody reads the column 'imput'; did you mean 'input'"),
        ({"completion_column": "ouput"}, {"instruction": "a"}, "field 'ouput' is missing"),
    ],
)
def test_what_is_wrong_with_a_template_or_row_is_one_line(options, row, message, tmp_path):
    source = write(tmp_path / "i.jsonl", {"question": "q", "output": "o"} | row)
    with pytest.raises(ValueError, match=message) as error:
        instruct(BYTES, source=source, **options)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Plain texts


def test_every_token_of_a_text_is_a_target_but_bos(tmp_path):
    source = write(tmp_path / "t.jsonl", {"text": "abc", "id": "x"})
    [document] = text(WITH_BOS, source=source)
    assert document.tokens.tolist() == [BOS, *b"abc", EOS]
    assert document.labels.tolist() == [-100, *b"abc", EOS]
    [plain] = text(BYTES, source=source)
    assert plain.labels.tolist() == plain.tokens.tolist() == [*b"abc", EOS]
    assert pack(text(BYTES, source=source), 8, pad_id=258).num_targets == 3  # nothing predicts the first token
    [(_, streamed)] = text_stream(WITH_BOS, source=source).read()
    assert streamed.labels.tolist() == document.labels.tolist()


TEXTS = [{"text": "a" * 7, "id": "a"}, {"text": "b", "weight": 2}, {"text": "c" * 12, "id": "c"}]


@pytest.mark.parametrize("in_files", [False, True])
def test_pieces_are_all_of_a_text_and_stop_at_its_edges(in_files, tmp_path):
    source = write(tmp_path / "t.jsonl", *TEXTS)
    with collecting(1, stored_in(tmp_path / "kept", "data") if in_files else None):
        documents = text(WITH_BOS, source=source, piece_len=5)
    assert [len(d) for d in documents] == [5, 4, 3, 5, 5, 4]
    assert [d.id for d in documents] == [
        "a", "a, from token 5", f"{source}:2", "c", "c, from token 5", "c, from token 10",
    ]  # fmt: skip
    whole = text(WITH_BOS, source=source)
    for part in ("tokens", "labels"):
        cut, uncut = (np.concatenate([getattr(d, part) for d in docs]) for docs in (documents, whole))
        assert (cut == uncut).all()
    assert documents[2].signals["weight"].tolist() == [2, 2, 2] and documents[3].signals["weight"].tolist() == [1] * 5


@pytest.mark.parametrize("in_files", [False, True])
def test_joined_texts_fill_every_row_but_the_last(in_files, tmp_path):
    source = write(tmp_path / "t.jsonl", *TEXTS)
    with collecting(1, stored_in(tmp_path / "kept", "data") if in_files else None):
        documents = text(WITH_BOS, source=source, piece_len=10, joined=True)
    flat = [BOS, *b"a" * 7, EOS, BOS, *b"b", EOS, BOS, *b"c" * 12, EOS]
    assert [len(d) for d in documents] == [10, 10, 6]
    assert np.concatenate([d.tokens for d in documents]).tolist() == flat
    labels = np.concatenate([d.labels for d in documents])
    assert ((labels == -100) == (np.array(flat) == BOS)).all()
    assert [d.id for d in documents] == ["a", f"{source}:2, from token 1", "c, from token 8"]
    assert np.concatenate([d.signals["weight"] for d in documents]).tolist() == [1] * 9 + [2] * 3 + [1] * 14
    packed = pack(documents, 10, pad_id=258)
    assert len(packed) == 3 and packed.document_ids[0].tolist() == [0] * 10


def test_joined_texts_need_the_length_of_a_row(tmp_path):
    source = write(tmp_path / "t.jsonl", *TEXTS)
    with pytest.raises(ValueError, match=r"joined needs piece_len, .* set it to \$\{seq_len\}"):
        text(BYTES, source=source, joined=True)
    with pytest.raises(ValueError, match="piece_len must be >= 2, got 1"):
        text(BYTES, source=source, piece_len=1)
    scored = [row | {"reference_ce": [0.5] * (len(row["text"]) + 1)} for row in TEXTS]
    assert text(BYTES, source=write(tmp_path / "s.jsonl", *scored), piece_len=4).signals == ("reference_ce", "weight")
    with pytest.raises(ValueError, match="1 of 3 documents have no reference_ce"):
        text(BYTES, source=write(tmp_path / "s.jsonl", *scored[:2], TEXTS[2]), piece_len=4)
