"""What a frozen reference says of each target, against plain float64 on full logits."""

import pytest
import torch
import torch.nn.functional as F
from counted import Counted

from wmtp.loss import ReferenceReading, SoftTargets, token_cross_entropy, top_tokens
from wmtp.weighting.targets import Targets, valid_targets

B, S, D, V = 3, 11, 6, 40
generator = torch.Generator().manual_seed(0)
HIDDEN, UNEMBEDDING = torch.randn(2, B, S, D, generator=generator), torch.randn(V, D, generator=generator)
UNEMBEDDING[7] = UNEMBEDDING[3]  # two tokens of exactly one logit
LABELS = torch.randint(0, 12, (B, S), generator=generator)
LABELS[:, 2:4] = -100
DOCUMENTS = (torch.arange(S) >= 6).long().expand(B, S)
SOFT = SoftTargets(top_k=5, teacher="reference")


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_the_mass_is_what_the_reference_holds_no_likelier_than_the_target(chunk, monkeypatch):
    monkeypatch.setattr("wmtp.loss.reference.default_chunk", lambda *_: chunk)
    read = ReferenceReading({"reference_mass", "reference_ce", "policy_ce"})(
        HIDDEN, UNEMBEDDING, LABELS, document_ids=DOCUMENTS
    )["signals"]
    valid, checked = valid_targets(LABELS, 1, DOCUMENTS)[0], 0
    p = F.softmax(HIDDEN[0].double() @ UNEMBEDDING.double().T, -1)
    for b, j in valid.nonzero().tolist():
        of_target = p[b, j - 1].tolist()
        y = LABELS[b, j].item()
        twins = {3, 7} if y in (3, 7) else {y}  # a tie is equal in float32, where it is decided
        expected = of_target[y] + sum(q for v, q in enumerate(of_target) if q < of_target[y] and v not in twins)
        assert read["reference_mass"][b, j].item() == pytest.approx(expected, rel=1e-5)
        assert read["reference_ce"][b, j].exp().item() == pytest.approx(1 / of_target[y], rel=1e-4)
        checked += y in (3, 7)
    assert checked and not read["reference_mass"][~valid].any()


@pytest.mark.parametrize("needs", [set(), {"reference_ce"}, {"reference_mass"}, {"reference_ce", "reference_mass"}])
@pytest.mark.parametrize("soft", [None, SoftTargets(), SOFT], ids=["none", "head1", "reference"])
def test_it_gives_what_is_asked_for_in_one_product_a_chunk(needs, soft):
    reading = ReferenceReading(needs, soft)
    teaches = soft is SOFT
    assert reading.asked == bool(needs or teaches)
    with Counted() as counted:
        read = reading(HIDDEN, UNEMBEDDING, LABELS, document_ids=DOCUMENTS)
    assert counted.operations["mm"] == reading.asked
    assert read["signals"].keys() == needs and (read["teacher"] is not None) == teaches
    if "reference_ce" in needs:
        expected = token_cross_entropy(HIDDEN[:1], UNEMBEDDING, LABELS, document_ids=DOCUMENTS)[0]
        torch.testing.assert_close(read["signals"]["reference_ce"], expected)
    if teaches:
        targets = Targets(LABELS, DOCUMENTS)
        assert torch.equal(read["teacher"].ids, top_tokens(HIDDEN, UNEMBEDDING, LABELS, SOFT, targets=targets)[1].ids)
