"""Packing changes where documents lie, not what they teach: the loss and its gradients are those of each one alone."""

import pytest
import torch

from wmtp.data import Documents, pack, python_functions
from wmtp.loss import mtp_loss
from wmtp.models import llama_mtp
from wmtp.pretrained import byte_tokenizer
from wmtp.weighting import rho1, uniform

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def documents():
    found = python_functions(TOKENIZER, max_functions=100, max_body_lines=4)
    return Documents("short functions", [document for document in found if len(document) <= 400][:12])


@pytest.mark.slow
@pytest.mark.parametrize("weighting", [uniform(), rho1("select"), rho1("soft"), rho1("soft", per_head=True)])
def test_packed_rows_give_the_loss_of_documents_one_by_one(documents, weighting):
    torch.manual_seed(0)
    model = llama_mtp(
        vocab_size=TOKENIZER.vocab_size, num_layers=2, num_heads=2, num_kv_heads=1, embed_dim=16, intermediate_dim=24,
        max_seq_len=2048, num_future_tokens=3,
    )  # fmt: skip
    reference = torch.rand(TOKENIZER.vocab_size) * 5  # a CE that depends on the token alone, wherever it lies

    def total(packed):
        longest = max(map(len, documents))
        data = pack(documents, 2 * longest if packed else longest, packed=packed, pad_id=TOKENIZER.pad_id)
        model.zero_grad()
        loss = targets = 0.0
        for row in range(len(data)):
            batch = data.batch([row])
            out = model(
                batch["tokens"], document_ids=batch["document_ids"], loss_fn=mtp_loss, labels=batch["labels"],
                weighting=weighting, signals={"reference_ce": reference[batch["tokens"]]},
            )  # fmt: skip
            out.loss_sum.backward()
            loss, targets = loss + out.loss_sum.item(), targets + out.num_targets.item()
        return len(data), loss, targets, {name: p.grad.clone() for name, p in model.named_parameters()}

    rows, loss, targets, gradients = total(packed=True)
    rows_alone, loss_alone, targets_alone, gradients_alone = total(packed=False)
    assert rows < rows_alone == 12
    assert targets == targets_alone
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_alone[name], rtol=1e-3, atol=1e-4 * gradient.abs().max().item())
