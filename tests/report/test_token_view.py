"""The page of token weights: its text is the code, every token has its numbers, and it needs nothing from outside."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from wmtp.data import pack
from wmtp.data.documents import Document, Documents, document_from_text
from wmtp.pretrained import byte_tokenizer
from wmtp.pretrained.tokenizer import Tokenizer as WmtpTokenizer
from wmtp.report import TokenView, token_pieces, token_weights_html
from wmtp.report.token_views import token_views

TOKENIZER = byte_tokenizer()
NONE = "\N{EN DASH}"
CODE = 'def f(a, b):\n\tif a < b and b > 0:\n        return "<b>&amp;\'</b>"\n\n    return {"é": \'日\'}\n'


class Page(HTMLParser):
    """What a reader sees: per document its columns of (classes, text), and the table's rows of cells."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.documents, self.attributes, self.tags, self.texts = [], [], set(), {}
        self.open = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.attributes += [(tag, key, value) for key, value in attrs.items()]
        if tag == "section":
            self.documents.append({"columns": [], "rows": []})
        elif tag == "article":
            self.documents[-1]["columns"].append({"name": "", "statistics": "", "tokens": []})
        elif tag == "b" and "pre" in self.open:
            self.documents[-1]["columns"][-1]["tokens"].append([attrs["class"].split(), ""])
        elif tag == "tr" and "class" in attrs:
            self.documents[-1]["rows"].append([attrs["class"]])
        elif tag == "td":
            self.documents[-1]["rows"][-1].append("")
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "pre" in self.open:
            self.documents[-1]["columns"][-1]["tokens"][-1][1] += data
        elif "article" in self.open:
            key = "name" if "h3" in self.open else "statistics"
            self.documents[-1]["columns"][-1][key] += data.strip()
        elif "td" in self.open[-1:]:
            self.documents[-1]["rows"][-1][-1] += data.rstrip("\n")
        elif self.open:
            self.texts[self.open[-1]] = self.texts.get(self.open[-1], "") + data


def view(pieces, weights, *, is_target=None, signals=None, id="d", special_ids=frozenset()):
    is_target = [True] * len(pieces) if is_target is None else is_target
    return TokenView(id, pieces, list(range(len(pieces))), is_target, weights, signals or {}, special_ids)


def batch_of(*documents, seq_len=64, **options):
    packed = pack(Documents("some", tuple(documents)), seq_len, pad_id=TOKENIZER.pad_id, **options)
    return packed.batch(list(range(len(packed)))), [packed.row_ids(row) for row in range(len(packed))]


def test_each_column_is_the_code_exactly_and_each_token_has_its_numbers():
    document = document_from_text(TOKENIZER, "# a < b\n", CODE, "some/file.py::f")
    batch, ids = batch_of(document, seq_len=256)
    shape = batch["tokens"].shape
    weights = {"rho1": torch.rand(shape) * 3, "uniform": None}
    signals = {"CE": torch.rand(shape), "reference CE": torch.rand(shape), "value": torch.rand(shape)}
    (page,) = Page(token_weights_html(token_views(TOKENIZER, batch, weights, signals, ids=ids), title="t")).documents
    assert [column["name"] for column in page["columns"]] == ["rho1", "uniform"]
    for column in page["columns"]:
        assert "".join(text for _, text in column["tokens"]) == "# a < b\n" + CODE + "<eos>"
        assert [classes[0] for classes, _ in column["tokens"]] == [f"t{i}" for i in range(len(document))]
    assert len(page["rows"]) == len(document)
    prompt = len(document.prompt)
    for i, (name, position, token, _, *figures) in enumerate(page["rows"]):
        assert (name, position, token) == (f"t{i}", str(i), str(document.tokens[i]))
        expected = [weights["rho1"][0, i], 1.0, signals["CE"][0, i], signals["reference CE"][0, i]]
        if i < prompt:
            assert figures[:4] == [NONE] * 4
        else:
            assert [float(figure) for figure in figures[:4]] == pytest.approx([float(x) for x in expected], rel=1e-3)
        assert float(figures[4]) == pytest.approx(float(signals["value"][0, i]), rel=1e-3)


