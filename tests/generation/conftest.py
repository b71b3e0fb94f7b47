import pytest
import torch
from decoding import Letters
from random_models import random_decoder

from wmtp.models import llama_mtp

# Small, with grouped queries and a head_dim that is not embed_dim / num_heads.
TINY = {
    "vocab_size": 67,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "intermediate_dim": 40,
    "max_seq_len": 64,
    "head_dim": 8,
    "num_future_tokens": 3,
}


@pytest.fixture
def tiny():
    """Builds tiny decoders whose every parameter is random and wide enough to tell mistakes apart."""

    def build(**changes):
        return random_decoder(**{**TINY, **changes}).eval()

    return build


@pytest.fixture
def letters():
    return Letters()


@pytest.fixture(scope="session")
def trained():
    """A tiny model of three heads that has learnt a language in which some next tokens are certain and some are not."""
    from wmtp.loss import weighted_mtp_cross_entropy

    torch.manual_seed(0)
    model = llama_mtp(**TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        words = torch.randint(0, 8, (8, 8))  # words of four letters, fixed by the first: 0-7, +8, +16, +24
        rows = (words[:, :, None] + torch.tensor([0, 8, 16, 24])).flatten(1)
        loss = model(rows, loss_fn=weighted_mtp_cross_entropy, labels=rows)
        (loss.loss_sum / loss.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
