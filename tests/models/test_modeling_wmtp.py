"""Exports with all heads, as `transformers` alone reads them: `trust_remote_code=True` and modeling_wmtp.py."""

import json

import pytest
import torch
import transformers
from family_parity import write_case
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer, pipeline

from wmtp.generation import Request, Sampling, generate
from wmtp.models import export_hf, from_checkpoint, load_checkpoint
from wmtp.pretrained import byte_tokenizer

HEADS = 4
SIZES = {"vocab_size": 259, "num_layers": 3, "max_seq_len": 128, "num_future_tokens": HEADS}
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
PROMPTS = [TOKENS[:1, :length] for length in (1, 17)]
GREEDY = {"max_new_tokens": 16, "do_sample": False}


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
    places = torch.arange(17)[None] // 2
    positioned = (model.generate(PROMPTS[1], position_ids=places, **GREEDY) for model in (heads, alone))
    assert torch.equal(*positioned) and "positions of your own" in capsys.readouterr().err + caplog.text
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


def test_a_cache_has_every_head_from_its_first_token_on(exported):
    heads = with_heads(exported[1])
    whole, cache = heads(TOKENS, num_heads=HEADS).head_logits, DynamicCache()
    parts = [heads(part, past_key_values=cache, num_heads=HEADS).head_logits for part in TOKENS.split(9, 1)]
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=1e-5)
    plain = DynamicCache()
    heads(TOKENS, past_key_values=plain)
    with pytest.raises(ValueError, match="head 2 has 0 of the cache's 24 tokens; pass num_heads=4 from the first"):
        heads(TOKENS[:, :1], past_key_values=plain, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"no room for the heads; pass a DynamicCache\(\) without a config"):
        heads(TOKENS, past_key_values=DynamicCache(config=heads.config), num_heads=HEADS)


def test_fewer_heads_are_saved_for_transformers_and_wmtp_and_more_are_refused(exported, tmp_path):
    for count in (1, 2):
        with_heads(exported[1], num_future_tokens=count).save_pretrained(tmp_path / str(count))
        again, ours = with_heads(tmp_path / str(count)), from_checkpoint(tmp_path / str(count))
        load_checkpoint(ours, tmp_path / str(count))
        assert len(again.extra_heads) == count - 1 and ours.num_future_tokens == count
        assert torch.equal(ours(TOKENS), exported[0](TOKENS)[:count])
    with pytest.raises(ValueError, match=r"num_future_tokens must be at most the 4 of .*mtp_heads\.safetensors, got 5"):
        with_heads(exported[1], num_future_tokens=5)


def test_a_kind_of_layer_whose_rope_depends_on_the_length_decodes_plainly(tmp_path, caplog, capsys):
    ropes = {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    ropes["sliding_attention"] = {"rope_type": "default", "rope_theta": 500.0}
    folder = write_case(tmp_path, "gemma3_text", {"rope_parameters": ropes}).folder
    model = from_checkpoint(folder, num_future_tokens=2)
    load_checkpoint(model, folder)
    export_hf(model, tmp_path / "export")
    with_heads(tmp_path / "export").generate(PROMPTS[0] % 97, **GREEDY)
    assert "RoPE that depends on the length" in capsys.readouterr().err + caplog.text
