"""Looped heads: one block whose rounds are heads 2 to H; what a model is, its files, and what goes wrong."""

import json
import sys

import pytest
import torch
import transformers
from family_parity import case_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from wmtp.errors import UserError
from wmtp.loss import HeadTraining, mtp_loss, weighted_mtp_cross_entropy
from wmtp.models import add_lora, export_hf, from_checkpoint, load_adapter, load_checkpoint, save_adapter
from wmtp.models.export_meta import check_meta
from wmtp.pretrained.config_files import CheckpointError
from wmtp.training.performance import model_flops
from wmtp.weighting import uniform

H = 4
TOKENS = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))
LOOPED = {"num_future_tokens": H, "looped_heads": True}


def loaded(folder, **options):
    model = from_checkpoint(folder, **options)
    load_checkpoint(model, folder)
    return model


def states_by_definition(model, tokens):
    """Head 1's block on the trunk's state; head k's state is the extra block after k - 1 rounds from there."""
    trunk = h = model(tokens, return_trunk=True)
    outs = [model.layers[-1](trunk)]
    for _ in range(model.num_future_tokens - 1):
        h = model.extra_heads[0](h)
        outs.append(h)
    return torch.stack([model.norm(out) for out in outs])


def test_head_k_is_the_block_after_k_minus_1_rounds_and_its_gradients_are_autograds(tiny):
    model = tiny(**LOOPED)
    assert len(model.extra_heads) == 1
    one, four = (sum(p.numel() for p in tiny(num_future_tokens=heads).parameters()) for heads in (1, H))
    assert sum(p.numel() for p in model.parameters()) == one + (four - one) // (H - 1)
    logits = states_by_definition(model, TOKENS) @ model.unembedding.T
    assert torch.equal(model(TOKENS), logits)
    assert torch.equal(model(TOKENS, num_heads=3), logits[:3])
    documents = (torch.arange(20) >= 9).long().expand(2, 20)
    packed = model(TOKENS, document_ids=documents)
    for part in (slice(0, 9), slice(9, 20)):
        torch.testing.assert_close(packed[:, :, part], model(TOKENS[:, part]), atol=1e-4, rtol=1e-4)

    out = model(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform())
    out.loss_sum.backward()
    exact = tiny(**LOOPED).double()
    z = torch.log_softmax(states_by_definition(exact, TOKENS) @ exact.unembedding.T, -1)
    expected = -sum(z[k - 1, :, :-k].gather(-1, TOKENS[:, k:, None]).sum() for k in range(1, H + 1))
    expected.backward()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double() / scale, theirs.grad / scale, atol=1e-5, rtol=1e-5, msg=name)


def test_two_looped_heads_are_two_separate_ones(tiny):
    assert torch.equal(tiny(num_future_tokens=2, looped_heads=True)(TOKENS), tiny(num_future_tokens=2)(TOKENS))
    assert not tiny(num_future_tokens=1, looped_heads=True).config.looped_heads, "there is nothing to loop"


def test_rounds_cost_the_products_of_separate_heads(tiny):
    counts, by_hand = [], []
    for looped in (False, True):
        model = tiny(num_future_tokens=H, looped_heads=looped)
        for frozen in (False, True):  # all but the matrices of the extra heads
            if frozen:
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name.startswith("extra_heads") and parameter.dim() == 2)
            with FlopCounterMode(display=False) as counted:
                model(TOKENS, loss_fn=weighted_mtp_cross_entropy, labels=TOKENS).loss_sum.backward()
            counts.append(counted.get_total_flops())
        by_hand.append(model_flops(model).token)
    assert counts[0] == counts[2]
    # On a frozen trunk, queries, keys and values of the first round alone give their input no gradient.
    inputs = [
        name
        for name, _ in model.named_parameters()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]
    sizes = sum(model.get_parameter(name).numel() for name in inputs if name.startswith("extra_heads"))
    assert by_hand[1] - by_hand[0] == 2 * (H - 2) * sizes
    assert counts[3] - counts[1] == TOKENS.numel() * 2 * (H - 2) * sizes


