"""The validity benchmark's table of all weightings: what it counts, and that the pages show what was measured."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.validity import docs, methods_page
from benchmarks.validity.methods import CONTROL_PAIRS, CONTROLLED, METHODS, controls, oracle
from benchmarks.validity.models import all_signals
from benchmarks.validity.side_by_side import CONFIRMED, ENDS, FULL, PAIRS, REDUCED, run, summary
from wmtp.data import Document, Documents, pack
from wmtp.models import llama_mtp
from wmtp.pretrained import byte_tokenizer
from wmtp.weighting import Signals, any_weighting, random_matched, shuffled
from wmtp.weighting.targets import valid_targets

PAGES = Path(__file__).resolve().parents[1] / "docs"


def facts():
    return json.loads((PAGES / "figures" / methods_page.FACTS).read_text())


def test_the_pages_show_the_kept_facts():
    page = (PAGES / "methods.md").read_text()
    assert methods_page.filled(page, facts()) == page
    page = (PAGES / "validity.md").read_text()
    assert docs.filled(page, "side_by_side", facts()) == page


def test_every_method_has_a_section_and_is_in_the_table_or_named_as_missing():
    page = (PAGES / "methods.md").read_text()
    assert set(facts()["methods"]) <= set(FULL.methods)
    assert facts()["settings"]["seeds"] == list(FULL.seeds)
    table = page[page.index("<!-- table -->") : page.index("## `uniform`")]
    assert all(f"`{name}`" in table for name in FULL.methods)
    for section in {method.section for method in METHODS.values()}:
        assert page.count(f"<!-- here {section} -->") == 1, section


def test_the_noise_column_has_all_that_weigh_by_what_models_say():
    """Missing are equal weights, those of the data's own columns, and what is told the noise."""
    missing = {name for name, method in METHODS.items() if method.section in ("uniform", "oracle", "wit")}
    assert set(facts()["noise"]) == {name for name, method in METHODS.items() if method.detects} - missing
    assert all(list(found) == list(methods_page.SETTINGS) for found in facts()["noise"].values())


def test_settings_name_methods_that_exist():
    named = {*REDUCED.methods, *FULL.methods, *ENDS, *(name for pair in (*CONTROL_PAIRS, *PAIRS) for name in pair)}
    assert named <= METHODS.keys()
    assert {*ENDS} <= {*REDUCED.methods}


def a_batch():
    """Four documents of random tokens, one of them of a single target, with a random column of every signal."""
    generator, tokenizer = torch.Generator().manual_seed(0), byte_tokenizer()
    tokens = np.r_[np.arange(3, 40), tokenizer.eos_id].astype(np.int32)
    documents = tuple(Document(some, some, str(i)) for i, some in enumerate((tokens, tokens[:23], tokens[-2:], tokens)))
    data = pack(Documents("four", documents), 80, pad_id=2)
    names = ("reference_ce", "reference_mass", "base_ce", "noise", "weight", "policy_ce", "policy_entropy")
    columns = {name: torch.rand(data.tokens.shape, generator=generator) for name in (*names, "policy_top20_entropy")}
    columns["noise"] = (columns["noise"] < 0.2).float()
    valid = valid_targets(data.labels.long(), 1, data.document_ids)

    def weights_of(weighting, step=0):
        named = {key: x[None] if key.startswith("policy") else x for key, x in columns.items()}
        return weighting(Signals(data.labels.long(), valid, data.document_ids.long(), named, step))

    def prepared(method):
        weighting = any_weighting(method.weighting())
        weighting.prepare(tokenizer, replace(data, signals=columns))
        return weighting

    return data, valid[0], prepared, weights_of


def test_every_weighting_weighs_a_batch():
    """Each line of the table is called as training calls it, on signals of the kinds that the measurement has."""
    _, targets, prepared, weights_of = a_batch()
    for name, method in METHODS.items():
        weights = weights_of(prepared(method))
        assert weights is None or bool(torch.isfinite(weights[targets]).all()), name
        assert (weights is None) == (method.section == "uniform" or method.data == "clean"), name


def test_two_methods_share_controls_where_they_give_a_document_the_same_weights():
    """A permutation and a draw of a document's weights depend on which token had which in nothing but their luck."""
    data, targets, prepared, weights_of = a_batch()
    document = (data.document_ids + torch.arange(len(data))[:, None] * 100)[targets]
    sizes = {}
    for name in CONTROLLED:
        weights = weights_of(prepared(METHODS[name]))[targets]
        sizes[name] = [weights[document == which].sort().values.tolist() for which in document.unique()]
        assert all(control in METHODS and METHODS[control].trains for control in controls(name))
    for one, two in itertools.combinations(CONTROLLED, 2):
        assert (sizes[one] == sizes[two]) == (CONTROLLED[one] == CONTROLLED[two]), (one, two)
    several = torch.stack([(document == which).sum() > 1 for which in document])
    for name in ("select excess", "select relative_excess"):  # every target is as likely as another to be kept
        for redraw in (shuffled, random_matched):
            control = redraw(prepared(METHODS[name]))
            kept = torch.stack([weights_of(control, step)[targets] > 0 for step in range(400)])
            share = kept.double().mean(0)[several]
            assert (share - 0.6).abs().max() < 0.12, (name, redraw)


def test_the_oracle_gives_noise_nothing_and_has_mean_one():
    labels = torch.arange(10)[None]
    noise = torch.tensor([[0.0, 1, 0, 0, 0, 1, 0, 0, 0, 0]])
    valid = valid_targets(labels, 1, None)
    weights = oracle()(Signals(labels, valid, None, {"noise": noise}))
    torch.testing.assert_close(weights[0, 1:], torch.where(noise[0, 1:] > 0, 0.0, 9 / 7))