def test_every_special_token_of_the_tokenizer_is_shown_as_one():
    hf = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3}, [])),
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokens = np.array([3, 0, 2], np.int32)
    batch, ids = batch_of(Document(tokens, tokens, "chat"), seq_len=4)
    (seen,) = token_views(WmtpTokenizer(hf), batch, {"m": None}, ids=ids)
    assert seen.special_ids == {1, 2, 3}


REORDERING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
SEEN = st.characters(exclude_categories=("Cc", "Cs"), exclude_characters=REORDERING) | st.sampled_from("\n\r\t<>&\"'")


@settings(max_examples=100, deadline=None)
@given(st.text(SEEN, min_size=1))
def test_any_text_is_on_the_page_as_it_is(text):
    tokens = TOKENIZER.encode(text)
    shown = view(token_pieces(TOKENIZER, tokens), {"m": [1.0] * len(tokens)})
    page = token_weights_html([shown], title=text, settings={text: text})
    (document,) = Page(page).documents
    assert "".join(text for _, text in document["columns"][0]["tokens"]) == text
    page.encode()


def test_what_a_page_cannot_hold_or_show_in_place_is_escaped():
    pieces = ["a\x00", "\x1b[0m", "\ud800", "\u202e)", "\x85"]
    (document,) = Page(token_weights_html([view(pieces, {"m": [1.0] * 5})], title="t")).documents
    texts = [text for _, text in document["columns"][0]["tokens"]]
    assert texts == ["a\\x00", "\\x1b[0m", "\\ud800", "\\u202e)", "\\x85"]


def test_names_and_settings_are_escaped():
    evil = "<script>alert('x')</script> & \"more\""
    shown = view(["a"], {evil: [1.0]}, signals={evil: [0.5]}, id=evil)
    page = Page(token_weights_html([shown], title=evil, settings={evil: evil}))
    assert "script" not in page.tags
    assert page.texts["title"].strip() == page.texts["h1"] == page.texts["h2"] == page.texts["dd"] == evil
    assert page.documents[0]["columns"][0]["name"] == evil


def test_the_colour_tells_the_weight_and_only_targets_have_one():
    weights = [0.0, 0.1, 0.25, 0.5, 1.0, 1 / 0.6, 2.0, 5.0, 1.0]
    is_target = [True] * 8 + [False]
    html = token_weights_html(
        [view([*"abcdefghi"], {"m": weights, "n": weights[::-1]}, is_target=is_target)], title="t"
    )
    first, second = Page(html).documents[0]["columns"]
    shades = [classes[1:] for classes, _ in first["tokens"]]
    assert shades == [[f"w{n}"] for n in range(8)] + [[]]
    assert [classes[1:] for classes, _ in second["tokens"]][1] == ["w7"]
    colours = re.findall(r"^\.(w\d) \{ background: rgba\(var\(--(low|high)\), ([\d.]+)\)", html, re.M)
    assert [(name, side) for name, side, _ in colours] == [
        (f"w{n}", "low" if n < 4 else "high") for n in (0, 1, 2, 3, 5, 6, 7)
    ]
    opacity = [float(o) for *_, o in colours]
    assert opacity[:4] == sorted(opacity[:4], reverse=True) and opacity[4:] == sorted(opacity[4:])


def test_each_method_can_be_hidden_and_pointing_at_a_token_marks_it_everywhere():
    page = token_weights_html([view(["a", "b"], {"m": [1.0, 1.0], "n": [0.0, 2.0]})], title="t")
    ids = [value for tag, key, value in Page(page).attributes if (tag, key) == ("input", "id")]
    assert ids == ["m0", "m1", "numbers"]
    columns = [value for tag, key, value in Page(page).attributes if (tag, key) == ("article", "class")]
    assert columns == ["m0", "m1"]
    for name in columns:
        assert f"#{name}:not(:checked) ~ main .{name} {{ display: none; }}" in page
    for i in range(2):
        assert f"section:has(.t{i}:hover) pre .t{i}" in page and f"section:has(.t{i}:hover) tr.t{i}" in page


