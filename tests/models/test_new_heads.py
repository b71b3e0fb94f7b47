"""How heads start that a checkpoint lacks: copies of the last block, or blocks that change nothing yet."""

import pytest
import torch
from family_parity import case_of, near

from wmtp.errors import UserError
from wmtp.loss import mtp_loss
from wmtp.models import (
    add_lora,
    export_hf,
    from_checkpoint,
    init_lora,
    llama_mtp,
    load_adapter,
    load_checkpoint,
    save_adapter,
)
from wmtp.pretrained.config_files import CheckpointError
from wmtp.weighting import uniform

TOKENS = torch.randint(0, 67, (2, 20), generator=torch.Generator().manual_seed(1))
ZERO = {"num_future_tokens": 3, "head_init": "zero_residual"}


def loaded(folder, *, adapters=None, log=None, **options):
    with torch.device("meta"):
        model = from_checkpoint(folder, **options)
        if adapters is not None:
            add_lora(model, **adapters)
    load_checkpoint(model, folder, log=log)
    if adapters is not None:
        init_lora(model)
    return model


def train(model, steps):
    """Steps of AdamW on the extra heads' loss; returns the loss of each, and the first gradients."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses, first = [], None
    for _ in range(steps):
        weights = torch.tensor([0.0] + [1.0] * (model.num_future_tokens - 1))
        out = model(TOKENS, loss_fn=mtp_loss, labels=TOKENS, weighting=uniform(), head_weights=weights)
        (out.loss_sum / out.num_targets).backward()
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        losses.append(float(out.loss_sum.detach() / out.num_targets))
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


# Norms before, behind, and on both sides, with weights from one and from zero; multipliers; fused projections.
@pytest.mark.parametrize(
    ("name", "looped"),
    [
        *(("Llama 2, CodeLlama", looped) for looped in (False, True)),
        *((name, False) for name in ("OLMo 2", "Granite 3", "Phi-3 of 4k, Phi-4")),
        ("Gemma 3, text", True),
    ],
)
def test_a_zero_residual_head_starts_as_the_trunks_state_and_learns(tmp_path, name, looped):
    case, said = case_of(name), []
    model = loaded(case.folder, **ZERO, looped_heads=looped, log=said.append)
    assert said == [f"heads 2 to 3 are new, {case.folder} lacks them: head_init zero_residual"]
    with torch.no_grad():
        trunk = model(TOKENS, return_trunk=True)
        expected = torch.nn.functional.linear(model.norm(trunk), model.unembedding)
        logits = model(TOKENS)
        assert torch.equal(logits[1], expected) and torch.equal(logits[2], expected)
        near(logits[0], case.hf(TOKENS).logits)
    copies = dict(loaded(case.folder, num_future_tokens=3, looped_heads=looped).named_parameters())
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, copies[name])}
    inside = ("attn.output_proj.weight", "mlp.w2.weight") if model.config.norms == "pre" else ("post_norm.scale",)
    assert changed == {name for name in copies if name.startswith("extra_heads") and name.endswith(inside)}
    losses, first = train(model, 4)
    assert losses[-1] < losses[0] - 0.1
    sizes = {name: float(g.abs().max()) for name, g in first.items()}
    assert all(0 < sizes[name] < 10 for name in changed), "neither nothing nor 1 / sqrt(eps)"
    export_hf(model, tmp_path / "trained")
    again = loaded(tmp_path / "trained", **ZERO)  # whose heads are in the folder
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS)) and again.num_new_heads == 0
        more = loaded(tmp_path / "trained", **ZERO | {"num_future_tokens": 4})
        assert torch.equal(more(TOKENS)[:3], model(TOKENS)) and more.num_new_heads == (not looped)


def test_copies_are_head_1_bit_for_bit_and_random_weights_start_as_said():
    model = loaded(case_of("OLMo 2").folder, num_future_tokens=3)
    with torch.no_grad():
        assert all(torch.equal(head, model(TOKENS)[0]) for head in model(TOKENS))
    shape = {"vocab_size": 67, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 8}
    random = llama_mtp(**shape, intermediate_dim=8, max_seq_len=32, **ZERO)
    with torch.no_grad():
        expected = random.norm(random(TOKENS, return_trunk=True)) @ random.unembedding.T
        assert torch.equal(random(TOKENS)[1], expected)
    with pytest.raises(UserError, match="head_init must be one of copies, zero_residual, got 'zeros'"):
        llama_mtp(**shape, intermediate_dim=8, max_seq_len=32, head_init="zeros")


@pytest.mark.parametrize("name", ["Llama 2, CodeLlama", "OLMo 2"])
@pytest.mark.parametrize("looped", [False, True], ids=["separate", "looped"])
def test_adapters_train_zero_residual_heads_of_a_frozen_base(tmp_path, name, looped):
    folder, options = case_of(name).folder, ZERO | {"looped_heads": looped}
    adapters = {"rank": 4, "train_norms": name == "OLMo 2", "trunk": "frozen" if name != "OLMo 2" else "lora"}
    model = loaded(folder, adapters=adapters, **options)
    with torch.no_grad():
        assert torch.equal(
            model(TOKENS)[1],
            torch.nn.functional.linear(model.norm(model(TOKENS, return_trunk=True)), model.unembedding),
        )
    losses, _ = train(model, 6)
    assert losses[-1] < losses[0] - 0.05
    save_adapter(model, tmp_path / "adapter", base_weights="0")
    again = loaded(folder, adapters=adapters, **options)
    load_adapter(again, tmp_path / "adapter", base_weights="0")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), model(TOKENS))
    copies = loaded(folder, adapters=adapters, **options | {"head_init": "copies"})
    with pytest.raises(CheckpointError, match="has head_init zero_residual, the model copies; set it to the adapter's"):
        load_adapter(copies, tmp_path / "adapter", base_weights="0")


@pytest.mark.parametrize(
    ("name", "adapters", "message"),
    [
        ("Llama 2, CodeLlama", {"targets": ["q_proj", "v_proj"]}, "adapters.targets has not both"),
        ("Llama 2, CodeLlama", {"dora": True}, "whose direction adapters.dora cannot scale"),
        ("OLMo 2", {}, "starts the norms of olmo2 behind attention and MLP at zero, and adapters.train_norms is false"),
    ],
)
def test_what_adapters_could_not_train_is_refused_where_heads_are_new(tmp_path, name, adapters, message):
    folder = case_of(name).folder
    with pytest.raises(UserError, match=message) as error:
        loaded(folder, adapters=adapters, **ZERO)
    assert "\n" not in str(error.value)
    loaded(folder, adapters={**adapters, "heads": "full"}, **ZERO)
    export_hf(loaded(folder, num_future_tokens=3), tmp_path / "heads")
    loaded(tmp_path / "heads", adapters=adapters, **ZERO)
