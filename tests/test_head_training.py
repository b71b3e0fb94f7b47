"""The options of the extra heads, on models: gradients of the trunk, weights over time, and what is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wmtp.errors import UserError
from wmtp.loss import HeadTraining, mtp_loss
from wmtp.models import llama_mtp
from wmtp.weighting import dft, uniform

SHAPE = {"vocab_size": 61, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "intermediate_dim": 48}
H = 3
UNIFORM = uniform()
TOKENS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))


def small_model(num_heads=H, seed=0):
    torch.manual_seed(seed)
    return llama_mtp(**SHAPE, max_seq_len=16, num_future_tokens=num_heads)


def gradients(model, *, head_weights=None, weighting=UNIFORM, **options):
    """Takes the gradients of one step: {parameter: gradient or None}, and the options with what they gathered."""
    heads = HeadTraining(**options)
    heads.prepare(model.num_future_tokens, head_weights, "cpu")
    model.zero_grad(set_to_none=True)
    out = model(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=weighting, **heads.at(0))
    out.loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters()}, heads


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("weighting", [uniform(), dft()], ids=["uniform", "dft"])
def test_a_detached_head_leaves_all_that_head_1_uses_to_head_1_bit_for_bit(weighting, chunk, monkeypatch):
    for module in ("fused", "target_logits"):
        monkeypatch.setattr(f"wmtp.loss.{module}.default_chunk", lambda *_: chunk)
    model, alone = small_model(), small_model(num_heads=1)
    alone.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("extra_heads")})
    joint, _ = gradients(model, weighting=weighting)
    own, _ = gradients(alone, weighting=weighting)
    for targets in ("hard", "soft"):
        detached, _ = gradients(model, weighting=weighting, trunk_gradient=0.0, targets=targets)
        assert all(torch.equal(detached[name], gradient) for name, gradient in own.items())
    for name, gradient in gradients(model, weighting=weighting, trunk_gradient=0.0)[0].items():
        same = name.startswith(("extra_heads.", "layers.2."))  # layers.2 is head 1's block
        assert (relative_error(gradient, joint[name]) < 1e-6) == same, name


def test_a_factor_scales_what_a_head_gives_to_the_shared_parameters():
    model = small_model()
    alone, joint = gradients(model, head_weights=[1.0, 0.0, 0.0])[0], gradients(model)[0]
    second = gradients(model, head_weights=[1.0, 1.0, 0.0])[0]
    mixed, _ = gradients(model, trunk_gradient=[0.25, 3.0])
    for name, gradient in mixed.items():
        of_2, of_3 = second[name] - alone[name], joint[name] - second[name]
        expected = joint[name] if name.startswith("extra_heads") else alone[name] + 0.25 * of_2 + 3.0 * of_3
        assert relative_error(gradient, expected) < 1e-5, name


def test_detached_heads_cost_no_product_of_the_trunk_and_save_those_of_the_unembeddings_gradient():
    def flops(num_layers, **options):
        torch.manual_seed(0)
        model = llama_mtp(**(SHAPE | {"num_layers": num_layers}), max_seq_len=16, num_future_tokens=H)
        with FlopCounterMode(display=False) as counted:
            gradients(model, **options)
        return counted.get_total_flops()

    of_a_block = [flops(4, trunk_gradient=factor) - flops(3, trunk_gradient=factor) for factor in (0.0, 1.0)]
    assert of_a_block[0] == of_a_block[1], "a block of the trunk runs back once, whatever the heads do"
    rows = 2 * (14 + 13)  # pairs of the heads 2 and 3 in two rows of 16 tokens
    saved = flops(3, trunk_gradient=1.0) - flops(3, trunk_gradient=0.0)
    assert saved == 2 * rows * SHAPE["vocab_size"] * SHAPE["embed_dim"]


def test_todays_gradients_bit_for_bit_where_no_option_is_set():
    model = small_model()
    today, _ = gradients(model)
    model.zero_grad(set_to_none=True)
    out = model(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform())
    out.loss_sum.backward()
    assert all(torch.equal(today[name], p.grad) for name, p in model.named_parameters())


def test_the_agreement_is_the_cosine_of_gradients_in_the_trunks_state():
    model = small_model()
    _, heads = gradients(model, adaptive=True, momentum=0.0)
    trunk = model(TOKENS, return_trunk=True).detach()
    by_head = []
    for k in range(H):
        h = trunk.clone().requires_grad_()
        weights = [float(k == head) for head in range(H)]
        out = model(
            TOKENS,
            trunk_state=h,
            loss_fn=mtp_loss,
            labels=TOKENS,
            weighting=uniform(),
            head_weights=torch.tensor(weights),
        )
        by_head.append(torch.autograd.grad(out.loss_sum, h)[0].flatten())
    expected = [float(torch.cosine_similarity(by_head[0], g, dim=0)) for g in by_head]
    heads.end_step(lambda sums: sums)
    assert heads.state_dict()["agreement"] == pytest.approx(expected, abs=1e-5)
    weights = heads.at(1)["head_weights"].tolist()
    assert weights == pytest.approx([1.0, *(max(0.05, cosine) for cosine in expected[1:])], abs=1e-5)
    resumed = HeadTraining(adaptive=True, momentum=0.0)
    resumed.prepare(H, None, "cpu")
    resumed.load_state_dict(heads.state_dict())
    assert torch.equal(resumed.at(1)["head_weights"], heads.at(1)["head_weights"])


def test_the_agreement_is_over_all_ranks():
    _, heads = gradients(small_model(), adaptive=True, momentum=0.0)
    heads.end_step(lambda sums: torch.tensor([[4.0, 1.0, -4.0], [4.0, 1.0, 16.0]]))  # what the ranks have together
    assert heads.state_dict()["agreement"] == pytest.approx([1.0, 0.5, -0.5])


def test_weights_over_time():
    heads = HeadTraining(decay=0.5, warm_up_steps=4)
    heads.prepare(4, [1.0, 2.0, 2.0, 2.0], "cpu")
    assert heads.at(0)["head_weights"].tolist() == [1.0, 0.25, 0.125, 0.0625]
    assert heads.at(3)["head_weights"].tolist() == heads.at(100)["head_weights"].tolist() == [1.0, 1.0, 0.5, 0.25]
    plain = HeadTraining()
    plain.prepare(4, None, "cpu")
    assert plain.at(0) == {"head_weights": None, "head_targets": None}


@pytest.mark.parametrize(
    ("options", "num_heads", "message"),
    [
        ({"trunk_gradient": -1}, 3, "trunk_gradient must be a number >= 0"),
        ({"trunk_gradient": [1.0, 1.0, 1.0]}, 3, "trunk_gradient has 3 factors, the model 2 extra heads"),
        ({"trunk_gradient": 0.0}, 1, "the model has one head"),
        ({"targets": "firm"}, 3, "targets must be one of hard, soft, both, got 'firm'"),
        ({"top_k": 0}, 3, "top_k must be a whole number >= 1"),
        ({"decay": 0.0}, 3, "decay must be a number > 0"),
        ({"trunk_gradient": [0.5, 0.5], "decay": 0.5}, 2, "trunk_gradient has 2 factors, the model 1 extra heads"),
        ({"warm_up_steps": -1}, 3, "warm_up_steps must be a whole number >= 0"),
        ({"floor": 1.0}, 3, r"floor must be in \[0, 1\), got 1.0"),
        ({"adaptive": True, "trunk_gradient": 0.0}, 3, "adaptive needs trunk_gradient > 0"),
    ],
)
def test_what_cannot_be_is_refused(options, num_heads, message):
    with pytest.raises(UserError, match=message):
        HeadTraining(**options).prepare(num_heads, None, "cpu")


def test_what_a_run_or_a_model_has_not_is_refused():
    with pytest.raises(UserError, match="warm_up_steps 9 is longer than the run's 8 steps: heads 2 and on would never"):
        HeadTraining(warm_up_steps=9).prepare(3, None, "cpu", num_steps=8)
    for num_steps in (9, 0, None):  # 0: an adapter is evaluated
        HeadTraining(warm_up_steps=9).prepare(3, None, "cpu", num_steps=num_steps)
    with pytest.raises(UserError, match="compares gradients in the trunk's state, and head_weights is 0 for head 1"):
        HeadTraining(adaptive=True).prepare(3, [0.0, 1.0, 1.0], "cpu")
    model = small_model()
    HeadTraining(adaptive=True).prepare(3, None, "cpu", model=model)
    model.requires_grad_(False).extra_heads.requires_grad_(True)
    with pytest.raises(UserError, match="compares gradients in the trunk's state, and the trunk is frozen; set"):
        HeadTraining(adaptive=True).prepare(3, None, "cpu", model=model)
    with pytest.raises(UserError, match="the model has one head, so that no option of extra heads can count"):
        HeadTraining(targets="soft").prepare(1, None, "cpu")


def test_a_frozen_teacher_needs_its_model():
    with pytest.raises(UserError, match="teacher is 'reference', and there is no reference_model"):
        HeadTraining(targets="soft", teacher="reference").require_teacher(None)