def test_each_method_has_its_statistics_over_the_targets_alone():
    weights = [99.0, 0.0, 0.0, 5 / 3, 5 / 3, 5 / 3]
    shown = view([*"abcdef"], {"select": weights, "plain": [1.0] * 6}, is_target=[False] + [True] * 5)
    select, plain = Page(token_weights_html([shown], title="t")).documents[0]["columns"]
    assert select["statistics"] == "kept 60%, max 1.67, effective sample size 60%"
    assert plain["statistics"] == "kept 100%, max 1, effective sample size 100%"
    nothing = view(["a"], {"m": [math.nan]}, is_target=[False])
    assert Page(token_weights_html([nothing], title="t")).documents[0]["columns"][0]["statistics"] == "no target"


def test_the_page_asks_for_nothing_from_outside_and_runs_no_script():
    page = token_weights_html([view(["a"], {"m": [1.0]})], title="t")
    assert not re.search(r"https?:|//|src=|href=|@import|url\(|<script|<link|<iframe", page)


def test_twenty_documents_of_three_hundred_tokens_and_four_methods_stay_under_two_megabytes():
    rng = np.random.default_rng(0)
    weights = {f"method {n}": rng.exponential(size=300) for n in range(4)}
    signals = {name: rng.exponential(size=300) for name in ("CE", "reference CE", "value", "entropy")}
    documents = [view([" name"] * 300, weights, signals=signals, id=f"file.py::{n}") for n in range(20)]
    assert len(token_weights_html(documents, title="t").encode()) < 2_000_000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 258) | st.sampled_from(list("aé€😀".encode())), max_size=40))