@pytest.mark.parametrize("name", ["Llama 2, CodeLlama", "Gemma 3, text", "Qwen2, the last layers with a window"])
@torch.no_grad()
def test_an_export_comes_back_and_gives_transformers_the_same_logits_and_text(tmp_path, name, capsys):
    case = case_of(name)
    tokens = torch.cat([TOKENS, TOKENS.flip(0)], 1) % 94 + 3
    model = loaded(case.folder, **LOOPED).eval()
    assert torch.equal(model(tokens)[1], model(tokens)[0]) and not torch.equal(model(tokens)[2], model(tokens)[0])
    for parameter in model.extra_heads.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    export_hf(model, tmp_path / "looped")
    assert json.loads((tmp_path / "looped" / "mtp_config.json").read_text()) == LOOPED
    again = loaded(tmp_path / "looped")
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))
    further = loaded(tmp_path / "looped", num_future_tokens=6)
    assert torch.equal(further(tokens)[:H], model(tokens)) and further.num_new_heads == 0
    assert torch.equal(loaded(tmp_path / "looped", num_future_tokens=1)(tokens), model(tokens, num_heads=1))

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "looped", trust_remote_code=True, dtype=torch.float32)
    assert "random" not in capsys.readouterr().err and len(theirs.extra_heads) == 1
    torch.testing.assert_close(theirs(tokens, num_heads=H).head_logits, model(tokens), atol=1e-4, rtol=1e-4)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "looped", dtype=torch.float32)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    for prompt in (tokens[:1, :3], tokens[:1, :20]):  # below and above the window
        assert torch.equal(theirs.generate(prompt, **greedy), alone.generate(prompt, **greedy))
    theirs.save_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tmp_path / "saved")(tokens), model(tokens))
    assert type(alone) is getattr(transformers, type(alone).__name__) and "extra" not in str(alone)


@torch.no_grad()
def test_drafts_of_rounds_have_keys_and_values_of_their_own_in_transformers(tiny, tmp_path):
    """Each forward's drafts are head 2's to H's choices by a full forward pass over the same text."""
    model = tiny(**LOOPED, max_seq_len=64)
    export_hf(model, tmp_path / "looped")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "looped", trust_remote_code=True)
    windows = []
    theirs.model.register_forward_pre_hook(
        lambda _, args, kwargs: windows.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    text = theirs.generate(TOKENS[:1], max_new_tokens=16, do_sample=False)[0].tolist()
    seen = len(TOKENS[0])
    for window in windows[1:]:
        assert window[0] == text[seen]
        expected = model(torch.tensor([text[:seen]]))[1:, 0, -1].argmax(-1).tolist()
        assert window[1:] == expected
        right = next(
            (i for i, d in enumerate(window[1:]) if seen + 1 + i >= len(text) or d != text[seen + 1 + i]), H - 1
        )
        seen += 1 + right


@pytest.mark.parametrize("stored", [True, False], ids=["looped", "separate"])
def test_a_checkpoint_of_other_heads_is_refused_in_one_line(tiny, tmp_path, stored):
    export_hf(tiny(num_future_tokens=3, looped_heads=stored), tmp_path / "there")
    with torch.device("meta"):
        model = from_checkpoint(tmp_path / "there", looped_heads=not stored)
    theirs, ours = ("one looped block", "separate ones") if stored else ("separate ones", "one block")
    message = f"has {theirs} for its heads 2 to 3, the model {ours} .*; set looped_heads to {str(stored).lower()}"
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(model, tmp_path / "there")
    assert "\n" not in str(error.value)


def test_what_has_no_place_for_them_says_so(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"Meta's format has no place for looped_heads True, .* use format=hf"):
        check_meta(tiny(**LOOPED, head_dim=None))
    with pytest.raises(UserError, match="looped_heads must be true or false, got 'yes'"):
        tiny(num_future_tokens=3, looped_heads="yes")
    export_hf(tiny(**LOOPED), tmp_path / "looped")
    file = tmp_path / "looped" / "mtp_config.json"
    file.write_text(json.dumps({"num_future_tokens": H}))
    with pytest.raises(CheckpointError, match=r"config\.json declares looped_heads True, mtp_config\.json gives False"):
        from_checkpoint(tmp_path / "looped")
    file.write_text(json.dumps({"num_future_tokens": H, "looped_heads": 3}))
    with pytest.raises(CheckpointError, match="looped_heads"):
        from_checkpoint(tmp_path / "looped")


def gradients(model, **options):
    heads = HeadTraining(**options)
    heads.prepare(H, None, "cpu", model=model)
    model.zero_grad(set_to_none=True)
    out = model(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform(), **heads.at(0))
    out.loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters()}, heads