def test_all_signals_equal_those_of_the_whole_softmax():
    torch.manual_seed(0)
    model = llama_mtp(
        vocab_size=50, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, intermediate_dim=32, max_seq_len=16,
        num_future_tokens=2, tie_word_embeddings=True,
    ).eval()  # fmt: skip
    rows = np.random.default_rng(0).integers(3, 50, (3, 9)).astype(np.int32)
    documents = tuple(Document(row, row, str(i)) for i, row in enumerate(rows))
    data = pack(Documents("three", documents), 9, pad_id=2)
    found = all_signals(model, data, batch_size=2)
    with torch.no_grad():
        p = model(data.tokens.long(), num_heads=1)[0, :, :-1].double().softmax(-1)
    own = p.gather(-1, data.tokens[:, 1:, None].long())
    top = p.topk(20).values
    top = top / top.sum(-1, keepdim=True)
    expected = {
        "policy_ce": -own.log()[..., 0],
        "policy_entropy": -(p * p.log()).sum(-1),
        "policy_top20_entropy": -(top * top.log()).sum(-1),
        "reference_mass": own[..., 0] + (p * (p < own)).sum(-1),
    }
    for name, figure in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[name])[:, 1:].double(), figure, atol=1e-5, rtol=1e-5)


def a_run(code: float, prose: float, limit: list[float]) -> dict:
    """A run on two documents of 10 and 30 targets, as `measure` gives it."""
    targets = np.array([10.0, 30.0])
    return {
        "code": np.stack([code * targets, targets], 1),
        "prose": np.stack([prose * targets, targets], 1),
        "limit": np.array(limit),
        "new_tokens": np.int64(30),
        "forwards": np.int64(20),
        "verified": np.array([20, 10, 4]),
        "accepted": np.array([10, 4, 1]),
        "cpu_seconds": np.float64(1.0),
    }


def test_the_summary_pairs_by_seed_and_document():
    uniform = [a_run(4.0 + s, 5.0, [1, 0, 1, 0]) for s in (0.0, 0.1, 0.2)]
    select = [a_run(3.9 + s, 5.2, [1, 1, 1, 0]) for s in (0.0, 0.1, 0.2)]
    runs = {"uniform": uniform, "select excess": select}
    ends = {name: select for name in ENDS} | {"uniform": uniform}
    found = summary(a_run(4.5, 4.7, [1, 1, 1, 1]), runs, ends, {"uniform": uniform, "soft excess": select})
    assert list(found["confirmed"]) == ["soft excess"]
    assert found["confirmed"]["soft excess"]["code"]["mean"] == pytest.approx((-0.1, -0.1, -0.1))
    mean, low, high = found["methods"]["select excess"]["code minus uniform"]["mean"]
    assert (mean, low, high) == pytest.approx((-0.1, -0.1, -0.1))  # seeds move both alike
    assert found["methods"]["select excess"]["prose minus uniform"]["mean"][0] == pytest.approx(0.2)
    assert found["methods"]["uniform"]["accept length"][0] == 1.5
    assert found["ends"]["shares"]["uniform"][0] == 0.5
    assert found["ends"]["gaps"]["select excess minus uniform"]["mean"][0] == 0.25
    runs["shuffled(select excess)"] = uniform[:2]  # a control of fewer seeds is compared over these
    pairs = summary(a_run(4.5, 4.7, [1, 1, 1, 1]), runs, ends, {})["pairs"]
    pair = pairs["select excess minus shuffled(select excess)"]
    assert pair["seeds"] == 2 and pair["code"]["mean"][0] == pytest.approx(-0.1)


@pytest.mark.long
def test_the_measurement_runs_and_goes_on_where_it_was_stopped(tmp_path):
    """Two methods, two seeds, one step, on a base that is pretrained for one: every part runs, and nothing twice."""
    sys.path.insert(0, str(PAGES.parent / "benchmarks"))
    from study import make_data

    folder = tmp_path / "study-0" / "data"
    folder.mkdir(parents=True)
    texts = [(f"t{i}", "def add(first, second):\n    return first + second\n" * 9) for i in range(40)]
    tokenizer = make_data.train_tokenizer([text for _, text in texts], folder / "tokenizer")
    pieces = list(make_data.pieces(tokenizer, texts, 10**6))
    for name in ("pretrain.jsonl.gz", "prose_heldout.jsonl", "train_clean.jsonl"):
        make_data.write(folder / name, pieces, tokenizer)
    noisy = [make_data.mixed_quality(piece, len(tokenizer.vocab())) for piece in pieces]
    make_data.write(folder / "train.jsonl", noisy, tokenizer)

    tiny = replace(
        REDUCED, methods=(*ENDS, "oracle"), base_tokens=0, base_steps=1, reference_steps=1, steps=1, held_out=8,
        prompts=2, max_new_tokens=2,
    )  # fmt: skip
    first = run(tiny, tmp_path)
    assert first["methods"]["oracle"]["auc"][0][0] == 1.0
    assert first["methods"]["uniform"]["code"][0] == pytest.approx(np.log(len(tokenizer.vocab())), rel=0.1)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    again = run(replace(tiny, methods=(*tiny.methods, "dft"), fresh_seeds=(0, 1)), tmp_path)
    assert list(again["confirmed"]) == list(CONFIRMED)
    assert again["methods"]["oracle"]["code"] == first["methods"]["oracle"]["code"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    next(tmp_path.rglob("oracle-1.npz")).unlink()
    kept = run(tiny, tmp_path, finished=True)
    assert set(kept["methods"]) == {*ENDS} and not list(tmp_path.rglob("oracle-1.npz"))
    assert kept["settings"] != first["settings"]  # so that the measurement still goes on
