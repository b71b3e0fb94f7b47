"""Exports with all heads, as `transformers` alone reads them: `trust_remote_code=True` and modeling_wmtp.py."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from wmtp.generation import Request, Sampling, generate
from wmtp.models import export_hf, from_checkpoint, load_checkpoint
from wmtp.pretrained import byte_tokenizer

HEADS = 4
SIZES = {"vocab_size": 259, "num_layers": 3, "max_seq_len": 128, "num_future_tokens": HEADS}
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
PROMPTS = [TOKENS[:1, :length] for length in (1, 17)]
GREEDY = {"max_new_tokens": 16, "do_sample": False}
# Of every family that differs from Llama in what an extra head needs: a window, norms, biases, scales, fused tensors.
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "Qwen3": {"head_dim": 16},
    "Gemma3": {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16},
    "Olmo2": {},
    "Granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "Phi3": {"sliding_window": 8},
}


@pytest.fixture
def exported(tiny, tmp_path):
    """A model, and its export."""
    model = tiny(**SIZES)
    export_hf(model, tmp_path / "export", tokenizer_source=byte_tokenizer())
    return model.requires_grad_(False), tmp_path / "export"


def with_heads(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).requires_grad_(False)


def counted(model, **options):
    """Greedy texts of the prompts, and the forwards that they took."""
    forwards = []
    hook = model.model.register_forward_hook(lambda *_: forwards.append(1))
    found = [model.generate(prompt, **GREEDY | options) for prompt in PROMPTS]
    hook.remove()
    return found, len(forwards)


def test_all_heads_load_and_without_the_code_head_1_as_ever(exported, recwarn, capsys):
    model, folder = exported
    heads, alone = with_heads(folder), AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    assert type(alone) is transformers.LlamaForCausalLM and isinstance(heads, transformers.LlamaForCausalLM)
    output = heads(TOKENS, num_heads=HEADS)
    torch.testing.assert_close(output.head_logits, model(TOKENS), atol=1e-4, rtol=1e-4)
    assert torch.equal(output.logits, output.head_logits[0])
    assert torch.equal(heads(TOKENS).logits, alone(TOKENS).logits)
    assert torch.equal(heads(TOKENS, num_heads=2).head_logits.argmax(-1), output.head_logits[:2].argmax(-1))
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<eos>"
    assert "random" not in capsys.readouterr().err  # no word of weights that were not initialized
    fewer = with_heads(folder, num_future_tokens=2)
    assert len(fewer.extra_heads) == 1 and torch.equal(fewer(TOKENS, num_heads=2).logits, fewer(TOKENS).logits)


def test_a_greedy_text_is_plain_decodings_and_wmtps(exported):
    model, folder = exported
    heads, alone = with_heads(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected, steps = counted(alone)
    requests = [Request(i, tuple(prompt[0].tolist()), (i,)) for i, prompt in enumerate(PROMPTS)]
    for num_drafts in (0, HEADS - 1):
        done = generate(model, byte_tokenizer(), requests, Sampling(16), batch_size=1, num_drafts=num_drafts)
        ours = {completion.id: list(completion.tokens) for completion in done}
        assert [ours[i] for i in range(len(PROMPTS))] == [
            e[0, p.shape[1] :].tolist() for e, p in zip(expected, PROMPTS, strict=True)
        ]
    for block in heads.extra_heads[:2]:  # heads 2 and 3 that are right wherever head 1 repeats itself
        block.load_state_dict(heads.model.layers[-1].state_dict())
    for options in ({}, {"num_heads": 1}, {"num_heads": 2}, {"repetition_penalty": 1.3}, {"min_new_tokens": 9}):
        found, forwards = counted(heads, **options)
        plain = {key: value for key, value in options.items() if key != "num_heads"}
        assert all(map(torch.equal, found, counted(alone, **plain)[0])), options
        assert forwards <= steps
    heads.lm_head.weight.zero_()  # a model that always says 0: every draft is right
    found, forwards = counted(heads)
    assert all(text[0, -16:].tolist() == [0] * 16 for text in found) and forwards == len(PROMPTS) * (1 + 16 // HEADS)


def test_what_does_not_draft_says_so_and_is_transformers_own(exported, caplog, capsys):
    _, folder = exported
    heads, alone = with_heads(folder), AutoModelForCausalLM.from_pretrained(folder)
    both = {}
    for name, model in (("heads", heads), ("alone", alone)):
        torch.manual_seed(3)
        both[name] = [
            model.generate(TOKENS, **GREEDY),
            model.generate(PROMPTS[1], max_new_tokens=9, do_sample=True),
            model.generate(PROMPTS[1], max_new_tokens=9, do_sample=False, num_beams=3),
            model.generate(PROMPTS[1], return_dict_in_generate=True, output_scores=True, **GREEDY).sequences,
        ]
    assert all(map(torch.equal, both["heads"], both["alone"]))
    said = capsys.readouterr().err + caplog.text
    assert "plain decoding, without the extra heads: several prompts" in said and "heads: sampling" in said
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heads.generate(PROMPTS[1], streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)
    text = pipeline("text-generation", model=folder, trust_remote_code=True)(
        tokenizer.decode(PROMPTS[1][0]), return_full_text=False, **GREEDY
    )
    assert "not supported" not in capsys.readouterr().err and text[0]["generated_text"]
    with pytest.raises(ValueError, match="num_heads must be between 1 and the model's 4, got 5"):
        heads(TOKENS, num_heads=5)
    with pytest.raises(ValueError, match="labels are for head 1"):
        heads(TOKENS, labels=TOKENS, num_heads=2)
    assert torch.equal(heads(TOKENS, labels=TOKENS).loss, alone(TOKENS, labels=TOKENS).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_again_keeps_the_heads_for_transformers_and_wmtp(exported, tmp_path, dtype):
    _, folder = exported
    first = with_heads(folder, dtype=dtype)
    first.save_pretrained(tmp_path / "again")
    there = {file.name for file in (tmp_path / "again").iterdir()}
    assert there == {file.name for file in folder.iterdir()} - {"tokenizer.json", "tokenizer_config.json"} | {
        "generation_config.json"
    }
    again = with_heads(tmp_path / "again", dtype=dtype)
    assert torch.equal(again(TOKENS, num_heads=HEADS).head_logits, first(TOKENS, num_heads=HEADS).head_logits)
    states = []
    for source in (folder, tmp_path / "again"):
        ours = from_checkpoint(source).to(dtype)
        load_checkpoint(ours, source)
        states.append(ours.state_dict())
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    (tmp_path / "again" / "mtp_heads.safetensors").unlink()
    with pytest.raises(OSError, match=r"mtp_heads\.safetensors"):
        with_heads(tmp_path / "again")
    with pytest.raises(ValueError, match="call push_to_hub"):
        first.save_pretrained(tmp_path / "other", push_to_hub=True)


@pytest.fixture(scope="module")
def modeling():
    file = Path(__file__).parents[2] / "wmtp" / "models" / "modeling_wmtp.py"
    spec = importlib.util.spec_from_file_location("modeling_wmtp", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_every_family_are_its_own_layers(modeling, tmp_path, family, monkeypatch):
    monkeypatch.setitem(sys.modules, "modeling_wmtp", modeling)
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, num_future_tokens=HEADS,
        pad_token_id=0, bos_token_id=2, eos_token_id=1, **FAMILIES[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(modeling, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    type(model).register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path)
    heads, alone = with_heads(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    tokens = TOKENS % 94 + 3
    logits = heads(tokens, num_heads=HEADS).head_logits
    assert torch.equal(logits[0], alone(tokens).logits)
    for prompt in (tokens[:1, :3], tokens[:1, :20]):  # below and above the window
        assert torch.equal(heads.generate(prompt, **GREEDY), alone.generate(prompt, **GREEDY))
    for k, head in enumerate(heads.extra_heads, 1):
        alone.model.layers[-1].load_state_dict(head.state_dict())
        torch.testing.assert_close(logits[k], alone(tokens).logits, atol=1e-5, rtol=1e-5)
