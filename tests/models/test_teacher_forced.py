import pytest
import torch

from wmtp.loss import weighted_mtp_cross_entropy
from wmtp.models.teacher_forced import TeacherForced


def test_k_step_logits_are_the_models_own_later_ones(tiny):
    model = tiny()
    tokens = torch.randint(0, 67, (2, 9))
    ids = torch.tensor([[0] * 5 + [1] * 4, [0] * 7 + [-1] * 2])
    own = model(tokens, document_ids=ids)[0]
    forced = TeacherForced(model, 3)(tokens, document_ids=ids)
    assert forced.shape == (3, 2, 9, 67)
    for k in (1, 2, 3):
        for t in range(9):
            expected = own[:, t + k - 1] if t + k - 1 < 9 else torch.zeros(2, 67)
            assert torch.equal(forced[k - 1, :, t], expected)


def test_every_head_has_head_1s_cross_entropy_where_it_has_a_target(tiny):
    """Head k at t reads the logits at t + k - 1, so a target's CE is the next-token CE, whichever head predicts it."""
    tokens = torch.randint(0, 67, (2, 12))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [-1] * 3])
    labels = torch.where(ids >= 0, tokens, -100)
    out = TeacherForced(tiny(), 3)(
        tokens, document_ids=ids, loss_fn=weighted_mtp_cross_entropy, labels=labels
    )  # fmt: skip
    assert out.valid.sum(dim=(1, 2)).tolist() == [4 + 6 + 8, 3 + 5 + 7, 2 + 4 + 6]
    for k in range(3):
        torch.testing.assert_close(out.ce[k][out.valid[k]], out.ce[0][out.valid[k]])


def test_a_transformers_model_can_be_wrapped(tiny_hf):
    hf, _ = tiny_hf()
    tokens = torch.randint(0, 67, (1, 6))
    with torch.no_grad():
        forced, own = TeacherForced(hf, 2)(tokens), hf(tokens).logits
    assert torch.equal(forced[0], own) and torch.equal(forced[1, :, :-1], own[:, 1:])


def test_a_model_with_heads_of_its_own_is_refused(tiny):
    with pytest.raises(
        ValueError, match=r"needs a model that gives \[B, S, V\] or \[1, B, S, V\], got \(2, 1, 4, 67\)"
    ):
        TeacherForced(tiny(num_future_tokens=2), 2)(torch.zeros(1, 4, dtype=torch.long))
