"""Attention of packed rows on a CPU, a document at a time: what the dense mask gives, for every layout of documents."""

import pytest
import torch
from family_parity import case_of
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.models import checkpoint_activations, masks
from wmtp.models.masks import Documents, dense_mask, document_mask
from wmtp.numerics.documents import positions_in_documents

SEQ = 32
MODELS = ("Llama 2, CodeLlama", "Mistral, with its window", "Gemma 3, text")  # no window, windows of 8, some of both


@pytest.fixture(scope="module", autouse=True)
def however_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_WORTH_A_CALL", -1)
        yield


@st.composite
def layouts(draw):
    """Draws document ids [B, S]: of any lengths, one, many, or padding at the end."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        edges = sorted(draw(st.sets(st.integers(1, SEQ - 1), max_size=6)))
        lengths = [b - a for a, b in zip([0, *edges], [*edges, SEQ], strict=True)]
        names = list(range(7, 7 + len(lengths)))
        names[-1] = draw(st.sampled_from((-1, names[-1])))
        rows.append(torch.repeat_interleave(torch.tensor(names), torch.tensor(lengths)))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def models():
    return {name: case_of(name).model(2) for name in MODELS}


def gradients(model, tokens, valid, **inputs):
    hidden = model.hidden_states(tokens, **inputs)
    assert torch.isfinite(hidden).all()
    hidden = hidden[:, valid]  # what padding gives is no matter
    scale = torch.linspace(-1, 1, hidden[0].numel()).view_as(hidden[0])
    return hidden, torch.autograd.grad((hidden * scale).sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=15)
@given(ids=layouts())
def test_documents_are_the_dense_mask(models, name, ids):
    model, tokens = models[name], torch.arange(ids.numel()).view(ids.shape) * 31 % 97
    valid = ids >= 0
    found, slopes = gradients(model, tokens, valid, document_ids=ids)
    positions = positions_in_documents(ids)
    expected, true_slopes = gradients(model, tokens, valid, mask=dense_mask(ids), input_pos=positions)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    pairs = [(a, b) for a, b in zip(slopes, true_slopes, strict=True) if b is not None]
    largest = max(b.norm() for _, b in pairs)
    assert all((a - b).norm() <= 1e-5 * largest for a, b in pairs)


IDS = torch.tensor([[3] * 5 + [4] + [9] * 20 + [-1] * 6, [0] * SEQ, [1] * 16 + [2] * 16])
TOKENS = torch.arange(3 * SEQ).view(3, SEQ) * 31 % 97


def test_what_is_attended_to_alone():
    assert document_mask(IDS, width=32).lengths == [[5, 1, 20, 6], [SEQ], [16, 16]]


def test_many_small_documents_have_a_dense_mask(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(masks, "_WORTH_A_CALL", 2**20)
    halves = (torch.arange(512) >= 256).long().expand(2, 512)
    assert isinstance(document_mask(halves, width=576), Documents)
    tokens = torch.arange(512).expand(2, 512)
    assert torch.equal(document_mask(tokens, width=576), dense_mask(tokens))


def test_recomputation_changes_no_gradient():
    expected = None
    for how in (None, 1, 2, "selective"):
        torch.manual_seed(0)
        model = case_of(MODELS[2]).model(2)
        if how is not None:
            checkpoint_activations(model, how)
        found = gradients(model, TOKENS, IDS >= 0, document_ids=IDS)[1]
        expected = expected or found
        assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True)), how