def test_pieces_join_to_the_text_whatever_the_bytes(tokens):
    pieces = token_pieces(TOKENIZER, tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == TOKENIZER.decode(tokens)


def test_pieces_join_where_one_bad_byte_spoils_a_long_run_of_bytes():
    """Llama's vocabulary spells unknown characters in bytes, and a run of these is decoded as a whole or not at all."""
    backend = Tokenizer(models.BPE(vocab={f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for tokens in ([256, *"éé".encode(), 256], [256, *("é" * 12).encode(), 0xFF, 256, *"é".encode()]):
        pieces = token_pieces(backend, tokens)
        assert len(pieces) == len(tokens) and "".join(pieces) == backend.decode(tokens)
    assert pieces[-3:] == ["a", "", "é"]


def test_a_character_cut_by_tokens_belongs_to_the_one_that_completes_it():
    assert token_pieces(TOKENIZER, TOKENIZER.encode("aé€😀\ufffdb")) == [
        "a", "", "é", "", "", "€", "", "", "", "😀", "", "", "\ufffd", "b",
    ]  # fmt: skip
    tokens = TOKENIZER.encode("é")
    (document,) = Page(token_weights_html([view(["", "é"], {"m": [1.0, 3.0]})], title="t")).documents
    assert document["columns"][0]["tokens"] == [[["t0", "w4"], ""], [["t1", "w6"], "é"]]
    assert len(tokens) == 2


def test_packed_rows_are_taken_apart_again():
    documents = [document_from_text(TOKENIZER, f"{n}:", "x" * n, f"file.py::{n}") for n in (3, 9, 20, 40)]
    batch, ids = batch_of(*documents, seq_len=48)
    assert batch["tokens"].shape[0] < len(documents)
    weights = torch.arange(batch["tokens"].numel()).view(batch["tokens"].shape) / 7
    views = token_views(TOKENIZER, batch, {"m": weights, "heads": torch.stack([weights, 2 * weights])}, ids=ids)
    assert sorted(v.id for v in views) == sorted(document.id for document in documents)
    by_id = {document.id: document for document in documents}
    for v in views:
        document = by_id[v.id]
        assert list(v.tokens) == document.tokens.tolist()
        assert "".join(v.pieces) == TOKENIZER.decode(document.tokens)
        assert list(v.is_target) == (document.labels != -100).tolist()
        where = (batch["tokens"].unfold(1, len(document), 1) == torch.from_numpy(document.tokens)).all(-1).nonzero()[0]
        expected = weights[where[0], where[1] : where[1] + len(document)]
        assert v.weights["m"] == pytest.approx(expected.numpy())
        assert v.weights["heads, head 2"] == pytest.approx(2 * expected.numpy())
    assert [v.id for v in token_views(TOKENIZER, batch, {"m": weights}, ids=ids, limit=2)] == [v.id for v in views[:2]]


def test_a_first_token_is_no_target_since_nothing_predicts_it():
    tokens = np.array(TOKENIZER.encode("abc"), dtype=np.int32)
    batch, ids = batch_of(Document(tokens, tokens.copy(), "d"), seq_len=8)
    (shown,) = token_views(TOKENIZER, batch, {"m": None}, {"CE": torch.ones(1, 8)}, ids=ids)
    assert list(shown.is_target) == [False, True, True]
    assert np.isnan(shown.signals["CE"]).tolist() == [True, False, False]
    assert list(shown.weights["m"]) == [1, 1, 1]


def test_special_tokens_are_marked_but_their_names_in_the_code_are_not():
    batch, ids = batch_of(document_from_text(TOKENIZER, "p", "<eos>", "d"), seq_len=16)
    page = token_weights_html(token_views(TOKENIZER, batch, {"m": None}, ids=ids), title="t")
    tokens = Page(page).documents[0]["columns"][0]["tokens"]
    assert [(text, "z" in classes) for classes, text in tokens] == [*((c, False) for c in "p<eos>"), ("<eos>", True)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {}}, r"document d: weights is empty"),
        ({"weights": {"m": [1.0]}}, r"document d: weights\['m'\] has shape \(1,\) for 2 pieces"),
        ({"signals": {"CE": [[1.0, 2.0]]}}, r"document d: signals\['CE'\] has shape \(1, 2\) for 2 pieces"),
        ({"tokens": [1, 2, 3]}, r"document d: tokens has shape \(3,\) for 2 pieces"),
        ({"weights": {"m": [1.0, math.nan]}}, r"document d: weights\['m'\] is nan at target token 1"),
        ({"weights": {"m": [-0.5, 1.0]}}, r"document d: weights\['m'\] is -0.5 at target token 0"),
    ],
)
def test_a_view_that_does_not_fit_together_is_refused(change, message):
    fields = {
        "id": "d",
        "pieces": ["a", "b"],
        "tokens": [1, 2],
        "is_target": [True, True],
        "weights": {"m": [1.0, 1.0]},
    }
    TokenView(**fields)
    with pytest.raises(ValueError, match=message):
        TokenView(**fields | change)


def test_a_page_or_batch_that_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="got no documents"):
        token_weights_html([], title="t")
    with pytest.raises(ValueError, match=r"document e has weights \['n'\], the first document d has \['m'\]"):
        token_weights_html([view(["a"], {"m": [1.0]}), view(["a"], {"n": [1.0]}, id="e")], title="t")
    batch, ids = batch_of(document_from_text(TOKENIZER, "p", "code", "d"), seq_len=8)
    with pytest.raises(ValueError, match=r"weights\['m'\] must be \[B, S\] = \(1, 8\) like the tokens, got \(1, 7\)"):
        token_views(TOKENIZER, batch, {"m": torch.ones(1, 7)}, ids=ids)
    with pytest.raises(ValueError, match="row 0 holds 1 documents, ids names 2"):
        token_views(TOKENIZER, batch, {"m": None}, ids=[("d", "e")])
    assert len(token_views(TOKENIZER, batch, {"m": None}, ids=ids)) == 1