def test_options_of_the_heads(tiny):
    model, alone = tiny(**LOOPED), tiny(num_future_tokens=1)
    alone.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("extra_heads")})
    joint, half = gradients(model)[0], gradients(model, trunk_gradient=0.5)[0]
    detached, _ = gradients(model, trunk_gradient=0.0)
    alone(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform()).loss_sum.backward()
    own = {name: parameter.grad for name, parameter in alone.named_parameters()}
    for name, gradient in joint.items():
        if name.startswith("extra_heads"):
            torch.testing.assert_close(detached[name], gradient)
            torch.testing.assert_close(half[name], gradient)
        else:
            torch.testing.assert_close(detached[name], own[name])
            torch.testing.assert_close(half[name], (own[name] + gradient) / 2, atol=1e-4, rtol=1e-4)
    _, heads = gradients(model, adaptive=True, momentum=0.0)
    heads.end_step(lambda sums: sums)
    trunk = model(TOKENS, return_trunk=True).detach().requires_grad_()
    pulls = []
    for weights in ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]):
        chosen = {"trunk_state": trunk, "head_weights": torch.tensor(weights)}
        out = model(TOKENS, **chosen, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform())
        pulls.append(torch.autograd.grad(out.loss_sum, trunk)[0].flatten())
    cosine = float(torch.cosine_similarity(*pulls, dim=0))
    assert heads.state_dict()["agreement"] == pytest.approx([1.0, cosine], abs=1e-5)
    assert heads.at(1)["head_weights"].tolist() == pytest.approx([1.0] + [max(0.05, cosine)] * (H - 1), abs=1e-5)
    with pytest.raises(UserError, match="looped heads give the trunk one gradient together; give one factor"):
        HeadTraining(trunk_gradient=[1.0, 0.5, 0.5]).prepare(H, None, "cpu", model=model)


@torch.no_grad()
def test_an_adapter_keeps_that_its_heads_are_looped(tiny, tmp_path):
    export_hf(tiny(), tmp_path / "base")
    chosen = {"rank": 2, "train_norms": True}
    model = add_lora(loaded(tmp_path / "base", **LOOPED), **chosen)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape), alpha=0.05)
    save_adapter(model, tmp_path / "adapter", base_weights="0")
    again = add_lora(loaded(tmp_path / "base", **LOOPED), **chosen)
    load_adapter(again, tmp_path / "adapter", base_weights="0")
    assert torch.equal(again(TOKENS), model(TOKENS))
    separate = add_lora(loaded(tmp_path / "base", num_future_tokens=H), **chosen)
    with pytest.raises(CheckpointError, match="has looped_heads True, the model False; set it to the adapter's"):
        load_adapter(separate, tmp_path / "adapter", base_weights="0")
    export_hf(model, tmp_path / "merged")
    torch.testing.assert_close(loaded(tmp_path / "merged")(TOKENS), model(TOKENS), atol=1e-4, rtol=1e-4)
    assert "modeling_wmtp" not in sys.modules
