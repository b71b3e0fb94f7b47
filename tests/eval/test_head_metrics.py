import math

import pytest
import torch

from wmtp.eval.heads import head_sums, summarize_heads
from wmtp.loss import score_heads, weighted_mtp_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ce_is_the_losss_and_accuracy_that_of_full_logits(dtype):
    torch.manual_seed(0)
    hidden, unembedding = torch.randn(3, 2, 11, 8, dtype=dtype) * 4, torch.randn(23, 8, dtype=dtype)
    labels = torch.randint(0, 23, (2, 11))
    labels[0, :4] = -100
    documents = torch.tensor([[0] * 11, [0] * 5 + [1] * 6])
    scores = score_heads(hidden, unembedding, labels, document_ids=documents)
    loss = weighted_mtp_cross_entropy(hidden, unembedding, labels, document_ids=documents)
    assert torch.equal(scores.valid, loss.valid)
    torch.testing.assert_close(scores.ce, loss.ce, rtol=1e-5, atol=1e-5)

    best = (hidden.double() @ unembedding.double().T).argmax(-1)  # [H, B, S], at the position that predicts
    for k in (1, 2, 3):
        hits = torch.zeros(2, 11, dtype=torch.bool)
        hits[:, k:] = best[k - 1, :, :-k] == labels[:, k:]
        assert torch.equal(scores.correct[k - 1], hits & scores.valid[k - 1])


def test_summary_by_hand():
    # One head, two targets with probabilities 1/2 and 1/8; the first is the most likely token, the second is not.
    hidden = torch.eye(2).view(1, 1, 2, 2)
    hidden = torch.cat([hidden, torch.zeros(1, 1, 1, 2)], dim=2)  # the last position predicts nothing
    log = torch.tensor([[0.5, 0.25, 0.25, 1e-30], [0.125, 0.125, 0.25, 0.5]]).log().T  # [V, D]: one column a position
    scores = score_heads(hidden, log, torch.tensor([[3, 0, 1]]))
    summary = summarize_heads(head_sums(scores))
    assert summary["ce_head1"] == pytest.approx(math.log(4), rel=1e-5)  # (ln 2 + ln 8) / 2
    assert summary["perplexity_head1"] == pytest.approx(4, rel=1e-5)
    assert summary["accuracy_head1"] == 0.5
